"""Dropout as arrays: a key comes in, a masked array goes out. Nothing is remembered between calls.

All masks are inverted (kept entries are divided by 1 − rate), so evaluation needs no rescaling;
zoneout, which is not, uses its expectation there. What is dropped inside a recurrence is drawn
before it runs, as a ``Noise``, so that every method of running it drops the same.

A mask is a function of the key, the rate and the shape alone. Under ``jit`` a sharded batch is
one batch, and drops what it would drop on one device. Inside ``shard_map`` and ``pmap`` each device
draws for the rows that it holds: give each one a key of its own, ``fold_in(key, axis_index(…))``
(``train.make_train_step`` does), or all of them drop the same.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import checks

PART = 2**16  # numbers drawn at a time, where there are many


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
      ValueError: ``rate`` outside [0, 1), a ``key`` that is none.
    """
    checks.rate("rate", rate)
    checks.floating("x", x)
    checks.prng_key("key", key, or_none=True)
    if key is None or rate == 0:
        return x
    return _masked(key, x, rate, x.shape)


def variational_dropout(
    key: jax.Array | None, xs: jax.Array, rate: float, *, share_batch: bool = False
) -> jax.Array:
    """Drops features of each sequence, the same ones at all its steps (Gal & Ghahramani, 2016).

        y_t = x_t ⊙ m / (1 − rate),   m ~ Bernoulli(1 − rate), one draw per (sequence, feature)

    Applied to a layer's inputs, this is ``dropout=`` of the Keras LSTM: one mask for all four
    gates and all steps, none on the recurrent path. With ``share_batch`` there is one draw per
    feature, as in TensorFlow 1's ``DropoutWrapper(variational_recurrent=True)``: on a layer's
    inputs its ``input_keep_prob``, on the outputs its ``output_keep_prob``, and ones [T, B, P] so
    dropped are the ``Noise.state`` of its ``state_keep_prob``.

    Args:
      key: a PRNG key; None means evaluation.
      xs: [T, B, F], floating.
      rate: probability of dropping a feature, 0 <= rate < 1.
      share_batch: one mask [F] for all sequences instead of one for each.

    Returns:
      [T, B, F], in the dtype of ``xs``; ``xs`` itself when ``key`` is None or ``rate`` is 0.

    Raises:
      ValueError: ``rate`` outside [0, 1), ``xs`` without the three axes, ``share_batch`` no flag,
        a ``key`` that is none.
    """
    checks.rate("rate", rate)
    checks.shape("xs", xs, ("T", "B", "F"))
    checks.floating("xs", xs)
    checks.flag("share_batch", share_batch)
    checks.prng_key("key", key, or_none=True)
    if key is None or rate == 0:
        return xs
    _, batch, features = xs.shape
    return _masked(key, xs, rate, (1, 1 if share_batch else batch, features))


def locked_dropout(key: jax.Array | None, xs: jax.Array, rate: float) -> jax.Array:
    """``variational_dropout`` under the name it has in AWD-LSTM (Merity et al., 2018).

        y_t = x_t ⊙ m / (1 − rate),   m ~ Bernoulli(1 − rate), one draw per (sequence, feature)

    AWD-LSTM drops so in three places: the embedded words (``dropouti``), the outputs of each layer
    but the last (``dropouth``) and those of the last (``dropout``).

    Args:
      key, xs, rate: as in ``variational_dropout``.

    Returns:
      [T, B, F]: ``variational_dropout(key, xs, rate)``, whose errors it raises.
    """
    return variational_dropout(key, xs, rate)


# ---- words and weights --------------------------------------------------------------------------


def embedding_dropout(key: jax.Array | None, table: jax.Array, rate: float) -> jax.Array:
    """Drops whole words from an embedding (Gal & Ghahramani, 2016; AWD-LSTM's ``dropoute``).

        y_v = table_v · m_v / (1 − rate),   m ~ Bernoulli(1 − rate), one draw per word v

    A dropped word is the zero vector wherever it occurs in the batch.

    Args:
      key: a PRNG key; None means evaluation.
      table: [V, E], floating.
      rate: probability of dropping a word, 0 <= rate < 1.

    Returns:
      [V, E], in the dtype of ``table``; ``table`` itself when ``key`` is None or ``rate`` is 0.

    Raises:
      ValueError: ``rate`` outside [0, 1), ``table`` without the two axes or not floating, a ``key``
        that is none.
    """
    checks.rate("rate", rate)
    checks.shape("table", table, ("V", "E"))
    checks.floating("table", table)
    checks.prng_key("key", key, or_none=True)
    if key is None or rate == 0:
        return table
    return _masked(key, table, rate, (table.shape[0], 1))


def word_dropout(
    key: jax.Array | None, ids: Any, rate: float, unknown_id: int, keep_id: int | None = None
) -> jax.Array:
    """Replaces words by the unknown one (Bowman et al., 2016; Flax's SST-2 example).

        y = unknown_id where m, else ids,   m ~ Bernoulli(rate), one draw per word

    Nothing is scaled: the sentence keeps its length, and the unknown word is trained by it.

    Args:
      key: a PRNG key; None means evaluation.
      ids: [T, B] or [B, T] integers.
      rate: probability of replacing a word, 0 <= rate < 1.
      unknown_id: what a word is replaced by; fits the dtype of ``ids``.
      keep_id: a word that is never replaced, such as the padding; or None.

    Returns:
      ``ids``' shape and dtype; ``ids`` as an array when ``key`` is None or ``rate`` is 0.

    Raises:
      ValueError: ``rate`` outside [0, 1), ``ids`` not two axes of integers, an id unlike them, a
        ``key`` that is none.
    """
    checks.rate("rate", rate)
    ids = checks.as_array("ids", ids)
    checks.shape("ids", ids, ("T", "B"))
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: got dtype {ids.dtype}, expected an integer dtype")
    limits = jnp.iinfo(ids.dtype)
    for name, value in (("unknown_id", unknown_id), ("keep_id", 0 if keep_id is None else keep_id)):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not limits.min <= value <= limits.max:
            raise ValueError(f"{name}: got {value!r}, expected a whole number in {ids.dtype}")
    checks.prng_key("key", key, or_none=True)
    if key is None or rate == 0:
        return ids
    replaced = _bernoulli(key, rate, ids.shape)
    if keep_id is not None:
        replaced &= ids != jnp.asarray(keep_id, ids.dtype)
    return jnp.where(replaced, jnp.asarray(unknown_id, ids.dtype), ids)


def weight_drop(
    key: jax.Array | None, params: Any, rate: float, fields: Sequence[str] = ("w_h",)
) -> Any:
    """DropConnect: drops single weights, the same ones at all steps (Wan et al., 2013).

        W ⊙ m / (1 − rate),   m ~ Bernoulli(1 − rate), one draw per weight

    On the recurrent kernel alone it is the weight drop of AWD-LSTM (``wdrop``; Merity et al.,
    2018) and ``dropout=`` of Haste. ``params`` stay as they are, and the gradient reaches them
    through the mask: a weight that was dropped gets 0.

    Args:
      key: a PRNG key; None means evaluation.
      params: any cell's parameters.
      rate: probability of dropping a weight, 0 <= rate < 1.
      fields: which parameters; what is dropped in one does not depend on the others.

    Returns:
      Parameters of the same kind, shapes and dtypes; ``params`` itself when ``key`` is None or
      ``rate`` is 0.

    Raises:
      ValueError: ``rate`` outside [0, 1), ``params`` that are no cell's, ``fields`` that they do
        not have, that are no floating arrays, or one twice.
    """
    checks.rate("rate", rate)
    _check_cell(params)
    if not isinstance(fields, list | tuple):
        raise ValueError(f"fields: got {fields!r}, expected a list of names")
    if len(set(fields)) < len(fields):
        raise ValueError(f"fields: got {fields!r}, expected each name once")
    for field in fields:
        checks.one_of("fields", field, params._fields)
        checks.floating(f"params.{field}", getattr(params, field))
    checks.prng_key("key", key, or_none=True)
    if key is None or rate == 0:
        return params
    for field in fields:
        weights = getattr(params, field)
        own = jax.random.fold_in(key, params._fields.index(field))
        params = params._replace(**{field: _masked(own, weights, rate, weights.shape)})
    return params


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
      xs: [T, B, D], the layer's inputs; only their shape and dtype are read. Masks come in the
        dtype in which the layer keeps its sums: float32, or float64.
      input_dropout: rate of m^x, one mask for each gate, the same at all steps: ``dropout=`` of the
        Keras LSTM when it has recurrent dropout too (else see ``variational_dropout``).
      recurrent_dropout: rate of m^h, one mask for each gate, the same at all steps: Keras's
        ``recurrent_dropout`` (Gal & Ghahramani, 2016).
      state_dropout: rate of a mask on h_{t-1}, the same for all gates, fresh at every step:
        TensorFlow 1's ``state_keep_prob`` (which spares the initial state, not the final one).
      zoneout_h, zoneout_c: probability of keeping the old h, c (Krueger et al., 2017).

    Returns:
      ``Noise`` for the layer's ``noise=``.

    Raises:
      ValueError: a rate outside [0, 1), ``xs`` without the three axes, ``params`` that are no
        cell's. A cell without c refuses ``zoneout_c`` when it runs.
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
    _check_cell(params)
    checks.prng_key("key", key, or_none=True)
    keep = checks.dtypes(xs, params).keep
    steps, batch, inputs = xs.shape
    proj, width = params.w_h.shape
    w_proj = getattr(params, "w_proj", None)
    hidden = proj if w_proj is None else w_proj.shape[0]
    gates = width // hidden
    if key is None:
        expected = [jnp.asarray(p, keep) if p else None for p in (zoneout_h, zoneout_c)]
        return Noise(zoneout_h=expected[0], zoneout_c=expected[1])
    keys = jax.random.split(key, 5)

    def inverted(key, rate, shape):
        return _masked(key, jnp.ones(shape, keep), rate, shape) if rate else None

    def kept(key, rate, shape):
        return _bernoulli_in_parts(key, rate, shape) if rate else None

    return Noise(
        inverted(keys[0], input_dropout, (gates, batch, inputs)),
        inverted(keys[1], recurrent_dropout, (gates, batch, proj)),
        inverted(keys[2], state_dropout, (steps, batch, proj)),
        kept(keys[3], zoneout_h, (steps, batch, proj)),
        kept(keys[4], zoneout_c, (steps, batch, hidden)),
    )


# How a layer applies a Noise: short functions of one step.


def check_noise(noise: Noise, xs: jax.Array, state: Any) -> None:
    """Raises ``ValueError`` unless the masks fit xs [T, B, D] and the state's arrays [B, ·]."""
    if not isinstance(noise, Noise):
        raise ValueError(f"noise: got {type(noise).__name__}, expected Noise or None")
    if noise.zoneout_c is not None and not hasattr(state, "c"):
        raise ValueError("noise.zoneout_c: got an array, expected None for a cell without c")
    (steps, *_, batch, inputs), h, c = xs.shape, state.h.shape, getattr(state, "c", state.h).shape
    shapes = [("G", batch, inputs), ("G", *h), (steps, *h), (steps, *h), (steps, *c)]
    for name, mask, shape in zip(Noise._fields, noise, shapes, strict=True):
        if mask is None:
            continue
        zoneout = name.startswith("zoneout")
        if zoneout and np.ndim(mask) == 0:  # a probability
            checks.floating(f"noise.{name}", mask)
            continue
        checks.shape(f"noise.{name}", mask, shape)
        if not zoneout:
            checks.floating(f"noise.{name}", mask)
        elif mask.dtype != jnp.bool_:
            raise ValueError(f"noise.{name}: got dtype {mask.dtype}, expected bool")


def zoneout_alone(noise: Any) -> bool:
    """Whether a ``Noise`` holds masks of zoneout and nothing else."""
    if not isinstance(noise, Noise) or any(part is not None for part in noise[:3]):
        return False
    given = [part for part in noise[3:] if part is not None]
    return bool(given) and all(np.ndim(part) == 3 for part in given)


def has_other_masks(noise: Any) -> bool:
    """Whether a ``Noise`` holds masks beside or in place of zoneout's; probabilities are none."""
    masks = isinstance(noise, Noise) and any(m is not None and np.ndim(m) > 0 for m in noise)
    return masks and not zoneout_alone(noise)


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
    return state._replace(h=times_mask(state.h, noise_t.state))


def times_mask(x: jax.Array, mask: jax.Array) -> jax.Array:
    """x ⊙ mask in the dtype of ``x``, but rounded to it only once."""
    wide = checks.wide(x.dtype)
    return (x.astype(wide) * mask.astype(wide)).astype(x.dtype)


def zoned_out(noise: Noise, noise_t: Noise, old: Any, new: Any) -> Any:
    """The new state, with the old one's values where zoneout keeps them, or their expectation."""
    for part in ("h", "c"):
        whole, mask = (getattr(n, f"zoneout_{part}") for n in (noise, noise_t))
        if whole is None:
            continue
        before, after = getattr(old, part), getattr(new, part)
        if mask is not None:
            value = jnp.where(mask, before, after)
        else:
            wide = checks.wide(after.dtype)
            p = jnp.broadcast_to(jnp.asarray(whole, wide), after.shape)
            mean = p * before.astype(wide) + (1 - p) * after.astype(wide)
            value = mean.astype(after.dtype)
        new = new._replace(**{part: value})
    return new


def _masked(key: jax.Array, x: jax.Array, rate: float, mask_shape: tuple[int, ...]) -> jax.Array:
    """``x`` times an inverted mask of ``mask_shape``, which broadcasts against ``x``."""
    keep, x = _bernoulli(key, 1.0 - rate, mask_shape), jnp.asarray(x)
    wide = checks.wide(x.dtype)
    scaled = x.astype(wide) / jnp.asarray(1.0 - rate, wide)
    return jnp.where(keep, scaled.astype(x.dtype), jnp.zeros((), x.dtype))


def _bernoulli(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """``shape`` bools, each true with the probability ``rate``."""
    # In float32, so that 64-bit mode draws the same masks.
    return jax.random.bernoulli(key, jnp.float32(rate), shape)


def _bernoulli_in_parts(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """``_bernoulli`` of many numbers, a part of the first axis with a key of its own at a time.

    JAX draws in rounds over the whole array on a CPU: three times as slow as in parts that stay in
    its cache. The numbers are the same on every device.
    """
    steps, size = shape[0], math.prod(shape[1:])
    if steps * size <= 4 * PART:
        return _bernoulli(key, rate, shape)
    length = max(PART // size, 1)
    keys = jax.random.split(key, -(-steps // length))
    over = jax.lax.map if jax.default_backend() == "cpu" else lambda f, keys: jax.vmap(f)(keys)
    drawn = over(lambda key: _bernoulli(key, rate, (length, *shape[1:])), keys)
    return drawn.reshape(-1, *shape[1:])[:steps]


def _check_cell(params: Any) -> None:
    """Raises ``ValueError`` unless ``params`` are a cell's."""
    if "w_h" not in getattr(params, "_fields", ()):
        raise ValueError(f"params: got {type(params).__name__}, expected a cell's parameters")
