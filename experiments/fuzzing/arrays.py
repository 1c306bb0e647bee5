"""Readers of arrays and weights: the cache, idx and golden files, safetensors, trees of weights."""

import contextlib
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import parity

from fuzzing.mutations import Again, Files, scratch, taken
from fuzzing.runs import trained
from lstmjax import checkpoint, interop
from lstmjax.data import cache, dataset, imdb, mnist, prepare, prepared, text
from lstmjax.records import to_json

KEY = "k" * 64
WORDS = (text.UNUSED, *"the a film was good bad not it all i loved hated never great".split())


def cache_seeds() -> list[Files]:
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        reviews = {"vocabulary": np.frombuffer("\n".join(WORDS).encode(), np.uint8)}
        digits = {}
        for split in prepared.SPLITS:
            made = text.look_up(["the film was good", "not bad it", "never"][: 1 + seed], WORDS)
            reviews |= {f"{split}_ids": made.ids, f"{split}_offsets": made.offsets}
            reviews[f"{split}_label"] = np.arange(1 + seed, dtype=np.int32) % 2
            digits[f"{split}_image"] = rng.integers(0, 256, (4, 28, 28), np.uint8)
            digits[f"{split}_label"] = rng.integers(0, 10, 4, np.int32)
        with scratch() as folder:
            cache.cached("reviews", KEY, lambda made=reviews: made, folder)
            cache.cached("digits", KEY, lambda made=digits: made, folder)
            found.append(taken(folder))
    return found


def cache_read(folder: Path) -> None:
    def again():
        raise Again("made again")

    stored = cache.cached("reviews", KEY, again, folder, imdb._fits)
    for split in prepared.SPLITS:
        reviews = text.Ragged(stored[f"{split}_ids"], stored[f"{split}_offsets"])
        ids = text.pad(reviews, num_words=12, max_length=5)["ids"]
        assert ids.min() >= 0 and ids.max() < 12
    assert stored["vocabulary"].tobytes().decode().startswith(text.UNUSED)
    stored = cache.cached("digits", KEY, again, folder, mnist._fits)
    assert mnist._lay_out(stored["test_image"], "pixels", None).shape[1:] == (784, 1)


def cache_seal(files: Files) -> Files:
    sealed = dict(files)
    for name, content in files.items():
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files if key != "sha256"}
        packed = io.BytesIO()
        np.savez(packed, sha256=np.array(dataset.content_sha256({KEY: arrays})), **arrays)
        sealed[name] = packed.getvalue()
    return sealed


def idx_seeds() -> list[Files]:
    found = []
    for seed in range(3):
        array = np.random.default_rng(seed).integers(0, 256, (3, 4, 5)[: seed + 1], np.uint8)
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        found.append({"some-ubyte.gz": gzip.compress(header + array.tobytes(), mtime=0)})
    return found


def idx_read(folder: Path) -> None:
    array = prepare.read_idx(folder / "some-ubyte.gz")
    assert array.dtype == np.uint8 and array.nbytes <= prepare.IDX_BYTES


def golden_seeds() -> list[Files]:
    whole = json.loads((parity.GOLDEN / "torch.json").read_text())
    cases = {name: whole["cases"][name] for name in ("t1_b1", "train_adam")}
    names = [f"torch-{name}.npz" for name in cases]
    files = {name: (parity.GOLDEN / name).read_bytes() for name in names}
    return [{"torch.json": to_json(whole | {"cases": cases}), **files}]


def golden_read(folder: Path) -> None:
    for framework, manifest in parity.manifests(folder).items():
        for case, entry in manifest["cases"].items():
            found = parity.read(folder, framework, case, entry)
            assert all(a.dtype.kind in "biufcSU" for a in found.arrays.values())


def golden_seal(files: Files) -> Files:
    manifest = json.loads(files["torch.json"])
    for case, entry in manifest["cases"].items():
        entry["sha256"] = hashlib.sha256(files[f"torch-{case}.npz"]).hexdigest()
    return files | {"torch.json": to_json(manifest)}


# ---- weights ------------------------------------------------------------------------------------


def weights_seeds() -> list[Files]:
    with scratch() as folder:
        checkpoint.save_params(folder / "params.safetensors", trained()[1])
        return [taken(folder)]


def weights_reader() -> Callable[[Path], None]:
    like = trained()[1]

    def read(folder: Path) -> None:
        params = checkpoint.load_params(folder / "params.safetensors", like)
        assert jax.tree.structure(params) == jax.tree.structure(like)

    return read


def interop_seeds() -> list[Files]:
    """Trees of weights as JSON: a leaf is {"shape", "dtype"}, or whatever a change made of it."""
    leaf = {name: {"shape": list(shape), "dtype": "float32"} for name, shape in (
        ("x", (3, 8)), ("h", (2, 8)), ("b", (8,)), ("xt", (8, 3)), ("ht", (8, 2)), ("xh", (5, 8)))
    }  # fmt: skip
    keras = {"kernel": leaf["x"], "recurrent_kernel": leaf["h"], "bias": leaf["b"]}
    torch = {"weight_ih_l0": leaf["xt"], "weight_hh_l0": leaf["ht"]}
    torch |= {"bias_ih_l0": leaf["b"], "bias_hh_l0": leaf["b"]}
    tf1 = {"rnn/lstm_cell/kernel:0": leaf["xh"], "rnn/lstm_cell/bias:0": leaf["b"]}
    haiku = {"lstm/linear": {"w": leaf["xh"], "b": leaf["b"]}}
    both = {"forward_lstm": keras, "backward_lstm": keras}
    alone = [("keras", keras), ("torch", torch)]
    stacks = [*alone, ("tf1", tf1), ("haiku", haiku), ("keras", both)]
    trees = [(*pair, False) for pair in alone] + [(*pair, True) for pair in stacks]
    asked = [{"framework": f, "weights": t, "stack": stack} for f, t, stack in trees]
    return [{"tree.json": to_json(one)} for one in asked]


def interop_read(folder: Path) -> None:
    def built(value):
        if isinstance(value, dict) and isinstance(value.get("dtype"), str):
            with contextlib.suppress(Exception):
                shape = [min(abs(n), 40) for n in value["shape"]]
                return np.zeros(shape, value["dtype"])
        if isinstance(value, dict):
            return {name: built(item) for name, item in value.items()}
        return [built(item) for item in value] if isinstance(value, list) else value

    try:
        asked = json.loads((folder / "tree.json").read_bytes())
        framework, weights = asked["framework"], built(asked["weights"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise Again("no tree") from error
    load = interop.load_stack if asked.get("stack") else interop.load
    load(framework, weights)
