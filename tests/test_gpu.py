"""The script that measures on a GPU, run on a CPU, and the section that is made of its record."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
from test_cudnn import kernels  # noqa: F401

from lstmjax import LSTMState, cudnn, gpu_tables
from lstmjax.records import validate

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "gpu.py"
NO_CUDA = "it needs a CUDA device, and JAX's default device is"
H200 = gpu_tables.CHIPS["NVIDIA H200"]


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(what a small run printed, its folder)."""
    folder = tmp_path_factory.mktemp("gpu") / "run"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--small", "--out", str(folder)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, folder


# ---- the whole run ------------------------------------------------------------------------------


def test_a_small_run_measures_what_a_cpu_can_and_says_why_the_rest_is_missing(small):
    said, folder = small
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert validate(record) == []
    left = {path.name for path in folder.iterdir()}
    assert left == {"config.json", "run.json", "record.json", "gpu.md"}
    times = {key: value for key, value in record["metrics"].items() if key.startswith("time|")}
    methods = ("scan", "fused", "scan unroll=2")
    assert set(times) == {
        f"time|small|{precision}|{method}|{kind}"
        for precision in ("float32", "tf32", "bfloat16")
        for method in methods
        for kind in ("forward", "train")
    }
    assert all(0 < low <= median <= high < 60 for median, low, high in times.values())
    assert [key for key in record["metrics"] if key not in times] == [
        f"flags|{trial}|small|tf32|fused|forward" for trial in ("none", "double buffering")
    ]
    missing = record["config"]["missing"]
    assert missing["audit"].startswith(NO_CUDA)
    assert missing["time|small|bfloat16|cudnn|train"].startswith(NO_CUDA)
    torch = {why for key, why in missing.items() if "|torch|" in key}
    assert len(torch) == 1 and "PyTorch" in torch.pop()
    assert record["config"]["left_out"] == [] and record["config"]["minutes"] == 8.0

    text = (folder / "gpu.md").read_text(encoding="utf-8")
    assert text in said and said.endswith(f"record in {folder}\n")
    assert f"| cudnn | not measured: {NO_CUDA} cpu | – |" in text
    assert "| torch | not measured: PyTorch" in text
    assert "%" not in text.partition("roofline")[0] and "there are no percentages" in text


def test_a_wrong_flag_of_xla_is_no_end_of_the_run(gpu):
    """XLA ends a process whose XLA_FLAGS it does not know."""
    said = gpu.child("trials", gpu.Config(small=True), 60, "--xla_no_such_flag=1")
    assert "the process ended with" in said["missing"] and "xla_no_such_flag" in said["missing"]


def test_a_part_that_takes_too_long_is_stopped(gpu):
    start = time.perf_counter()
    said = gpu.child("trials", gpu.Config(small=True), 0)
    assert said == {"missing": "it was stopped, for no time was left"}
    assert time.perf_counter() - start < 10


def test_what_does_not_fit_into_the_time_is_left_out(gpu, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    found, ran = gpu.Found(minutes=1), []

    def part(name, seconds):
        def run():
            ran.append(name)
            now[0] += seconds

        found.run("layers", name, run, [f"time|{name}"])

    part("a", 20)
    part("b", 15)  # of the 40 s that are left
    part("c", 1)  # 25 are left, and the longest so far took 20
    part("d", 1)  # 24
    part("e", 3)  # 23
    part("f", 1)  # 20, and a tenth more than 20 may be needed
    found.run("another kind", "g", lambda: ran.append("g"), [])
    now[0] += 60
    found.run("yet another", "h", lambda: ran.append("h"), ["time|h", "time|i"])
    assert ran == ["a", "b", "c", "d", "e", "g"] and found.left_out == ["f", "h"]
    assert found.missing == dict.fromkeys(["time|f", "time|h", "time|i"], "no time was left")
    assert "a: 20 s; 0.7 minutes left" in capsys.readouterr().out


# ---- what is measured ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["scan unroll=2", "fused", "cudnn"])
def test_programs_are_the_layer_and_the_gradients_of_its_mean_square(method, gpu, kernels):  # noqa: F811
    params, xs = gpu.inputs((3, 4, 2, 5), "float32")
    exact = oracle.tree_map(lambda a: np.asarray(a, np.float64), (params, xs))
    zeros = (np.zeros((3, 5)),) * 2
    final, hs = jax.jit(gpu.program(method, "forward"))(params, xs)
    oracle.assert_close((tuple(final), hs), oracle.lstm(*exact, zeros), 1e-5)
    loss = lambda params, xs: np.mean(oracle.lstm(params, xs, zeros)[1] ** 2)  # noqa: E731
    value, gradients = jax.jit(gpu.program(method, "train"))(params, xs)
    oracle.assert_close(value, loss(*exact), 1e-5)
    oracle.assert_close(gradients, oracle.gradients(loss, *exact), 1e-5)


def test_methods_and_precisions_are_the_ones_they_are_called(gpu, monkeypatch):
    seen = []

    def layer(params, xs, method, unroll):
        precision = jax.config.jax_default_matmul_precision
        seen.append((method, unroll, precision, xs.dtype.name, params.w_h.dtype.name))
        return LSTMState(xs, xs), xs

    monkeypatch.setattr(gpu, "lstm", layer)
    for precision in ("float32", "tf32", "bfloat16"):
        arguments = gpu.inputs((2, 2, 3, 3), precision)
        gpu.prepared(("x", precision, "scan unroll=8", "forward"), arguments)
    assert seen == [
        ("scan", 8, "highest", "float32", "float32"),
        ("scan", 8, "tensorfloat32", "float32", "float32"),
        ("scan", 8, None, "bfloat16", "bfloat16"),
    ]


@pytest.fixture
def quick():
    """Compiling takes nearly all the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_the_audit_finds_cudnns_reference_right(gpu, kernels, quick):  # noqa: F811
    errors = gpu.audit((4, 4, 2, 5), "ragged", 2)
    assert list(errors) == ["float32", "tf32"]
    for named in errors.values():
        assert tuple(named) == gpu_tables.ARRAYS and 0 < max(named.values()) < 2e-6


@pytest.mark.parametrize(
    "case, fault, wrong", [(("full", 1), "dc0", "dc0"), (("ragged", 2), "dx", "dxs")]
)
def test_the_audit_finds_what_is_wrong(case, fault, wrong, gpu, kernels, quick):  # noqa: F811
    kernels.fault = fault
    for named in gpu.audit((4, 4, 2, 5), *case).values():
        assert [name for name, error in named.items() if not error < 1e-3] == [wrong]


def test_cudnn_is_timed_where_it_can_be(gpu, kernels, quick):  # noqa: F811
    keys = [("small", precision, "cudnn", "forward") for precision in gpu_tables.PRECISIONS]
    float32, tf32, bfloat16 = gpu.timed(gpu_tables.SMALL, keys, gpu.Clock()).values()
    assert min(float32.median, tf32.median) > 0 and bfloat16 == "cuDNN is reached in float32"
    assert {rounded for _, rounded in kernels.runs} == {True, False}


def test_the_audit_goes_on_after_a_failure_and_needs_cudnn(gpu, monkeypatch):
    assert gpu.audit_part(gpu_tables.SMALL)["missing"].startswith(NO_CUDA)

    def audit(shape, lengths, directions):
        if lengths == "ragged" and directions == 2:
            raise jax.errors.JaxRuntimeError("INTERNAL: no\nmore")
        return {"tf32": {"hs": 0.5 * directions}}

    monkeypatch.setattr(cudnn, "absent", lambda: None)
    monkeypatch.setattr(gpu, "audit", audit)
    said = gpu.audit_part(gpu_tables.SMALL)
    case = "audit|3, 5, 4, 6"
    assert said["failures"] == {f"{case}|ragged|2": "INTERNAL: no"}
    both = {f"{case}|{lengths}|1|tf32|hs": 0.5 for lengths in ("full", "ragged")}
    assert said["errors"] == both | {f"{case}|full|2|tf32|hs": 1.0}


# ---- what it is measured against ----------------------------------------------------------------


@pytest.mark.parametrize(
    "precision, batch, hidden, roofline, step, train",
    [
        ("bfloat16", 64, 512, 0.81, 1.24, (0.39, 1.54, 3.09)),
        ("bfloat16", 512, 512, 6.5, 2.89, (1.30, 5.18, 10.4)),
        ("bfloat16", 256, 1024, 13.0, 7.47, (3.02, 12.1, 24.2)),
        ("tf32", 64, 512, 1.63, 1.81, (0.60, 2.41, 4.82)),
        ("tf32", 64, 1024, 6.5, 7.2, (2.40, 9.59, 19.2)),
        ("tf32", 512, 1024, 52, 50.5, (17.4, 69.6, 139)),
    ],
)
def test_limits_are_those_worked_out_by_hand(precision, batch, hidden, roofline, step, train):
    """For an H200 and D = H: µs per step of the products, µs of a forward step, ms of T steps."""
    rounded = 0.013  # 0.39 may be 0.385 or 0.395
    for steps, milliseconds in zip((128, 512, 1024), train, strict=True):
        shape = batch, steps, hidden, hidden
        limit = gpu_tables.limit(H200, shape, precision, "train")
        assert 1e3 * limit == pytest.approx(milliseconds, rel=rounded)
        products = gpu_tables.roofline(H200, shape, precision, "train") / steps
        assert 1e6 * products == pytest.approx(roofline, rel=rounded)
        bare = gpu_tables.limit(H200, (batch, steps, 0, hidden), precision, "forward") / steps
        assert 1e6 * bare == pytest.approx(step, rel=rounded)


def test_operations_are_those_of_every_product():
    batch, steps, inputs, hidden = shape = (3, 5, 7, 11)
    product = lambda a, b, c: 2 * a * b * c  # noqa: E731
    forward = steps * (product(batch, inputs, 4 * hidden) + product(batch, hidden, 4 * hidden))
    assert gpu_tables.operations(shape, "forward") == forward
    # dz W_xᵀ, xᵀ dz, dz W_hᵀ, hᵀ dz
    backward = steps * 2 * (product(batch, 4 * hidden, inputs) + product(batch, 4 * hidden, hidden))
    assert gpu_tables.operations(shape, "train") == forward + backward


def test_small_weights_need_no_barrier_and_too_large_ones_have_no_limit():
    few = gpu_tables.limit(H200, (50, 20, 10, 10), "tf32", "forward") / 20
    assert 0.3e-6 < few < 0.31e-6
    assert gpu_tables.limit(H200, (50, 20, 10, 8192), "tf32", "forward") is None


# ---- the section --------------------------------------------------------------------------------


def record(**changes):
    config = {
        "minutes": 8.0, "sizes": {"big": [64, 128, 512, 512]},
        "flags": {"none": "", "double buffering": "--xla_x=1"},
        "versions": {"cudnn": "9.99.9", "torch": None}, "left_out": [],
        "missing": {"flags|double buffering": "it | died"},
    }  # fmt: skip
    metrics = {
        "time|big|tf32|fused|forward": [128 * 18.1e-6, 0.001, 0.003],
        "time|big|tf32|fused|train": [6.02e-3, 0.005, 0.007],
        "flags|none|big|tf32|fused|train": [128 * 123.4e-6, 0.01, 0.02],
    }
    metrics |= {
        f"audit|8, 20, 12, 16|full|2|float32|{name}": 1e-6 * (n + 1)
        for n, name in enumerate(gpu_tables.ARRAYS)
    }
    made = {"config": config, "metrics": metrics, "environment": {"device": "NVIDIA H200"}}
    for key, value in changes.items():
        made[key] = made[key] | value
    return made


def test_the_section_has_times_percentages_and_reasons():
    text = "\n".join(gpu_tables.section(record()))
    # Of 18.1 µs a step the products take 0.543 and the limit is 2.08; of 6.02 ms, 0.209 and 0.602.
    cells = "18.1 (3.00 %, 11.5 %) | 47.0 (3.47 %, 10.0 %)"
    assert f"| fused | – | – | {cells} | – | – |" in text
    assert "| torch | not measured: not part of this run | – | – | – | – | – |" in text
    assert "Not all was measured of fused (not part of this run)." in text
    assert "| none | 123 |\n| `--xla_x=1` | not measured: it / died |" in text
    assert "| 8, 20, 12, 16 | full | 2 | float32 | 1e-06 | 2e-06 | 3e-06 | 4e-06 |" in text
    assert "Measured with cudnn 9.99.9." in text and "cuDNN 9.99.9, as `jax" in text
    assert "Left out" not in text


def test_the_section_says_what_was_left_out_and_what_failed():
    changes = {"left_out": ["PyTorch", "big by scan"], "missing": {"audit|8|ragged|1": "INTERNAL"}}
    made = record(config=record()["config"] | changes, environment={"device": "NVIDIA L4"})
    text = "\n".join(gpu_tables.section(made))
    assert text.endswith("Left out, for there were 8 minutes: PyTorch; big by scan.")
    assert "| 8 | ragged | 1 | – | it fails: INTERNAL | – |" in text
    assert "| fused | – | – | 18.1 | 47.0 | – | – |" in text
    assert "Of NVIDIA L4 no peak rates are known here" in text


def test_a_trial_whose_programs_fail_one_by_one_says_why():
    missing = {f"flags|double buffering|big|tf32|fused|{k}": "no | room" for k in ("forward", "t")}
    text = "\n".join(gpu_tables.section(record(config=record()["config"] | {"missing": missing})))
    assert "| `--xla_x=1` | not measured: no / room |" in text
    none = record(config=record()["config"] | {"missing": missing})
    none["metrics"] = {k: v for k, v in none["metrics"].items() if not k.startswith("flags|")}
    text = "\n".join(gpu_tables.section(none))
    assert "| XLA_FLAGS | µs per step |" in text
    assert "| none | not measured: not part of this run |" in text


def test_without_a_record_the_section_says_how_to_get_one():
    lines = gpu_tables.section(None)
    assert "python experiments/gpu.py" in "\n".join(lines)
    rows = [line for line in lines if line.count("not measured") == 2]
    assert [row.split(" | ")[0] for row in rows] == [f"| {shape}" for shape in gpu_tables.SHAPES]
    assert "| wide | 128, 1024, 1024, 1024 | not measured | not measured |" in rows


def test_every_row_of_every_table_is_as_wide_as_its_head():
    for lines in (gpu_tables.section(None), gpu_tables.section(record())):
        width = None
        for line in lines:
            if line.startswith("|"):
                width = width or line.count("|")
                assert line.count("|") == width
            else:
                width = None


def test_the_plan_names_only_what_there_is():
    for plan in (gpu_tables.FULL, gpu_tables.SMALL):
        assert {*plan.methods, *plan.written_out} <= set(gpu_tables.METHODS)
        assert {shape for shape, *_ in plan.trials} <= set(plan.shapes)
        assert {precision for _, precision, _, _ in plan.trials} == {"tf32"}
