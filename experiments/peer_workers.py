"""A process with one framework's LSTM layer, for peer_layers.py, which asks it in lines of JSON.

The first line says which layer, and where the arrays lie; its outputs and gradients go to another
file. Every later line asks for one turn of timing. Each framework is imported where its layer is
built, and nothing else: the thread pools of two in one process would be in each other's way.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lstmjax import timings

STARTED = "by-peer-layers"  # the argument of a process that somebody asks


class Problem(NamedTuple):
    """What a layer is built from.

    Attributes:
      weights, x: float32 arrays in the framework's own layout; names of nested ones are "a|b".
      sizes: D and H.
      dtype: that the layer is to have.
      method, devices: of lstmjax.
      cores: that this process may use.
    """

    weights: Mapping[str, np.ndarray]
    x: np.ndarray
    sizes: tuple[int, int]
    dtype: str
    method: str
    devices: int
    cores: int


class Unavailable(Exception):
    """Why a layer is not there, in words for a table."""


# Two functions of nothing: the outputs; the gradients, (of weights, of x).
Layer = tuple[Callable[[], Any], Callable[[], tuple[Mapping[str, Any], Any]]]


# ---- JAX ----------------------------------------------------------------------------------------


def with_jax(apply: Callable, problem: Problem, devices: Sequence[Any] = ()) -> Layer:
    """The layer of a pure ``apply(weights, x) -> hs``, compiled; x [T, B, D] split over devices."""
    import jax
    import jax.numpy as jnp

    from lstmjax import parallel

    def gradients(weights, x):
        return jax.grad(lambda *given: jnp.mean(jnp.square(apply(*given))), (0, 1))(weights, x)

    def averaged(weights, x):
        of_weights, of_x = gradients(weights, x)
        return jax.lax.pmean(of_weights, parallel.AXIS), of_x / len(devices)

    given = jax.tree.map(
        lambda a: jnp.asarray(a, problem.dtype), (dict(problem.weights), problem.x)
    )
    if len(devices) <= 1:
        return partial(jax.jit(apply), *given), partial(jax.jit(gradients), *given)
    specs = parallel.WHOLE, parallel.BATCHES
    given = [parallel.place(a, devices, spec) for a, spec in zip(given, specs, strict=True)]
    over = partial(jax.shard_map, mesh=parallel.mesh(devices), in_specs=specs, check_vma=False)
    forward, train = over(apply, out_specs=parallel.BATCHES), over(averaged, out_specs=specs)
    return partial(jax.jit(forward), *given), partial(jax.jit(train), *given)


def lstmjax_layer(problem: Problem) -> Layer:
    from lstmjax import parallel
    from lstmjax.lstm import LSTMParams, lstm

    if problem.method == "onednn":
        if reason := importlib.import_module("lstmjax.onednn").available():
            raise Unavailable(reason)
    devices = parallel.use_devices(problem.devices)

    def apply(weights, xs):
        return lstm(LSTMParams(**weights), xs, method=problem.method)[1]

    return with_jax(apply, problem, devices)


def linen_layer(problem: Problem) -> Layer:
    import flax.linen as nn
    from flax.traverse_util import unflatten_dict

    how = {"dtype": problem.dtype, "param_dtype": problem.dtype}
    rnn = nn.RNN(nn.OptimizedLSTMCell(problem.sizes[1], **how))

    def apply(weights, x):
        return rnn.apply({"params": {"cell": unflatten_dict(weights, sep="|")}}, x)

    return with_jax(apply, problem)


def nnx_layer(problem: Problem) -> Layer:
    import jax.numpy as jnp
    from flax import nnx
    from flax.traverse_util import unflatten_dict

    # The orthogonal weights that it would start from cannot be drawn in bfloat16.
    how = {"dtype": problem.dtype, "param_dtype": problem.dtype, "rngs": nnx.Rngs(0)}
    zero = nnx.initializers.zeros_init()
    rnn = nnx.RNN(nnx.OptimizedLSTMCell(*problem.sizes, recurrent_kernel_init=zero, **how))
    graph, state, rest = nnx.split(rnn, nnx.Param, ...)

    def apply(weights, x):
        filled = nnx.clone(state)
        nnx.replace_by_pure_dict(filled, {"cell": unflatten_dict(weights, sep="|")})
        zeros = jnp.zeros((len(x), problem.sizes[1]), x.dtype)
        return nnx.merge(graph, filled, rest)(x, initial_carry=(zeros, zeros))

    return with_jax(apply, problem)


def haiku_layer(problem: Problem) -> Layer:
    import haiku as hk
    import jax.numpy as jnp

    def unroll(x):  # its own initial state would be float32
        zeros = jnp.zeros((x.shape[1], problem.sizes[1]), x.dtype)
        return hk.dynamic_unroll(hk.LSTM(problem.sizes[1]), x, hk.LSTMState(zeros, zeros))[0]

    transformed = hk.without_apply_rng(hk.transform(unroll))
    return with_jax(lambda w, x: transformed.apply({"lstm/linear": w}, x), problem)


def equinox_layer(problem: Problem) -> Layer:
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    blank = eqx.nn.LSTMCell(*problem.sizes, dtype=problem.dtype, key=jax.random.key(0))
    names = list(problem.weights)

    def apply(weights, x):
        fields = [weights[name] for name in names]
        cell = eqx.tree_at(lambda cell: [getattr(cell, name) for name in names], blank, fields)

        def step(state, x_t):
            state = jax.vmap(cell)(x_t, state)
            return state, state[0]

        zeros = jnp.zeros((x.shape[1], problem.sizes[1]), x.dtype)
        return jax.lax.scan(step, (zeros, zeros), x)[1]

    return with_jax(apply, problem)


# ---- Keras and PyTorch --------------------------------------------------------------------------

KERAS_NAMES = ("kernel", "recurrent_kernel", "bias")


def keras_lstm(problem: Problem) -> Any:
    """keras.layers.LSTM, built, with the problem's weights."""
    import keras

    # The orthogonal weights that it would start from cannot be drawn in bfloat16.
    how = {"return_sequences": True, "recurrent_initializer": "zeros", "dtype": problem.dtype}
    layer = keras.layers.LSTM(problem.sizes[1], **how)
    layer.build(problem.x.shape)
    layer.set_weights([problem.weights[name] for name in KERAS_NAMES])
    return layer


def keras_on_jax_layer(problem: Problem) -> Layer:
    layer = keras_lstm(problem)
    others = [variable.value for variable in layer.non_trainable_variables]

    def apply(weights, x):
        return layer.stateless_call([weights[name] for name in KERAS_NAMES], others, x)[0]

    return with_jax(apply, problem)


def keras_on_tensorflow_layer(problem: Problem) -> Layer:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    layer, x = keras_lstm(problem), tf.constant(problem.x, problem.dtype)
    weights = [variable.value for variable in layer.trainable_variables]

    @tf.function
    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_mean(tf.square(layer(x)))
        *of_weights, of_x = tape.gradient(loss, [*weights, x])
        return dict(zip(KERAS_NAMES, of_weights, strict=True)), of_x

    return partial(tf.function(layer), x), partial(gradients, x)


def torch_layer(problem: Problem) -> Layer:
    import torch

    torch.set_num_threads(problem.cores)
    dtype = getattr(torch, problem.dtype)
    module = torch.nn.LSTM(*problem.sizes).to(dtype)
    module.load_state_dict({n: torch.from_numpy(a) for n, a in problem.weights.items()})
    names, weights = zip(*module.named_parameters(), strict=True)
    x = torch.from_numpy(problem.x).to(dtype).requires_grad_()

    def forward():
        with torch.no_grad():
            return module(x)[0]

    def train():
        loss = module(x)[0].square().mean()
        *of_weights, of_x = torch.autograd.grad(loss, [*weights, x])
        return dict(zip(names, of_weights, strict=True)), of_x

    return forward, train


class Framework(NamedTuple):
    """How a framework takes part.

    Attributes:
      build: ``build(problem) -> Layer``.
      layout: its name in ``lstmjax.interop``; "" for our own.
      how: what its layer is, and how it is called.
      bfloat16: what weights and inputs in bfloat16 make it do.
      packages: whose versions say which framework it was.
      batch_major: x is [B, T, D], not [T, B, D].
      keras_backend: for the environment of the process.
    """

    build: Callable[[Problem], Layer]
    layout: str
    how: str
    bfloat16: str
    packages: tuple[str, ...]
    batch_major: bool = False
    keras_backend: str | None = None


ALL = "everything in bfloat16, the cell state too"
FRAMEWORKS = {
    "lstmjax": Framework(
        lstmjax_layer, "", "`lstm`, compiled by `jax.jit`", "products in bfloat16, gates and cell "
        "state in float32", ("jax",)
    ),
    "linen": Framework(
        linen_layer, "flax_linen", "`nn.RNN(nn.OptimizedLSTMCell)`, compiled by `jax.jit`", ALL,
        ("flax", "jax"), batch_major=True,
    ),
    "nnx": Framework(
        nnx_layer, "flax_nnx_optimized", "`nnx.RNN(nnx.OptimizedLSTMCell)`, split, and merged "
        "within `jax.jit`", ALL, ("flax", "jax"), batch_major=True,
    ),
    "haiku": Framework(
        haiku_layer, "haiku", "`hk.dynamic_unroll(hk.LSTM)`, compiled by `jax.jit`", ALL,
        ("dm-haiku", "jax"),
    ),
    "equinox": Framework(
        equinox_layer, "equinox", "`eqx.nn.LSTMCell` under `jax.vmap` and `jax.lax.scan`, compiled "
        "by `jax.jit`", ALL, ("equinox", "jax"),
    ),
    "keras-jax": Framework(
        keras_on_jax_layer, "keras", "`keras.layers.LSTM`, its `stateless_call` compiled by "
        "`jax.jit`", ALL, ("keras", "jax"), batch_major=True, keras_backend="jax",
    ),
    "keras-tensorflow": Framework(
        keras_on_tensorflow_layer, "keras", "`keras.layers.LSTM` in `tf.function`", ALL,
        ("keras", "tensorflow"), batch_major=True, keras_backend="tensorflow",
    ),
    "torch": Framework(
        torch_layer, "torch", "`nn.LSTM`, outputs under `no_grad`, with a thread per core",
        "weights, inputs and outputs in bfloat16, within as oneDNN does it", ("torch",),
    ),
}  # fmt: skip


# ---- the process --------------------------------------------------------------------------------


def array(a: Any, dtype: str) -> np.ndarray:
    """An array of any framework in NumPy; NumPy and PyTorch share no bfloat16."""
    if hasattr(a, "detach"):
        a = a.detach().float()
    return np.asarray(a).astype(np.float64 if dtype == "float64" else np.float32)


def build(question: Mapping[str, Any]) -> Layer:
    """The layer of the first question; its outputs and gradients go to the file ``found``."""
    if question["dtype"] == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)
    with np.load(question["asked"], allow_pickle=False) as file:
        arrays = dict(file)
    x = arrays.pop("x")
    weights = {name.removeprefix("weights|"): a for name, a in arrays.items()}
    settings = {name: question[name] for name in Problem._fields if name in question}
    layer = FRAMEWORKS[question["framework"]].build(Problem(weights, x, **settings))
    hs, (of_weights, of_x) = layer[0](), layer[1]()
    found = {"hs": hs, "x": of_x, **{f"weights|{n}": a for n, a in of_weights.items()}}
    np.savez(question["found"], **{n: array(a, question["dtype"]) for n, a in found.items()})
    return layer


def answer(questions: Any, send: Callable[[dict[str, Any]], None]) -> None:
    """Answers every line with one; an error is an answer too, and the last one."""
    try:
        layer = build(json.loads(next(questions)))
        send({"ready": True})
        for line in questions:
            question = json.loads(line)
            run = layer[("forward", "train").index(question["run"])]
            send({"seconds": timings.burst(run, question["seconds"])})
    except ModuleNotFoundError as error:
        send({"failed": f"{error.name} is not installed"})
    except Unavailable as error:
        send({"failed": str(error)})
    except Exception as error:  # whatever another framework raises
        send({"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a framework prints is no answer

    def send(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=answers, flush=True)

    answer(iter(sys.stdin), send)


if __name__ == "__main__":
    if sys.argv[1:] != [STARTED]:
        import peers

        peers.no_script(__file__)
    main()
