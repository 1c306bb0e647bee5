"""`predict` of experiments/mnist.py and smnist.py: which images are read, and what is answered."""

import gzip
import importlib
import io
import json
import os
import runpy
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "experiments"
sys.path.insert(0, str(SCRIPTS))

from lstmjax import checkpoint, digits_reader, finished  # noqa: E402
from lstmjax.data import mnist as data  # noqa: E402
from lstmjax.records import RunError, to_json  # noqa: E402

DRAW = np.random.default_rng(0)
IMAGES = DRAW.integers(0, 256, (5, 28, 28), dtype=np.uint8)


def png(image=IMAGES[0], mode=None):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, format="png")
    return file.getvalue()


def idx(images, sizes=None):
    return b"\0\0\x08\x03" + struct.pack(">3i", *(sizes or images.shape)) + images.tobytes()


# ---- images -------------------------------------------------------------------------------------


def test_the_three_formats_hold_the_same_images():
    np.testing.assert_array_equal(digits_reader.parse(png()), IMAGES[:1])
    np.testing.assert_array_equal(digits_reader.parse(idx(IMAGES)), IMAGES)
    np.testing.assert_array_equal(digits_reader.parse(gzip.compress(idx(IMAGES))), IMAGES)
    np.testing.assert_array_equal(digits_reader.parse(gzip.compress(png(IMAGES[3]))), IMAGES[3:4])


def claims(width, height):
    """A PNG whose header claims a size, with the right checksum."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    content = png()
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def jpeg():
    file = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(file, format="jpeg")
    return file.getvalue()


REFUSED = {
    "colour": (png(mode="RGB"), "an image of (28, 28) RGB"),
    "palette": (png(mode="P"), "an image of (28, 28) P"),
    "alpha": (png(mode="LA"), "an image of (28, 28) LA"),
    "one bit": (png(mode="1"), "an image of (28, 28) 1"),
    "16 bits": (png(IMAGES[0].astype(np.uint16)), "an image of (28, 28) I;16"),
    "narrow": (png(IMAGES[0][:, :27]), "an image of (27, 28) L"),
    "large": (png(np.zeros((512, 512), np.uint8)), "an image of (512, 512) L"),
    "bomb": (claims(15_000, 15_000), "got an image that is too large, expected a grey PNG"),
    "half a bomb": (claims(10_000, 10_000), "an image of (10000, 10000) L"),
    "cut": (png()[:-40], "a PNG that is damaged"),
    "head alone": (png()[:8], "a PNG that is damaged"),
    "jpeg": (jpeg(), "neither a PNG nor an idx file"),
    "text": (b"four", "neither a PNG nor an idx file"),
    "nothing": (b"", "an empty file"),
    "idx cut": (idx(IMAGES)[:-1], "an idx file of 3,935 bytes that claims 5 images"),
    "idx longer": (idx(IMAGES) + b"\0", "an idx file of 3,937 bytes that claims 5 images"),
    "idx head": (idx(IMAGES)[:15], "an idx file that is cut off"),
    "idx none": (idx(IMAGES[:0]), "that claims 0 images"),
    "idx many": (idx(IMAGES, (2**31 - 1, 28, 28)), "that claims 2,147,483,647 images"),
    "idx negative": (idx(IMAGES, (-5, 28, 28)), "that claims -5 images"),
    "idx size": (idx(IMAGES, (5, 14, 56)), "an idx file of images of 14 x 56"),
    "idx labels": (b"\0\0\x08\x01\0\0\0\x01\x07", "neither a PNG nor an idx file"),
    "gzip": (gzip.compress(idx(IMAGES))[:-9], "a gzip file that is damaged"),
    "gzip head": (b"\x1f\x8b", "a gzip file that is damaged"),
    "gzip twice": (gzip.compress(gzip.compress(png())), "neither a PNG nor an idx file"),
    "gzip bomb": (gzip.compress(bytes(2**25)), "a gzip file that unpacks to more than 8,388,608 b"),
    "too large": (bytes(2**23 + 1), "it is larger than 8,388,608 bytes"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_such_image_is_one_line(kind, tmp_path):
    content, words = REFUSED[kind]
    (tmp_path / "file").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        list(digits_reader.images([str(tmp_path / "file")]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/file: got ") and words in line and "\n" not in line
    assert line.endswith(f", expected {digits_reader.EXPECTED}")
    assert peak < 2**26


def test_damaged_files_give_images_or_a_line():
    accepted = 0
    for content in (png(), idx(IMAGES[:2]), gzip.compress(idx(IMAGES[:2]))):
        for _ in range(150):
            changed = bytearray(content)
            for place in DRAW.integers(0, len(content), DRAW.integers(1, 4)):
                changed[place] ^= 1 << DRAW.integers(8)
            try:
                found = digits_reader.parse(bytes(changed[: DRAW.integers(1, 2 * len(content))]))
            except ValueError as error:
                assert "\n" not in str(error) and digits_reader.EXPECTED not in str(error)
                continue
            assert found.dtype == np.uint8 and found.shape[1:] == (28, 28) and len(found)
            accepted += 1
    assert 0 < accepted < 450


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="^/dev/zero: got it is no plain file, expected a grey"):
        list(digits_reader.images(["/dev/zero"]))
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(OSError):
            list(digits_reader.images([str(path)]))


def test_names_tell_images_apart(tmp_path, monkeypatch):
    (tmp_path / "one.png").write_bytes(png(IMAGES[4]))
    (tmp_path / "some.idx").write_bytes(idx(IMAGES[:3]))
    odd = os.fsdecode(b"\xff\n.png")
    (tmp_path / odd).write_bytes(png(IMAGES[2]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(idx(IMAGES[3:]))}))
    names, found = zip(*digits_reader.images(["one.png", "some.idx", odd, "-"]), strict=True)
    assert names == (
        "one.png", "some.idx [0]", "some.idx [1]", "some.idx [2]", "\ufffd?.png",
        "standard input [0]", "standard input [1]",
    )  # fmt: skip
    np.testing.assert_array_equal(found, IMAGES[[4, 0, 1, 2, 2, 3, 4]])
    monkeypatch.setattr(digits_reader, "MOST_IMAGES", 3)
    with pytest.raises(ValueError, match="^images: got 4, expected at most 3 in one call"):
        list(digits_reader.images(["one.png", "some.idx"]))


def test_standard_input_without_an_end_is_left():
    class Endless:
        def read(self, size):
            return bytes(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Endless()}))
        with pytest.raises(ValueError, match="^standard input: got more than 8,388,608 bytes"):
            list(digits_reader.images(["-"]))


# ---- answers ------------------------------------------------------------------------------------

SETTINGS = {
    "rows": ("mnist", {"hidden_size": 3}),
    "pixels": ("mnist", {"hidden_size": 2, "layout": "pixels"}),
    "permuted": ("mnist", {"hidden_size": 2, "layout": "permuted", "permutation": "torch12008"}),
    "small": ("smnist", {"hidden_size": 2}),
    "order": ("smnist", {"hidden_size": 2, "order": "pixels", "permutation": "numpy-0"}),
}


def weights(script, config, seed):
    """Random weights of a size that tells images apart."""
    model = script.make_model(config)
    xs = script.inputs(IMAGES[:1], config)
    like = jax.eval_shape(model.init, jax.random.key(0), xs)["params"]
    draw = np.random.default_rng(seed)
    return model, jax.tree.map(lambda a: draw.normal(0, 1, a.shape).astype(a.dtype), like)


def write_run(folder, name="mnist", lanes=(), **changes):
    script = importlib.import_module(name)
    config = script.Config(**changes)
    folder.mkdir(parents=True)
    files = [f"params-{lane}.safetensors" for lane in lanes] or ["params.safetensors"]
    for seed, file in enumerate(files):
        checkpoint.save_params(folder / file, weights(script, config, seed)[1])
    (folder / "config.json").write_bytes(to_json(config))
    (folder / "record.json").write_text("{}")
    return script, config


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSTMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_model_reads_images_as_it_was_trained_to(kind, cache):
    """``inputs`` of the raw images are the data that the experiment trains on, in [0, 1]."""
    name, changes = SETTINGS[kind]
    script = importlib.import_module(name)
    config = script.Config(data="offline", limit=7, **changes)
    trained_on = script.load(config).splits["test"]["image"]
    raw = data.load("offline").first(7).splits["test"]["image"]
    largest = script.LARGEST[config.order] if name == "smnist" else 255
    assert np.ptp(trained_on) > 200
    found = script.inputs(raw, config)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, trained_on / largest, rtol=1e-7)


@pytest.mark.parametrize("kind", ["rows", "small"])
def test_probabilities_are_those_of_the_model(kind, tmp_path):
    name, changes = SETTINGS[kind]
    script, config = write_run(tmp_path / "run", name, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_reader, "AT_ONCE", 2)  # pieces of 2, 2 and 1
        got = digits_reader.probabilities(script.read(tmp_path / "run"), IMAGES)
    model, params = weights(script, config, 0)
    logits = model.apply({"params": params}, script.inputs(IMAGES, config))[1]
    want = np.exp(np.asarray(logits, np.float64))
    want /= want.sum(axis=1, keepdims=True)
    assert np.ptp(want, axis=0).max() > 1e-3  # the images are told apart
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_line_says_what_else_it_might_be():
    row = np.array([0.004, 0.2, 0.003, 0.75, 0.043, 0, 0, 0, 0, 0])
    dark, light = np.full((28, 28), 127, np.uint8), np.full((28, 28), 128, np.uint8)
    assert digits_reader.line(dark, row) == "3, probability 0.750; 1 0.200; 4 0.043"
    assert digits_reader.line(light, row).endswith(" (mostly white: MNIST is white on black)")
    assert digits_reader.line(dark, np.eye(10)[7]) == "7, probability 1.000"
    row = np.array([0.992, 0.0049, 0.0031, 0, 0, 0, 0, 0, 0, 0])
    assert digits_reader.line(dark, row) == "0, probability 0.992"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_give_no_number_are_one_line(value, tmp_path):
    script, config = write_run(tmp_path / "run", hidden_size=2)
    params = jax.tree.map(lambda a: np.full_like(a, value), weights(script, config, 0)[1])
    (tmp_path / "run" / "params.safetensors").unlink()
    checkpoint.save_params(tmp_path / "run" / "params.safetensors", params)
    with pytest.raises(RunError, match="run is damaged: its weights give no number"):
        digits_reader.probabilities(script.read(tmp_path / "run"), IMAGES[:1])


BAD = {
    "size": ({"hidden_size": 2**31 - 1}, "hidden_size is 2147483647, expected at most"),
    "layers": ({"num_layers": 10**6}, "num_layers is 1000000, expected at most 5"),
    "other size": ({"hidden_size": 3}, "expected float32"),
    "order": ({"order": "large"}, "order is 'large'"),
    "hash": ({"permutation_sha256": "12"}, "is damaged: --permutation-sha256: got 12, expected"),
    "setting": ({"hidden": 2}, "has the setting hidden, unknown here"),
}


@pytest.mark.parametrize("kind", BAD)
def test_settings_that_do_not_fit_are_one_line(kind, tmp_path):
    changes, words = BAD[kind]
    script, _ = write_run(tmp_path / "run", "smnist", hidden_size=2)
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RunError) as caught:
        script.read(tmp_path / "run")
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ---- whose weights ------------------------------------------------------------------------------


def test_which_weights(tmp_path):
    one, some, release = (tmp_path / name for name in ("one", "some", "release"))
    write_run(one, hidden_size=2)
    write_run(some, lanes=[f"seed{k}" for k in (10, 2, 3)], hidden_size=2)
    assert finished.weights(one).name == "params.safetensors"
    assert finished.weights(some, "seed3").name == "params-seed3.safetensors"
    for which, words in (
        (None, f"--which: got none, expected one of seed2, seed3, seed10: {some} holds all"),
        ("seed4", "--which: got seed4, expected one of seed2, seed3, seed10"),
        ("../x", "--which: got ../x, expected one of seed2"),
    ):
        with pytest.raises(RunError, match=words.replace("[", r"\[")):
            finished.weights(some, which)
    with pytest.raises(RunError, match="--which: got seed0, expected none: .*one holds the weigh"):
        finished.weights(one, "seed0")
    release.mkdir()
    assert finished.weights(release).name == "params.safetensors"  # whose reader says it is missing
    (release / "mnist-seed0-0123.safetensors").touch()
    assert finished.weights(release).name == "mnist-seed0-0123.safetensors"


def test_weights_of_a_lane_are_its_own(tmp_path):
    script, config = write_run(tmp_path / "run", lanes=["seed0", "seed1"], hidden_size=2)
    for seed in (0, 1):
        got = script.read(tmp_path / "run", f"seed{seed}").params
        jax.tree.map(np.testing.assert_array_equal, got, weights(script, config, seed)[1])


# ---- as its users run it ------------------------------------------------------------------------


def begin(name, argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / f"{name}.py"), "predict", *argv])
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", ["mnist", "smnist"])
def test_predict_takes_the_newest_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, error = begin(name, ["four.png"], monkeypatch, capsys)
    assert (code, out) == (1, "")
    assert error.startswith("error: --run: there is no finished run under runs/")
    for number, time in ((1, 5), (2, 9), (3, 7)):
        write_run(tmp_path / f"runs/{name}-{number}", name, hidden_size=2)
        os.utime(tmp_path / f"runs/{name}-{number}/record.json", (time, time))
    write_run(tmp_path / "runs/sin-4", name, hidden_size=2)
    (tmp_path / "some.idx").write_bytes(idx(IMAGES[:2]))
    (tmp_path / "four.png").write_bytes(png(IMAGES[2]))
    code, out, error = begin(name, ["some.idx", "four.png"], monkeypatch, capsys)
    assert (code, error) == (0, "")
    *lines, last = out.splitlines()
    script = importlib.import_module(name)
    rows = digits_reader.probabilities(script.read(tmp_path / f"runs/{name}-2"), IMAGES[:3])
    said = [digits_reader.line(image, row) for image, row in zip(IMAGES, rows, strict=False)]
    names = ["some.idx [0]", "some.idx [1]", "four.png"]
    assert lines == [f"{n}: {text}" for n, text in zip(names, said, strict=True)]
    assert last == f"run runs/{name}-2"


WRONG = [
    ([], "got no image, expected a grey PNG"),
    (["--which", "seed0", "four.png"], "--which: got seed0, expected none: run holds"),
    (["none.png"], "none.png: No such file"),
    (["four.png", "wide.png"], "wide.png: got an image of (29, 28) L, expected a grey PNG"),
    (["--digit", "four.png"], "--digit: no such flag"),
    (["--run", "nowhere", "four.png"], "--run: got nowhere, expected the folder of a finished run"),
    (["--run", "", "four.png"], "--run: got no name, expected the folder of a finished run"),
]


@pytest.mark.parametrize(("argv", "words"), WRONG)
def test_a_wrong_call_is_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", hidden_size=2)
    (tmp_path / "four.png").write_bytes(png())
    (tmp_path / "wide.png").write_bytes(png(np.zeros((28, 29), np.uint8)))
    argv = argv if "--run" in argv else [*argv, "--run", "run"]
    code, out, error = begin("mnist", argv, monkeypatch, capsys)
    assert code in (1, 2) and out == "" and error.startswith(f"error: {words}"), error
    assert error.count("\n") == 1


def test_standard_input_and_help(tmp_path):
    write_run(tmp_path / "run", hidden_size=2)

    def run(*argv):
        return subprocess.run(
            [sys.executable, str(SCRIPTS / "mnist.py"), "predict", *argv],
            input=png(), capture_output=True, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    done = run("-", "--run", "run")
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    assert done.stdout.startswith(b"standard input: ") and b"probability 0." in done.stdout
    done = run("--help")
    assert done.returncode == 0 and b"white on black" in done.stdout and b"--which" in done.stdout


def test_bounds_hold_what_they_are_to_hold():
    assert digits_reader.MOST_BYTES >= 16 + 784 * digits_reader.MOST_IMAGES
    assert len(idx(np.zeros((10_000, 28, 28), np.uint8))) <= digits_reader.MOST_BYTES
