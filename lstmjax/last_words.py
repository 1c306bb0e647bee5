"""One line in place of the runtime's many, when a process ends because another one has gone.

JAX's C++ runtime watches over the processes of a run. When one of them stops giving signs of life,
it aborts the others wherever they are, also in the middle of a collective; Python is not asked. The
forty lines with a stack trace that it leaves on standard error go through this program, which runs
beside each process and outlives it:

    python last_words.py WHO SECONDS ADDRESS < what the runtime writes

Everything else is passed on as it comes. Nothing of lstmjax is imported here, so that it starts at
once.
"""

import re
import signal
import sys
from collections.abc import Iterable
from typing import BinaryIO

# How the runtime's log begins a line: severity and date, time, thread, file.
_LOG = re.compile(rb"[IWEF]\d{4} [\d:.]+ +\d+ (\w+)\.(?:cc|h):\d+\]")
_WATCHERS = (
    b"client", b"coordination_service", b"coordination_service_agent", b"preemption_sync_manager",
)  # fmt: skip
_FATAL = b"Terminating process because the JAX distributed service detected fatal errors"
_STAY = "the checkpoints stay, and --resume goes on with any number of processes"


def relay(lines: Iterable[bytes], out: BinaryIO, who: str, seconds: str, address: str) -> None:
    """Passes lines on, but for what the watchers say: one line in its place, at the end.

    Args:
      lines: what the runtime writes; the end means that the process has ended.
      out: where to.
      who: the process: "process 1 of 2".
      seconds: without a sign of life, after which a process is taken for gone.
      address: where the processes meet.
    """
    held, holding = [], False
    for line in lines:
        if found := _LOG.match(line):
            holding = found[1] in _WATCHERS
        if holding:
            held.append(line)
            continue
        out.write(line)
        out.flush()
    last = b"".join(held)
    if _FATAL in last:
        line = verdict(last.decode(errors="replace"), who, seconds, address)
        last = f"error: {line}\n".encode()
    out.write(last)
    out.flush()


def verdict(text: str, who: str, seconds: str, address: str) -> str:
    """What has happened, in one line, from what the runtime says of it."""
    if "newer incarnation" in text:
        return f"--process-id: another process has the number of {who}"
    if "RegisterTask" in text:
        return (
            f"--coordinator: {who} did not meet all others at {address} in time: has each been "
            "started, with the same address, the same number of processes and a number of its own?"
        )
    gone = re.search(r"stopped sending heartbeats\):\s*([\d,\s]+)", text)
    gone = gone or re.search(r"Task (\d+) heartbeat timeout", text)
    if gone:
        numbers = re.findall(r"\d+", gone[1])
        some = f"processes {' and '.join(numbers)} have"
        some = f"process {numbers[0]} has" if len(numbers) == 1 else some
        what = f"{some} gone (no sign of life for {seconds} s)"
    elif "leader task" in text:
        what = f"process 0 has gone, or the way to it ({address})"
    else:
        status = text.partition("absl::Status: ")[2].partition("\n")[0]
        what = f"the processes have lost each other ({status})"
    return f"{what}: {who} ends here; {_STAY}"


if __name__ == "__main__":
    # Whoever stops the run, by Ctrl-C or a scheduler, stops the process, whose end is the end here.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    relay(sys.stdin.buffer, sys.stderr.buffer, *sys.argv[1:])
