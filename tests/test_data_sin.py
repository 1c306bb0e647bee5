"""lstmjax.data.sin against loops, and what holds for the whole data package."""

import ast
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lstmjax.data
from lstmjax.data import sin
from lstmjax.data.dataset import content_sha256, make_dataset

PACKAGE = Path(lstmjax.data.__file__).parent


def test_stateful_batches_are_sine_and_cosine_at_each_time():
    arrays = sin.stateful_batches(3, batch_size=4, num_steps=5, start=7)
    assert arrays["x"].shape == arrays["y"].shape == (3, 4, 5, 1)
    assert arrays["t"].shape == (3, 4, 5)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    for k in range(3):
        for b in range(4):
            for s in range(5):
                t = (7 + k * 5 + b * 5 + s) / (10 * math.pi)
                assert arrays["t"][k, b, s] == np.float32(t)
                np.testing.assert_allclose(arrays["x"][k, b, s, 0], math.sin(t), atol=1e-7)
                np.testing.assert_allclose(arrays["y"][k, b, s, 0], math.cos(t), atol=1e-7)


def test_default_batches_are_those_of_the_tutorials():
    arrays = sin.stateful_batches(6)
    for k in range(6):
        times = np.arange(20 * k, 20 * k + 1000).reshape(50, 20) / (10 * np.pi)
        np.testing.assert_array_equal(arrays["x"][k, :, :, 0], np.sin(times).astype(np.float32))
        np.testing.assert_array_equal(arrays["y"][k, :, :, 0], np.cos(times).astype(np.float32))


def test_a_row_of_the_next_batch_goes_on_where_the_row_ended():
    arrays = sin.stateful_batches(4, batch_size=3, num_steps=6)
    np.testing.assert_array_equal(arrays["x"][1:, :-1], arrays["x"][:-1, 1:])
    steps = arrays["t"][1:, :, 0].astype(np.float64) - arrays["t"][:-1, :, -1]
    np.testing.assert_allclose(steps, 1 / (10 * math.pi), atol=1e-6)


@pytest.mark.parametrize(("corrected", "count"), [(True, 950), (False, 949)])
def test_forecast_windows(corrected, count):
    arrays = sin.forecast_windows(corrected=corrected)
    assert arrays["x"].shape == (count, 50, 1) and arrays["x"].dtype == np.float32
    assert arrays["y"].shape == (count, 1) and arrays["y"].dtype == np.float32
    assert arrays["series"].dtype == arrays["t"].dtype == np.float64
    for i in (0, 1, 499, count - 1):
        for j in (0, 1, 48, 49):
            want = math.sin(-100 + 200 * (i + j) / 999)
            np.testing.assert_allclose(arrays["x"][i, j, 0], want, atol=1e-7)
        want = math.sin(-100 + 200 * (i + 50) / 999)
        np.testing.assert_allclose(arrays["y"][i, 0], want, atol=1e-7)
    np.testing.assert_allclose(arrays["series"][-1], math.sin(100), atol=1e-12)


@pytest.mark.parametrize("argument", ["num_batches", "batch_size", "num_steps", "start"])
@pytest.mark.parametrize("value", [-1, 2.0, "3", None, True])
def test_wrong_sizes_are_named(argument, value):
    arguments = {"num_batches": 2, argument: value}
    with pytest.raises(ValueError, match=f"{argument}: got .*expected an integer"):
        sin.stateful_batches(**arguments)


def test_corrected_must_be_a_flag():
    with pytest.raises(ValueError, match="corrected: got 'no'"):
        sin.forecast_windows(corrected="no")


def test_dataset_names_itself_and_its_content():
    arrays = sin.stateful_batches(2)
    data = sin.dataset(arrays)
    assert (data.name, data.source, data.vocabulary) == ("sin", "generated", None)
    assert data.sha256 == content_sha256({"train": arrays})
    assert "sine" in data.title
    assert data.splits["train"]["x"] is arrays["x"]


def test_hash_sees_names_types_shapes_values_and_words_but_not_order_or_layout():
    a = np.arange(6, dtype=np.int32).reshape(2, 3)
    b = np.arange(4, dtype=np.float32)
    base = content_sha256({"train": {"a": a, "b": b}, "test": {"a": a}}, ("x", "y"))
    same = content_sha256(
        {"test": {"a": np.asfortranarray(a)}, "train": {"b": b, "a": a}}, ("x", "y")
    )
    assert same == base and len(base) == 64
    assert content_sha256({"train": {"a": a.astype(">i4"), "b": b}, "test": {"a": a}}, "xy") == base
    changed = a.copy()
    changed[1, 2] = 7
    others = [
        content_sha256({"train": {"a": a, "b": b}, "test": {"a": a}}, ("x",)),
        content_sha256({"train": {"a": a, "b": b}, "test": {"a": a}}, ("xy",)),
        content_sha256({"train": {"a": a, "b": b}, "test": {"a": a}}),
        content_sha256({"train": {"a": a, "c": b}, "test": {"a": a}}, ("x", "y")),
        content_sha256({"train": {"a": a, "b": b}, "dev": {"a": a}}, ("x", "y")),
        content_sha256({"train": {"a": changed, "b": b}, "test": {"a": a}}, ("x", "y")),
        content_sha256({"train": {"a": a.view(np.uint32), "b": b}, "test": {"a": a}}, ("x", "y")),
        content_sha256({"train": {"a": a.reshape(3, 2), "b": b}, "test": {"a": a}}, ("x", "y")),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_offline_titles_say_what_the_data_is_not():
    titles = {
        name: make_dataset(name, "offline", {}).title
        for name in ("offline_reviews", "offline_digits")
    }
    assert "not IMDB" in titles["offline_reviews"] and "not MNIST" in titles["offline_digits"]
    assert "tfds" in make_dataset("mnist", "tfds", {}).title


def test_nothing_in_the_package_imports_jax():
    files = sorted(PACKAGE.glob("*.py"))
    assert len(files) >= 9
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"jax", "flax", "optax", "tensorflow", "keras", "torch"}, file.name
            inside = {name for name in names if name.startswith("lstmjax")}
            assert all(name.startswith("lstmjax.data") for name in inside), file.name


def test_importing_the_package_is_light():
    # An empty lstmjax stands in for the real one, which imports jax by right.
    program = f"""
import sys, types
package = types.ModuleType("lstmjax")
package.__path__ = [{str(PACKAGE.parent)!r}]
sys.modules["lstmjax"] = package
import lstmjax.data
heavy = {{"jax", "tensorflow_datasets", "matplotlib", "PIL", "requests", "tensorflow"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_first_examples_are_a_data_set_of_their_own():
    whole = sin.dataset(sin.stateful_batches(5, batch_size=3, num_steps=4))
    some = whole.first(2)
    assert {name: len(a) for name, a in some.splits["train"].items()} == {"x": 2, "y": 2, "t": 2}
    np.testing.assert_array_equal(some.splits["train"]["x"], whole.splits["train"]["x"][:2])
    assert some.sha256 != whole.sha256 and some.title == whole.title
    assert whole.first(None) is whole
    with pytest.raises(ValueError, match="count: got 0, expected an integer of 1 or more"):
        whole.first(0)
