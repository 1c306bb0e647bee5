"""Learn cos from sin, step by step, with the state carried from batch to batch.

    python experiments/sin.py                    200 updates, about 10 seconds on a CPU
    python experiments/sin.py --preset keras     501 updates of the Keras version
    python experiments/sin.py --live             watch the fit in a window

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

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lstmjax import checkpoint, cli, diagnose, losses, optim, parallel, plots, train
from lstmjax.data import sin
from lstmjax.models import Cell, Init, Method, Precision, SequenceModel, glorot, zeros
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
    """Devices to split a batch over; all accelerators, or all CPU cores, when not given."""
    seed: int = 0
    """Of initial weights."""
    diagnose: bool = False
    """Whether to look at gradients through time, at gates and at clipping as well."""
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
    cli.check_counts(config, "seed", least=0)
    cli.check_positive(config, "learning_rate", "clip_norm")
    fits = config.init in ("keras", "lstmjax") or config.cell in VARIANTS
    cli.check(config, "init", fits, f"keras or lstmjax with --cell {config.cell}")


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


def make_loss(model: SequenceModel, config: Config, twice: bool):
    """``loss_fn(params, batch, key, carry)``; the carry is the layer's state [B, H]."""

    def loss_fn(params, batch, key, carry):
        if twice:  # over the window before, once more, with the weights it has led to
            again, _ = model.apply({"params": params}, batch["x_before"], carry)
            first = batch["first"][:, None]
            carry = jax.tree.map(lambda a, c: jnp.where(first, c, a), again, carry)
        carry, predictions = model.apply({"params": params}, batch["x"], carry)
        mse = losses.total(losses.squared_error(predictions, batch["y"]), batch["weight"])
        scale = config.num_steps if config.loss == "sum" else 1
        return scale * losses.mean(mse), ({"loss": mse}, carry)

    return loss_fn


def fit(
    config: Config,
    data: dict,
    devices: list,
    clock: train.Clock,
    twice: bool,
    on_frame=None,
    diagnosis: diagnose.Diagnosis = diagnose.OFF,
):
    """Trains on all batches in their order; returns parameters and the MSE of every update."""
    model = make_model(config)
    count, rows = data["x"].shape[:2]
    params = model.init(jax.random.key(config.seed), data["x"][0, :1])["params"]
    adam = optim.tf_adam(config.learning_rate, eps=1e-8)  # TensorFlow 1's and Keras 1's Adam
    tx = optim.clipped(adam, config.clip_norm)
    diagnosis.look("initialisation", params)

    step = train.make_train_step(
        make_loss(model, config, twice),
        tx,
        axis_name=parallel.AXIS,
        stateful=True,
        of_gradient=diagnosis.of_gradient,
    )
    advance = parallel.runner(step, devices, clock, state=(parallel.WHOLE, parallel.SPLIT))
    predict = jax.jit(lambda p, x, carry: model.apply({"params": p}, x, carry)[1])

    plan = train.plan_batches(np.arange(count * rows), rows, multiple=len(devices))
    one = jax.eval_shape(lambda x: model.apply({"params": params}, x)[0], data["x"][0, :1])
    width = plan["rows"].shape[1]
    carry = jax.tree.map(lambda s: jnp.zeros((width, *s.shape[1:]), s.dtype), one)
    state = (
        parallel.place(train.init_state(params, tx, jax.random.key(0)), devices),
        parallel.place(carry, devices, parallel.SPLIT),
    )
    windows = {name: a.reshape(count * rows, *a.shape[2:]) for name, a in data.items()}
    windows = parallel.place({n: a for n, a in windows.items() if n != "t"}, devices)

    mse = []
    for start in range(0, count, config.frame_every):
        if on_frame is not None:  # what the model says of the next window, before it learns from it
            first_row = jax.tree.map(lambda c: c[:1], state[1])
            said = predict(state[0].params, data["x"][start, :1], first_row)
            on_frame(start, np.asarray(said)[0, :, 0], mse)
        piece = {name: a[start : start + config.frame_every] for name, a in plan.items()}
        state, metrics = advance(state, windows, piece)
        added, counted = metrics["loss"]
        mse.extend((added / counted).tolist())
        for k in range(len(added)):
            diagnosis.log(start + k, jax.tree.map(lambda m, k=k: m[k], metrics))
    diagnosis.look("trained", state[0].params)
    return jax.tree.map(np.asarray, state[0].params), mse


def run(config: Config) -> None:
    check(config)
    data = sin.stateful_batches(
        config.updates, batch_size=config.batch_size, num_steps=config.num_steps
    )
    dataset = sin.dataset(data)
    print(f"training on {dataset.title}, sha256 {dataset.sha256[:12]}")
    devices = parallel.use_devices(config.devices)
    clock = train.Clock()
    title, frames = f"cos from sin, {dataset.title}", []
    # A few windows in a row: how far a gradient would reach if windows did not cut it off.
    series = {name: np.concatenate(data[name][-5:], axis=1) for name in "xy"}
    diagnosis = diagnose.Diagnosis(
        config.diagnose,
        make_model(config),
        losses.squared_error,
        series["x"],
        series["y"][:, -1],
        clip_norm=config.clip_norm,
    )

    def draw(axes, frame):
        update, prediction = frame
        plots.draw_sin_fit(axes, *known(update), prediction, title, update)

    def known(update):  # time and target of the first window
        return data["t"][update, 0], data["y"][update, 0, :, 0]

    live = plots.LivePlot(draw) if config.live else None
    with Run.create("sin", config, out=config.out) as folder:
        bar = tqdm(total=config.updates, unit=" updates", disable=None)

        def on_frame(update, prediction, mse):
            frames.append((update, prediction))
            bar.update(update - bar.n)
            bar.set_postfix(mse=f"{mse[-1]:.5f}" if mse else "?")
            if live is not None:
                live.show(frames[-1])

        params, mse = fit(config, data, devices, clock, False, on_frame, diagnosis)
        bar.update(config.updates - bar.n)
        bar.close()
        curves = {"state carried": (np.arange(len(mse)), mse)}
        metrics = {"mse_first": mse[0], "mse": float(np.mean(mse[-20:]))}
        metrics["source_loss"] = metrics["mse"] * (config.num_steps if config.loss == "sum" else 1)
        for update, value in enumerate(mse):
            folder.log(update, mse=value, **diagnosis.norms.get(update, {}))
        if config.advance_twice:
            before = {**data, "x_before": np.roll(data["x"], 1, axis=0)}
            before["first"] = np.zeros(data["x"].shape[:2], bool)
            before["first"][0] = True
            _, twice = fit(config, before, devices, clock, True)
            curves["state advanced twice"] = (np.arange(len(twice)), twice)
            metrics["mse_advanced"] = float(np.mean(twice[-20:]))

        folder.figure("loss", plots.learning_curve(title, curves, "MSE", logy=True))
        update, prediction = frames[-1]
        folder.figure("fit", plots.sin_fit(*known(update), prediction, title, update))
        metrics |= diagnosis.finish(folder, f"{config.cell}, {title}")
        plots.save_animation(frames, folder.path / "fit.gif", draw)
        checkpoint.save_params(folder.path / "params.safetensors", params)
        folder.finish(
            dataset=dataset,
            metrics=metrics,
            seconds=clock.seconds,
            params_sha256=params_sha256(params),
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


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, presets=PRESETS, description=__doc__)))
