"""A step over time: masks, lengths, resets, directions and ways to write the loop."""

import functools

import hypothesis.strategies as st
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from problems import NAMES, QUICK, B, T, holes_and_resets, problem

SHORT = 5  # steps where many programs are compiled


# --- one loop, written in several ways -----------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", NAMES)
def test_masks_and_resets_are_the_oracles(name, reverse, values_and_gradients, x64):
    """Holes, padding on both sides, an empty row, NaN wherever a step is not valid."""
    layer, slow, params, xs, state, weights = problem(name)
    mask, resets = holes_and_resets()
    xs = np.where(mask[..., None], xs, np.nan)
    options = {"mask": mask, "resets": resets, "reverse": reverse}
    outputs, gradients = values_and_gradients(
        lambda *arguments: layer(*arguments, **options), weights, params, xs, state
    )

    def loss(*arguments):
        return oracle.weighted_sum(weights, slow(*arguments, **options))

    oracle.assert_close(outputs, slow(params, xs, state, **options), 1e-10)
    oracle.assert_close(gradients, oracle.gradients(loss, params, xs, state), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_scan_unrolled_and_unroll_k_are_one(name, values_and_gradients, x64):
    layer, _, params, xs, state, weights = problem(name, SHORT)
    mask, resets = (a[:SHORT] for a in holes_and_resets())

    def run(**options):
        one_layer = functools.partial(layer, **options)
        return values_and_gradients(one_layer, weights, params, xs, state)

    plain = run()
    for unroll in (2, 4, SHORT):
        oracle.assert_close(run(unroll=unroll), plain, 1e-12)
    masked = {"mask": mask, "resets": resets, "reverse": True}
    expected = run(**masked)
    oracle.assert_close(run(**masked, method="unrolled"), expected, 1e-12)
    assert np.abs(expected[0][1] - plain[0][1]).max() > 0.1


@pytest.mark.parametrize("method", ["scan", "unrolled"])
@pytest.mark.parametrize("name", NAMES)
def test_reverse_is_flip_layer_flip(name, method, x64):
    layer, _, params, xs, state, _ = problem(name)
    mask, resets = holes_and_resets()
    run = functools.partial(layer, params, method=method)
    final, hs = run(xs, state, mask=mask, resets=resets, reverse=True)
    flipped, hs_flipped = run(xs[::-1], state, mask=mask[::-1], resets=resets[::-1])
    oracle.assert_close((final, hs), (flipped, hs_flipped[::-1]), 1e-12)
    again, _ = run(xs[::-1], state, reverse=True)  # the reverse of the reverse
    oracle.assert_close(again, run(xs, state)[0], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_jit_is_eager_and_does_not_compile_twice(name, x64):
    layer, _, params, xs, state, _ = problem(name)
    lengths = np.array([3, 0, T, 1])
    traces, compilations = [], []

    def run(params, xs, state, lengths):
        traces.append(1)
        return layer(params, xs, state, lengths=lengths)

    def listen(event, seconds, **_):
        compilations.append(event) if "backend_compile" in event else None

    compiled = jax.jit(run)
    oracle.assert_close(
        compiled(params, xs, state, lengths), run(params, xs, state, lengths), 1e-12
    )
    traces.clear()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        compiled(oracle.tree_map(np.negative, params), xs + 1, state, lengths[::-1].copy())
        assert not traces and not compilations
        compiled(params, xs[:-1], state, np.minimum(lengths, T - 1))
        assert traces and compilations  # a new shape is seen, so the two counts work
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", NAMES)
def test_a_call_outside_jit_compiles_once(name, x64):
    layer, _, params, xs, state, _ = problem(name)
    compilations = []

    def listen(event, seconds, **_):
        compilations.append(event) if "backend_compile" in event else None

    def run(scale):
        lengths = np.array([3, 0, T, 1])
        return layer(oracle.tree_map(lambda p: scale * p, params), xs, state, lengths=lengths)

    first = run(1.0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        second = run(-1.0)
        assert not compilations
        layer(params, xs[:-1], state)
        assert compilations  # the count works
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert np.abs(np.asarray(first[1]) - np.asarray(second[1])).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_sequences_and_lengths_is_a_batch(name, x64):
    layer, _, params, xs, state, _ = problem(name)
    lengths = np.array([3, 0, T, 1])

    def one(xs, state, length):
        batch_of_one = jax.tree.map(lambda a: a[None], (state, length))
        final, hs = layer(params, xs[:, None], batch_of_one[0], lengths=batch_of_one[1])
        return jax.tree.map(lambda a: a[0], final), hs[:, 0]

    together = jax.vmap(one, in_axes=(1, 0, 0), out_axes=(0, 1))(xs, state, lengths)
    oracle.assert_close(together, layer(params, xs, state, lengths=lengths), 1e-12)


@pytest.mark.parametrize("method", ["scan", "unrolled"])
@pytest.mark.parametrize("name", NAMES)
def test_no_steps_return_the_initial_state(name, method, x64):
    layer, _, params, xs, state, _ = problem(name)
    final, hs = layer(params, xs[:0], state, method=method)
    oracle.assert_close(final, state, 0.0)
    assert hs.shape == (0, *state.h.shape) and hs.dtype == state.h.dtype


# --- masks and lengths ---------------------------------------------------------------------------


@functools.cache
def compiled_gradients(name, reverse):
    """jit of (weights, params, xs, state, mask, lengths) -> ((loss, outputs), gradients)."""
    layer = problem(name).layer

    def loss(params, xs, state, weights, mask, lengths):
        outputs = layer(params, xs, state, mask=mask, lengths=lengths, reverse=reverse)
        return oracle.weighted_sum(weights, outputs), outputs

    differentiated = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    return jax.jit(differentiated, compiler_options=QUICK)


def trimmed(name, reverse, valid):
    """Every row run on its own over its valid steps alone; put together again by hand."""
    _, _, params, xs, state, (of_final, of_hs) = problem(name, SHORT)
    finals, hs = oracle.tree_map(np.copy, state), np.zeros((SHORT, *state.h.shape))
    # A row without steps: the loss sees its initial state and nothing else.
    of_params, of_xs, of_state = (
        oracle.tree_map(np.zeros_like, params),
        np.zeros_like(xs),
        oracle.tree_map(np.copy, of_final),
    )
    for b in range(B):
        steps = np.flatnonzero(valid[:, b])
        if len(steps) == 0:
            continue
        row = slice(b, b + 1)
        weights = (jax.tree.map(lambda w, row=row: w[row], of_final), of_hs[steps, row])
        one_state = jax.tree.map(lambda s, row=row: s[row], state)
        (_, (final, h)), (d_params, d_xs, d_state) = compiled_gradients(name, reverse)(
            params, xs[steps, row], one_state, weights, None, None
        )
        hs[steps, row], of_xs[steps, row] = h, d_xs
        of_params = jax.tree.map(np.add, of_params, d_params)
        for whole, part in ((finals, final), (of_state, d_state)):
            for field, value in zip(whole, part, strict=True):
                field[row] = value
    return (finals, hs), (of_params, of_xs, of_state)


def check_padded_is_trimmed(name, reverse, valid, padding, mask=None, lengths=None):
    with jax.enable_x64(True):
        _, _, params, xs, state, weights = problem(name, SHORT)
        xs = np.where(valid[..., None], xs, padding)
        (_, outputs), gradients = compiled_gradients(name, reverse)(
            params, xs, state, weights, mask, lengths
        )
        oracle.assert_close((outputs, gradients), trimmed(name, reverse, valid), 1e-12)
        # Not nearly, but exactly nothing: at invalid steps, and for rows without valid ones.
        assert not np.any(np.asarray(outputs[1])[~valid])
        assert not np.any(np.asarray(gradients[1])[~valid])


PADDING = st.sampled_from([np.nan, np.inf, 0.0, 1e30])


@pytest.mark.parametrize(("name", "reverse"), [("lstm", False), ("gru", True)])
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, SHORT), min_size=B, max_size=B), padding=PADDING)
def test_padded_is_trimmed_whatever_the_padding_holds(name, reverse, lengths, padding):
    lengths = np.array(lengths)
    valid = np.arange(SHORT)[:, None] < lengths
    check_padded_is_trimmed(name, reverse, valid, padding, lengths=lengths)


@pytest.mark.parametrize(("name", "reverse"), [("lstm", False), ("lstm", True), ("gru", True)])
@settings(max_examples=15)
@given(
    bits=st.lists(st.booleans(), min_size=SHORT * B, max_size=SHORT * B),
    lengths=st.none() | st.lists(st.integers(0, SHORT), min_size=B, max_size=B),
    padding=PADDING,
)
def test_steps_that_a_mask_takes_out_are_not_there(name, reverse, bits, lengths, padding):
    """Padding on the left, on the right, holes, with and without lengths beside the mask."""
    mask = valid = np.array(bits).reshape(SHORT, B)
    if lengths is not None:
        lengths = np.array(lengths)
        valid = mask & (np.arange(SHORT)[:, None] < lengths)
    check_padded_is_trimmed(name, reverse, valid, padding, mask, lengths)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_length_zero_hand_their_state_on(name, x64):
    layer, _, params, xs, state, _ = problem(name)
    xs = np.full_like(xs, np.nan)
    lengths = np.zeros(B, int)
    final, hs = layer(params, xs, state, lengths=lengths)
    oracle.assert_close((final, hs), (state, np.zeros(hs.shape)), 0.0)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(params, xs, state, weights):
        return oracle.weighted_sum(weights, layer(params, xs, state, lengths=lengths)[0])

    rng = np.random.default_rng(61)
    weights = oracle.tree_map(lambda s: rng.normal(size=s.shape), state)
    of_params, of_xs, of_state = gradients(params, xs, state, weights)
    oracle.assert_close(of_state, weights, 0.0)  # the identity
    assert not any(np.any(g) for g in jax.tree.leaves((of_params, of_xs)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ["fused", "scan", "unrolled"])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_a_reset_comes_before_is_never_read(
    name, method, reverse, values_and_gradients, x64
):
    """Row 1 is padded in front, and begins with a reset, in whichever order it is run."""
    layer, _, params, xs, state, weights = problem(name)
    valid, resets = np.ones((T, B), bool), np.zeros((T, B))
    valid[-1 if reverse else 0, 1] = False
    resets[-2 if reverse else 1, 1] = resets[2, 2] = 1
    of_row = np.array([0, 1, 0, 0], bool)[:, None]
    bad, zeros = (
        oracle.tree_map(lambda s, v=v: np.where(of_row, v, s), state) for v in (np.nan, 0)
    )
    run = functools.partial(layer, mask=valid, resets=resets, reverse=reverse, method=method)
    got = values_and_gradients(run, weights, params, xs, bad)
    oracle.assert_close(got, values_and_gradients(run, weights, params, xs, zeros), 1e-12)


@pytest.mark.parametrize("truncation", [None, (2, 2)])
@pytest.mark.parametrize("method", ["fused", "scan", "unrolled"])
@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_a_row_without_steps_is_never_read(
    name, method, truncation, values_and_gradients, x64
):
    layer, _, params, xs, state, weights = problem(name)
    layer = functools.partial(layer, truncation=truncation)
    valid = np.arange(T)[:, None] < np.array([3, 0, T, 1])
    of_row = np.array([0, 1, 0, 0], bool)[:, None]
    bad, zeros = (
        oracle.tree_map(lambda s, v=v: np.where(of_row, v, s), state) for v in (np.nan, 0)
    )
    masked = functools.partial(layer, mask=valid, method=method)
    weights = oracle.tree_map(np.nan_to_num, weights)
    (final, hs), gradients = values_and_gradients(masked, weights, params, xs, bad)
    (want, of_hs), wanted = values_and_gradients(masked, weights, params, xs, zeros)
    oracle.assert_close((hs, gradients), (of_hs, wanted), 1e-12)
    oracle.assert_close(final, oracle.tree_map(lambda w: np.where(of_row, np.nan, w), want), 1e-12)


def test_masks_lengths_and_resets_of_any_dtype(x64):
    layer, _, params, xs, state, _ = problem("rnn")
    lengths = np.array([3, 0, T, 1])
    mask = np.arange(T)[:, None] < lengths
    resets = holes_and_resets()[1]
    run = functools.partial(layer, params, xs, state)
    expected = run(mask=mask, resets=resets)
    for weight, dtype in ((1, "int32"), (3, "uint8"), (-0.25, "float32"), (2.0, "bfloat16")):
        numbers = {"mask": mask, "resets": resets}
        numbers = {k: (weight * v).astype(jnp.dtype(dtype)) for k, v in numbers.items()}
        oracle.assert_close(run(**numbers), expected, 0.0)
    for same in (lengths.tolist(), lengths.astype(np.int8), jnp.asarray(lengths, jnp.uint32)):
        oracle.assert_close(run(lengths=same, resets=resets), expected, 0.0)


# --- resets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_splits_the_sequence(name, values_and_gradients, x64):
    layer, _, params, xs, state, weights = problem(name)
    cut = 3
    resets = np.zeros((T, B))
    resets[cut] = 1

    def two_runs(params, xs, state):
        _, first = layer(params, xs[:cut], state)
        final, second = layer(params, xs[cut:])  # from zeros
        return final, jnp.concatenate([first, second])

    whole = functools.partial(layer, resets=resets)
    expected = values_and_gradients(two_runs, weights, params, xs, state)
    oracle.assert_close(values_and_gradients(whole, weights, params, xs, state), expected, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_forgets_even_nan(name, values_and_gradients, x64):
    layer, _, params, xs, state, weights = problem(name)
    resets = np.arange(T)[:, None] == np.zeros(B)
    bad, zeros = (oracle.tree_map(lambda s, v=v: np.full_like(s, v), state) for v in (np.nan, 0))
    after_nan = values_and_gradients(
        functools.partial(layer, resets=resets), weights, params, xs, bad
    )
    outputs, (of_params, of_xs, _) = values_and_gradients(layer, weights, params, xs, zeros)
    oracle.assert_close(after_nan, (outputs, (of_params, of_xs, zeros)), 1e-12)


@pytest.mark.parametrize("method", ["fused", "scan", "unrolled"])
def test_bounds_are_settings_and_not_differentiated(method, x64):
    """Whatever their type, and however the layer is run."""
    layer, _, params, xs, _, _ = problem("lstm")
    short = jax.tree.map(np.float32, (params, xs))

    def total(clip, params=params, xs=xs):
        return jnp.sum(layer(params, xs, cell_clip=clip, method=method)[1])

    assert jax.grad(total)(0.2) == 0 and abs(total(0.2) - total(0.4)) > 0.01
    for bound in (np.float64(0.2), jnp.asarray(0.2), 0.2):
        assert total(bound, *short).dtype == np.float32
        np.testing.assert_allclose(total(bound, *short), total(0.2), rtol=1e-5)


# --- several devices -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["scan", "unrolled"])
def test_inside_shard_map_every_device_runs_its_rows(method, x64):
    layer, _, params, xs, _, _ = problem("lstm")
    mask, resets = holes_and_resets()
    mesh = jax.make_mesh((4,), ("batch",))
    rows, time_major = jax.P("batch"), jax.P(None, "batch")
    run = functools.partial(layer, state=None, method=method)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(jax.P(), time_major, time_major, time_major),
        out_specs=(rows, time_major),
    )
    def sharded(params, xs, mask, resets):
        return run(params, xs, mask=mask, resets=resets)

    placed = jax.device_put((xs, mask, resets), jax.NamedSharding(mesh, time_major))
    params_placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    expected = run(params, xs, mask=mask, resets=resets)
    oracle.assert_close(sharded(params_placed, *placed), expected, 1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("method", ["fused", "scan", "unrolled"])
def test_inside_shard_map_every_device_has_weights_of_its_own(name, method, x64):
    """An ensemble on the same inputs."""
    layer, _, params, xs, _, _ = problem(name)
    several = jax.tree.map(lambda w: np.stack([w, 0.5 * w]), params)
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(jax.P("d"), jax.P()), out_specs=jax.P("d")
    )
    def sharded(several, xs):
        one = jax.tree.map(lambda w: w[0], several)
        return layer(one, xs, method=method)[1][None]

    placed = jax.device_put(several, jax.NamedSharding(mesh, jax.P("d")))
    got = np.asarray(sharded(placed, jax.device_put(xs, jax.NamedSharding(mesh, jax.P()))))
    for member in range(2):
        one = jax.tree.map(lambda w, m=member: w[m], several)
        oracle.assert_close(got[member], layer(one, xs, method=method)[1], 1e-12)
