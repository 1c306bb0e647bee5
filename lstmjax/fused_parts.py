"""What the two loops of fused.py share: their arguments, and the LSTM's equations in parts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax import checks
from lstmjax.bptt import Truncation
from lstmjax.dropout import Noise
from lstmjax.pieces import flat, rows

JOINED = 2**18  # weights; beyond it the copy costs more than it gives


class Inputs(NamedTuple):
    """What the recurrence is differentiated with respect to; with slots, ``state`` is by slot."""

    xs: jax.Array
    w_x: jax.Array
    b: jax.Array
    w_h: jax.Array
    peephole: jax.Array | None
    w_proj: jax.Array | None
    state: Any
    reset_to: Any  # None without resets


class Known(NamedTuple):
    """What it is not differentiated with respect to."""

    valid: jax.Array | None  # [T, B] bool
    resets: jax.Array | None  # [T, B] bool
    begins: jax.Array | None  # [T] bool, with a truncation
    noise: Noise | None  # masks of zoneout alone
    cell_clip: jax.Array | None
    proj_clip: jax.Array | None

    @property
    def of_steps(self) -> tuple:
        """What has an axis of time."""
        return self[:4]


class How(NamedTuple):
    """What chooses the program."""

    kinds: checks.Dtypes
    reverse: bool
    unroll: int
    residuals: str
    coupled: bool
    truncation: Truncation | None
    piece: int  # steps


class Kept(NamedTuple):
    """What the forward loop leaves for the derivative, [T, B, ·] each."""

    gates: tuple | None  # i, f, g, o, or i, g, o where f = 1 − i
    h: jax.Array | None  # after each step; None where it is the output
    c: jax.Array | None  # after each step


# ---- the equations ------------------------------------------------------------------------------


def joined(inputs: Inputs, kinds: checks.Dtypes) -> jax.Array | None:
    """[W_x; W_h], [D + P, GH]; None where they are large."""
    if inputs.w_x.size + inputs.w_h.size > JOINED:
        return None
    return jnp.concatenate([w.astype(kinds.compute) for w in (inputs.w_x, inputs.w_h)])


def sums(inputs: Inputs, x: jax.Array, h_tm1: jax.Array, weights: Any, how: How) -> list:
    """The blocks of x W_x + h_{t-1} W_h + b, [..., H] each.

    As one product [x; h_{t-1}] [W_x; W_h] where ``weights`` are ``joined``: XLA's CPU compiler
    leaves element-wise work on the sum of two products unvectorised.
    """
    kinds = how.kinds
    if weights is None:
        z = flat(x, inputs.w_x, kinds) + flat(h_tm1, inputs.w_h, kinds)
    else:
        both = [a.astype(kinds.compute) for a in (x, h_tm1)]
        z = flat(jnp.concatenate(both, axis=-1), weights, kinds)
    z = z + jnp.broadcast_to(inputs.b.astype(kinds.keep), z.shape)
    return jnp.split(z, 3 if how.coupled else 4, axis=-1)


def written(z: list, c_tm1: jax.Array, peephole: tuple) -> tuple:
    """i, f and g; i and g where f = 1 − i."""
    *into, z_g, _ = z
    pairs = zip(into, peephole[:-1], strict=True)
    opened = (jax.nn.sigmoid(peep(b, p, c_tm1)) for b, p in pairs)
    return (*opened, jnp.tanh(z_g))


def peep(z: jax.Array, p: jax.Array | None, c: jax.Array) -> jax.Array:
    """A gate's sum with what it sees of the cell."""
    # Not a row of zeros where there are none: at H = 10 that made the forward pass twice as slow.
    return z if p is None else z + rows(p, c) * c


def clip(value: jax.Array, bound: Any) -> tuple[jax.Array, jax.Array | None]:
    """``value`` within ±bound, and the derivative of that."""
    if bound is None:
        return value, None
    bound = jnp.asarray(bound, value.dtype)
    return jax.jvp(lambda v: jnp.clip(v, -bound, bound), (value,), (jnp.ones_like(value),))


def rows_of(inputs: Inputs, how: How) -> tuple:
    """The peepholes [H]; None where there are none."""
    if inputs.peephole is None:
        return (None,) * (2 if how.coupled else 3)
    return tuple(inputs.peephole.astype(how.kinds.keep))
