"""What the readers and writers of other frameworks' weights refuse, and in which words."""

import jax.numpy as jnp
import numpy as np
import pytest
from foreign import BOTH, MIXED, ONE, TWO, D, H, P, dumped, params, scoped

from lstmjax import interop
from lstmjax.weight_trees import flat

KERAS = interop.dump("keras", ONE[0])
FULL = interop.dump("tf1", params(p=P, peephole=True))
LINEN = flat(interop.dump("flax_linen", ONE[0]))
TORCH = interop.dump("torch", ONE[0])


def less(weights, *names):
    return {name: array for name, array in weights.items() if name not in names}


def resized(weights, name, *shape):
    return weights | {name: jnp.ones(shape, jnp.float32)}


LOAD_ERRORS = [
    ("jax", KERAS, "framework: got 'jax', expected one of 'tf1', 'keras'"),
    ("keras", 5, "weights: got int, expected a dict"),
    ("keras", [1.0, 2.0], "weights: got list, expected a dict"),
    ("keras", {}, r"weights\['recurrent_kernel'\]: got no such entry, expected \[H, 4H\] .*none"),
    ("keras", TORCH, r"weights\['recurrent_kernel'\]: got no such entry.*weight_ih_l0"),
    ("keras", less(KERAS, "kernel"), r"weights\['kernel'\]: got no such entry, expected \[D, 16\]"),
    ("keras", KERAS | {"w_i_diag": KERAS["bias"]}, r"\['w_i_diag'\]: got an entry that a layer of"),
    (
        "keras",
        resized(KERAS, "kernel", D, 12),
        r"\['kernel'\]: got shape \[3, 12\], expected \[D, 16\]",
    ),
    ("keras", resized(KERAS, "kernel", 0, 16), r"\['kernel'\]: got shape \[0, 16\], expected no 0"),
    (
        "keras",
        resized(KERAS, "recurrent_kernel", 4, 14),
        r"got shape \[4, 14\], expected \[H, 4H\]",
    ),
    ("keras", resized(KERAS, "recurrent_kernel", 3, 16), r"\[3, 16\], expected \[4, 16\]"),
    ("keras", resized(KERAS, "bias", 32), r"\['bias'\]: got shape \[32\], expected \[16\]"),
    ("keras", KERAS | {"bias": np.ones(16, int)}, r"\['bias'\]: got dtype int32, expected a float"),
    ("keras", KERAS | {"bias": None}, r"\['bias'\]: got NoneType, expected an array"),
    ("keras", KERAS | {"bias": "f4"}, r"\['bias'\]: got 'f4', expected an array"),
    ("keras", KERAS | {"bias:0": KERAS["bias"]}, r"\['bias'\]: got it twice, expected it once"),
    (
        "keras",
        KERAS | {"bias": {"x": KERAS["bias"]}},
        r"\['bias/x'\]: got an entry that a layer of",
    ),
    ("keras", KERAS | {"bias/x": KERAS["bias"]}, "got an array and entries below it, at 'bias'"),
    ("keras", {"bias/x": KERAS["bias"]} | KERAS, "got an array and entries below it, at 'bias'"),
    ("torch", less(TORCH, "bias_hh_l0"), r"\['bias_hh_l0'\]: got no such entry, expected \[16\]"),
    ("torch", resized(TORCH, "weight_hr_l0", 4, 5), r"\['weight_hr_l0'\]: got shape \[4, 5\], exp"),
    ("torch", resized(TORCH, "weight_hh_l0", 16, 3), r"\[16, 3\], expected \[16, 4\]"),
    ("torch", resized(TORCH, "weight_hh_l0", 15, 3), r"\[15, 3\], expected \[4H, P\]"),
    ("torch", TORCH | {"weight_ih_l1": 1.0}, r"\['weight_ih_l1'\]: got an entry that a layer of t"),
    ("tf1", less(FULL, "w_f_diag"), r"\['w_f_diag'\]: got no such entry, expected \[4\]"),
    (
        "tf1",
        resized(FULL, "projection/kernel", 3, 2),
        r"projection/kernel'\]: got shape \[3, 2\], e",
    ),
    (
        "tf1",
        resized(FULL, "kernel", 2, 16),
        r"\['kernel'\]: got shape \[2, 16\], expected \[D \+ 2, ",
    ),
    ("haiku", {"w": jnp.ones((7, 16))}, r"\['b'\]: got no such entry, expected \[16\]"),
    ("flax_linen", less(LINEN, "hg/bias"), r"\['hg/bias'\]: got no such entry, expected \[4\]"),
    ("flax_linen", less(LINEN, "if/kernel"), r"\['if/kernel'\]: got no such entry, .*\[3, 4\]"),
    ("flax_nnx", LINEN, r"\['if_/kernel'\]: got no such entry"),
    ("flax_nnx_optimized", LINEN, r"\['dense_h/kernel'\]: got no such entry"),
    (
        "equinox",
        resized(EQ := interop.dump("equinox", ONE[0]), "weight_ih", 16),
        r"shape \[16\], exp",
    ),
    ("equinox", resized(EQ, "weight_hh", 16, 3), r"\[16, 3\], expected \[16, 4\]"),
]


@pytest.mark.parametrize(("framework", "weights", "message"), LOAD_ERRORS)
def test_load_refuses(framework, weights, message):
    with pytest.raises(ValueError, match=message):
        interop.load(framework, weights)


class Unreadable:
    """A PyTorch tensor that has no content, or one of a dtype that NumPy has not."""

    dtype, shape = "torch.float32", (16,)

    def __init__(self, error):
        self.error = error

    def detach(self):
        return self

    cpu = detach

    def numpy(self):
        raise self.error


UNREADABLE = [
    NotImplementedError("Cannot copy out of meta tensor; no data!\nMore."),
    TypeError("Got unsupported ScalarType Float8_e4m3fn"),
    ValueError("Quantized"),
]


@pytest.mark.parametrize("error", UNREADABLE)
def test_what_a_tensor_does_not_give_is_one_line_that_names_it(error):
    weights = TORCH | {"bias_ih_l0": Unreadable(error)}
    reason = str(error).split("\n")[0]
    for call in (interop.load, interop.load_stack):
        with pytest.raises(ValueError, match="bias_ih_l0") as caught:
            call("torch", weights)
        message = f"weights['bias_ih_l0']: got Unreadable ({reason}), expected an array"
        assert str(caught.value) == message
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("forget_bias", ["1", float("nan")])
def test_forget_bias_is_a_number(forget_bias):
    for call, given in (
        (interop.load, KERAS),
        (interop.dump, ONE[0]),
        (interop.load_stack, [KERAS]),
    ):
        with pytest.raises(ValueError, match="forget_bias: got .*, expected a finite number"):
            call("keras", given, forget_bias=forget_bias)


KERAS_TWO = dict(zip("ab", dumped("keras", TWO), strict=True))
STACK_ERRORS = [
    ("jax", {}, "framework: got 'jax'"),
    ("keras", {}, "weights: got no layers, expected one or more"),
    ("keras", KERAS_TWO | {"dense": {"kernel": 1.0}}, r"\['dense/kernel'\]: got an entry of"),
    ("keras", dict(zip("ab", dumped("keras", TWO[::-1]), strict=True)),
     r"weights\['b'\]: got a layer for 3 inputs, expected 2, the outputs"),
    ("keras", {"a": KERAS, "b": resized(KERAS, "bias", 3)}, r"\['b/bias'\]: got shape \[3\]"),
    ("keras", {"forward_a": KERAS, "backward_a": KERAS, "forward_b": KERAS},
     "got forward_a, forward_b, backward_a, expected one forward and one backward"),
    ("keras", {"forward": KERAS, "backward": interop.dump("keras", params(2, 3))},
     r"weights\['backward'\]: got a direction for 2 inputs, expected 3, as the other"),
    ("keras", {"forward": KERAS_TWO, "backward": KERAS_TWO},
     r"weights\['forward/a'\]: got the first of 2 layers in one direction, expected one"),
    ("keras", {"forward": KERAS, "backward": 1.0}, r"\['backward'\]: got an entry of no"),
    ("torch", scoped("torch", ["lstm"], ONE, ".") | {"emb.weight": 1.0}, r"\['emb.weight'\]: got"),
    ("torch", TORCH | {"alpha": 1.0}, r"\['alpha'\]: got an entry of no torch LSTM layer"),
    ("torch", {n.replace("l0", "l1"): w for n, w in TORCH.items()}, r"\['weight_ih_l0'\]: got no"),
    ("torch", TORCH | {"weight_ih_l0_reverse": TORCH["weight_ih_l0"]},
     r"\['weight_hh_l0_reverse'\]: got no such entry"),
    ("haiku", {"lstm": interop.dump("haiku", ONE[0]), "linear": interop.dump("haiku", ONE[0])},
     r"\['linear/w'\]: got an entry of no haiku LSTM layer"),
    ("tf1", {"rnn/lstm_cell": FULL, "dense": {"kernel": jnp.ones((5, 4))}},
     r"\['dense/kernel'\]: got an entry of no tf1 LSTM layer"),
    # Their shapes are those of an LSTM.
    ("tf1", {"rnn/basic_rnn_cell": FULL}, r"\['rnn/basic_rnn_cell/.*'\]: got an entry of no tf1"),
    ("tf1", {"rnn/gru_cell/gates": FULL}, r"\['rnn/gru_cell/gates/.*'\]: got an entry of no tf1"),
    ("haiku", {"mlp/linear": interop.dump("haiku", ONE[0])}, r"\['mlp/linear/.*no haiku"),
]  # fmt: skip


@pytest.mark.parametrize(("framework", "weights", "message"), STACK_ERRORS)
def test_load_stack_refuses(framework, weights, message):
    with pytest.raises(ValueError, match=message):
        interop.load_stack(framework, weights)


PLAIN = ONE[0]
DUMP_ERRORS = [
    (interop.dump, "jax", PLAIN, "framework: got 'jax'"),
    (interop.dump, "keras", tuple(PLAIN), "params: got tuple, expected LSTMParams"),
    (interop.dump, "keras", params(p=P), "params.w_proj: got an array, expected None: keras has"),
    (interop.dump, "torch", params(peephole=True), "params.peephole: got an array, expected None"),
    (
        interop.dump,
        "tf1",
        PLAIN._replace(b=jnp.ones(3)),
        r"params.b: got shape \[3\], expected \[16",
    ),
    (interop.dump, "tf1", PLAIN._replace(w_x=jnp.ones((3, 4))), r"params.w_x: got shape \[3, 4\]"),
    (interop.dump, "tf1", PLAIN._replace(w_h=jnp.ones((3, 16))), r"params.w_h: .*\[4, 16\]"),
    (interop.dump, "tf1", PLAIN._replace(w_h=jnp.ones((3, 15))), r"params.w_h: .*\[3, 15\], exp"),
    (interop.dump, "tf1", PLAIN._replace(b=None), "params.b: got NoneType, expected an array"),
    (interop.dump, "tf1", PLAIN._replace(b=jnp.ones(16, int)), "params.b: got dtype int32"),
    (interop.dump, "tf1", PLAIN._replace(peephole=jnp.ones(3)), "params.peephole: got shape"),
    (interop.dump, "tf1", PLAIN._replace(w_proj=jnp.ones((4, 3))), "params.w_proj: got shape"),
    (interop.dump_stack, "tf1", ONE, "framework: got 'tf1', expected one of 'torch', 'keras'"),
    (interop.dump_stack, "keras", [], "layers: got no layers, expected one or more"),
    (interop.dump_stack, "keras", PLAIN, "layers: got LSTMParams, expected a list"),
    (interop.dump_stack, "keras", [None], r"layers\[0\]: got NoneType, expected LSTMParams"),
    (interop.dump_stack, "keras", TWO[::-1], r"layers\[1\]: got a layer for 3 inputs, expected 2"),
    (interop.dump_stack, "torch", TWO, r"layers\[1\]: got 1 direction\(s\) with w_h \[2, 8\]"),
    (interop.dump_stack, "torch", MIXED, r"layers\[1\]: got 2 direction\(s\)"),
    (interop.dump_stack, "torch", BOTH[:1], r"layers\[0\]: got 2 direction\(s\) with w_h \[2, 8\]"),
]


@pytest.mark.parametrize(("dump", "framework", "given", "message"), DUMP_ERRORS)
def test_dump_refuses(dump, framework, given, message):
    with pytest.raises(ValueError, match=message):
        dump(framework, given)


def test_cudnn_refuses():
    with pytest.raises(ValueError, match=r"flat: got shape \[5\], expected \[144\]"):
        interop.load_cudnn(np.ones(5), D, H)
    with pytest.raises(ValueError, match="input_size: got 0, expected a whole number >= 1"):
        interop.load_cudnn(np.ones(5), 0, H)
    with pytest.raises(ValueError, match="num_layers: got 1.5, expected a whole number >= 1"):
        interop.load_cudnn(np.ones(5), D, H, num_layers=1.5)
    with pytest.raises(ValueError, match="bidirectional: got 1, expected True or False"):
        interop.load_cudnn(np.ones(5), D, H, bidirectional=1)
    with pytest.raises(ValueError, match="layers: got a projection, expected none"):
        interop.dump_cudnn([params(p=P)])
