"""Learn cos from sin, step by step, with the state carried from batch to batch.

    python experiments/sin.py                    200 updates, about 10 seconds on a CPU
    python experiments/sin.py --preset keras     501 updates of the Keras version
    python experiments/sin.py --live             watch the fit in a window
    python experiments/sin.py --seeds 8          eight seeds in one program, without an animation

Each batch holds 50 windows of 20 steps and goes on where the batch before it stopped, so the last
state of one is the first state of the next. One window of 20 steps is a tenth of a period, too
little to tell at its first step whether the cosine is rising or falling; the carried state knows.

The preset tf1 is a published TensorFlow 1 tutorial: a dense layer of 10, an LSTM of 10, a dense
layer, Adam at 0.006, its loss the squared errors of a window summed (20 times the MSE). The preset
keras is a Keras 1 tutorial: an LSTM of 20 with Keras 1's piecewise linear gates (the cell keras1)
and a dense layer. That tutorial calls ``predict`` after every update, which in Keras advances the
hidden state over the same window a second time; ``--advance-twice`` trains a second model like that
and draws both curves. Expect an MSE near 0.002 from update 300 on.
"""

import contextlib
import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lstmjax import (
    checkpoint,
    cli,
    diagnose,
    distributed,
    lanes,
    losses,
    optim,
    parallel,
    plots,
    reproducible,
    train,
)
from lstmjax.data import Dataset, sin
from lstmjax.keeper import Keeper, save_every
from lstmjax.lane_series import Series, learn
from lstmjax.models import Cell, Init, Method, Precision, SequenceModel, glorot, zeros
from lstmjax.provenance import count_parameters
from lstmjax.records import Run, matching_row, params_sha256
from lstmjax.variants import VARIANTS


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["tf1", "keras"] = "tf1"
    """Where the defaults come from."""
    cell: Cell = "lstm"
    """The recurrent cell; keras1 is the LSTM with the gates of Keras 1."""
    hidden_size: int = 10
    """Units of the recurrent layer."""
    input_size: int | None = 10
    """Size of a dense layer before the LSTM; None for no such layer."""
    init: Init = "tf1"
    """Initial law of the recurrent layer."""
    dense_init: Literal["normal", "glorot"] = "normal"
    """Initial law of the dense layers: N(0, 1) with biases of 0.1, or glorot with biases of 0."""
    loss: Literal["sum", "mean"] = "sum"
    """Squared errors of a window, summed over its steps or averaged."""
    learning_rate: float = 0.006
    """Adam's step size."""
    clip_norm: float | None = None
    """Bound on the gradient's global norm."""
    updates: int = 200
    """Batches to train on, one update each."""
    batch_size: int = 50
    """Windows in a batch."""
    num_steps: int = 20
    """Steps of a window."""
    advance_twice: bool = False
    """Whether to train a second model whose state advances twice on each window."""
    frame_every: int = 5
    """Updates between two frames of the animation."""
    live: bool = False
    """Whether to show the fit in a window as it is learned."""
    method: Method = "fused"
    """How the recurrence runs; onednn and cudnn know the plain LSTM alone, where installed."""
    unroll: int = 1
    """Steps written out in one iteration of the scan."""
    precision: Precision = "float32"
    """Of the factors of products, h included; sums, parameters and c are float32 in any case."""
    devices: int | None = None
    """Devices to split a batch over, in all processes; all there are when not given."""
    distributed: bool = False
    """Whether this is one process of several; SLURM and Kubernetes tell by themselves which one."""
    coordinator: str | None = None
    """By hand: HOST:PORT where all processes find process 0."""
    num_processes: int | None = None
    """By hand: how many processes there are."""
    process_id: int | None = None
    """By hand: which of them this one is, from 0 on."""
    seed: int = 0
    """Of initial weights."""
    seeds: int = 1
    """How many seeds, from --seed on, all in one program, each as if run alone on one device."""
    sweep: str | None = None
    """Values to choose from by the MSE of the last 20 updates (there is no validation split):
    lr=1e-3,3e-3 or clip_norm=1,5."""
    diagnose: bool = False
    """Whether to look at gradients through time, at gates and at clipping as well."""
    save_every: str = "60s"
    """When to save a checkpoint: after so many steps, as 500, or seconds, as 60s."""
    keep: int = 3
    """Checkpoints that stay: the last ones, and no others."""
    resume: str | None = None
    """Folder of a run to go on with, to the same bits; its settings are taken from there."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is not finite: end the run, or leave the step out, unless
    25 in a row are such."""
    deterministic: bool = False
    """Whether to ask XLA for the same bits on every run, on a GPU too, and to check it."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


PRESETS = {
    "tf1": Config(),
    "keras": Config(
        preset="keras",
        cell="keras1",
        hidden_size=20,
        input_size=None,
        init="keras1",
        dense_init="glorot",
        loss="mean",
        updates=501,
        advance_twice=True,
        frame_every=10,
    ),
}
ROWS = {"sin-tf1": PRESETS["tf1"], "sin-keras": PRESETS["keras"]}
DENSE = {
    "normal": (jax.nn.initializers.normal(1.0), jax.nn.initializers.constant(0.1)),
    "glorot": (glorot, zeros),
}


def check(config: Config) -> None:
    sizes = ["hidden_size", "input_size", "updates", "batch_size", "num_steps", "frame_every"]
    cli.check_counts(config, *sizes, "unroll", "devices")
    cli.check_counts(config, "keep")
    save_every(config.save_every)
    cli.check_counts(config, "seed", least=0)
    cli.check_positive(config, "learning_rate", "clip_norm")
    cli.check_method(config)
    fits = config.init in ("keras", "lstmjax") or config.cell in VARIANTS
    cli.check(config, "init", fits, f"keras or lstmjax with --cell {config.cell}")
    lanes.check(config)


def make_model(config: Config) -> SequenceModel:
    dense_init, dense_bias = DENSE[config.dense_init]
    return SequenceModel(
        cell=config.cell,
        hidden_size=config.hidden_size,
        output_size=1,
        every_step=True,
        input_size=config.input_size,
        cell_init=config.init,
        input_init=dense_init,
        input_bias=dense_bias,
        head_init=dense_init,
        head_bias=dense_bias,
        method=config.method,
        unroll=config.unroll,
        precision=config.precision,
    )


def make_optimiser(config: Config):
    adam = optim.tf_adam(config.learning_rate, eps=1e-8)  # TensorFlow 1's and Keras 1's Adam
    return optim.clipped(adam, config.clip_norm)


def make_loss(model: SequenceModel, config: Config, twice: bool):
    """``loss_fn(params, batch, key, carry)``; the carry is the layer's state [B, H]."""

    def loss_fn(params, batch, key, carry):
        if twice:  # over the window before, once more, with the weights it has led to
            again, _ = model.apply({"params": params}, batch["x_before"], carry)
            first = batch["first"][:, None]
            carry = jax.tree.map(lambda a, c: jnp.where(first, c, a), again, carry)
            carry = jax.lax.stop_gradient(carry)  # Keras's predict leaves values
        carry, predictions = model.apply({"params": params}, batch["x"], carry)
        mse = losses.total(losses.squared_error(predictions, batch["y"]), batch["weight"])
        scale = config.num_steps if config.loss == "sum" else 1
        return scale * losses.mean(mse), ({"loss": mse}, carry)

    return loss_fn


def windows_before(data: dict) -> dict:
    """For a state that advances twice: the window before each, and which has none."""
    first = np.zeros(data["x"].shape[:2], bool)
    first[0] = True
    return {"x_before": np.roll(data["x"], 1, axis=0), "first": first}


def first_state(config: Config, data: dict):
    """The train step's state before the first update, and the layer's, [B, H]."""
    model = make_model(config)
    params = jax.jit(model.init)(jax.random.key(config.seed), data["x"][0, :1])["params"]
    carry, _ = jax.eval_shape(lambda x: model.apply({"params": params}, x), data["x"][0])
    carry = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), carry)
    return train.init_state(params, make_optimiser(config), jax.random.key(0)), carry


def learner(
    config: Config,
    data: dict,
    devices: list,
    clock: train.Clock,
    twice: bool,
    diagnosis: diagnose.Diagnosis = diagnose.OFF,
):
    """A model before its first update and how it learns: ``(state, advance)``.

    ``advance(state, plan)`` trains on the windows of a plan; the state is that of the train step
    and the layer's, [B, H].
    """
    count, rows = data["x"].shape[:2]
    step = train.make_train_step(
        make_loss(make_model(config), config, twice),
        make_optimiser(config),
        axis_name=parallel.AXIS,
        stateful=True,
        of_gradient=diagnosis.of_gradient,
        on_nan=config.on_nan,
    )
    run = parallel.runner(step, devices, clock, state=(parallel.WHOLE, parallel.SPLIT))
    run = reproducible.checked(run, config.deterministic)
    windows = {name: a.reshape(count * rows, *a.shape[2:]) for name, a in data.items()}
    windows = parallel.place({n: a for n, a in windows.items() if n != "t"}, devices)
    return first_state(config, data), lambda state, plan: run(state, windows, plan)


def place(state: tuple, devices: list, width: int) -> tuple:
    """A learner's state on the devices, which may want a few rows more than a batch has."""
    state, carry = state
    carry = jax.tree.map(lambda c: np.pad(c, ((0, width - len(c)), (0, 0))), carry)
    return parallel.place(state, devices), parallel.place(carry, devices, parallel.SPLIT)


def numbers(config: Config, curves: list) -> dict:
    """The metrics of a run, from the MSE of every update of each of its learners.

    Updates that were skipped, of MSE NaN, are left out.
    """
    tails = [np.array(mse[-20:], float) for mse in curves]
    last = [
        float(tail[~np.isnan(tail)].mean()) if np.any(tail == tail) else np.nan for tail in tails
    ]
    found = {"mse_first": float(curves[0][0]), "mse": last[0]}
    found["source_loss"] = last[0] * (config.num_steps if config.loss == "sum" else 1)
    return found | ({"mse_advanced": last[1]} if config.advance_twice else {})


class Work(NamedTuple):
    """What a run writes and counts beside its weights."""

    folder: Run
    mse: dict[str, list]  # of every update, by learner
    frames: list  # (update, prediction) of the first window of a batch, to be drawn
    clock: train.Clock
    diagnosis: diagnose.Diagnosis

    def parts(self) -> dict:
        """What is saved with the weights, so that a run can go on."""
        return {
            "mse": self.mse,
            "frames": self.frames,
            "seconds": self.clock.seconds,
            "diagnosis": self.diagnosis,
        }


def make_diagnosis(config: Config, data: dict) -> diagnose.Diagnosis:
    # A few windows in a row: how far a gradient would reach if windows did not cut it off.
    series = {name: np.concatenate(data[name][-5:], axis=1) for name in "xy"}
    return diagnose.Diagnosis(
        config.diagnose,
        make_model(config),
        losses.squared_error,
        series["x"],
        series["y"][:, -1],
        clip_norm=config.clip_norm,
    )


def make_learners(
    config: Config, data: dict, devices: list, clock: train.Clock, diagnosis: diagnose.Diagnosis
) -> dict:
    """By name: each ``learner``, one or two."""
    learners = {"state carried": learner(config, data, devices, clock, False, diagnosis)}
    if config.advance_twice:
        before = data | windows_before(data)
        learners["state advanced twice"] = learner(config, before, devices, clock, True)
    return learners


def train_learners(
    config: Config,
    data: dict,
    learners: dict,
    devices: list,
    states: list,
    keeper: Keeper,
    work: Work,
    live: plots.LivePlot | None,
) -> list:
    """Train to the last update from where the keeper stands, all learners on the same windows."""
    count, rows = data["x"].shape[:2]
    plan = train.plan_batches(np.arange(count * rows), rows, multiple=len(devices))
    starts = range(0, count, config.frame_every)
    pieces = [{n: a[k : k + config.frame_every] for n, a in plan.items()} for k in starts]
    states = [place(state, devices, plan["rows"].shape[1]) for state in states]
    model = make_model(config)
    predict = jax.jit(lambda params, x, carry: model.apply({"params": params}, x, carry)[1])

    done = starts[keeper.piece] if keeper.piece < len(starts) else count
    hidden = distributed.quiet()
    bar = tqdm(total=config.updates, initial=done, unit=" updates", disable=hidden)
    for _ in keeper.epochs(1):  # one pass over the series
        for start, piece in zip(starts[keeper.piece :], keeper.left(pieces), strict=True):
            # What the model says of the next window, before it learns from it.
            params, carry = parallel.local((states[0][0].params, states[0][1]))
            first_row = jax.tree.map(lambda c: c[:1], carry)
            said = predict(params, data["x"][start, :1], first_row)
            work.frames.append((start, np.asarray(said)[0, :, 0]))
            if live is not None:
                live.show(work.frames[-1])
            for number, (label, (_, advance)) in enumerate(learners.items()):
                states[number], metrics = advance(states[number], piece)
                metrics = keeper.checked(states[number], metrics, label)
                added, counted = metrics["loss"]
                means = np.where(counted > 0, added / np.maximum(counted, 1), np.nan)
                work.mse[label].extend(means.tolist())
                for k in range(len(added) if number == 0 else 0):
                    work.diagnosis.log(start + k, jax.tree.map(lambda m, k=k: m[k], metrics))
            bar.update(len(piece["rows"]))
            bar.set_postfix(mse=f"{float(work.mse['state carried'][-1]):.5f}")
            keeper.after_piece(states)
        keeper.after_epoch(states, last=True)
    bar.close()
    return states


def draw_fit(axes, frame: tuple, *, data: dict, title: str) -> None:
    """Draw what was predicted of a window over what it is."""
    update, prediction = frame
    plots.draw_sin_fit(axes, *known(data, update), prediction, title, update)


def known(data: dict, update: int) -> tuple:
    """Time and target of an update's first window."""
    return data["t"][update, 0], data["y"][update, 0, :, 0]


def report(config: Config, data: dict, title: str, work: Work) -> None:
    """The log of all updates, and the figures."""
    # From a checkpoint, NaN comes as a text.
    mse = {label: np.array(values, float) for label, values in work.mse.items()}
    for update, value in enumerate(mse["state carried"].tolist()):
        work.folder.log(update, mse=value, **work.diagnosis.norms.get(update, {}))
    curves = {label: (np.arange(len(values)), values) for label, values in mse.items()}
    work.folder.figure("loss", plots.learning_curve(title, curves, "MSE", logy=True))
    update, prediction = work.frames[-1]
    work.folder.figure("fit", plots.sin_fit(*known(data, update), prediction, title, update))


def run(config: Config) -> None:
    check(config)
    reproducible.ask(config.deterministic)
    data = sin.stateful_batches(
        config.updates, batch_size=config.batch_size, num_steps=config.num_steps
    )
    dataset = sin.dataset(data)
    if lanes.asked_for(config):
        return run_lanes(config, data, dataset)
    print(f"training on {dataset.title}, sha256 {dataset.sha256[:12]}")
    devices = parallel.use_devices(config.devices)
    clock, diagnosis = train.Clock(), make_diagnosis(config, data)
    learners = make_learners(config, data, devices, clock, diagnosis)
    states = [state for state, _ in learners.values()]
    params, rows = states[0][0].params, data["x"].shape[1]
    distributed.check_same(data=dataset.sha256, weights=params_sha256(params))
    diagnosis.look("initialisation", params)

    title = f"cos from sin, {dataset.title}"
    draw = functools.partial(draw_fit, data=data, title=title)
    live = plots.LivePlot(draw) if config.live and distributed.is_main() else None

    def pack(states):  # without the rows that only fill up a batch
        return [(s, jax.tree.map(lambda c: c[:rows], carry)) for s, carry in states]

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(distributed.open_run("sin", config))
        work = Work(folder, {label: [] for label in learners}, [], clock, diagnosis)
        keeper = Keeper(folder, config, work.parts(), dataset=dataset, pack=pack)
        stack.enter_context(keeper)
        states = keeper.restored(states)
        states = train_learners(config, data, learners, devices, states, keeper, work, live)
        if not distributed.is_main():
            return
        params = jax.tree.map(np.asarray, states[0][0].params)
        diagnosis.look("trained", params)
        report(config, data, title, work)
        plots.save_animation(work.frames, folder.path / "fit.gif", draw)
        checkpoint.save_params(folder.path / "params.safetensors", params)
        metrics = numbers(config, list(work.mse.values())) | keeper.numbers()
        metrics |= diagnosis.finish(folder, f"{config.cell}, {title}")
        folder.finish(
            dataset=dataset,
            metrics=metrics,
            seconds=clock.seconds,
            params_sha256=params_sha256(params),
            parameters=count_parameters(params),
            updates=config.updates,
            seed=config.seed,
            devices=devices,
            row=matching_row(config, ROWS),
        )
    if live is not None:
        live.close()
    print(
        f"MSE {metrics['mse']:.5f} over the last 20 of {config.updates} updates "
        f"on {dataset.title}; record in {folder.path}"
    )


def run_lanes(config: Config, data: dict, dataset: Dataset) -> None:
    """``run`` for many seeds, or values to choose from."""
    model, (count, rows) = make_model(config), data["x"].shape[:2]
    labels = ["state carried"] + ["state advanced twice"] * config.advance_twice
    windows = {"x": data["x"], "y": data["y"], **windows_before(data)}
    series = Series(
        lambda config: first_state(config, data),
        {label: make_loss(model, config, twice) for twice, label in enumerate(labels)},
        make_optimiser,
        {name: a.reshape(count * rows, *a.shape[2:]) for name, a in windows.items()},
        rows,
        numbers,
        f"cos from sin, {dataset.title}",
    )
    row = matching_row(dataclasses.replace(config, seeds=1), ROWS)
    learn("sin", config, series, dataset, row=row)


if __name__ == "__main__":
    about = {"presets": PRESETS, "description": __doc__}
    cli.main(lambda: distributed.run(run, cli.parse(Config, **about)))
