"""Weights of other frameworks: read into ``LSTMParams`` and written back.

    load, dump                one layer and direction (``layouts.py`` lists every framework's names)
    load_stack, dump_stack    whole models
    load_cudnn, dump_cudnn    the flat vector of cuDNN and ``jax.experimental.rnn``
    load_keras_file           the LSTM layers of a file that Keras saved

No other framework is imported: weights come as (nested) dicts under the framework's own names,
and anything that can be made an array may stand in them. Letters: D input, H hidden, P projection.
"""

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import checks, layouts, weight_trees
from lstmjax.keras_files import KerasFile as KerasFile
from lstmjax.keras_files import load_keras_file as load_keras_file
from lstmjax.layouts import FRAMEWORKS as FRAMEWORKS
from lstmjax.lstm import LSTMParams
from lstmjax.recurrence import Bidirectional

STACKS = ("torch", "keras", "flax_linen", "flax_nnx", "flax_nnx_optimized")
_OTHERS = ("basic_rnn", "dense", "gru", "mlp", "vanilla_rnn")  # in names of what is no LSTM


def load(framework: str, weights: Any, *, forget_bias: float | None = None) -> LSTMParams:
    """One layer and direction of another framework.

    Args:
      framework: one of ``FRAMEWORKS``.
      weights: a (nested) dict under the names that ``layouts.py`` lists; "a/b" and {"a": {"b": …}}
        are the same, a ":0" at the end is dropped. Leaves are arrays of NumPy, JAX, PyTorch or
        TensorFlow, or variables of theirs and of Flax. For "keras" also what
        ``layer.get_weights()`` lists: 2 or 3 arrays, or Keras 1's 12.
      forget_bias: added to the forget gate's bias; None for what the framework adds while running:
        1 for "tf1" and "haiku", 0 for the others.

    Returns:
      ``LSTMParams`` in the dtype of ``weights``. Only JAX operations are used, so the gradient
      through ``load`` is that with respect to the framework's own weights.

    Raises:
      ValueError: an entry that is missing, unknown, of the wrong shape or not floating; a
        ``forget_bias`` that is no number.
    """
    checks.one_of("framework", framework, FRAMEWORKS)
    tree = weight_trees.nested(weight_trees.leaves(framework, weights))
    return layouts.read(framework, tree, (), forget_bias)


def dump(framework: str, params: LSTMParams, *, forget_bias: float | None = None) -> dict:
    """The inverse of ``load``: ``load(framework, dump(framework, params))`` gives ``params``.

    With a forget bias that is added while running this holds but for the rounding of b - 1 + 1.
    PyTorch's first bias becomes ``b``, its second zero: the same function, but in training two
    biases move twice as far as one.

    Args:
      framework: one of ``FRAMEWORKS``.
      params: ``LSTMParams``.
      forget_bias: what the framework will add to the forget gate's bias; None as in ``load``.

    Returns:
      A (nested) dict of arrays under the names that ``layouts.py`` lists, with all the biases.

    Raises:
      ValueError: peepholes (only "tf1" has them), a projection (only "tf1" and "torch" have it),
        weights that do not fit one another, a ``forget_bias`` that is no number.
    """
    checks.one_of("framework", framework, FRAMEWORKS)
    layouts.check("params", params)
    for field, having in (("peephole", ("tf1",)), ("w_proj", ("tf1", "torch"))):
        if getattr(params, field) is not None and framework not in having:
            raise ValueError(
                f"params.{field}: got an array, expected None: {framework} has no such weights"
            )
    params = LSTMParams(*(None if w is None else jnp.asarray(w) for w in params))
    params = layouts.add_forget_bias(params, framework, forget_bias, -1)
    with jax.numpy_dtype_promotion("standard"):  # for layers whose weights differ in dtype
        return layouts.WRITERS[framework](params)


def load_stack(framework: str, weights: Any, *, forget_bias: float | None = None) -> list:
    """Whole models: every LSTM layer of a tree of weights.

    The tree is made of dicts (or lists) of layers, each as ``load`` takes it. Levels between may
    have any name and depth (``cell``, ``multi_rnn_cell``, ``params``), and names may be flat, as
    "rnn/multi_rnn_cell/cell_0/lstm_cell/kernel:0" or "lstm.weight_ih_l0". For "torch" it is the
    state_dict of ``nn.LSTM`` or of a model of them. Two children whose names begin with forward
    and backward, or fw and bw, are one bidirectional layer. The ``rngs`` of nnx are passed over.

    Layers stand in the order of the dict, but names that differ in their last number alone in the
    order of the numbers: JAX sorts the keys of dicts, and puts lstm_10 before lstm_2. Lists stand
    as they are, and so does everything in an OrderedDict. Two things a tree may not tell: after
    such a sorting, the order of names like bidirectional and lstm; and that LSTMCell_0 and
    LSTMCell_1 of a compact Flax module are one bidirectional layer. Where the sizes do not fit
    this is an error; say it by a list, and by
    {"forward": params["LSTMCell_0"], "backward": params["LSTMCell_1"]}.

    Args:
      framework: one of ``FRAMEWORKS``.
      weights: the tree, of LSTM layers alone: take embeddings and heads out first.
      forget_bias: as in ``load``.

    Returns:
      One entry per layer, ``LSTMParams`` or ``Bidirectional(forward, backward)``: what
      ``stack(lstm, …)`` or ``stack(partial(bidirectional, lstm), …)`` takes.

    Raises:
      ValueError: an entry that belongs to no LSTM layer, a layer that does not read the outputs of
        the one before, no layers at all; what ``load`` raises.
    """
    checks.one_of("framework", framework, FRAMEWORKS)
    leaves = weight_trees.leaves(framework, weights)
    if framework in ("flax_nnx", "flax_nnx_optimized"):
        leaves = {path: leaf for path, leaf in leaves.items() if "rngs" not in path}
    if framework in ("tf1", "haiku"):  # a dense layer has the same entries: tell it by its name
        other = [path for path in leaves if not any("lstm" in part.lower() for part in path)]
        if len(other) == len(leaves):  # layers may have any name but that of another kind
            other = [path for path in other if _is_other(path)]
        if other:
            raise _no_layer(framework, other[0])
    tree = weight_trees.nested(leaves)
    found = _layers(framework, tree, (), forget_bias, isinstance(weights, OrderedDict))
    _check_sizes("weights", found)
    return [layer for _, layer in found]


def dump_stack(framework: str, layers: Sequence) -> dict:
    """The inverse of ``load_stack``, for the frameworks that name the layers of a model themselves.

    Args:
      framework: "torch" (the state_dict of ``nn.LSTM``), "keras" (layers lstm, lstm_1, …,
        bidirectional, …), "flax_linen" (the parameters of an ``nn.Sequential``), "flax_nnx" or
        "flax_nnx_optimized" (an ``nnx.Sequential`` as a pure dict).
      layers: ``LSTMParams`` or ``Bidirectional(forward, backward)``, one per layer.

    Returns:
      A (nested) dict of arrays.

    Raises:
      ValueError: another framework, no layers, layers that do not read one another's outputs, for
        "torch" layers of unequal H, P or kind; what ``dump`` raises.
    """
    checks.one_of("framework", framework, STACKS)
    _check_stack(layers)
    if framework == "torch":
        return _torch_state_dict(layers)
    tree, seen = {}, Counter()
    for number, layer in enumerate(layers):
        parts = [dump(framework, params) for params in _directions(layer)]
        kind = "lstm" if len(parts) == 1 else "bidirectional"
        name = f"{kind}_{seen[kind]}" if seen[kind] else kind
        seen[kind] += 1
        inner = "lstm"
        if framework != "keras":
            parts, inner = [{"cell": part} for part in parts], "rnn"
            name = f"layers_{number}" if framework == "flax_linen" else number
        both = dict(zip((f"forward_{inner}", f"backward_{inner}"), parts, strict=False))
        tree[name] = both if kind == "bidirectional" else parts[0]
    return tree if framework in ("keras", "flax_linen") else {"layers": tree}


def load_cudnn(
    flat: Any,
    input_size: int,
    hidden_size: int,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
) -> list:
    """cuDNN's weights, one vector, as ``jax.experimental.rnn`` and ``torch`` keep them.

    First W_ih [4H, D] and W_hh [4H, H] of every layer and direction, then b_ih and b_hh [4H] of
    every one, gates i, f, g, o; the directions of a layer follow one another. (AMD's MIOpen swaps
    the last two gates: see ``jax.experimental.rnn.swap_lstm_gates``.)

    Args:
      flat: [N] weights, floating.
      input_size: D of the lowest layer.
      hidden_size: H.
      num_layers: how many.
      bidirectional: whether each layer has two directions.

    Returns:
      One ``LSTMParams`` or ``Bidirectional(forward, backward)`` per layer.

    Raises:
      ValueError: sizes below 1, a vector of another length than the sizes give, no flag.
    """
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        checks.positive_int(name, size)
    checks.positive_int("num_layers", num_layers)
    checks.flag("bidirectional", bidirectional)
    sides = 2 if bidirectional else 1
    shapes = []
    for number in range(num_layers * sides):
        size = input_size if number < sides else sides * hidden_size
        shapes += [(4 * hidden_size, size), (4 * hidden_size, hidden_size)]
    shapes += [(4 * hidden_size,)] * (2 * num_layers * sides)
    flat = weight_trees.to_array("flat", flat)
    checks.shape("flat", flat, (sum(map(math.prod, shapes)),))
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    arrays = [a.reshape(s) for a, s in zip(jnp.split(flat, ends), shapes, strict=True)]
    half = len(arrays) // 2
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    params = [
        load("torch", dict(zip(names, arrays[k : k + 2] + arrays[half + k :][:2], strict=True)))
        for k in range(0, half, 2)
    ]
    if not bidirectional:
        return params
    return [Bidirectional(*pair) for pair in zip(params[::2], params[1::2], strict=True)]


def dump_cudnn(layers: Sequence) -> jax.Array:
    """The inverse of ``load_cudnn``; the first of the two biases is ``b``, the second zero.

    Args:
      layers: ``LSTMParams`` or ``Bidirectional(forward, backward)``, one per layer, of one H.

    Returns:
      [N] weights.

    Raises:
      ValueError: no layers, layers of unequal H or kind or that do not read one another's outputs,
        peepholes, a projection.
    """
    _check_stack(layers)
    weights = _torch_state_dict(layers)
    if any(name.startswith("weight_hr") for name in weights):
        raise ValueError("layers: got a projection, expected none: cuDNN's vector has no place")
    first = [w.ravel() for name, w in weights.items() if name.startswith("weight")]
    last = [w for name, w in weights.items() if name.startswith("bias")]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.concatenate(first + last)


# --- whole models --------------------------------------------------------------------------------


def _layers(
    framework: str, tree: dict, path: tuple[str, ...], forget_bias: Any, as_it_stands: bool
) -> list[tuple[str, Any]]:
    """The layers below ``path`` in order, each with the path it stands at."""
    here = weight_trees.separator(framework).join(path)
    if framework == "torch" and any(re.match("(weight|bias)_[ih][hr]_l", name) for name in tree):
        return _torch_layers(tree, path, forget_bias)
    if any(name in tree for name in layouts.RECURRENT[framework]):
        return [(here, layouts.read(framework, tree, path, forget_bias))]
    found, pair = [], _pair(here, tree)
    for name in tree if as_it_stands else weight_trees.by_number(tree):
        if name in pair[1:]:
            continue  # it stands where its forward direction stands
        sides = []
        for side in pair if name in pair else (name,):
            if not isinstance(tree[side], dict):
                raise _no_layer(framework, (*path, side))
            sides.append(_layers(framework, tree[side], (*path, side), forget_bias, as_it_stands))
        found += [(here, _both(sides))] if name in pair else sides[0]
    return found


def _pair(here: str, tree: dict) -> tuple[str, ...]:
    """The names of the two directions of a bidirectional layer, or none."""
    forward = [name for name in tree if re.match(r"(forward|fw)(_|$)", name)]
    backward = [name for name in tree if re.match(r"(backward|bw)(_|$)", name)]
    if forward and backward and len(forward + backward) > 2:
        raise ValueError(
            f"weights[{here!r}]: got {', '.join(forward + backward)}, expected one forward and one "
            "backward direction"
        )
    return (forward[0], backward[0]) if forward and backward else ()


def _both(sides: list[list[tuple[str, Any]]]) -> Bidirectional:
    for side in sides:
        if len(side) != 1 or isinstance(side[0][1], Bidirectional):
            raise ValueError(
                f"weights[{side[0][0]!r}]: got the first of {len(side)} layers in one direction, "
                "expected one layer in each: the directions of such stacks meet only at the top"
            )
    [(_, forward)], [(name, backward)] = sides
    if forward.w_x.shape[0] != backward.w_x.shape[0]:
        raise ValueError(
            f"weights[{name!r}]: got a direction for {backward.w_x.shape[0]} inputs, expected "
            f"{forward.w_x.shape[0]}, as the other"
        )
    return Bidirectional(forward, backward)


def _torch_layers(tree: dict, path: tuple[str, ...], forget_bias: Any) -> list[tuple[str, Any]]:
    """The layers of one nn.LSTM, whose number and direction end the names."""
    groups: dict[tuple[int, str], dict] = {}
    for name in tree:
        matched = re.fullmatch(r"(?:weight|bias)_[ih][hr]_l(\d+)(_reverse)?", name)
        if matched is None:
            raise _no_layer("torch", (*path, name))
        number, side = matched.groups()
        groups.setdefault((int(number), side or ""), {})[name] = tree[name]
    sides = ("", "_reverse") if any(side for _, side in groups) else ("",)
    layers = []
    for number in range(max(number for number, _ in groups) + 1):
        found = []
        for side in sides:
            name = ".".join((*path, f"weight_ih_l{number}{side}"))
            if (number, side) not in groups:
                raise ValueError(f"weights[{name!r}]: got no such entry, expected [4H, D]")
            params = layouts.read("torch", groups[number, side], path, forget_bias)
            found.append([(name, params)])
        layers.append((found[0][0][0], _both(found) if len(found) == 2 else found[0][0][1]))
    return layers


def _torch_state_dict(layers: Sequence) -> dict:
    weights = {}
    first = _directions(layers[0])
    for number, layer in enumerate(layers):
        parts = _directions(layer)
        for params in parts:
            if len(parts) != len(first) or params.w_h.shape != first[0].w_h.shape:
                raise ValueError(
                    f"layers[{number}]: got {len(parts)} direction(s) with w_h "
                    f"{list(params.w_h.shape)}, expected {len(first)} with "
                    f"{list(first[0].w_h.shape)}, as layer 0"
                )
        for suffix, params in zip((f"_l{number}", f"_l{number}_reverse"), parts, strict=False):
            for name, array in dump("torch", params).items():
                weights[name.removesuffix("_l0") + suffix] = array
    return weights


def _directions(layer: Any) -> tuple:
    return tuple(layer) if isinstance(layer, Bidirectional) else (layer,)


def _check_stack(layers: Any) -> None:
    """Raises ``ValueError`` unless ``layers`` are layers that read one another's outputs."""
    if not isinstance(layers, list | tuple) or hasattr(layers, "_fields"):
        raise ValueError(f"layers: got {type(layers).__name__}, expected a list, one per layer")
    for number, layer in enumerate(layers):
        for params in _directions(layer):
            layouts.check(f"layers[{number}]", params)
    _check_sizes("layers", list(enumerate(layers)))


def _check_sizes(argument: str, layers: list[tuple[Any, Any]]) -> None:
    """Raises ``ValueError`` unless every layer reads the outputs of the one before it."""
    if not layers:
        raise ValueError(f"{argument}: got no layers, expected one or more")
    outputs = None
    for name, layer in layers:
        for params in _directions(layer):
            size = params.w_x.shape[0]
            if outputs not in (None, size):
                raise ValueError(
                    f"{argument}[{name!r}]: got a layer for {size} inputs, expected {outputs}, "
                    "the outputs of the layer before it"
                )
        outputs = sum(params.w_h.shape[0] for params in _directions(layer))


def _is_other(path: tuple[str, ...]) -> bool:
    """Whether a name in the path says that this is another kind of layer."""
    return any(kind in part.lower() for part in path for kind in _OTHERS)


def _no_layer(framework: str, path: tuple[str, ...]) -> ValueError:
    name = weight_trees.separator(framework).join(path)
    return ValueError(
        f"weights[{name!r}]: got an entry of no {framework} LSTM layer, expected LSTM layers alone"
    )
