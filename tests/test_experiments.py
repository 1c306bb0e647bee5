"""Every experiment as its users run it: a process of its own, on sizes that take seconds.

One run of each is compiled as theirs is, too; the others are not optimised (conftest.py).
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from problems import as_users_do
from safetensors.numpy import load_file

from lstmjax.records import params_sha256, validate

ROOT = Path(__file__).parents[1]

TINY = {
    "sin tf1": "sin --updates 8 --frame-every 4",
    "sin keras": "sin --preset keras --updates 6 --frame-every 3",
    "forecast lstm": "forecast --epochs 2 --hidden-size 8 --steps 7",
    "forecast rnn": "forecast --preset rnn --epochs 2 --batch-size 475 --no-all-windows",
    "imdb": "imdb --data offline --limit 70 --epochs 2 --batch-size 32 --hidden-size 8 --mask "
    "--no-drop-remainder --clip-norm 1",
    "imdb source": "imdb --data offline --limit 70 --epochs 2 --batch-size 32 --cell gru "
    "--validation-size 0 --test-every-epoch --hidden-size 8",
    "mnist": "mnist --data offline --limit 70 --epochs 2 --batch-size 16 --hidden-size 8",
    "imdb variant": "imdb --data offline --limit 70 --epochs 2 --batch-size 32 --hidden-size 8 "
    "--num-layers 1 --cell layer_norm --init torch --forget-bias chrono:80 --learned-state "
    "--recurrent-dropout 0.2 --weight-drop 0.1 --zoneout 0.1 --locked-dropout 0.1 "
    "--embedding-dropout 0.1 --word-dropout 0.1",
    "mnist variant": "mnist --data offline --limit 70 --epochs 2 --batch-size 16 --hidden-size 8 "
    "--cell refine --forget-bias uniform_gate --zoneout 0.1 --weight-drop 0.1",
    "mnist tf1": "mnist --preset tf1 --data offline --limit 70 --epochs 2 --hidden-size 8",
}
OPTIMISED = ("sin tf1", "forecast lstm", "imdb", "mnist")
SAYS = {
    "sin": "sine waves (generated)",
    "forecast": "sine waves (generated)",
    "imdb": "generated reviews (offline data, not IMDB)",
    "mnist": "rendered digits (offline data, not MNIST)",
}
FIGURES = {
    "sin": {"loss.png", "fit.png", "fit.gif"},
    "forecast": {"loss.png", "forecast.png"},
    "imdb": {"accuracy.png"},
    "mnist": {"accuracy.png"},
}
PNG, GIF = b"\x89PNG\r\n\x1a\n", b"GIF89a"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache of offline data for all runs of this file."""
    return tmp_path_factory.mktemp("cache")


def run(command, cwd, cache, check=True, room=None, surroundings=os.environ):
    name, *flags = command.split() if isinstance(command, str) else command
    environment = {**surroundings, "LSTMJAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)
    arguments = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *flags]
    if room is not None:  # in KiB
        arguments = ["bash", "-c", f'ulimit -v {room} && exec "$@"', "bash", *arguments]
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("case", list(TINY))
def test_a_run_leaves_everything_it_should(case, tmp_path, cache):
    experiment = TINY[case].split()[0]
    surroundings = as_users_do() if case in OPTIMISED else os.environ
    command = f"{TINY[case]} --out here --seed 3 --devices 2"
    done = run(command, tmp_path, cache, surroundings=surroundings)
    first, *_, last = done.stdout.splitlines()
    assert SAYS[experiment] in first and SAYS[experiment] in last
    assert done.stderr == ""  # no progress bar where nobody watches, and no warnings

    folder = tmp_path / "here"
    names = {path.name for path in folder.iterdir()}
    expected = {"config.json", "metrics.jsonl", "record.json", "params.safetensors"}
    assert expected | FIGURES[experiment] <= names
    assert sum(name.startswith("events.out.tfevents.") for name in names) == 1
    for name in FIGURES[experiment]:
        magic = GIF if name.endswith("gif") else PNG
        assert (folder / name).read_bytes().startswith(magic)

    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == []
    assert record["experiment"] == experiment
    assert record["seed"] == 3
    assert record["environment"]["devices"] == 2
    assert record["command"] == f"python experiments/{TINY[case].split()[0]}.py " + " ".join(
        f"{TINY[case]} --out here --seed 3 --devices 2".split()[1:]
    )
    assert "row" not in record  # these settings are nobody's row of BENCHMARKS.md
    assert record["config"] == json.loads((folder / "config.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines and all(line["step"] >= 0 for line in lines)
    numbers = [v for v in record["metrics"].values() if isinstance(v, float)]
    assert numbers and np.isfinite(numbers).all()
    if experiment in ("imdb", "mnist"):
        assert 0 <= record["metrics"]["test_accuracy"] <= 1
        every = "--test-every-epoch" in TINY[case] or "tf1" in TINY[case]
        assert len(record["metrics"]["test_accuracy_epochs"]) == (2 if every else 1)
        assert ("validation_accuracy" in record["metrics"]) == ("source" not in case)

    # The hash in the record is that of the weights in the file.
    nested = {}
    for name, array in load_file(folder / "params.safetensors").items():
        *groups, leaf = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = array
    assert params_sha256(nested) == record["params_sha256"]
    weights = load_file(folder / "params.safetensors").values()
    assert record["parameters"] == sum(array.size for array in weights)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    first = 0 if case.startswith("sin") else 1  # sin counts its lines from 0
    assert record["updates"] == max(steps) + 1 - first


def test_the_same_seed_gives_the_same_weights(tmp_path, cache):
    command = "imdb --data offline --limit 64 --epochs 1 --batch-size 16 --hidden-size 8"
    hashes = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(f"{command} --out {name} --seed {seed}", tmp_path, cache)
        hashes.append(json.loads((tmp_path / name / "record.json").read_text())["params_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_number_of_devices_changes_round_off_only(tmp_path, cache):
    losses = []
    for devices in (1, 3):
        command = f"mnist --data offline --limit 64 --epochs 1 --batch-size 16 --out {devices}"
        run(f"{command} --hidden-size 8 --devices {devices}", tmp_path, cache)
        record = json.loads((tmp_path / str(devices) / "record.json").read_text())
        losses.append([record["metrics"][f"{s}_loss"] for s in ("train", "validation", "test")])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_predict_reads_a_trained_run(tmp_path, cache):
    command = "imdb --data offline --limit 200 --epochs 3 --batch-size 16 --learning-rate 0.01"
    command += " --hidden-size 8 --embedding-size 20 --max-length 30 --dropout 0 --mask"
    run(f"{command} --out runs/imdb-1", tmp_path, cache)
    found = {}
    for text in ("I loved it, a great film", "I hated it, a bad film"):
        found[text] = run(["imdb", "predict", text], tmp_path, cache).stdout
    for line in found.values():
        assert "probability of a positive review 0." in line and "runs/imdb-1" in line
    assert len(set(found.values())) == 2


def test_predict_without_a_run_is_one_line(tmp_path, cache):
    done = run(["imdb", "predict", "fine"], tmp_path, cache, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: --run: there is no finished run under runs/, train one first or name one\n"
    )
    (tmp_path / "empty").mkdir()
    done = run(["imdb", "predict", "fine", "--run", "empty"], tmp_path, cache, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


SHORT = {
    "sin": "--preset keras --updates 6 --frame-every 3",
    "forecast": "--preset rnn --epochs 2 --steps 7",
    "imdb": "--data offline --limit 64 --epochs 1 --batch-size 16 --hidden-size 8",
    "mnist": "--data offline --limit 64 --epochs 1 --batch-size 16 --hidden-size 8",
}


@pytest.mark.parametrize("name", list(SHORT))
def test_a_run_in_bfloat16_keeps_float32_weights(name, tmp_path, cache):
    command = f"{name} {SHORT[name]} --devices 2 --precision bfloat16 --out here"
    done = run(command, tmp_path, cache)
    assert done.stderr == ""
    record = json.loads((tmp_path / "here" / "record.json").read_text())
    assert validate(record) == [] and record["config"]["precision"] == "bfloat16"
    weights = load_file(tmp_path / "here" / "params.safetensors")
    assert {leaf.dtype.name for leaf in weights.values()} == {"float32"}
    # Numbers that bfloat16 holds have 16 bits of zeros; trained weights are others.
    assert all(np.any(leaf.view(np.uint32) & 0xFFFF) for leaf in weights.values())
    numbers = [v for v in record["metrics"].values() if isinstance(v, float)]
    assert numbers and np.isfinite(numbers).all()


@pytest.mark.parametrize("name", list(SHORT))
def test_an_unknown_precision_is_one_clear_line(name, tmp_path, cache, monkeypatch, capsys):
    text = "--precision: got 'float16', expected one of float32, bfloat16"
    flags = "--precision float16"
    test_a_wrong_value_is_one_clear_line(name, flags, text, tmp_path, cache, monkeypatch, capsys)


def test_an_old_folder_is_never_written_into(tmp_path, cache):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    done = run("forecast --epochs 1 --out old", tmp_path, cache, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert done.stderr == "error: --out: old exists and is not empty: choose another --out\n"
    assert {p.name for p in (tmp_path / "old").iterdir()} == {"notes.txt"}


WRONG = {
    "sin": [
        ("--updates 0", "--updates: got 0, expected an integer of at least 1"),
        ("--hidden-size ten", "--hidden-size: got 'ten', expected an integer"),
        ("--learning-rate -1", "--learning-rate: got -1.0, expected a finite number above 0"),
        ("--learning-rate nan", "--learning-rate: got nan, expected a finite number above 0"),
        ("--preset tf3", "--preset: got 'tf3', expected one of tf1, keras"),
        ("--unroll 0", "--unroll: got 0, expected an integer of at least 1"),
        ("--input-size 0", "--input-size: got 0, expected an integer of at least 1"),
        ("--frame-every 0", "--frame-every: got 0, expected an integer of at least 1"),
        ("--num-steps 0", "--num-steps: got 0, expected an integer of at least 1"),
        ("--batch-size 0", "--batch-size: got 0, expected an integer of at least 1"),
        ("--seed 5000000000", "--seed: got 5000000000, expected an integer below 2147483648"),
        ("--seed -1", "--seed: got -1, expected an integer of at least 0"),
        ("--loss max", "--loss: got 'max', expected one of sum, mean"),
        ("--clip-norm 0", "--clip-norm: got 0.0, expected a finite number above 0"),
        ("--updats 3", "--updats: no such flag, did you mean --updates?"),
        ("--devices 0", "--devices: got 0, expected an integer of at least 1"),
        ("--devices 999", "--devices: got 999, expected at most"),
        ("--method onednn --cell gru --init keras", "--cell: got gru, expected lstm with --method"),
    ],
    "forecast": [
        ("--steps 0", "--steps: got 0, expected an integer of at least 1"),
        ("--epochs 0", "--epochs: got 0, expected an integer of at least 1"),
        ("--init uniform", "--init: got uniform, expected keras or lstmjax with --cell keras1"),
        ("--method loop", "--method: got 'loop', expected one of fused, scan, unrolled"),
        ("--cell elman", "--cell: got 'elman', expected one of lstm, gru, rnn, linear_rnn"),
        ("--method cudnn", "--cell: got keras1, expected lstm with --method cudnn"),
    ],
    "imdb": [
        ("--dropout 1.0", "--dropout: got 1.0, expected 0 <= dropout < 1"),
        ("--vocabulary-size 4", "--vocabulary-size: got 4, expected an integer of at least 5"),
        ("--validation-size 9999999 --data offline", "--validation-size: got 9999999, expected"),
        ("--validation-size -1", "--validation-size: got -1, expected an integer of at least 0"),
        ("--padding left", "--padding: got 'left', expected one of pre, post"),
        ("--max-length 0", "--max-length: got 0, expected an integer of at least 1"),
        ("--limit 0", "--limit: got 0, expected an integer of at least 1"),
        ("--batch-size 64 --limit 5 --data offline", "--batch-size: got 64, expected at most 5"),
        ("--data web", "--data: got 'web', expected one of auto, tfds, offline"),
        ("--recurrent-dropout 1", "--recurrent-dropout: got 1.0, expected 0 <= recurrent_dropout"),
        ("--word-dropout -1", "--word-dropout: got -1.0, expected 0 <= word_dropout < 1"),
        ("--forget-bias chrono:1", "--forget-bias: got chrono:1, expected chrono:T with T >= 2"),
        ("--cell rnn --init torch", "--init: got torch, expected keras or lstmjax with --cell rnn"),
        ("--cell cifg2", "--cell: got 'cifg2', expected one of lstm, gru, rnn, linear_rnn, peep"),
        ("--method onednn --unroll 2", "--unroll: got 2, expected 1 with --method onednn"),
        ("--method onednn --mask", "--mask: got True, expected none with --method onednn"),
        ("predict", "got no text, expected a review in quotes"),
        ("predict one two", "Unrecognized options: two"),
    ],
    "mnist": [
        ("--method cudnn --cell gru --init keras", "--cell: got gru, expected lstm with --method"),
        ("--layout columns", "--layout: got 'columns', expected one of rows, pixels, permuted"),
        ("--layout permuted --permutation mine", "--permutation: got mine, expected one of"),
        ("--permutation bit_reversal", "--permutation: got bit_reversal, expected no other order"),
        (
            "--forget-bias big",
            "--forget-bias: got big, expected a number, chrono:T, log_uniform:T or uniform_gate",
        ),
        ("--cell gru --init keras --forget-bias 1", "--forget-bias: got 1, expected None with the"),
        ("--locked-dropout 1", "--locked-dropout: got 1.0, expected 0 <= locked_dropout < 1"),
        ("--cell gru", "--init: got tf1, expected keras or lstmjax with --cell gru"),
        ("--validation-size 9999999 --data offline", "--validation-size: got 9999999, expected"),
    ],
}

CASES = [(name, flags, text) for name, cases in WRONG.items() for flags, text in cases]


@pytest.mark.parametrize(("name", "flags", "text"), CASES)
def test_a_wrong_value_is_one_clear_line(name, flags, text, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSTMJAX_CACHE", str(cache))
    script = ROOT / "experiments" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith(f"error: {text}") and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_too_little_memory_is_one_line(tmp_path, cache):
    done = run(
        "forecast --epochs 1 --steps 2000000000", tmp_path, cache, check=False, room=8_000_000
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory: "), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", list(WRONG))
def test_help_explains_every_flag(name, monkeypatch, capsys):
    script = ROOT / "experiments" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    text = capsys.readouterr().out
    assert not stop.value.code
    assert f"python experiments/{name}.py" in text
    for flag in ("--learning-rate", "--seed", "--out", "--devices", "--method", "--unroll"):
        assert flag in text
