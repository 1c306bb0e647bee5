"""How far gradients reach back through time: simple RNNs, the GRU, and LSTMs by their forget gates.

    python experiments/gradient_flow.py              some two minutes on 2 CPU cores
    python experiments/gradient_flow.py --quick      a look, in seconds; no result

For every model, the norm of the gradient of the last step's loss with respect to the state k steps
before, measured from real gradients in float64, over all seeds at once in one compiled program:
before training and after a short one. The task needs memory: the first symbol of a sequence is one
of four, what follows are other symbols at random, and every step asks what the first one was.

The linear RNNs have orthogonal kernels times 0.9 and 1.1, so their gradients are 0.9^k and 1.1^k
exactly, whatever the data; they are the rulers of the figure and are not trained. LSTMs differ in
the initial bias of their forget gate alone: 0, 1, 5, or chrono (Tallec & Ollivier, 2018) for the
lag that is trained. What reaches them along the cell state, through forget gates alone, is drawn
apart from what goes through their outputs.

The last figure is the wall of Pascanu, Mikolov & Bengio ("On the difficulty of training recurrent
neural networks", 2013): the loss of an RNN of one unit after 50 steps over its weight and bias, and
gradient descent on it with and without clipping by norm.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lstmjax import cli, diagnostics, flow_plots, flow_tables, losses, optim, parallel, train
from lstmjax.gru import GRUState, gru, init_gru
from lstmjax.initializers import chrono, glorot
from lstmjax.lstm import LSTMState, init_lstm, lstm
from lstmjax.records import Run, params_sha256, to_json, write_file
from lstmjax.rnn import RNNParams, RNNState, init_rnn, rnn

CLASSES, OTHERS = 4, 4  # symbols to be remembered, and symbols that follow
SYMBOLS = CLASSES + OTHERS
FULL = {"seeds": 5, "hidden_size": 32, "batch_size": 32, "lag": 100, "reach": 200, "updates": 400}
QUICK = {"seeds": 2, "hidden_size": 6, "batch_size": 4, "lag": 12, "reach": 20, "updates": 5}


@dataclasses.dataclass(frozen=True)
class Config:
    quick: bool = False
    """Small sizes and few updates: a look, not a result."""
    seeds: int | None = None
    """How many seeds, from --seed on: 5, or 2 with --quick."""
    hidden_size: int | None = None
    """Units of every model: 32, or 6 with --quick."""
    batch_size: int | None = None
    """Sequences in a batch, of training and of measuring: 32, or 4 with --quick."""
    lag: int | None = None
    """Steps from the first symbol to the last question in training: 100, or 12 with --quick."""
    reach: int | None = None
    """The longest lag that is measured: 200, or 20 with --quick."""
    updates: int | None = None
    """Batches to train on: 400, or 5 with --quick."""
    learning_rate: float = 0.01
    """Adam's step size."""
    clip_norm: float = 1.0
    """Bound on the gradient's global norm in training."""
    wall_steps: int = 50
    """Steps of the RNN of one unit whose loss has the wall."""
    wall_updates: int = 80
    """Steps of gradient descent at the wall."""
    wall_clip: float = 0.5
    """Bound on the gradient's norm there, where it is clipped."""
    seed: int = 0
    """The first seed, of weights and data."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


def settled(config: Config) -> Config:
    """The configuration with the numbers of its mode where none were given."""
    cli.check_counts(config, *FULL, "wall_steps", "wall_updates")
    cli.check_counts(config, "seed", least=0)
    cli.check_positive(config, "learning_rate", "clip_norm", "wall_clip")
    mode = QUICK if config.quick else FULL
    given = {name: getattr(config, name) for name in mode}
    config = dataclasses.replace(config, **{n: given[n] or mode[n] for n in mode})
    cli.check(config, "seeds", config.seeds >= 2, "at least 2: intervals need more than one")
    fits = config.seed + config.seeds <= 2**31
    cli.check(config, "seeds", fits, f"so many that the last seed is below {2**31}")
    return config


# ---- models -------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What models of one program share: the cell's name in ``diagnostics.STEPS``, layer, state."""

    cell: str
    layer: Any
    state: type


class Weights(NamedTuple):
    """A cell's weights, and those of the logits that read it: w [H, C], b [C]."""

    cell: Any
    w: jax.Array
    b: jax.Array


LINEAR = Kind("linear_rnn", partial(rnn, activation="linear"), RNNState)
LSTM = Kind("lstm", lstm, LSTMState)


def models(lag: int) -> dict[str, tuple[Kind, Any]]:
    """(kind, ``init(key, inputs, units)``) by name, in the order of the figure's legend."""
    return {
        "linear RNN, radius 0.9": (LINEAR, partial(scaled_rnn, radius=0.9)),
        "linear RNN, radius 1.1": (LINEAR, partial(scaled_rnn, radius=1.1)),
        "RNN (tanh)": (Kind("rnn", rnn, RNNState), init_rnn),
        "GRU": (Kind("gru", gru, GRUState), init_gru),
        "LSTM, forget bias 0": (LSTM, partial(init_lstm, forget_bias=0.0)),
        "LSTM, forget bias 1": (LSTM, partial(init_lstm, forget_bias=1.0)),
        "LSTM, forget bias 5": (LSTM, partial(init_lstm, forget_bias=5.0)),
        "LSTM, chrono": (LSTM, partial(init_lstm, forget_bias=chrono(max(lag, 2)))),
    }


def scaled_rnn(key: jax.Array, inputs: int, units: int, radius: float) -> RNNParams:
    """A linear RNN whose kernel is orthogonal times ``radius``."""
    params = init_rnn(key, inputs, units, bias=False)
    return params._replace(w_h=radius * params.w_h)


def draw(init: Any, units: int, seed: jax.Array) -> Weights:
    of_cell, of_w = jax.random.split(jax.random.key(seed))
    w = glorot(of_w, (units, CLASSES), jnp.float32)
    return Weights(init(of_cell, SYMBOLS, units), w, jnp.zeros(CLASSES))


# ---- the task -----------------------------------------------------------------------------------


def sequences(seed: int, count: int, batch: int, steps: int) -> np.ndarray:
    """[count, T, B] symbols: the first is one to be remembered, the others are not."""
    rng = np.random.default_rng([seed, 11])
    symbols = rng.integers(CLASSES, SYMBOLS, (count, steps, batch), dtype=np.int8)
    symbols[:, 0] = rng.integers(0, CLASSES, (count, batch), dtype=np.int8)
    return symbols


def one_hot(symbols: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    return jax.nn.one_hot(symbols, SYMBOLS, dtype=dtype)


def recall_loss(kind: Kind, weights: Weights, symbols: jax.Array) -> jax.Array:
    """The mean cross-entropy over all steps [T] and rows [B] of symbols [T, B]."""
    _, hs = kind.layer(weights.cell, one_hot(symbols))
    logits = hs @ weights.w + weights.b[None, None]
    asked = jnp.broadcast_to(symbols[:1].astype(int), symbols.shape)
    return jnp.mean(losses.cross_entropy(logits, asked))


def fit(
    kind: Kind, weights: Weights, symbols: jax.Array, *, learning_rate: float, max_norm: float
) -> tuple[Weights, diagnostics.ClipReport]:
    """Weights after an update on each batch of symbols [N, T, B], and N reports of clipping."""
    tx = optim.clipped_adam(learning_rate, max_norm)

    def update(carry, batch):
        weights, state = carry
        grads = jax.grad(lambda weights: recall_loss(kind, weights, batch))(weights)
        report = diagnostics.clip_report(grads, max_norm)
        changes, state = tx.update(grads, state, weights)
        return (jax.tree.map(jnp.add, weights, changes), state), report

    (weights, _), reports = jax.lax.scan(update, (weights, tx.init(weights)), symbols)
    return weights, reports


# ---- what is measured ---------------------------------------------------------------------------


def measure(kind: Kind, weights: Weights, symbols: jax.Array, lag: int) -> dict[str, jax.Array]:
    """One model on one batch, without training.

    Args:
      kind: the model's.
      weights: in float64.
      symbols: [T, B]; norms are those of the last step's loss.
      lag: of the question that ``right`` counts answers to, the longest in training.

    Returns:
      ``flow``, ``direct``, ``rest`` [T]: mean norms at lags 0 … T-1 over that of lag 0, of the cell
      state if there is one (NaN at lag 0, where the loss has not reached it) or of h; the latter
      two are NaN without a cell state. The others as in ``flow_tables.Row``.
    """
    xs = one_hot(symbols, weights.w.dtype)
    step, params, asked = diagnostics.STEPS[kind.cell], weights.cell, symbols[0].astype(int)
    zeros = jnp.zeros((symbols.shape[1], params.w_h.shape[0]), xs.dtype)
    start = kind.state(*[zeros for _ in kind.state._fields])

    def logits(h):
        return h @ weights.w + weights.b[None]

    def loss(h):
        return losses.cross_entropy(logits(h), asked)

    norms = diagnostics.gradient_norms(step, params, start, xs, loss)
    states = diagnostics.states_of(step, params, start, xs)
    size, nothing = norms["h"][0], jnp.full_like(norms["h"], jnp.nan)
    found = {"flow": norms["h"] / size, "direct": nothing, "rest": nothing}
    if "c" in norms:
        path = diagnostics.cell_path(step, params, start, xs, loss)
        parts = {"flow": path.total, "direct": path.direct, "rest": path.rest}
        means = {n: jnp.mean(diagnostics.safe_norm(a), axis=-1) for n, a in parts.items()}
        # The loss reads h alone: at lag 0 there is nothing yet.
        found = {name: (mean / size).at[0].set(jnp.nan) for name, mean in means.items()}
    # Eigenvalues at every 20th step of two sequences say as much as all of them.
    few = jax.tree.map(lambda a: jnp.concatenate([a[:-1:20, :2], a[-1:, :2]]), states)
    radii = diagnostics.jacobian_radius(step, params, few, xs[::20, :2])
    found["radius"] = jnp.exp(jnp.mean(jnp.log(radii)))
    found |= {"half_life": jnp.asarray(jnp.nan), "longest": jnp.asarray(jnp.nan)}
    if kind.cell in diagnostics.GATED:
        gates = diagnostics.gates(kind.cell, params, states, xs)
        keep = gates["z" if kind.cell == "gru" else "f"]
        lives = diagnostics.memory_half_life(keep)
        found |= {"half_life": jnp.median(lives), "longest": jnp.max(lives)}
    for name, t in (("right", lag), ("right_reach", len(symbols) - 1)):
        last = min(t, len(symbols) - 1) + 1
        found[name] = jnp.mean(losses.correct(logits(states.h[last]), asked))
    return found


class Programs:
    """What is compiled, once for each kind of model, and run for all seeds at once."""

    def __init__(self, config: Config, clock: train.Clock):
        self._train = partial(fit, learning_rate=config.learning_rate, max_norm=config.clip_norm)
        self._measure = partial(measure, lag=config.lag)
        self._clock = clock
        self._compiled = {}

    def fit(self, kind: Kind, weights: Weights, symbols: np.ndarray) -> tuple:
        """``fit``, [S, …]."""
        return self._run("train", self._train, kind, weights, symbols)

    def measure(self, kind: Kind, weights: Weights, symbols: np.ndarray) -> dict[str, np.ndarray]:
        """``measure``, [S, …], in float64."""
        with jax.enable_x64(True):
            weights = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)
            return self._run("eval", self._measure, kind, weights, symbols)

    def _run(self, what, function, kind, *arguments):
        if (what, kind.cell) not in self._compiled:
            run = jax.jit(jax.vmap(partial(function, kind)))
            self._compiled[what, kind.cell] = self._clock.compile(run, *arguments)
        with self._clock(what):
            return jax.tree.map(np.asarray, self._compiled[what, kind.cell](*arguments))


# ---- the wall -----------------------------------------------------------------------------------

WALL_START, WALL_TARGET = 0.5, 0.2  # h before the first step, and what it ought to be at the last
WALL_FROM, WALL_RATE = (1.8, 0.0), 0.05  # (w, b) at first, and the step size


def wall_loss(steps: int, point: jax.Array) -> jax.Array:
    """(h_T − 0.2)² of h_t = tanh(w h_{t-1} + b) from h_0 = 0.5, at point (w, b)."""
    w, b = point
    params = RNNParams(jnp.zeros((1, 1), w.dtype), w[None, None], b[None])
    start = RNNState(jnp.full((1, 1), WALL_START, w.dtype))
    state, _ = rnn(params, jnp.zeros((steps, 1, 1), w.dtype), start)
    return (state.h[0, 0] - WALL_TARGET) ** 2


def descend(steps: int, updates: int, max_norm: float | None) -> tuple:
    """Gradient descent on ``wall_loss``: (points [U+1, 2], losses [U+1], ``ClipReport`` of [U])."""
    loss = partial(wall_loss, steps)

    def update(point, _):
        grads = jax.grad(loss)(point)
        report = diagnostics.clip_report(grads, max_norm)
        share = report.after / jnp.maximum(report.before, jnp.finfo(point.dtype).tiny)
        new = point - WALL_RATE * share * grads
        return new, (new, report)

    start = jnp.asarray(WALL_FROM)
    _, (points, reports) = jax.lax.scan(update, start, None, length=updates)
    points = jnp.concatenate([start[None], points])
    return points, jax.vmap(loss)(points), reports


def wall(config: Config, clock: train.Clock) -> tuple[Any, dict[str, list[float]], dict]:
    """(the figure, numbers for the record, everything drawn)."""
    w, b = np.linspace(0.0, 2.1, 180), np.linspace(-2.6, 0.5, 180)
    with jax.enable_x64(True), clock("eval"):
        points = np.stack(np.meshgrid(w, b), axis=-1).reshape(-1, 2)
        surface = jax.jit(jax.vmap(partial(wall_loss, config.wall_steps)))(points)
        bounds = {"not clipped": None, f"norm clipped at {config.wall_clip:g}": config.wall_clip}
        descents, reports = {}, []
        for label, bound in bounds.items():
            run = jax.jit(partial(descend, config.wall_steps, config.wall_updates, bound))
            way, losses_there, report = jax.tree.map(np.asarray, run())
            descents[label] = flow_plots.Descent(way, losses_there, report.before)
            reports.append(report)
    title = f"An RNN of one unit, h = tanh(w h + b), {config.wall_steps} steps: "
    figure = flow_plots.wall(
        f"{title}(h − {WALL_TARGET})²", w, b, np.reshape(surface, (len(b), len(w))), descents
    )
    numbers = {
        "wall_loss": [float(d.losses[-1]) for d in descents.values()],
        "wall_largest": [float(np.max(d.norms)) for d in descents.values()],
        "wall_clip_rate": [float(np.mean(report.clipped)) for report in reports],
    }
    return figure, numbers, {label: descent._asdict() for label, descent in descents.items()}


# ---- the run ------------------------------------------------------------------------------------


def study(name: str, config: Config, data: dict, programs: Programs) -> tuple:
    """One model: (rows, what was found by phase, its last weights)."""
    before, after = flow_tables.PHASES
    kind, init = models(config.lag)[name]
    lags = flow_tables.lags_up_to(config.reach)
    seeds = jnp.arange(config.seed, config.seed + config.seeds)
    weights = jax.jit(jax.vmap(partial(draw, init, config.hidden_size)))(seeds)
    found = {before: programs.measure(kind, weights, data["measure"])}
    rates = np.full(config.seeds, np.nan)
    rows = flow_tables.rows(name, before, config.seed, lags, found[before], rates)
    if kind is not LINEAR:
        weights, reports = programs.fit(kind, weights, data["train"])
        found[after] = programs.measure(kind, weights, data["measure"])
        rates = np.mean(reports.clipped, axis=1)
        rows += flow_tables.rows(name, after, config.seed, lags, found[after], rates)
    return rows, found, jax.tree.map(np.asarray, weights)


def figures(config: Config, found: dict[str, dict]) -> dict[str, Any]:
    """The figures by name, from what was found by model and phase."""
    before, after = flow_tables.PHASES
    sizes = f"H = {config.hidden_size}, {config.seeds} seeds"
    flow = {}
    for phase in flow_tables.PHASES:
        # The rulers are the same in both panels.
        flow[phase] = {name: f.get(phase, f[before])["flow"] for name, f in found.items()}
    drawn = {
        "gradient-flow": flow_plots.gradient_flow(
            f"Gradient of the last step's loss with respect to the state k steps before; {sizes}",
            flow,
        )
    }
    for phase in flow_tables.PHASES:
        # RNNs have no paths to tell apart.
        lstms = {name: f[phase] for name, f in found.items() if "LSTM" in name}
        drawn[f"cell-path-{phase.split()[0]}"] = flow_plots.cell_paths(
            f"The LSTM's gradient ∂L/∂c by the paths it takes, {phase}; {sizes}", lstms
        )
    return drawn


def run(config: Config) -> None:
    config = settled(config)
    devices, clock = parallel.use_devices(1), train.Clock()
    names, programs = list(models(config.lag)), Programs(config, clock)
    each = range(config.seed, config.seed + config.seeds)
    shape = config.batch_size, config.lag + 1
    data = {
        "train": np.stack([sequences(seed, config.updates, *shape) for seed in each]),
        "measure": np.stack(
            [sequences(seed + 2**31, 1, config.batch_size, config.reach + 1)[0] for seed in each]
        ),
    }
    task = {"name": "first-symbol recall", "source": "generated"}
    settings = {**dataclasses.asdict(config), "models": names}
    with Run.create("gradient-flow", settings, out=config.out) as folder:
        rows, found, weights = [], {}, {}
        for name in tqdm(names, unit=" models", disable=None):
            new, found[name], weights[name] = study(name, config, data, programs)
            rows += new
        figure, at_wall, ways = wall(config, clock)
        for title, drawn in {**figures(config, found), "wall": figure}.items():
            folder.figure(title, drawn)
        write_file(folder.path / "curves.json", to_json({"flow": found, "wall": ways}))
        record = folder.finish(
            dataset=task | {"sha256": params_sha256(data)},
            metrics=flow_tables.columns(rows, names) | at_wall,
            seconds=clock.seconds,
            params_sha256=params_sha256(weights),
            seed=config.seed,
            devices=devices,
        )
    lags = flow_tables.lags_up_to(config.reach)
    for phase in flow_tables.PHASES:
        head = flow_tables.flow_head(lags, phase)
        print(f"\n{phase}\n{flow_tables.aligned(head, flow_tables.flow_rows(rows, lags, phase))}")
    print(f"\n{flow_tables.wall_text(record)}\nrecord in {folder.path}")


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, description=__doc__)))
