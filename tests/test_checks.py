"""What is wrong is said: the argument's name, what came, and what was expected."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lstmjax import (
    Bidirectional,
    GRUParams,
    GRUState,
    LSTMParams,
    LSTMState,
    RNNParams,
    RNNState,
    bidirectional,
    dropout,
    gru,
    gru_step,
    init_gru,
    init_lstm,
    init_rnn,
    lstm,
    lstm_step,
    rnn,
    rnn_step,
    stack,
    variational_dropout,
)
from lstmjax.train import init_state

T, B, D, H, P = 7, 3, 4, 5, 2


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


XS = zeros(T, B, D)
KEYS = jax.random.split(jax.random.key(0), T * B).reshape(T, B)
LSTM = LSTMParams(zeros(D, 20), zeros(P, 20), zeros(20), zeros(3, H), zeros(H, P))
LSTM_STATE = LSTMState(zeros(B, P), zeros(B, H))
RNN = RNNParams(zeros(D, H), zeros(H, H), zeros(H))
GRU = GRUParams(zeros(D, 15), zeros(H, 15), zeros(15), zeros(H))


def assert_says(parts, fun, **arguments):
    """``fun`` raises a ``ValueError`` whose one line holds all ``parts``."""
    with pytest.raises(ValueError) as error:
        fun(**arguments)
    message = str(error.value)
    assert all(part in message for part in parts) and "\n" not in message, message


# --- layers and steps ----------------------------------------------------------------------------

WRONG_LSTM = [
    ({"params": tuple(LSTM)}, ("params", "tuple", "LSTMParams")),
    ({"params": LSTM._replace(b=[0.0] * 20)}, ("params.b", "list", "array")),
    ({"params": LSTM._replace(w_x=zeros(D, 19))}, ("params.w_x", "[4, 19]", "20")),
    ({"params": LSTM._replace(w_x=zeros(4, D, 20))}, ("params.w_x", "[4, 4, 20]", "20")),
    ({"params": LSTM._replace(w_h=zeros(P, 21))}, ("params.w_h", "[2, 21]", "4H")),
    ({"params": LSTM._replace(w_h=zeros(20))}, ("params.w_h", "[20]", "4H")),
    ({"params": LSTM._replace(b=zeros(5))}, ("params.b", "[5]", "20")),
    ({"params": LSTM._replace(b=zeros(1, 20))}, ("params.b", "[1, 20]", "20")),
    ({"params": LSTM._replace(peephole=zeros(5, 3))}, ("params.peephole", "[5, 3]", "[3, 5]")),
    ({"params": LSTM._replace(w_proj=zeros(P, H))}, ("params.w_proj", "[2, 5]", "[5, 2]")),
    ({"params": LSTM._replace(w_proj=None)}, ("params.w_h", "[2, 20]", "[5, 20]")),
    ({"params": LSTM._replace(b=zeros(20, dtype=np.int32))}, ("params.b", "int32", "float")),
    ({"params": LSTM._replace(b=zeros(20, dtype=object))}, ("params.b", "dtype object", "float")),
    ({"params": LSTM._replace(w_h=zeros(P, 20, dtype="U5"))}, ("params.w_h", "dtype <U5", "float")),
    ({"state": LSTM_STATE._replace(h=zeros(B, P, dtype="M8[s]"))}, ("state.h", "datetime64[s]")),
    ({"x": zeros(T, B, 3)}, ("[7, 3, 3]", "4")),
    ({"x": zeros(T, B, D, dtype=np.int32)}, ("int32", "float")),
    ({"state": tuple(LSTM_STATE)}, ("state", "tuple", "LSTMState")),
    ({"state": LSTM_STATE._replace(h=zeros(B, H))}, ("state.h", "[3, 5]", "[3, 2]")),
    ({"state": LSTM_STATE._replace(c=zeros(1, H))}, ("state.c", "[1, 5]", "[3, 5]")),
    ({"state": LSTM_STATE._replace(c=zeros(B, H, dtype=bool))}, ("state.c", "bool", "float")),
    ({"cell_clip": 0.0}, ("cell_clip", "0.0", "> 0")),
    ({"cell_clip": -1}, ("cell_clip", "-1", "> 0")),
    ({"cell_clip": float("nan")}, ("cell_clip", "nan", "> 0")),
    ({"cell_clip": "1"}, ("cell_clip", "'1'", "> 0")),
    ({"proj_clip": -0.5}, ("proj_clip", "-0.5", "> 0")),
]
WRONG_RNN = [
    ({"params": LSTM}, ("params", "LSTMParams", "RNNParams")),
    ({"params": RNN._replace(w_x=zeros(D, 6))}, ("params.w_x", "[4, 6]", "5")),
    ({"params": RNN._replace(w_h=zeros(6, H))}, ("params.w_h", "[6, 5]", "[5, 5]")),
    ({"params": RNN._replace(w_h=zeros(H))}, ("params.w_h", "[5]", "[H, H]")),
    ({"params": RNN._replace(b=zeros(1))}, ("params.b", "[1]", "[5]")),
    ({"params": RNN._replace(w_h=zeros(H, H, dtype=int))}, ("params.w_h", "int", "float")),
    ({"x": zeros(T, B, 3)}, ("[7, 3, 3]", "4")),
    ({"state": LSTM_STATE}, ("state", "LSTMState", "RNNState")),
    ({"state": RNNState(zeros(B, 4))}, ("state.h", "[3, 4]", "[3, 5]")),
    ({"activation": "gelu"}, ("activation", "'gelu'", "'tanh'", "'relu'", "'linear'")),
]
WRONG_GRU = [
    ({"params": RNN}, ("params", "RNNParams", "GRUParams")),
    ({"params": GRU._replace(w_x=zeros(D, 20))}, ("params.w_x", "[4, 20]", "15")),
    ({"params": GRU._replace(w_h=zeros(H, 20))}, ("params.w_h", "[5, 20]", "[5, 15]")),
    ({"params": GRU._replace(b=zeros(2, 15))}, ("params.b", "[2, 15]", "[15]")),
    ({"params": GRU._replace(b_n=zeros(15))}, ("params.b_n", "[15]", "[5]")),
    ({"params": GRU._replace(b=zeros(15, dtype=int))}, ("params.b", "int", "float")),
    ({"x": zeros(T, B, 3)}, ("[7, 3, 3]", "4")),
    ({"state": RNNState(zeros(B, H))}, ("state", "RNNState", "GRUState")),
    ({"state": GRUState(zeros(2, H))}, ("state.h", "[2, 5]", "[3, 5]")),
    ({"reset_after": False}, ("params.b_n", "None", "reset_after=False")),
    ({"reset_after": "no"}, ("reset_after", "'no'", "True or False")),
]
CASES = [
    pytest.param(layer, step, params, changes, parts, id=f"{layer.__name__}-{'-'.join(parts)}")
    for layer, step, params, cases in (
        (lstm, lstm_step, LSTM, WRONG_LSTM),
        (rnn, rnn_step, RNN, WRONG_RNN),
        (gru, gru_step, GRU, WRONG_GRU),
    )
    for changes, parts in cases
]


@pytest.mark.parametrize(("layer", "step", "params", "changes", "parts"), CASES)
def test_wrong_arguments_of_a_layer_and_of_its_step(layer, step, params, changes, parts):
    states = {lstm: LSTM_STATE, rnn: RNNState(zeros(B, H)), gru: GRUState(zeros(B, H))}
    arguments = {"params": params, "state": states[layer]} | changes
    x = arguments.pop("x", XS)
    assert_says(parts, layer, xs=x, **arguments)
    parts = [part.replace("[7, 3, 3]", "[3, 3]") for part in parts]
    assert_says(parts, step, x_t=x[0], **arguments)


@pytest.mark.parametrize(("layer", "params"), [(lstm, LSTM), (rnn, RNN), (gru, GRU)])
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"xs": XS[0]}, ("xs", "[3, 4]", "[T, B, D]")),
        ({"xs": XS[None]}, ("xs", "[1, 7, 3, 4]", "[T, B, D]")),
        ({"mask": zeros(B, T)}, ("mask", "[3, 7]", "[7, 3]")),
        ({"mask": zeros(T, B, 1)}, ("mask", "[7, 3, 1]", "[7, 3]")),
        ({"mask": zeros(T, B, dtype=complex)}, ("mask", "complex", "bool")),
        pytest.param({"mask": KEYS}, ("mask", "key<fry>", "bool"), id="mask of keys"),
        ({"lengths": [1, 2]}, ("lengths", "[2]", "[3]")),
        ({"lengths": 2}, ("lengths", "[]", "[3]")),
        ({"lengths": [1.0, 2.0, 3.0]}, ("lengths", "float", "integer")),
        ({"lengths": [True, False, True]}, ("lengths", "bool", "integer")),
        ({"lengths": [7, 8, 0]}, ("lengths", "8", "0", "7")),
        ({"lengths": jnp.array([7, -1, 0])}, ("lengths", "-1", "0", "7")),
        ({"resets": zeros(T, 1)}, ("resets", "[7, 1]", "[7, 3]")),
        ({"resets": zeros(T, B, dtype=complex)}, ("resets", "complex", "bool")),
        pytest.param({"resets": KEYS}, ("resets", "key<fry>", "bool"), id="resets of keys"),
        ({"method": "loop"}, ("method", "'loop'", "'scan'", "'unrolled'")),
        ({"method": None}, ("method", "None", "'scan'", "'unrolled'")),
        ({"method": np.array(["fused", "scan"])}, ("method", "array", "'scan'", "'unrolled'")),
        ({"unroll": 0}, ("unroll", "0", ">= 1")),
        ({"unroll": 1.5}, ("unroll", "1.5", ">= 1")),
        ({"unroll": True}, ("unroll", "True", ">= 1")),
        ({"reverse": "no"}, ("reverse", "'no'", "True or False")),
        ({"reverse": None}, ("reverse", "None", "True or False")),
    ],
    ids=str,
)
def test_wrong_arguments_of_every_layer(layer, params, changes, parts):
    assert_says(parts, layer, **({"params": params, "xs": XS} | changes))


def test_a_name_may_be_one_of_numpys():
    np.testing.assert_array_equal(*(rnn(RNN, XS, method=m)[1] for m in (np.str_("scan"), "scan")))


def test_a_clip_of_a_projection_that_is_not_there():
    params = LSTM._replace(w_h=zeros(H, 20), w_proj=None)
    assert_says(("proj_clip", "0.5", "w_proj"), lstm, params=params, xs=XS, proj_clip=0.5)


@pytest.mark.parametrize("name", ["cell_clip", "proj_clip", "forget_bias"])
@pytest.mark.parametrize("value", [zeros(H) + 1, zeros(1) + 1, np.complex64(1j), KEYS[0, 0]])
def test_traced_numbers_are_single_and_real(name, value):
    """A bound [H] would bound every unit by its own, and 1j be cut to 0."""
    if name == "forget_bias":
        call = lambda value: init_lstm(jax.random.key(0), D, H, forget_bias=value)  # noqa: E731
    else:
        call = lambda value: lstm(LSTM, XS, **{name: value})  # noqa: E731
    parts = (name, str(value.dtype), str(list(value.shape)), "a single real number")
    assert_says(parts, lambda: jax.jit(call)(value))
    steps = lambda value: lstm_step(LSTM, LSTM_STATE, XS[0], **{name: value})  # noqa: E731
    if name != "forget_bias":
        assert_says(parts, lambda: jax.jit(steps)(value))
    jax.eval_shape(call, np.float32(1))
    jax.eval_shape(jax.vmap(call), np.ones(2, np.float32))


# --- initial weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("init_cell", [init_lstm, init_rnn, init_gru])
@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("input_size", 0, ("0", ">= 1")),
        ("input_size", 2.0, ("2.0", ">= 1")),
        ("hidden_size", -3, ("-3", ">= 1")),
        ("hidden_size", "5", ("'5'", ">= 1")),
        ("init", "orthogonal", ("'orthogonal'", "'lstmjax'", "'keras'")),
        ("dtype", np.int32, ("int32", "float")),
        ("dtype", None, ("None", "float")),
        ("dtype", jnp.float8_e4m3fn, ("float8_e4m3fn", "16 bits")),
        ("key", 0, ("int", "PRNG key")),
        ("key", None, ("NoneType", "PRNG key")),
        ("key", np.zeros(2), ("float64", "PRNG key")),
        ("key", jax.random.split(jax.random.key(0), 3), ("[3]", "a single key")),
        ("key", jax.random.PRNGKey(0)[None], ("[1, 2]", "a single key")),
    ],
)
def test_wrong_arguments_of_init(init_cell, name, value, parts):
    arguments = {"key": jax.random.key(0), "input_size": D, "hidden_size": H} | {name: value}
    assert_says((name, *parts), init_cell, **arguments)


def test_keys_of_both_kinds_give_the_same_weights():
    for init_cell in (init_lstm, init_rnn, init_gru):
        new, old = (init_cell(of(7), D, H) for of in (jax.random.key, jax.random.PRNGKey))
        np.testing.assert_array_equal(new.w_h, old.w_h)


def test_a_law_of_forget_biases_gives_a_pair():
    law = lambda key, h, dtype: jnp.ones(h, dtype)  # noqa: E731
    parts = ("forget_bias", "(b_i, b_f)")
    arguments = {"key": jax.random.key(0), "input_size": D, "hidden_size": H}
    assert_says(parts, init_lstm, forget_bias=law, **arguments)


def test_a_step_wants_a_state():
    for step, params, words in (
        (lstm_step, LSTM, "LSTMState(h, c)"), (rnn_step, RNN, "RNNState(h)"),
        (gru_step, GRU, "GRUState(h)"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as raised:
            step(params, None, XS[0])
        assert str(raised.value) == f"state: got NoneType, expected {words}"


def test_dtypes_that_jax_has_not_are_named():
    other = np.dtype(">f4") if sys.byteorder == "little" else np.dtype("<f4")
    with pytest.raises(ValueError, match="^params.b: got dtype [<>]f4, expected a floating point"):
        lstm(LSTM._replace(b=np.asarray(LSTM.b).astype(other)), XS)
    with pytest.raises(ValueError, match="^xs: got dtype [<>]f4, expected an array"):
        lstm(LSTM, np.asarray(XS).astype(other))
    if np.dtype(np.longdouble).itemsize > 8:
        long = LSTM_STATE._replace(h=np.asarray(LSTM_STATE.h).astype(np.longdouble))
        with pytest.raises(ValueError, match=r"^state.h: got dtype float\d+, expected a floating"):
            lstm(LSTM, XS, long)


def test_numbers_of_eight_bits_are_refused():
    with pytest.raises(ValueError, match="^xs: got dtype float8_e4m3fn, expected one of 16 bits"):
        lstm(LSTM, jnp.asarray(XS, jnp.float8_e4m3fn))


@pytest.mark.parametrize("value", [0, -1, True])
def test_wrong_projection_size(value):
    arguments = {"key": jax.random.key(0), "input_size": D, "hidden_size": H}
    assert_says(("proj_size", repr(value), ">= 1"), init_lstm, proj_size=value, **arguments)


# --- stacks, directions, dropout -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"params": []}, ("params", "one per layer")),
        ({"params": RNN}, ("params", "RNNParams", "one per layer")),
        ({"states": [None, None]}, ("states", "2", "1")),
        ({"dropout": 1.0}, ("dropout", "1.0", "< 1")),
        ({"dropout": -0.1}, ("dropout", "-0.1", "0 <=")),
        ({"dropout": float("nan")}, ("dropout", "nan", "0 <=")),
        ({"dropout": "0.5"}, ("dropout", "'0.5'", "0 <=")),
        ({"dropout": 0.5, "key": 3}, ("key", "int", "PRNG key")),
    ],
    ids=str,
)
def test_wrong_arguments_of_a_stack(changes, parts):
    assert_says(parts, stack, **({"layer": rnn, "params": [RNN], "xs": XS} | changes))


def test_layers_of_a_stack_that_do_not_fit():
    second = RNN._replace(w_x=zeros(H + 1, H))
    assert_says(("xs", "[7, 3, 5]", "6"), stack, layer=rnn, params=[RNN, second], xs=XS)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"params": (RNN, RNN)}, ("params", "tuple", "Bidirectional")),
        ({"state": (None, None)}, ("state", "tuple", "Bidirectional")),
        ({"resets": zeros(T, 1)}, ("resets", "[7, 1]", "[7, 3]")),
        ({"lengths": [0, 0, 8], "resets": zeros(T, B)}, ("lengths", "8", "7")),
    ],
    ids=str,
)
def test_wrong_arguments_of_both_directions(changes, parts):
    arguments = {"layer": rnn, "params": Bidirectional(RNN, RNN), "xs": XS} | changes
    assert_says(parts, bidirectional, **arguments)
    if "state" not in changes:
        arguments["params"] = [arguments["params"]]
        del arguments["layer"]
        assert_says(
            parts, functools.partial(stack, functools.partial(bidirectional, rnn)), **arguments
        )


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
@pytest.mark.parametrize("rate", [1.0, 1.5, -0.1, float("nan"), "0.5", None])
@pytest.mark.parametrize("key", [None, 0])
def test_wrong_rates(drop, rate, key):
    key = None if key is None else jax.random.key(key)
    with pytest.raises(ValueError, match="^rate: got .*, expected 0 <= rate < 1$"):
        drop(key, XS, rate)


def test_variational_dropout_wants_three_axes():
    with pytest.raises(ValueError, match=r"xs.*\[3, 4\].*T, B, F"):
        variational_dropout(jax.random.key(0), XS[0], 0.5)


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_dropout_wants_floating_point_numbers(drop):
    with pytest.raises(ValueError, match="^xs?: got dtype int32, expected a floating"):
        drop(jax.random.key(0), zeros(T, B, D, dtype=np.int32), 0.5)


@pytest.mark.parametrize(
    ("parts", "call"),
    [
        (("forget_bias", "'x'", "finite number"), lambda k: init_lstm(k, 3, 4, forget_bias="x")),
        (("forget_bias", "nan"), lambda k: init_lstm(k, 3, 4, forget_bias=float("nan"))),
        (("peephole", "'no'", "True or False"), lambda k: init_lstm(k, 3, 4, peephole="no")),
        (("bias", "'no'", "True or False"), lambda k: init_rnn(k, 3, 4, bias="no")),
        (("reset_after", "'no'"), lambda k: init_gru(k, 3, 4, reset_after="no")),
        (("dtype", "'nope'", "floating"), lambda k: init_lstm(k, 3, 4, dtype="nope")),
        (("x_t", "list", "array"), lambda k: lstm_step(LSTM, LSTM_STATE, [0.0] * D)),
        (("xs", "str", "array"), lambda k: lstm(LSTM, "abc")),
        (("mask", "str", "array"), lambda k: lstm(LSTM, XS, mask="abc")),
        (("resets", "str", "array"), lambda k: lstm(LSTM, XS, resets="abc")),
        (("x", "list", "array"), lambda k: dropout(k, [1.0], 0.5)),
        (("key", "int", "PRNG key"), lambda k: init_state({}, optax.sgd(0.1), 3)),
        (("tx", "None", "optax transformation"), lambda k: init_state({}, None, k)),
        (("layer", "'lstm'", "function"), lambda k: stack("lstm", [LSTM], XS)),
        (("layer", "None", "function"), lambda k: bidirectional(None, None, XS)),
    ],
)
def test_arguments_of_the_wrong_kind(parts, call):
    assert_says(parts, lambda: call(jax.random.key(0)))
