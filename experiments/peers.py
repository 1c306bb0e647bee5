"""The five source programs in Keras 3 on TensorFlow, for BENCHMARKS.md to show beside ours.

    pip install -e '.[peers]'
    python experiments/peers.py --row imdb-tf2 --seed 0
    python experiments/peers.py --row mnist-tf1 --limit 1000     a look, which leaves no record
    python experiments/peers.py layers     one LSTM layer in every framework: see peer_layers.py

Each program gets the arrays that ours gets, the same initial laws, optimiser, batches, epochs and
scores. It is written as Keras's users write it: `fit` and `evaluate`, or a compiled step where the
state is carried; compilation is left at Keras's defaults, all cores are for the taking, GPUs are
not used. On 2 CPU cores sin takes seconds, forecast half a minute, imdb and mnist some minutes.

Keras traces a program in its first call: `compile` is the time until the first batch of `fit` and
the first of `evaluate` have come out (the first call of a compiled function), all that follows is
`train` and `eval`. Loading TensorFlow and the data counts nowhere, as with ours.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from lstmjax import cli
from lstmjax.data import Dataset, imdb, mnist, sin
from lstmjax.records import RunError, command_line, environment, to_json, validate, write_file
from lstmjax.schema import DATASET
from lstmjax.train import Clock

# Keras and TensorFlow are imported in the functions that use them: a wrong flag needs neither.

Metrics = dict[str, float | list[float]]
Result = tuple[Dataset, Metrics]
FORECAST_STEPS = 50
NOT_INVOLVED = ("jax", "jaxlib", "flax", "optax", "driver")  # they have no part in these numbers


@dataclass(frozen=True)
class Config:
    row: Literal[
        "sin-tf1", "sin-keras", "forecast-rnn", "forecast-lstm", "imdb-tf2", "imdb-tf2-gru",
        "imdb-tf2-rnn", "imdb-tf2-source", "mnist-tf1", "mnist-corrected",
    ] = "imdb-tf2"  # fmt: skip
    """The program: a section of BENCHMARKS.md."""
    seed: int = 0
    """Of initial weights, dropout, batch order and hold-out."""
    data: Literal["auto", "tfds", "offline"] = "auto"
    """The real data if they can be had, the real ones or an error, or made-up ones."""
    limit: int | None = None
    """Use only so many examples of every split, or updates of sin: a look without a record."""
    out: str | None = None
    """The record's file, new; experiments/results/peers-<row>-seed<N>.json when not given."""


def check(config: Config) -> None:
    cli.check_counts(config, "seed", least=0)
    cli.check_counts(config, "limit", least=128 if config.row.startswith("imdb") else 1)  # a batch
    cli.check(config, "out", config.limit is None or config.out is None, "no file with --limit")


def uniform(limit: float) -> Any:
    """U(−limit, limit)."""
    import keras

    return keras.initializers.RandomUniform(-limit, limit)


def keras1_gate(z: Any) -> Any:
    """Keras 1's hard sigmoid, of the first Keras in TensorFlow too; Keras 3's has other slopes."""
    import keras

    return keras.ops.clip(0.2 * z + 0.5, 0.0, 1.0)


def tf1_laws(input_size: int, hidden_size: int) -> dict[str, Any]:
    """TensorFlow 1 draws [w_x; w_h] as one glorot matrix, [D + H, 4H]."""
    limit = math.sqrt(6 / (input_size + hidden_size + 4 * hidden_size))
    return dict(kernel_initializer=uniform(limit), recurrent_initializer=uniform(limit))


# ---- cos from sin, the state carried ------------------------------------------------------------


def sin_model(row: str) -> Any:
    """[50, 20, 1] → [50, 20, 1], with a stateful LSTM under the laws of TensorFlow 1 or Keras 1."""
    import keras

    stateful = partial(keras.layers.LSTM, return_sequences=True, stateful=True)
    if row == "sin-tf1":
        normal, bias = keras.initializers.RandomNormal(stddev=1.0), keras.initializers.Constant(0.1)
        laws = dict(kernel_initializer=normal, bias_initializer=bias)
        first = [keras.layers.Dense(10, **laws), stateful(10, **tf1_laws(10, 10))]
    else:  # Keras 1.2 draws each gate's blocks [1, 20] and [20, 20] on their own
        kernel, recurrent, laws = uniform(math.sqrt(6 / 21)), uniform(math.sqrt(6 / 40)), {}
        drawn = dict(kernel_initializer=kernel, recurrent_initializer=recurrent)
        first = [stateful(20, recurrent_activation=keras1_gate, **drawn)]
    window = keras.Input(batch_shape=(50, 20, 1))
    return keras.Sequential([window, *first, keras.layers.Dense(1, **laws)])


def fit_sin(model: Any, data: dict[str, np.ndarray], scale: float, twice: bool, clock: Clock):
    """Trains on x, y [K, 50, 20, 1] in their order, the loss scale × MSE; the MSE of each update.

    With `twice` the model reads each window again after its update, which is what the source's
    `predict` amounts to: in Keras 3 too, every call of a stateful layer moves its state on.
    """
    import keras
    import tensorflow as tf

    optimizer = keras.optimizers.Adam(0.006, epsilon=1e-8)  # TensorFlow 1's and Keras 1's
    weights = model.trainable_variables
    optimizer.build(weights)

    @tf.function
    def update(x, y):
        with tf.GradientTape() as tape:
            mse = tf.reduce_mean(tf.square(model(x, training=True) - y))
            loss = scale * mse
        optimizer.apply(tape.gradient(loss, weights), weights)
        if twice:
            model(x, training=False)
        return mse

    batches = list(zip(tf.unstack(data["x"]), tf.unstack(data["y"]), strict=True))
    with clock("compile"):
        mse = [update(*batches[0]).numpy()]
    with clock("train"):
        mse += [update(x, y).numpy() for x, y in batches[1:]]
    return np.asarray(mse, np.float64)


def learn_sin(config: Config, clock: Clock, *, updates: int, scale: float, twice: bool) -> Result:
    """Trains with the state carried, and where `twice` a second model whose state moves twice."""
    data = sin.stateful_batches(config.limit or updates)
    mse = fit_sin(sin_model(config.row), data, scale, False, clock)
    last = float(np.mean(mse[-20:]))
    metrics = {"mse_first": float(mse[0]), "mse": last, "source_loss": scale * last}
    if twice:
        advanced = fit_sin(sin_model(config.row), data, scale, True, clock)
        metrics["mse_advanced"] = float(np.mean(advanced[-20:]))
    return sin.dataset(data), metrics


# ---- the next value of a sine -------------------------------------------------------------------


def forecast_layer(row: str) -> Any:
    """A linear RNN(64) without bias, all weights from U(±0.05), or LSTM(128) with hard gates."""
    import keras

    if row == "forecast-lstm":
        return keras.layers.LSTM(128, recurrent_activation=keras1_gate, return_state=True)
    laws = dict(kernel_initializer=uniform(0.05), recurrent_initializer=uniform(0.05))
    return keras.layers.SimpleRNN(64, "linear", use_bias=False, return_state=True, **laws)


def learn_forecast(config: Config, clock: Clock, *, epochs: int) -> Result:
    """Learns the value after each window, then forecasts 50 values in two ways."""
    import keras

    windows = sin.forecast_windows()
    inputs = keras.Input((sin.WINDOW, 1))
    layer, head = forecast_layer(config.row), keras.layers.Dense(1)
    model = keras.Model(inputs, head(layer(inputs)[0]))
    model.compile(keras.optimizers.Adam(1e-3, epsilon=1e-8), "mse")  # TensorFlow 1's
    x, y = windows["x"][: config.limit], windows["y"][: config.limit]
    run = partial(model.fit, shuffled(x, y, 512, config.seed), epochs=epochs, shuffle=False)
    metrics = {"train_mse": timed(clock, "train", run).history["loss"][-1]}

    t, window = windows["t"], windows["series"][-sin.WINDOW :, None].astype(np.float32)
    truth = np.sin(t[-1] + (t[1] - t[0]) * np.arange(1, FORECAST_STEPS + 1))
    for name, forecast in zip(("window", "carried"), forecasters(model, layer, head), strict=True):
        with clock("compile"):
            forecast(window)
        with clock("eval"):
            values = np.asarray(forecast(window), np.float64)
        metrics[f"rmse_{name}"] = float(np.sqrt(np.mean((values - truth) ** 2)))
        metrics[f"forecast_{name}"] = values.tolist()
    return sin.dataset(windows), metrics


def forecasters(model: Any, layer: Any, head: Any) -> tuple[Callable, Callable]:
    """Two compiled functions from a window [50, 1] to the 50 values after it.

    The first predicts, slides the window on by one and reads all of it again; the second reads the
    window once and feeds each prediction back, with the state carried.
    """
    import tensorflow as tf

    @tf.function
    def rerun_window(window):
        def slide(carried, _):
            value = model(carried[0][None], training=False)
            return tf.concat([carried[0][1:], value], axis=0), value[0, 0]

        return tf.scan(slide, tf.range(FORECAST_STEPS), (window, tf.constant(0.0)))[1]

    @tf.function
    def carry_state(window):
        h, *states = layer(window[None])
        value = head(h)

        def feed_back(carried, _):
            value, states, _ = carried
            h, *following = layer(value[:, None], initial_state=states)
            return head(h), following, value[0, 0]

        return tf.scan(feed_back, tf.range(FORECAST_STEPS), (value, states, value[0, 0]))[2]

    return rerun_window, carry_state


# ---- reviews and digits -------------------------------------------------------------------------


def learn_reviews(
    config: Config, clock: Clock, *, cell: str = "LSTM", as_published: bool = False
) -> Result:
    """Two recurrent layers of 64 on the last 80 words; `cell` is the name of a Keras layer."""
    import keras

    held_out = 0 if as_published else 2_500
    dataset = imdb.load(config.data, validation_size=held_out, seed=config.seed).first(config.limit)
    layer = getattr(keras.layers, cell)
    read = [keras.Input((80,), dtype="int32"), keras.layers.Embedding(10_000, 100)]
    both = [layer(64, dropout=0.2, return_sequences=True), layer(64, dropout=0.2)]
    model = keras.Sequential([*read, *both, keras.layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.Adam(1e-3), "binary_crossentropy", metrics=["accuracy"])
    splits = {name: (s["ids"], s["label"][:, None]) for name, s in dataset.splits.items()}
    batches = shuffled(*splits["train"], 128, config.seed, drop_remainder=True)
    return dataset, fit_and_score(model, batches, splits, 4, as_published, clock)


def learn_digits(config: Config, clock: Clock, *, as_published: bool) -> Result:
    """LSTM(100) over 28 rows; as published, the loss takes softmax of the softmax."""
    import keras

    dataset = mnist.load(config.data).first(config.limit)
    normal, bias = keras.initializers.TruncatedNormal(stddev=0.1), keras.initializers.Constant(0.1)
    laws = dict(kernel_initializer=normal, bias_initializer=bias)
    lstm, head = keras.layers.LSTM(100, **tf1_laws(28, 100)), keras.layers.Dense(10, **laws)
    model = keras.Sequential([keras.Input((28, 28)), lstm, head])
    softmax = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adam = keras.optimizers.Adam(1e-4, epsilon=1e-8)  # TensorFlow 1's
    model.compile(adam, double_softmax if as_published else softmax, metrics=["accuracy"])
    splits = {n: (np.float32(s["image"]) / 255, s["label"]) for n, s in dataset.splits.items()}
    batches = shuffled(*splits["train"], 50, config.seed)
    return dataset, fit_and_score(model, batches, splits, 10, as_published, clock)


def double_softmax(label: Any, logits: Any) -> Any:
    """Cross-entropy [B] of the logits' softmax taken for logits; label [B] or [B, 1].

    Keras's own losses look behind a softmax for its logits, even with from_logits=True, and so
    would mend the source's mistake unasked.
    """
    import tensorflow as tf

    label = tf.cast(tf.reshape(label, [-1]), tf.int32)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(label, tf.nn.softmax(logits))


def fit_and_score(
    model: Any, batches: Any, splits: dict, epochs: int, test_every_epoch: bool, clock: Clock
) -> Metrics:
    """Trains; scores validation, where there is any, after every epoch, and test when it is due."""
    metrics = {}
    for epoch in range(1, epochs + 1):
        history = timed(clock, "train", partial(model.fit, batches, shuffle=False)).history
        scores = {"train": {name: values[0] for name, values in history.items()}}
        due = ["validation"] if len(splits["validation"][1]) else []
        due += ["test"] if test_every_epoch or epoch == epochs else []
        for split in due:
            run = partial(model.evaluate, *splits[split], batch_size=500, return_dict=True)
            scores[split] = timed(clock, "eval", run)
        for split, means in scores.items():
            for name, value in means.items():
                metrics[f"{split}_{name}"] = value
                metrics.setdefault(f"{split}_{name}_epochs", []).append(value)
        print(f"epoch {epoch}: " + ", ".join(f"{s} {m['accuracy']:.4f}" for s, m in scores.items()))
    return metrics


def shuffled(x, y, batch_size: int, seed: int, drop_remainder: bool = False) -> Any:
    """A tf.data set of batches of x [N, ...] and y [N, ...], all rows in a new order every pass."""
    import tensorflow as tf

    x, y = tf.constant(x), tf.constant(y)
    order = tf.data.Dataset.range(len(y)).shuffle(len(y), seed=seed)
    rows = order.batch(batch_size, drop_remainder=drop_remainder)
    return rows.map(lambda r: (tf.gather(x, r), tf.gather(y, r))).prefetch(tf.data.AUTOTUNE)


def timed(clock: Clock, name: str, run: Callable) -> Any:
    """Calls `fit` or `evaluate` on the clock: the first batch is "compile", the rest `name`."""
    import keras

    ends = []

    class BatchEnds(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            ends.append(time.perf_counter())

        on_test_batch_end = on_train_batch_end

    traces, start = clock.seconds[name] == 0, time.perf_counter()
    result = run(callbacks=[BatchEnds()], verbose=0)
    traced = ends[0] if traces else start
    clock.seconds["compile"] += traced - start
    clock.seconds[name] += time.perf_counter() - traced
    return result


# ---- running ------------------------------------------------------------------------------------

PROGRAMS = {
    "sin-tf1": partial(learn_sin, updates=200, scale=20.0, twice=False),
    "sin-keras": partial(learn_sin, updates=501, scale=1.0, twice=True),
    "forecast-rnn": partial(learn_forecast, epochs=100),
    "forecast-lstm": partial(learn_forecast, epochs=50),
    "imdb-tf2": learn_reviews,
    "imdb-tf2-gru": partial(learn_reviews, cell="GRU"),
    "imdb-tf2-rnn": partial(learn_reviews, cell="SimpleRNN"),
    "imdb-tf2-source": partial(learn_reviews, as_published=True),
    "mnist-tf1": partial(learn_digits, as_published=True),
    "mnist-corrected": partial(learn_digits, as_published=False),
}


def load_keras(seed: int) -> dict[str, str]:
    """Loads Keras on TensorFlow, seeds it and keeps it off GPUs; returns the two versions."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no banners
    try:
        import keras
        import tensorflow as tf
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed: pip install -e '.[peers]'") from error
    tf.config.set_visible_devices([], "GPU")
    keras.utils.set_random_seed(seed)
    return {"keras": keras.__version__, "tensorflow": tf.__version__}


def free_file(config: Config) -> Path:
    """Where the record goes; RunError where something is there already."""
    name = f"peers-{config.row}-seed{config.seed}.json"
    target = Path(config.out or Path("experiments", "results", name))
    if target.exists():
        raise RunError(f"{target} exists: move it away, or choose another --out")
    return target


def run(config: Config) -> None:
    check(config)
    if config.limit is None:
        free_file(config)  # or an error now, not after minutes
    # The code as it is now, when it has just been imported: it may be edited during a long run.
    circumstances = environment(jax.devices("cpu")[:1])
    versions = load_keras(config.seed)
    framework = " / ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{config.row} in {framework}")
    clock = Clock()
    dataset, metrics = PROGRAMS[config.row](config, clock)
    shown = {k: f"{v:.4g}" for k, v in metrics.items() if not isinstance(v, list)}
    shown |= {f"{k} seconds": f"{v:.1f}" for k, v in clock.seconds.items()}
    print(", ".join(f"{k} {v}" for k, v in shown.items()), f"on {dataset.title}")
    record = {
        "experiment": "peers",
        "peer": {"row": config.row, "framework": framework},
        "command": command_line(),
        "dataset": {key: getattr(dataset, key) for key in DATASET},
        "metrics": metrics,
        "seconds": clock.seconds,
        "environment": {k: v for k, v in circumstances.items() if k not in NOT_INVOLVED} | versions,
        "seed": config.seed,
    }
    if problems := validate(record):
        raise ValueError(f"record: {'; '.join(problems)}")
    if config.limit is None:
        target = free_file(config)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, to_json(record))
        print(f"record in {target}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["layers"]:
        import peer_layers

        cli.main(peer_layers.main)
    else:
        cli.main(lambda: run(cli.parse(Config, description=__doc__)))
