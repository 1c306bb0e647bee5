"""Laws of every cell on whatever sizes, dtypes, masks, lengths and resets hypothesis thinks of."""

import functools
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings

from lstmjax import GRUParams, GRUState, LSTMParams, LSTMState, RNNParams, RNNState, gru, lstm, rnn

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.1}


class Case(NamedTuple):
    """A cell with drawn sizes and random numbers, and what it is to be run with."""

    name: str
    params: Any
    xs: np.ndarray
    state: Any
    options: dict


CELLS = {
    "lstm": (lstm, oracle.lstm, LSTMParams, LSTMState, 4),
    "gru": (gru, oracle.gru, GRUParams, GRUState, 3),
    "rnn": (rnn, oracle.rnn, RNNParams, RNNState, 1),
}


@st.composite
def cases(draw, names=tuple(CELLS), dtypes=tuple(TOLERANCES)):
    name, dtype = draw(st.sampled_from(names)), draw(st.sampled_from(dtypes))
    steps, batch = draw(st.integers(0, 30)), draw(st.integers(0, 5))
    inputs, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    normal = lambda *shape: rng.normal(size=shape).astype(jnp.dtype(dtype))  # noqa: E731
    *_, kind, state_kind, gates = CELLS[name]
    params = kind(
        normal(inputs, gates * hidden), normal(hidden, gates * hidden), normal(gates * hidden)
    )
    if name == "lstm" and draw(st.booleans()):
        params = params._replace(peephole=normal(3, hidden))
    state = state_kind(*(normal(batch, hidden) for _ in state_kind._fields))
    options = {"reverse": draw(st.booleans())}
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
        options["mask"] = rng.random((steps, batch)) < share
    if draw(st.booleans()):
        options["lengths"] = rng.integers(0, steps, batch, endpoint=True)
    if draw(st.booleans()):
        options["resets"] = rng.random((steps, batch)) < 0.3
    return Case(name, params, normal(steps, batch, inputs), state, options)


def valid_steps(case):
    valid = np.ones(case.xs.shape[:2], bool)
    if "mask" in case.options:
        valid &= case.options["mask"]
    if "lengths" in case.options:
        valid &= np.arange(len(valid))[:, None] < case.options["lengths"]
    return valid


@settings(max_examples=30)
@given(case=cases())
def test_values_are_the_oracles_and_padding_is_never_read(case):
    layer, slow, *_ = CELLS[case.name]
    valid = valid_steps(case)
    with jax.enable_x64(True):
        spoilt = np.where(valid[..., None], case.xs, np.array(np.nan, case.xs.dtype))
        state, hs = layer(case.params, spoilt, case.state, **case.options)
    wide = oracle.tree_map(np.float64, (case.params, case.xs, case.state))
    want_state, want_hs = slow(*wide, **case.options)
    tolerance = TOLERANCES[str(case.xs.dtype)]
    oracle.assert_close((tuple(state), hs), (want_state, want_hs), tolerance)
    assert hs.dtype == case.xs.dtype
    assert not np.any(np.asarray(hs)[~valid])
    held = ~valid.any(axis=0)  # rows without a valid step
    for got, given_state in zip(state, case.state, strict=True):
        assert np.array_equal(np.asarray(got)[held], given_state[held].astype(got.dtype))


@settings(max_examples=12)
@given(case=cases(dtypes=("float64",)))
def test_gradients_are_finite_and_nothing_reaches_what_is_not_read(case):
    """Zero for masked inputs, and for everything that runs before the last reset of a row."""
    layer, *_ = CELLS[case.name]
    valid = valid_steps(case)
    order = slice(None, None, -1) if case.options["reverse"] else slice(None)

    def loss(params, xs, state):
        final, _ = layer(params, xs, state, **case.options)
        return sum(jnp.sum(jnp.sin(part)) for part in final)

    with jax.enable_x64(True):
        spoilt = np.where(valid[..., None], case.xs, np.nan)
        gradients = jax.grad(loss, (0, 1, 2))(case.params, spoilt, case.state)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    _, of_xs, of_state = gradients
    resets = case.options.get("resets", np.zeros_like(valid)) & valid
    # In the order of running: is there a reset after this step?
    later = np.zeros_like(valid)
    running = resets[order]
    for t in range(len(valid) - 2, -1, -1):
        later[t] = later[t + 1] | running[t + 1]
    later = later[order]
    assert not np.any(np.asarray(of_xs)[~valid | later])
    for part in of_state:
        assert not np.any(np.asarray(part)[resets.any(axis=0)])


@settings(max_examples=15)
@given(case=cases(dtypes=("float64",)), cut=st.integers(0, 30))
def test_a_sequence_in_two_parts_is_the_sequence(case, cut):
    layer, *_ = CELLS[case.name]
    reverse, steps = case.options["reverse"], len(case.xs)
    cut = min(cut, steps)
    over_time = {n: case.options[n] for n in ("mask", "resets") if n in case.options}
    valid = valid_steps(case)

    def part(state, where):
        some = {name: array[where] for name, array in over_time.items()}
        some["mask"] = valid[where]
        return layer(case.params, case.xs[where], state, reverse=reverse, **some)

    with jax.enable_x64(True):
        whole = layer(case.params, case.xs, case.state, **case.options)
        parts = [slice(0, cut), slice(cut, steps)]
        state, pieces = case.state, []
        for where in reversed(parts) if reverse else parts:
            state, hs = part(state, where)
            pieces.append(hs)
        hs = np.concatenate(pieces[::-1] if reverse else pieces)
    oracle.assert_close((tuple(state), hs), (tuple(whole[0]), whole[1]), 1e-12)


@settings(max_examples=15)
@given(case=cases(dtypes=("float64",)), data=st.data())
def test_rows_do_not_know_each_other(case, data):
    """A batch is its rows one by one, in any order."""
    layer, *_ = CELLS[case.name]
    batch = case.xs.shape[1]
    order = np.array(data.draw(st.permutations(range(batch))), int)

    def rows(name, value):
        return value[order] if name == "lengths" else value[:, order]

    options = {n: v if n == "reverse" else rows(n, v) for n, v in case.options.items()}
    with jax.enable_x64(True):
        state, hs = layer(case.params, case.xs, case.state, **case.options)
        mixed = oracle.tree_map(lambda s: s[order], case.state)
        mixed_state, mixed_hs = layer(case.params, case.xs[:, order], mixed, **options)
    want = tuple(np.asarray(s)[order] for s in state), np.asarray(hs)[:, order]
    oracle.assert_close((tuple(mixed_state), mixed_hs), want, 1e-12)


# --- errors --------------------------------------------------------------------------------------

T, B, D, H = 4, 3, 2, 5


def good_arguments(name):
    *_, kind, state_kind, gates = CELLS[name]
    rng = np.random.default_rng(7)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "params": kind(normal(D, gates * H), normal(H, gates * H), normal(gates * H)),
        "xs": normal(T, B, D),
        "state": state_kind(*(normal(B, H) for _ in state_kind._fields)),
        "mask": np.ones((T, B), bool),
        "lengths": np.array([4, 0, 2]),
        "resets": np.zeros((T, B), bool),
        "reset_to": state_kind(*(normal(B, H) for _ in state_kind._fields)),
    }


def other_shape(array):
    """A strategy: the array with another shape: an axis longer, shorter, lost or added."""
    changed = [array[None], array[..., None], np.concatenate([array, array[:1]])]
    changed += [array[0]] if array.ndim else []
    changed += [array[:-1]] if array.shape[0] > 1 else []
    return st.sampled_from(changed)


WRONG_KINDS = st.sampled_from(["text", object(), {}, 1.5 + 2j, [["text"]], [[1, 2], [3]]])


@st.composite
def wrong(draw, name):
    """One good argument made wrong: ``(its name, its value)``."""
    arguments = good_arguments(name)
    argument = draw(st.sampled_from([*arguments, "reverse", "method", "unroll", "noise"]))
    if argument == "reverse":
        return argument, draw(st.sampled_from([2, "yes", 0.0, []]))
    if argument == "method":
        return argument, draw(st.sampled_from(["loop", "", 3, True, "SCAN"]))
    if argument == "unroll":
        return argument, draw(st.sampled_from([0, -1, 1.5, "2", False]))
    if argument == "noise":
        return argument, draw(st.sampled_from([0.5, {}, "zoneout", (None,) * 5]))
    value = arguments[argument]
    if argument in ("params", "state", "reset_to"):
        field = draw(st.sampled_from([f for f in value._fields if getattr(value, f) is not None]))
        part = getattr(value, field)
        if argument == "params" and field == "w_x":  # more inputs are noticed at xs
            other = st.sampled_from([part[None], part[0], part[:, :-1]])
        elif argument == "params" and field == "w_h":
            other = st.sampled_from([part[None], part[0], part[:, :-1], part[:-1]])
        else:
            other = other_shape(part)
        part = draw(other | st.just(part.astype(np.int32)) | st.just("text") | st.just(object()))
        return argument, draw(st.just(value._replace(**{field: part})) | WRONG_KINDS)
    if argument == "lengths":
        bad = [np.array([5, 0, 0]), np.array([0, -1, 0]), value.astype(np.float32), [0.5, 1, 2]]
        return argument, draw(other_shape(value) | st.sampled_from(bad) | WRONG_KINDS)
    if argument == "xs":
        return argument, draw(other_shape(value) | st.just(value.astype(int)) | WRONG_KINDS)
    return argument, draw(other_shape(value) | st.just(value * 1j) | WRONG_KINDS)


@pytest.mark.parametrize("name", CELLS)
@settings(max_examples=100)
@given(data=st.data())
def test_a_wrong_argument_is_a_value_error_that_names_it(name, data):
    argument, value = data.draw(wrong(name))
    arguments = {**good_arguments(name), argument: value}
    xs = np.shape(arguments["xs"]) if argument == "xs" and hasattr(value, "shape") else None
    with pytest.raises(ValueError) as caught:
        functools.partial(CELLS[name][0])(**arguments)
    message = str(caught.value)
    # Another T or B of xs is noticed where it meets the state, the mask, the lengths or the resets.
    also = ("state", "mask", "lengths", "resets", "reset_to") if xs is not None else ()
    assert message.startswith((argument, *also)), (argument, message)
    assert "expected" in message and "\n" not in message
