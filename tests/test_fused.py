"""The derivative that is written by hand, against the one that JAX finds by itself."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import QUICK, B, D, H, P, T, holes_and_resets

from lstmjax import (
    LSTMParams,
    LSTMState,
    fused_parts,
    init_lstm,
    lstm,
    recurrent_noise,
    timings,
)
from lstmjax.dropout import Noise
from lstmjax.fused import RESIDUALS
from lstmjax.pieces import steps_of_a_piece
from lstmjax.variants import cifg

# what the layer has: (peepholes, projection, clips, masks and resets, reverse)
KINDS = {
    "plain": (0, 0, 0, 0, 0),
    "plain, reverse": (0, 0, 0, 0, 1),
    "peephole, clip": (1, 0, 1, 0, 0),
    "projection": (0, 1, 0, 1, 0),
    "peephole, resets, reverse": (1, 0, 0, 1, 1),
    "everything": (1, 1, 1, 1, 0),
    "everything, reverse": (1, 1, 1, 1, 1),
}


def problem(kind, dtype=np.float64, steps=T):
    """``(arguments, weights of a loss, layer of the arguments and a method)``."""
    peephole, projection, clips, masked, reverse = KINDS[kind]
    rng = np.random.default_rng(70)
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    p = P if projection else H
    weights = normal(D, 4 * H), normal(p, 4 * H), normal(4 * H)
    params = LSTMParams(
        *weights, normal(3, H) if peephole else None, normal(H, P) if projection else None
    )
    states = [LSTMState(normal(B, p), normal(B, H)) for _ in range(3)]
    xs, options = normal(steps, B, D), {"reverse": bool(reverse)}
    if clips:
        options |= {"cell_clip": 0.8, "proj_clip": 0.6 if projection else None}
    if masked:
        times = -(-steps // T)
        options["mask"], options["resets"] = (
            np.tile(a, (times, 1))[:steps] for a in holes_and_resets()
        )
        xs = np.where(options["mask"][..., None], xs, np.array(np.nan, dtype))

    def layer(params, xs, state, reset_to, **how):
        to = reset_to if masked else None
        return lstm(params, xs, state, reset_to=to, **how, **options)

    return (params, xs, *states[:2]), (states[2], normal(steps, B, p)), layer


def run(kind, method, of, dtype=np.float64, steps=T, **how):
    """``of(loss)(arguments)`` as one program."""
    arguments, weights, layer = problem(kind, dtype, steps)

    def loss(*arguments):
        return oracle.weighted_sum(weights, layer(*arguments, method=method, **how))

    return jax.jit(of(loss), compiler_options=QUICK)(*arguments)


gradients = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_scans(kind, x64):
    fused, scan = (run(kind, method, gradients) for method in ("fused", "scan"))
    oracle.assert_close(fused, scan, 1e-12)
    assert all(np.any(g) for g in jax.tree.leaves(scan[1][:3]))


@pytest.fixture
def apart(monkeypatch):
    """Weights that are not joined into one matrix, as those of large layers are not."""
    jax.clear_caches()
    monkeypatch.setattr(fused_parts, "JOINED", 0)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("residuals", RESIDUALS)
@pytest.mark.parametrize("kind", ["plain", "everything, reverse"])
def test_large_weights_are_read_one_by_one(kind, residuals, x64, apart):
    scan = run(kind, "scan", gradients)
    oracle.assert_close(run(kind, "fused", gradients, residuals=residuals), scan, 1e-12)


def test_large_coupled_weights_are_read_one_by_one(x64, apart):
    rng = np.random.default_rng(5)
    params = LSTMParams(rng.normal(size=(D, 3 * H)), rng.normal(size=(H, 3 * H)), np.zeros(3 * H))
    xs = rng.normal(size=(T, B, D))
    found = [cifg(params, xs, method=method)[1] for method in ("fused", "scan")]
    oracle.assert_close(*found, 1e-12)


def test_a_layer_of_256_units_is_the_oracles(x64):
    """The smallest usual size whose weights are not joined."""
    rng = np.random.default_rng(6)
    d, h = 3, 256
    params = LSTMParams(*(0.1 * rng.normal(size=s) for s in ((d, 4 * h), (h, 4 * h), (4 * h,))))
    assert params.w_x.size + params.w_h.size > fused_parts.JOINED
    xs = rng.normal(size=(3, 2, d))
    found = jax.jit(lstm, compiler_options=QUICK)(params, xs)
    zeros = LSTMState(np.zeros((2, h)), np.zeros((2, h)))
    (h_n, c_n), hs = oracle.lstm(params, xs, zeros)
    oracle.assert_close(found, (LSTMState(h_n, c_n), hs), 1e-10)


def test_what_is_asked_of_the_loop_reaches_it():
    """Steps written out in one iteration, and "fused" where nothing is said."""
    arguments, weights, layer = problem("plain")
    program = str(jax.make_jaxpr(functools.partial(layer, unroll=3))(*arguments))
    assert "unroll=3" in program
    of = lambda **how: jax.make_jaxpr(  # noqa: E731
        jax.grad(lambda *a: oracle.weighted_sum(weights, layer(*a, **how)))
    )(*arguments)
    default, fused, scan = (str(of(**how)) for how in ({}, {"method": "fused"}, {"method": "scan"}))
    assert default == fused != scan


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_float32_is_the_scan_to_1e_6(kind):
    fused, scan = (run(kind, method, gradients, np.float32) for method in ("fused", "scan"))
    for got, want in zip(jax.tree.leaves(fused), jax.tree.leaves(scan), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


# 40 steps are cut into equal pieces, 37 into pieces and a rest of another length.
@pytest.mark.parametrize("residuals", RESIDUALS)
@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("plain", 40),
        ("plain, reverse", 37),
        ("projection", 37),
        ("peephole, resets, reverse", 40),
        ("everything", 37),
        ("everything, reverse", 40),
    ],
)
def test_pieces_and_residuals_change_nothing(kind, steps, residuals, x64):
    scan = reference(kind, steps)
    fused = run(kind, "fused", gradients, steps=steps, residuals=residuals)
    oracle.assert_close(fused, scan, 1e-12)


@functools.cache
def reference(kind, steps):
    """The scan's, for all residuals."""
    return run(kind, "scan", gradients, steps=steps)


@pytest.mark.parametrize("residuals", RESIDUALS)
def test_short_sequences_with_residuals(residuals, x64):
    for kind in ("plain", "everything, reverse"):
        fused = run(kind, "fused", gradients, residuals=residuals)
        oracle.assert_close(fused, run(kind, "scan", gradients), 1e-12)


@pytest.mark.parametrize("residuals", RESIDUALS)
@pytest.mark.parametrize(("steps", "batch"), [(0, B), (T, 0), (40, 0)])
def test_nothing_to_run_over_has_a_gradient(steps, batch, residuals, x64):
    (params, xs, state, _), _, _ = problem("plain")
    xs, state = jnp.zeros((steps, batch, D)), jax.tree.map(lambda a: a[:batch], state)

    def loss(params, xs, state, **how):
        (h, c), hs = lstm(params, xs, state, **how)
        return jnp.sum(h) + 2 * jnp.sum(c) + jnp.sum(hs)

    got = jax.grad(functools.partial(loss, residuals=residuals), (0, 1, 2))(params, xs, state)
    want = jax.grad(functools.partial(loss, method="scan"), (0, 1, 2))(params, xs, state)
    oracle.assert_close(got, want, 0.0)


def test_steps_of_a_piece():
    # A divisor near a sixteenth, a fortieth or the root; what was aimed at where none is near.
    of = lambda steps: [steps_of_a_piece(steps, kind) for kind in RESIDUALS]  # noqa: E731
    assert [of(n) for n in (0, 1, 2, 20)] == [[0, 0, 0], [1, 1, 1], [2, 2, 1], [20, 2, 4]]
    assert [of(n) for n in (31, 80, 784)] == [[31, 2, 6], [5, 2, 10], [49, 16, 28]]
    assert of(97) == [7, 3, 10]


@pytest.mark.parametrize(
    ("kind", "zoneout"), [("plain", False), ("everything, reverse", False), ("plain", True)]
)
def test_coupled_gates_are_the_scans(kind, zoneout, x64):
    arguments, weights, _ = problem(kind, steps=37)
    peephole, _, clips, masked, reverse = KINDS[kind]
    params = arguments[0]
    three = lambda w: w[..., : 3 * H]  # noqa: E731
    params = params._replace(w_x=three(params.w_x), w_h=three(params.w_h), b=three(params.b))
    params = params._replace(peephole=params.peephole[:2] if peephole else None)
    options = {"cell_clip": 0.8, "proj_clip": 0.6} if clips else {}
    options |= {"noise": zoned(37, **ZONEOUTS)} if zoneout else {}
    if masked:
        options |= {
            "lengths": np.arange(37 - B, 37),
            "resets": np.arange(37 * B).reshape(37, B) % 7 == 3,
        }

    def loss(params, xs, state, reset_to, method):
        options["reset_to"] = reset_to if masked else None
        out = cifg(params, xs, state, method=method, reverse=bool(reverse), **options)
        return oracle.weighted_sum(weights, out)

    arguments = params, np.nan_to_num(arguments[1]), *arguments[2:]
    fused, scan = (
        jax.jit(gradients(functools.partial(loss, method=method)), compiler_options=QUICK)(
            *arguments
        )
        for method in ("fused", "scan")
    )
    oracle.assert_close(fused, scan, 1e-12)


ZONEOUTS = {"zoneout_h": 0.4, "zoneout_c": 0.3}


def zoned(steps, projected=False, **rates):
    """Masks of zoneout for the problems above."""
    like = init_lstm(jax.random.key(0), D, H, proj_size=P if projected else None)
    return recurrent_noise(jax.random.key(76), like, np.zeros((steps, B, D)), **rates)


@pytest.mark.parametrize(
    ("kind", "steps", "residuals", "parts"),
    [
        ("plain", T, "gates", "h"),
        ("plain, reverse", 37, "gates", "hc"),
        ("plain", 40, "recompute", "c"),
        ("plain", 37, "sqrt", "hc"),
        ("peephole, resets, reverse", 40, "sqrt", "h"),
        ("everything", 37, "gates", "hc"),
        ("everything, reverse", 40, "recompute", "hc"),
    ],
)
def test_zoneout_is_the_scans(kind, steps, residuals, parts, x64):
    rates = {f"zoneout_{part}": ZONEOUTS[f"zoneout_{part}"] for part in parts}
    noise = zoned(steps, bool(KINDS[kind][1]), **rates)
    fused = run(kind, "fused", gradients, steps=steps, noise=noise, residuals=residuals)
    oracle.assert_close(fused, run(kind, "scan", gradients, steps=steps, noise=noise), 1e-12)
    assert not np.allclose(fused[0], reference(kind, steps)[0])


@pytest.mark.parametrize("truncation", [(3, 3), (2, 6)])
def test_truncated_zoneout_is_the_scans(truncation, x64):
    how = {"noise": zoned(37, **ZONEOUTS), "truncation": truncation, "steps": 37}
    fused, scan = (run("plain", method, gradients, **how) for method in ("fused", "scan"))
    oracle.assert_close(fused, scan, 1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"residuals": "all"},
            "residuals: got 'all', expected one of 'gates', 'recompute', 'sqrt'",
        ),
        (
            {"residuals": "sqrt", "method": "scan"},
            "residuals: got 'sqrt' with method 'scan', expected 'gates'",
        ),
        ({"method": "cuda"}, "method: got 'cuda', expected one of 'fused', 'scan', 'unrolled', "),
        (
            {"residuals": "sqrt", "noise": Noise(h=np.ones((4, B, H), np.float32))},
            "residuals: got 'sqrt' with noise other than zoneout, expected 'gates'",
        ),
        ({"residuals": "sqrt", "noise": 0.1}, "noise: got float, expected Noise or None"),
    ],
)
def test_what_is_wrong_is_named(given, message):
    (params, xs, *_), _, _ = problem("plain", np.float32)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        lstm(params, xs, **given)


def test_a_noise_without_masks_leaves_the_residuals_as_asked():
    (params, xs, *_), _, _ = problem("plain", np.float32)

    def program(noise):
        loss = lambda p: lstm(p, xs, residuals="sqrt", noise=noise)[1].sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params))

    assert program(None) == program(Noise())


def test_residuals_do_not_mind_the_expectation_of_zoneout():
    (params, xs, *_), _, _ = problem("plain", np.float32)
    noise = recurrent_noise(None, params, xs, zoneout_h=0.2)
    (_, got), (_, want) = (lstm(params, xs, noise=noise, residuals=r) for r in ("sqrt", "gates"))
    oracle.assert_close(got, want, 1e-6)


def tangents(arguments, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(size=a.shape), arguments)


@pytest.mark.parametrize(
    ("kind", "steps", "residuals", "zoneout"),
    [
        ("plain", T, "gates", False),
        ("everything, reverse", T, "gates", False),
        ("plain", 37, "gates", False),
        ("everything", 37, "recompute", False),
        ("plain", 37, "sqrt", False),
        ("plain", T, "gates", True),
    ],
)
def test_forward_mode_and_second_derivatives_are_the_scans(kind, steps, residuals, zoneout, x64):
    def derivatives(loss):
        def found(*arguments):
            along = tangents(arguments, 71)
            # A NaN that is masked out may stand in xs, but no derivative is asked for there.
            forward = jax.jvp(loss, arguments, along)[1]

            def slope(*arguments):
                grads = jax.grad(loss, (0, 2, 3))(*arguments)
                parts = (along[0], along[2], along[3])
                pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(parts), strict=True)
                return sum(jnp.vdot(g, v) for g, v in pairs)

            backward = jax.grad(slope, (0, 2, 3))(*arguments)  # reverse over reverse
            return forward, backward, jax.jvp(slope, arguments, along)[1]  # forward over reverse

        return found

    noise = zoned(steps, **ZONEOUTS) if zoneout else None
    fused = run(kind, "fused", derivatives, steps=steps, residuals=residuals, noise=noise)
    scan = run(kind, "scan", derivatives, steps=steps, noise=noise)
    oracle.assert_close(fused, scan, 1e-12)
    assert np.any(scan[1][0].w_h)


def test_vmap_over_weights_is_a_loop(x64):
    (params, xs, *_), _, _ = problem("plain")
    many = jax.tree.map(lambda w: np.stack([w, 0.5 * w, -w]), params)

    def of_weights(params):
        return jax.grad(lambda params: jnp.sum(lstm(params, xs)[1] ** 2))(params)

    # Not optimised: XLA's CPU compiler of jax 0.10.2 has a fault here, for lax.scan alone too. It
    # takes float64 weights of this odd size along a batch axis for others; 0.12 does not.
    at_once = jax.jit(jax.vmap(of_weights), compiler_options=QUICK)(many)
    one_by_one = [of_weights(jax.tree.map(lambda w, n=n: w[n], many)) for n in range(3)]
    oracle.assert_close(at_once, jax.tree.map(lambda *w: np.stack(w), *one_by_one), 1e-12)


def test_other_noise_goes_by_the_scan(x64):
    (params, xs, *_), _, _ = problem("plain")
    noise = recurrent_noise(jax.random.key(0), params, xs, recurrent_dropout=0.5)
    fused, scan = (lstm(params, xs, noise=noise, method=method) for method in ("fused", "scan"))
    oracle.assert_close(fused, scan, 0.0)


def test_bfloat16_products_with_a_float32_cell():
    (params, xs, *_), _, _ = problem("everything", np.float32)
    params, xs = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (params, xs))
    fused, scan = (lstm(params, xs[:1], method=method) for method in ("fused", "scan"))
    assert fused[0].c.dtype == jnp.float32 and fused[1].dtype == jnp.bfloat16
    for got, want in zip(jax.tree.leaves(fused), jax.tree.leaves(scan), strict=True):
        assert got.dtype == want.dtype
        # One product against the sum of two: a last bit of h, or of c in float32.
        near = 2**-8 if got.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=near, atol=1e-6)


# --- the program ---------------------------------------------------------------------------------


def loops_and_products(jaxpr, inside=False):
    """``(scans, products outside of them)`` of a jaxpr and of the ones within it."""
    scans, outside = [], 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            scans.append(equation)
            continue
        outside += equation.primitive.name == "dot_general"
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(parameter):
                more, products = loops_and_products(getattr(parameter, "jaxpr", parameter))
                scans, outside = scans + more, outside + products
    return scans, outside


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize("zoneout", [False, True])
@pytest.mark.parametrize("method", ["fused", "scan"])
def test_the_backward_loop_holds_one_product_and_no_gradient_of_weights(method, zoneout):
    """And the scan's does: a test that could not tell them apart would say nothing."""
    (params, xs, *_), _, _ = problem("plain", np.float32)
    noise = zoned(T, **ZONEOUTS) if zoneout else None

    def loss(params, xs):
        return jnp.sum(lstm(params, xs, method=method, noise=noise)[1] ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, xs)
    scans, outside = loops_and_products(jaxpr.jaxpr)
    assert len(scans) == 2
    body = scans[1].params["jaxpr"].jaxpr
    _, products = loops_and_products(body)
    summed = params.w_h.shape in [v.aval.shape for v in body.outvars]
    # dz W_hᵀ in the loop; dW_x, dW_h and dx after it.
    assert (products, outside, summed) == ((1, 3, False) if method == "fused" else (4, 0, True))


@pytest.mark.parametrize("residuals", RESIDUALS)
def test_memory_between_the_loops(residuals):
    """At most half of the scan's, a quarter when gates are computed again, a fifth with √T."""
    steps, batch, hidden = 400, 8, 64
    rng = np.random.default_rng(73)
    params = init_lstm(jax.random.key(0), 2, hidden)
    xs = rng.normal(size=(steps, batch, 2)).astype(np.float32)

    def arrays(**how):  # [T, B, H] that lie in memory at once
        grad = jax.grad(lambda params, xs: jnp.mean(lstm(params, xs, **how)[1] ** 2), (0, 1))
        memory = timings.compiled(grad, params, xs).temporary_bytes
        return memory / (steps * batch * hidden * 4)

    scan, fused = arrays(method="scan"), arrays(residuals=residuals)
    assert 13 < scan < 15
    assert fused < scan * {"gates": 1 / 2, "recompute": 1 / 4, "sqrt": 1 / 5}[residuals]


def test_pieces_sum_their_gradients_outside_the_loop_over_steps():
    (params, xs, *_), _, _ = problem("plain", np.float32, steps=40)

    def loss(params, xs):
        return jnp.sum(lstm(params, xs)[1] ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, xs)
    scans, outside = loops_and_products(jaxpr.jaxpr)
    assert (len(scans), outside) == (2, 0)  # forward, over steps; backward, over pieces
    inner, products = loops_and_products(scans[1].params["jaxpr"].jaxpr)
    assert products == 3  # dW_x, dW_h and dx of a piece
    bodies = [loop.params["jaxpr"].jaxpr for loop in inner]
    assert [loops_and_products(body)[1] for body in bodies] == [1]  # dz W_hᵀ
    assert params.w_h.shape not in [v.aval.shape for v in bodies[0].outvars]


def test_what_is_not_asked_for_is_not_computed():
    (params, xs, *_), _, _ = problem("plain", np.float32)

    def products(argnums):
        loss = lambda params, xs: jnp.sum(lstm(params, xs)[1])  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums))(params, xs)
        return loops_and_products(jaxpr.jaxpr)[1]

    assert (products(0), products(1)) == (2, 1)  # dW_x and dW_h; dx
