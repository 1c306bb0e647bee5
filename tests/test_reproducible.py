"""The same bits twice: what XLA is asked, the check of the first steps, and the experiments."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from lstmjax import cli, compare, losses, parallel, reproducible, train, verify
from lstmjax.records import RunError

ROOT = Path(__file__).resolve().parents[1]
ASKED = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


# ---- what is asked of XLA -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, after",
    [
        (None, ASKED),
        ("", ASKED),
        ("--xla_a=1 --xla_b", f"--xla_a=1 --xla_b {ASKED}"),
        (
            "--xla_gpu_deterministic_ops=1",
            "--xla_gpu_deterministic_ops=1 --xla_gpu_autotune_level=0",
        ),
        (ASKED, ASKED),
    ],
)
def test_flags_are_added_to_those_there_are(monkeypatch, before, after):
    monkeypatch.setenv("XLA_FLAGS", "")  # so that it is put back
    if before is None:
        monkeypatch.delenv("XLA_FLAGS")
    else:
        monkeypatch.setenv("XLA_FLAGS", before)
    reproducible.ask(False)
    assert os.environ.get("XLA_FLAGS") == before
    reproducible.ask(True)
    assert os.environ["XLA_FLAGS"] == after


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (
            "--xla_a=1 --xla_gpu_deterministic_ops=false",
            "XLA_FLAGS: got --xla_gpu_deterministic_ops=false, expected "
            "--xla_gpu_deterministic_ops=true with --deterministic",
        ),
        (
            "--xla_gpu_autotune_level=4",
            "XLA_FLAGS: got --xla_gpu_autotune_level=4, expected --xla_gpu_autotune_level=0 with",
        ),
        ("flags.txt", "XLA_FLAGS: got the name of a file, expected flags with --deterministic"),
    ],
)
def test_the_opposite_is_refused(monkeypatch, flags, complaint):
    monkeypatch.setenv("XLA_FLAGS", flags)
    reproducible.ask(False)
    with pytest.raises(ValueError, match=f"^{complaint}"):
        reproducible.ask(True)
    assert os.environ["XLA_FLAGS"] == flags


def test_a_contradiction_ends_an_experiment_with_one_line(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    with pytest.raises(SystemExit) as stop:
        cli.main(lambda: reproducible.ask(True))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: XLA_FLAGS: got --xla_gpu_deter")
    assert error.count("\n") == 1


# ---- the check of the first steps ---------------------------------------------------------------


def counting(noise):
    """``(advance, calls)``: adds what is given to its state, and ``noise(call)`` to one number."""
    calls = []

    @jax.jit
    def add(state, x, extra):
        return {**state, "w": state["w"] + x, "n": state["n"] + 1}, {"loss": jnp.sum(x) + extra}

    def advance(state, x):
        calls.append(x)
        return add(state, x, jnp.float32(noise(len(calls))))

    return advance, calls


def fresh():
    return {"w": jnp.zeros(3), "n": jnp.int32(0), "key": jax.random.key(1)}


def test_the_first_call_is_made_twice_and_counts_once():
    advance, calls = counting(lambda call: 0.0)
    run = reproducible.checked(advance, True)
    state, metrics = run(fresh(), jnp.float32([1, 2, 3]))
    assert len(calls) == 2 and int(state["n"]) == 1 and float(metrics["loss"]) == 6
    state, _ = run(state, jnp.float32([1, 1, 1]))
    assert len(calls) == 3 and int(state["n"]) == 2
    np.testing.assert_array_equal(state["w"], [2, 3, 4])
    assert reproducible.checked(advance, False) is advance


@pytest.mark.parametrize("noise", [2.0**-20, np.nan])
def test_one_bit_between_the_two_calls_ends_the_run(noise):
    advance, _ = counting(lambda call: noise if call == 2 else 0.0)
    with pytest.raises(
        RunError, match="^--deterministic: the first steps, made twice from the same"
    ):
        reproducible.checked(advance, True)(fresh(), jnp.float32([1, 2, 3]))
    advance, calls = counting(lambda call: noise)  # the same each time, NaN or not
    reproducible.checked(advance, True)(fresh(), jnp.float32([1, 2, 3]))
    assert len(calls) == 2


def test_all_bits_of_a_tree_are_looked_at():
    """Each device's share, keys, signs of zero; and nothing else, such as where it lies."""
    mesh = jax.make_mesh((4,), ("batch",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    tree = {"a": jnp.arange(8.0), "key": jax.random.key(3), "n": np.float64(0)}
    placed = {**tree, "a": jax.device_put(tree["a"], split)}
    assert b"".join(reproducible.bits(placed)) == b"".join(reproducible.bits(tree))
    for other in (
        {"a": tree["a"].at[7].set(6.5)},
        {"key": jax.random.key(4)},
        {"n": -np.float64(0)},
    ):
        assert reproducible.bits(tree | other) != reproducible.bits(tree)


def test_a_checked_training_ends_with_the_same_parameters():
    """A state that is given up to each call, with a key, over four devices."""
    devices = jax.devices()
    tx = optax.sgd(0.5)

    def loss_fn(params, batch, key):
        noise = jax.random.normal(key, batch["x"].shape)
        error = losses.squared_error(params["w"][None] * batch["x"] + 0.1 * noise, batch["x"])
        loss = losses.total(error, batch["weight"])
        return losses.mean(loss), {"loss": loss}

    x = np.random.default_rng(0).normal(size=(24, 1)).astype(np.float32)
    pieces = train.plan_epoch(24, 8, seed=0, epoch=1, multiple=4, at_most=1)
    ends = []
    for deterministic in (False, True):
        step = train.make_train_step(loss_fn, tx, axis_name=parallel.AXIS)
        advance = parallel.runner(step, devices, train.Clock())
        advance = reproducible.checked(advance, deterministic)
        params = {"w": jnp.float32([0.25])}
        state = parallel.place(train.init_state(params, tx, jax.random.key(2)), devices)
        data = parallel.place({"x": x}, devices)
        for piece in pieces:
            state, metrics = advance(state, data, piece)
        ends.append((int(state.step), reproducible.bits((state, metrics))))
    assert ends[0] == ends[1] and ends[0][0] == 3


# ---- the experiments ----------------------------------------------------------------------------

IMDB = "imdb --data offline --limit 70 --epochs 2 --batch-size 16 --num-layers 1"
MNIST = "mnist --data offline --limit 70 --epochs 2 --batch-size 16 --hidden-size 4"
# Two processes: importing takes longer than most of these runs.
RUNS = {
    "plain": {"sin": "sin --updates 4 --frame-every 2", "imdb": IMDB},
    "asked": {
        "sin": "sin --updates 4 --frame-every 2 --deterministic",
        "imdb": f"{IMDB} --deterministic",
        "forecast": "forecast --epochs 2 --hidden-size 4 --steps 5 --deterministic",
        "mnist": f"{MNIST} --deterministic",
    },
}
SEVERAL = """
import json, runpy, sys
for script, *flags in json.loads(sys.argv[1]):
    sys.argv[:] = [script, *flags]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """The variables of every run here: one cache of data, and no programs compiled before."""
    variables = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    quick = " ".join(f"--{name}={str(value).lower()}" for name, value in problems.QUICK.items())
    variables |= {"LSTMJAX_CACHE": str(tmp_path_factory.mktemp("cache")), "XLA_FLAGS": quick}
    return variables | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, surroundings):
    """The folder that holds plain/sin, asked/sin and so on."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, group in RUNS.items():
        commands = []
        for name, command in group.items():
            experiment, *flags = command.split()
            script, out = ROOT / "experiments" / f"{experiment}.py", folder / kind / name
            flags += ["--devices", "2", "--seed", "5", "--out", str(out)]
            commands.append([str(script), *flags])
        command = [sys.executable, "-c", SEVERAL, json.dumps(commands)]
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder


@pytest.mark.parametrize("experiment", ["sin", "imdb"])
def test_two_runs_on_a_cpu_have_the_same_bits(experiment, runs, surroundings):
    """Processes of their own; that the second one was asked for it changes nothing on a CPU."""
    plain, asked = runs / "plain" / experiment, runs / "asked" / experiment
    assert (plain / "metrics.jsonl").read_bytes() == (asked / "metrics.jsonl").read_bytes()
    one, other = (json.loads((run / "record.json").read_text()) for run in (plain, asked))
    assert one["params_sha256"] == other["params_sha256"]
    differ = {d.place for d in compare.differences(one, other) if d.counts}
    settings = {"config.deterministic", "environment.deterministic"}
    assert differ == settings | {"environment.XLA_FLAGS"}
    quick = surroundings["XLA_FLAGS"]
    assert one["environment"]["deterministic"] is False and one["environment"]["XLA_FLAGS"] == quick
    assert other["environment"]["deterministic"] is True
    assert other["environment"]["XLA_FLAGS"] == f"{quick} {ASKED}"


@pytest.mark.parametrize("name", ["plain/sin", "plain/imdb", "asked/forecast", "asked/mnist"])
def test_every_training_can_be_verified(name, runs, surroundings, monkeypatch, capsys):
    """The same command once more, by its record: every logged loss has the same bits."""
    for variable, value in surroundings.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    record = json.loads((runs / name / "record.json").read_text())
    code = verify.verify(verify.Verify(runs / name))
    text = capsys.readouterr().out
    count = len(record["first_steps"]["loss"])
    assert count >= 2 and f"result    equal in every bit: {count} losses\n" in text, text
    assert code == 0
    # Whoever works on the code while its tests run may commit it in between.
    (changed,) = re.findall("^changed   (.*)$", text, re.M)
    assert set(re.findall("(?:^|; )(.+?) was ", changed)) <= {"git commit", "dirty"}
