"""Trees of weights under other frameworks' names: leaves, paths, and what an entry must be.

A tree is a dict (or a list) of trees and arrays. Names may be flat: "a/b" and {"a": {"b": …}} are
the same, and so are "a.b" and {"a": {"b": …}} for PyTorch. A ":0" at the end of a name is dropped.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import checks

GET_WEIGHTS = {  # what Keras's layer.get_weights() lists, by the number of arrays
    2: ("kernel", "recurrent_kernel"),
    3: ("kernel", "recurrent_kernel", "bias"),
    12: tuple(f"{kind}_{gate}" for gate in "icfo" for kind in "WUb"),
}


def separator(framework: str) -> str:
    """What stands between the parts of a framework's flat names."""
    return "." if framework == "torch" else "/"


def leaves(framework: str, weights: Any) -> dict[tuple[str, ...], Any]:
    """Every leaf of ``weights`` under its path; raises ``ValueError`` where two have the same."""
    found = {}
    for path, leaf in _walk(framework, weights):
        if path in found:
            name = separator(framework).join(path)
            raise ValueError(f"weights[{name!r}]: got it twice, expected it once")
        found[path] = leaf
    return found


def _walk(framework: str, weights: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if framework == "keras" and _is_get_weights(weights):
        weights = dict(zip(GET_WEIGHTS[len(weights)], weights, strict=True))
    if not _is_tree(framework, weights):
        raise ValueError(f"weights: got {type(weights).__name__}, expected a dict of arrays")
    for name, value in weights.items() if isinstance(weights, Mapping) else enumerate(weights):
        parts = str(name).removesuffix(":0").split(separator(framework))
        path = tuple(part for part in parts if part != "~")  # Haiku marks methods by a tilde
        inner = _walk(framework, value) if _is_tree(framework, value) else [((), value)]
        for below, leaf in inner:
            yield path + below, leaf


def _is_get_weights(weights: Any) -> bool:
    arrays = isinstance(weights, list | tuple) and all(hasattr(w, "shape") for w in weights)
    return arrays and len(weights) in GET_WEIGHTS


def _is_tree(framework: str, value: Any) -> bool:
    if isinstance(value, Mapping) or (framework == "keras" and _is_get_weights(value)):
        return True
    many = isinstance(value, list | tuple) and len(value) > 0
    return many and all(_is_tree(framework, part) for part in value)


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of nested dicts under their paths joined by "/"."""
    joined = {}
    for name, value in tree.items():
        below = flat(value) if isinstance(value, dict) else {"": value}
        joined |= {f"{name}/{rest}".rstrip("/"): leaf for rest, leaf in below.items()}
    return joined


def nested(found: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Leaves under paths as nested dicts; raises ``ValueError`` where an array has entries."""
    tree = {}
    for path, leaf in found.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"weights: got an array and entries below it, at {part!r}")
        if path[-1] in node:
            raise ValueError(f"weights: got an array and entries below it, at {path[-1]!r}")
        node[path[-1]] = leaf
    return tree


def by_number(names: Iterable[str]) -> list[str]:
    """``names`` as they stand, but those that differ in their last number alone by the number."""
    split = [(*_stem_and_number(name), name) for name in names]
    numbered: dict[str, list] = {}
    for stem, number, name in split:
        numbered.setdefault(stem, []).append((number, name))
    queues = {stem: iter(sorted(pairs)) for stem, pairs in numbered.items()}
    return [next(queues[stem])[1] for stem, _, _ in split]


def _stem_and_number(name: str) -> tuple[str, tuple[int, str]]:
    """("lstm", the number 12) of "lstm_12"; numbers sort as they should, none before 0."""
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :]
    number = digits.lstrip("0")  # not an int: Python reads no more than 4,300 digits
    return stem.removesuffix("_"), (len(number), number) if digits else (-1, "")


def to_array(name: str, leaf: Any) -> jax.Array:
    """A leaf as a floating JAX array; raises ``ValueError`` where it is none."""
    if isinstance(leaf, str | bytes):  # JAX would take it for the name of a dtype
        raise ValueError(f"{name}: got {leaf!r}, expected an array")
    try:
        known = leaf if isinstance(leaf, jax.Array) else _known(leaf)
    except (RuntimeError, TypeError, ValueError) as error:  # PyTorch's meta device, its float8
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name}: got {type(leaf).__name__} ({reason}), expected an array"
        ) from error
    array = checks.as_array(name, known)
    checks.floating(name, array)
    return array


def _known(leaf: Any) -> Any:
    """The content of a foreign tensor or variable, as something that JAX knows."""
    if hasattr(leaf, "detach"):  # a PyTorch tensor; NumPy has no bfloat16 of its own
        leaf = leaf.detach().cpu()
        bfloat16 = str(leaf.dtype) == "torch.bfloat16"
        return jnp.asarray(leaf.float().numpy(), jnp.bfloat16) if bfloat16 else leaf.numpy()
    if hasattr(leaf, "__jax_array__"):  # a Flax variable
        return leaf.__jax_array__()
    return np.asarray(leaf) if hasattr(leaf, "__array__") else leaf


class Entries:
    """The leaves of one layer, each shape-checked when it is taken; knows which were not asked for.

    ``prefix`` is the layer's path in a larger tree, for errors.
    """

    def __init__(self, layer: Mapping[str, Any], prefix: str):
        self.layer, self.prefix, self.asked = layer, prefix, []

    def label(self, name: str) -> str:
        return f"weights[{self.prefix + name!r}]"

    def __contains__(self, name: str) -> bool:
        self.asked.append(name)
        return name in self.layer

    def take(self, name: str, *shape: int | str) -> jax.Array:
        if name not in self:
            expected = f"[{', '.join(map(str, shape))}]"
            given = ", ".join(self.layer) or "none"
            raise ValueError(
                f"{self.label(name)}: got no such entry, expected {expected} (entries: {given})"
            )
        array = to_array(self.label(name), self.layer[name])
        checks.shape(self.label(name), array, shape)
        if 0 in array.shape:
            raise ValueError(f"{self.label(name)}: got shape {list(array.shape)}, expected no 0")
        return array

    def take_gates(self, name: str, rows: int | str, axis: int = 1) -> tuple[jax.Array, int]:
        """An entry of four blocks along ``axis``, [rows, 4H] or [4H, rows], and H."""
        shape = (rows, "4H") if axis else ("4H", rows)
        array = self.take(name, *shape)
        if array.shape[axis] % 4:
            expected = ", ".join(map(str, shape))
            raise ValueError(
                f"{self.label(name)}: got shape {list(array.shape)}, expected [{expected}]"
            )
        return array, array.shape[axis] // 4

    def bias_or_zero(self, hidden: int, dtype: Any, *names: str) -> jax.Array:
        """[4H] sum of the biases of these names; zero where none of them is there."""
        if not any([name in self for name in names]):
            return jnp.zeros(4 * hidden, dtype)
        first, *rest = (self.take(name, 4 * hidden) for name in names)
        return sum(rest, first)

    def finish(self, framework: str) -> None:
        for name in self.layer:
            if name not in self.asked:
                known = ", ".join(dict.fromkeys(self.asked))
                raise ValueError(
                    f"{self.label(name)}: got an entry that a layer of {framework} does not have, "
                    f"expected only {known}"
                )
