"""experiments/soak.py in its small form, and what it says of its numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lstmjax import soak_plots, soak_tables
from lstmjax.records import validate

ROOT = Path(__file__).resolve().parents[1]
FOUND = {
    "kill": {
        "kills": 50,
        "kills_while_saving": 25,
        "runs": 7,
        "runs_identical": 6,
        "steps_lost_most": 24,
        "steps_lost_mean": 11.26,
    },
    "load": {
        "minutes": [0.5, 60.2],
        "steps": 123456,
        "megabytes_first": 811.2,
        "megabytes_last": 812.9,
        "megabytes_an_hour": 0.84,
        "step_ms": [26.34, 27.0, 25.11],
        "step_cpu_ms": [50.12, 50.0, 49.96],
    },
}
LINES = {
    "kill": "50 kills, 25 of them while saving: 6 of 7 runs ended bit for bit as the undisturbed "
    "one; a kill cost 11.3 logged steps, 24 at most",
    "load": "60 minutes, 123,456 steps: memory 811 MB in the first tenth of the time and 813 MB in "
    "the last, +0.8 MB an hour over the last three quarters; a step took 26.3 ms and 25.1 ms by "
    "the clock, 50.1 ms and 50.0 ms of processor time",
}


@pytest.mark.parametrize("mode", FOUND)
def test_the_line(mode):
    assert soak_tables.line(mode, FOUND[mode]) == LINES[mode]


def test_the_figure_shows_what_was_measured():
    minutes, memory = np.linspace(0, 60, 40), np.linspace(800, 810, 40)
    edges, step_ms = np.linspace(0, 60, 4), np.array([20.0, 30.0, 25.0])
    upper, lower = soak_plots.load(minutes, memory, edges, step_ms, 2 * step_ms).axes
    np.testing.assert_array_equal(upper.lines[0].get_xydata(), np.stack([minutes, memory], 1))
    np.testing.assert_array_equal(lower.patches[0].get_data().values, step_ms)
    np.testing.assert_array_equal(lower.patches[1].get_data().values, 2 * step_ms)
    assert upper.get_ylim()[0] == lower.get_ylim()[0] == 0
    assert "(MB)" in upper.get_ylabel() and "(ms)" in lower.get_ylabel()


def soak(folder, *flags):
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "soak.py", *flags, "--out", folder],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "record.json").read_text())
    assert validate(record) == []
    assert soak_tables.line(record["config"]["mode"], record["metrics"]) in done.stdout
    return record["metrics"]


def test_killed_while_saving_and_taken_up_again(tmp_path):
    flags = ["--kills", "2", "--wait", "0.1", "--data", "offline", "--epochs", "2"]
    found = soak(tmp_path / "run", *flags, "--limit", "1000", "--devices", "1")
    assert found["kills"] == 2 and found["runs"] == found["runs_identical"] >= 1
    assert 0 <= found["steps_lost_most"] <= 25


def test_watched_under_load(tmp_path):
    flags = ["--mode", "load", "--minutes", "0.05", "--every", "0.5", "--data", "offline"]
    found = soak(tmp_path / "run", *flags, "--devices", "1")
    assert 100 < found["megabytes_first"] < 5000 and found["steps"] > 0
    assert len(found["minutes"]) == len(found["megabytes"]) and len(found["step_ms"]) == 10
    assert min(found["step_cpu_ms"]) >= 0 and np.sum(found["step_cpu_ms"]) > 0
    assert (tmp_path / "run" / "load.png").exists()
