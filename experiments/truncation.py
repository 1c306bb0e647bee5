"""Styles of truncated backpropagation through time, and policies of updating, compared.

    python experiments/truncation.py            both tasks, an RNN and an LSTM: five minutes
    python experiments/truncation.py --quick    a few updates of one task, in seconds
    python experiments/truncation.py --tasks text --text book.txt

An error may go back n steps in several styles: cut the sequence every n steps (TensorFlow's: 1 to n
steps), let every error go back n steps (the true one), or cut every n steps and let errors go back
over one cut (Williams & Peng: n + 1 to 2n steps). And the parameters may change after every
sequence, after every n steps or after every step. r2rt's "Styles of truncated backpropagation"
(2016) asked what that changes, of a simple RNN; here it is asked again, of tasks whose answer is
known, with 95 % confidence intervals over the seeds, which one program trains together.

The task toy is a stream of fair bits x in which y_t = 1 with probability
1/2 + x_{t-3}/2 - x_{t-8}/4: a window of 4 steps has to be reached for the first term, one of 9 for
the second, and the loss of who knows none, one or both of them is known. The task text is to
predict the next character, of a file or of generated sentences in which verbs agree with nouns 4 to
25 characters back (lstmjax/data/characters.py); there the loss at the verb's ending is ln 2 for who
has forgotten the noun.

All styles see as many sequences, so policies that update more often make more updates. Times are of
training one seed on one sequence, by programs that take turns.
"""

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lstmjax import (
    bptt,
    cli,
    optim,
    parallel,
    seeds,
    timings,
    train,
    truncation_plots,
    truncation_tables,
)
from lstmjax.data import streams
from lstmjax.data.streams import SKIPPED, Streams
from lstmjax.initializers import glorot
from lstmjax.lstm import LSTMState, init_lstm, lstm
from lstmjax.records import Run, params_sha256
from lstmjax.rnn import RNNState, init_rnn, rnn
from lstmjax.timing_tables import aligned
from lstmjax.truncation_tables import Line, Way, ways
from lstmjax.updates import Params, make_update

CELLS = {"rnn": (rnn, init_rnn, RNNState), "lstm": (lstm, init_lstm, LSTMState)}


class Sizes(NamedTuple):
    """What a task is run with where nothing else is said; the names are those of ``Config``."""

    depths: tuple[int, ...]
    policies: tuple[str, ...]
    steps: int
    batch_size: int
    hidden_size: int
    sequences: int
    test_rows: int
    test_steps: int


SIZES = {
    "toy": Sizes((2, 5, 10), ("per_sequence", "per_chunk", "per_step"), 40, 16, 16, 500, 200, 500),
    "text": Sizes((5, 10, 20), ("per_sequence", "per_chunk"), 60, 16, 32, 600, 60, 400),
}
QUICK = {"depths": (5,), "policies": ("per_sequence",), "sequences": 10}
QUICK |= {"test_rows": 4, "test_steps": 100}
RATES = {"rnn": 0.005, "lstm": 0.02}  # with which full backpropagation did well, on other seeds
AT_ONCE = 10  # sequences at most in one call


@dataclasses.dataclass(frozen=True)
class Config:
    tasks: tuple[Literal["toy", "text"], ...] = ()
    """What to learn; both, or with --quick toy alone, when not given."""
    cells: tuple[Literal["rnn", "lstm"], ...] = ("rnn", "lstm")
    """The recurrent layers."""
    text: str | None = None
    """A text file in UTF-8 for the task text; generated sentences when not given."""
    lags: tuple[int, int] = (3, 8)
    """How far back the two inputs lie that decide the toy task's targets, the nearer one first."""
    depths: tuple[int, ...] = ()
    """Values of n; each divides the steps. 2, 5, 10 (toy) or 5, 10, 20 (text) when not given."""
    policies: tuple[Literal["per_sequence", "per_chunk", "per_step"], ...] = ()
    """When to update; all, and for text all but per_step, when not given."""
    norm: Literal["mean", "r2rt"] = "mean"
    """Gradients as those of the mean over all steps, or the cell's over n as r2rt has them."""
    steps: int | None = None
    """T of a sequence; 40 (toy) or 60 (text) when not given."""
    batch_size: int | None = None
    """Rows of a sequence; 16 when not given."""
    hidden_size: int | None = None
    """Units of the recurrent layer; 16 (toy) or 32 (text) when not given."""
    sequences: int | None = None
    """Sequences to train on; 500 (toy) or 600 (text) when not given."""
    learning_rate: float | None = None
    """Adam's step size; 0.005 for the RNN and 0.02 for the LSTM when not given."""
    clip_norm: float | None = 1.0
    """Bound on the gradient's global norm."""
    seeds: int = 6
    """How many initial weights, each with its own stream of the toy task."""
    quick: bool = False
    """One task, ten sequences, one value of n, one update a sequence."""
    seconds: float = 0.3
    """Seconds to time each program for."""
    rounds: int = 5
    """Turns that each program gets; it runs at least once in each."""
    devices: int | None = None
    """Devices that share the seeds; all accelerators, or all CPU cores, when not given."""
    seed: int = 0
    """The first of the seeds."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


def settled(config: Config) -> dict[str, Sizes]:
    """The sizes of each task.

    Raises:
      ConfigError: a value that does not fit.
    """
    cli.check(config, "cells", len(config.cells) > 0, "at least one")
    numbers = ("steps", "batch_size", "hidden_size", "sequences", "seeds", "rounds", "devices")
    cli.check_counts(config, *numbers)
    cli.check_counts(config, "seed", least=0)
    cli.check_positive(config, "learning_rate", "clip_norm", "seconds")
    near, far = config.lags
    cli.check(config, "lags", 0 <= near < far < 1000, "0 <= nearer < farther < 1000")
    found = {}
    for task in dict.fromkeys(config.tasks or (("toy",) if config.quick else ("toy", "text"))):
        given = {name: getattr(config, name, None) for name in Sizes._fields}
        given = {name: value for name, value in given.items() if value}
        sizes = SIZES[task]._replace(**{**(QUICK if config.quick else {}), **given})
        fits = all(0 < n <= sizes.steps and sizes.steps % n == 0 for n in sizes.depths)
        cli.check(config, "depths", fits, f"divisors of the {sizes.steps} steps")
        fits, told = sizes.steps <= sizes.test_steps, f"at most {sizes.test_steps}, the test's"
        cli.check(config, "steps", fits, told)
        found[task] = sizes
    cli.check(config, "text", config.text is None or "text" in found, "none without --tasks text")
    return found


def read(task: str, config: Config, sizes: Sizes) -> Streams:
    """A task's data."""
    size = sizes.sequences, sizes.steps, sizes.batch_size
    test = sizes.test_steps, sizes.test_rows
    if task == "toy":
        numbers = range(config.seed, config.seed + config.seeds)
        return streams.toy(numbers, size, test, config.lags)
    return streams.text(config.text, config.seeds, size, test)


# ---- the programs -------------------------------------------------------------------------------


def head_losses(head: tuple, hs: jax.Array, ys: jax.Array) -> jax.Array:
    """[S, B] nats of outputs that an affine head reads off hs [S, B, H]: of ids ys [S, B]."""
    logs = log_probabilities(head, hs)
    return -jnp.take_along_axis(logs, ys[..., None], -1)[..., 0]


def log_probabilities(head: tuple, hs: jax.Array) -> jax.Array:
    w, b = head
    logits = hs @ w
    return jax.nn.log_softmax(logits + jnp.broadcast_to(b, logits.shape))


def zeros(cell: str, rows: int, hidden: int) -> Any:
    state = CELLS[cell][2]
    return state(*(jnp.zeros((rows, hidden)) for _ in state._fields))


def initial(key: jax.Array, cell: str, width: int, sizes: Sizes, tx: Any) -> tuple:
    """(TrainState, the layer's state) before the first sequence."""
    of_cell, of_head, of_steps = jax.random.split(key, 3)
    weights = CELLS[cell][1](of_cell, width, sizes.hidden_size)
    head = glorot(of_head, (sizes.hidden_size, width), jnp.float32), jnp.zeros(width)
    state = train.init_state(Params(weights, head), tx, of_steps)
    return state, zeros(cell, sizes.batch_size, sizes.hidden_size)


def trainer(config: Config, cell: str, width: int, way: Way, tx: Any) -> Callable:
    """``advance(both, xs [N, T, B], ys) -> (both, losses [N])`` of one seed."""
    how = way.k1, way.k2, way.policy
    update = make_update(head_losses, CELLS[cell][0], tx, *how, norm=config.norm)

    def one(both, batch):
        xs, ys = batch
        both, metrics = update(both, {"x": jax.nn.one_hot(xs, width), "y": ys})
        total, count = metrics["loss"]
        return both, total / count

    return lambda both, xs, ys: jax.lax.scan(one, both, (xs, ys))


def tester(cell: str, sizes: Sizes, data: Streams) -> Callable:
    """``test(params) -> (loss, loss at the verbs, mass [T, T])`` of one seed.

    mass[t, τ] is the norm of ∂L_t/∂z_τ, what the gates take in at step τ, the mean over rows. It
    enters as further inputs, all 0, that W_x hands through.
    """
    layer, steps, width = CELLS[cell][0], sizes.steps, data.width

    def losses(params, xs, state, ps):
        state, hs = layer(params.cell, xs, state)
        return state, -jnp.sum(ps * log_probabilities(params.head, hs), -1)

    def test(params):
        xs = jax.nn.one_hot(data.test_xs, width)
        start = zeros(cell, xs.shape[1], sizes.hidden_size)
        start, _ = losses(params, xs[:SKIPPED], start, data.test_ps[:SKIPPED])
        xs, ps = xs[SKIPPED:], data.test_ps[SKIPPED:]
        found = losses(params, xs, start, ps)[1]
        at_verb = jnp.nan
        if data.lags is not None:
            shown = (data.lags[SKIPPED:] > 0).astype(found.dtype)
            at_verb = jnp.sum(shown * found) / jnp.sum(shown)

        few = slice(0, 8)  # rows enough for a mean of norms
        w_x = params.cell.w_x
        handed = jnp.eye(w_x.shape[1], dtype=w_x.dtype)
        wide = params._replace(cell=params.cell._replace(w_x=jnp.concatenate([w_x, handed])))
        begin = jax.tree.map(lambda a: a[few], start)

        def of_z(z):
            both = jnp.concatenate([xs[:steps, few], z], -1)
            return losses(wide, both, begin, ps[:steps, few])[1]

        z = jnp.zeros((steps, begin.h.shape[0], w_x.shape[1]))
        rows, pull = jax.vjp(of_z, z)

        def of_step(chosen):  # [T], 1 at t
            (of_all,) = pull(jnp.broadcast_to(chosen[:, None], rows.shape))
            return jnp.mean(jnp.linalg.norm(of_all, axis=-1), -1)

        return jnp.mean(found), at_verb, jax.vmap(of_step)(jnp.eye(steps))

    return test


# ---- the run ------------------------------------------------------------------------------------


def measure(
    config: Config,
    task: str,
    cell: str,
    sizes: Sizes,
    data: Streams,
    devices: list,
    clock: train.Clock,
) -> tuple[list[Line], Any]:
    """Trains a cell in every way; the lines, and the parameters of the last way."""
    tx = optim.clipped_adam(config.learning_rate or RATES[cell], config.clip_norm)
    keys = [jax.random.key(config.seed + number) for number in range(config.seeds)]
    start = seeds.stack([initial(key, cell, data.width, sizes, tx) for key in keys], devices)
    count = sizes.sequences
    pieces = next(k for k in range(1, count + 1) if count % k == 0 and count // k <= AT_ONCE)
    xs, ys = (
        [seeds.stack(list(a), devices) for a in np.split(of_all, pieces, axis=1)]
        for of_all in (data.xs, data.ys)
    )
    known = ways(sizes.depths, sizes.policies, sizes.steps)

    def compiled(way):
        advance = trainer(config, cell, data.width, way, tx)
        return seeds.spread(advance, devices, donate=()).lower(start, xs[0], ys[0]).compile()

    test = seeds.spread(tester(cell, sizes, data), devices, donate=())
    with clock("compile"), ThreadPoolExecutor(len(devices)) as pool:
        programs = dict(zip(known, pool.map(compiled, known), strict=True))
        test = test.lower(start[0].params).compile()
    results = {}
    for way in tqdm(known, f"{task}, {cell}", disable=None):
        both = start
        with clock("train"):
            for piece in zip(xs, ys, strict=True):
                both, _ = jax.block_until_ready(programs[way](both, *piece))
        with clock("eval"):
            results[way] = seeds.unstack(test(both[0].params), config.seeds)
    calls = {way: partial(programs[way], start, xs[0], ys[0]) for way in known}
    with clock("train"):
        times = timings.take_turns(calls, seconds=config.seconds, rounds=config.rounds)
    # A call trains all seeds on one piece; the devices share them.
    share = len(devices) * pieces / (len(start[0].step) * count)
    lines = [
        as_line(task, cell, way, sizes.steps, times[way], share, results[way]) for way in known
    ]
    return lines, both[0].params


def as_line(
    task: str, cell: str, way: Way, steps: int, timing: timings.Timing, share: float, results: tuple
) -> Line:
    loss, at_verb, masses = results
    starts = bptt.window_start(steps, way.k1, way.k2)
    reached = [truncation_tables.effective_depth(mass, starts) for mass in masses]
    return Line(
        task,
        cell,
        *way,
        steps,
        float(np.mean(np.arange(steps) - starts + 1)),
        *(share * seconds for seconds in (timing.median, *timing.quartiles)),
        *(tuple(map(float, of_seeds)) for of_seeds in (loss, at_verb, *zip(*reached, strict=True))),
    )


def figures(lines: list[Line], data: dict[str, Streams]) -> dict[str, Any]:
    """The figures by name."""
    found = {}
    for task, one in data.items():
        here, name = [line for line in lines if line.task == task], one.title
        name = name[0].upper() + name[1:]
        found[f"{task}-loss"] = truncation_plots.losses(f"{name}: test loss", here, one.levels)
        if one.lags is not None:
            levels = (math.log(2), "the noun forgotten"), (0.0, "remembered")
            title = f"{name}: test loss at the verb's number"
            found[f"{task}-verb"] = truncation_plots.losses(title, here, levels, at_verb=True)
        title = f"{name}: what is reached, and what it costs"
        found[f"{task}-cost"] = truncation_plots.costs(title, here)
    return found


def run(config: Config) -> None:
    sizes = settled(config)
    devices, clock = parallel.use_devices(config.devices), train.Clock()
    data = {task: read(task, config, one) for task, one in sizes.items()}
    settings = {
        **dataclasses.asdict(config),
        "sizes": {task: one._asdict() for task, one in sizes.items()},
        "titles": {task: one.title for task, one in data.items()},
        "levels": {task: [name for _, name in one.levels] for task, one in data.items()},
    }
    for one in data.values():
        print(f"training on {one.title}, sha256 {one.dataset.sha256[:12]}")
    lines, params, metrics = [], {}, {}
    with Run.create("truncation", settings, out=config.out) as folder:
        for task in sizes:
            if data[task].levels:
                metrics[f"{task}_levels"] = [level for level, _ in data[task].levels]
            for cell in dict.fromkeys(config.cells):
                found, params[f"{task}, {cell}"] = measure(
                    config, task, cell, sizes[task], data[task], devices, clock
                )
                lines += found
                print("\n" + aligned(truncation_tables.HEAD, truncation_tables.rows(found)) + "\n")
        for name, figure in figures(lines, data).items():
            folder.figure(name, figure)
        folder.finish(
            dataset=streams.joined([one.dataset for one in data.values()]),
            metrics={**metrics, **truncation_tables.columns(lines, config.cells)},
            seconds=clock.seconds,
            params_sha256=params_sha256(params),
            seed=config.seed,
            devices=devices,
        )
    print(f"record in {folder.path}")


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, description=__doc__)))
