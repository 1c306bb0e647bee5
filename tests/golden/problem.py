"""The random numbers of a golden case: what a script ``make_<framework>.py`` gives its framework.

All sizes differ, so that no two axes can be taken for one another: T 7, B 4, D 3, H 5 (6 in a
second layer), P 2.
"""

import platform
import zlib
from importlib.metadata import version

import numpy as np
from golden import nested

SEED = 1997
HIDDEN, SECOND, PROJECTION = 5, 6, 2
GRID = {"t1_b1": (1, 1), "t2_b5": (2, 5), "t28_b1": (28, 1), "t80_b5": (80, 5)}
LENGTHS = (3, 7, 1, 5)  # unsorted, with the shortest and the longest


def problem(case, shapes, states, *, steps=7, batch=4, features=3, lengths=None, scale=0.6):
    """The given arrays of a case.

    Args:
      case: its name; with SEED it determines the numbers, whatever other cases there are.
      shapes: nested dict, the shapes of the framework's weights.
      states: for each layer a tuple of (P, H), one for each direction.
      steps, batch, features: T, B, D.
      lengths: [B] integers or None. The padding of x holds random numbers too.
      scale: standard deviation of the weights; 0.6 leaves gates neither linear nor saturated.

    Returns:
      A nested dict with ``weights``, ``x``, ``state`` and ``loss``, and ``lengths`` if given.
    """
    rng = np.random.default_rng([SEED, zlib.crc32(case.encode())])
    names = flat_shapes(shapes)
    sizes = [size for layer in states for size in layer]

    def state():
        parts = (
            {"h": rng.normal(size=(batch, p)), "c": rng.normal(size=(batch, h))} for p, h in sizes
        )
        return {str(n): part for n, part in enumerate(parts)}

    arrays = {
        "weights": nested({name: scale * rng.normal(size=names[name]) for name in sorted(names)}),
        "x": rng.normal(size=(steps, batch, features)),
        "state": state(),
        "loss": {"hs": rng.normal(size=(steps, batch, sum(p for p, _ in states[-1]))), **state()},
    }
    if lengths is not None:
        arrays["lengths"] = np.asarray(lengths, np.int64)
        arrays["loss"]["hs"] *= np.arange(steps)[:, None, None] < arrays["lengths"][:, None]
    return arrays


def target(arrays):
    """What the outputs of a case are trained towards: [T, B, ·] within the range of an LSTM."""
    rng = np.random.default_rng([SEED, arrays["loss"]["hs"].size])
    return rng.uniform(-0.9, 0.9, arrays["loss"]["hs"].shape)


def flat_shapes(tree, prefix=""):
    """Nested dicts of arrays or shapes as one dict of shapes with names joined by "|"."""
    out = {}
    for name, value in tree.items():
        if hasattr(value, "items"):
            out.update(flat_shapes(value, f"{prefix}{name}|"))
        else:
            out[f"{prefix}{name}"] = tuple(getattr(value, "shape", value))
    return out


def versions(*packages):
    """package → version, Python's too."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
