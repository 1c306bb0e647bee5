"""The laws of the initial weights: limits, spread and singular values, never the random stream."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax import init_gru, init_lstm, init_rnn

# D, H and P unequal and large enough that the laws' limits cannot be taken for one another.
D, H, P = 40, 30, 7


def assert_uniform(values, limit):
    """Inside ±limit, nearly reaching it, and evenly spread: Kolmogorov and Smirnov at p = 1e-4."""
    values = np.sort(np.ravel(np.asarray(values, np.float64)))
    count = len(values)
    assert limit * (1 - 12 / count) < np.abs(values).max() <= limit * (1 + 1e-6)
    expected = (np.arange(count) + 0.5) / count
    assert np.abs((values / limit + 1) / 2 - expected).max() < 2.2 / np.sqrt(count)


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


@pytest.mark.parametrize("init", ["lstmjax", "tf1", "keras", "keras1"])
@pytest.mark.parametrize("forget_bias", [1.0, 2.5])
def test_only_the_forget_gates_bias_is_not_zero(init, forget_bias):
    params = lstm_weights(init, forget_bias=forget_bias)
    expected = np.zeros((4, H), np.float32)
    expected[1] = forget_bias
    assert np.array_equal(params.b, expected.ravel())
    assert params.peephole is None and params.w_proj is None


def test_the_default_forget_bias_is_one_and_the_default_law_lstmjax():
    default = init_lstm(jax.random.key(1), D, H)
    assert np.array_equal(default.b[H : 2 * H], np.ones(H))
    assert np.array_equal(default.w_h, lstm_weights("lstmjax").w_h)


def test_lstmjax_weights_are_glorot_and_orthogonal_in_each_gate():
    params = lstm_weights("lstmjax")
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


@pytest.mark.parametrize("init", ["tf1", "keras1"])
def test_input_and_recurrent_kernels_are_drawn_apart(init):
    params = init_lstm(jax.random.key(2), H, H, init=init)
    assert not np.any(params.w_x == params.w_h)


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
