"""The simple RNN's and the GRU's derivative by hand, against JAX's own and the NumPy oracle's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec
from problems import QUICK, B, D, H, T, holes_and_resets
from test_fused import loops_and_products

from lstmjax import GRUParams, GRUState, RNNParams, RNNState, gru, recurrent_noise, rnn, timings
from lstmjax.pieces import steps_of_a_piece

# name: (the layer, its options, the oracle's, whether there is a bias b of the RNN, b_n of the GRU)
CELLS = {
    "tanh": (rnn, {"activation": "tanh"}, oracle.rnn, True),
    "relu": (rnn, {"activation": "relu"}, oracle.rnn, True),
    "linear": (rnn, {"activation": "linear"}, oracle.rnn, False),
    "after": (gru, {"reset_after": True}, oracle.gru, True),
    "after, no b_n": (gru, {"reset_after": True}, oracle.gru, False),
    "before": (gru, {"reset_after": False}, oracle.gru, False),
}
# what it is run with: (mask and resets, reverse, how else)
KINDS = {
    "plain": (False, False, {}),
    "reverse": (False, True, {"unroll": 3}),
    "masks": (True, False, {"unroll": 2}),
    "masks, reverse": (True, True, {}),
}
differentiated = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))


def problem(cell, dtype=np.float64, steps=T):
    """``(params, xs, state, reset_to)`` and the weights of a loss on all outputs."""
    layer, _, _, bias = CELLS[cell]
    rng = np.random.default_rng(80)
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    if layer is gru:
        weights = normal(D, 3 * H), normal(H, 3 * H), normal(3 * H)
        params, state_kind = GRUParams(*weights, normal(H) if bias else None), GRUState
    else:  # small enough for what is not bounded
        small = normal(H, H) * np.array(0.3, dtype)
        params, state_kind = RNNParams(normal(D, H), small, normal(H) if bias else None), RNNState
    state, reset_to, final = (state_kind(normal(B, H)) for _ in range(3))
    return (params, normal(steps, B, D), state, reset_to), (final, normal(steps, B, H))


def over_time(kind, steps=T):
    """The layer's options of that kind."""
    masked, reverse, how = KINDS[kind]
    options = {"reverse": reverse, **how}
    if masked:
        options["mask"], options["resets"] = (
            np.tile(a, (-(-steps // T), 1))[:steps] for a in holes_and_resets()
        )
        options["lengths"] = np.array([steps, steps - 1, steps, steps])
    return options


def run(cell, kind, method, of=differentiated, dtype=np.float64, steps=T, **how):
    """``of(loss)(arguments)`` as one program; what is masked in xs is NaN."""
    arguments, weights = problem(cell, dtype, steps)
    options = over_time(kind, steps)
    if "mask" in options:
        where = options["mask"][..., None]
        arguments = (arguments[0], np.where(where, arguments[1], dtype(np.nan)), *arguments[2:])
    layer, own, *_ = CELLS[cell]

    def loss(params, xs, state, reset_to):
        to = reset_to if "resets" in options else None
        outputs = layer(params, xs, state, reset_to=to, method=method, **own, **options, **how)
        return oracle.weighted_sum(weights, outputs)

    return jax.jit(of(loss), compiler_options=QUICK)(*arguments)


@pytest.mark.parametrize("kind", ["plain", "masks, reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_are_the_scans(cell, kind, x64):
    fused, scan = (run(cell, kind, method) for method in ("fused", "scan"))
    oracle.assert_close(fused, scan, 1e-12)
    assert all(np.any(g) for g in jax.tree.leaves(scan[1][:3]))


@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_are_the_oracles(cell, x64):
    layer, own, slow, _ = CELLS[cell]
    (params, xs, state, _), weights = problem(cell, steps=4)
    rng = np.random.default_rng(81)
    options = {"mask": rng.random((4, B)) < 0.7, "resets": rng.random((4, B)) < 0.4}

    def loss(layer, *arguments):
        return oracle.weighted_sum(weights, layer(*arguments, reverse=True, **own, **options))

    fused = jax.value_and_grad(functools.partial(loss, layer), (0, 1, 2))
    got = jax.jit(fused, compiler_options=QUICK)(params, xs, state)
    slow = functools.partial(loss, slow)
    want = slow(params, xs, state), oracle.gradients(slow, params, xs, state)
    oracle.assert_close(got, want, 1e-12)


@pytest.mark.parametrize("cell", ["tanh", "relu", "after", "before"])
def test_float32_is_the_scan_to_1e_6(cell):
    fused, scan = (run(cell, "masks", method, dtype=np.float32) for method in ("fused", "scan"))
    for got, want in zip(jax.tree.leaves(fused), jax.tree.leaves(scan), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


# 40 steps are cut into equal pieces, 59 into fourteen and a rest of another length.
@pytest.mark.parametrize(("kind", "steps"), [("reverse", 59), ("masks", 40)])
@pytest.mark.parametrize("cell", ["tanh", "after", "before"])
def test_pieces_change_nothing(cell, kind, steps, x64):
    assert (steps % steps_of_a_piece(steps, "gates") == 0) == (steps == 40)
    fused, scan = (run(cell, kind, method, steps=steps) for method in ("fused", "scan"))
    oracle.assert_close(fused, scan, 1e-12)


@pytest.mark.parametrize(("steps", "batch"), [(0, B), (40, 0)])
@pytest.mark.parametrize("cell", ["tanh", "after", "before"])
def test_nothing_to_run_over_has_a_gradient(cell, steps, batch, x64):
    layer, own, *_ = CELLS[cell]
    (params, _, state, _), _ = problem(cell)
    arguments = params, jnp.zeros((steps, batch, D)), type(state)(state.h[:batch])

    def loss(method, *arguments):
        (h,), hs = layer(*arguments, method=method, **own)
        return 2 * jnp.sum(h) + jnp.sum(hs)

    got, want = (
        jax.jit(jax.grad(functools.partial(loss, method), (0, 1, 2)), compiler_options=QUICK)(
            *arguments
        )
        for method in ("fused", "scan")
    )
    oracle.assert_close(got, want, 0.0)


@pytest.mark.parametrize(
    ("cell", "kind", "steps"),
    [
        ("tanh", "plain", T),
        ("relu", "masks", T),
        ("after", "plain", 40),
        ("before", "plain", T),
    ],
)
def test_forward_mode_and_second_derivatives_are_the_scans(cell, kind, steps, x64):
    rng = np.random.default_rng(82)
    along = jax.tree.map(lambda a: rng.normal(size=a.shape), problem(cell, steps=steps)[0])

    def derivatives(loss):
        def found(*arguments):
            def slope(params, state):  # not along xs, which may hold a NaN
                both = lambda params, state: loss(params, arguments[1], state, arguments[3])  # noqa: E731
                return jax.jvp(both, (params, state), (along[0], along[2]))[1]

            own = arguments[0], arguments[2]
            forward = jax.jvp(loss, arguments, along)[1]
            return forward, jax.grad(slope, (0, 1))(*own), slope_twice(loss, arguments, along)

        return found

    def slope_twice(loss, arguments, along):  # reverse over reverse
        def slope(params):
            grads = jax.grad(loss, (0, 2))(params, *arguments[1:])
            pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(along[::2]), strict=True)
            return sum(jnp.vdot(g, v) for g, v in pairs)

        return jax.grad(slope)(arguments[0])

    fused, scan = (
        run(cell, kind, method, derivatives, steps=steps) for method in ("fused", "scan")
    )
    oracle.assert_close(fused, scan, 1e-12)
    assert np.any(scan[1][0].w_h) and np.any(scan[2].w_h)


@pytest.mark.parametrize("cell", ["tanh", "after", "before"])
def test_vmap_over_weights_is_a_loop(cell, x64):
    layer, own, *_ = CELLS[cell]
    (params, xs, *_), _ = problem(cell)
    many = jax.tree.map(lambda w: np.stack([w, 0.5 * w, -w]), params)

    def of_weights(params):
        return jax.grad(lambda params: jnp.sum(layer(params, xs, **own)[1] ** 2))(params)

    at_once = jax.jit(jax.vmap(of_weights), compiler_options=QUICK)(many)
    one = jax.jit(of_weights, compiler_options=QUICK)
    one_by_one = [one(jax.tree.map(lambda w, n=n: w[n], many)) for n in range(3)]
    oracle.assert_close(at_once, jax.tree.map(lambda *w: np.stack(w), *one_by_one), 1e-12)


@pytest.mark.parametrize(("cell", "steps"), [("tanh", 40), ("after", T), ("before", 40)])
def test_shard_map_over_the_batch_changes_nothing(cell, steps, x64):
    layer, own, *_ = CELLS[cell]
    (params, xs, _, reset_to), _ = problem(cell, steps=steps)
    resets = np.tile(holes_and_resets()[1], (-(-steps // T), 1))[:steps]

    def loss(params, xs, reset_to, resets):  # the state is zeros, the same on all devices
        return jnp.sum(layer(params, xs, resets=resets, reset_to=reset_to, **own)[1] ** 2)

    def over_devices(params, *arguments):
        return jax.lax.psum(loss(params, *arguments), "batch")

    of_time, of_all = PartitionSpec(None, "batch"), PartitionSpec()
    specs = of_all, of_time, PartitionSpec("batch"), of_time
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    apart = jax.shard_map(over_devices, mesh=mesh, in_specs=specs, out_specs=of_all)
    got, want = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2)), compiler_options=QUICK)(
            params, xs, reset_to, resets
        )
        for f in (apart, loss)
    )
    oracle.assert_close(got, want, 1e-12)


def zoned(cell, steps=T, dtype=np.float64):
    """Masks of zoneout for a problem."""
    (params, xs, *_), _ = problem(cell, dtype, steps)
    return recurrent_noise(jax.random.key(83), params, xs, zoneout_h=0.4)


@pytest.mark.parametrize(("kind", "steps"), [("masks, reverse", T), ("masks", 40), ("reverse", 37)])
@pytest.mark.parametrize("cell", CELLS)
def test_zoneout_is_the_scans(cell, kind, steps, x64):
    noise = zoned(cell, steps)
    fused, scan = (
        run(cell, kind, method, steps=steps, noise=noise) for method in ("fused", "scan")
    )
    oracle.assert_close(fused, scan, 1e-12)
    without = run(cell, kind, "fused", steps=steps)
    assert abs(fused[0] - without[0]) > 1e-3


@pytest.mark.parametrize("cell", ["tanh", "relu", "after", "before"])
@pytest.mark.parametrize("truncation", [(3, 3), (2, 6)])
def test_truncated_zoneout_is_the_scans(cell, truncation, x64):
    how = {"steps": 37, "noise": zoned(cell, 37), "truncation": truncation}
    fused, scan = (run(cell, "masks", method, **how) for method in ("fused", "scan"))
    oracle.assert_close(fused, scan, 1e-12)


@pytest.mark.parametrize("cell", ["tanh", "relu", "after", "before"])
def test_zoneout_in_fewer_digits(cell):
    """What was rounded is not what the derivative reads."""
    noise = zoned(cell, dtype=np.float32)
    for dtype, tolerance in ((np.float32, 1e-6), (jnp.bfloat16, 0.05)):
        fused, scan = (
            run(cell, "masks", method, dtype=dtype, noise=noise) for method in ("fused", "scan")
        )
        for got, want in zip(jax.tree.leaves(fused), jax.tree.leaves(scan), strict=True):
            got, want = np.float64(got), np.float64(want)
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("cell", ["tanh", "after", "before"])
def test_zoneout_forwards_and_twice(cell, x64):
    noise = zoned(cell)

    def twice(loss):
        def of_a_line(t, arguments):
            moved = jax.tree.map(lambda a: a + t * jnp.cos(a), arguments)
            return loss(*moved)

        def taken(*arguments):
            arguments = (arguments[0], jnp.nan_to_num(arguments[1]), *arguments[2:])
            slope = jax.jacfwd(of_a_line)
            return slope(0.0, arguments), jax.jacrev(slope)(0.0, arguments)

        return taken

    fused, scan = (
        run(cell, "masks", method, of=twice, noise=noise) for method in ("fused", "scan")
    )
    oracle.assert_close(fused, scan, 1e-11)
    assert abs(scan[1]) > 1e-3


@pytest.mark.parametrize("cell", ["tanh", "before"])
def test_noise_goes_by_the_scan(cell, x64):
    layer, own, *_ = CELLS[cell]
    (params, xs, *_), _ = problem(cell)
    noise = recurrent_noise(jax.random.key(0), params, xs, recurrent_dropout=0.5)
    fused, scan = (
        layer(params, xs, noise=noise, method=method, **own)[1] for method in ("fused", "scan")
    )
    np.testing.assert_array_equal(fused, scan)
    assert np.abs(fused - layer(params, xs, **own)[1]).max() > 0.1


@pytest.mark.parametrize("cell", ["tanh", "relu", "after", "before"])
def test_bfloat16_is_the_scans_to_its_precision(cell):
    """tanh is near ±1 here, where the output rounded to bfloat16 would say that it is flat."""
    layer, own, *_ = CELLS[cell]
    (params, xs, *_), _ = problem(cell, np.float32)
    params = params._replace(b=params.b + np.float32(3.5)) if cell == "tanh" else params
    params, xs = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (params, xs[:3]))

    def loss(params, xs, method):
        hs = layer(params, xs, method=method, **own)[1]
        return jnp.sum(hs.astype(jnp.float32))

    found = {
        method: jax.jit(
            jax.value_and_grad(functools.partial(loss, method=method), (0, 1)),
            compiler_options=QUICK,
        )(params, xs)
        for method in ("fused", "scan")
    }
    pairs = zip(*map(jax.tree.leaves, found.values()), strict=True)
    for got, want in pairs:
        assert got.dtype == want.dtype
        got, want = np.float32(got), np.float32(want)
        np.testing.assert_allclose(got, want, rtol=2**-6, atol=2**-6 * np.abs(want).max())


# --- the program ---------------------------------------------------------------------------------


# the cell's (products in the backward loop, products after it)
PRODUCTS = {"tanh": (1, 3), "linear": (1, 3), "after": (1, 3), "before": (2, 4)}


def backward(cell, method, steps=T, argnums=(0, 1), **how):
    """The scans, and the products outside of them, of a gradient."""
    layer, own, *_ = CELLS[cell]
    (params, xs, *_), _ = problem(cell, np.float32, steps)

    def loss(params, xs):
        return jnp.sum(layer(params, xs, method=method, **own, **how)[1] ** 2)

    return loops_and_products(jax.make_jaxpr(jax.grad(loss, argnums))(params, xs).jaxpr)


def sums_weights(body):
    """Whether what a loop hands out is anything but [B, H]."""
    return {v.aval.shape for v in body.outvars} - {(B, H)} != set()


@pytest.mark.parametrize("zoneout", [False, True])
@pytest.mark.parametrize("cell", PRODUCTS)
def test_the_backward_loop_holds_no_gradient_of_weights(cell, zoneout):
    """And the scan's does: a test that could not tell them apart would say nothing."""
    for method in ("fused", "scan"):
        noise = zoned(cell, dtype=np.float32) if zoneout else None
        scans, outside = backward(cell, method, noise=noise)
        assert len(scans) == 2
        body = scans[1].params["jaxpr"].jaxpr
        found = loops_and_products(body)[1], outside
        assert sums_weights(body) == (method == "scan")
        assert (found == PRODUCTS[cell]) == (method == "fused"), found


@pytest.mark.parametrize("cell", PRODUCTS)
def test_what_is_asked_of_the_loop_reaches_it(cell):
    """Steps written out in one iteration, and "fused" where nothing is said."""
    layer, own, *_ = CELLS[cell]
    (params, xs, *_), _ = problem(cell, np.float32)

    def program(**how):
        total = lambda params: jnp.sum(layer(params, xs, **how, **own)[1] ** 2)  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(total))(params))

    assert program() == program(method="fused") != program(method="scan")
    assert "unroll=3" in program(unroll=3) and "unroll=3" not in program()


@pytest.mark.parametrize("cell", PRODUCTS)
def test_pieces_sum_their_gradients_outside_the_loop_over_steps(cell):
    scans, outside = backward(cell, "fused", steps=40)
    assert (len(scans), outside) == (2, 0)  # forward, over steps; backward, over pieces
    inner, products = loops_and_products(scans[1].params["jaxpr"].jaxpr)
    (body,) = [loop.params["jaxpr"].jaxpr for loop in inner]
    assert (loops_and_products(body)[1], products) == PRODUCTS[cell]
    assert not sums_weights(body)


def test_what_is_not_asked_for_is_not_computed():
    # dW_x and dW_h; dx
    found = {c: [backward(c, "fused", argnums=n)[1] for n in (0, 1)] for c in ("tanh", "after")}
    assert found == {"tanh": [2, 1], "after": [2, 1]}


@pytest.mark.parametrize(("cell", "most"), [("tanh", 2.5), ("after", 7)])
def test_memory_between_the_loops(cell, most):
    """Arrays [T, B, H]: what is kept (one; five), the gradient of hs, and pieces."""
    layer, own, *_ = CELLS[cell]
    steps, batch, hidden = 400, 8, 32
    rng = np.random.default_rng(83)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    g, kind = (3, GRUParams) if layer is gru else (1, RNNParams)
    params = kind(normal(2, g * hidden), normal(hidden, g * hidden), normal(g * hidden))
    xs = normal(steps, batch, 2)

    def arrays(method):
        def loss(params, xs):
            return jnp.mean(layer(params, xs, method=method, **own)[1] ** 2)

        memory = timings.compiled(jax.grad(loss, (0, 1)), params, xs).temporary_bytes
        return memory / (steps * batch * hidden * 4)

    fused, scan = arrays("fused"), arrays("scan")
    assert fused < most < 2 / 3 * scan, (fused, scan)
