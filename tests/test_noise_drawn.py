"""What ``recurrent_noise`` draws: the law of every mask, its dtype, on devices; wrong noise."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from noises import DROPOUTS, FAST, ZONEOUTS, B, D, T, assert_each_on_its_own, assert_share, draw
from problems import holes_and_resets, problem

from lstmjax import (
    Bidirectional,
    Noise,
    RNNParams,
    RNNState,
    bidirectional,
    init_gru,
    init_lstm,
    init_rnn,
    lstm,
    parallel,
    recurrent_noise,
    rnn_step,
    stack,
)
from lstmjax.dropout import PART
from lstmjax.recurrence import recur

CELLS = {
    "lstm": (init_lstm(jax.random.key(1), 30, 25), 4, 25, 25),
    "projected": (init_lstm(jax.random.key(1), 30, 25, proj_size=20), 4, 20, 25),
    "rnn": (init_rnn(jax.random.key(1), 30, 25), 1, 25, 25),
    "gru": (init_gru(jax.random.key(1), 30, 25), 3, 25, 25),
}
XS = np.zeros((20, 40, 30), np.float32)
NOISE = {**DROPOUTS, **ZONEOUTS}


@pytest.mark.parametrize("name", CELLS)
def test_the_shapes_of_the_masks(name):
    params, gates, proj, hidden = CELLS[name]
    run = functools.partial(recurrent_noise, params=params, xs=XS, **NOISE)
    noise = jax.eval_shape(run, jax.random.key(32))
    shapes = [(gates, 40, 30), (gates, 40, proj), (20, 40, proj), (20, 40, proj), (20, 40, hidden)]
    assert [m.shape for m in noise] == shapes
    assert [m.dtype for m in noise] == [np.float32] * 3 + [bool] * 2


def test_the_law_of_the_masks():
    """Inverted masks per gate, a fresh state mask per step, zoneout: each draw on its own."""
    noise = draw(jax.random.key(32), CELLS["lstm"][0], XS)
    for mask, rate in zip(noise[:3], DROPOUTS.values(), strict=True):
        kept = np.asarray(mask) != 0
        np.testing.assert_allclose(mask[kept], 1 / (1 - rate), rtol=1e-6)
        assert_each_on_its_own(kept, 1 - rate)
        # E[m] = 1; one draw has the standard deviation √(rate/(1 − rate)).
        assert abs(np.mean(mask) - 1) < 4.5 * np.sqrt(rate / (1 - rate) / mask.size)
    for mask, rate in zip(noise[3:], ZONEOUTS.values(), strict=True):
        assert_each_on_its_own(np.asarray(mask), rate)
    # No two of them are one draw: [T, B, H] and [G, B, H] all agree as often as chance says.
    drawn = [*(np.asarray(m) == 0 for m in noise[1:3]), *map(np.asarray, noise[3:])]
    pairs = zip(drawn, [*NOISE.values()][1:], strict=True)
    for (one, p), (two, q) in itertools.combinations(pairs, 2):
        rows = min(len(one), len(two))
        assert_share(one[:rows] & two[:rows], p * q)


def test_many_numbers_are_drawn_in_parts(monkeypatch):
    """Each part on its own, the last one cut off, the same ones without JAX's loop."""
    params, xs = CELLS["lstm"][0], np.zeros((1201, 40, 30), np.float32)
    run = functools.partial(recurrent_noise, jax.random.key(32), params, xs, zoneout_h=0.35)
    mask = np.asarray(jax.jit(run, **FAST)().zoneout_h)
    assert mask.shape == (1201, 40, 25) and mask.size > 4 * PART
    assert_each_on_its_own(mask, 0.35)
    length = PART // (40 * 25)
    parts = [mask[start : start + length] for start in range(0, 1201, length)]
    assert len(parts) == 19 and len(parts[-1]) == 1201 - 18 * length
    for one, two in itertools.combinations(parts, 2):
        assert_share(one[: len(two)] & two, 0.35**2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert np.array_equal(mask, run().zoneout_h)


def test_a_mask_does_not_depend_on_the_other_rates():
    params, key = CELLS["lstm"][0], jax.random.key(33)
    whole = draw(key, params, XS)
    for n, (kind, rate) in enumerate(NOISE.items()):
        alone = recurrent_noise(key, params, XS, **{kind: rate})
        assert [m is None for m in alone] == [k != n for k in range(5)]
        np.testing.assert_allclose(alone[n], whole[n], rtol=1e-6)


@pytest.mark.parametrize(
    ("of_xs", "of_params", "compute", "keep"),
    [
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32", "float32"),
        ("float32", "float64", "float64", "float64"),
    ],
)
def test_masks_have_the_dtype_of_the_layers_sums(of_xs, of_params, compute, keep, x64):
    params = oracle.tree_map(lambda p: jnp.asarray(p, of_params), CELLS["projected"][0])
    xs = jnp.ones((7, 3, 30), of_xs)
    noise = jax.eval_shape(draw, jax.random.key(34), params, xs)
    means = draw(None, params, xs)
    assert {m.dtype for m in (*noise[:3], *means[3:])} == {jnp.dtype(keep)}
    p = np.dtype(keep).type(ZONEOUTS["zoneout_h"])
    assert np.asarray(means.zoneout_h) == p  # which bfloat16 would round
    for drawn in (noise, means):
        run = lambda params, xs, noise: lstm(params, xs, noise=noise)  # noqa: E731
        state, hs = jax.eval_shape(run, params, xs, drawn)
        assert hs.dtype == state.h.dtype == compute and state.c.dtype == keep


def test_bfloat16_is_rounded_once_on_the_way(x64):
    """A mask on h in bfloat16, and an expectation: float32 arithmetic, then one rounding."""
    width = 64
    rng = np.random.default_rng(35)
    h, x = rng.normal(size=(2, 1, width))
    h, x = (np.asarray(a, jnp.bfloat16).astype(np.float32) for a in (h, x))
    eye = jnp.eye(width, dtype=jnp.bfloat16)
    params = RNNParams(eye, 0 * eye)
    state, xs = RNNState(jnp.asarray(h, jnp.bfloat16)), jnp.asarray(x, jnp.bfloat16)[None]
    rounded = lambda a: np.asarray(a, jnp.bfloat16).astype(np.float32)  # noqa: E731
    step = functools.partial(rnn_step, params, activation="linear")
    p = np.float32(0.3)
    final, _ = recur(step, state, xs, noise=Noise(zoneout_h=jnp.asarray(p)))
    assert np.array_equal(final.h.astype(np.float32), rounded(p * h + (1 - p) * x))
    mask = np.full((1, 1, width), 1 / p, np.float32)
    final, _ = recur(step, state, xs, noise=Noise(x=mask))
    assert np.array_equal(final.h.astype(np.float32), rounded(x / p))
    copies = functools.partial(rnn_step, RNNParams(0 * eye, eye), activation="linear")
    for masks in (Noise(h=mask), Noise(state=mask)):
        final, _ = recur(copies, state, xs, noise=masks)
        assert np.array_equal(final.h.astype(np.float32), rounded(h / p))


# --- devices ---


WEIGHTS = init_lstm(jax.random.key(39), D, 5, proj_size=3)


def draw_and_run(key, xs, lengths):
    """A layer that draws inside the program."""
    noise = recurrent_noise(key, WEIGHTS, xs, **NOISE)
    _, hs = lstm(WEIGHTS, xs, lengths=lengths, noise=noise)
    return hs, noise


on_one_device = jax.jit(draw_and_run, **FAST)


def sharded_problem():
    rng = np.random.default_rng(40)
    xs = rng.normal(size=(T, 8, D)).astype(np.float32)
    return jax.random.key(41), xs, rng.integers(1, T + 1, 8)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_sharded_batch_drops_what_it_drops_on_one_device(count):
    key, xs, lengths = sharded_problem()
    expected, drawn = on_one_device(key, xs, lengths)
    mesh = parallel.mesh(jax.devices()[:count])
    time_major, rows = (NamedSharding(mesh, spec) for spec in (parallel.BATCHES, parallel.SPLIT))
    placed = jax.device_put(xs, time_major), jax.device_put(lengths, rows)
    run = jax.jit(draw_and_run, out_shardings=time_major, **FAST)
    got, noise = run(key, *placed)
    assert len(got.sharding.device_set) == count
    for ours, wanted in zip(noise, drawn, strict=True):
        assert np.array_equal(ours, wanted)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fold", [False, True], ids=["one key", "a key for each"])
def test_inside_shard_map_and_pmap_every_device_draws_for_its_own_rows(fold):
    """A program for each of four devices: the run of its own two rows with the key it was given."""
    key, xs, lengths = sharded_problem()
    mesh = parallel.mesh(jax.devices()[:4])

    def local(key, xs, lengths):
        if fold:
            key = jax.random.fold_in(key, jax.lax.axis_index(parallel.AXIS))
        return draw_and_run(key, xs, lengths)[0]

    specs = (P(), parallel.BATCHES, parallel.SPLIT)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=parallel.BATCHES)
    got = jax.jit(mapped, **FAST)(key, xs, lengths)
    parts = xs.reshape(T, 4, 2, D), lengths.reshape(4, 2)
    results = [np.moveaxis(np.reshape(got, (T, 4, 2, -1)), 1, 0)]
    if fold:
        run = jax.pmap(local, parallel.AXIS, in_axes=(None, 1, 0))
        results.append(run(key, *parts))
    kept = []
    for n in range(4):
        own = jax.random.fold_in(key, n) if fold else key
        expected, noise = on_one_device(own, parts[0][:, n], parts[1][n])
        kept.append(noise.zoneout_c)
        for result in results:
            np.testing.assert_allclose(result[n], expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(kept[0], kept[1]) is not fold


def test_reset_to_may_be_the_same_on_all_devices(x64):
    layer, _, params, xs, _, _ = problem("lstm", T, B, D)
    resets = holes_and_resets()[1][:T]
    reset_to = problem("lstm", T, B, D, seed=61).state
    one_row = jax.tree.map(lambda a: a[:1], reset_to)

    def local(xs, resets):
        return layer(params, xs, resets=resets, reset_to=one_row)[1]

    mesh, spec = parallel.mesh(jax.devices()[:4]), parallel.BATCHES
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    every_row = jax.tree.map(lambda a: np.repeat(a, B, axis=0), one_row)
    expected = layer(params, xs, resets=resets, reset_to=every_row)[1]
    oracle.assert_close(jax.jit(mapped)(xs, resets), expected, 1e-12)


@pytest.mark.parametrize("kind", ["noise", "reset_to"])
def test_devices_may_differ_in_nothing_else(kind, x64):
    """The same inputs on every device, and of noise, or of states to reset to, a row each."""
    layer, _, params, xs, _, _ = problem("lstm", T, B, D)
    xs = np.repeat(xs[:, :1], B, axis=1)
    resets = holes_and_resets()[1][:T, [0] * B]
    fresh = problem("lstm", T, B, D, seed=61).state
    zoneout = np.random.default_rng(47).random((T, *fresh.h.shape)) < 0.5
    given, spec = {
        "noise": (Noise(zoneout_h=zoneout), parallel.BATCHES),
        "reset_to": (fresh, parallel.SPLIT),
    }[kind]

    def local(given):
        return layer(params, xs[:, :1], resets=resets[:, :1], **{kind: given})[1]

    mesh = parallel.mesh(jax.devices()[:4])
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec,), out_specs=parallel.BATCHES)
    expected = layer(params, xs, resets=resets, **{kind: given})[1]
    oracle.assert_close(jax.jit(mapped)(given), expected, 1e-12)


# --- errors --------------------------------------------------------------------------------------

SMALL = problem("lstm", T, B, D)
ZEROS = np.zeros(SMALL.xs.shape, np.float32)


def run_small(name="lstm", **options):
    layer, _, params, xs, state, _ = problem(name, T, B, D)
    return layer(params, xs, state, **options)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        *(
            (
                lambda kind=kind: recurrent_noise(None, SMALL.params, ZEROS, **{kind: 1.0}),
                (kind, "1.0", f"0 <= {kind} < 1"),
            )
            for kind in NOISE
        ),
        (lambda: recurrent_noise(None, SMALL.params, ZEROS[0]), ("xs", "[4, 2]", "[T, B, D]")),
        (lambda: recurrent_noise(None, SMALL.params, ZEROS.astype(int)), ("xs", "int", "float")),
        (lambda: recurrent_noise(None, {"w_h": 1}, ZEROS), ("params", "dict", "cell's parameters")),
        (lambda: run_small(noise=(None,) * 5), ("noise", "tuple", "Noise or None")),
        (
            lambda: run_small("gru", noise=Noise(zoneout_c=np.ones((T, B, 5), bool))),
            ("noise.zoneout_c", "None for a cell without c"),
        ),
        (lambda: run_small(noise=Noise(x=ZEROS)), ("x_mask", "[6, 4, 2]", "[4, 4, 2]")),
        (lambda: run_small(noise=Noise(x=ZEROS[:4, :3])), ("noise.x", "[4, 3, 2]", "[G, 4, 2]")),
        (lambda: run_small(noise=Noise(x=[1.0])), ("noise.x", "list", "array")),
        (lambda: run_small("gru", noise=Noise(h=ZEROS[:3])), ("noise.h", "[3, 4, 2]", "[G, 4, 5]")),
        (
            lambda: run_small("rnn", noise=Noise(h=np.ones((3, B, 5)))),
            ("h_mask", "[3, 4, 5]", "[1, 4, 5]"),
        ),
        (
            lambda: run_small(noise=Noise(state=ZEROS[:3])),
            ("noise.state", "[3, 4, 2]", "[6, 4, 2]"),
        ),
        (lambda: run_small(noise=Noise(state=ZEROS > 0)), ("noise.state", "bool", "floating")),
        (
            lambda: run_small(noise=Noise(zoneout_h=ZEROS[:, 0] > 0)),
            ("noise.zoneout_h", "[6, 2]", "[6, 4, 2]"),
        ),
        (lambda: run_small(noise=Noise(zoneout_h=ZEROS)), ("noise.zoneout_h", "float32", "bool")),
        (lambda: run_small(noise=Noise(zoneout_h=0.1)), ("noise.zoneout_h", "float", "array")),
        (
            lambda: run_small(noise=Noise(zoneout_c=np.ones((T, B, 2), bool))),
            ("noise.zoneout_c", "[6, 4, 2]", "[6, 4, 5]"),
        ),
        (
            lambda: run_small(noise=Noise(zoneout_c=jnp.asarray(True))),
            ("noise.zoneout_c", "bool", "floating"),
        ),
        (lambda: run_small(reset_to=(1, 2)), ("reset_to", "tuple", "LSTMState")),
        (
            lambda: run_small(reset_to=SMALL.state._replace(c=ZEROS[0])),
            ("reset_to.c", "[4, 2]", "[4, 5]"),
        ),
        (
            lambda: recur(lambda s, x: s, SMALL.state, ZEROS, resets=ZEROS[..., 0], reset_to=0),
            ("reset_to", "int", "LSTMState"),
        ),
        (
            lambda: bidirectional(lstm, Bidirectional(*[SMALL.params] * 2), ZEROS, noise=Noise()),
            ("noise", "Noise", "Bidirectional"),
        ),
        (
            lambda: bidirectional(
                lstm, Bidirectional(*[SMALL.params] * 2), ZEROS, reset_to=SMALL.state
            ),
            ("reset_to", "LSTMState", "Bidirectional"),
        ),
        (
            lambda: stack(lstm, [SMALL.params], ZEROS, noise=Noise()),
            ("noise", "Noise", "a list, one per layer"),
        ),
        (
            lambda: stack(lstm, [SMALL.params], ZEROS, reset_to=[None, None]),
            ("reset_to", "2", "1, one per layer"),
        ),
    ],
)
def test_wrong_arguments(call, parts):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert all(part in message for part in parts) and "\n" not in message, message
