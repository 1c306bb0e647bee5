"""The gated recurrent unit, in both versions, against the NumPy oracle and Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen
from jax.test_util import check_grads

from lstmjax import GRUParams, GRUState, gru, gru_step

T, B, D, H = 7, 3, 4, 5

# name: (whether there is a b_n, reset_after)
VERSIONS = {
    "reset after": (True, True),
    "reset after, no b_n": (False, True),
    "reset before": (False, False),
}


def random_problem(with_b_n=True, dtype=np.float64):
    """params, xs, a non-zero state, and random weights of a loss on all outputs."""
    rng = np.random.default_rng(40)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    b_n = normal(H) if with_b_n else None
    params = GRUParams(normal(D, 3 * H), normal(H, 3 * H), normal(3 * H), b_n)
    weights = (GRUState(normal(B, H)), normal(T, B, H))
    return params, normal(T, B, D), GRUState(normal(B, H)), weights


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-5)])
def test_values_and_gradients_are_the_oracles(version, dtype, tolerance, values_and_gradients, x64):
    with_b_n, reset_after = VERSIONS[version]
    params, xs, state, weights = random_problem(with_b_n, dtype)
    outputs, gradients = values_and_gradients(
        lambda *arguments: gru(*arguments, reset_after=reset_after), weights, params, xs, state
    )
    assert outputs[1].dtype == outputs[0].h.dtype == dtype
    params, xs, state, weights = oracle.tree_map(np.float64, (params, xs, state, weights))

    def loss(*arguments):
        return oracle.weighted_sum(weights, oracle.gru(*arguments, reset_after=reset_after))

    expected = oracle.gru(params, xs, state, reset_after=reset_after)
    oracle.assert_close(outputs, expected, tolerance)
    oracle.assert_close(gradients, oracle.gradients(loss, params, xs, state), tolerance)


def test_the_two_versions_differ(x64):
    """With b_n = 0 they would agree only if r ⊙ (h W) were (r ⊙ h) W."""
    params, xs, state, _ = random_problem(with_b_n=False)
    _, after = gru(params, xs, state)
    _, before = gru(params, xs, state, reset_after=False)
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("version", ["reset after", "reset before"])
def test_check_grads_forward_and_reverse(version, x64):
    with_b_n, reset_after = VERSIONS[version]
    params, xs, state, (final, of_hs) = random_problem(with_b_n)

    @jax.jit
    def loss(params, xs, state):
        outputs = gru(params, xs, state, reset_after=reset_after)
        return oracle.weighted_sum((final, of_hs[:3]), outputs)

    check_grads(loss, (params, xs[:3], state), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


def test_no_state_is_a_zero_state(x64):
    params, xs, _, _ = random_problem()
    oracle.assert_close(gru(params, xs), oracle.gru(params, xs, (np.zeros((B, H)),)), 1e-10)


@pytest.mark.parametrize("leading", [(), (B,), (2, B)], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_step_on_any_leading_axes_is_the_oracles_row_by_row(leading, version, x64):
    rng = np.random.default_rng(41)
    with_b_n, reset_after = VERSIONS[version]
    params = random_problem(with_b_n)[0]
    x_t, h = rng.normal(size=(*leading, D)), rng.normal(size=(*leading, H))
    new = gru_step(params, GRUState(h), x_t, reset_after=reset_after)
    assert isinstance(new, GRUState) and new.h.shape == h.shape
    for row in np.ndindex(leading):
        expected = oracle.gru_step(params, x_t[row], h[row], reset_after)
        oracle.assert_close((new.h[row],), expected, 1e-12)


def to_linen(params):
    """GRUParams (or its gradient) under linen's names: one bias a gate, and one more on hn."""
    w_x, w_h, b = (np.split(np.asarray(w), 3, axis=-1) for w in params[:3])
    cell = {}
    for n, gate in enumerate("rzn"):
        cell[f"i{gate}"] = {"kernel": w_x[n], "bias": b[n]}
        cell[f"h{gate}"] = {"kernel": w_h[n]}
    cell["hn"]["bias"] = np.asarray(params.b_n)
    return {"params": {"cell": cell}}


def test_values_and_gradients_are_linens(values_and_gradients, x64):
    params, xs, state, weights = random_problem()
    cell = linen.GRUCell(H, param_dtype=np.float64)
    theirs = linen.RNN(cell, time_major=True, return_carry=True)

    def run_linen(variables, xs, state):
        h, hs = theirs.apply(variables, xs, initial_carry=state.h)
        return GRUState(h), hs

    variables = to_linen(params)
    wanted_shapes = jax.eval_shape(theirs.init, jax.random.key(0), xs)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, wanted_shapes)
    outputs, gradients = values_and_gradients(gru, weights, params, xs, state)
    expected, (of_variables, *rest) = values_and_gradients(run_linen, weights, variables, xs, state)
    oracle.assert_close(outputs, expected, 1e-12)
    oracle.assert_close(gradients[1:], tuple(rest), 1e-12)
    ours = to_linen(gradients[0])
    jax.tree.map(lambda got, want: oracle.assert_close(got, want, 1e-12), ours, of_variables)


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize(
    ("of_xs", "of_params", "of_h"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float64", "float64"),
    ],
)
def test_dtypes_of_outputs_and_gradients(of_xs, of_params, of_h, reset_after, x64):
    params, xs, _, _ = random_problem(reset_after, jnp.dtype(of_params))
    xs = xs.astype(jnp.dtype(of_xs))

    def run(params, xs):
        return gru(params, xs, reset_after=reset_after)

    state, hs = jax.eval_shape(run, params, xs)
    assert (state.h.dtype, hs.dtype) == (of_h, of_h)
    gradients = jax.eval_shape(jax.grad(lambda p, x: run(p, x)[1].sum(), (0, 1)), params, xs)
    leaves = [g.dtype for g in jax.tree.leaves(gradients)]
    assert leaves == [of_params] * (4 if reset_after else 3) + [of_xs]


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("product", ["x", "h"])
def test_bfloat16_products_are_summed_in_float32(product, reset_after):
    """256 + 1/2 − 256: bfloat16 has steps of 2 there, so a rounded product would leave 0.

    With r = 1 and z = 0 the step is h = tanh(x W_xn + h W_hn + b). It runs operation by
    operation: inside one program XLA may keep more precision than asked for.
    """
    b = np.repeat([100.0, -100.0, -256.0], 2)
    w = np.zeros((2, 6))
    w[:, 4] = 256.0, 0.5  # n, first unit
    w_x, w_h = (w, 0 * w) if product == "x" else (0 * w, w)
    params = GRUParams(*(a.astype(jnp.bfloat16) for a in (w_x, w_h, b)))
    ones = np.ones((1, 2), jnp.bfloat16)
    new = gru_step(params, GRUState(ones), ones, reset_after=reset_after)
    np.testing.assert_allclose(np.float64(new.h[0, 0]), np.tanh(0.5), rtol=2.0**-8)
