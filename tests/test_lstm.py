"""The LSTM against the NumPy oracle, other people's LSTMs, and its own laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen
from jax.experimental.rnn import lstm_ref
from jax.test_util import check_grads

from lstmjax import LSTMParams, LSTMState, lstm, lstm_step

T, B, D, H, P = 7, 3, 4, 5, 2

# name: (the optional parameters it has, its options)
VARIANTS = {
    "plain": ((), {}),
    "peephole": (("peephole",), {}),
    "projection": (("w_proj",), {}),
    "cell_clip": ((), {"cell_clip": 0.5}),
    "peephole and cell_clip": (("peephole",), {"cell_clip": 0.5}),
    "everything": (("peephole", "w_proj"), {"cell_clip": 0.5, "proj_clip": 0.3}),
}


def random_params(rng, extras=(), dtype=np.float64, sizes=(D, H, P)):
    d, h, p = sizes if "w_proj" in extras else (sizes[0], sizes[1], sizes[1])
    return LSTMParams(
        w_x=rng.normal(size=(d, 4 * h)).astype(dtype),
        w_h=rng.normal(size=(p, 4 * h)).astype(dtype),
        b=rng.normal(size=(4 * h,)).astype(dtype),
        peephole=rng.normal(size=(3, h)).astype(dtype) if "peephole" in extras else None,
        w_proj=rng.normal(size=(h, p)).astype(dtype) if "w_proj" in extras else None,
    )


def random_problem(variant, dtype=np.float64):
    """params, xs, a non-zero state, random weights of a loss on all outputs, and the options."""
    rng = np.random.default_rng(20)
    extras, options = VARIANTS[variant]
    width = P if "w_proj" in extras else H
    params = random_params(rng, extras, dtype)
    xs = rng.normal(size=(T, B, D)).astype(dtype)
    state, final = (
        LSTMState(rng.normal(size=(B, width)).astype(dtype), rng.normal(size=(B, H)).astype(dtype))
        for _ in range(2)
    )
    weights = (final, rng.normal(size=(T, B, width)).astype(dtype))
    return params, xs, state, weights, options


@functools.cache
def oracle_gradients(variant):
    """∂Σ weights·(state, hs)/∂(params, xs, state) of the oracle on ``random_problem``."""
    params, xs, state, weights, options = random_problem(variant)

    def loss(*arguments):
        return oracle.weighted_sum(weights, oracle.lstm(*arguments, **options))

    return oracle.gradients(loss, params, xs, state)


# --- against the oracle --------------------------------------------------------------------------


def test_complex_step_of_the_oracle_is_its_central_difference():
    """1e-6: a central difference of width 1e-5 has an error of 1e-10·f''' + 1e-16/1e-5."""
    params, xs, state, weights, options = random_problem("everything")

    def loss(state):
        return oracle.weighted_sum(weights, oracle.lstm(params, xs, state, **options))

    (gradient,) = oracle.gradients(loss, state)
    for part in range(2):
        for index in np.ndindex(state[part].shape):
            plus, minus = (oracle.tree_map(np.copy, state) for _ in range(2))
            plus[part][index] += 1e-5
            minus[part][index] -= 1e-5
            difference = (loss(plus) - loss(minus)) / 2e-5
            np.testing.assert_allclose(gradient[part][index], difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "method"),
    [(variant, "scan") for variant in VARIANTS] + [("everything", "unrolled")],
)
def test_values_and_gradients_are_the_oracles(variant, method, values_and_gradients, x64):
    params, xs, state, weights, options = random_problem(variant)
    outputs, gradients = values_and_gradients(
        lambda *arguments: lstm(*arguments, method=method, **options), weights, params, xs, state
    )
    oracle.assert_close(outputs, oracle.lstm(params, xs, state, **options), 1e-10)
    oracle.assert_close(gradients, oracle_gradients(variant), 1e-10)


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_float32_is_the_oracle_to_1e_5(variant, values_and_gradients):
    params, xs, state, weights, options = random_problem(variant, np.float32)
    outputs, gradients = values_and_gradients(
        lambda *arguments: lstm(*arguments, **options), weights, params, xs, state
    )
    expected = oracle.lstm(*oracle.tree_map(np.float64, (params, xs, state)), **options)
    assert outputs[1].dtype == outputs[0].c.dtype == jnp.float32
    oracle.assert_close(outputs, expected, 1e-5)
    # The float64 gradients belong to inputs that differ by rounding: 6e-8 of their own size.
    oracle.assert_close(gradients, oracle_gradients(variant), 1e-5)


def test_the_problems_meet_their_clips():
    """Without this the clip options could do nothing and the tests above still pass."""
    params, xs, state, _, options = random_problem("everything")
    (_, c), hs = oracle.lstm(params, xs, state, **options)
    for values, bound in ((c, options["cell_clip"]), (hs, options["proj_clip"])):
        clipped = np.abs(values) == bound
        assert 0.1 < clipped.mean() < 0.9


def test_no_state_is_a_zero_state(x64):
    params, xs, state, _, _ = random_problem("plain")
    zeros = oracle.tree_map(np.zeros_like, state)
    oracle.assert_close(lstm(params, xs), oracle.lstm(params, xs, zeros), 1e-10)


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_check_grads_forward_and_reverse(variant, x64):
    params, xs, state, (final, of_hs), options = random_problem(variant)

    @jax.jit
    def loss(params, xs, state):
        return oracle.weighted_sum((final, of_hs[:3]), lstm(params, xs, state, **options))

    check_grads(loss, (params, xs[:3], state), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


def test_second_derivatives_forward_and_reverse(x64):
    """Hessian times v, two ways, against the central difference of the gradient along v."""
    params, xs, state, _, _ = random_problem("peephole")
    v = random_params(np.random.default_rng(8), ("peephole",))
    gradient = jax.grad(lambda params: jnp.sum(lstm(params, xs[:3], state)[1] ** 2))

    @jax.jit
    def products(params, v):
        forward = jax.jvp(gradient, (params,), (v,))[1]
        return forward, jax.vjp(gradient, params)[1](v)[0]

    forward, reverse = products(params, v)
    compiled = jax.jit(gradient)
    plus = compiled(jax.tree.map(lambda p, d: p + 1e-5 * d, params, v))
    minus = compiled(jax.tree.map(lambda p, d: p - 1e-5 * d, params, v))
    difference = jax.tree.map(lambda a, b: (a - b) / 2e-5, plus, minus)
    oracle.assert_close(forward, difference, 1e-6)
    oracle.assert_close(reverse, forward, 1e-12)


@pytest.mark.parametrize("leading", [(), (B,), (2, B)], ids=str)
def test_step_on_any_leading_axes_is_the_oracles_row_by_row(leading, x64):
    rng = np.random.default_rng(3)
    extras, options = VARIANTS["everything"]
    params = random_params(rng, extras)
    x_t, h, c = (rng.normal(size=(*leading, size)) for size in (D, P, H))
    new = lstm_step(params, LSTMState(h, c), x_t, **options)
    assert isinstance(new, LSTMState) and new.h.shape == h.shape and new.c.shape == c.shape
    for row in np.ndindex(leading):
        expected = oracle.lstm_step(params, x_t[row], h[row], c[row], **options)
        oracle.assert_close((new.h[row], new.c[row]), expected, 1e-12)


def test_layer_is_a_loop_over_the_step(x64):
    params, xs, state, _, options = random_problem("everything")
    final, hs = lstm(params, xs, LSTMState(*state), **options)
    for t in range(T):
        state = lstm_step(params, state, xs[t], **options)
        oracle.assert_close(hs[t], state.h, 1e-12)
    oracle.assert_close(final, state, 1e-12)


# --- other people's LSTMs ------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_numpy_list_cell_of_tensorflow_1(with_bias, x64):
    """The source's unbatched cell: i, j, f, o in one kernel, forget bias 1 added while running."""
    rng = np.random.default_rng(4)
    kernel, xs = rng.normal(size=(D + H, 4 * H)), rng.normal(size=(T, D))
    bias = rng.normal(size=4 * H) if with_bias else np.zeros(4 * H)
    i, j, f, o = np.split(np.concatenate([kernel, bias[None]]), 4, axis=1)
    ours = np.concatenate([i, f, j, o], axis=1)  # candidate third instead of second
    ours[-1, H : 2 * H] += 1.0
    params = LSTMParams(ours[:D], ours[D:-1], ours[-1])
    _, hs = lstm(params, xs[:, None])
    expected = oracle.tf1_cell_sequence(kernel, list(xs), bias=bias)
    oracle.assert_close(hs[:, 0], np.stack(expected), 1e-12)


def to_linen(params):
    """LSTMParams (or its gradient) under linen's names: a kernel for each gate, bias on h."""
    w_x, w_h, b = (np.split(np.asarray(w), 4, axis=-1) for w in params[:3])
    cell = {}
    for n, gate in enumerate("ifgo"):
        cell[f"i{gate}"] = {"kernel": w_x[n]}
        cell[f"h{gate}"] = {"kernel": w_h[n], "bias": b[n]}
    return {"params": {"cell": cell}}


@pytest.mark.parametrize("reverse", [False, True])
def test_values_and_gradients_are_linens(reverse, values_and_gradients, x64):
    params, xs, state, weights, _ = random_problem("plain")
    theirs = linen.RNN(
        linen.OptimizedLSTMCell(H, param_dtype=np.float64), time_major=True, return_carry=True
    )

    def run_linen(variables, xs, state):
        (c, h), hs = theirs.apply(
            variables, xs, initial_carry=(state.c, state.h), reverse=reverse, keep_order=True
        )
        return LSTMState(h, c), hs

    variables = to_linen(params)
    wanted_shapes = jax.eval_shape(theirs.init, jax.random.key(0), xs)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, wanted_shapes)
    ours, gradients = values_and_gradients(
        lambda *arguments: lstm(*arguments, reverse=reverse), weights, params, xs, state
    )
    outputs, (of_variables, *rest) = values_and_gradients(run_linen, weights, variables, xs, state)
    oracle.assert_close(ours, outputs, 1e-12)
    oracle.assert_close(gradients[1:], tuple(rest), 1e-12)
    jax.tree.map(
        lambda got, want: oracle.assert_close(got, want, 1e-12),
        to_linen(gradients[0]),
        of_variables,
    )


def test_values_and_gradients_are_those_of_jax_lstm_ref(values_and_gradients, x64):
    """Lengths too, but none of zero: there lstm_ref returns the full-length state."""
    params, xs, state, weights, _ = random_problem("plain")
    lengths = np.array([3, T, 1], np.int32)

    def run_ref(params, xs, state):
        w_ih, w_hh = {0: params.w_x.T}, {0: params.w_h.T}
        zero = jnp.zeros_like(params.b)  # cuDNN's second bias
        hs, h, c = lstm_ref(
            *(xs.transpose(1, 0, 2), state.h[None], state.c[None], w_ih, w_hh),
            *({0: params.b}, {0: zero}, lengths, D, H, 1, 0.0, False),
        )
        return LSTMState(h[0], c[0]), hs.transpose(1, 0, 2)

    ours = values_and_gradients(
        lambda *arguments: lstm(*arguments, lengths=lengths), weights, params, xs, state
    )
    oracle.assert_close(ours, values_and_gradients(run_ref, weights, params, xs, state), 1e-12)


# --- transformations and dtypes ------------------------------------------------------------------


def test_vmap_over_parameters_is_a_loop(x64):
    _, xs, state, weights, options = random_problem("everything")
    rng = np.random.default_rng(5)
    several = [random_params(rng, ("peephole", "w_proj")) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *several)

    def run(params):
        def loss(params):
            outputs = lstm(params, xs, state, **options)
            return oracle.weighted_sum(weights, outputs), outputs

        return jax.value_and_grad(loss, has_aux=True)(params)

    together, alone = jax.jit(jax.vmap(run))(stacked), jax.jit(run)
    for n, params in enumerate(several):
        one = jax.tree.map(lambda leaf, n=n: leaf[n], together)
        oracle.assert_close(one, alone(params), 1e-12)


@pytest.mark.parametrize(
    ("of_xs", "of_params", "of_h", "of_c"),
    [
        ("float32", "float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32", "float32"),
        ("float32", "bfloat16", "float32", "float32"),
        ("float32", "float64", "float64", "float64"),
        ("float64", "float64", "float64", "float64"),
    ],
)
def test_dtypes_of_outputs_and_gradients(of_xs, of_params, of_h, of_c, x64):
    rng = np.random.default_rng(6)
    params = random_params(rng, ("peephole", "w_proj"), jnp.dtype(of_params))
    xs = rng.normal(size=(T, B, D)).astype(jnp.dtype(of_xs))

    def dtypes(fun, *arguments):
        return jax.tree.map(lambda leaf: leaf.dtype.name, jax.eval_shape(fun, *arguments))

    for method in ("scan", "unrolled"):
        state, hs = dtypes(functools.partial(lstm, method=method, lengths=[3, T, 0]), params, xs)
        assert (state.h, hs, state.c) == (of_h, of_h, of_c)
    zeros = LSTMState(jnp.zeros((B, P), of_h), jnp.zeros((B, H), of_c))
    assert dtypes(lstm_step, params, zeros, xs[0]) == LSTMState(of_h, of_c)
    gradient = jax.grad(lambda params, xs: lstm(params, xs)[0].c.sum(), (0, 1))
    assert dtypes(gradient, params, xs) == ((of_params,) * 5, of_xs)


def bfloat16_problem(sizes, steps, batch, scale):
    """Random numbers that bfloat16 holds exactly, as bfloat16 and as float64."""
    rng = np.random.default_rng(7)
    params = oracle.tree_map(lambda w: w * scale, random_params(rng, sizes=sizes))
    xs = rng.normal(size=(steps, batch, sizes[0]))
    short = oracle.tree_map(lambda a: a.astype(jnp.bfloat16), (params, xs))
    return short, oracle.tree_map(lambda a: a.astype(np.float64), short)


def test_bfloat16_products_are_summed_in_float32():
    """256 products a gate. Rounded to bfloat16 they would be wrong in the third digit.

    The step runs operation by operation: inside one program XLA may keep more precision than the
    operations ask for, and hide the rounding.
    """
    (params, xs), exact = bfloat16_problem((256, 6, 6), 1, 3, 0.1)
    (h, c), _ = oracle.lstm(*exact, (np.zeros((3, 6)), np.zeros((3, 6))))
    zeros = LSTMState(jnp.zeros((3, 6), jnp.bfloat16), jnp.zeros((3, 6)))
    for state in (lstm_step(params, zeros, xs[0]), lstm(params, xs)[0]):
        oracle.assert_close(state.c, c, 1e-5)
        oracle.assert_close(state.h, h, 2.0**-8)  # h itself is stored in bfloat16


def test_bfloat16_drift_over_784_steps():
    """Memory cells that add up small steps to |c| ≈ 36 while f ≈ 0.9997.

    Measured: |Δc| = 1.8e-3 and |Δh| = 2.1e-3 (half a last place of bfloat16 is 2e-3). Were c kept
    in bfloat16, additions below half its spacing (1/4 at 36) would be lost: above 1, shown below.
    """
    sizes, batch, steps = (D, H, H), 2, 784
    (params, xs), _ = bfloat16_problem(sizes, steps, batch, 0.15)
    of_gates = np.repeat([-3.0, 8.0, 0.5, 0.0], H) + 0.3 * np.arange(4 * H) / H
    params = params._replace(b=of_gates.astype(jnp.bfloat16))
    exact_params, exact_xs = oracle.tree_map(lambda a: a.astype(np.float64), (params, xs))
    (_, c), hs = oracle.lstm(exact_params, exact_xs, (np.zeros((batch, H)),) * 2)
    state, got = jax.jit(lstm)(params, xs)
    error = np.abs(state.c - c).max()
    assert np.abs(c).max() > 10 and error < 5e-3
    assert np.abs(np.asarray(got, np.float64) - hs).max() < 2.0**-8

    short_c = np.zeros((batch, H))
    for t in range(steps):
        h_tm1 = hs[t - 1] if t else np.zeros((batch, H))
        for row in range(batch):
            _, c_t = oracle.lstm_step(exact_params, exact_xs[t, row], h_tm1[row], short_c[row])
            short_c[row] = c_t.astype(jnp.bfloat16)
    assert np.abs(short_c - c).max() > 1.0
