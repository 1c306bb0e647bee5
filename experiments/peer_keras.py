"""The five source programs in Keras 3 on TensorFlow: peers.py --framework keras.

They are written as Keras's users write them: `fit` and `evaluate`, or a compiled step where the
state is carried; compilation is left at Keras's defaults. Keras and TensorFlow are imported in the
functions that use them.
"""

import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import peer_tasks
from peer_tasks import Metrics, Result, score_epochs

from lstmjax.data import sin
from lstmjax.train import Clock

FORECAST_STEPS = 50


def load(seed: int) -> dict[str, str]:
    """Loads Keras on TensorFlow, seeds it and keeps it off GPUs; returns the two versions."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no banners
    import keras
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    keras.utils.set_random_seed(seed)
    return {"keras": keras.__version__, "tensorflow": tf.__version__}


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


def learn_sin(config: Any, clock: Clock, *, updates: int, scale: float, twice: bool) -> Result:
    """Trains with the state carried, and where `twice` a second model whose state moves twice."""
    data = sin.stateful_batches(min(config.limit or updates, updates))
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


def learn_forecast(config: Any, clock: Clock, *, epochs: int) -> Result:
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
    config: Any, clock: Clock, *, cell: str = "LSTM", as_published: bool = False
) -> Result:
    """Two recurrent layers of 64 on the last 80 words; `cell` is the name of a Keras layer."""
    import keras

    dataset, splits = peer_tasks.reviews(config, as_published)
    splits = {name: (ids, label[:, None]) for name, (ids, label) in splits.items()}
    layer = getattr(keras.layers, cell)
    read = [keras.Input((80,), dtype="int32"), keras.layers.Embedding(10_000, 100)]
    both = [layer(64, dropout=0.2, return_sequences=True), layer(64, dropout=0.2)]
    model = keras.Sequential([*read, *both, keras.layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.Adam(1e-3), "binary_crossentropy", metrics=["accuracy"])
    batches = shuffled(*splits["train"], 128, config.seed, drop_remainder=True)
    epochs = peer_tasks.REVIEW_EPOCHS
    return dataset, fit_and_score(model, batches, splits, epochs, as_published, clock)


def learn_digits(config: Any, clock: Clock, *, as_published: bool) -> Result:
    """LSTM(100) over 28 rows; as published, the loss takes softmax of the softmax."""
    import keras

    dataset, splits = peer_tasks.digits(config)
    normal, bias = keras.initializers.TruncatedNormal(stddev=0.1), keras.initializers.Constant(0.1)
    laws = dict(kernel_initializer=normal, bias_initializer=bias)
    lstm, head = keras.layers.LSTM(100, **tf1_laws(28, 100)), keras.layers.Dense(10, **laws)
    model = keras.Sequential([keras.Input((28, 28)), lstm, head])
    softmax = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adam = keras.optimizers.Adam(1e-4, epsilon=1e-8)  # TensorFlow 1's
    model.compile(adam, double_softmax if as_published else softmax, metrics=["accuracy"])
    batches, epochs = shuffled(*splits["train"], 50, config.seed), peer_tasks.DIGIT_EPOCHS
    return dataset, fit_and_score(model, batches, splits, epochs, as_published, clock)


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
    """Trains with `fit`, scores with `evaluate`."""

    def train():
        history = timed(clock, "train", partial(model.fit, batches, shuffle=False)).history
        return {name: values[0] for name, values in history.items()}

    def evaluate(split):
        run = partial(model.evaluate, *splits[split], batch_size=500, return_dict=True)
        return timed(clock, "eval", run)

    return score_epochs(epochs, train, evaluate, splits, test_every_epoch, clock)


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


if __name__ == "__main__":
    import peers

    peers.no_script(__file__)
