"""When to update: three ways to train on sequences that are too long to backpropagate through.

Truncated backpropagation through time, TBPTT(k1, k2), says how far the error of a step reaches
back (Sutskever, 2013, section 2.8.6): the error L_t of step t reaches step τ iff

    lo(t) ≤ τ ≤ t,   lo(t) = max(0, (⌊t/k1⌋ + 1)·k1 − k2)

It leaves open when the parameters change, and that is the policy. With k1 = 2, k2 = 4 and T = 6 (a
line for each pass, = steps whose errors are counted, - steps that are run again for the gradient,
U an update):

    per_sequence        per_chunk           per_step (k1 = 1)
    ======U             ==U                 =U
                        --==U               -=U
                          --==U             --=U
                                            ---=U
                                             ---=U
                                              ---=U

  - "per_sequence": the parameters are frozen over the sequence, whose gradient is that of
    ``layer(…, truncation=(k1, k2))``; one update. So r2rt's "Styles of truncated backpropagation"
    (2016) compares the styles.
  - "per_chunk": an update after every k1 steps, from the errors of these steps. With k1 = k2 this
    is what TensorFlow's tutorials do: the state is handed on from chunk to chunk, computed with the
    parameters before the last update. With k1 < k2 the chunk is reached from the state at step
    lo(t), kept from the pass before, and the steps between are run again with the present
    parameters.
  - "per_step": an update after every step, from its error alone (Williams & Zipser, 1989): the
    same with k1 = 1. They keep old activations in place of running the window again; here the
    gradient is that of a function of the present parameters.

Windows end at the beginning of a sequence: no error reaches the sequence before it, whose last
state is where this one starts.

Letters: T time, B batch, D input, H hidden.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lstmjax import checks, train

POLICIES = ("per_chunk", "per_sequence", "per_step")
NORMS = ("mean", "r2rt")


class Params(NamedTuple):
    """What an update trains.

    Attributes:
      cell: the parameters of the recurrent layer.
      head: those of everything after it.
    """

    cell: Any
    head: Any


def make_update(
    loss_fn: Callable,
    layer: Callable,
    tx: optax.GradientTransformation,
    k1: int,
    k2: int,
    policy: str = "per_sequence",
    *,
    norm: str = "mean",
    axis_name: str | None = None,
) -> Callable:
    """Builds ``update((state, carry), batch) -> ((state, carry), metrics)``, compiled.

        losses = loss_fn(head, layer(cell, xs, carry)[1], ys),   g = ∇ Σ losses / (S·B)

    with the gradient truncated and the S errors of each update as the policy says: S = T for
    "per_sequence", k1 for "per_chunk", 1 for "per_step".

    Args:
      loss_fn: ``loss_fn(head, hs [S, B, H], ys) -> [S, B]``, the loss of every step and row; the
        loss of a step depends on the outputs of that step alone.
      layer: ``lstm``, ``rnn``, ``gru`` or a ``functools.partial``, of ``stack`` too.
      tx: an optax transformation.
      k1: steps between two cuts, >= 1.
      k2: steps that an error reaches back at most, a multiple of k1.
      policy: "per_chunk", "per_sequence" or "per_step"; with the last, k1 is 1.
      norm: "mean", or "r2rt": as r2rt's program scales it, with the gradient of the cell over B·n,
        n = min(k2, T), and the head's over S·B.
      axis_name: the mapped axis that the batch is split over, as in ``train.make_train_step``.

    Returns:
      The update of one sequence: ``state`` is a ``train.TrainState`` with ``Params`` as parameters
      (and counts updates), ``carry`` the layer's state [B, ·] before the sequence and after it,
      ``batch`` ``{"x": [T, B, D], "y": a pytree of [T, B, …]}``. ``metrics`` is
      ``{"loss": (Σ losses, T·B)}``, each loss from the parameters at its time.

    Raises:
      ValueError: an unknown ``policy`` or ``norm``, a k1 or k2 that does not fit; from the update,
        a T that is no multiple of k1 with "per_chunk", losses that are not [S, B].
    """
    checks.function("loss_fn", loss_fn)
    checks.function("layer", layer)
    checks.transformation("tx", tx)
    checks.positive_int("k1", k1)
    checks.positive_int("k2", k2)
    checks.one_of("policy", policy, POLICIES)
    checks.one_of("norm", norm, NORMS)
    if k2 % k1:
        raise ValueError(f"k2: got {k2}, expected a multiple of k1 = {k1}")
    if policy == "per_step" and k1 != 1:
        raise ValueError(f"k1: got {k1}, expected 1 with policy 'per_step'")
    whole = policy == "per_sequence"
    loss = _sequence_loss(loss_fn, layer, k1, k2) if whole else _window_loss(loss_fn, layer, k1)

    def update(both, batch):
        steps = batch["x"].shape[0]
        counted = steps if whole else k1
        scale = counted / min(k2, steps) if norm == "r2rt" else 1.0
        step = train.make_train_step(loss, _scaled(tx, scale), axis_name=axis_name, stateful=True)
        return step(both, batch) if whole else _chunks(step, both, batch, k1, min(k2, steps))

    return jax.jit(update)


def _sequence_loss(loss_fn: Callable, layer: Callable, k1: int, k2: int) -> Callable:
    """The mean over a whole sequence, as ``train.make_train_step`` wants it; the carry a state."""

    def loss(params, batch, key, state):
        state, hs = layer(params.cell, batch["x"], state, truncation=(k1, k2))
        return _mean(loss_fn, params.head, hs, batch["y"], state)

    return loss


def _window_loss(loss_fn: Callable, layer: Callable, k1: int) -> Callable:
    """The mean over the last k1 steps of a window; the carry is two states.

    The first is that before the window, and after it that before the next one, k1 steps later; the
    second is that after the window.
    """

    def loss(params, batch, key, states):
        xs, mask = batch["x"], batch["mask"]
        until = [None, None] if mask is None else [mask[:k1], mask[k1:]]
        start, hs = layer(params.cell, xs[:k1], states[0], mask=until[0])
        end = start
        if len(xs) > k1:
            end, more = layer(params.cell, xs[k1:], start, mask=until[1])
            hs = jnp.concatenate([hs, more])[-k1:]
        return _mean(loss_fn, params.head, hs, batch["y"], (start, end))

    return loss


def _mean(loss_fn: Callable, head: Any, hs: jax.Array, ys: Any, carry: Any) -> tuple:
    """(mean, (metrics, carry)) of the losses of all steps of hs [S, B, H]."""
    losses = loss_fn(head, hs, ys)
    checks.shape("losses", losses, hs.shape[:2])
    wide = checks.wide(losses.dtype)  # float16 ends at 65,504
    count = jnp.asarray(losses.size, wide)
    total = jnp.sum(losses, dtype=wide)
    return total / count, ({"loss": (total, count)}, carry)


def _chunks(step: Callable, both: tuple, batch: dict, k1: int, k2: int) -> tuple:
    """A sequence in chunks of k1 steps, one update each, in windows of k2 steps."""
    state, carry = both
    xs, steps = batch["x"], batch["x"].shape[0]
    if steps % k1:
        raise ValueError(f"batch['x']: got {steps} steps, expected a multiple of k1 = {k1}")
    # Steps before the beginning, which hold the state: so all windows have one shape.
    before = k2 - k1
    padded = jnp.concatenate([jnp.zeros((before, *xs.shape[1:]), xs.dtype), xs])

    def chunk(both, inputs):
        begin, ys = inputs  # begin: where the window does in what is padded
        mask = None
        if before:
            valid = begin + jnp.arange(k2) >= before
            mask = jnp.broadcast_to(valid[:, None], (k2, xs.shape[1]))
        window = jax.lax.dynamic_slice_in_dim(padded, begin, k2)
        return step(both, {"x": window, "y": ys, "mask": mask})

    def cut(array):
        return array.reshape(steps // k1, k1, *array.shape[1:])

    begins = jnp.arange(0, steps, k1)
    (state, (_, carry)), metrics = jax.lax.scan(
        chunk, (state, (carry, carry)), (begins, jax.tree.map(cut, batch["y"]))
    )
    return (state, carry), jax.tree.map(jnp.sum, metrics)


def _scaled(tx: optax.GradientTransformation, scale: float) -> optax.GradientTransformation:
    """``tx`` on gradients whose cell is multiplied by ``scale``."""

    def update(grads, opt_state, params=None):
        cell = jax.tree.map(lambda g: g * jnp.asarray(scale, g.dtype), grads.cell)
        return tx.update(grads._replace(cell=cell), opt_state, params)

    return tx if scale == 1.0 else optax.GradientTransformation(tx.init, update)
