"""Layers with round numbers, and their weights under other frameworks' names."""

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import Bidirectional, LSTMParams, interop
from lstmjax.weight_trees import flat

T, B, D, H, P = 5, 3, 3, 4, 2


def params(d=D, h=H, *, p=None, peephole=False, seed=0, dtype=np.float32):
    """Random weights: multiples of 1/64, so that even bfloat16 adds 1 without rounding."""
    rng = np.random.default_rng(seed)
    shapes = {"w_x": (d, 4 * h), "w_h": (p or h, 4 * h), "b": (4 * h,)}
    shapes |= {"peephole": (3, h)} if peephole else {}
    shapes |= {"w_proj": (h, p)} if p else {}
    arrays = {n: (rng.integers(-64, 64, s) / 64).astype(dtype) for n, s in shapes.items()}
    return LSTMParams(**jax.tree.map(jnp.asarray, arrays))


def assert_equal(got, want):
    """The same structure, the same dtypes, the same numbers."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def pair(d, h, back=None, *, p=None, seed=0):
    return Bidirectional(params(d, h, p=p, seed=seed), params(d, back or h, p=p, seed=seed + 1))


ONE = [params(D, H, seed=1)]
TWO = [params(D, H, seed=1), params(H, 2, seed=2)]
TWELVE = [params(D, 2, seed=1), *(params(2, 2, seed=k) for k in range(2, 13))]
BOTH = [pair(D, H, 2, seed=1), pair(H + 2, 2, seed=3)]
MIXED = [params(D, H, seed=1), pair(H, 2, seed=2), params(4, 3, seed=4)]


def dumped(framework, layers):
    return [interop.dump(framework, layer) for layer in layers]


def scoped(framework, scopes, layers, sep="/", end=""):
    """Flat names: every entry of each layer under its scope."""
    return {
        f"{scope}{sep}{name}{end}": array
        for scope, layer in zip(scopes, layers, strict=True)
        for name, array in flat(interop.dump(framework, layer)).items()
    }


def numbered(stem, first=""):
    return [stem + (f"_{k}" if k else first) for k in range(12)]
