"""experiments/smnist.py: which pixels it reads in which order, its settings, and a run of it."""

import dataclasses
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from lstmjax.cli import ConfigError
from lstmjax.data.dataset import make_dataset
from lstmjax.data.permutations import PERMUTATIONS
from lstmjax.records import matching_row, validate
from lstmjax.tables import _NO_SETTINGS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "smnist.py"

_spec = importlib.util.spec_from_file_location("smnist_experiment", SCRIPT)
smnist = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = smnist  # where its dataclass looks for its annotations
_spec.loader.exec_module(smnist)

# Hashes from tests/test_permutations.py, of 784 and of 196 positions.
HASHES = {
    "small": "96bdb95018ff1ad836b16e8e87337bfb88bab5001d3385fde05c292b27fd4fce",
    "small-permuted": "c4e50b70c46de9550e0d3d91d8ce583f9ae1ef189ecf7b87c213f9f3eb56afcb",
    "pixels": "b608df37c700252ea49c332221bee218c64831224cf032c2b64703afbd789d0a",
    "numpy-92916": "96240fe27409981c3ed3e92c20d995f7103a94c2282307bc776923030113be74",
    "torch-12008": "f4113bc8ae78902146fba54feaff34c7de185249d3b85ce9584e3d76ca98b3bd",
    "numpy-0": "fe62e3fef305ce16e55f08cd0056a8b237e12af6c9523ff3fb35395f6ec55222",
    "bit-reversal": "30d91dc29f161321971bfea6ba16c735e4b5fe678d607efb470896d9de75ef44",
    "rows": "d7881bbb934c5f61b1cf4c6cbcd969a0e867c31107533be3ec3dc8ee0a53fa0d",
}
HASHES |= {f"{name}-refine": HASHES[name] for name in ("pixels", "numpy-92916")}

NONE = {"image": np.zeros((0, 1, 1), np.uint8), "label": np.zeros(0, np.int32)}
EMPTY = smnist.Digits("", "", "", "", dict.fromkeys(("train", "validation", "test"), NONE))


# ---- settings -----------------------------------------------------------------------------------


def test_every_preset_is_a_row_with_its_order():
    assert set(smnist.PRESETS) == set(HASHES)
    assert set(smnist.ROWS) == {f"smnist-{name}" for name in HASHES}
    for name, settings in smnist.PRESETS.items():
        assert settings.preset == name
        config = smnist.complete(settings)
        assert config.permutation_sha256 == HASHES[name]
        asked = dataclasses.replace(config, seed=5, devices=1, out="there")
        assert matching_row(asked, smnist.ROWS) == f"smnist-{name}"
        assert matching_row(dataclasses.replace(asked, epochs=3), smnist.ROWS) is None
    assert "permutation_sha256" not in _NO_SETTINGS  # runs in other orders are never averaged


def test_the_orders_are_those_of_the_module():
    hints = smnist.Config.__annotations__["permutation"]
    assert list(hints.__args__) == list(PERMUTATIONS)
    assert smnist.PRESETS["torch-12008"].permutation == "torch-12008"
    assert smnist.PRESETS["small-permuted"].permutation == "numpy-92916"
    found = {(p.order, p.permutation, p.cell) for p in smnist.PRESETS.values()}
    assert len(found) == len(smnist.PRESETS)


def test_an_order_with_another_hash_is_refused():
    config = dataclasses.replace(smnist.PRESETS["numpy-0"], permutation_sha256=HASHES["pixels"])
    with pytest.raises(ConfigError) as caught:
        smnist.run(config)
    expected = f"expected {HASHES['numpy-0']}"
    assert str(caught.value) == f"--permutation-sha256: got {HASHES['pixels']}, {expected}"
    right = dataclasses.replace(config, permutation_sha256=HASHES["numpy-0"])
    assert smnist.complete(right) == right


def test_the_step_size_falls_along_a_half_cosine_over_all_updates(x64):
    """Of a gradient that stays, every update of Adam is the step size; g/(g + ε) of it here."""
    rates = {}
    for schedule in ("cosine", "constant"):
        config = smnist.Config(learning_rate=0.3, schedule=schedule, clip_norm=None)
        tx = smnist.make_optimiser(config, updates=7)
        params, moved = jnp.zeros(()), []
        state = tx.init(params)
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
            for _ in range(8):
                updates, state = tx.update(jnp.full((), 1e4), state, params)
                params = optax.apply_updates(params, updates)
                moved.append(-float(updates))
        rates[schedule] = moved
    np.testing.assert_allclose(rates["constant"], [0.3] * 8, rtol=1e-10)
    want = [0.15 * (1 + np.cos(np.pi * k / 7)) for k in range(8)]
    np.testing.assert_allclose(rates["cosine"], want, rtol=1e-6, atol=1e-9)
    assert rates["cosine"][7] == 0  # after the last update


def test_gradients_are_clipped_before_adam_sees_them():
    tx = smnist.make_optimiser(smnist.Config(clip_norm=0.5), updates=4)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update({"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}, tx.init(params))
    (mu,) = [part.mu for part in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu"))
             if hasattr(part, "mu")]  # fmt: skip
    np.testing.assert_allclose(mu["a"], [0.03, 0.0], rtol=1e-5)  # 0.1 · 0.5 · 3/5
    np.testing.assert_allclose(mu["b"], 0.04, rtol=1e-5)


@pytest.mark.parametrize(
    ("order", "law", "longest"),
    [
        ("small", "chrono", 196),
        ("pixels", "chrono", 784),
        ("pixels", "chrono:9", 9),
        ("small", "log_uniform", 196),
        ("pixels", "log_uniform", 784),
    ],
)
def test_lags_are_those_of_the_sequence(order, law, longest):
    """b_f = ln u, u or b_f from its value for 1 to that for T − 1 at random, and b_i = −b_f."""
    config = smnist.Config(order=order, forget_bias=law, hidden_size=64)
    with jax.numpy_dtype_promotion("standard"):
        params = smnist.make_problem(config, EMPTY).init(jax.random.key(1))
    i, f, g, o = np.split(np.asarray(params["layer_0"]["weights"]["b"]), 4)
    assert f.min() >= 0 and 0.9 * (longest - 1) < np.exp(f.max()) < longest - 1 + 1e-3
    assert (np.median(f) < 0.7 * np.log(longest)) == law.startswith("log_uniform")
    np.testing.assert_array_equal(i, -f)
    assert not g.any() and not o.any()


def test_the_forget_bias_is_that_of_the_law_when_not_given():
    config = smnist.Config(init="torch", hidden_size=64)
    with jax.numpy_dtype_promotion("standard"):
        params = smnist.make_problem(config, EMPTY).init(jax.random.key(1))
    f = np.asarray(params["layer_0"]["weights"]["b"])[64:128]
    assert f.min() < -0.05 and f.max() > 0.05  # PyTorch's is 0 but for noise


# ---- data ---------------------------------------------------------------------------------------


def images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28)).astype(np.uint8)


WHOLE = make_dataset(
    "mnist",
    "tfds",
    {
        split: {"image": images(n, seed), "label": np.arange(n, dtype=np.int32) % 10}
        for split, n, seed in (("train", 11, 1), ("validation", 6, 2), ("test", 7, 3))
    },
)


@pytest.fixture
def loads(monkeypatch):
    """What mnist.load is asked for; it gives WHOLE."""
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return WHOLE

    monkeypatch.setattr(smnist.mnist, "load", load)
    return asked


@pytest.mark.parametrize("name", list(PERMUTATIONS))
def test_the_order_reaches_the_images(name, loads):
    order = PERMUTATIONS[name](784)
    config = smnist.Config(order="pixels", permutation=name, validation_size=6, data="tfds")
    found = smnist.load(config)
    assert loads == [(("tfds",), {"validation_size": 6})]
    for split, fields in WHOLE.splits.items():
        got = found.splits[split]["image"]
        assert got.shape == (len(fields["label"]), 784, 1) and got.dtype == np.uint8
        for t in range(784):
            place = order[t]
            want = fields["image"][:, place // 28, place % 28]
            np.testing.assert_array_equal(got[:, t, 0], want)
        np.testing.assert_array_equal(found.splits[split]["label"], fields["label"])
    said = "row by row" if name == "none" else f"in the order {name}"
    assert found.title == f"MNIST (tfds mnist), 784 pixels {said}"
    assert (found.name, found.source) == ("mnist", "tfds")


@pytest.mark.parametrize("name", list(PERMUTATIONS))
def test_small_pixels_are_means_of_four(name, loads):
    order = PERMUTATIONS[name](196)
    found = smnist.load(smnist.Config(permutation=name))
    for split, fields in WHOLE.splits.items():
        got = found.splits[split]["image"]
        assert got.shape == (len(fields["label"]), 196, 1)
        for t in range(196):
            y, x = divmod(int(order[t]), 14)
            four = fields["image"][:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].astype(float)
            want = four.mean(axis=(1, 2)) / 255
            np.testing.assert_allclose(got[:, t, 0] / smnist.LARGEST["small"], want, rtol=1e-12)
    said = "row by row" if name == "none" else f"in the order {name}"
    assert found.title == f"MNIST (tfds mnist), 196 pixels {said}"


@pytest.mark.parametrize(("order", "size"), [("pixels", 1), ("small", 1), ("rows", 28)])
def test_without_validation_there_is_none_to_choose_by(order, size, monkeypatch):
    splits = WHOLE.splits | {
        "validation": {field: a[:0] for field, a in WHOLE.splits["validation"].items()}
    }
    monkeypatch.setattr(smnist.mnist, "load", lambda *_, **__: WHOLE._replace(splits=splits))
    config = smnist.Config(order=order, validation_size=0)
    digits = smnist.load(config)
    assert digits.splits["validation"]["image"].shape == (0, smnist.POSITIONS[order], size)
    problem = smnist.make_problem(config, digits)
    assert set(problem.splits) == {"train", "test"} and not problem.selects
    assert smnist.make_problem(smnist.Config(order=order), digits).selects


def test_rows_are_those_of_the_image(loads):
    digits = smnist.load(smnist.PRESETS["rows"])
    images = WHOLE.splits["validation"]["image"]
    np.testing.assert_array_equal(digits.splits["validation"]["image"], images)
    assert images.shape[1:] == (28, 28) and not np.array_equal(images, images.swapaxes(1, 2))
    assert digits.title == "MNIST (tfds mnist), 28 rows"
    read = smnist.inputs(images, smnist.PRESETS["rows"])
    np.testing.assert_allclose(read, images / 255, rtol=1e-6)


@pytest.mark.parametrize("most", [1, 3])
def test_images_are_moved_both_ways(most):
    images = np.random.default_rng(1).uniform(0.5, 1, (200, 28, 28)).astype(np.float32)
    got = np.asarray(smnist.moved(jax.random.key(3), images, most))
    found = set()
    for before, after in zip(images, got, strict=True):
        around = np.pad(before, most)
        places = [(r, c) for r in range(2 * most + 1) for c in range(2 * most + 1)]
        at = [(r, c) for r, c in places if np.array_equal(around[r : r + 28, c : c + 28], after)]
        assert len(at) == 1
        found |= set(at)
    assert len(found) > 0.9 * (2 * most + 1) ** 2 and (most, most) in found
    assert not np.array_equal(got, smnist.moved(jax.random.key(4), images, most))


@pytest.mark.parametrize(
    ("order", "side", "dropout"),
    [("rows", 28, 0.0), ("rows", 28, 0.4), ("pixels", 28, 0.0), ("small", 14, 0.0)],
)
def test_training_images_alone_are_moved(loads, order, side, dropout):
    """And by other bits of the key than those that layers are dropped with."""
    config = smnist.Config(order=order, hidden_size=3, method="scan", dropout=dropout)
    digits, key = smnist.load(config), jax.random.key(5)
    plain = smnist.make_problem(config, digits)
    shifted = smnist.make_problem(dataclasses.replace(config, shift=2), digits)
    with jax.numpy_dtype_promotion("standard"):
        params = plain.init(jax.random.key(2))
        batch = {**digits.splits["test"], "weight": np.ones(7, np.float32)}
        assert plain.loss_fn(params, batch)[0] == shifted.loss_fn(params, batch)[0]
        got = shifted.loss_fn(params, batch, key)[0]
        square = batch["image"].astype(np.float32).reshape(7, side, side)
        image = smnist.moved(jax.random.fold_in(key, 0), square, 2).reshape(batch["image"].shape)
        own = jax.random.fold_in(key, config.num_layers)
        want = plain.loss_fn(params, batch | {"image": image}, own)[0]
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert got != plain.loss_fn(params, batch, own)[0]
        assert (got != plain.loss_fn(params, batch | {"image": image}, key)[0]) == (dropout > 0)


def test_every_task_has_a_hash_of_its_own(loads):
    found = {name: smnist.load(preset).sha256 for name, preset in smnist.PRESETS.items()}
    assert found["pixels"] == found.pop("pixels-refine")
    assert found["numpy-92916"] == found.pop("numpy-92916-refine")
    assert len(set(found.values())) == len(found)
    first = smnist.load(smnist.Config(limit=3))
    assert {len(fields["label"]) for fields in first.splits.values()} == {3}
    assert first.sha256 not in found.values()


@pytest.mark.parametrize("order", ["pixels", "small", "rows"])
def test_the_loss_reads_numbers_from_0_to_1(order, loads):
    """Against the model on what NumPy makes of the images."""
    read = "none" if order == "rows" else "numpy-0"
    config = smnist.Config(order=order, permutation=read, hidden_size=3, method="scan")
    digits = smnist.load(config)
    problem, model = smnist.make_problem(config, digits), smnist.make_model(config)
    with jax.numpy_dtype_promotion("standard"):
        params = problem.init(jax.random.key(2))
        batch = {**digits.splits["test"], "weight": np.array([1, 1, 1, 0, 1, 1, 1], np.float32)}
        loss, metrics = problem.loss_fn(params, batch)
        whole = WHOLE.splits["test"]["image"] / 255
        if order == "small":
            whole = whole.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
        xs = whole.reshape(7, -1)[:, PERMUTATIONS["numpy-0"](whole[0].size), None]
        xs = whole if order == "rows" else xs
        _, logits = model.apply({"params": params}, xs.astype(np.float32))
    logits = np.asarray(logits, float)
    assert np.ptp(logits, axis=0).max() > 1e-4  # the images are told apart
    label = digits.splits["test"]["label"]
    each = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(7), label]
    np.testing.assert_allclose(loss, np.delete(each, 3).mean(), rtol=1e-5)
    hits = np.delete(np.argmax(logits, axis=1) == label, 3)
    assert [float(n) for n in metrics["accuracy"]] == [hits.sum(), 6]


# ---- as its users run it ------------------------------------------------------------------------

COMMON = "--data offline --limit 40 --epochs 2 --batch-size 16 --hidden-size 4 --seed 3 --devices 2"
TINY = {
    "small-permuted": f"--preset small-permuted {COMMON} --zoneout 0 --diagnose --save-every 2",
    "torch-12008": f"--preset torch-12008 {COMMON} --cell refine --forget-bias uniform_gate "
    "--schedule constant --seeds 2 --deterministic",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache of offline data for all of them."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", list(TINY))
def test_a_run_leaves_everything_it_should(name, tmp_path, cache):
    surroundings = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    surroundings["LSTMJAX_CACHE"] = cache
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *TINY[name].split(), "--out", "here"],
        cwd=tmp_path, env=surroundings, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    first, *_, last = done.stdout.splitlines()
    count = {"small-permuted": "196 pixels in the order numpy-92916"}.get(
        name, "784 pixels in the order torch-12008"
    )
    for line in (first, last):
        assert f"rendered digits (offline data, not MNIST), {count}" in line
    folder = tmp_path / "here"
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == [] and record["experiment"] == "smnist"
    assert record["config"]["permutation_sha256"] == HASHES[name]
    assert record["config"] == json.loads((folder / "config.json").read_text())
    assert record["dataset"]["name"] == "offline_digits" and "row" not in record
    metrics = record["metrics"]
    assert np.all(np.isin(metrics["best_epoch"], [1, 2]))
    several = record["config"]["seeds"] == 2
    assert len(metrics[f"test_accuracy_epochs{'_seed3' * several}"]) == 1  # at the end alone
    assert ("diagnostics" in metrics) == (not several)
    names = {path.name for path in folder.iterdir()}
    wanted = {f"params-seed{n}.safetensors" for n in (3, 4)} if several else {"params.safetensors"}
    assert wanted | {"accuracy.png", "metrics.jsonl", "checkpoints"} <= names
    weights = load_file(folder / min(wanted))
    assert weights["layer_0.weights.w_h"].shape == (4, 16)


WRONG = [
    ("--permutation random", "--permutation: got 'random', expected one of none, numpy-92916"),
    ("--order large", "--order: got 'large', expected one of pixels, small, rows"),
    ("--preset rows --permutation numpy-0", "--permutation: got numpy-0, expected none with --or"),
    ("--preset psmnist", "--preset: got 'psmnist', expected one of small, small-permuted, pixels"),
    ("--permutation-sha256 12", f"--permutation-sha256: got 12, expected {HASHES['small']}"),
    ("--shift 14", "--shift: got 14, expected at most 13 with --order small"),
    ("--preset numpy-0 --shift 1", "--shift: got 1, expected 0 with --permutation numpy-0"),
    ("--preset numpy-0 --method onednn", "--zoneout: got 0.15, expected 0 with --method onednn"),
    ("--preset rows --shift 28", "--shift: got 28, expected at most 27 with --order rows"),
    ("--preset rows --shift -1", "--shift: got -1, expected an integer of at least 0"),
    ("--schedule linear", "--schedule: got 'linear', expected one of constant, cosine"),
    ("--cell gru --forget-bias chrono", "--forget-bias: got chrono:196, expected None with the ce"),
    ("--forget-bias chrono:1", "--forget-bias: got chrono:1, expected chrono:T with T >= 2"),
    ("--cell gru --init torch", "--init: got torch, expected keras or lstmjax with --cell gru"),
    ("--epochs 0", "--epochs: got 0, expected an integer of at least 1"),
    ("--clip-norm 0", "--clip-norm: got 0.0, expected a finite number above 0"),
    ("--zoneout 1", "--zoneout: got 1.0, expected 0 <= zoneout < 1"),
    ("--zoneout 0.1 --diagnose", "--zoneout: got 0.1, expected 0 with --diagnose"),
    ("--save-every often", "--save-every: got 'often', expected steps, as 500, or seconds, as 60s"),
    ("--sweep lr=1e-3,1e-2 --validation-size 0", "--sweep: got lr=1e-3,1e-2, expected no sweep wi"),
    ("--validation-size 9999999 --data offline", "--validation-size: got 9999999, expected"),
]  # fmt: skip


def begin(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_a_wrong_value_is_one_clear_line(flags, text, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSTMJAX_CACHE", cache)
    code, error = begin(flags, monkeypatch), capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith(f"error: {text}")
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_help_explains_every_flag(monkeypatch, capsys):
    assert not begin("--preset torch-12008 --help", monkeypatch)
    text = capsys.readouterr().out
    assert "python experiments/smnist.py" in text
    for field in dataclasses.fields(smnist.Config):
        assert f"--{field.name.replace('_', '-')}" in text
