"""cuDNN's layer, with cuDNN's two kernels replaced by JAX's own reference, so that a CPU runs it.

Everything else is the real thing: the primitives of ``jax.experimental.rnn``, their shapes and the
rule that differentiates them. Only a GPU can tell whether cuDNN computes what the reference does;
that is what the comparison at the first use is for, and here it is given kernels that are wrong.
"""

import ctypes
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental import rnn
from jax.interpreters import mlir
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec
from problems import QUICK, B, D, H, T

from lstmjax import LSTMParams, LSTMState, cudnn, interop, lstm

CUDA = SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
ALL_FINE = [(jax.devices()[0], precision) for precision in cudnn._ALLOWED]
LAYER = ("input_size", "hidden_size", "num_layers", "dropout", "bidirectional")


class Kernels:
    """The reference in place of the two kernels; wrong where ``fault`` says so.

    Attributes:
      fault: None, or what a kernel gets wrong.
      runs: names of the kernels that were lowered and whether TensorFloat-32 was allowed.
    """

    def __init__(self):
        self.fault, self.runs = None, []

    def reference(self, x, h, c, w, lengths, **how):
        layer = [how[name] for name in LAYER]
        weights = rnn.unpack_lstm_weights(w, *layer[:3], how["bidirectional"])
        return rnn.lstm_ref(x, h, c, *weights, lengths, *layer)

    def forward(self, *arrays, **how):
        self.runs.append(("forward", how["cudnn_allow_tf32"]))
        y, h, c = self.reference(*arrays, **how)
        y = y.at[1, 2, 0].add(0.05) if self.fault == "y" else y
        return y, h, -c if self.fault == "c" else c, jnp.zeros(7, jnp.float32)

    def backward(self, dy, dh, dc, x, h, c, w, y, reserve, lengths, **how):
        self.runs.append(("backward", how["cudnn_allow_tf32"]))
        run = lambda *arrays: self.reference(*arrays, lengths, **how)  # noqa: E731
        dx, dh0, dc0, dw = jax.vjp(run, x, h, c, w)[1]((dy, dh, dc))
        if self.fault == "dx":
            dx = dx.at[:, 0].set(0.0)
        if self.fault == "dw":
            dw = dw.at[4 * how["hidden_size"] * how["input_size"] + 1].add(1.0)  # in W_hh
        if self.fault == "dc0":
            dc0 = dc0.at[0, 3, 1].set(jnp.nan)
        return dx, dh0, dc0, dw


@pytest.fixture
def kernels(monkeypatch):
    """``Kernels``, in a process that thinks it has cuDNN and has found it right."""
    found = Kernels()
    for primitive, kernel in ((rnn.rnn_fwd_p, found.forward), (rnn.rnn_bwd_p, found.backward)):
        rule = mlir.lower_fun(kernel, multiple_results=True)
        mlir.register_lowering(primitive, rule, platform="cpu")
    sizes = SimpleNamespace(compute_rnn_workspace_reserve_space_sizes=lambda *sizes: (5, 7))
    monkeypatch.setattr(rnn, "gpu_rnn", sizes)
    monkeypatch.setattr(cudnn, "absent", lambda: None)
    monkeypatch.setattr(cudnn, "_compared", dict.fromkeys(ALL_FINE))
    return found


@pytest.fixture
def unused(kernels, monkeypatch):
    """``Kernels``, in a process that has cuDNN and has not used it yet."""
    monkeypatch.setattr(cudnn, "_compared", {})
    monkeypatch.setattr(cudnn, "version", lambda: "9.99.9")
    compute = cudnn._values_and_gradients
    once = lambda layer: of_scan(compute) if layer is cudnn._scan else compute(layer)  # noqa: E731
    monkeypatch.setattr(cudnn, "_values_and_gradients", once)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes all the time
    yield kernels
    jax.config.update("jax_disable_most_optimizations", False)


@cache
def of_scan(compute):
    return compute(cudnn._scan)


def problem(seed=90, steps=T):
    """(params, state, xs) and the factors of a loss, float32."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params = LSTMParams(normal(D, 4 * H), normal(H, 4 * H), normal(4 * H))
    states = [LSTMState(normal(B, H), normal(B, H)) for _ in range(2)]
    return (params, states[0], normal(steps, B, D)), (states[1], normal(steps, B, H))


def differentiated(layer, factors):
    """A compiled ``run(*arguments) -> (outputs, gradients)``."""

    def loss(*arguments):
        outputs = layer(*arguments)
        return oracle.weighted_sum(factors, outputs), outputs

    def run(*arguments):
        gradients, outputs = jax.grad(loss, (0, 1, 2), has_aux=True)(*arguments)
        return outputs, gradients

    return jax.jit(run, compiler_options=QUICK)


def scan(params, state, xs, **options):
    return lstm(params, xs, state, method="scan", **options)


# ---- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_values_and_every_gradient_are_the_oracles_and_the_scans(reverse, kernels):
    arguments, factors = problem()
    outputs, gradients = differentiated(partial(cudnn.cudnn, reverse=reverse), factors)(*arguments)
    exact = oracle.tree_map(lambda a: a.astype(np.float64), (*arguments, factors))

    def slow(params, state, xs):
        return oracle.lstm(params, xs, state, reverse=reverse)

    def loss(*arguments):
        final, hs = slow(*arguments)
        return oracle.weighted_sum((tuple(exact[3][0]), exact[3][1]), (final, hs))

    oracle.assert_close(outputs, slow(*exact[:3]), 1e-5)
    oracle.assert_close(gradients, oracle.gradients(loss, *exact[:3]), 1e-5)
    assert isinstance(outputs[0], LSTMState)
    oracle.assert_close(
        (outputs, gradients),
        differentiated(partial(scan, reverse=reverse), factors)(*arguments),
        1e-5,
    )


def test_the_vector_of_weights_is_the_one_that_interop_writes(kernels, monkeypatch):
    arguments, _ = problem()
    seen, call = [], cudnn._call
    monkeypatch.setattr(cudnn, "_call", lambda *a: seen.append(a[-1]) or call(*a))
    cudnn.cudnn(*arguments)
    np.testing.assert_array_equal(seen[-1], interop.dump_cudnn([arguments[0]]))


def test_nothing_to_run_over_is_the_state_itself(kernels):
    (params, state, xs), _ = problem()
    for rows, nothing in (
        (B, xs[:0]),
        (0, xs[:, :0]),
    ):
        start = LSTMState(state.h[:rows], state.c[:rows])
        final, hs = cudnn.cudnn(params, start, nothing)
        oracle.assert_close(final, start, 0)
        assert hs.shape == (*nothing.shape[:2], H) and hs.dtype == np.float32


def test_weights_of_fewer_bits_are_widened(kernels):
    (params, state, xs), factors = problem()
    params = LSTMParams(*(None if w is None else jnp.asarray(w, jnp.bfloat16) for w in params))
    outputs, gradients = differentiated(cudnn.cudnn, factors)(params, state, xs)
    assert gradients[0].w_h.dtype == jnp.bfloat16
    wide = LSTMParams(*(None if w is None else w.astype(np.float32) for w in params))
    oracle.assert_close(outputs, scan(wide, state, xs), 1e-5)


def test_vmap_over_models_is_a_loop(kernels):
    problems = [problem(seed) for seed in (91, 92, 93)]
    arguments = [arguments for arguments, _ in problems]
    factors = problems[0][1]
    run = differentiated(cudnn.cudnn, factors)
    at_once = jax.vmap(run)(*jax.tree.map(lambda *a: np.stack(a), *arguments))
    one_by_one = [run(*each) for each in arguments]
    oracle.assert_close(at_once, jax.tree.map(lambda *a: np.stack(a), *one_by_one), 1e-6)


def test_split_over_devices_the_gradients_are_the_same(kernels):
    """The primitive does not say what its results vary over; unmended, dW would be 4 times dW."""
    (params, state, xs), (of_final, of_hs) = problem()
    mesh, rows = Mesh(np.array(jax.devices()[:B]), ("b",)), Spec("b")
    specs = (Spec(), LSTMState(rows, rows), Spec(None, "b"), LSTMState(rows, rows), Spec(None, "b"))

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=Spec())
    def loss(params, state, xs, of_final, of_hs):
        # A sum with its square: a cotangent that is itself the same on all devices.
        total = oracle.weighted_sum((of_final, of_hs), cudnn.cudnn(params, state, xs))
        total = jax.lax.psum(total, "b")
        return total + total**2

    def whole(params, state, xs):
        total = oracle.weighted_sum((of_final, of_hs), scan(params, state, xs))
        return total + total**2

    split = lambda *arguments: loss(*arguments, of_final, of_hs)  # noqa: E731
    got = jax.jit(jax.grad(split, (0, 1, 2)))(params, state, xs)
    oracle.assert_close(got, jax.jit(jax.grad(whole, (0, 1, 2)))(params, state, xs), 2e-5)


@pytest.mark.parametrize("name, rounded", [(None, True), ("highest", False)])
def test_both_directions_have_the_precision_of_the_forward_one(name, rounded, kernels):
    arguments, factors = problem()
    run = lambda *arguments: oracle.weighted_sum(factors, cudnn.cudnn(*arguments))  # noqa: E731
    with jax.default_matmul_precision(name):
        pull = jax.jit(lambda *arguments: jax.vjp(run, *arguments)[1])(*arguments)
    assert kernels.runs == [("forward", rounded)]
    jax.jit(lambda pull: pull(jnp.float32(1.0)))(pull)  # where the default is another one
    assert set(kernels.runs) == {("forward", rounded), ("backward", rounded)}


def test_factors_are_rounded_where_jaxs_own_products_would_be():
    high, highest = jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST
    rounded = dict.fromkeys((None, "default", "high", "tensorfloat32", "bfloat16"), high)
    exact = dict.fromkeys(("highest", "float32", "F32_F32_F32", "BF16_BF16_F32_X9"), highest)
    for name, precision in (rounded | exact).items():
        with jax.default_matmul_precision(name):
            assert cudnn._precision() == precision, name


# ---- the first use ------------------------------------------------------------------------------


def test_cudnn_is_compared_with_the_scan_once_and_in_the_midst_of_any_trace(unused, monkeypatch):
    compare, count, (params, state, xs) = cudnn._difference, [], problem()[0]
    monkeypatch.setattr(cudnn, "_difference", lambda: count.append(1) or compare())

    def outputs(h):
        return jnp.sum(cudnn.cudnn(params, state._replace(h=h), xs)[1])

    def trace():
        jax.jit(jax.vmap(jax.grad(outputs))).trace(jnp.stack([state.h, state.h]))

    trace()
    trace()
    assert cudnn.available() is None and len(count) == 1
    with jax.default_matmul_precision("highest"):  # another program, compared on its own
        trace()
        assert cudnn.available() is None and len(count) == 2


WRONG = {
    "y": "hs by [^,]*",
    "c": "c by 2e.00",
    "dw": "the gradient of w_h by [^,]*",
    "dx": "the gradient of xs by [^,]*",
    "dc0": "the gradient of c by nan",
}


@pytest.mark.parametrize("fault", WRONG)
def test_cudnn_that_is_wrong_is_refused_and_what_it_got_wrong_is_named(fault, unused):
    unused.fault, (arguments, _) = fault, problem()
    said = f"cuDNN 9.99.9 on cpu differs from a scan in {WRONG[fault]}, more than 1e-04 of"
    with jax.default_matmul_precision("highest"):
        with pytest.raises(ValueError, match=f"^method: got 'cudnn', expected 'fused' .*: {said}"):
            jax.jit(cudnn.cudnn)(*arguments)
        unused.fault = None  # the verdict stands for as long as the process runs
        with pytest.raises(ValueError, match=said):
            cudnn.cudnn(*arguments)


def test_cudnn_that_fails_is_refused(unused, monkeypatch):
    def failing(layer):
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDNN_STATUS_EXECUTION_FAILED\nmore of it")

    monkeypatch.setattr(cudnn, "_values_and_gradients", failing)
    assert cudnn.available().endswith("on cpu fails: INTERNAL: CUDNN_STATUS_EXECUTION_FAILED")


def test_there_is_no_cudnn_on_a_cpu(monkeypatch):
    monkeypatch.setattr(cudnn, "_compared", {})
    said = "it needs a CUDA device, and JAX's default device is cpu"
    assert cudnn.available() == said
    with jax.default_device(jax.devices()[1]):
        assert cudnn.available() == said
    with pytest.raises(ValueError, match=f"^method: got 'cudnn', expected .*: {said}$"):
        cudnn.cudnn(*problem()[0])
    monkeypatch.setattr(cudnn, "_device", lambda: SimpleNamespace(client=CUDA, device_kind="X"))
    assert cudnn.available() == "the installed jaxlib comes without cuDNN's recurrent layers"
    assert cudnn._compared == {}


@pytest.mark.parametrize("number, text", [(91002, "9.10.2"), (92101, "9.21.1"), (100000, "10.0.0")])
def test_version_is_the_loaded_librarys(number, text, monkeypatch):
    library = SimpleNamespace(cudnnGetVersion=lambda: number)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert cudnn.version() == text


def test_version_without_cudnn_is_none(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cudnn.version() is None


# ---- what cuDNN does not do ---------------------------------------------------------------------


def beyond():
    (params, state, xs), _ = problem()
    yes = np.ones((T, B), bool)
    more = {"peephole": np.ones((3, H), np.float32), "w_proj": np.eye(H, dtype=np.float32)}
    return {
        "peepholes": ((params._replace(peephole=more["peephole"]), state, xs), {}),
        "a projection": ((params._replace(w_proj=more["w_proj"]), state, xs), {}),
        "cell_clip": ((params, state, xs), {"cell_clip": 1.0}),
        "proj_clip": ((params, state, xs), {"proj_clip": 1.0}),
        "a mask or lengths": ((params, state, xs), {"mask": yes}),
        "resets": ((params, state, xs), {"resets": yes}),
        "unroll=2": ((params, state, xs), {"unroll": 2}),
        "dtype bfloat16": (
            jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (params, state, xs)),
            {},
        ),
    }


@pytest.mark.parametrize("what", beyond())
def test_what_cudnn_does_not_do_is_refused(what, kernels):
    arguments, options = beyond()[what]
    said = rf"^method: got 'cudnn' with {what}.*, expected 'fused' or 'scan'(\n|$)"
    with pytest.raises(ValueError, match=said):
        jax.jit(partial(cudnn.cudnn, **options))(*arguments)
    assert kernels.runs == []


def test_float64_is_refused(kernels, x64):
    arguments = jax.tree.map(lambda a: a.astype(np.float64), problem()[0])
    with pytest.raises(ValueError, match="^method: got 'cudnn' with dtype float64 "):
        cudnn.cudnn(*arguments)


def test_second_derivatives_are_refused(kernels):
    params, state, xs = problem()[0]

    def slope(xs):
        return jnp.sum(jax.grad(lambda xs: jnp.sum(cudnn.cudnn(params, state, xs)[1]))(xs))

    with pytest.raises(ValueError, match="^method: got 'cudnn' in a second derivative, expected"):
        jax.jit(jax.grad(slope))(xs)
