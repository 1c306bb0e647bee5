"""One step at a time: observations as they come, and a model that reads its own predictions.

    for x_t in source:  state, h_t = advance(params, state, x_t)          ``stream``
    for _ in range(n):  state, value = predict(params, state, value)      ``rollout``

``stream`` compiles the step once and gives the old state's memory to the new one, so a stream of
any length needs the memory of one state. ``rollout`` is a single ``lax.scan``. Both give the
numbers of the whole sequence's call, to round-off.

Letters: T time, B batch, D input, H hidden, O outputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import checks
from lstmjax.recurrence import Bidirectional

# ---- one observation at a time ------------------------------------------------------------------


def stream(step: Callable) -> Callable:
    """A cell's step, compiled once, for one observation at a time.

        state_t = step(params, state_{t-1}, x_t),   h_t = state_t.h

    Args:
      step: ``step(params, state, x_t) -> state``: ``lstm_step``, ``gru_step``, ``rnn_step``, the
        step of any variant, or a ``functools.partial`` of one.

    Returns:
      ``advance(params, state, x_t) -> (state, h_t)``: x_t [B, D], h_t [B, P]. The state that is
      handed in is used up (its buffers are given to the new one), so go on with the one returned;
      ``h_t`` is an array of its own, and stays. It raises ``ValueError`` for what ``step`` refuses,
      for a state that is used up, that holds one array in two places, or whose dtypes are not those
      that the step returns.

    Raises:
      ValueError: ``step`` is no function.
    """
    checks.function("step", step)

    def one(params, state, x_t):
        new = step(params, state, x_t)
        if not hasattr(new, "h"):
            got = type(new).__name__
            raise ValueError(f"step: got one that returns {got}, expected a state with a field h")
        return new, new.h

    return _compiled(one)


def stream_layer(layer: Callable) -> Callable:
    """A layer or a stack of layers, as ``stream``: each observation is a sequence of one step.

    Args:
      layer: ``layer(params, xs, state) -> (state, hs)`` with xs [T, B, D] and hs [T, B, H]:
        ``lstm`` or any other cell's layer, ``functools.partial(stack, lstm)``, or a ``partial`` of
        these with further options. It must run forwards.

    Returns:
      ``advance(params, state, x_t) -> (state, h_t)``, x_t [B, D] and h_t [B, H], as of ``stream``.
      ``state`` may be None for the layer's own first state, which is a compilation of its own.

    Raises:
      ValueError: ``layer`` is no function, or one with ``reverse``. ``advance``: as of ``stream``,
        and a state of both directions: the backward one begins at an end that a stream does not
        have.
    """
    checks.function("layer", layer)
    if checks.option(layer, "reverse"):
        raise ValueError("reverse: got True, expected False: a stream runs forwards")

    def one(params, state, x_t):
        x_t = checks.as_array("x_t", x_t)
        checks.shape("x_t", x_t, ("B", "D"))
        state, hs = layer(params, x_t[None], state)
        return state, hs[0]

    return _compiled(one)


def stream_model(model: Any) -> Callable:
    """A model, as ``stream``: each observation is a sequence of one step.

    Args:
      model: a ``models.SequenceModel``.

    Returns:
      ``advance(params, states, x_t) -> (states, outputs)``: x_t [B] ids or [B, D] numbers, outputs
      [B, O], as of ``stream``. ``states`` may be None, as in ``stream_layer``.

    Raises:
      ValueError: ``model`` is no such model. ``advance``: as of ``stream``.
    """
    if not (hasattr(model, "apply") and hasattr(model, "every_step")):
        raise ValueError(f"model: got {type(model).__name__}, expected a SequenceModel")
    size = ("B",) if model.vocabulary_size is not None else ("B", "D")

    def one(params, states, x_t):
        x_t = checks.as_array("x_t", x_t)
        checks.shape("x_t", x_t, size)
        states, outputs = model.apply({"params": params}, x_t[:, None], states)
        return states, outputs[:, 0] if model.every_step else outputs

    return _compiled(one)


def _compiled(one: Callable) -> Callable:
    """``one(params, state, x_t) -> (state, output)`` as a compiled program that donates the state.

    What is wrong with a state's type is found while tracing, and costs a running stream nothing.
    """

    def checked(params, state, x_t):
        if _both_directions(state):
            got = "got Bidirectional, expected the state of one direction"
            raise ValueError(f"state: {got}: the other begins at the end of the sequence")
        new, output = one(params, state, x_t)
        if state is not None:
            _same_types("state", state, new)
        elif _both_directions(new):
            raise ValueError("layer: got both directions, expected one: a stream has no end")
        return new, output

    run = jax.jit(checked, donate_argnums=1)

    def advance(params: Any, state: Any, x_t: Any) -> tuple[Any, jax.Array]:
        _own_arrays(state, (params, x_t))
        return run(params, state, x_t)

    return advance


def _both_directions(state: Any) -> bool:
    directions = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, Bidirectional))
    return any(isinstance(part, Bidirectional) for part in directions)


def _own_arrays(state: Any, others: Any) -> None:
    """Raises ``ValueError`` unless every array of ``state`` can be given up, and only once."""
    taken = {id(leaf) for leaf in jax.tree.leaves(others)}
    for leaf in jax.tree.leaves(state):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            continue
        if leaf.is_deleted():
            raise ValueError(
                "state: got one that a call has used up, expected the one that it returned"
            )
        if id(leaf) in taken:
            raise ValueError("state: got one array in two places, expected one for each place")
        taken.add(id(leaf))


# ---- a model that reads its own predictions -----------------------------------------------------


def rollout(
    predict: Callable, params: Any, state: Any, value: Any, steps: int
) -> tuple[Any, jax.Array]:
    """Feeds a model its own predictions, in one ``lax.scan``.

        state_k, value_k = predict(params, state_{k-1}, value_{k-1}),   k = 1 … steps

    Args:
      predict: ``predict(params, state, value) -> (state, value)``; keeps shapes and dtypes. The
        ``advance`` of a stream can be one, where outputs have the size of inputs.
      params: what ``predict`` takes.
      state: a pytree of arrays, the state before the first step; it is not used up.
      value: an array (or a pytree of arrays), what the first step reads.
      steps: n >= 0.

    Returns:
      ``(state, values)``: the state after the last step, and value_1 … value_n along a new first
      axis.

    Raises:
      ValueError: ``predict`` is no function or changes a shape or a dtype, ``steps`` is no whole
        number >= 0.
    """
    checks.function("predict", predict)
    whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
    if not whole or steps < 0:
        raise ValueError(f"steps: got {steps!r}, expected a whole number >= 0")
    state, value = jax.tree.map(jnp.asarray, (state, value))
    following = jax.eval_shape(predict, params, state, value)
    if not isinstance(following, tuple) or len(following) != 2:
        got = type(following).__name__
        raise ValueError(f"predict: got one that returns {got}, expected (state, value)")
    _same_types("state", state, following[0])
    _same_types("value", value, following[1])

    def body(carried, _):
        carried = predict(params, *carried)
        return carried, carried[1]

    (state, _), values = jax.lax.scan(body, (state, value), length=int(steps))
    return state, values


def _same_types(name: str, given: Any, new: Any) -> None:
    """Raises ``ValueError`` unless two pytrees agree in structure, shapes and dtypes."""
    if jax.tree.structure(given) != jax.tree.structure(new):
        got, expected = (str(jax.tree.structure(tree)) for tree in (given, new))
        raise ValueError(f"{name}: got {got}, expected {expected}, which the step returns")
    leaves = jax.tree.leaves(new)
    for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(given), leaves, strict=True):
        got, expected = (f"{a.dtype} {list(a.shape)}" for a in (leaf, want))
        if got != expected:
            place = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(f"{place}: got {got}, expected {expected}, which the step returns")
