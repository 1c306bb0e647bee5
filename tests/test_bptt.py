"""Truncated backpropagation through time: one layer, against its definition; its laws."""

import functools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from bptt_oracle import CELLS, B, D, H, at, cell, defined, gradients, lo, numpy_gradients, plain
from hypothesis import given, settings
from problems import QUICK, holes_and_resets
from test_fused import loops_and_products

from lstmjax import Bidirectional, bidirectional, depths, gru, lstm, rnn, stack, window_start
from lstmjax.variants import cifg

WINDOWS = [(13, 1, 5), (13, 5, 5), (12, 3, 6), (13, 3, 6), (13, 2, 8), (14, 4, 12), (9, 1, 1)]
WINDOWS += [(9, 9, 9), (7, 1, 20), (20, 5, 10)]


@pytest.mark.parametrize(
    ("method", "window"),
    [*(("fused", w) for w in WINDOWS), *(("scan", w) for w in WINDOWS[:4])],
    ids=str,
)
def test_every_style_is_each_error_cut_on_its_own(method, window, x64):
    steps, k1, k2 = window
    arguments, weights = plain(steps)
    layer = functools.partial(lstm, truncation=(k1, k2), method=method)
    got = gradients(layer, arguments, weights)
    oracle.assert_close(got, numpy_gradients(*arguments, weights, k1, k2), 1e-12)


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_any_style_is(steps, k1, times, batch):
    with jax.enable_x64(True):
        arguments, weights = plain(steps, seed=steps, batch=batch, hidden=4)
        got = gradients(functools.partial(lstm, truncation=(k1, k1 * times)), arguments, weights)
        oracle.assert_close(got, numpy_gradients(*arguments, weights, k1, k1 * times), 1e-12)


@pytest.mark.parametrize("residuals", ["gates", "recompute", "sqrt"])
def test_pieces_of_a_long_sequence_hand_on_their_slots(residuals, x64):
    arguments, weights = plain(37)  # pieces of 2 or 6 steps, and one step over
    for k1, k2 in ((2, 6), (4, 4), (5, 15)):
        layer = functools.partial(lstm, truncation=(k1, k2), residuals=residuals)
        got = gradients(layer, arguments, weights)
        oracle.assert_close(got, numpy_gradients(*arguments, weights, k1, k2), 1e-12)


@pytest.mark.parametrize(
    ("name", "window", "reverse"),
    [*((name, (2, 4), n % 2 == 1) for n, name in enumerate(CELLS))]
    + [("lstm", (1, 3), True), ("lstm", (3, 3), False), ("gru before", (3, 3), True)],
)
def test_every_cell_with_masks_and_resets_is_the_definition(name, window, reverse, x64):
    """Holes, padding on both sides, an empty row, NaN wherever a step is not valid."""
    layer, params, (state, reset_to, final), of = cell(name)
    mask, resets = holes_and_resets()
    xs = of(len(mask), B, D)
    weights = (final, of(len(mask), *final.h.shape))

    def step(arguments, state, place):
        params, xs, reset_to = arguments
        x, valid, reset = at(place, (xs, mask, resets))
        return layer(params, x, state, mask=valid, resets=reset, reset_to=reset_to, method="scan")

    of_rest, of_state = defined(step, window, (params, xs, reset_to), state, weights, reverse)
    holes = np.where(mask[..., None], xs, np.nan)
    for method in ("fused", "scan"):

        def run(params, xs, reset_to, state, method=method):
            options = {"mask": mask, "resets": resets, "reset_to": reset_to, "reverse": reverse}
            return layer(params, xs, state, truncation=window, method=method, **options)

        got = gradients(run, (params, holes, reset_to, state), weights)
        oracle.assert_close(got, (*of_rest, of_state), 1e-12)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(got))


def test_a_window_is_one_of_steps_and_not_of_valid_steps(x64):
    """A final state that is held from step 3 on still has the last step's error."""
    (params, xs, state), weights = plain(8, batch=2)
    lengths = np.array([8, 4])
    layer = functools.partial(lstm, lengths=lengths, truncation=(1, 3))
    _, of_xs, _ = gradients(layer, (params, xs, state), (weights[0], 0 * weights[1]))
    reached = np.any(np.asarray(of_xs) != 0, axis=2)
    assert np.array_equal(reached.T, [[0, 0, 0, 0, 0, 1, 1, 1], [0] * 8])


# ---- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(1, 4), (4, 4), (2, 6), (3, 9)], ids=str)
def test_an_error_is_zero_before_its_window_and_nowhere_in_it(window):
    (params, xs, state), (_, of_hs) = plain(11, batch=1)
    params, xs, state = jax.tree.map(lambda a: a.astype(np.float32), (params, xs, state))
    second = params._replace(w_x=params.w_h)

    def errors(xs, **how):
        hs = stack(lstm, [params, second], xs, [state, state], truncation=window)[1]
        return jnp.sum(of_hs.astype(np.float32) * hs, (1, 2))

    of_x = jax.jit(jax.jacrev(errors), compiler_options=QUICK)(xs)  # [t, τ, 1, D]
    reached = np.all(np.asarray(of_x) != 0, axis=(2, 3))
    touched = np.any(np.asarray(of_x) != 0, axis=(2, 3))
    tau, start = np.arange(11), window_start(11, *window)[:, None]
    inside = (start <= tau) & (tau <= tau[:, None])
    assert np.array_equal(reached, inside) and np.array_equal(touched, inside)
    assert np.array_equal(inside.sum(1), depths(11, *window))


def test_the_numbers_of_the_styles():
    of = {k1: depths(49, k1, 7) for k1 in (1, 7)} | {49: depths(49, 49, 49)}
    assert {k1: (int((d >= 7).sum()), int(d.sum())) for k1, d in of.items()} == {
        1: (43, 322),
        7: (7, 196),
        49: (43, 1225),
    }
    assert list(window_start(9, 2, 4)) == [0, 0, 0, 0, 2, 2, 4, 4, 6]
    for steps, k1, k2 in WINDOWS:
        assert list(window_start(steps, k1, k2)) == [lo(t, k1, k2) for t in range(steps)]


@pytest.mark.parametrize("method", ["fused", "scan"])
@pytest.mark.parametrize("window", [(9, 9), (1, 9), (4, 12), (20, 20), None])
def test_a_full_window_is_the_ordinary_program(method, window):
    (params, xs, state), _ = plain(9)

    def program(**how):
        run = functools.partial(lstm, method=method, **how)
        return str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(run(p, xs, state)[1])))(params))

    assert program(truncation=window) == program()
    assert program(truncation=(4, 8)) != program()


@pytest.mark.parametrize("window", [(3, 3), (2, 6)], ids=str)
def test_the_backward_loop_holds_one_product_and_no_gradient_of_weights(window):
    (params, xs, _), _ = plain(13)
    params, xs = jax.tree.map(np.float32, (params, xs))

    def loss(params, xs):
        return jnp.sum(lstm(params, xs, truncation=window)[1] ** 2)

    scans, outside = loops_and_products(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, xs).jaxpr)
    body = scans[1].params["jaxpr"].jaxpr
    assert (len(scans), outside, loops_and_products(body)[1]) == (2, 3, 1)
    shapes = [v.aval.shape for v in body.outvars]
    slots = window[1] // window[0]
    assert params.w_h.shape not in shapes
    state = (B, H) if slots == 1 else (slots, B, H)
    assert shapes == [state, state, (B, 4 * H)]  # the adjoints, and dz summed over slots


def test_forward_mode_vmap_and_second_derivatives(x64):
    arguments, weights = plain(9)
    layer = functools.partial(lstm, truncation=(2, 4))
    along, _ = plain(9, seed=84)

    for method in ("fused", "scan"):

        def loss(*arguments, method=method):
            return oracle.weighted_sum(weights, layer(*arguments, method=method))

        def slope(*arguments, loss=loss):
            grads = jax.grad(loss, (0, 1, 2))(*arguments)
            pairs = jax.tree.leaves(grads), jax.tree.leaves(along)
            return sum(jnp.vdot(*pair) for pair in zip(*pairs, strict=True))

        forward = jax.jvp(loss, arguments, along)[1]
        np.testing.assert_allclose(slope(*arguments), forward, rtol=1e-12)
        again = jax.jit(jax.grad(slope, (0, 1, 2)), compiler_options=QUICK)(*arguments)
        assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(again))

        def of_weights(params, method=method):
            def loss(params):
                outputs = layer(params, *arguments[1:], method=method)
                return oracle.weighted_sum(weights, outputs)

            return jax.grad(loss)(params)

        many = jax.tree.map(lambda w: np.stack([w, 0.5 * w]), arguments[0])
        at_once = jax.jit(jax.vmap(of_weights), compiler_options=QUICK)(many)
        for n in range(2):
            params = jax.tree.map(lambda w, n=n: w[n], many)
            want = numpy_gradients(params, *arguments[1:], weights, 2, 4)[0]
            oracle.assert_close(jax.tree.map(lambda w, n=n: w[n], at_once), want, 1e-12)


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 4e-2)])
def test_smaller_dtypes(dtype, near):
    arguments, weights = plain(13)
    small = jax.tree.map(lambda a: jnp.asarray(0.5 * a, dtype), arguments)
    back = jax.tree.map(lambda a: np.asarray(a, np.float64), small)
    want = numpy_gradients(*back, weights, 2, 6)
    weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), weights)

    def run(*arguments):
        return jax.tree.map(lambda a: a.astype(jnp.float32), layer(*arguments))

    for method in ("fused", "scan"):
        layer = functools.partial(lstm, truncation=(2, 6), method=method)
        got = gradients(run, small, weights)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == jnp.dtype(dtype)
            np.testing.assert_allclose(np.float64(a), b, rtol=near, atol=near * np.abs(b).max())


# ---- what is wrong is named ---------------------------------------------------------------------

EXPECTED = "expected None or (k1, k2), whole numbers >= 1 and k2 a multiple of k1"


@pytest.mark.parametrize("wrong", [5, (2,), (3, 4), (0, 4), (2, 0), (2.0, 4), (True, 2), "ab"])
@pytest.mark.parametrize("layer", [lstm, cifg, gru, rnn, functools.partial(stack, rnn)])
def test_a_truncation_is_two_numbers(layer, wrong):
    name = getattr(layer, "__name__", "stack")
    cells = {"gru": "gru after", "stack": "rnn tanh", "rnn": "rnn tanh"}
    _, params, _, of = cell(cells.get(name, name))
    params = [params] if name == "stack" else params
    with pytest.raises(ValueError, match=f"^{re.escape(f'truncation: got {wrong!r}, {EXPECTED}')}"):
        layer(params, np.float32(of(5, B, D)), truncation=wrong)


def test_other_wrong_uses():
    (params, xs, _), _ = plain(5)
    params, xs = jax.tree.map(np.float32, (params, xs))
    for method in ("onednn", "cudnn"):
        message = f"^truncation: got \\(2, 4\\) with method '{method}', expected None"
        with pytest.raises(ValueError, match=message):
            lstm(params, xs, truncation=(2, 4), method=method)
    both = Bidirectional(params, params)
    with pytest.raises(ValueError, match="^truncation: got a pair in a stack of bidirectional"):
        stack(functools.partial(bidirectional, lstm), [both], xs, truncation=(2, 4))
    with pytest.raises(ValueError, match="^steps: got 0, expected a whole number >= 1"):
        window_start(0, 1, 1)
    with pytest.raises(ValueError, match=f"^{re.escape(f'truncation: got (3, 4), {EXPECTED}')}"):
        depths(9, 3, 4)
    with pytest.raises(ValueError, match=r"^xs: got shape \[5, 4\], expected \[T, B, D\]"):
        lstm(params, xs[:, :, 0], truncation=(1, 2))
