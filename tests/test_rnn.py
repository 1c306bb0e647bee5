"""The simple recurrent network against the NumPy oracle, a closed form, and Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen
from jax.test_util import check_grads

from lstmjax import RNNParams, RNNState, rnn, rnn_step

T, B, D, H = 7, 3, 4, 5
ACTIVATIONS = ["tanh", "relu", "linear"]


def random_problem(bias=True, dtype=np.float64):
    """params, xs, a non-zero state, and random weights of a loss on all outputs."""
    rng = np.random.default_rng(30)

    def normal(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(dtype)

    # 0.5: the linear cell multiplies by w_h at every step and must not run away.
    params = RNNParams(normal(D, H), normal(H, H, scale=0.5), normal(H) if bias else None)
    weights = (RNNState(normal(B, H)), normal(T, B, H))
    return params, normal(T, B, D), RNNState(normal(B, H)), weights


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients_are_the_oracles(activation, bias, values_and_gradients, x64):
    params, xs, state, weights = random_problem(bias)
    outputs, gradients = values_and_gradients(
        lambda *arguments: rnn(*arguments, activation=activation), weights, params, xs, state
    )

    def loss(*arguments):
        return oracle.weighted_sum(weights, oracle.rnn(*arguments, activation=activation))

    oracle.assert_close(outputs, oracle.rnn(params, xs, state, activation=activation), 1e-10)
    oracle.assert_close(gradients, oracle.gradients(loss, params, xs, state), 1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_is_the_oracle_to_1e_5(activation, values_and_gradients):
    params, xs, state, weights = random_problem(dtype=np.float32)
    outputs, gradients = values_and_gradients(
        lambda *arguments: rnn(*arguments, activation=activation), weights, params, xs, state
    )
    params, xs, state, weights = oracle.tree_map(np.float64, (params, xs, state, weights))

    def loss(*arguments):
        return oracle.weighted_sum(weights, oracle.rnn(*arguments, activation=activation))

    assert outputs[1].dtype == jnp.float32
    oracle.assert_close(outputs, oracle.rnn(params, xs, state, activation=activation), 1e-5)
    oracle.assert_close(gradients, oracle.gradients(loss, params, xs, state), 1e-5)


def test_the_problem_meets_the_kink_of_relu():
    params, xs, state, _ = random_problem()
    _, hs = oracle.rnn(params, xs, state, activation="relu")
    assert 0.2 < np.mean(hs == 0) < 0.8


def test_check_grads_forward_and_reverse(x64):
    params, xs, state, (final, of_hs) = random_problem()

    @jax.jit
    def loss(params, xs, state):
        return oracle.weighted_sum((final, of_hs[:3]), rnn(params, xs, state))

    check_grads(loss, (params, xs[:3], state), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


def test_linear_cell_without_bias_is_a_sum_of_matrix_powers(x64):
    """h_t = h_0 W_hᵗ + Σ_s x_s W_x W_hᵗ⁻ˢ, the cell of the source's first forecast."""
    params, xs, state, _ = random_problem(bias=False)
    final, hs = rnn(params, xs, state, activation="linear")
    power = np.linalg.matrix_power
    for t in range(T):
        expected = state.h @ power(params.w_h, t + 1)
        for s in range(t + 1):
            expected += xs[s] @ params.w_x @ power(params.w_h, t - s)
        oracle.assert_close(hs[t], expected, 1e-12)
    oracle.assert_close(final.h, hs[-1], 0.0)


def test_no_state_is_a_zero_state_and_tanh_the_default(x64):
    params, xs, state, _ = random_problem()
    expected = oracle.rnn(params, xs, (np.zeros((B, H)),), activation="tanh")
    oracle.assert_close(rnn(params, xs), expected, 1e-10)
    step = rnn_step(params, state, xs[0])
    oracle.assert_close(step, (oracle.rnn(params, xs[:1], state)[1][0],), 1e-10)


@pytest.mark.parametrize("leading", [(), (B,), (2, B)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_step_on_any_leading_axes_is_the_oracles_row_by_row(leading, activation, x64):
    rng = np.random.default_rng(31)
    params = random_problem()[0]
    x_t, h = rng.normal(size=(*leading, D)), rng.normal(size=(*leading, H))
    new = rnn_step(params, RNNState(h), x_t, activation=activation)
    assert isinstance(new, RNNState) and new.h.shape == h.shape
    for row in np.ndindex(leading):
        expected = oracle.rnn_step(params, x_t[row], h[row], activation)
        oracle.assert_close((new.h[row],), expected, 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_are_linens(activation, values_and_gradients, x64):
    params, xs, state, weights = random_problem()
    function = {"tanh": jnp.tanh, "relu": jax.nn.relu, "linear": lambda z: z}[activation]
    cell = linen.SimpleCell(H, activation_fn=function, param_dtype=np.float64)
    theirs = linen.RNN(cell, time_major=True, return_carry=True)

    def run_linen(variables, xs, state):
        h, hs = theirs.apply(variables, xs, initial_carry=state.h)
        return RNNState(h), hs

    def to_linen(params):
        of_x = {"kernel": np.asarray(params.w_x), "bias": np.asarray(params.b)}
        return {"params": {"cell": {"i": of_x, "h": {"kernel": np.asarray(params.w_h)}}}}

    variables = to_linen(params)
    wanted_shapes = jax.eval_shape(theirs.init, jax.random.key(0), xs)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, wanted_shapes)
    outputs, gradients = values_and_gradients(
        lambda *arguments: rnn(*arguments, activation=activation), weights, params, xs, state
    )
    expected, (of_variables, *rest) = values_and_gradients(run_linen, weights, variables, xs, state)
    oracle.assert_close(outputs, expected, 1e-12)
    oracle.assert_close(gradients[1:], tuple(rest), 1e-12)
    ours = to_linen(gradients[0])
    jax.tree.map(lambda got, want: oracle.assert_close(got, want, 1e-12), ours, of_variables)


@pytest.mark.parametrize(
    ("of_xs", "of_params", "of_h"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float64", "float64"),
    ],
)
def test_dtypes_of_outputs_and_gradients(of_xs, of_params, of_h, x64):
    params, xs, _, _ = random_problem(dtype=jnp.dtype(of_params))
    xs = xs.astype(jnp.dtype(of_xs))
    state, hs = jax.eval_shape(rnn, params, xs)
    assert (state.h.dtype, hs.dtype) == (of_h, of_h)
    gradients = jax.eval_shape(jax.grad(lambda p, x: rnn(p, x)[1].sum(), (0, 1)), params, xs)
    assert [g.dtype for g in jax.tree.leaves(gradients)] == [of_params] * 3 + [of_xs]


def test_bfloat16_products_are_summed_in_float32():
    """256 + 1/2 − 256: bfloat16 has steps of 2 there, so a rounded product would leave 0.

    The step runs operation by operation: inside one program XLA may keep more precision than the
    operations ask for, and hide the rounding.
    """
    sums_to_256_5 = np.array([[256.0, 0.0], [0.5, 0.0]], jnp.bfloat16)
    minus_256 = np.array([[-256.0, 0.0], [0.0, 0.0]], jnp.bfloat16)
    ones = np.ones((1, 2), jnp.bfloat16)
    for w_x, w_h in ((sums_to_256_5, minus_256), (minus_256, sums_to_256_5)):
        new = rnn_step(RNNParams(w_x, w_h), RNNState(ones), ones, activation="linear")
        assert new.h[0, 0] == 0.5 and new.h.dtype == jnp.bfloat16
