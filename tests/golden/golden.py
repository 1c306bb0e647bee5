"""Golden vectors: what other frameworks computed, in files that need only NumPy to be read.

A case is one ``<framework>-<case>.npz`` beside this file, and an entry in ``<framework>.json``. The
scripts ``make_<framework>.py`` write both from the framework itself, in float64; run one again in
an environment of the versions that its manifest names, and it writes the same numbers.

Arrays of a case (nested names are joined by "|"; T, B, D, H, P as everywhere, time first):

    weights|…          under the framework's own names, as interop.load or load_stack takes them
    x                  [T, B, D]
    state|n|h, |c      initial states [B, P], [B, H]; n counts directions, then layers
    mask, lengths      [T, B] bool, [B] integers, where the case has them
    loss|hs, |n|h, |c  random weights of the loss  Σ loss·(hs, final states);  0 at invalid steps
    hs, final|n|h, |c  outputs [T, B, ·] (at invalid steps what the framework gives), final states
    grad|x, grad|state|n|h, …, grad|weights|…    the loss's gradients
    train|target, train|loss, train|weights|…    20 optimiser steps on mean((hs − target)²) from the
                       same weights, x and initial states (which stay as they are): the loss before
                       each step, and the weights after the last one

Entry of a case in the manifest: ``sha256`` of the file; ``load``: interop's name of the framework;
``stack``: "layer" (one layer and direction: interop.load) or "stack" (interop.load_stack);
``options``: keywords of interop.load and of the layer that are not arrays (forget_bias, cell_clip,
proj_clip, reverse, gate); ``train``: {"optimizer", "learning_rate", "eps", …} where it trains.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent


def flat(tree, prefix=""):
    """Nested dicts of arrays as one dict with names joined by "|"."""
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{name}|"))
        else:
            out[prefix + str(name)] = np.asarray(value)
    return out


def nested(arrays):
    """The inverse of ``flat``."""
    tree = {}
    for name, value in arrays.items():
        *path, last = name.split("|")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def write(framework, cases, *, script, versions, seed):
    """Writes all cases of a framework and its manifest.

    Args:
      framework: the manifest's name.
      cases: case name → (nested dict of arrays, manifest entry without ``sha256``).
      script: the file name of the script that calls this.
      versions: package name → version.
      seed: of all random numbers.
    """
    for old in FOLDER.glob(f"{framework}-*.npz"):
        old.unlink()
    entries = {}
    for case, (arrays, entry) in cases.items():
        path = FOLDER / f"{framework}-{case}.npz"
        arrays = flat(arrays)
        for name, array in arrays.items():
            kinds = (np.float64, np.bool_, np.int64)
            assert array.dtype in kinds, f"{framework} {case} {name}: {array.dtype}"
            assert array.dtype != np.float64 or np.isfinite(array).all(), f"{case} {name}"
        np.savez_compressed(path, **arrays)  # NumPy gives every entry the same date: 1980
        entries[case] = {"sha256": sha256(path), **entry}
    manifest = {"script": script, "seed": seed, "versions": versions, "cases": entries}
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (FOLDER / f"{framework}.json").write_text(text, encoding="utf-8")


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def manifests():
    """framework → manifest, of every one that is there."""
    files = sorted(FOLDER.glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def read(framework, case):
    """The nested arrays of a case."""
    with np.load(FOLDER / f"{framework}-{case}.npz", allow_pickle=False) as file:
        return nested(dict(file))
