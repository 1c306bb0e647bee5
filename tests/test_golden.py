"""Parity with other frameworks: every golden vector, by the functions of experiments/parity.py."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lstmjax import cli
from lstmjax.records import RunError, validate

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def experiment(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parity = experiment("parity")
MANIFESTS = parity.manifests(GOLDEN)
CASES = [(framework, name) for framework, m in MANIFESTS.items() for name in m["cases"]]


def read(framework, name):
    return parity.read(GOLDEN, framework, name, MANIFESTS[framework]["cases"][name])


def changed(case, name, change):
    """The case with one array replaced by ``change`` of it."""
    return case._replace(arrays={**case.arrays, name: change(case.arrays[name].copy())})


# ---- parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework, name", CASES)
def test_lstmjax_computes_what_the_framework_computed(framework, name):
    case = read(framework, name)
    # Unrolled stacks, and anything unrolled in float32, are left to the experiment: compiling them
    # takes longest, and that methods agree is tested with the methods.
    methods = parity.methods(case) if case.entry["stack"] == "layer" else ["scan"]
    for dtype, method in [*(("float64", method) for method in methods), ("float32", "scan")]:
        found = parity.compare(case, dtype, method)
        bar = {"float64": 1e-10, "float32": 1e-5}[dtype]
        assert {array: e for array, e in found.items() if not e <= bar} == {}, (dtype, method)
        if method == "scan":  # nothing in the file was passed over
            given = ("weights|", "state|", "loss|")
            left = {array for array in case.arrays if not array.startswith(given)} - set(found)
            assert left <= {"x", "mask", "lengths", "train|target"}


def test_what_is_not_too_long_is_run_unrolled_too():
    found = {name: parity.methods(read("torch", name)) for name in ("plain", "t28_b1", "t80_b5")}
    every = ("scan", "fused", "unrolled")
    assert found == {"plain": every, "t28_b1": every, "t80_b5": every[:2]}


# ---- the files ----------------------------------------------------------------------------------


def test_files_and_manifests_name_each_other():
    entries = {
        f"{framework}-{name}.npz": entry["sha256"]
        for framework, manifest in MANIFESTS.items()
        for name, entry in manifest["cases"].items()
    }
    files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in GOLDEN.glob("*.npz")}
    assert files == entries
    for manifest in MANIFESTS.values():
        assert (GOLDEN / manifest["script"]).is_file() and "numpy" in manifest["versions"]


@pytest.mark.parametrize("framework, name", CASES)
def test_every_case_asks_for_everything(framework, name):
    """Random states, a loss on every output, and the gradient of everything given."""
    arrays = read(framework, name).arrays
    states = sorted(a for a in arrays if a.startswith("state|"))
    weights = [a for a in arrays if a.startswith("weights|")]
    finals = {a.replace("state", "final", 1) for a in states}
    assert states and weights and finals == {a for a in arrays if a.startswith("final|")}
    assert {a for a in arrays if a.startswith("loss|")} == {
        "loss|hs", *(a.replace("state", "loss", 1) for a in states)
    }  # fmt: skip
    assert {a for a in arrays if a.startswith("grad|")} == {
        "grad|x", *(f"grad|{a}" for a in states + weights)
    }  # fmt: skip
    for array in ("x", *states, *weights, *(f"loss|{a.partition('|')[2]}" for a in states)):
        values = arrays[array].ravel()
        assert (values != 0).all() and len(set(values)) == len(values), array
    assert all(np.abs(arrays[f"grad|{a}"]).max() > 1e-6 for a in ("x", *weights))


def features(case):
    """What kinds of a case SEMANTICS' list of parity tests asks for this one is."""
    arrays, entry = case.arrays, case.entry
    steps, batch = arrays["x"].shape[:2]
    states = sum(name.startswith("state|") and name.endswith("|h") for name in arrays)
    width = arrays[f"state|{states - 1}|h"].shape[-1]
    directions = arrays["hs"].shape[-1] // width
    names = {name.removeprefix("weights|") for name in arrays if name.startswith("weights|")}
    found = {f"T{steps} B{batch}", f"layers {states // directions}"}
    padded = "lengths" in arrays or "mask" in arrays
    if directions == 2:
        found |= {"bidirectional", *(["bidirectional, padded"] if padded else [])}
    if "lengths" in arrays:
        found |= {"lengths", *(["length 0"] if 0 in arrays["lengths"] else [])}
    if "mask" in arrays:
        rows = arrays["mask"].T
        found |= {pattern for row in rows for pattern in patterns(row)}
    options = [key for key in ("cell_clip", "proj_clip") if key in entry["options"]]
    options += ["peephole"] * ("w_i_diag" in names)
    options += ["projection"] * any("projection" in n or "weight_hr" in n for n in names)
    found.add("+".join(sorted(options)) or "plain")
    found |= {f"{key} {entry['options'][key]}" for key in ("gate", "reverse", "forget_bias")
              if key in entry["options"]}  # fmt: skip
    if "train" in entry:
        found |= {f"train {len(arrays['train|loss'])}", entry["train"]["optimizer"]}
        found |= {key for key in entry["train"] if key.startswith("clip")}
    return found | ({"kernel alone"} if names == {"kernel"} else set())


def patterns(row):
    """Where a row's valid steps lie."""
    if row.all() or not row.any():
        return ["full" if row.all() else "empty"]
    flips = np.flatnonzero(np.diff(row.astype(int)))
    if len(flips) > 1:
        return ["holes"]
    return ["right"] if row[0] else ["left"]


GRID = {"T1 B1", "T2 B5", "T28 B1", "T80 B5"}
EVERYWHERE = {"layers 1", "plain"}
REQUIRED = {
    "tf1": GRID | {
        "layers 2", "bidirectional, padded", "lengths", "length 0", "peephole", "cell_clip",
        "cell_clip+peephole", "projection", "proj_clip+projection", "forget_bias 0.0",
        "cell_clip+peephole+proj_clip+projection", "train 20", "adam", "sgd", "clip_norm",
        "clip_norm_each", "kernel alone",
    },
    "keras": GRID | {
        "layers 2", "bidirectional", "bidirectional, padded", "left", "right", "holes", "full",
        "empty", "reverse True", "gate hard_sigmoid", "gate hard_sigmoid_keras1", "train 20",
        "adam", "sgd",
    },
    "torch": GRID | {
        "layers 2", "bidirectional", "bidirectional, padded", "lengths", "projection", "train 20",
        "adam", "sgd", "clip_norm", "clip_eps",
    },
    "flax_linen": GRID | {
        "layers 2", "bidirectional", "bidirectional, padded", "lengths", "reverse True",
        "gate hard_sigmoid", "train 20", "adam", "clip_norm",
    },
    "flax_nnx": {"layers 2", "bidirectional, padded", "lengths", "train 20", "adam"},
    "flax_nnx_optimized": {"layers 2", "bidirectional, padded", "lengths", "train 20", "adam"},
    "haiku": GRID | {"layers 2", "train 20", "adam"},
    "equinox": GRID | {"train 20", "adam"},
    "cudnn": {"layers 2", "bidirectional", "bidirectional, padded", "lengths"},
}  # fmt: skip


@pytest.mark.parametrize("framework", REQUIRED)
def test_no_kind_of_case_is_missing(framework):
    assert framework in MANIFESTS
    found = set().union(
        *(features(read(framework, name)) for name in MANIFESTS[framework]["cases"])
    )
    assert REQUIRED[framework] | EVERYWHERE <= found


# ---- the comparison can fail --------------------------------------------------------------------


def test_a_weight_a_gate_or_a_gradient_that_is_off_is_seen():
    case = read("torch", "train_sgd")
    exact = parity.errors(case)
    assert max(exact.values()) <= 1e-14 and set(exact) == {"value", "gradient", "train"}

    def nudged(array, by=1e-6):
        array.flat[7] += by
        return array

    moved = parity.errors(changed(case, "weights|weight_hh_l0", nudged))
    assert min(moved.values()) > 1e-10
    in_float32 = changed(case, "weights|weight_hh_l0", lambda array: nudged(array, 1e-3))
    assert min(parity.errors(in_float32, "float32").values()) > 1e-5

    def swapped(array):
        i, f, g, o = np.split(array, 4)
        return np.concatenate([f, i, g, o])

    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"):
        exchanged = parity.errors(changed(case, f"weights|{name}", swapped), "float32")
        assert min(exchanged.values()) > 1e-3

    for name, kind in (
        ("hs", "value"), ("final|0|c", "value"), ("grad|x", "gradient"),
        ("grad|state|0|h", "gradient"), ("grad|weights|bias_hh_l0", "gradient"),
        ("train|loss", "train"), ("train|weights|bias_ih_l0", "train"),
    ):  # fmt: skip
        scaled = parity.errors(changed(case, name, lambda array: array * (1 + 1e-8)))
        assert scaled[kind] > 1e-10
        assert {k: v for k, v in scaled.items() if k != kind} == {
            k: v for k, v in exact.items() if k != kind
        }


def test_clipping_lengths_and_options_matter():
    """What the entry and the integer arrays say is used: another value gives another answer."""
    case = read("tf1", "everything")
    for option in ("forget_bias", "cell_clip", "proj_clip"):
        options = {**case.entry["options"], option: case.entry["options"][option] + 0.01}
        other = case._replace(entry={**case.entry, "options": options})
        assert parity.errors(other)["value"] > 1e-5, option
    case = read("tf1", "lengths")
    assert parity.errors(changed(case, "lengths", lambda n: np.maximum(n, 1)))["value"] > 1e-5
    case = read("torch", "train_adam_clip")
    for setting in ("learning_rate", "clip_norm"):
        train = {**case.entry["train"], setting: 2 * case.entry["train"][setting]}
        other = case._replace(entry={**case.entry, "train": train})
        assert parity.errors(other)["train"] > 1e-10, setting
    plain = {name: value for name, value in case.entry["train"].items() if name != "clip_eps"}
    other = case._replace(entry={**case.entry, "train": plain})
    assert parity.errors(other)["train"] > 1e-10


def test_an_array_without_a_counterpart_is_an_error():
    case = read("torch", "plain")
    missing = {name: array for name, array in case.arrays.items() if name != "grad|x"}
    with pytest.raises(ValueError, match="torch plain: got arrays .*: grad.x$"):
        parity.compare(case._replace(arrays=missing))
    with pytest.raises(ValueError, match="torch plain: got arrays .*: final.1.h$"):
        parity.compare(case._replace(arrays={**case.arrays, "final|1|h": np.zeros(3)}))


def test_the_error_of_an_array():
    error, want = parity.error, np.array([[0.5, -4.0], [1.0, 3.0]])
    assert error(want, want) == 0
    assert error(want + [[0, 0.2], [0.1, 0]], want) == pytest.approx(0.05)
    assert error(want / 8 + [[0, 0], [0.1, 0]], want / 8) == pytest.approx(0.2)
    assert error(want * 0 + 0.1, want * 0) == pytest.approx(0.1)  # nothing to be relative to
    assert error(want * np.nan, want) == np.inf
    valid = np.array([[True], [False]])
    assert error(want, want, valid) == np.inf  # not zero where nothing is valid
    assert error(want * [[1], [0]], want, valid) == 0
    with pytest.raises(ValueError, match="shape"):
        error(want[:1], want)


# ---- the experiment -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder with two of the cases."""
    path = tmp_path / "golden"
    path.mkdir()
    for framework, name in (("equinox", "t1_b1"), ("torch", "train_sgd")):
        shutil.copy(GOLDEN / f"{framework}-{name}.npz", path)
        manifest = MANIFESTS[framework]
        manifest = {**manifest, "cases": {name: manifest["cases"][name]}}
        (path / f"{framework}.json").write_text(json.dumps(manifest))
    return path


def run(folder):
    cli.main(lambda: parity.run(parity.Config(golden=folder, out=str(folder / "run"))))
    return json.loads((folder / "run" / "record.json").read_text())


def failure(folder, capsys):
    """The one line on standard error of a run that fails with status 1."""
    with pytest.raises(SystemExit) as stop:
        run(folder)
    (message,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and not (folder / "run" / "record.json").exists()
    return message


def test_a_run_prints_every_case_and_leaves_a_record(folder, capsys):
    record = run(folder)
    first, equinox, torch, last = capsys.readouterr().out.splitlines()
    assert first.startswith("2 cases") and last.startswith("all within 1e-10 and 1e-05")
    assert equinox.startswith("equinox t1_b1: float64 value ")
    assert torch.startswith("torch train_sgd: float64 value ") and "float32 train " in torch

    assert validate(record) == []
    metrics = record["metrics"]
    kinds = [
        f"{dtype}_{kind}" for dtype in ("float64", "float32") for kind in ("value", "gradient")
    ]
    assert set(metrics) == {
        *(f"{name}_{key}" for name in ("equinox", "torch") for key in ["cases", *kinds]),
        "torch_float64_train", "torch_float32_train",
    }  # fmt: skip
    assert metrics["equinox_cases"] == metrics["torch_cases"] == 1
    case = read("torch", "train_sgd")
    for dtype in ("float64", "float32"):
        largest = {}
        for method in ("scan", "fused", "unrolled"):
            for kind, value in parity.errors(case, dtype, method).items():
                largest[kind] = max(value, largest.get(kind, 0))
        assert largest == {kind: metrics[f"torch_{dtype}_{kind}"] for kind in largest}
    assert record["config"]["vectors"]["torch"]["versions"] == MANIFESTS["torch"]["versions"]
    names = [("equinox", "t1_b1"), ("torch", "train_sgd")]
    lines = [f"{f} {name} {MANIFESTS[f]['cases'][name]['sha256']}" for f, name in names]
    assert record["dataset"]["sha256"] == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert record["seed"] == MANIFESTS["torch"]["seed"]


def test_a_broken_bar_fails_and_names_the_case(folder, capsys):
    case = read("torch", "train_sgd")
    arrays = {**case.arrays, "grad|x": case.arrays["grad|x"] * (1 + 1e-8)}
    np.savez(folder / "torch-train_sgd.npz", **arrays)
    told = failure(folder, capsys)
    assert told.startswith("error: torch train_sgd: got sha256 ")

    manifest = json.loads((folder / "torch.json").read_text())
    new = hashlib.sha256((folder / "torch-train_sgd.npz").read_bytes()).hexdigest()
    manifest["cases"]["train_sgd"]["sha256"] = new
    (folder / "torch.json").write_text(json.dumps(manifest))
    told = failure(folder, capsys)
    assert told.startswith("error: torch train_sgd: got float64 gradient error ")
    assert told.endswith(", expected at most 1e-10")


def test_a_folder_that_is_not_whole_fails(folder, capsys):
    manifest = json.loads((folder / "torch.json").read_text())
    manifest["cases"]["train_sgd"]["options"]["cell_clipp"] = 1.0
    (folder / "torch.json").write_text(json.dumps(manifest))
    assert "torch train_sgd: got cell_clipp, expected" in failure(folder, capsys)
    (folder / "torch.json").unlink()
    assert "torch-train_sgd.npz: no manifest names it" in failure(folder, capsys)
    (folder / "torch-train_sgd.npz").unlink()
    (folder / "equinox-t1_b1.npz").unlink()
    assert "equinox-t1_b1.npz: No such file" in failure(folder, capsys)
    (folder / "equinox.json").unlink()
    with pytest.raises(RunError, match="got no manifests"):
        parity.manifests(folder)
