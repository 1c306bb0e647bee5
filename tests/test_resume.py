"""The experiments, killed and taken up again: nothing is lost, and the end is the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lstmjax import cli
from lstmjax.records import Run, RunError

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = ["--data", "offline", "--limit", "600"]
COMMANDS = {
    "sin": ["--preset", "keras", "--updates", "40", "--save-every", "20"],
    "forecast": ["--epochs", "6", "--hidden-size", "8", "--save-every", "3"],
    "imdb": [*OFFLINE, "--epochs", "2", "--hidden-size", "8", "--batch-size", "8"],
    "mnist": [*OFFLINE, "--epochs", "2", "--hidden-size", "8", "--batch-size", "5", "--diagnose"],
}
for name in ("imdb", "mnist"):
    COMMANDS[name] += ["--validation-size", "100", "--save-every", "10"]


def start(name, *flags):
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *flags]
    quiet = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--devices", "2"] if "--devices" not in flags else command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=quiet,
    )


def finished(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each experiment's run that nothing disturbed, made once: (record, metrics.jsonl, folder)."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            finished(start(name, *COMMANDS[name], "--out", str(folder)))
            record = json.loads((folder / "record.json").read_text())
            made[name] = record, (folder / "metrics.jsonl").read_bytes(), folder
        return made[name]

    return get


def assert_same(folder, whole):
    record, metrics, other = whole
    again = json.loads((folder / "record.json").read_text())
    assert again["params_sha256"] == record["params_sha256"]
    assert again["metrics"] == record["metrics"]
    assert again["config"] == {**record["config"], "out": again["config"]["out"]}
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    for path in other.glob("*.png"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    return again


@pytest.mark.parametrize("name", COMMANDS)
def test_stopped_by_a_signal(name, whole, tmp_path):
    """SIGTERM in the midst of it, then --resume: bit for bit what it would have been."""
    folder = tmp_path / "run"
    first = start(name, *COMMANDS[name], "--out", str(folder))
    wait_for(first, lambda: any(p.name.isdigit() for p in folder.glob("checkpoints/*")))
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=300)
    if first.returncode != 0:  # else it was at its end before it heard
        assert first.returncode == 75, err
        assert f"go on with --resume {folder}" in err and "Traceback" not in err
        assert not (folder / "record.json").exists()
        out = finished(start(name, "--resume", str(folder)))
        assert str(folder) in out
        assert assert_same(folder, whole(name))["resumed"] == 1
    else:
        assert_same(folder, whole(name))


def test_killed_at_random_moments(whole, tmp_path):
    """kill -9, while a checkpoint is written too: what follows a resume is the same."""
    folder, draw = tmp_path / "run", random.Random(4)
    process = start("imdb", *COMMANDS["imdb"], "--out", str(folder), "--save-every", "1")
    for _ in range(2):
        wait_for(process, lambda: lines(folder) > 0)
        time.sleep(draw.random())
        process.kill()
        process.communicate()
        if (folder / "record.json").exists():  # it was at its end before it was killed
            break
        process = start("imdb", "--resume", str(folder), "--save-every", "1")
    else:
        finished(process)
    record, metrics, _ = whole("imdb")
    again = json.loads((folder / "record.json").read_text())
    assert again["params_sha256"] == record["params_sha256"]
    assert again["metrics"] == record["metrics"]
    assert (folder / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("name", COMMANDS)
def test_a_checkpoint_says_what_was_trained_on(name, whole):
    """By which --resume refuses other data: tests/test_keeper.py."""
    record, _, folder = whole(name)
    last = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    said = json.loads((last / "said" / "metadata").read_text())["said"]
    assert said["progress"]["data"] == record["dataset"]


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The folder of a run of forecast.py that has only just begun, and its Config."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import forecast

    config = forecast.Config(epochs=7, out=str(tmp_path / "run"))
    Run.create("forecast", config, out=config.out).close()
    return tmp_path / "run", forecast.Config, forecast.PRESETS


def test_settings_are_taken_from_the_run(begun):
    folder, kind, presets = begun
    argv = ["--resume", str(folder), "--on-nan", "skip", "--devices", "1", "--save-every", "5"]
    config = cli.parse(kind, presets=presets, argv=argv)
    assert config == kind(
        epochs=7,
        out=str(folder),
        resume=str(folder),
        on_nan="skip",
        devices=1,
        save_every="5",
    )


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--learning-rate", "0.1"], "--learning-rate: got 0.1, expected 0.001 as in "),
        (["--preset", "rnn"], "--preset: got rnn, expected lstm as in "),
        (["--out", "x"], "--out: got x, expected "),
        (["--seed=5"], "--seed: got 5, expected 0 as in "),
    ],
)
def test_settings_stay_those_of_the_run(flags, expected, begun, capfd):
    folder, kind, presets = begun
    with pytest.raises(SystemExit) as stop:
        cli.parse(kind, presets=presets, argv=["--resume", str(folder), *flags])
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"error: {expected}")


@pytest.mark.parametrize(
    "settings, expected",
    [
        ("{", "config.json is damaged: Expecting property name"),
        ("[1]", "config.json is damaged: it holds no settings"),
        ('{"epochs": "many"}', "config.json is damaged: epochs is 'many'"),
        ('{"cell": "quantum"}', "config.json is damaged: cell is 'quantum'"),
        ('{"colour": 3}', "has the setting colour, unknown here"),
    ],
)
def test_settings_that_are_damaged(settings, expected, begun):
    folder, kind, presets = begun
    (folder / "config.json").write_text(settings)
    with pytest.raises(RunError, match=expected):
        cli.parse(kind, presets=presets, argv=["--resume", str(folder)])


def test_nothing_to_resume(tmp_path):
    process = start("sin", "--resume", str(tmp_path / "none"))
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert err == f"error: cannot read {tmp_path}/none/config.json: No such file or directory\n"


def test_another_number_of_devices_is_told(begun, monkeypatch, capsys):
    folder, kind, _ = begun
    Run.open("forecast", kind(resume=str(folder), on_nan="skip")).close()
    assert capsys.readouterr().err == ""
    story = json.loads((folder / "run.json").read_text())
    story["opened"][-1]["devices"] += 1
    (folder / "run.json").write_text(json.dumps(story))
    with Run.open("forecast", kind(resume=str(folder), on_nan="skip")) as run:
        assert run.config["on_nan"] == "skip"  # as it is now, in the record too
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {folder} had ") and "dropped elsewhere" in line


def test_another_processor_is_told(begun, capsys):
    """Of the same name, too; of a run that did not write it down nothing is known."""
    folder, kind, _ = begun
    for kept, expected in ((None, 0), ("family 1, model 2", 1)):
        story = json.loads((folder / "run.json").read_text())
        story["opened"][-1].pop("processor", None)
        if kept is not None:
            story["opened"][-1]["processor"] = kept
        (folder / "run.json").write_text(json.dumps(story))
        Run.open("forecast", kind(resume=str(folder))).close()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == expected
        assert all(line.startswith("warning: processor changed since ") for line in lines)


def test_a_home_is_found_behind_an_equals_sign(begun, tmp_path, monkeypatch):
    folder, kind, presets = begun
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.parse(kind, presets=presets, argv=["--resume=~/run"]).epochs == 7
    Run.create("forecast", kind(), out="~/other").close()
    assert (tmp_path / "other" / "config.json").exists() and folder.parent == tmp_path
