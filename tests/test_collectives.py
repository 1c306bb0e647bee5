"""A train step waits for the other devices once: what compiled programs send."""

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
from jax.sharding import PartitionSpec as P
from problems import OPTIMISED

from lstmjax import diagnose, init_lstm, losses, lstm, parallel, tables, train
from lstmjax.parallel import Collective

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "scaling_devices.py"
SIZE = 4 * (3 * 20 + 5 * 20 + 20)  # bytes of the parameters of an LSTM(5) on 3 inputs

_spec = importlib.util.spec_from_file_location("scaling_devices", SCRIPT)
experiment = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(experiment)


def program(count, *, stateful=False, loss_name="loss", **options):
    """Three steps of an LSTM on ``count`` devices, compiled as users have them compiled."""

    def loss_fn(params, batch, key, carry=None):
        state, _ = lstm(params, jnp.swapaxes(batch["x"], 0, 1), carry)
        loss = losses.total(losses.squared_error(state.h, batch["y"]), batch["weight"])
        metrics = {loss_name: loss}
        return losses.mean(loss), (metrics, state) if stateful else metrics

    devices, key = jax.devices()[:count], jax.random.key(0)
    params, tx = init_lstm(key, 3, 5), optax.sgd(0.1, momentum=0.9)
    options = {"axis_name": parallel.AXIS, "stateful": stateful, **options}
    step = train.make_train_step(loss_fn, tx, **options)
    state, layout = train.init_state(params, tx, key), parallel.WHOLE
    if stateful:
        carry, _ = lstm(params, jnp.zeros((0, 8, 3)))
        state, layout = (state, carry), (parallel.WHOLE, parallel.SPLIT)
    data = {"x": np.zeros((24, 4, 3), np.float32), "y": np.zeros((24, 5), np.float32)}
    plan = train.plan_batches(np.arange(24), 8, multiple=count)
    run = parallel.spread(train.scan_steps(step), devices, state=layout)
    return run.lower(state, data, plan).compile(OPTIMISED).as_text()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stateful": True},
        {"on_nan": "skip"},
        {"of_gradient": diagnose.gradient_metrics(1.0), "on_nan": "stop"},
        {"loss_name": "mse"},  # no count of examples: all devices weigh the same
    ],
    ids=["plain", "carried", "skipped", "norms", "no count"],
)
def test_a_step_sends_its_gradients_and_metrics_at_once_and_nothing_else(options):
    (only,) = parallel.collectives(program(4, **options))
    # The parameters' gradients, the sum of the losses and how many they are.
    assert only == Collective("all-reduce", 5, SIZE + 8, loops=1)


def test_collectives_are_found_wherever_they_are():
    def run(x):  # [6] on each device
        def step(total, _):  # all of it changes from step to step: nothing is moved out of the loop
            start = x[:2] * total
            inner = jax.lax.fori_loop(0, 3, lambda _, y: jax.lax.pmax(jnp.sin(y), "d"), start)
            added, first = jax.lax.psum((total, x[:3] * total), "d")
            return added / 3 + inner.sum() + first.sum(), None

        total, _ = jax.lax.scan(step, x.sum(), None, length=3)
        return jax.lax.all_gather(x, "d").sum() + total

    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=P("d"), out_specs=P(), check_vma=False)
    text = jax.jit(mapped).lower(np.zeros(24, np.float32)).compile().as_text()
    assert sorted(parallel.collectives(text)) == [
        Collective("all-gather", 1, 96, loops=0),
        Collective("all-reduce", 1, 8, loops=2),
        Collective("all-reduce", 2, 16, loops=1),
    ]


@pytest.mark.parametrize(
    "line, kind, arrays, size",
    [
        ("%r = f32[] all-reduce(%a), channel_id=1", "all-reduce", 1, 4),
        ("%r = (f32[50,8]{1,0}, /*index=1*/bf16[3]{0}) all-reduce(%a, %b)", "all-reduce", 2, 1606),
        ("ROOT %r = pred[4]{0} all-gather-start(%a), dimensions={0}", "all-gather", 1, 4),
        ("%r = f8e4m3fn[7]{0} collective-permute(%a)", "collective-permute", 1, 7),
    ],
)
def test_the_bytes_of_a_collective(line, kind, arrays, size):
    text = f"HloModule m\n\nENTRY %main (a: f32[]) -> f32[] {{\n  {line}\n}}\n"
    assert parallel.collectives(text) == [Collective(kind, arrays, size, 0)]


def test_one_all_reduce_on_8_and_on_64_devices(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--most", "64", "--out", "here"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "here" / "record.json").read_text())["metrics"]
    assert metrics["devices"] == [1, 2, 4, 8, 16, 32, 64]
    assert metrics["collectives"] == [1] * 7 and metrics["collectives_outside"] == [0] * 7
    # Gradients, and three numbers: the summed loss, the correct ones and how many there are.
    assert metrics["bytes"] == [metrics["gradient_bytes"] + 12] * 7
    assert max(metrics["difference"]) < 1e-6
    assert "| 64 | 1 | 0 |" in done.stdout


def test_predicted_efficiency_is_that_of_a_ring():
    """2 (N − 1) messages of bytes/N, one after the other, by hand."""
    fabric = experiment.Fabric(4, "", latency=(500_000, 500_000), bandwidth=(1, 1))
    work = experiment.Work("", bytes=2_000_000_000, step=(3500, 3500))
    low, high = experiment.efficiency(fabric, work)
    assert low == high == pytest.approx(3.5 / (3.5 + 0.5 + 6 * 0.5))
    fabric = experiment.Fabric(4, "", latency=(0, 500_000), bandwidth=(2, 1))
    work = experiment.Work("", bytes=2_000_000_000, step=(3500, 7000))
    assert experiment.efficiency(fabric, work) == pytest.approx((3.5 / 7, 7 / 8.5))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--most 1000000", "--most: got 1000000, expected at most "),
        ("--most 0", "--most: got 0, expected an integer of at least 1"),
    ],
)
def test_a_wrong_value_is_one_clear_line(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith(f"error: {text}") and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_the_predictions_in_the_documentation_are_these():
    params = jax.eval_shape(
        lambda: experiment.make_model(False).init(jax.random.key(0), np.zeros((1, 2), np.int32))
    )
    size = sum(a.size * 4 for a in jax.tree.leaves(params))
    predicted = experiment.tables([], size).split("\n\n")[-1]
    assert predicted in (ROOT / "docs" / "cluster.md").read_text()


def test_the_page_has_the_records_tables():
    record = tables.load(ROOT / "experiments/results/scaling-devices-seed0.json")
    columns = [record["metrics"][name] for name in experiment.Seen._fields]
    seen = [experiment.Seen(*row) for row in zip(*columns, strict=True)]
    page = (ROOT / "docs" / "cluster.md").read_text()
    for table in experiment.tables(seen, record["metrics"]["gradient_bytes"]).split("\n\n"):
        assert table in page
