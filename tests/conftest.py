"""Settings of every test: strict JAX, four CPU devices, no display, few and repeatable examples."""

import gc
import os

os.environ["MPLBACKEND"] = "Agg"  # before matplotlib is imported, here or in a subprocess

import hypothesis
import jax
import oracle
import problems
import pytest

# Compiling takes most of the time of nearly every test, running next to none: nothing is optimised
# but what asks for it (test_optimised.py, ``problems.as_users_do``). The processes that tests start
# inherit this. XLA reads it when it is first used; what the caller says comes last and wins.
if problems.QUICK_FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{problems.QUICK_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

# Tracing makes millions of objects and hardly a cycle of them: looking for cycles as often as
# Python does by itself takes a tenth of the tests' time.
gc.set_threshold(10_000, 20, 100)

# All three must be set before the first array is made. A silent promotion or broadcast is where
# wrong numbers come from, so both are errors here.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)
jax.devices()  # made now, or the first test that asks for 1,000 has them made

hypothesis.settings.register_profile(
    "lstmjax", deadline=None, derandomize=True, max_examples=20, database=None
)
hypothesis.settings.load_profile("lstmjax")


@pytest.fixture
def x64():
    """Run the test with 64-bit types (hypothesis tests use ``jax.enable_x64`` themselves)."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def values_and_gradients():
    """``run(layer, weights, *arguments) -> (outputs, gradients)`` of a layer under ``jit``.

    ``gradients`` are those of Σ weights·outputs with respect to every one of ``arguments``.
    The code is not optimised: compiling takes nearly all the time of these tests.
    """

    def run(layer, weights, *arguments):
        def loss(*arguments):
            outputs = layer(*arguments)
            return oracle.weighted_sum(weights, outputs), outputs

        differentiated = jax.value_and_grad(loss, tuple(range(len(arguments))), has_aux=True)
        compiled = jax.jit(differentiated, compiler_options=problems.QUICK)
        (_, outputs), gradients = compiled(*arguments)
        return outputs, gradients

    return run
