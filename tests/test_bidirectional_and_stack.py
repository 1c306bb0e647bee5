"""Layers built from layers: both directions, and one on top of the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.rnn import lstm_ref
from problems import B, D, H, T, holes_and_resets, problem

from lstmjax import Bidirectional, LSTMParams, LSTMState, RNNParams, bidirectional, lstm, rnn, stack
from lstmjax.precision import in_bfloat16


def test_a_partial_s_own_options_are_those_that_are_given(x64):
    """However deep they lie, and the backward direction is cut by them, too."""
    _, _, params, xs, state, _ = problem("lstm")
    both = Bidirectional(params, problem("lstm", seed=61).params)
    mask, resets = holes_and_resets()
    for options in ({"mask": mask}, {"lengths": np.array([3, 0, T, 5])}, {"resets": resets}):
        options["mask"] = options.get("mask", mask)
        wanted = bidirectional(lstm, both, xs, **options)
        of_lstm = functools.partial(lstm, **options)
        oracle.assert_close(bidirectional(of_lstm, both, xs), wanted, 0.0)
        stacked = stack(functools.partial(bidirectional, of_lstm), [both], xs)
        oracle.assert_close((stacked[0][0], stacked[1]), wanted, 0.0)
        # What is given goes before a partial's own.
        other = functools.partial(lstm, mask=np.ones((T, B)), resets=np.ones((T, B)))
        given = {"resets": np.zeros((T, B))} | options
        oracle.assert_close(bidirectional(other, both, xs, **given), wanted, 0.0)
        narrow = functools.partial(in_bfloat16, of_lstm)
        wanted = bidirectional(functools.partial(in_bfloat16, lstm), both, xs, **options)
        oracle.assert_close(bidirectional(narrow, both, xs), wanted, 0.0)
    backwards = functools.partial(in_bfloat16, functools.partial(lstm, reverse=True))
    with pytest.raises(ValueError, match="^reverse: got a value, expected none"):
        bidirectional(backwards, both, xs)


def episodes(valid, resets, b):
    """The valid steps of row b, cut before each one that has a reset."""
    cut = []
    for t in np.flatnonzero(valid[:, b]):
        if not cut or (resets is not None and resets[t, b]):
            cut.append([])
        cut[-1].append(t)
    return cut


@pytest.mark.parametrize(
    ("name", "kind", "with_resets"),
    [
        *(("lstm", kind, resets) for kind in ("all", "lengths", "mask") for resets in (0, 1)),
        ("rnn", "lengths", 1),
        ("gru", "mask", 1),
    ],
)
def test_both_directions_are_each_rows_own_episodes(name, kind, with_resets, x64):
    layer, slow, params, xs, state, _ = problem(name)
    both = Bidirectional(params, problem(name, seed=61).params)
    states = Bidirectional(state, problem(name, seed=62).state)
    mask, resets = holes_and_resets()
    resets = resets if with_resets else None
    lengths = np.array([3, 0, T, 5])
    options, valid = {
        "all": ({}, np.ones((T, B), bool)),
        "lengths": ({"lengths": lengths}, np.arange(T)[:, None] < lengths),
        "mask": ({"mask": mask}, mask),
    }[kind]
    finals, hs = bidirectional(
        layer, both, np.where(valid[..., None], xs, np.nan), states, resets=resets, **options
    )
    assert isinstance(finals, Bidirectional) and type(finals.backward) is type(state)
    width = state.h.shape[1]
    expected = np.zeros((T, B, 2 * width))
    for direction, reverse in ((0, False), (1, True)):
        columns = slice(direction * width, (direction + 1) * width)
        for b in range(B):
            row = tuple(part[b : b + 1] for part in states[direction])
            cuts = episodes(valid, resets, b)
            for n, steps in enumerate(reversed(cuts) if reverse else cuts):
                forgets = not reverse and resets is not None and resets[steps[0], b]
                if n > 0 or forgets:
                    row = tuple(np.zeros_like(part) for part in row)
                row, outputs = slow(both[direction], xs[steps, b : b + 1], row, reverse=reverse)
                expected[steps, b, columns] = outputs[:, 0]
            got = tuple(part[b : b + 1] for part in finals[direction])
            oracle.assert_close(got, row, 1e-10)
    oracle.assert_close(hs, expected, 1e-10)


def test_stack_of_both_directions_is_jax_lstm_ref(values_and_gradients, x64):
    """Two bidirectional layers with lengths, cuDNN's order: forward, backward, layer by layer."""
    rng = np.random.default_rng(63)
    sizes = [D, D, 2 * H, 2 * H]
    params = tuple(
        LSTMParams(*(rng.normal(size=(n, 4 * H)) for n in (size, H)), rng.normal(size=4 * H))
        for size in sizes
    )
    xs, lengths = rng.normal(size=(T, B, D)), np.array([3, T, 1, 5], np.int32)
    states = LSTMState(rng.normal(size=(4, B, H)), rng.normal(size=(4, B, H)))
    weights = (LSTMState(*rng.normal(size=(2, 4, B, H))), rng.normal(size=(T, B, 2 * H)))

    def ours(params, xs, states):
        pairs = [Bidirectional(*params[:2]), Bidirectional(*params[2:])]
        cells = [LSTMState(states.h[n], states.c[n]) for n in range(4)]
        starts = [Bidirectional(*cells[:2]), Bidirectional(*cells[2:])]
        layer = functools.partial(bidirectional, lstm)
        finals, hs = stack(layer, pairs, xs, starts, lengths=lengths)
        cells = [cell for pair in finals for cell in pair]
        return LSTMState(jnp.stack([c.h for c in cells]), jnp.stack([c.c for c in cells])), hs

    def theirs(params, xs, states):
        kernels = (
            {n: p.w_x.T for n, p in enumerate(params)},
            dict(enumerate(p.w_h.T for p in params)),
        )
        biases = {n: p.b for n, p in enumerate(params)}, {n: jnp.zeros(4 * H) for n in range(4)}
        hs, h, c = lstm_ref(
            *(xs.transpose(1, 0, 2), states.h, states.c, *kernels, *biases),
            *(lengths, D, H, 2, 0.0, True),
        )
        return LSTMState(h, c), hs.transpose(1, 0, 2)

    expected = values_and_gradients(theirs, weights, params, xs, states)
    oracle.assert_close(values_and_gradients(ours, weights, params, xs, states), expected, 1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_stack_is_layer_after_layer(name, x64):
    layer, _, params, xs, state, _ = problem(name)
    second = problem(name, inputs=state.h.shape[1], seed=64)
    mask, resets = holes_and_resets()
    options = {"mask": mask, "resets": resets, "method": "unrolled"}
    first_final, between = layer(params, xs, state, **options)
    second_final, hs = layer(second.params, between, second.state, **options)
    layers, states = [params, second.params], (state, second.state)
    for dropout in ({}, {"dropout": 0.9, "key": None}, {"dropout": 0.0, "key": jax.random.key(0)}):
        got = stack(layer, layers, xs, states, **options, **dropout)
        oracle.assert_close(got, ((first_final, second_final), hs), 1e-12)
    finals, _ = stack(layer, layers, xs, states=None)
    oracle.assert_close(finals[0], layer(params, xs)[0], 1e-12)


def test_dropout_of_a_stack_is_between_layers_and_fresh_at_every_step():
    """Layers that copy their input, so that the outputs show what was dropped on the way."""
    steps, batch, width, rate = 10, 50, 20, 0.25
    copy = RNNParams(np.eye(width, dtype=np.float32), np.zeros((width, width), np.float32))
    xs = np.random.default_rng(65).uniform(1, 2, size=(steps, batch, width)).astype(np.float32)

    def run(layers, seed=0, **options):
        key = jax.random.key(seed)
        options = {"activation": "linear", "dropout": rate, "key": key} | options
        return np.asarray(stack(rnn, [copy] * layers, xs, **options)[1])

    assert np.array_equal(run(1), xs)  # neither the input nor the top layer's output
    results = {layers: run(layers) for layers in (2, 3)}
    for layers, ys in results.items():
        ratio = ys / xs
        kept = ratio != 0
        chance = (1 - rate) ** (layers - 1)  # each layer has a mask of its own
        np.testing.assert_allclose(ratio[kept], 1 / chance, rtol=1e-5)
        assert abs(kept.mean() - chance) < 4.5 * np.sqrt(chance * (1 - chance) / kept.size)
        for axis in range(3):
            both = np.delete(kept, 0, axis) & np.delete(kept, -1, axis)
            assert abs(both.mean() - chance**2) < 0.03
    assert np.array_equal(run(3, method="unrolled"), results[3])
    assert not np.array_equal(run(3, seed=1), results[3])


def test_bidirectional_takes_no_reverse():
    with pytest.raises(ValueError, match="reverse: got a value, expected none"):
        bidirectional(lstm, None, None, reverse=True)
    backwards = functools.partial(lstm, reverse=True)
    with pytest.raises(ValueError, match="reverse: got a value, expected none"):
        bidirectional(backwards, None, None)
