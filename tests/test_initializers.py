"""The laws of the initial weights: limits, spread and singular values, never the random stream."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen, nnx

from lstmjax import LSTMParams, chrono, init_gru, init_lstm, init_rnn, log_uniform, uniform_gate
from lstmjax.initializers import INITS

# D, H and P unequal and large enough that the laws' limits cannot be taken for one another.
D, H, P = 40, 30, 7


def assert_follows(values, cdf):
    """Kolmogorov and Smirnov at p = 1e-4: the law of independent values."""
    values = np.sort(np.ravel(np.asarray(values, np.float64)))
    expected = (np.arange(len(values)) + 0.5) / len(values)
    distance = np.abs(cdf(values) - expected).max()
    assert distance < 2.2 / np.sqrt(len(values)), distance


def assert_uniform(values, limit):
    """Inside ±limit, nearly reaching it, and evenly spread."""
    largest = np.abs(np.asarray(values, np.float64)).max()
    assert limit * (1 - 12 / np.size(values)) < largest <= limit * (1 + 1e-6)
    assert_follows(values, lambda x: np.clip((x / limit + 1) / 2, 0, 1))


def assert_truncated_normal(values, sigma):
    """N(0, sigma) without what lies beyond ±2 sigma; its deviation is then 0.8796 sigma."""
    values = np.asarray(values, np.float64)
    assert 1.9 * sigma < np.abs(values).max() <= 2 * sigma * (1 + 1e-6)
    phi = np.vectorize(lambda x: math.erf(x / math.sqrt(2)))
    assert_follows(values, lambda x: 0.5 + phi(x / sigma) / phi(2) / 2)
    # The deviation of one estimate is below that of a normal's, 1/√(2N) of the value.
    assert abs(values.std() / (0.8796 * sigma) - 1) < 4.5 / np.sqrt(2 * values.size)


def assert_lecun_normal(values, fan_in):
    """The deviation is 1/√fan_in after truncation, so the limit is 2.27 of it."""
    assert_truncated_normal(values, 1 / np.sqrt(fan_in) / 0.87962566)


def assert_singular_values_one(matrix):
    """All singular values are 1: rows or columns, whichever are fewer, are orthonormal."""
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    np.testing.assert_allclose(values, 1.0, atol=1e-5)


def root_mean_square_singular_value(matrix):
    return np.sqrt(np.mean(np.linalg.svd(matrix, compute_uv=False) ** 2))


def gates(kernel, count):
    """The blocks of a kernel; no two are equal, so no key was used twice."""
    blocks = np.split(np.asarray(kernel, np.float64), count, axis=-1)
    for n in range(count):
        assert np.abs(blocks[n] - blocks[n - 1]).max() > 0.1
    return blocks


def lstm_weights(init, **options):
    return init_lstm(jax.random.key(1), D, H, init=init, **options)


# --- LSTM ----------------------------------------------------------------------------------------


def test_the_default_forget_bias_is_one_and_the_default_law_lstmjax():
    default = init_lstm(jax.random.key(1), D, H)
    assert np.array_equal(default.b[H : 2 * H], np.ones(H))
    assert np.array_equal(default.w_h, lstm_weights("lstmjax").w_h)


@pytest.mark.parametrize("init", ["lstmjax", "haste"])
def test_lstmjax_weights_are_glorot_and_orthogonal_in_each_gate(init):
    params = lstm_weights(init)
    for block in gates(params.w_x, 4):
        assert_uniform(block, np.sqrt(6 / (D + H)))
    for block in gates(params.w_h, 4):
        assert block.shape == (H, H)
        assert_singular_values_one(block)


def test_lstmjax_weights_with_projection_and_peepholes():
    params = lstm_weights("lstmjax", proj_size=P, peephole=True)
    for block in gates(params.w_h, 4):
        assert block.shape == (P, H)
        assert_singular_values_one(block)
    assert np.array_equal(params.peephole, np.zeros((3, H)))
    assert_uniform(params.w_proj, np.sqrt(6 / (H + P)))


def test_tf1_weights_are_glorot_on_the_concatenated_kernel():
    params = lstm_weights("tf1", proj_size=P, peephole=True)
    limit = np.sqrt(6 / (D + P + 4 * H))
    assert_uniform(params.w_x, limit)
    assert_uniform(params.w_h, limit)
    assert_uniform(params.w_proj, np.sqrt(6 / (H + P)))
    assert_uniform(params.peephole, np.sqrt(6 / (H + H)))


def test_keras_weights_are_glorot_and_orthogonal_as_whole_matrices():
    params = lstm_weights("keras")
    assert_uniform(params.w_x, np.sqrt(6 / (D + 4 * H)))
    assert_singular_values_one(params.w_h)
    for block in gates(params.w_h, 4):  # a quarter of each orthonormal row, so 1/2 on average
        assert abs(root_mean_square_singular_value(block) - 0.5) < 0.05


def test_keras1_weights_are_glorot_in_each_gate():
    params = lstm_weights("keras1", proj_size=P)
    for of_x, of_h in zip(gates(params.w_x, 4), gates(params.w_h, 4), strict=True):
        assert_uniform(of_x, np.sqrt(6 / (D + H)))
        assert_uniform(of_h, np.sqrt(6 / (P + H)))


@pytest.mark.parametrize("init", ["torch", "equinox"])
def test_torch_and_equinox_kernels_are_uniform_by_the_hidden_size(init):
    """1/√H also for the kernels that read D inputs and P projected outputs."""
    params = lstm_weights(init, proj_size=P, peephole=True)
    assert params.w_h.shape == (P, 4 * H)
    for kernel in (params.w_x, params.w_h):
        assert_uniform(kernel, 1 / np.sqrt(H))
    assert_uniform(params.w_proj, 1 / np.sqrt(H) if init == "torch" else np.sqrt(6 / (H + P)))
    assert not np.any(params.peephole)


def test_haiku_weights_are_one_truncated_normal_on_both_kernels():
    params = lstm_weights("haiku", proj_size=P)
    for kernel in (params.w_x, params.w_h):
        assert_truncated_normal(kernel, 1 / np.sqrt(D + P))


def flax_weights(name):
    """A Flax cell's own initial parameters as ``LSTMParams``: the law, not our reading of it."""
    if name == "nnx optimised":
        cell = nnx.OptimizedLSTMCell(D, H, rngs=nnx.Rngs(5))
        of_x, of_h = cell.dense_i, cell.dense_h
        return LSTMParams(of_x.kernel[...], of_h.kernel[...], of_h.bias[...])
    if name == "nnx":
        cell = nnx.LSTMCell(D, H, rngs=nnx.Rngs(5))
        of = {layer: vars(getattr(cell, layer)) for layer in "ii if_ ig io hi hf hg ho".split()}
        of["if"] = of.pop("if_")
    else:
        cell = {"linen": linen.LSTMCell, "linen optimised": linen.OptimizedLSTMCell}[name](H)
        carry = cell.initialize_carry(jax.random.key(0), (1, D))
        of = cell.init(jax.random.key(5), carry, jnp.zeros((1, D)))["params"]
    joined = lambda side, part: np.concatenate([of[side + g][part] for g in "ifgo"], -1)  # noqa: E731
    return LSTMParams(joined("i", "kernel"), joined("h", "kernel"), joined("h", "bias"))


@pytest.mark.parametrize("source", ["ours", "linen", "linen optimised", "nnx"])
def test_flax_weights_are_lecun_normal_and_orthogonal_in_each_gate(source):
    params = lstm_weights("flax") if source == "ours" else flax_weights(source)
    assert_lecun_normal(params.w_x, D)
    for block in gates(params.w_h, 4):
        assert block.shape == (H, H)
        assert_singular_values_one(block)
    assert np.array_equal(params.b, np.zeros(4 * H))


@pytest.mark.parametrize("source", ["ours", "nnx optimised"])
def test_nnx_fused_weights_are_lecun_normal_and_orthogonal_as_a_whole(source):
    params = lstm_weights("nnx_fused") if source == "ours" else flax_weights(source)
    assert_lecun_normal(params.w_x, D)
    assert params.w_h.shape == (H, 4 * H)
    assert_singular_values_one(params.w_h)
    for block in gates(params.w_h, 4):
        assert abs(root_mean_square_singular_value(block) - 0.5) < 0.05
    assert np.array_equal(params.b, np.zeros(4 * H))


@pytest.mark.parametrize("init", ["tf1", "keras1", "haiku", "torch", "equinox"])
def test_input_and_recurrent_kernels_are_drawn_apart(init):
    params = init_lstm(jax.random.key(2), H, H, init=init)
    assert not np.any(params.w_x == params.w_h)


# --- the LSTM's biases ---------------------------------------------------------------------------

FORGET_BIAS = dict.fromkeys(INITS, 1.0) | dict.fromkeys(["torch", "equinox", "flax", "nnx_fused"])
RANDOM = ["torch", "equinox"]


@pytest.mark.parametrize("init", INITS)
def test_the_forget_bias_is_the_frameworks_own_a_number_or_a_law(init):
    """What is not replaced is zero, or under PyTorch's and Equinox's laws random as before."""
    options = {"key": jax.random.key(6), "input_size": 2, "hidden_size": 5, "init": init}
    draw = lambda **more: np.asarray(init_lstm(**options, **more).b).reshape(4, 5)  # noqa: E731
    own = draw()
    if init in RANDOM:
        assert len(np.unique(own)) == own.size
    else:
        expected = np.zeros((4, 5))
        expected[1] = FORGET_BIAS[init] or 0.0
        assert np.array_equal(own, expected)
    number = draw(forget_bias=-2.5)
    assert np.array_equal(number[1], np.full(5, -2.5))
    assert np.array_equal(number[[0, 2, 3]], own[[0, 2, 3]])
    for law in (chrono(50), log_uniform(50), uniform_gate):
        i, f, g, o = draw(forget_bias=law)
        assert np.array_equal(i, -f) and len(np.unique(f)) == 5
        assert np.array_equal([g, o], own[2:])


def large_biases(init, forget_bias=None):
    """[4, H] of a wide layer, so that similar laws can be told apart."""
    wide = 700
    return np.asarray(
        init_lstm(jax.random.key(7), 2, wide, init=init, forget_bias=forget_bias).b
    ).reshape(4, wide)


def test_torch_biases_are_a_sum_of_two_uniform_draws_and_equinox_biases_one():
    torch, equinox = large_biases("torch"), large_biases("equinox")
    limit = 1 / np.sqrt(700)

    def triangular(x):
        tail = np.clip(1 - np.abs(x) / (2 * limit), 0, 1) ** 2 / 2
        return np.where(x < 0, tail, 1 - tail)

    assert 1.8 * limit < np.abs(torch).max() < 2 * limit
    assert_follows(torch, triangular)
    assert_uniform(equinox, limit)
    for drawn, variance in ((torch, 2 / 3), (equinox, 1 / 3)):
        assert abs(drawn.var() / limit**2 / variance - 1) < 0.1
        # Each gate has draws of its own: no correlation beyond 4.5/√H.
        assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 4.5 / np.sqrt(700)


@pytest.mark.parametrize("max_lag", [3, 784, 50.5])
def test_chrono_biases_are_logarithms_of_uniform_lags(max_lag):
    """b_f ~ log U(1, T − 1), b_i = −b_f; the other two as they were."""
    i, f, g, o = large_biases("equinox", chrono(max_lag))
    assert np.array_equal(i, -f)
    assert 0 <= f.min() and f.max() <= np.log(max_lag - 1) * (1 + 1e-6)
    assert_follows(np.exp(f.astype(np.float64)), lambda x: (x - 1) / (max_lag - 2))
    assert np.array_equal([g, o], large_biases("equinox")[2:])


@pytest.mark.parametrize("max_lag", [3, 784, 50.5])
def test_log_uniform_biases_are_evenly_spread(max_lag):
    """b_f ~ U(0, log(T − 1)), b_i = −b_f; the other two as they were."""
    i, f, g, o = large_biases("equinox", log_uniform(max_lag))
    assert np.array_equal(i, -f)
    assert 0 <= f.min() and f.max() <= np.log(max_lag - 1) * (1 + 1e-6)
    assert_follows(f.astype(np.float64), lambda x: x / np.log(max_lag - 1))
    assert np.array_equal([g, o], large_biases("equinox")[2:])


@pytest.mark.parametrize("law", [chrono, log_uniform])
def test_lags_of_two_steps_are_no_bias(law):
    i, f = law(2)(jax.random.key(8), 10, jnp.float32)
    assert not np.any(i) and not np.any(f)


def test_uniform_gates_are_evenly_spread():
    """σ(b_f) ~ U(1/H, 1 − 1/H), b_i = −b_f."""
    i, f, _, _ = large_biases("equinox", uniform_gate)
    assert np.array_equal(i, -f)
    opened = oracle.sigmoid(f.astype(np.float64))
    low, high = 1 / 700, 1 - 1 / 700
    assert low * (1 - 1e-5) <= opened.min() < 8 * low and 1 - 8 * low < opened.max() <= high + 1e-6
    assert_follows(opened, lambda x: (x - low) / (high - low))
    _, halves = uniform_gate(jax.random.key(9), 2, jnp.float32)
    np.testing.assert_allclose(halves, 0.0, atol=1e-6)  # between 1/2 and 1/2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "law",
    [chrono(1000), log_uniform(1000), uniform_gate],
    ids=["chrono", "log_uniform", "uniform_gate"],
)
def test_narrow_biases_are_the_rounded_wide_ones(law, dtype):
    """Drawn in bfloat16, 1 − 1/H would be 1 and a gate's bias infinite."""
    wide = law(jax.random.key(10), 5000, jnp.float32)
    narrow = law(jax.random.key(10), 5000, jnp.dtype(dtype))
    for one, rounded in zip(wide, narrow, strict=True):
        assert np.all(np.isfinite(one)) and rounded.dtype == dtype
        assert np.array_equal(rounded, one.astype(dtype))


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: chrono(1.5), ("max_lag", "1.5", ">= 2")),
        (lambda: log_uniform(1), ("max_lag", "1", ">= 2")),
        (lambda: log_uniform(None), ("max_lag", "None", "number")),
        (lambda: chrono("8"), ("max_lag", "'8'", "number")),
        (lambda: chrono(float("inf")), ("max_lag", "inf", "finite")),
        (lambda: jax.jit(lambda lag: chrono(lag) and lag)(5.0), ("max_lag", "not traced")),
        (lambda: jax.jit(lambda lag: log_uniform(lag) and lag)(5.0), ("max_lag", "not traced")),
        (
            lambda: uniform_gate(jax.random.key(0), 1, jnp.float32),
            ("hidden_size", "1", ">= 2 for uniform_gate"),
        ),
        (lambda: lstm_weights("lstmjax", forget_bias="one"), ("forget_bias", "'one'", "number")),
        (lambda: lstm_weights("lstmjax", forget_bias=np.nan), ("forget_bias", "nan", "finite")),
        (lambda: lstm_weights("pytorch"), ("init", "'pytorch'", "'torch'", "'haste'")),
        (lambda: lstm_weights("torch", dtype=int), ("dtype", "int", "floating")),
        (lambda: init_lstm(jax.random.key(0), 0, 3, init="haiku"), ("input_size", "0", ">= 1")),
    ],
)
def test_wrong_arguments(call, parts):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert all(part in message for part in parts) and "\n" not in message, message


# --- GRU and RNN ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reset_after", [True, False])
def test_gru_weights(reset_after):
    params = init_gru(jax.random.key(3), D, H, reset_after=reset_after)
    for block in gates(params.w_x, 3):
        assert_uniform(block, np.sqrt(6 / (D + H)))
    for block in gates(params.w_h, 3):
        assert_singular_values_one(block)
    assert np.array_equal(params.b, np.zeros(3 * H))
    if reset_after:
        assert np.array_equal(params.b_n, np.zeros(H))
    else:
        assert params.b_n is None


def test_gru_weights_of_keras():
    params = init_gru(jax.random.key(3), D, H, init="keras")
    assert_uniform(params.w_x, np.sqrt(6 / (D + 3 * H)))
    assert_singular_values_one(params.w_h)
    for block in gates(params.w_h, 3):
        assert abs(root_mean_square_singular_value(block) - np.sqrt(1 / 3)) < 0.05


@pytest.mark.parametrize("init", ["lstmjax", "keras"])
def test_rnn_weights(init):
    params = init_rnn(jax.random.key(4), D, H, init=init)
    assert_uniform(params.w_x, np.sqrt(6 / (D + H)))
    assert params.w_h.shape == (H, H)
    assert_singular_values_one(params.w_h)
    assert np.array_equal(params.b, np.zeros(H))


def test_rnn_weights_of_the_linear_cell():
    params = init_rnn(jax.random.key(4), D, H, init="uniform", bias=False)
    assert_uniform(params.w_x, 0.05)
    assert_uniform(params.w_h, 0.05)
    assert params.b is None


# --- all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("init", INITS)
def test_every_law_gives_all_weights_the_dtype_asked_for(init, dtype):
    options = {"proj_size": P, "peephole": True, "forget_bias": chrono(9), "init": init}
    draw = functools.partial(init_lstm, input_size=D, hidden_size=H, dtype=dtype, **options)
    params = jax.eval_shape(draw, jax.random.key(0))
    assert {w.dtype for w in params} == {jnp.dtype(dtype)}
    shapes = [(D, 4 * H), (P, 4 * H), (4 * H,), (3, H), (H, P)]
    assert [w.shape for w in params] == shapes


@pytest.mark.parametrize(
    ("init_cell", "options"),
    [
        (init_lstm, {}),
        (init_lstm, {"proj_size": P, "peephole": True, "init": "tf1"}),
        (init_gru, {}),
        (init_rnn, {}),
        (init_rnn, {"init": "uniform"}),
    ],
)
def test_weights_have_the_dtype_asked_for_and_depend_on_the_key(init_cell, options):
    params = init_cell(jax.random.key(0), D, H, dtype=jnp.bfloat16, **options)
    assert {w.dtype for w in params if w is not None} == {jnp.dtype("bfloat16")}
    one, same, other = (init_cell(jax.random.key(k), D, H, **options) for k in (0, 0, 1))
    assert {w.dtype for w in one if w is not None} == {jnp.dtype("float32")}
    for name in ("w_x", "w_h"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
        assert not np.any(getattr(one, name) == getattr(other, name))
