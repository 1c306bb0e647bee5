"""How long a call takes, so that two of them can be compared on a machine that is never quiet.

One time says little: clocks change, neighbours come and go, the first calls fill caches. Calls
that are to be compared take turns, in rounds, in one process or each in its own, and what counts
is the median over all rounds and how far the quartiles lie apart.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lstmjax import checks


class Timing(NamedTuple):
    """Seconds of one call.

    Attributes:
      median: the median over all timed calls.
      quartiles: the first and the third quartile.
      calls: how many calls were timed.
    """

    median: float
    quartiles: tuple[float, float]
    calls: int


def take_turns(
    runs: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, rounds: int = 5
) -> dict[str, Timing]:
    """Times calls in turns: in each round, each of them for its share of the time.

    Args:
      runs: by name, functions of nothing whose results are waited for
        (``jax.block_until_ready``); compiled already.
      seconds: to spend on each of them, over all rounds, > 0; every call is timed at least once
        in every round.
      rounds: >= 1.

    Returns:
      A ``Timing`` by name.

    Raises:
      ValueError: no runs, one that cannot be called, ``seconds`` or ``rounds`` out of range.
    """
    if not runs:
        raise ValueError("runs: got none, expected at least one")
    for name, run in runs.items():
        checks.function(f"runs[{name!r}]", run)
    checks.positive_int("rounds", rounds)
    checks.number("seconds", seconds)
    if not seconds > 0:
        raise ValueError(f"seconds: got {seconds!r}, expected a number above 0")
    found = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name] += burst(run, seconds / rounds)
    return {name: summary(times) for name, times in found.items()}


def burst(run: Callable[[], Any], seconds: float) -> list[float]:
    """Times one call again and again until the seconds are over; the seconds of each call.

    One more call comes first and does not count: it finds the caches as another left them.
    """
    checks.function("run", run)
    jax.block_until_ready(run())
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> Timing:
    """The ``Timing`` of calls that took ``times`` seconds each."""
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
    return Timing(float(median), (float(low), float(high)), len(times))


class Program(NamedTuple):
    """A compiled function.

    Attributes:
      run: the function.
      compile_seconds: what tracing and compiling took.
      temporary_bytes: memory of its intermediate results, without arguments and results, over all
        devices; None where the compiler does not say.
    """

    run: Callable
    compile_seconds: float
    temporary_bytes: int | None


def compiled(function: Callable, *arguments: Any, devices: int = 1) -> Program:
    """Compiles a function for arguments of these shapes, and says what that cost.

    Args:
      function: what to compile, jitted already or not.
      *arguments: what it will be called with.
      devices: how many devices the arguments are spread over: XLA states one device's memory.

    Returns:
      A ``Program``; its ``run`` takes ``arguments``.
    """
    checks.function("function", function)
    function = function if hasattr(function, "lower") else jax.jit(function)
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    taken = time.perf_counter() - start
    memory = program.memory_analysis()
    temporary = None if memory is None else int(memory.temp_size_in_bytes) * devices
    return Program(program, taken, temporary)
