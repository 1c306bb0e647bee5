"""What a recurrence drops, keeps and is reset to: every mask, against a loop that is given it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from noises import CELLS, DROPOUTS, FAST, SLOW_STEPS, B, D, T, cell_problem, draw, slow
from problems import holes_and_resets

from lstmjax import (
    Bidirectional,
    GRUState,
    LSTMParams,
    LSTMState,
    Noise,
    RNNState,
    bidirectional,
    gru_step,
    lstm,
    lstm_step,
    recurrent_noise,
    rnn_step,
    stack,
    variational_dropout,
)

MASK, RESETS = (a[:T] for a in holes_and_resets())


@functools.cache
def compiled_gradients(name, reverse):
    """jit of (params, xs, state, reset_to, noise, weights) -> ((loss, outputs), gradients)."""
    layer = cell_problem(name).layer

    def loss(params, xs, state, reset_to, noise, weights):
        options = {"mask": MASK, "resets": RESETS, "reset_to": reset_to, "reverse": reverse}
        outputs = layer(params, xs, state, noise=noise, **options)
        return oracle.weighted_sum(weights, outputs), outputs

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True), **FAST)


def check_against_the_loop(name, noise, reverse=False):
    """With holes, padding that is NaN, an empty row, and resets to a state that is not zero."""
    _, _, params, xs, state, weights = cell_problem(name)
    reset_to = cell_problem(name, seed=61).state
    padded = np.where(MASK[..., None], xs, np.nan)
    (_, outputs), gradients = compiled_gradients(name, reverse)(
        params, padded, state, reset_to, noise, weights
    )
    drawn = oracle.tree_map(np.asarray, noise)

    def loop(*arguments):
        return slow(name, *arguments, drawn, MASK, RESETS, reverse)

    arguments = params, xs, state, reset_to
    oracle.assert_close(outputs, oracle.tree_map(np.real, loop(*arguments)), 1e-10)
    loss = lambda *arguments: oracle.weighted_sum(weights, loop(*arguments))  # noqa: E731
    oracle.assert_close(gradients, oracle.gradients(loss, *arguments), 1e-10)


CASES = [
    (name, kind)
    for name in CELLS
    for kind in (*Noise._fields, "all")
    if name == "lstm" or kind != "zoneout_c"
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_values_and_gradients_are_the_loops(name, kind, x64):
    """One program for all kinds: what is not asked for is masks that change nothing."""
    params, xs = cell_problem(name)[2:4]
    noise = draw(jax.random.key(30), params, xs)
    if kind != "all":
        neutral = (np.ones_like, np.ones_like, np.ones_like, np.zeros_like, np.zeros_like)
        pairs = zip(Noise._fields, neutral, noise, strict=True)
        noise = Noise(*(m if f == kind or m is None else like(m) for f, like, m in pairs))
    check_against_the_loop(name, noise)


@pytest.mark.parametrize("name", ["lstm", "gru, reset before"])
def test_values_and_gradients_in_reverse_are_the_loops(name, x64):
    params, xs = cell_problem(name)[2:4]
    check_against_the_loop(name, draw(jax.random.key(31), params, xs), reverse=True)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_zoneout_at_evaluation_is_its_expectation(name, x64):
    """p·h₋ + (1 − p)·h, and nothing is dropped."""
    params, xs = cell_problem(name)[2:4]
    noise = draw(None, params, xs)
    expected = [0.35, 0.6 if name == "lstm" else None]
    assert [*noise] == [None] * 3 + expected
    check_against_the_loop(name, noise)


@pytest.mark.parametrize("kind", Noise._fields)
def test_what_is_none_is_not_done(kind, x64):
    """The same as masks that change nothing."""
    layer, _, params, xs, state, _ = cell_problem("lstm")
    alone = Noise(**{kind: getattr(draw(jax.random.key(32), params, xs), kind)})
    final, hs = layer(params, xs, state, noise=alone)
    everywhere = np.ones((T, B), bool)
    never = np.zeros((T, B), bool)
    drawn = oracle.tree_map(np.asarray, alone)
    expected = slow("lstm", params, xs, state, state, drawn, everywhere, never, False)
    oracle.assert_close((final, hs), oracle.tree_map(np.real, expected), 1e-10)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_a_step_takes_masks_on_any_leading_axes(name, leading, x64):
    params, state = cell_problem(name)[2:5:2]
    step, kind, gates = {
        "lstm": (functools.partial(lstm_step, cell_clip=0.8, proj_clip=0.6), LSTMState, 4),
        "rnn": (rnn_step, RNNState, 1),
        "gru": (gru_step, GRUState, 3),
        "gru, reset before": (functools.partial(gru_step, reset_after=False), GRUState, 3),
    }[name]
    rng = np.random.default_rng(31)
    old = kind(*(rng.normal(size=(*leading, part.shape[1])) for part in state))
    x_t = rng.normal(size=(*leading, D))
    x_mask = rng.normal(size=(gates, *leading, D))
    h_mask = rng.normal(size=(gates, *leading, state.h.shape[1]))
    new = step(params, old, x_t, x_mask=x_mask, h_mask=h_mask)
    for row in np.ndindex(leading):
        masks = x_mask[:, *row], h_mask[:, *row]
        expected = SLOW_STEPS[name](params, x_t[row], *(part[row] for part in old), *masks)
        oracle.assert_close(tuple(part[row] for part in new), expected, 1e-12)


# --- evaluation, methods, devices ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "rnn"])
def test_dropout_is_not_there_at_evaluation(name, x64):
    layer, _, params, xs, state, _ = cell_problem(name)
    plain = layer(params, xs, state)
    for noise in (Noise(), recurrent_noise(None, params, xs, **DROPOUTS)):
        assert noise == Noise()
        oracle.assert_close(layer(params, xs, state, noise=noise), plain, 0.0)
    drawn = draw(jax.random.key(36), params, xs)._replace(zoneout_h=None, zoneout_c=None)
    assert np.abs(layer(params, xs, state, noise=drawn)[1] - plain[1]).max() > 0.1


METHODS = [{"method": "scan"}, {"unroll": 2}, {"method": "unrolled"}]


def test_every_method_drops_the_same(x64):
    layer, _, params, xs, state, _ = cell_problem("lstm", steps=3)
    options = {"mask": MASK[:3], "resets": RESETS[:3]}

    def run(seed=37, **how):
        noise = draw(jax.random.key(seed), params, xs)  # the same key, again for every method
        one_layer = functools.partial(layer, **options, **how)
        return jax.jit(one_layer, **FAST)(params, xs, state, noise=noise)

    expected, *others = (run(**how) for how in METHODS)
    for other in others:
        oracle.assert_close(other, expected, 1e-12)
    assert np.abs(run(seed=38)[1] - expected[1]).max() > 0.1


def test_gradients_of_every_method_are_one(values_and_gradients, x64):
    layer, _, params, xs, state, weights = cell_problem("rnn", steps=3)
    noise = draw(jax.random.key(38), params, xs)
    expected, *others = (
        values_and_gradients(
            functools.partial(layer, noise=noise, **how), weights, params, xs, state
        )
        for how in METHODS
    )
    for other in others:
        oracle.assert_close(other, expected, 1e-12)


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "gru, reset before"])
def test_what_is_dropped_has_gradient_zero(name, x64):
    """Exactly: inputs dropped for all gates, and an initial state dropped or zoned out."""
    layer, _, params, xs, state, weights = cell_problem(name)
    gates = params.w_x.shape[1] // (params.w_proj.shape[0] if name == "lstm" else len(params.w_h))
    rng = np.random.default_rng(42)
    width = state.h.shape[1]
    x = np.broadcast_to(2.0 * (rng.random((B, D)) < 0.5), (gates, B, D))
    of_state = np.ones((T, B, width))
    of_state[0] = 2.0 * (rng.random((B, width)) < 0.5)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(xs, state, noise):
        return oracle.weighted_sum(weights, layer(params, xs, state, noise=noise))

    of_xs, of_old = gradients(xs, state, Noise(x=x, state=of_state))
    assert np.array_equal(np.asarray(of_xs) == 0, np.broadcast_to(x[0] == 0, of_xs.shape))
    assert np.array_equal(np.asarray(of_old.h) == 0, of_state[0] == 0)
    # A layer that keeps its state for ever: the identity, and nothing reaches the inputs.
    keep = Noise(zoneout_h=np.ones((T, B, width), bool))
    if name == "lstm":
        keep = keep._replace(zoneout_c=np.ones((T, *state.c.shape), bool))
    (final, hs), (of_xs, of_old) = layer(params, xs, state, noise=keep), gradients(xs, state, keep)
    oracle.assert_close((final, hs), (state, np.broadcast_to(state.h, hs.shape)), 0.0)
    assert not np.any(of_xs)
    oracle.assert_close(of_old.h, weights[0].h + weights[1].sum(axis=0), 1e-12)


def test_no_mask_is_ever_applied_to_the_cell_state(x64):
    """A cell that forgets nothing keeps c exactly; a fixed inverted mask would make it 0 or 2^T."""
    steps, hidden = 200, 6
    rng = np.random.default_rng(43)
    w_x, w_h = rng.normal(size=(D, 4 * hidden)), rng.normal(size=(hidden, 4 * hidden))
    b = np.repeat([-1000.0, 1000.0, 0.0, 0.0], hidden)  # i = 0, f = 1
    params = LSTMParams(w_x, w_h, b)
    xs, c = rng.normal(size=(steps, B, D)), rng.normal(size=(B, hidden))
    noise = draw(jax.random.key(44), params, xs)
    state, hs = lstm(params, xs, LSTMState(np.zeros((B, hidden)), c), noise=noise)
    assert np.array_equal(state.c, c)
    assert np.abs(hs).max() < 1


@pytest.mark.parametrize("name", ["lstm", "gru, reset before"])
def test_one_mask_for_all_gates_is_variational_dropout_of_the_inputs(name, x64):
    layer, _, params, xs, state, _ = cell_problem(name)
    gates = 4 if name == "lstm" else 3
    key = jax.random.key(45)
    for share_batch in (False, True):
        drop = functools.partial(variational_dropout, key, rate=0.5, share_batch=share_batch)
        mask = drop(np.ones_like(xs))[0]
        noise = Noise(x=np.broadcast_to(mask, (gates, B, D)))
        expected = layer(params, drop(xs), state)
        oracle.assert_close(layer(params, xs, state, noise=noise), expected, 1e-12)


def test_a_state_mask_that_stays_is_a_recurrent_mask_shared_by_the_gates(x64):
    """TensorFlow 1's variational_recurrent, as ``variational_dropout`` says to write it."""
    layer, _, params, xs, state, _ = cell_problem("lstm")
    ones = np.ones((T, *state.h.shape))
    mask = variational_dropout(jax.random.key(46), ones, 0.5, share_batch=True)
    per_gate = np.broadcast_to(mask[0], (4, *state.h.shape))
    expected = layer(params, xs, state, noise=Noise(h=per_gate))
    oracle.assert_close(layer(params, xs, state, noise=Noise(state=mask)), expected, 1e-12)


@pytest.mark.parametrize(("name", "reverse"), [("lstm", False), ("gru", True)])
def test_reset_to_splits_the_sequence(name, reverse, values_and_gradients, x64):
    layer, _, params, xs, state, weights = cell_problem(name)
    start = cell_problem(name, seed=61).state
    cut = 4
    resets = np.zeros((T, B))
    resets[cut] = 1

    def two_runs(params, xs, state, start):
        run = functools.partial(layer, params, reverse=reverse)
        if not reverse:
            _, first = run(xs[:cut], state)
            final, second = run(xs[cut:], start)
        else:  # in the order of running, the reset comes before step ``cut`` too
            _, second = run(xs[cut + 1 :], state)
            final, first = run(xs[: cut + 1], start)
        return final, jnp.concatenate([first, second])

    def whole(params, xs, state, start):
        return layer(params, xs, state, resets=resets, reset_to=start, reverse=reverse)

    arguments = params, xs, state, start
    expected = values_and_gradients(two_runs, weights, *arguments)
    oracle.assert_close(values_and_gradients(whole, weights, *arguments), expected, 1e-12)
    zeros = oracle.tree_map(np.zeros_like, start)
    to_zeros = layer(params, xs, state, resets=resets, reverse=reverse)
    oracle.assert_close(whole(params, xs, state, zeros), to_zeros, 1e-12)


# --- larger layers -------------------------------------------------------------------------------


def test_both_directions_have_noise_and_starts_of_their_own(x64):
    name = "lstm"
    layer, _, params, xs, _, _ = cell_problem(name)
    both = Bidirectional(params, cell_problem(name, seed=61).params)
    starts = Bidirectional(*(cell_problem(name, seed=seed).state for seed in (62, 63)))
    noise = Bidirectional(*(draw(jax.random.key(n), params, xs) for n in range(2)))
    resets = np.zeros((T, B), bool)
    resets[[2, 5], [1, 3]] = True
    back = np.zeros((T, B), bool)
    back[[1, 4], [1, 3]] = True  # the same cuts, seen from behind
    forward = layer(both[0], xs, resets=resets, reset_to=starts.forward, noise=noise.forward)
    backward = layer(
        both[1], xs, resets=back, reset_to=starts.backward, noise=noise.backward, reverse=True
    )
    finals, hs = bidirectional(layer, both, xs, resets=resets, reset_to=starts, noise=noise)
    oracle.assert_close(finals, Bidirectional(forward[0], backward[0]), 1e-12)
    oracle.assert_close(hs, np.concatenate([forward[1], backward[1]], axis=-1), 1e-12)


def test_the_layers_of_a_stack_have_noise_and_starts_of_their_own(x64):
    name = "gru"
    layer, _, params, xs, state, _ = cell_problem(name)
    second = cell_problem(name, inputs=state.h.shape[1], seed=64)
    resets = RESETS
    lower = draw(jax.random.key(0), params, xs)
    starts = [state, second.state]
    _, between = layer(params, xs, resets=resets, reset_to=state, noise=lower)
    upper = draw(jax.random.key(1), second.params, between)
    top = functools.partial(layer, second.params, between, resets=resets)
    layers = [params, second.params]
    finals, hs = stack(layer, layers, xs, resets=resets, reset_to=starts, noise=[lower, upper])
    oracle.assert_close((finals[1], hs), top(reset_to=second.state, noise=upper), 1e-12)
    # None for a layer: nothing is dropped there, and it is reset to zeros.
    _, hs = stack(layer, layers, xs, resets=resets, reset_to=[state, None], noise=[lower, None])
    oracle.assert_close(hs, top()[1], 1e-12)
