"""What every layer asks of its arguments: shapes, dtypes, ranges, said in one line when wrong.

Letters: T time, B batch, D input, H hidden. The checks look at static facts (shape, dtype), so
they cost nothing inside a compiled program; the values of ``lengths`` are looked at only where
they are known before the program runs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    # Arrays compare element by element.
    if isinstance(value, np.ndarray | jax.Array) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def positive_int(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is a whole number of at least 1."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a whole number >= 1")


def truncation(value: Any) -> tuple[int, int] | None:
    """A truncation (k1, k2) as two ints, or None for None.

    Raises:
      ValueError: no pair of whole numbers of at least 1, or k2 is no multiple of k1.
    """
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    whole = [isinstance(k, int | np.integer) and not isinstance(k, bool) and k >= 1 for k in pair]
    if len(pair) != 2 or not all(whole) or pair[1] % pair[0]:
        expected = "None or (k1, k2), whole numbers >= 1 and k2 a multiple of k1"
        raise ValueError(f"truncation: got {value!r}, expected {expected}")
    return int(pair[0]), int(pair[1])


def flag(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: got {value!r}, expected True or False")


def number(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is one finite number; of a traced one, one at all."""
    if isinstance(value, jax.core.Tracer):
        _traced_number(name, value)
        return
    try:
        fine = not isinstance(value, str) and abs(float(value)) < float("inf")
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(f"{name}: got {value!r}, expected a finite number")


def _traced_number(name: str, value: jax.core.Tracer) -> None:
    if value.shape or not _real(value.dtype):
        got = f"dtype {value.dtype} and shape {list(value.shape)}"
        raise ValueError(f"{name}: got {got}, expected a single real number")


def _real(dtype: Any) -> bool:
    """Whether numbers of this dtype can be compared with 0."""
    kinds = jnp.bool_, jnp.integer, jnp.floating
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def function(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` can be called."""
    if not callable(value):
        raise ValueError(f"{name}: got {value!r}, expected a function")


def wide(dtype: Any) -> jnp.dtype:
    """``dtype``, but no less than float32."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def one_per_layer(name: str, value: Any, layers: int) -> None:
    """Raises ``ValueError`` unless ``value`` is None, or a list or tuple of so many entries."""
    if value is None:
        return
    if not isinstance(value, list | tuple) or hasattr(value, "_fields"):
        raise ValueError(f"{name}: got {type(value).__name__}, expected a list, one per layer")
    if len(value) != layers:
        raise ValueError(f"{name}: got {len(value)}, expected {layers}, one per layer")


def opened(layer: Callable, options: dict[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """A layer and its options, those of a ``functools.partial`` among them; the given ones win."""
    if isinstance(layer, functools.partial) and not layer.args:
        return layer.func, layer.keywords | options
    return layer, options


def option(layer: Callable, name: str) -> Any:
    """What a ``functools.partial`` gives for an option, or one that it hands on; None for none.

    ``partial(in_bfloat16, partial(lstm, reverse=True))`` is run backwards as well.
    """
    while isinstance(layer, functools.partial):
        if layer.keywords.get(name) is not None:
            return layer.keywords[name]
        layer = layer.args[0] if layer.args else layer.func
    return None


def transformation(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is an optax transformation."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise ValueError(f"{name}: got {value!r}, expected an optax transformation")


def as_array(name: str, value: Any) -> jax.Array:
    """``value`` as an array; raises ``ValueError`` where it is none and cannot be made one."""
    try:
        return jnp.asarray(value)
    except (OverflowError, TypeError, ValueError) as error:
        # An array that is none of JAX's is one of a dtype that JAX has not.
        got = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name}: got {got}, expected an array") from error


def positive(name: str, value: Any, or_none: bool = True) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number above 0, or None if it may be."""
    if value is None and or_none:
        return
    if isinstance(value, jax.core.Tracer):
        _traced_number(name, value)
        return
    try:
        fine = not isinstance(value, str) and 0 < float(value) < float("inf")
    except (TypeError, ValueError):
        fine = False
    if not fine:
        expected = "None or a finite number > 0" if or_none else "a finite number > 0"
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def rate(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is a probability with 0 <= value < 1."""
    try:
        fine = not isinstance(value, str) and 0.0 <= float(value) < 1.0
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(f"{name}: got {value!r}, expected 0 <= {name} < 1")


def shape(name: str, array: Any, expected: Sequence[int | str]) -> None:
    """Raises ``ValueError`` unless ``array`` has the expected shape (a string: any size)."""
    if not isinstance(array, jax.Array | np.ndarray):
        raise ValueError(f"{name}: got {type(array).__name__}, expected an array")
    got = array.shape
    fits = len(got) == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(got, expected, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name}: got shape {list(got)}, expected [{', '.join(map(str, expected))}]"
        )


def floating(name: str, array: Any) -> None:
    """Raises ``ValueError`` unless ``array`` holds floating point numbers."""
    if not hasattr(array, "dtype"):
        raise ValueError(f"{name}: got {type(array).__name__}, expected an array")
    # What JAX has no dtype for, as NumPy's objects and strings, it does not name the argument of.
    dtype = array.dtype if _foreign(array.dtype) else jnp.result_type(array)
    if _foreign(dtype) and dtype.kind == "f":
        raise ValueError(f"{name}: got dtype {dtype}, expected a floating point dtype of JAX's")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}: got dtype {dtype}, expected a floating point dtype")
    if dtype.itemsize < 2:  # which JAX promotes with nothing
        raise ValueError(f"{name}: got dtype {dtype}, expected one of 16 bits or more")


def _foreign(dtype: Any) -> bool:
    """Whether this is a dtype of NumPy's that JAX knows no arrays of."""
    if not isinstance(dtype, np.dtype):
        return False
    longer = dtype.kind in "fc" and dtype.itemsize > {"f": 8, "c": 16}[dtype.kind]
    return dtype.kind in "OSUMm" or longer or not dtype.isnative


class Dtypes(NamedTuple):
    """The two dtypes of a layer.

    Attributes:
      compute: products are taken, and ``h`` is kept, in this one: the promotion of the dtypes of
        the inputs and the parameters.
      keep: sums, gates and the cell state are kept in this one: ``compute``, but never less than
        float32.
    """

    compute: jnp.dtype
    keep: jnp.dtype


def dtypes(x: Any, params: tuple) -> Dtypes:
    """The dtypes of a layer with inputs ``x`` and a NamedTuple of arrays (or None) ``params``."""
    found = [jnp.result_type(a) for a in (x, *params) if a is not None]
    # Promotion is this layer's stated rule, so it holds for users of strict promotion too.
    with jax.numpy_dtype_promotion("standard"):
        compute = functools.reduce(jnp.promote_types, found)
        return Dtypes(compute, jnp.promote_types(compute, jnp.float32))


def layer_inputs(name: str, x: Any, params: tuple) -> Dtypes:
    """Checks inputs against the weights that read them; returns the two dtypes of a layer.

    Args:
      name: what the inputs are called.
      x: [..., D] inputs.
      params: a NamedTuple of arrays (or None), each in its own dtype, with a ``w_x`` [D, ·].

    Returns:
      ``Dtypes(compute, keep)``.

    Raises:
      ValueError: a size that does not fit, a dtype that is not floating.
    """
    floating(name, x)
    size = params.w_x.shape[0]
    if jnp.ndim(x) == 0 or jnp.shape(x)[-1] != size:
        got = list(jnp.shape(x))
        raise ValueError(f"{name}: got shape {got}, expected [..., {size}] to fit params.w_x")
    for field, array in zip(params._fields, params, strict=True):
        if array is not None:
            floating(f"params.{field}", array)
    return dtypes(x, params)


def weights_dtype(dtype: Any) -> None:
    """Raises ``ValueError`` unless ``dtype`` is a floating point dtype."""
    try:  # NumPy's dtype of None is float64
        fine = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        fine = False
    if not fine:
        raise ValueError(f"dtype: got {dtype!r}, expected a floating point dtype")
    if jnp.dtype(dtype).itemsize < 2:
        raise ValueError(f"dtype: got {dtype!r}, expected one of 16 bits or more")


def prng_key(name: str, key: Any, or_none: bool = False) -> None:
    """Raises ``ValueError`` unless ``key`` is one key, of ``jax.random.key`` or ``PRNGKey``."""
    if key is None and or_none:
        return
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed or dtype == jnp.uint32):
        got = type(key).__name__ if dtype is None else f"an array of {dtype}"
        raise ValueError(f"{name}: got {got}, expected a PRNG key, as of jax.random.key(0)")
    if len(shape) != (0 if typed else 1):
        raise ValueError(f"{name}: got keys of shape {list(shape)}, expected a single key")


def states(state: Any, kind: type, shapes: Sequence[Sequence[int]], name: str = "state") -> None:
    """Raises ``ValueError`` unless ``state`` is a ``kind`` whose fields have the given shapes."""
    if not isinstance(state, kind):
        fields = ", ".join(kind._fields)
        expected = f"{kind.__name__}({fields})" + (" or None" if state is not None else "")
        raise ValueError(f"{name}: got {type(state).__name__}, expected {expected}")
    for field, array, expected in zip(kind._fields, state, shapes, strict=True):
        shape(f"{name}.{field}", array, expected)
        floating(f"{name}.{field}", array)


METHODS = ("fused", "scan", "unrolled")


def running(reverse: Any, method: Any, unroll: Any, more: Sequence[str] = ()) -> None:
    """Raises ``ValueError`` unless these say how a sequence can be run; ``more`` methods count."""
    flag("reverse", reverse)
    one_of("method", method, tuple(dict.fromkeys((*METHODS, *more))))
    positive_int("unroll", unroll)


def valid_steps(steps: int, batch: int, mask: Any, lengths: Any) -> jax.Array | None:
    """The steps that count, as one array.

    Args:
      steps: T.
      batch: B.
      mask: [T, B] bool, integer or floating (non-zero: the step is valid), or None.
      lengths: [B] integers in 0 … T (step t of row b is valid iff t < lengths[b]), or None.

    Returns:
      [T, B] bool, true where both say valid; None when neither is given.

    Raises:
      ValueError: a wrong shape or dtype, or a length outside 0 … T.
    """
    valid = None
    if mask is not None:
        valid = _marked("mask", mask, steps, batch)
    if lengths is not None:
        lengths = _checked_lengths(lengths, steps, batch)
        times = jnp.arange(steps, dtype=lengths.dtype)
        within = times[:, None] < lengths[None, :]
        valid = within if valid is None else valid & within
    return valid


def _checked_lengths(lengths: Any, steps: int, batch: int) -> jax.Array:
    """[B] integer lengths; their range is checked where the values are known while tracing."""
    known = None
    if not isinstance(lengths, jax.core.Tracer):
        try:
            known = np.asarray(lengths)  # not jnp's: that would wrap what 32 bits do not hold
        except (TypeError, ValueError) as error:
            got = type(lengths).__name__
            raise ValueError(f"lengths: got {got}, expected an integer array") from error
        if known.shape == (0,):
            known = known.astype(np.int32)  # an empty list says nothing of its dtype
    dtype = lengths.dtype if known is None else known.dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"lengths: got dtype {dtype}, expected an integer dtype")
    shape("lengths", lengths if known is None else known, (batch,))
    if known is not None and known.size and (known.min() < 0 or known.max() > steps):
        bad = known[(known < 0) | (known > steps)][0]
        raise ValueError(f"lengths: got {bad}, expected 0 <= lengths <= {steps} (T)")
    # int32 holds any length; a small unsigned or 8-bit dtype might not hold T.
    return jnp.asarray(lengths).astype(jnp.int32)


def reset_steps(steps: int, batch: int, resets: Any) -> jax.Array | None:
    """[T, B] bool, true where the state is to be reset before the step; None when not given."""
    return None if resets is None else _marked("resets", resets, steps, batch)


def _marked(name: str, value: Any, steps: int, batch: int) -> jax.Array:
    """[T, B] bool, true where ``value`` is not 0."""
    array = as_array(name, value)
    shape(name, array, (steps, batch))
    if not _real(array.dtype):
        raise ValueError(f"{name}: got dtype {array.dtype}, expected bool, integer or floating")
    return array != jnp.zeros((), array.dtype)
