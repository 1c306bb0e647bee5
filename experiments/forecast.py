"""Forecast a sine from its last 50 values, 50 steps into the unknown.

    python experiments/forecast.py                   LSTM(128), 50 epochs, about 15 seconds
    python experiments/forecast.py --preset rnn      a linear RNN(64) without bias, 100 epochs
    python experiments/forecast.py --seeds 8         eight seeds in one program

A published Keras tutorial: 1,000 values of sin on −100 … 100, every window of 50 and the value that
follows (all 950; the tutorial's own 949 with --no-all-windows), batches of 512, Adam at 1e-3
(TensorFlow 1's), mean squared error. Its LSTM has the piecewise linear gates that Keras had in
TensorFlow 1 (the cell keras1). The trained model is saved, loaded again, and run on its own
predictions in two ways, each inside one compiled scan: by re-running the window that slides along,
as the tutorial does, and by carrying the state, which costs one step instead of 50. The model has
only ever seen 50 steps from a zero state, so carrying on is the harder test. Expect a training MSE
near 1e-5 and an error (RMSE) near 0.01 for the LSTM. The forecast itself is in record.json and in
the figure.

With --precision bfloat16 the values that are read have 8 binary digits. This alone adds 2e-6 to the
MSE, and the rounded state 6e-7: little beside the LSTM's error, but thousands of times that of the
linear RNN, which forecasts to 0.008 then instead of 0.0006 (mean RMSE of three seeds).
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
    lane_runs,
    lanes,
    losses,
    optim,
    parallel,
    plots,
    reproducible,
    streaming,
    train,
)
from lstmjax import seeds as many
from lstmjax.data import Dataset, sin
from lstmjax.keeper import Keeper, save_every
from lstmjax.models import Cell, Init, Method, Precision, SequenceModel
from lstmjax.provenance import count_parameters
from lstmjax.records import Run, matching_row, params_sha256
from lstmjax.scores import means
from lstmjax.variants import VARIANTS


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["lstm", "rnn"] = "lstm"
    """Where the defaults come from."""
    cell: Cell = "keras1"
    """The recurrent cell; keras1 is the LSTM with the gates of Keras 1, linear_rnn has neither
    activation nor bias."""
    hidden_size: int = 128
    """Units of the recurrent layer."""
    init: Literal["uniform"] | Init = "keras"
    """Initial law of the recurrent layer; uniform, U(±0.05), is for the RNNs only."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    clip_norm: float | None = None
    """Bound on the gradient's global norm."""
    batch_size: int = 512
    """Windows in a batch, over all devices."""
    epochs: int = 50
    """Passes over the windows."""
    all_windows: bool = True
    """All 950 windows and a forecast from the series' end, or the tutorial's: 949 windows, and a
    forecast from where the last of them ends."""
    steps: int = 50
    """Values to forecast."""
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
    """Of initial weights and batch order."""
    seeds: int = 1
    """How many seeds, from --seed on, all in one program, each as if run alone on one device."""
    sweep: str | None = None
    """Values to choose from by the training MSE (there is no validation split): lr=1e-3,3e-3 or
    clip_norm=1,5."""
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
    "lstm": Config(),
    "rnn": Config(preset="rnn", cell="linear_rnn", hidden_size=64, init="uniform", epochs=100),
}
ROWS = {"forecast-lstm": PRESETS["lstm"], "forecast-rnn": PRESETS["rnn"]}


def check(config: Config) -> None:
    cli.check_counts(config, "hidden_size", "batch_size", "epochs", "steps", "unroll", "devices")
    cli.check_counts(config, "keep")
    save_every(config.save_every)
    cli.check_counts(config, "seed", least=0)
    cli.check_positive(config, "learning_rate", "clip_norm")
    cli.check_method(config)
    rnn = config.cell in ("rnn", "linear_rnn")
    fits = rnn if config.init == "uniform" else config.cell in VARIANTS
    fits = fits or config.init in ("keras", "lstmjax")
    cli.check(config, "init", fits, f"keras or lstmjax with --cell {config.cell}")
    lanes.check(config)


def make_model(config: Config) -> SequenceModel:
    return SequenceModel(
        cell=config.cell,
        hidden_size=config.hidden_size,
        output_size=1,
        cell_init=config.init,
        method=config.method,
        unroll=config.unroll,
        precision=config.precision,
    )


def make_optimiser(config: Config):
    adam = optim.tf_adam(config.learning_rate, eps=1e-8)  # TensorFlow 1's Adam
    return optim.clipped(adam, config.clip_norm)


def make_loss(model: SequenceModel):
    def loss_fn(params, batch, key):
        _, predictions = model.apply({"params": params}, batch["x"], key=key)
        loss = losses.total(losses.squared_error(predictions, batch["y"]), batch["weight"])
        return losses.mean(loss), {"loss": loss}

    return loss_fn


def rerun_window(model: SequenceModel, params, window: jax.Array, steps: int) -> jax.Array:
    """Forecasts [steps] from a window [T, 1]: predict, slide the window on by one, repeat."""

    def predict(params, window, value):
        window = jnp.concatenate([window[1:], value])
        return window, model.apply({"params": params}, window[None])[1]

    _, value = model.apply({"params": params}, window[None])
    return read_on(predict, params, window, value, steps)


def carry_state(model: SequenceModel, params, window: jax.Array, steps: int) -> jax.Array:
    """Forecasts [steps] from a window [T, 1]: read it once, then feed back each prediction."""

    def predict(params, state, value):
        return model.apply({"params": params}, value[:, None], state)

    state, value = model.apply({"params": params}, window[None])
    return read_on(predict, params, state, value, steps)


def read_on(predict, params, state, value: jax.Array, steps: int) -> jax.Array:
    """A forecast [steps] that begins with a prediction [1, 1] and reads on from it."""
    _, following = streaming.rollout(predict, params, state, value, steps - 1)
    return jnp.concatenate([value[None], following])[:, 0, 0]


WAYS = {"window re-run": rerun_window, "state carried": carry_state}
SHORT = {"window re-run": "window", "state carried": "carried"}  # in the names of metrics


def question(config: Config, windows: dict) -> tuple:
    """Times and values of what is known [50] and of what is to be forecast [steps], and a window.

    The tutorial's last window ends two values before the series does; its forecast begins there.
    """
    t = windows["t"] if config.all_windows else windows["t"][:-2]
    known = windows["series"][: len(t)][-50:]
    future = t[-1] + (t[1] - t[0]) * np.arange(1, config.steps + 1)
    return t[-50:], known, future, np.sin(future), jnp.asarray(known[:, None], jnp.float32)


def first_state(config: Config, windows: dict) -> train.TrainState:
    """The train step's state before the first update."""
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(make_model(config).init)(init_key, windows["x"][:1])["params"]
    return train.init_state(params, make_optimiser(config), step_key)


def make_diagnosis(config: Config, windows: dict) -> diagnose.Diagnosis:
    looked_at = diagnose.spread_out(len(windows["x"]))
    return diagnose.Diagnosis(
        config.diagnose,
        make_model(config),
        losses.squared_error,
        windows["x"][looked_at],
        windows["y"][looked_at],
        clip_norm=config.clip_norm,
    )


class Work(NamedTuple):
    """What a run writes and counts beside its weights."""

    folder: Run
    mse: list
    seen: train.Tally
    clock: train.Clock
    diagnosis: diagnose.Diagnosis

    def parts(self) -> dict:
        """What is saved with the weights, so that a run can go on."""
        return {
            "mse": self.mse,
            "epoch": self.seen,
            "seconds": self.clock.seconds,
            "diagnosis": self.diagnosis,
        }


def learn(
    config: Config,
    windows: dict,
    devices: list,
    state: train.TrainState,
    keeper: Keeper,
    work: Work,
) -> train.TrainState:
    """Train to the last epoch from where the keeper stands."""
    folder, mse, seen, clock, diagnosis = work
    # One step for any number of devices; an epoch in one compiled call, on data that stays put.
    step = train.make_train_step(
        make_loss(make_model(config)),
        make_optimiser(config),
        axis_name=parallel.AXIS,
        of_gradient=diagnosis.of_gradient,
        on_nan=config.on_nan,
    )
    advance = parallel.runner(step, devices, clock)
    advance = reproducible.checked(advance, config.deterministic)
    data, size = parallel.place({n: windows[n] for n in "xy"}, devices), len(windows["x"])

    done, hidden = keeper.epoch - 1, distributed.quiet()
    bar = tqdm(total=config.epochs, initial=done, unit=" epochs", disable=hidden)
    for epoch in keeper.epochs(config.epochs):
        pieces = train.plan_epoch(
            size, config.batch_size, seed=config.seed, epoch=epoch, multiple=len(devices)
        )
        for piece in parallel.ahead(keeper.left(pieces), devices):
            state, metrics = advance(state, data, piece)
            seen.add(keeper.checked(state, metrics))
            keeper.after_piece(state)
        metrics = seen.take()
        now = means(metrics)
        mse.append(now.pop("loss"))
        folder.log(int(state.step), epoch=epoch, train_mse=mse[-1], **now)
        diagnosis.log(int(state.step), metrics)
        bar.update()
        bar.set_postfix(mse=f"{mse[-1]:.2e}")
        keeper.after_epoch(state, last=epoch == config.epochs)
    bar.close()
    return state


def forecast(config: Config, windows: dict, params, title: str, work: Work) -> dict:
    """What the trained model says of the steps to come, both ways: drawn, and as numbers."""
    folder, clock = work.folder, work.clock
    t, known, future, truth, window = question(config, windows)
    model, forecasts, found = make_model(config), {}, {}
    for label, way in WAYS.items():
        run_way = jax.jit(lambda p, w, way=way: way(model, p, w, config.steps))
        run_way = clock.compile(run_way, params, window)
        with clock("eval"):
            forecasts[label] = np.asarray(run_way(params, window), np.float64)
        name = SHORT[label]
        found[f"rmse_{name}"] = float(np.sqrt(np.mean((forecasts[label] - truth) ** 2)))
        found[f"forecast_{name}"] = forecasts[label].tolist()
    folder.figure("forecast", plots.forecast(t, known, future, truth, forecasts, title))
    return found


def run(config: Config) -> None:
    check(config)
    reproducible.ask(config.deterministic)
    windows = sin.forecast_windows(corrected=config.all_windows)
    dataset = sin.dataset(windows)
    if lanes.asked_for(config):
        return run_lanes(config, windows, dataset)
    print(f"training on {dataset.title}, sha256 {dataset.sha256[:12]}")
    devices = parallel.use_devices(config.devices)
    clock = train.Clock()
    state = first_state(config, windows)
    distributed.check_same(data=dataset.sha256, weights=params_sha256(state.params))
    diagnosis = make_diagnosis(config, windows)
    diagnosis.look("initialisation", state.params)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(distributed.open_run("forecast", config))
        work = Work(folder, [], train.Tally(), clock, diagnosis)
        keeper = stack.enter_context(Keeper(folder, config, work.parts(), dataset=dataset))
        state = parallel.place(keeper.restored(state), devices)
        state = learn(config, windows, devices, state, keeper, work)
        if not distributed.is_main():
            return

        # The forecast is made by the model as it was saved, not by the one in memory.
        params = jax.tree.map(np.asarray, state.params)
        checkpoint.save_params(folder.path / "params.safetensors", params)
        params = checkpoint.load_params(folder.path / "params.safetensors", params)
        diagnosis.look("trained", params)
        title = f"{config.cell} on {dataset.title}"
        mse = [float(value) for value in work.mse]  # from a checkpoint, NaN is a text
        curve = {"training": (np.arange(1, config.epochs + 1), mse)}
        folder.figure("loss", plots.learning_curve(title, curve, "MSE", xlabel="epoch", logy=True))
        found = {"train_mse": mse[-1], **forecast(config, windows, params, title, work)}
        folder.finish(
            dataset=dataset,
            metrics=found | diagnosis.finish(folder, title) | keeper.numbers(),
            seconds=clock.seconds,
            params_sha256=params_sha256(params),
            parameters=count_parameters(params),
            updates=int(state.step),
            seed=config.seed,
            devices=devices,
            row=matching_row(config, ROWS),
        )
    print(
        f"RMSE over {config.steps} steps {found['rmse_window']:.4f} (window re-run), "
        f"{found['rmse_carried']:.4f} (state carried) on {dataset.title}; record in {folder.path}"
    )


# ---- many runs in one program -------------------------------------------------------------------


def run_lanes(config: Config, windows: dict, dataset: Dataset) -> None:
    """``run`` for many seeds, or values to choose from."""
    print(f"training on {dataset.title}, sha256 {dataset.sha256[:12]}: {lane_runs.about(config)}")
    clock, model = train.Clock(), make_model(config)
    loss_fn = lanes.first_device(make_loss(model))

    start = functools.partial(first_state, windows=windows)

    def make_step(config):
        return train.make_train_step(loss_fn, make_optimiser(config), on_nan=config.on_nan)

    data = {name: windows[name] for name in "xy"}
    program = lanes.Program.of(config, clock, start=start, make_step=make_step, data=data)
    rows = [np.arange(len(windows["x"]))] * len(program.lanes)
    with lane_runs.opened("forecast", config, program, clock, dataset=dataset) as work:
        scores, keeper = work.scores, work.keeper
        bar = tqdm(total=config.epochs, initial=keeper.epoch - 1, unit=" epochs", disable=None)
        for epoch in keeper.epochs(config.epochs):
            pieces = lanes.pieces(program.lanes, rows, epoch, config.batch_size)
            for plans in keeper.left(pieces):
                scores.count(work.watch.checked(plans, program.advance(plans)))
                keeper.after_piece(program.states)
            own = [{"mse": lane["loss"]} for lane in scores.trained()]
            scores.add("train", program.step(), epoch, own, range(len(rows)))
            bar.update()
            keeper.after_epoch(program.states, last=epoch == config.epochs)
        bar.close()

        mse = [scores.metrics(place)["train_mse"] for place in range(len(rows))]
        choice = lanes.choose(program.lanes, "train_mse", mse, highest=False)
        found = [{"train_mse": mse[n]} for n in choice.lanes]
        title = f"{config.cell} on {dataset.title}, {lane_runs.which(config)}"
        future, errors = forecast_lanes(config, windows, program, choice.lanes, clock, found)
        axes = {"xlabel": "t (radians)", "logy": True}
        curves = {label: (future, np.abs(error)) for label, error in errors.items()}
        lane_runs.draw(work.folder, "forecast", title, curves, "absolute error", **axes)
        curves = {"training": scores.curve("train", "mse", range(len(rows)))}
        lane_runs.draw_losses(work, choice, title, curves, xlabel="epoch")
        row = matching_row(dataclasses.replace(config, seeds=1), ROWS)
        metrics = lane_runs.finish(work, found, choice, dataset=dataset, row=row)
    said = [lane_runs.said(metrics, f"rmse_{way}", ".4f") for way in ("window", "carried")]
    print(
        f"RMSE over {config.steps} steps {said[0]} (window re-run), {said[1]} (state carried), "
        f"{lane_runs.which(config)}, on {dataset.title}; record in {work.folder.path}"
    )


def forecast_lanes(config, windows, program, places, clock, found):
    """Forecasts by the lanes at some places, added to what is ``found`` of each.

    Returns:
      Times [steps], and the errors [S, steps] of each way.
    """
    model, devices, params = make_model(config), program.devices[: len(places)], program.params()
    _, _, future, truth, window = question(config, windows)
    arguments = many.stack([params[n] for n in places], devices), window
    errors = {}
    for label, way in WAYS.items():
        one = functools.partial(way, model, steps=config.steps)
        ask = clock.compile(many.spread(one, devices, shared=(1,), donate=()), *arguments)
        with clock("eval"):
            forecasts = many.unstack(ask(*arguments), len(places)).astype(np.float64)
        errors[label] = forecasts - truth
        name = SHORT[label]
        for own, forecast, error in zip(found, forecasts, errors[label], strict=True):
            own[f"rmse_{name}"] = float(np.sqrt(np.mean(error**2)))
            own[f"forecast_{name}"] = forecast.tolist()
    return future, errors


if __name__ == "__main__":
    about = {"presets": PRESETS, "description": __doc__}
    cli.main(lambda: distributed.run(run, cli.parse(Config, **about)))
