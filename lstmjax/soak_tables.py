"""What experiments/soak.py found, as text: on the screen, and in BENCHMARKS.md."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def line(mode: str, metrics: Mapping[str, Any]) -> str:
    """One line for the end of a soak; ``mode`` is "kill" or "load"."""
    if mode == "kill":
        return (
            f"{metrics['kills']} kills, {metrics['kills_while_saving']} of them while saving: "
            f"{metrics['runs_identical']} of {metrics['runs']} runs ended bit for bit as the "
            f"undisturbed one; a kill cost {metrics['steps_lost_mean']:.1f} logged steps, "
            f"{metrics['steps_lost_most']} at most"
        )
    clock, cpu = metrics["step_ms"], metrics["step_cpu_ms"]
    return (
        f"{metrics['minutes'][-1]:.0f} minutes, {metrics['steps']:,} steps: memory "
        f"{metrics['megabytes_first']:.0f} MB in the first tenth of the time and "
        f"{metrics['megabytes_last']:.0f} MB in the last, {metrics['megabytes_an_hour']:+.1f} MB "
        f"an hour over the last three quarters; a step took {clock[0]:.1f} ms and "
        f"{clock[-1]:.1f} ms by the clock, {cpu[0]:.1f} ms and {cpu[-1]:.1f} ms of processor time"
    )


def section(groups: Sequence[Any], provenance: Callable) -> list[str]:
    """The part of BENCHMARKS.md, a line for each record."""
    lines = [
        "## soak: runs that are killed, and a run that goes on", "",
        "`experiments/soak.py` kills imdb.py (SIGKILL) at random moments, every other time while "
        "it writes a checkpoint, takes it up again, and compares what it ends with to a run that "
        "was never killed: parameters' hash, metrics and metrics.jsonl, all to the bit. Its other "
        "mode watches memory and time per step of a run that goes on for as long as it says.",
    ]  # fmt: skip
    for group in groups:
        (record,) = group.records
        found = line(record["config"]["mode"], record["metrics"])
        lines += ["", f"{found[0].upper()}{found[1:]}.", "", *provenance(group)]
    return lines
