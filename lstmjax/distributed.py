"""Several processes, on one machine or many, train as one: on JAX's own distributed runtime.

    imdb.py --distributed                      in each task of a SLURM or Kubernetes job
    imdb.py --distributed --coordinator HOST:PORT --num-processes 2 --process-id 0       by hand

Every process runs the same script and reads the same data. The devices of all of them form one
mesh, each process places its own share of every batch, and a run on N devices comes to the same
parameters, to round-off, however many processes they belong to. Process 0 alone writes and prints.

A process that dies takes the others with it: JAX's runtime notices within ``HEARTBEAT`` seconds and
aborts them, wherever they are. What it writes then becomes one line (``last_words``).
"""

import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lstmjax import cli, last_words, parallel, reproducible
from lstmjax.checkpoint import Checkpoints
from lstmjax.provenance import is_main, processes
from lstmjax.records import Run, RunError, RunStopped, plain, to_json

__all__ = [
    "check",
    "check_same",
    "from_main",
    "is_main",
    "open_checkpoints",
    "open_run",
    "processes",
    "quiet",
    "run",
]

# Seconds without a sign of life after which a process is taken for gone, and seconds that processes
# wait for each other at the start; LSTMJAX_HEARTBEAT and LSTMJAX_MEETING say otherwise.
HEARTBEAT, MEETING = 30, 300
_BY_HAND = ("coordinator", "num_processes", "process_id")
_OWN = (*_BY_HAND, "out", "resume")  # settings in which the processes of a run may differ
_LOST = re.compile("gloo|nccl|coordination service|heartbeat", re.I)


# ---- the configuration --------------------------------------------------------------------------


def check(config: Any) -> None:
    """Checks ``distributed``, ``coordinator``, ``num_processes`` and ``process_id``.

    Raises:
      ConfigError: one clear line.
    """
    given = [name for name in _BY_HAND if getattr(config, name) is not None]
    for name in given:
        cli.check(config, name, config.distributed, "nothing without --distributed")
    if not given:
        return
    for name in _BY_HAND:
        expected = f"a value beside --{given[0].replace('_', '-')}"
        cli.check(config, name, getattr(config, name) is not None, expected)
    count = config.num_processes
    cli.check_counts(config, "num_processes")
    cli.check(config, "process_id", 0 <= config.process_id < count, f"0 to {count - 1}")
    host, _, port = config.coordinator.rpartition(":")
    fits = bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16
    cli.check(config, "coordinator", fits, "HOST:PORT of process 0")
    fits = config.devices is None or config.devices % count == 0
    cli.check(config, "devices", fits, f"a multiple of {count}, the number of processes")
    if config.process_id == 0:
        cli.check(config, "coordinator", _is_free(int(port)), "a port that is free")


def _is_free(port: int) -> bool:
    """Whether a server can be started at a port of this machine."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError:
        return False
    return True


def _seconds(name: str, default: int) -> int:
    """Whole seconds from the environment."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise cli.ConfigError(f"{name}: got {text!r}, expected whole seconds, at least 1")
    return int(text)


# ---- the run of all processes -------------------------------------------------------------------


def run(experiment: Callable[[Any], None], config: Any) -> None:
    """Calls ``experiment(config)``, as one process of several where the configuration says so.

    Where they are several the process ends here: with the exit code that ``cli.main`` would give,
    or by SIGABRT when another process has gone.

    Args:
      experiment: a function of the configuration.
      config: a dataclass with ``distributed``, ``coordinator``, ``num_processes``, ``process_id``,
        ``devices`` (in all processes together, or None) and ``deterministic``.

    Raises:
      ConfigError: as ``check``.
    """
    check(config)
    if not config.distributed:
        experiment(config)
        return
    heartbeat = _seconds("LSTMJAX_HEARTBEAT", HEARTBEAT)
    meeting = _seconds("LSTMJAX_MEETING", MEETING)
    reproducible.ask(config.deterministic)  # XLA's flags: before the devices are started
    restore = _with_last_words(config, heartbeat)

    def together():
        _meet(config, heartbeat, meeting)
        try:
            experiment(config)
        except RunStopped:  # all of them stop, and one says so
            if is_main():
                raise
            sys.exit(cli.STOPPED)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RunError) or not _LOST.search(str(error)):
                raise
            # A collective fails at once where another process dies. The runtime needs longer, but
            # can say which one it was, and ends this one.
            time.sleep(heartbeat + 15)
            raise RunError(f"the processes have lost each other: {error}") from error

    code = _exit_code(together)
    sys.stdout.flush()
    if code in (0, cli.STOPPED):
        jax.distributed.shutdown()  # when all have come to this point
    restore()
    if code not in (0, cli.STOPPED):
        os._exit(code)  # without waiting for the others, who are to hear of it
    sys.exit(code)


def _exit_code(call: Callable[[], None]) -> int:
    """What a process that does no more than this call exits with."""
    try:
        cli.main(call)
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _meet(config: Any, heartbeat: int, meeting: int) -> None:
    """Starts the runtime and makes sure that all processes were started alike."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            cluster_detection_method="deactivate" if config.coordinator else None,
            initialization_timeout=meeting,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=86_400,  # process 0 may have much to write; death is noticed
        )
    except ValueError as error:
        if config.coordinator is not None:
            raise
        raise cli.ConfigError(
            "--distributed: no SLURM or Kubernetes job was found, expected one, or --coordinator, "
            "--num-processes and --process-id"
        ) from error
    except RuntimeError as error:
        raise RunError(f"--distributed: the processes cannot meet: {error}") from error
    if not is_main():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    parallel.use_devices(config.devices)
    # The runtime waits 30 seconds for a first collective, and without limit for those after it. So
    # it comes now, before anything that takes one process longer than another.
    settings = plain(config)
    check_same(settings={name: settings[name] for name in settings if name not in _OWN})


def _with_last_words(config: Any, heartbeat: int) -> Callable[[], None]:
    """Sends what the runtime writes through ``last_words``; returns how to end that."""
    with suppress(ImportError):  # not on Windows
        import resource

        # An abort is how the runtime ends a process here: no reason to write its memory to a disk.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    who, where = "this process", "the address of process 0"
    if config.coordinator is not None:
        who, where = f"process {config.process_id} of {config.num_processes}", config.coordinator
    command = [sys.executable, "-I", "-S", last_words.__file__, who, str(heartbeat), where]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    sys.stdout.reconfigure(line_buffering=True)  # an abort loses what has not been written
    # Python writes where it wrote before; the runtime knows nothing but the number 2.
    before, text = os.dup(2), sys.stderr
    sys.stderr = open(before, "w", buffering=1, errors="backslashreplace")
    os.dup2(reader.stdin.fileno(), 2)
    os.set_inheritable(2, True)

    def restore():
        sys.stderr.flush()
        os.dup2(before, 2)
        sys.stderr = text
        reader.stdin.close()
        reader.wait()

    return restore


def check_same(**values: Any) -> None:
    """Makes sure that all processes have the same values; all of them have to ask.

    Args:
      values: by name: JSON values, dicts of them, hashes of data or of weights.

    Raises:
      RunError: names the first value in which two processes differ.
    """
    for name, value in values.items():
        digest = hashlib.sha256(to_json(value)).digest()
        found = parallel.from_all(np.frombuffer(digest, np.uint8))
        others = np.flatnonzero((found != found[0]).any(axis=1))
        if len(others):
            raise RunError(
                f"--distributed: process {others[0]} has other {name} than process 0: all have to "
                f"be started with the same flags and read the same data"
            )


def from_main(found: tuple[int, dict[str, np.ndarray], Any] | None) -> Any:
    """What process 0 has found, a state from ``Checkpoints.latest`` or None; all have to ask."""
    if processes() == 1:
        return found
    data = np.frombuffer(_packed(found) if is_main() else b"", np.uint8)
    # In two parts: JAX has no 64 bits unless it is asked to, and states may be beyond 2 GiB.
    parts = np.asarray(divmod(data.size, 2**30), np.int32)
    high, low = max(map(tuple, parallel.from_all(parts).tolist()))
    size = high * 2**30 + low
    whole = multihost_utils.broadcast_one_to_all(np.resize(data, size), is_main())
    return _unpacked(np.asarray(whole).tobytes())


def _packed(found: tuple[int, dict[str, np.ndarray], Any] | None) -> bytes:
    """A line of JSON, and the arrays' bytes one after the other."""
    step, arrays, progress = found if found is not None else (None, {}, None)
    kinds = {name: [a.dtype.name, a.shape] for name, a in arrays.items()}
    head = json.dumps({"step": step, "arrays": kinds, "progress": progress})
    return b"\n".join([head.encode(), b"".join(a.tobytes() for a in arrays.values())])


def _unpacked(data: bytes) -> tuple[int, dict[str, np.ndarray], Any] | None:
    head, _, rest = data.partition(b"\n")
    said, arrays, place = json.loads(head), {}, 0
    for name, (dtype, shape) in said["arrays"].items():
        count = math.prod(shape)
        arrays[name] = np.frombuffer(rest, np.dtype(dtype), count, place).reshape(shape)
        place += arrays[name].nbytes
    return None if said["step"] is None else (said["step"], arrays, said["progress"])


# ---- what only process 0 does -------------------------------------------------------------------


def quiet() -> bool | None:
    """tqdm's ``disable``: on process 0 as usual (None: shown on a terminal), elsewhere True."""
    return None if is_main() else True


def open_run(experiment: str, config: Any) -> Run:
    """``Run.open`` on process 0; on the others a run without a folder, which writes nothing."""
    return Run.open(experiment, config) if is_main() else Elsewhere(experiment)


def open_checkpoints(folder: Run, keep: int) -> Any:
    """``Checkpoints`` of a run on process 0; on the others something that keeps nothing."""
    return Checkpoints(folder.path / "checkpoints", keep) if is_main() else Unkept()


class Unkept:
    """The checkpoints as processes other than the first know them: none."""

    folder = "the checkpoints of process 0"

    def latest(self) -> None:
        """Nothing: ``from_main`` brings what process 0 has."""

    def steps(self) -> list[int]:
        """Of none."""
        return []

    def save(self, step: int, arrays: Any, progress: Any, *, best: bool = False) -> None:
        """Saves nothing."""

    def wait(self) -> None:
        """Nothing is under way."""

    close = wait


class Elsewhere(Run):
    """The run as processes other than the first know it.

    Attributes:
      path: None: the folder is on the machine of process 0, and may be nowhere else.
    """

    def __init__(self, experiment: str):
        super().__init__(None, experiment, {})

    def log(self, step: int, **scalars: Any) -> None:
        """Writes nothing."""

    def progress(self) -> dict[str, Any]:
        """Nothing is written."""
        return {}

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Nothing is cut off."""
