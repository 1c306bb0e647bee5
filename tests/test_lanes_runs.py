"""`--seeds` and `--sweep` as users run them, beside the runs that they stand for."""

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_records import write_record

from lstmjax import seeds, tables
from lstmjax.cli import ConfigError
from lstmjax.records import RunError, params_sha256, validate

ROOT = Path(__file__).parents[1]
# Several commands in one process: importing takes longer than most of them.
SEVERAL = """
import json, runpy, sys
_, folder, commands = sys.argv
for name, *flags in json.loads(commands):
    sys.argv[:] = [f"{folder}/{name}.py", *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
TINY = {
    "sin": "--preset keras --updates 20 --batch-size 5 --num-steps 4 --hidden-size 4",
    "forecast": "--epochs 2 --hidden-size 4 --steps 5 --cell lstm --batch-size 300 --clip-norm 0.1 "
    "--deterministic",
    "imdb": "--data offline --limit 50 --epochs 2 --batch-size 16 --hidden-size 4 --num-layers 1 "
    "--max-length 7 --vocabulary-size 60 --embedding-size 5 --dropout 0.3 --learning-rate 0.02",
    "mnist": "--data offline --limit 50 --epochs 2 --batch-size 16 --hidden-size 4 --dropout 0.3 "
    "--test-every-epoch --on-nan skip",
}
SAID = {
    "sin": r"MSE {mse} (seeds 3 to 4) over the last 20 of 20 updates on sine waves (generated)",
    "forecast": "RMSE over 5 steps {rmse_window} (window re-run), {rmse_carried} (state carried), "
    "seeds 3 to 4, on sine waves (generated)",
    "imdb": "test accuracy {test_accuracy} (seeds 3 to 4) after 2 epochs on generated reviews",
    "mnist": "test accuracy {test_accuracy} (seeds 3 to 4) after 2 epochs on rendered digits",
}
FORM = {"sin": ".5f", "forecast": ".4f", "imdb": ".4f", "mnist": ".4f"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def environment(cache):
    """Of a process that compiles nothing twice."""
    there = {"PYTHONPATH": str(ROOT), "LSTMJAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(cache / "compiled")}
    compiled["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    compiled["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    return {**os.environ, **there, **compiled}


def run(commands, cwd, cache, complaint=""):
    """Runs commands one after the other; returns what they said."""
    arguments = [str(ROOT / "experiments"), json.dumps([command.split() for command in commands])]
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, *arguments],
        cwd=cwd, env=environment(cache), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(complaint) and done.stderr.count("\n") == bool(complaint)
    return done.stdout.splitlines()


def record_of(folder):
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == []
    return record


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def data_of(folder):
    """What the last checkpoint says of the data."""
    last = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    said = json.loads((last / "said" / "metadata").read_text())["said"]
    return said["progress"]["data"]


def nested(file):
    tree = {}
    for name, array in load_file(file).items():
        *groups, leaf = name.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = array
    return tree


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A folder with all runs of ``TINY``, and what they said, by experiment."""
    folder, commands = tmp_path_factory.mktemp("finished"), []
    for name, flags in TINY.items():
        commands += [
            f"{name} {flags} --seed 3 --seeds 2 --devices 2 --out {name}/both",
            f"{name} {flags} --seed 3 --devices 1 --out {name}/3",
            f"{name} {flags} --seed 4 --devices 1 --out {name}/4",
        ]
    flags = f"{TINY['forecast']} --seed 3 --devices 1"
    commands.append(f"forecast {flags} --sweep lr=1e-3,3e-2 --out forecast/sweep")
    commands.append(f"forecast {flags} --learning-rate 3e-2 --out forecast/large")
    lines = run(commands, folder, cache)
    epochs = [line for line in lines if line.startswith("epoch ")]
    said = [line for line in lines if not line.startswith("epoch ")]
    return folder, {name: said[6 * n : 6 * n + 2] for n, name in enumerate(TINY)}, said[24:], epochs


@pytest.mark.parametrize("name", list(TINY))
def test_seeds_are_the_runs_they_stand_for(name, finished):
    tmp_path, said = finished[0] / name, finished[1][name]
    both = record_of(tmp_path / "both")
    alone = [record_of(tmp_path / str(seed)) for seed in (3, 4)]
    assert (both["seed"], both["config"]["seeds"], both["environment"]["devices"]) == (3, 2, 2)
    assert "row" not in both
    assert data_of(tmp_path / "both") == both["dataset"]

    # Each seed's numbers, lists and weights are those of its own run.
    own = seeds.apart(both)
    for found, single in zip(own, alone, strict=True):
        assert found["seed"] == single["seed"]
        assert found["metrics"].keys() == single["metrics"].keys()
        for key, value in single["metrics"].items():
            np.testing.assert_allclose(found["metrics"][key], value, rtol=1e-5, err_msg=key)
        got = load_file(tmp_path / "both" / f"params-seed{single['seed']}.safetensors")
        want = load_file(tmp_path / str(single["seed"]) / "params.safetensors")
        assert got.keys() == want.keys()
        for key, value in want.items():
            np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    apart = [a for a, b in zip(alone[0]["metrics"], alone[1]["metrics"], strict=True) if a != b]
    assert not apart and alone[0]["params_sha256"] != alone[1]["params_sha256"]
    weights = {
        f"seed{seed}": nested(tmp_path / "both" / f"params-seed{seed}.safetensors")
        for seed in (3, 4)
    }
    assert both["params_sha256"] == params_sha256(weights)
    assert [both[name] for name in ("parameters", "updates")] == [
        alone[0][name] for name in ("parameters", "updates")
    ]

    # So are the lines of metrics.jsonl, with their mean.
    lines = [lines_of(tmp_path / folder) for folder in ("both", "3", "4")]
    for line, *singles in zip(*lines, strict=True):
        assert {line["step"]} == {single["step"] for single in singles}
        for key in singles[0].keys() - {"step", "epoch"}:
            values = [single[key] for single in singles]
            found = [line[f"{key}/seed3"], line[f"{key}/seed4"]]
            np.testing.assert_allclose(found, values, rtol=1e-5)
            assert line[key] == pytest.approx(np.mean(values), rel=1e-5)

    # Mean, deviation and interval of two: t = 12.706 with one degree of freedom.
    numbers = [key for key, value in alone[0]["metrics"].items() if not isinstance(value, list)]
    for key in numbers:
        low, high = sorted(record["metrics"][key] for record in alone)
        metrics = both["metrics"]
        expected = [(low + high) / 2, (high - low) / math.sqrt(2), 6.353102368 * (high - low)]
        found = [metrics[f"{key}_{of}"] for of in ("mean", "std", "ci95")]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), key
    texts = {
        key: " ± ".join(f"{both['metrics'][f'{key}_{of}']:{FORM[name]}}" for of in ("mean", "ci95"))
        for key in numbers
    }
    assert said[0].endswith(": seeds 3 to 4, in one program")
    assert said[1].startswith(SAID[name].format(**texts)) and said[1].endswith(
        f"record in {name}/both"
    )
    figures = {"sin": {"loss"}, "forecast": {"loss", "forecast"}}.get(name, {"accuracy"})
    assert {path.stem for path in (tmp_path / "both").glob("*.png")} == figures
    assert (tmp_path / "both" / "vocabulary.txt").exists() == (name == "imdb")


def test_every_epoch_says_the_lanes_mean_and_how_far_they_lie_apart(finished):
    folder, *_, said = finished
    expected = []
    for name in ("imdb", "mnist"):
        every = {"both": (3, 4), "3": (3,), "4": (4,)}
        for which, own in every.items():
            alone = [record_of(folder / name / str(seed))["metrics"] for seed in own]
            for epoch in (1, 2):
                for split in ("train", "validation", "test"):
                    if (name, epoch, split) == ("imdb", 1, "test"):
                        continue  # scored at the end only
                    expected.append((which, epoch, split, alone))
    assert len(said) == len(expected) == 3 * (5 + 6)
    for line, (which, epoch, split, alone) in zip(said, expected, strict=True):
        number = r"(\d\.\d{4})"
        apart = rf" \({number} to {number}\)" if which == "both" else ""
        shown = rf"accuracy {number}{apart}, loss {number}{apart}"
        found = re.fullmatch(rf"epoch {epoch}: {split} {shown}", line)
        assert found, line
        values = np.array(found.groups(), np.float64).reshape(2, -1)
        for metric, own in zip(("accuracy", "loss"), values, strict=True):
            points = [record[f"{split}_{metric}_epochs"] for record in alone]
            points = [each[epoch - 1 if len(each) == 2 else -1] for each in points]
            law = [np.mean(points)] + [min(points), max(points)] * (which == "both")
            np.testing.assert_allclose(own, law, atol=1e-4, rtol=0)


def test_a_sweep_without_validation_says_so(finished):
    folder, _, said, _ = finished
    metrics = record_of(folder / "forecast" / "sweep")["metrics"]
    alone = [record_of(folder / "forecast" / name)["metrics"] for name in ("3", "large")]
    mse = [own["train_mse"] for own in alone]
    assert metrics["sweep_train_mse_mean"] == pytest.approx(mse, rel=1e-5) and mse[1] < mse[0]
    assert metrics["sweep_chosen_lr"] == 0.03 and metrics["sweep_used_validation"] == 0
    assert metrics["sweep_lr"] == [1e-3, 3e-2]
    assert metrics["rmse_window"] == pytest.approx([alone[1]["rmse_window"]], rel=1e-5)
    assert metrics["rmse_window_ci95"] == "nan"  # of one seed there is none
    assert said[1].startswith("chosen by train_mse (there is no validation split): lr 0.03 (lr 0")
    assert said[2].startswith(f"RMSE over 5 steps {metrics['rmse_window'][0]:.4f} (window re-run)")
    assert ", seed 3, on sine waves" in said[2]
    assert (folder / "forecast" / "sweep" / "sweep.png").exists()


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, cache):
    command = f"{TINY['imdb']} --epochs 25 --save-every 1 --seeds 3 --devices 2"
    script = [sys.executable, str(ROOT / "experiments" / "imdb.py")]
    options = {"cwd": tmp_path, "env": environment(cache), "text": True, "stderr": subprocess.PIPE}
    with subprocess.Popen([*script, *command.split(), "--out", "cut"], **options) as cut:
        written = tmp_path / "cut" / "metrics.jsonl"
        while cut.poll() is None and not (written.exists() and len(lines_of(written.parent)) > 4):
            time.sleep(0.02)
        cut.send_signal(signal.SIGTERM)
        complaint = cut.communicate()[1]
    assert cut.returncode == 75, complaint
    assert "go on with --resume cut" in complaint and not (tmp_path / "cut/record.json").exists()
    before = len(lines_of(tmp_path / "cut"))
    both = ["imdb --resume cut --devices 2", f"imdb {command} --out whole"]
    run(both, tmp_path, cache, "going on from step ")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert 4 < before < len(lines_of(whole))
    assert written.read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for seed in range(3):
        name = f"params-seed{seed}.safetensors"
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    first, second = record_of(cut), record_of(whole)
    assert first["resumed"] == 1 and first["params_sha256"] == second["params_sha256"]
    assert first["metrics"] == second["metrics"]


WRONG = {
    "sin": [
        ("--seeds 0", "--seeds: got 0, expected an integer of at least 1"),
        ("--seeds 2 --live", "--live: got True, expected none with --seeds 2"),
        ("--seeds 2 --diagnose", "--diagnose: got True, expected none with --seeds 2"),
        ("--sweep lr=1e-3", "--sweep: got 'lr=1e-3', expected lr=A,B,… with two or more different"),
    ],
    "forecast": [
        (
            "--sweep hidden_size=4,8",
            "--sweep: got 'hidden_size=4,8', expected lr=A,B,… or clip_norm=A,B,…: nothing else",
        ),
        ("--sweep lr=1,2 --diagnose", "--diagnose: got True, expected none with --sweep"),
    ],
    "imdb": [
        (
            "--validation-size 0 --sweep lr=1e-3,3e-3",
            "--sweep: got lr=1e-3,3e-3, expected no sweep without validation examples",
        ),
        ("--seeds 2 --data offline --limit 5", "--batch-size: got 128, expected at most 5"),
        (
            "--seeds 1000000 --data offline --limit 20",
            "--seeds: got 1000000, expected at most 1000 ",
        ),
        ("--seeds 2 --data offline --validation-size 99999", "--validation-size: got 99999, expec"),
    ],
    "mnist": [
        ("--preset tf1 --sweep lr=1e-3,3e-3", "--test-every-epoch: got True, expected none with"),
        ("--seeds 2 --seed 2147483647", "--seeds: got 2, expected seeds below 2147483648"),
    ],
}


@pytest.mark.parametrize(
    ("name", "flags", "text"), [(name, *case) for name, cases in WRONG.items() for case in cases]
)
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


def test_a_batch_that_is_never_full_is_told_before_the_work_of_every_seed(cache, monkeypatch):
    monkeypatch.setenv("LSTMJAX_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import imdb

    asked, hold_out = [], imdb.imdb.hold_out

    def counted(splits, size, seed):
        asked.append(seed)
        return hold_out(splits, size, seed)

    monkeypatch.setattr(imdb.imdb, "hold_out", counted)
    with pytest.raises(ConfigError, match="--batch-size: got 128, expected at most 20, the train"):
        imdb.run(imdb.Config(data="offline", limit=20, seed=4, seeds=1000))
    assert asked == [4, 4]  # of all reviews none are held out, and then those of the first seed


# ---- tables -------------------------------------------------------------------------------------


def test_tables_take_the_seeds_of_one_record(tmp_path):
    accuracies, epochs = [0.83, 0.84, 0.82], [[0.81, 0.83], [0.80, 0.84], [0.79, 0.82]]
    runs = [
        {"test_accuracy": last, "test_accuracy_epochs": all_of_them}
        for last, all_of_them in zip(accuracies, epochs, strict=True)
    ]
    (tmp_path / "apart").mkdir()
    for seed, own in enumerate(runs):
        write_record(tmp_path / "apart", seed, *own.values(), 9.0)
    (tmp_path / "at-once").mkdir()
    write_record(
        tmp_path / "at-once", 0, 0, [], 27.0,
        command="python experiments/imdb.py --seeds 3 --out runs/0",
        config={"preset": "tf2", "seed": 0, "out": "runs/0", "seeds": 3},
        metrics=seeds.together(runs, range(3)),
        seconds={"compile": 6.0, "train": 27.0, "eval": 3.0},
    )  # fmt: skip
    texts = {}
    for name in ("apart", "at-once"):
        (group,) = tables.load_groups(tmp_path / name)
        assert group.values("test_accuracy") == accuracies
        assert group.values("test_accuracy_epochs") == epochs
        texts[name] = tables.benchmarks([group]), tables.readme_table([group])
    # The same numbers, and an equal share of the seconds each; only the line has another name.
    label = {"lstmjax |": "lstmjax, 3 seeds at once |", "imdb-tf2 |": "imdb-tf2, 3 seeds at once |"}
    for one, other in zip(texts["apart"], texts["at-once"], strict=True):
        (line,) = (line for line in one.splitlines() if "0.8300 ± 0.0100" in line)
        for plain, named in label.items():
            line = line.replace(plain, named)
        assert line in other.splitlines()
    whole = texts["at-once"][0]
    assert "**lstmjax, 3 seeds at once**: `python experiments/imdb.py --seeds 3` with seeds 0, 1, 2"
    assert "with seeds 0, 1, 2, each with an equal share of the seconds\n" in whole
    assert "  - records: `imdb-0.json`\n" in whole


def test_runs_at_once_and_runs_alone_are_not_averaged(tmp_path):
    write_record(tmp_path, 0, 0.5, [0.5], 9.0)
    record = {
        "config": {"preset": "tf2", "seed": 1, "seeds": 2},
        "metrics": seeds.together([{"test_accuracy": 0.75}, {"test_accuracy": 1.0}], [1, 2]),
    }
    write_record(tmp_path, 1, 0, [], 9.0, **record)
    groups = tables.load_groups(tmp_path)
    assert [group.label for group in groups] == ["lstmjax", "lstmjax, 2 seeds at once"]
    assert [group.values("test_accuracy") for group in groups] == [[0.5], [0.75, 1.0]]
    write_record(tmp_path, 2, 0, [], 9.0, **record, file="again-")
    with pytest.raises(RunError, match="are two runs of the same seed"):
        tables.load_groups(tmp_path)
