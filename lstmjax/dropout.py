"""Dropout as arrays: a key comes in, a masked array goes out. Nothing is remembered between calls.

All masks are inverted (kept entries are divided by 1 − rate), so evaluation needs no rescaling;
zoneout, which is not, uses its expectation there. What is dropped inside a recurrence is drawn
before it runs, as a ``Noise``, so that every method of running it drops the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lstmjax import checks


def dropout(key: jax.Array | None, x: jax.Array, rate: float) -> jax.Array:
    """Drops each element of ``x`` on its own (Srivastava et al., 2014).

        y = x ⊙ m / (1 − rate),   m ~ Bernoulli(1 − rate), one draw per element

    On a sequence [T, B, F] this is PyTorch's ``dropout`` between layers: fresh at every step.

    Args:
      key: a PRNG key; None means evaluation.
      x: [...], floating.
      rate: probability of dropping an element, 0 <= rate < 1.

    Returns:
      [...], in the dtype of ``x``; ``x`` itself when ``key`` is None or ``rate`` is 0.

    Raises:
      ValueError: ``rate`` outside [0, 1).
    """
    checks.rate("rate", rate)
    checks.floating("x", x)
    if key is None or rate == 0:
        return x
    return _masked(key, x, rate, x.shape)


def variational_dropout(key: jax.Array | None, xs: jax.Array, rate: float) -> jax.Array:
    """Drops features of each sequence, the same ones at all its steps (Gal & Ghahramani, 2016).

        y_t = x_t ⊙ m / (1 − rate),   m ~ Bernoulli(1 − rate), one draw per (sequence, feature)

    Applied to a layer's inputs, this is ``dropout=`` of the Keras LSTM: one mask for all four
    gates and all steps, none on the recurrent path.

    Args:
      key: a PRNG key; None means evaluation.
      xs: [T, B, F], floating.
      rate: probability of dropping a feature, 0 <= rate < 1.

    Returns:
      [T, B, F], in the dtype of ``xs``; ``xs`` itself when ``key`` is None or ``rate`` is 0.

    Raises:
      ValueError: ``rate`` outside [0, 1), or ``xs`` without the three axes.
    """
    checks.rate("rate", rate)
    checks.shape("xs", xs, ("T", "B", "F"))
    checks.floating("xs", xs)
    if key is None or rate == 0:
        return xs
    return _masked(key, xs, rate, (1, *xs.shape[1:]))


# ---- inside the recurrence ----------------------------------------------------------------------


class Noise(NamedTuple):
    """What a recurrence drops; ``recurrent_noise`` draws it. What is None is not done.

    Attributes:
      x: [G, B, D], inverted masks of the inputs, one for each gate, the same at all steps.
      h: [G, B, P], inverted masks of h_{t-1}, one for each gate, the same at all steps.
      state: [T, B, P], inverted masks of h_{t-1}, fresh at every step; the cell state is spared.
      zoneout_h: [T, B, P] bool, true where h_t = h_{t-1}; or its probability [] (evaluation).
      zoneout_c: [T, B, H] bool, true where c_t = c_{t-1}; or its probability [] (evaluation).
    """

    x: jax.Array | None = None
    h: jax.Array | None = None
    state: jax.Array | None = None
    zoneout_h: jax.Array | None = None
    zoneout_c: jax.Array | None = None


def recurrent_noise(
    key: jax.Array | None,
    params: Any,
    xs: jax.Array,
    *,
    input_dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    state_dropout: float = 0.0,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
) -> Noise:
    """Draws what a layer drops while it runs over a sequence.

        z_k = (x_t ⊙ m^x_k) W_xk + (h_{t-1} ⊙ m^h_k) W_hk + b_k        for every gate k
        h_t = d_t ⊙ h_{t-1} + (1 − d_t) ⊙ h̃_t,   d_t ~ Bernoulli(p)     zoneout; d_t = p to evaluate

    The masks m are inverted: 0 with the probability ``rate``, else 1/(1 − rate). c_{t-1} has no
    such mask: one that stays the same would make the kept units grow by (1 − rate)^{-T}.

    Args:
      key: a PRNG key; None means evaluation.
      params: the layer's parameters: any cell's.
      xs: [T, B, D], the layer's inputs; only their shape and dtype are read.
      input_dropout: rate of m^x, one mask for each gate, the same at all steps: ``dropout=`` of the
        Keras LSTM when it has recurrent dropout too (else see ``variational_dropout``).
      recurrent_dropout: rate of m^h, one mask for each gate, the same at all steps: Keras's
        ``recurrent_dropout`` (Gal & Ghahramani, 2016).
      state_dropout: rate of a mask on h_{t-1}, the same for all gates, fresh at every step:
        ``state_keep_prob`` of TensorFlow 1's ``DropoutWrapper`` (which spares the initial state).
      zoneout_h, zoneout_c: probability of keeping the old h, c (Krueger et al., 2017).

    Returns:
      ``Noise`` for the layer's ``noise=``.

    Raises:
      ValueError: a rate outside [0, 1), ``xs`` without the three axes, ``zoneout_c`` for a cell
        without c.
    """
    rates = {
        "input_dropout": input_dropout,
        "recurrent_dropout": recurrent_dropout,
        "state_dropout": state_dropout,
        "zoneout_h": zoneout_h,
        "zoneout_c": zoneout_c,
    }
    for name, rate in rates.items():
        checks.rate(name, rate)
    checks.shape("xs", xs, ("T", "B", "D"))
    checks.floating("xs", xs)
    steps, batch, inputs = xs.shape
    proj, width = params.w_h.shape
    w_proj = getattr(params, "w_proj", None)
    hidden = proj if w_proj is None else w_proj.shape[0]
    gates = width // hidden
    if key is None:
        expected = [jnp.asarray(p, jnp.float32) if p else None for p in (zoneout_h, zoneout_c)]
        return Noise(zoneout_h=expected[0], zoneout_c=expected[1])
    keys = jax.random.split(key, 5)

    def inverted(key, rate, shape):
        return _masked(key, jnp.ones(shape, xs.dtype), rate, shape) if rate else None

    def kept(key, rate, shape):
        return jax.random.bernoulli(key, rate, shape) if rate else None

    return Noise(
        inverted(keys[0], input_dropout, (gates, batch, inputs)),
        inverted(keys[1], recurrent_dropout, (gates, batch, proj)),
        inverted(keys[2], state_dropout, (steps, batch, proj)),
        kept(keys[3], zoneout_h, (steps, batch, proj)),
        kept(keys[4], zoneout_c, (steps, batch, hidden)),
    )


# How recurrence.recur applies a Noise: five short functions of one step.


def check_noise(noise: Noise, steps: int, state: Any) -> None:
    """Raises ``ValueError`` unless the masks over time fit T and the state's arrays [B, ·]."""
    if not isinstance(noise, Noise):
        raise ValueError(f"noise: got {type(noise).__name__}, expected Noise or None")
    for name, part in (("state", "h"), ("zoneout_h", "h"), ("zoneout_c", "c")):
        mask, old = getattr(noise, name), getattr(state, part, None)
        if mask is None:
            continue
        if old is None:
            raise ValueError(f"noise.{name}: got an array, expected None for a cell without {part}")
        if name == "state" or jnp.ndim(mask) > 0:
            checks.shape(f"noise.{name}", mask, (steps, *old.shape))


def with_gate_masks(step: Callable, noise: Noise) -> Callable:
    """``step`` with the masks per gate given to it; only those that are there."""
    masks = {"x_mask": noise.x, "h_mask": noise.h}
    return partial(step, **{name: mask for name, mask in masks.items() if mask is not None})


def over_time(noise: Noise) -> Noise:
    """The part of a ``Noise`` that has a time axis."""
    timed = [m if m is not None and jnp.ndim(m) > 0 else None for m in noise[3:]]
    return Noise(None, None, noise.state, *timed)


def dropped_state(noise_t: Noise, state: Any) -> Any:
    """The state that a step reads: h ⊙ mask where h is dropped."""
    if noise_t.state is None:
        return state
    return state._replace(h=state.h * noise_t.state.astype(state.h.dtype))


def zoned_out(noise: Noise, noise_t: Noise, old: Any, new: Any) -> Any:
    """The new state, with the old one's values where zoneout keeps them, or their expectation."""
    for part, whole, mask in (
        ("h", noise.zoneout_h, noise_t.zoneout_h),
        ("c", noise.zoneout_c, noise_t.zoneout_c),
    ):
        if whole is None:
            continue
        before, after = getattr(old, part), getattr(new, part)
        if mask is not None:
            value = jnp.where(mask, before, after)
        else:
            p = jnp.broadcast_to(whole.astype(after.dtype), after.shape)
            value = p * before + (1 - p) * after
        new = new._replace(**{part: value})
    return new


def _masked(key: jax.Array, x: jax.Array, rate: float, mask_shape: tuple[int, ...]) -> jax.Array:
    """``x`` times an inverted mask of ``mask_shape``, which broadcasts against ``x``."""
    keep = jax.random.bernoulli(key, 1.0 - rate, mask_shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
