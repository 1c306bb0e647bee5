"""One train step for everything: a pure function of state and batch.

The step knows neither models nor devices. Run it under ``jax.jit`` on one device, or give it an
``axis_name`` and run it under ``jax.vmap``, ``jax.pmap`` or ``jax.shard_map``: the gradients, and
so the parameters, are the same.

Metrics are pytrees of (sum, count), added up over devices and batches and divided at the end.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lstmjax import checks
from lstmjax.recurrence import varying_like

ON_NAN = ("stop", "skip")


class TrainState(NamedTuple):
    """Everything a run needs to go on.

    Attributes:
      step: [] int32, steps taken.
      params: the parameters, a pytree.
      opt_state: the optimiser's state.
      key: a PRNG key; the key of a step is ``fold_in(key, step)``.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def init_state(params: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step.

    Args:
      params: what is trained, a pytree of arrays.
      tx: an optax transformation.
      key: a PRNG key, which every step draws its own from.

    Returns:
      ``TrainState`` at step 0.

    Raises:
      ValueError: ``tx`` or ``key`` is none.
    """
    checks.transformation("tx", tx)
    checks.prng_key("key", key)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key)


def make_train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    stateful: bool = False,
    of_gradient: Callable | None = None,
    on_nan: str | None = None,
) -> Callable:
    """Builds ``step(state, batch) -> (state, metrics)``.

    Without an axis: g = ∇ loss, θ ← θ + tx(g). With one, each device has its part of the batch,
    and the gradient of the whole batch's mean is the average over devices, weighted by how many
    examples each has:

        g = psum(n_d · ∇ loss_d) / psum(n_d),   n_d = the count of metrics["loss"] on device d

    It is taken before ``tx``, so clipping sees what one device would see.

    Args:
      loss_fn: ``loss_fn(params, batch, key) -> (loss, metrics)``: the loss is a mean over the
        examples of ``batch``; metrics is a dict of (sum, count). If ``metrics["loss"]`` is there,
        its count says how many examples the mean was over (0 is allowed); else all devices weigh
        the same. With ``stateful``, ``loss_fn(params, batch, key, carry) -> (loss, (metrics,
        carry))``.
      tx: an optax transformation.
      axis_name: the mapped axis to average over, or None.
      stateful: whether something (a recurrent state) is carried from batch to batch. No gradient
        flows through it. ``step`` then takes and returns ``(state, carry)`` in place of ``state``.
      of_gradient: ``of_gradient(g) -> metrics``: what to report of the gradient that ``tx`` gets, a
        dict of (sum, count) that is added to the metrics (``diagnose.gradient_metrics``: its norm
        and how clipping changes it); or None.
      on_nan: "stop": metrics also has "gradient", the norm of g, so that whoever runs the step can
        see that it or the loss is not finite; "skip": besides, such a step leaves parameters,
        optimiser and carry as they are, its metrics but "gradient" are 0 of 0, and "skipped" counts
        it; None: neither.

    Returns:
      The step. Its key is ``fold_in(state.key, state.step)``, and per device
      ``fold_in(·, axis_index)``.

    Raises:
      ValueError: an argument that is none of these. The step: metrics without "loss" where
        ``on_nan`` is "skip".
    """

    checks.function("loss_fn", loss_fn)
    checks.transformation("tx", tx)
    checks.flag("stateful", stateful)
    if of_gradient is not None:
        checks.function("of_gradient", of_gradient)
    if on_nan is not None:
        checks.one_of("on_nan", on_nan, ON_NAN)

    def step(state, batch):
        state, extra = (state[0], (state[1],)) if stateful else (state, ())
        key = jax.random.fold_in(state.key, state.step)
        params = state.params
        if axis_name is not None:
            index = jax.lax.axis_index(axis_name)
            key = jax.random.fold_in(key, index)
            # Under shard_map's type checks, the gradient with respect to parameters that do not
            # vary over devices arrives already summed; varying ones get their own device's.
            params = varying_like(params, index)
        (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key, *extra)
        metrics, carry = aux if stateful else (aux, None)
        if axis_name is not None:
            grads, metrics = _whole(grads, metrics, batch, axis_name)
        if of_gradient is not None:  # every device has the whole batch's: nothing is to be added up
            metrics = {**metrics, **of_gradient(grads)}
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates), opt_state, carry
        if on_nan is not None:
            old = state.params, state.opt_state, extra[0] if stateful else None
            new, metrics = _watched(on_nan, grads, old, new, metrics)
        state = TrainState(state.step + 1, *new[:2], state.key)
        if stateful:
            return (state, jax.lax.stop_gradient(new[2])), metrics
        return state, metrics

    return step


def _watched(on_nan: str, grads: Any, old: Any, new: Any, metrics: dict) -> tuple[Any, dict]:
    """What a step leaves, and its metrics with the gradient's norm; see ``make_train_step``."""
    # In float16 the square of 256 is infinite.
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(checks.wide(g.dtype)), grads))
    one = jnp.ones_like(norm)
    if on_nan == "skip":
        if "loss" not in metrics:
            got = ", ".join(metrics) or "none"
            raise ValueError(f"metrics: got {got}, expected loss among them with on_nan='skip'")
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        metrics = jax.tree.map(lambda m: jnp.where(finite, m, jnp.zeros_like(m)), metrics)
        metrics["skipped"] = (jnp.where(finite, 0 * one, one), one)
    return new, {**metrics, "gradient": (norm, one)}


def _whole(grads: Any, metrics: Any, batch: Any, axis_name: str) -> tuple[Any, Any]:
    """The gradient and metrics of the whole batch, from every device's own.

    All of it is one sum over devices, so that a step waits for the others once: XLA joins the
    arrays into a single all-reduce where none of them depends on another one's sum.
    """
    if not isinstance(metrics, dict) or "loss" not in metrics:
        return jax.lax.pmean(grads, axis_name), jax.lax.psum(metrics, axis_name)
    loss = metrics["loss"]
    if (len(loss) if isinstance(loss, tuple | list) else (*jnp.shape(loss), 1)[0]) != 2:
        raise ValueError(f"metrics: got {type(loss).__name__} for loss, expected (sum, count)")
    # The number of rows cancels out; with it, the share of a device without padding is exactly 1.
    rows = max([1, *(leaf.shape[0] for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf))])

    def share(metrics, g):
        return jnp.asarray(metrics["loss"][1], checks.wide(g.dtype)) / rows

    def weighted(g):
        own = share(metrics, g)  # beyond float16, it may be, of losses of every step
        # A mean over no examples may be 0 / 0.
        return jnp.where(own == 0, jnp.zeros_like(own), g.astype(own.dtype) * own)

    weighted = jax.tree.map(weighted, grads)
    added, metrics = jax.lax.psum((weighted, metrics), axis_name)
    counted = metrics["loss"][1] != 0

    def mean(g, own):
        return jnp.where(counted, g / share(metrics, g), g).astype(own.dtype)

    return jax.tree.map(mean, added, grads), metrics


def make_eval_step(metric_fn: Callable, *, axis_name: str | None = None) -> Callable:
    """Builds ``step(params, batch) -> metrics``.

    Args:
      metric_fn: ``metric_fn(params, batch) -> metrics``, a dict of (sum, count).
      axis_name: the mapped axis to add up over, or None.

    Returns:
      The step; its metrics are those of the whole batch, on every device.
    """

    checks.function("metric_fn", metric_fn)

    def step(params, batch):
        metrics = metric_fn(params, batch)
        return metrics if axis_name is None else jax.lax.psum(metrics, axis_name)

    return step


def plan_batches(
    order: np.ndarray, batch_size: int, *, multiple: int = 1, drop_remainder: bool = False
) -> dict[str, np.ndarray]:
    """Cuts an order of examples into batches of one shape.

    A batch is filled up with rows of weight 0 where it is short: the last one, and every one when
    ``batch_size`` is not divisible among the devices. So each example counts exactly once.

    Args:
      order: [N] integers, the examples' numbers in the order of use.
      batch_size: B >= 1.
      multiple: the number of devices that will share a batch.
      drop_remainder: leave out the examples that do not fill a last batch.

    Returns:
      ``{"rows": int32 [K, B'], "weight": float32 [K, B']}``, B' the next multiple of ``multiple``
      from B on (from N on where there are fewer examples than B);
      the same rows in the same batches whatever ``multiple`` is.

    Raises:
      ValueError: an order that is no list of integers, a batch size or multiple below 1; no batch.
    """
    checks.positive_int("batch_size", batch_size)
    checks.positive_int("multiple", multiple)
    order = np.asarray(order)
    checks.shape("order", order, ("N",))
    if len(order) and not np.issubdtype(order.dtype, np.integer):
        raise ValueError(f"order: got {order.dtype}, expected integers")
    order = order.astype(np.int32)
    if not drop_remainder:  # a batch wider than the data would be padding and nothing else
        batch_size = min(batch_size, max(len(order), 1))
    count = len(order) // batch_size if drop_remainder else -(-len(order) // batch_size)
    if count == 0:
        raise ValueError(f"order: got {len(order)} examples, expected enough for one batch")
    order = order[: count * batch_size]
    missing = count * batch_size - len(order)
    rows = np.pad(order, (0, missing)).reshape(count, batch_size)
    weight = np.pad(np.ones(len(order), np.float32), (0, missing)).reshape(count, batch_size)
    widen = ((0, 0), (0, -batch_size % multiple))
    return {"rows": np.pad(rows, widen), "weight": np.pad(weight, widen)}


def scan_steps(step: Callable, batch_of: Callable | None = None) -> Callable:
    """Builds ``run(state, data, plan) -> (state, metrics)``: many steps in one compiled program.

    Args:
      step: ``step(state, batch) -> (state, metrics)``.
      batch_of: ``batch_of(data, pick)``: the batch of one entry of a plan of another kind; ``take``
        when not given.

    Returns:
      ``run``: ``data`` is a dict of [N, ...] arrays that stay where they are, ``plan`` is what
      ``plan_batches`` returns; batch k holds ``data[rows[k]]`` and ``weight[k]``. ``metrics`` has
      the K steps' metrics along a leading axis.
    """

    def run(state, data, plan):
        return jax.lax.scan(lambda s, pick: step(s, (batch_of or take)(data, pick)), state, plan)

    return run


def scan_eval(step: Callable, batch_of: Callable | None = None) -> Callable:
    """Builds ``run(params, data, plan) -> metrics``: the sums of ``step`` over all batches.

    Args:
      step: ``step(params, batch) -> metrics``, from ``make_eval_step``.
      batch_of: as in ``scan_steps``.

    Returns:
      ``run``, with ``data`` and ``plan`` as in ``scan_steps``.
    """

    def run(params, data, plan):
        per_batch = jax.lax.map(lambda pick: step(params, (batch_of or take)(data, pick)), plan)
        return jax.tree.map(lambda m: jnp.sum(m, axis=0), per_batch)

    return run


def take(data: dict[str, jax.Array], pick: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch {name: data[name][rows], "weight": weight} of one entry of a plan."""
    return {**{name: a[pick["rows"]] for name, a in data.items()}, "weight": pick["weight"]}


def added(metrics: list[Any]) -> Any:
    """The sums over steps of several calls' metrics: leaves [K₁], [K₂] … become []."""
    return jax.tree.map(lambda *parts: sum(np.sum(part) for part in parts), *metrics)


def plan_epoch(
    size: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    multiple: int = 1,
    drop_remainder: bool = False,
    at_most: int = 25,
) -> list[dict[str, np.ndarray]]:
    """One epoch's batches in an order of its own, cut into equal pieces.

    The order depends on the seed and the epoch alone. The pieces are equal, so that one compiled
    program runs them all: K batches in pieces of the largest divisor of K that fits.

    Args:
      size: N examples.
      batch_size, multiple, drop_remainder: as in ``plan_batches``.
      seed: of the run.
      epoch: which epoch.
      at_most: batches in one piece, >= 1.

    Returns:
      Plans of the same number of batches, in order.

    Raises:
      ValueError: as ``plan_batches``.
    """
    checks.positive_int("at_most", at_most)
    order = np.random.default_rng([seed, epoch]).permutation(size)
    plan = plan_batches(order, batch_size, multiple=multiple, drop_remainder=drop_remainder)
    count = len(plan["rows"])
    piece = max(n for n in range(1, min(at_most, count) + 1) if count % n == 0)
    return [{n: a[k : k + piece] for n, a in plan.items()} for k in range(0, count, piece)]


class Tally:
    """The sums of metrics over the steps of an epoch, as they come.

    Attributes:
      sums: {name: [sum, count]} so far, as NumPy numbers of the metrics' own types.
    """

    def __init__(self):
        self.sums: dict[str, list[Any]] = {}

    def add(self, metrics: dict[str, tuple[Any, Any]]) -> None:
        """Adds the metrics of some steps, {name: (sums [K], counts [K])}."""
        for name, parts in metrics.items():
            before = self.sums.get(name, [0, 0])
            self.sums[name] = [b + np.sum(part) for b, part in zip(before, parts, strict=True)]

    def take(self) -> dict[str, tuple[Any, Any]]:
        """The sums as metrics, {name: (sum, count)}; the next epoch starts from nothing."""
        sums, self.sums = self.sums, {}
        return {name: tuple(numbers) for name, numbers in sums.items()}

    def progress(self) -> dict[str, list[Any]]:
        """The sums in JSON's types, for ``restore``."""
        return {
            name: [[n.dtype.name, n.item()] for n in numbers] for name, numbers in self.sums.items()
        }

    def restore(self, progress: dict[str, list[Any]]) -> None:
        """Goes on from a ``progress``, to the same bits.

        Raises:
          TypeError, ValueError: it is none.
        """

        def number(dtype, value):
            if not re.fullmatch(r"b?float\d\d|u?int\d\d?", dtype):  # NumPy parses any text
                raise ValueError(f"dtype: got {dtype[:20]!r}, expected that of a number")
            return np.dtype(dtype).type(value)

        self.sums = {name: [number(*pair) for pair in pairs] for name, pairs in progress.items()}


class Clock:
    """Seconds by what they were spent on.

    Attributes:
      seconds: {"compile", "train", "eval"} so far, and "train_epochs" where epochs have ended: what
        "train" was at the end of each. It is a part of a checkpoint like any other (``Keeper``).
    """

    def __init__(self):
        self.seconds = {"compile": 0.0, "train": 0.0, "eval": 0.0}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time that a ``with`` block takes to one of them."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def end_epoch(self) -> None:
        """Notes the seconds of training so far: compiling and scoring are not in them."""
        self.seconds.setdefault("train_epochs", []).append(self.seconds["train"])

    def compile(self, run: Callable, *arguments: Any) -> Callable:
        """Compiles a jitted function for its arguments, on the clock."""
        with self("compile"):
            return run.lower(*arguments).compile()
