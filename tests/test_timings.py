"""Timing: turns are taken, the numbers are the ones of the calls, memory is what XLA says."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax import timings


def test_calls_take_turns_and_the_slower_one_is_slower():
    order = []

    def call(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    found = timings.take_turns(
        {"slow": call("slow", 0.02), "quick": call("quick", 0.002)}, seconds=0.09, rounds=3
    )
    turns = [name for n, name in enumerate(order) if n == 0 or order[n - 1] != name]
    assert turns == ["slow", "quick"] * 3
    assert found["slow"].median >= 0.02 > found["quick"].median >= 0.002
    # The first call of each turn is not counted.
    assert found["slow"].calls == order.count("slow") - 3
    for timing in found.values():
        assert timing.quartiles[0] <= timing.median <= timing.quartiles[1]


def test_summary_is_the_median_and_the_quartiles():
    got = timings.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert got == timings.Timing(3.0, (2.0, 4.0), 5)


def test_compiled_gives_the_program_and_its_memory():
    def heavy(a):  # a @ a is needed twice, so it must lie somewhere
        square = a @ a
        return jnp.sum(jnp.sort(square, axis=0) * square)

    a = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
    program = timings.compiled(heavy, a)
    np.testing.assert_allclose(program.run(a), heavy(a), rtol=1e-5)
    assert program.temporary_bytes >= a.nbytes
    assert program.compile_seconds > 0
    doubled = timings.compiled(jax.jit(heavy), a, devices=2)
    assert doubled.temporary_bytes == 2 * program.temporary_bytes


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"runs": {}}, "runs"),
        ({"runs": {"a": 3}}, "runs['a']"),
        ({"runs": {"a": int}, "rounds": 0}, "rounds"),
        ({"runs": {"a": int}, "seconds": 0.0}, "seconds"),
        ({"runs": {"a": int}, "seconds": "long"}, "seconds"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name.replace('[', '.').replace(']', '.')}: got "):
        timings.take_turns(**arguments)


def test_what_cannot_be_called_is_named():
    with pytest.raises(ValueError, match="^run: got 3, expected a function"):
        timings.burst(3, 0.1)
    with pytest.raises(ValueError, match="^function: got 3, expected a function"):
        timings.compiled(3)
