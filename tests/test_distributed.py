"""Several processes on this machine: the same numbers as one, and no orphans when one dies.

Processes are started as a scheduler or a hand would start them, each in a folder of its own.
"""

import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lstmjax import distributed, last_words
from lstmjax.cli import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 400  # seconds, for a machine that has other things to do
SIN = "sin --updates 300 --batch-size 6 --num-steps 5 --frame-every 5 --devices 4"
IMDB = (
    "imdb --data offline --limit 90 --validation-size 30 --vocabulary-size 60 --max-length 8 "
    "--embedding-size 5 --hidden-size 4 --batch-size 16 --epochs 100 --devices 2"
)
# Processes that wait for each other again and again, or end in the way that they are told.
SCRIPT = """
import dataclasses, sys, time
import jax, numpy as np
from lstmjax import cli, distributed, parallel
from lstmjax.records import RunError

@dataclasses.dataclass(frozen=True)
class Config:
    devices: int | None = None
    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    deterministic: bool = False
    seed: int = 0
    fail: int | None = None

def run(config):
    print("meeting", parallel.agree(not distributed.is_main()), flush=True)
    distributed.check_same(data="the same", weights=jax.random.key_data(jax.random.key(1)))
    if config.fail is not None and config.process_id == config.fail:
        raise RunError("this one fails")
    while config.fail is not None:
        parallel.agree(False)

cli.main(lambda: distributed.run(run, cli.parse(Config)))
"""


@pytest.fixture
def launch(tmp_path):
    """``launch(command, count)`` starts processes 0 to count − 1; none is left behind."""
    started = []

    def launch(command, count, scheduler=False, different=("", "", "", "")):
        name, *flags = command.split()
        script = ROOT / "experiments" / f"{name}.py"
        if name == "script":
            script = tmp_path / "script.py"
            script.write_text(SCRIPT)
        address, ours = free_port(), []
        for number in range(count):
            folder = tmp_path / f"{len(started)}-process{number}"
            folder.mkdir()
            own, env = [], {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
            env |= {"LSTMJAX_CACHE": str(tmp_path / "cache"), "LSTMJAX_HEARTBEAT": "10"}
            if count > 1 and scheduler:
                own, env = ["--distributed"], env | slurm(number, count, address)
            elif count > 1:
                own = ["--distributed", "--coordinator", f"127.0.0.1:{address}"]
                own += ["--num-processes", str(count), "--process-id", str(number)]
            process = subprocess.Popen(
                [sys.executable, str(script), *flags, *own, *different[number].split()],
                cwd=folder, env=env,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            process.folder = folder
            started.append(process)
            ours.append(process)
        return ours

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def free_port():
    """One of the last 4096 ports: those that JAX takes under SLURM."""
    for port in np.random.default_rng(os.getpid()).permutation(np.arange(61440, 65536)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(port))):
                return int(port)


def slurm(number, count, port):
    """What SLURM tells a task on one machine."""
    told = {"JOB_ID": port - 61440, "STEP_NODELIST": "localhost", "STEP_NUM_NODES": 1}
    told |= {"NTASKS": count, "PROCID": number, "LOCALID": number}
    return {f"SLURM_{name}": str(value) for name, value in told.items()}


def ended(process):
    """(exit code, standard output, standard error) of a process, when it has ended."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def until(holds):
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_same(folder, reference, within=1e-6):
    """Two finished runs have the same weights and as many lines."""
    got, want = (load_file(path / "params.safetensors") for path in (folder, reference))
    assert got.keys() == want.keys()
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=within, err_msg=name)
    steps = [
        [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder, reference)
    ]
    assert steps[0] == steps[1]


def environment_of(folder):
    record = json.loads((folder / "record.json").read_text())
    settings = set(record["config"])
    assert "devices" in settings
    assert not settings & {"distributed", "coordinator", "num_processes", "process_id"}
    return {name: record["environment"][name] for name in ("devices", "processes")}


# ---- the same numbers ---------------------------------------------------------------------------


def test_a_killed_process_ends_the_others_and_the_run_goes_on_in_one(launch, tmp_path):
    """Two processes train; one is killed; one process finishes what they began."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    reference = launch(f"{IMDB} --out {alone}", 1)[0]
    first, second = launch(f"{IMDB} --save-every 3 --out {out}", 2)
    until(lambda: any(name.name.isdigit() for name in (out / "checkpoints").glob("*")))
    second.kill()
    start = time.monotonic()
    code, _, err = ended(first)
    assert time.monotonic() - start < 60
    assert code == -signal.SIGABRT
    assert err.splitlines() == [
        "error: process 1 has gone (no sign of life for 10 s): process 0 of 2 ends here; the "
        "checkpoints stay, and --resume goes on with any number of processes"
    ]
    assert list(first.folder.iterdir()) == list(second.folder.iterdir()) == []
    assert not (out / "record.json").exists()

    code, said, err = ended(launch(f"imdb --resume {out}", 1)[0])
    assert code == 0 and re.fullmatch(rf"going on from step \d+ in {out}\n", err), err
    assert ended(reference)[0] == 0
    assert_same(out, alone)
    assert environment_of(out) == {"devices": 2, "processes": 1}


def test_a_signal_to_one_stops_all_and_more_of_them_go_on(launch, tmp_path):
    """Two processes with two devices each, then four with one each, found by SLURM's variables."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    reference = launch(f"{SIN} --out {alone}", 1)[0]
    pair = launch(f"{SIN} --save-every 5 --out {out}", 2)
    until(lambda: any(name.name.isdigit() for name in (out / "checkpoints").glob("*")))
    pair[1].send_signal(signal.SIGTERM)
    (code, _, err), (other, _, own) = map(ended, pair)
    assert (code, other) == (75, 75)
    assert re.fullmatch(r"stopped at step \d+ by another process and saved; .*\n", err), err
    assert own == "SIGTERM: saving after these steps; again to end at once\n"

    four = launch(f"sin --resume {out}", 4, scheduler=True)
    codes, outs, errs = zip(*map(ended, four), strict=True)
    assert codes == (0, 0, 0, 0), errs
    assert "MSE" in outs[0] and outs[1:] == ("", "", "")
    assert errs[1:] == ("", "", "")
    assert ended(reference)[0] == 0
    assert_same(out, alone)
    assert environment_of(out) == {"devices": 4, "processes": 4}
    assert [list(process.folder.iterdir()) for process in (*pair, *four)] == [[]] * 6


# ---- what goes wrong ----------------------------------------------------------------------------


def test_a_process_that_fails_says_why_and_the_others_who(launch):
    first, second = launch("script --devices 2 --fail 0", 2)
    assert ended(first)[::2] == (1, "error: this one fails\n")
    code, out, err = ended(second)
    assert code == -signal.SIGABRT and out == ""
    assert re.fullmatch(r"error: process 0 has gone, or the way to it \(.*\): process 1 .*\n", err)


def test_processes_with_different_settings_do_not_start(launch):
    first, second = launch("script --devices 2", 2, different=("--seed 3", "--seed 4"))
    code, _, err = ended(first)
    assert code == 1 and err.startswith("error: --distributed: process 1 has other settings than")
    assert ended(second)[0] != 0


@dataclasses.dataclass(frozen=True)
class Config:
    distributed: bool = True
    coordinator: str | None = "host:1234"
    num_processes: int | None = 2
    process_id: int | None = 1
    devices: int | None = None


def test_a_right_configuration_passes():
    distributed.check(Config())
    distributed.check(Config(devices=4, coordinator="[::1]:1"))
    distributed.check(Config(True, None, None, None, 3))
    distributed.check(Config(False, None, None, None))


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        ({"distributed": False}, "--coordinator: got host:1234, expected nothing without --distr"),
        ({"process_id": None}, "--process-id: got None, expected a value beside --coordinator"),
        ({"coordinator": None}, "--coordinator: got None, expected a value beside --num-process"),
        ({"num_processes": 0, "process_id": 0}, "--num-processes: got 0, expected an integer of"),
        ({"process_id": 2}, "--process-id: got 2, expected 0 to 1"),
        ({"process_id": -1}, "--process-id: got -1, expected 0 to 1"),
        ({"coordinator": "host"}, "--coordinator: got host, expected HOST:PORT of process 0"),
        ({"coordinator": ":80"}, "--coordinator: got :80, expected HOST:PORT"),
        ({"coordinator": "host:0"}, "--coordinator: got host:0, expected HOST:PORT"),
        ({"coordinator": "host:70000"}, "--coordinator: got host:70000, expected HOST:PORT"),
        ({"devices": 3}, "--devices: got 3, expected a multiple of 2, the number of processes"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_line(wrong, complaint):
    with pytest.raises(ConfigError) as error:
        distributed.check(dataclasses.replace(Config(), **wrong))
    assert str(error.value).startswith(complaint)


def test_a_port_in_use_is_one_line():
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="coordinator: got .*, expected a port that is free"):
            distributed.check(Config(process_id=0, coordinator=f"host:{port}"))


# ---- from process to process --------------------------------------------------------------------


@pytest.mark.parametrize("found", [None, (7, {}, {"epoch": 2})])
def test_what_process_0_found_reaches_the_others(found):
    assert distributed._unpacked(distributed._packed(found)) == found


def test_arrays_reach_the_others_to_the_bit():
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b": np.asarray(jnp.arange(7, dtype=jnp.bfloat16) / 3),
        "step": np.asarray(12, np.int32),
        "key": np.array([10, 0], np.uint32),  # bytes that are line ends and zeros
        "none": np.zeros((2, 0)),
    }
    step, got, said = distributed._unpacked(distributed._packed((5, arrays, ["x\n", 1.5])))
    assert (step, said, got.keys()) == (5, ["x\n", 1.5], arrays.keys())
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes()


# ---- what the runtime says, in one line ---------------------------------------------------------

FATAL = (
    "F1121 17:35:42.903000   19505 client.h:80] Terminating process because the JAX distributed "
    "service detected fatal errors. This most likely indicates that another task died; see the "
    "other task logs for more details. absl::Status: {}\n"
    "*** Check failure stack trace: ***\n"
    "    @     0x7f239be40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()\n"
)
CHATTER = "E1121 17:35:42.9   19494 coordination_service.cc:1549] [85] Use error polling to\nmore\n"
UNHEALTHY = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}\nThe"
REGISTER = "\n\nRPC: /xla.coordination.CoordinationService/RegisterTask"
SAID = {  # by the runtime and by us
    "one": (UNHEALTHY.format("1"), "process 1 has gone (no sign of life for 30 s): process 1 of 2"),
    "two": (UNHEALTHY.format("1\n3"), "processes 1 and 3 have gone (no sign of life for 30 s): "),
    "at the end": (
        "INTERNAL: Shutdown barrier has failed.\nBarrier result: 'INTERNAL: Barrier failed because "
        "task is set to ERROR: UNAVAILABLE: Task 2 heartbeat timeout. This indicates that the",
        "process 2 has gone (no sign of life for 30 s): ",
    ),
    "the first": (
        "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was "
        "preempted/died/restarted unexpectedly or this task is experiencing network issues.",
        "process 0 has gone, or the way to it (host:1234): process 1 of 2 ends here; ",
    ),
    "alone": (
        f"DEADLINE_EXCEEDED: Deadline Exceeded{REGISTER}",
        "--coordinator: process 1 of 2 did not meet all others at host:1234 in time: ",
    ),
    "twice": (
        f"ALREADY_EXISTS: Aborted connect attempt, a request from a newer incarnation.{REGISTER}",
        "--process-id: another process has the number of process 1 of 2",
    ),
    "new": ("INTERNAL: else\nand more", "the processes have lost each other (INTERNAL: else): "),
}


def relayed(text):
    out = io.BytesIO()
    last_words.relay(io.BytesIO(text.encode()), out, "process 1 of 2", "30", "host:1234")
    return out.getvalue().decode()


@pytest.mark.parametrize("case", SAID)
def test_an_abort_is_one_line(case):
    status, expected = SAID[case]
    line = relayed(CHATTER + FATAL.format(status))
    assert line.startswith(f"error: {expected}")
    assert line.endswith("\n") and line.count("\n") == 1


def test_everything_else_is_passed_on():
    text = b"W1121 17:35:42.9 1 cpu_feature_guard.cc:2] slow\nof two lines\n\xff without an end"
    out = io.BytesIO()
    last_words.relay(io.BytesIO(text), out, "process 1 of 2", "30", "host:1234")
    assert out.getvalue() == text
    # What is said of other processes waits for the end, for it may be the beginning of the end.
    other = "E1121 17:35:31.0 7 other.cc:1] b\n"
    assert relayed(f"a\n{CHATTER}{other}") == f"a\n{other}{CHATTER}"


def test_what_stops_the_run_does_not_stop_its_last_words(tmp_path):
    command = [sys.executable, "-I", "-S", last_words.__file__, "process 1 of 2", "30", "host:1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b"ready\n")
    process.stdin.flush()
    assert process.stderr.readline() == b"ready\n"
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    _, err = process.communicate(FATAL.format(UNHEALTHY.format("0")).encode(), timeout=60)
    assert err.startswith(b"error: process 0 has gone") and err.count(b"\n") == 1
