"""The same bits twice: what XLA is asked for it, and whether it holds.

On a CPU, XLA's programs give the same bits whenever they are run. On a GPU some of its kernels add
up in whatever order their threads come, and the fastest of several kernels is chosen by a stopwatch
whenever a program is compiled; two flags of XLA forbid both. A flag is a promise of the compiler
and not of every library that it calls, so the first steps of such a run are made twice, from the
same state, and must agree in every bit.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lstmjax import parallel
from lstmjax.records import RunError

# XLA's flags, the value that is set, and other ways to write it. The first leaves out every kernel
# that is not the same from run to run, the second chooses kernels without a stopwatch.
FLAGS = {
    "--xla_gpu_deterministic_ops": ("true", "1", ""),
    "--xla_gpu_autotune_level": ("0",),
}


def ask(deterministic: bool) -> None:
    """Adds to XLA_FLAGS what XLA offers for a GPU. A CPU needs nothing and ignores these flags.

    Args:
      deterministic: whether to do so. XLA reads its flags once, so it must be before the first
        array is made.

    Raises:
      ValueError: XLA_FLAGS says the opposite, or names a file of flags.
    """
    if not deterministic:
        return
    flags = os.environ.get("XLA_FLAGS", "").split()
    if flags and not flags[0].startswith("-"):
        raise ValueError("XLA_FLAGS: got the name of a file, expected flags with --deterministic")
    given = [(flag, *flag.partition("=")[::2]) for flag in flags]
    for flag, name, value in given:
        if value not in FLAGS.get(name, (value,)):
            expected = f"{name}={FLAGS[name][0]}"
            raise ValueError(f"XLA_FLAGS: got {flag}, expected {expected} with --deterministic")
    names = {name for _, name, _ in given}
    flags += [f"{name}={values[0]}" for name, values in FLAGS.items() if name not in names]
    os.environ["XLA_FLAGS"] = " ".join(flags)


def checked(advance: Callable, deterministic: bool) -> Callable:
    """``advance`` of ``parallel.runner``, whose first call is made twice and compared.

    Args:
      advance: ``advance(state, ...) -> (state, metrics)``, which uses the old state up.
      deterministic: whether to check; False gives ``advance`` as it is.

    Returns:
      A function of the same arguments and results. It raises RunError where the two calls gave
      different bits.
    """
    if not deterministic:
        return advance
    agreed = []

    def twice(state: Any, *arguments: Any) -> tuple[Any, Any]:
        if agreed:
            return advance(state, *arguments)
        again = jax.tree.map(lambda a: jax.device_put(a.copy(), a.sharding), state)
        first, second = advance(again, *arguments), advance(state, *arguments)
        if parallel.agree(bits(first) != bits(second)):  # in any process
            raise RunError(
                "--deterministic: the first steps, made twice from the same state, gave different "
                f"bits on {jax.devices()[0].device_kind}"
            )
        agreed.append(True)
        return second

    return twice


def bits(tree: Any) -> list[bytes]:
    """The bytes of every array of a tree, as far as they lie on devices of this process."""
    found = []
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array):
            found += [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
        else:
            found.append(np.asarray(leaf).tobytes())
    return found
