"""The LSTM's recurrence by oneDNN's LSTM primitive, which PyTorch calls on a CPU too. Optional.

The primitive runs all steps, and all steps of the gradient, in one call each; XLA sees three custom
calls (native/onednn_lstm.cpp). They are compiled with the system's C++ compiler where they are used
first, into ``$LSTMJAX_CACHE`` (else ``~/.cache/lstmjax``), and need oneDNN 3 built for OpenMP:
``pip install "lstmjax[native]"`` brings one.

The primitive knows the plain LSTM alone: no peepholes, projection, clips, masks or resets, and no
dtypes but float32 and bfloat16. Second derivatives are those of ``fused``.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib

from lstmjax import checks
from lstmjax.fused import fused
from lstmjax.recurrence import varying_like

SOURCE = Path(__file__).parent / "native" / "onednn_lstm.cpp"
NEEDS = (
    'a C++ compiler (CXX) and oneDNN 3 built for OpenMP: pip install "lstmjax[native]", '
    "or name the folder it is in in LSTMJAX_ONEDNN"
)


class _Inputs(NamedTuple):
    """What the recurrence is differentiated with respect to, in the dtypes of the primitive."""

    xs: jax.Array  # [T, B, D], compute dtype, as w_x, w_h and h
    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array  # float32, as c
    h: jax.Array
    c: jax.Array


class _Outputs(NamedTuple):
    """What comes out of it, and what is left for its gradient."""

    hs: jax.Array
    h: jax.Array
    c: jax.Array
    workspace: jax.Array  # bytes in a layout of oneDNN's


class _How(NamedTuple):
    """What chooses the program."""

    reverse: bool
    threads: int


def onednn(
    params: Any,
    state: Any,
    xs: jax.Array,
    *,
    mask: jax.Array | None = None,
    resets: jax.Array | None = None,
    reset_to: Any = None,
    cell_clip: Any = None,
    proj_clip: Any = None,
    reverse: bool = False,
    unroll: int = 1,
) -> tuple[Any, jax.Array]:
    """``lstm`` by ``method="onednn"``; the arguments are checked by then.

    With one device a call uses all of OpenMP's threads, with more one thread each: every device
    computes at the same time. With bfloat16 the products are of bfloat16 and the cell state is
    float32, as everywhere in lstmjax, but gates are kept in bfloat16 for the gradient.

    Args:
      params: ``LSTMParams`` without peepholes and projection.
      state: ``LSTMState(h [B, H], c [B, H])`` in the layer's dtypes.
      xs: [T, B, D]; float32 or bfloat16 after promotion with ``params``.
      mask, resets, cell_clip, proj_clip: None; ``reset_to`` is not read without ``resets``.
      reverse: as in ``lstm``.
      unroll: 1.

    Returns:
      ``(state, hs [T, B, H])``, as ``lstm``.

    Raises:
      ValueError: what the primitive cannot do; a library that is missing (see ``available``); a
        default backend that is no CPU. Differentiating forwards raises JAX's ``TypeError`` for
        functions with a gradient of their own.
    """
    absent = {"params.peephole": params.peephole, "params.w_proj": params.w_proj}
    absent |= {"mask or lengths": mask, "resets": resets}
    absent |= {"cell_clip": cell_clip, "proj_clip": proj_clip}
    kinds = _check(absent, unroll, checks.dtypes(xs, params), xs.shape)
    if 0 in (*xs.shape, *state.h.shape):  # oneDNN knows no empty arrays
        hs = jnp.zeros((*xs.shape[:2], state.h.shape[1]), kinds.compute)
        return varying_like((state, hs), (params, state, xs))
    threads = 1 if jax.local_device_count() > 1 else _found().lstmjax_onednn_threads()
    weights = params.w_x.astype(kinds.compute), params.w_h.astype(kinds.compute)
    inputs = _Inputs(xs.astype(kinds.compute), *weights, params.b.astype(kinds.keep), *state)
    inputs = varying_like(inputs, (inputs, state))
    h, c, hs = _recurrence(_How(bool(reverse), threads), inputs)
    return type(state)(h, c), hs


def available() -> str | None:
    """None where ``onednn`` can run, else why it cannot and what to install, in one sentence.

    The first call of a process may take the seconds of compiling the library.
    """
    found = _found()
    return str(found) if isinstance(found, _Unavailable) else None


def _check(
    absent: dict[str, Any], unroll: int, kinds: checks.Dtypes, shape: tuple
) -> checks.Dtypes:
    plain = "method 'onednn' runs the plain LSTM over whole sequences"
    for name, value in absent.items():
        if value is not None:
            got = f"shape {list(jnp.shape(value))}" if jnp.ndim(value) else "a number"
            raise ValueError(f"{name}: got {got}, expected None: {plain}")
    if unroll != 1:
        raise ValueError(f"unroll: got {unroll}, expected 1: method 'onednn' has no scan to unroll")
    if kinds.compute not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"dtype: got {kinds.compute}, expected float32 or bfloat16 with method 'onednn'"
        )
    if shape[2] == 0:
        raise ValueError(f"xs: got shape {list(shape)}, expected D >= 1 with method 'onednn'")
    if jax.default_backend() != "cpu":
        got = jax.default_backend()
        raise ValueError(f"method: got 'onednn' on a {got}, expected it on a CPU alone")
    reason = available()
    if reason is not None:
        raise ValueError(f"method: got 'onednn', expected one that can run here: {reason}")
    return kinds


# ---- the recurrence and its derivatives ---------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(how: _How, inputs: _Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(h, c, hs)``."""
    hs, h, c = _call("inference", how, _shapes_out(inputs), *inputs)
    return h, c, hs


def _recurrence_fwd(how: _How, inputs: _Inputs) -> tuple[Any, Any]:
    outputs = _train(how, inputs)
    return (outputs.h, outputs.c, outputs.hs), (inputs, outputs)


def _recurrence_bwd(how: _How, kept: Any, cotangents: Any) -> tuple[_Inputs]:
    return (_gradient(how, *kept, cotangents),)


_recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)


# Both calls of the gradient can be differentiated again, as what they compute: ``fused``, forwards.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _train(how: _How, inputs: _Inputs) -> _Outputs:
    steps, batch, size = inputs.xs.shape
    shape = steps, batch, size, inputs.h.shape[1], inputs.xs.dtype == jnp.bfloat16, *how
    room = _found().lstmjax_onednn_workspace(*shape)
    if room < 0:
        raise ValueError(
            f"dtype: got {inputs.xs.dtype}, expected one that oneDNN has an LSTM for on this CPU"
        )
    shapes = (*_shapes_out(inputs), ((room,), jnp.uint8))
    return _Outputs(*_call("training", how, shapes, *inputs))


@_train.defjvp
def _train_jvp(how: _How, primals: Any, tangents: Any) -> tuple[_Outputs, _Outputs]:
    outputs = _train(how, *primals)
    h, c, hs = jax.jvp(functools.partial(_by_scan, how), primals, tangents)[1]
    nothing = jnp.zeros(outputs.workspace.shape, jax.dtypes.float0)
    return outputs, _Outputs(hs, h, c, nothing)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradient(how: _How, inputs: _Inputs, outputs: _Outputs, cotangents: Any) -> _Inputs:
    d_h, d_c, d_hs = (part.astype(jnp.float32) for part in cotangents)
    shapes = [(part.shape, jnp.float32) for part in inputs]
    found = _call("gradient", how, shapes, *inputs, *outputs, d_hs, d_h, d_c)
    return _Inputs(*(new.astype(old.dtype) for new, old in zip(found, inputs, strict=True)))


@_gradient.defjvp
def _gradient_jvp(how: _How, primals: Any, tangents: Any) -> tuple[_Inputs, _Inputs]:
    def by_scan(inputs, cotangents):  # the outputs follow from the inputs
        return jax.vjp(functools.partial(_by_scan, how), inputs)[1](cotangents)[0]

    (inputs, _, cotangents), (d_inputs, _, d_cotangents) = primals, tangents
    return _gradient(how, *primals), jax.jvp(
        by_scan, (inputs, cotangents), (d_inputs, d_cotangents)
    )[1]


class _Plain(NamedTuple):
    """The fields that ``fused`` reads."""

    w_x: jax.Array
    w_h: jax.Array
    b: jax.Array
    peephole: None = None
    w_proj: None = None


class _State(NamedTuple):
    h: jax.Array
    c: jax.Array


def _by_scan(how: _How, inputs: _Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    params = _Plain(inputs.w_x, inputs.w_h, inputs.b.astype(inputs.xs.dtype))
    state = _State(inputs.h, inputs.c)
    state, hs = fused(params, state, inputs.xs, reverse=how.reverse)
    return state.h, state.c, hs


def _shapes_out(inputs: _Inputs) -> tuple:
    """Shape and dtype of hs, h and c."""
    h, c = inputs.h, inputs.c
    return ((*inputs.xs.shape[:2], h.shape[1]), h.dtype), (h.shape, h.dtype), (c.shape, c.dtype)


def _call(name: str, how: _How, shapes: Any, *arrays: jax.Array) -> list[jax.Array]:
    results = [jax.ShapeDtypeStruct(*of) for of in shapes]
    call = jax.ffi.ffi_call(f"lstmjax_onednn_{name}", results, vmap_method="sequential")
    # The call forgets to say which mesh axes its results vary over.
    return varying_like(call(*arrays, reverse=how.reverse, threads=how.threads), arrays)


# ---- the library --------------------------------------------------------------------------------


class _Unavailable(Exception):
    """Why there is no library."""


def loaded() -> str | None:
    """The version of the oneDNN that this process has loaded, as "3.2.0"; None of none."""
    if not _found.cache_info().currsize or isinstance(library := _found(), _Unavailable):
        return None
    return library.lstmjax_onednn_version().decode()


@functools.cache
def _found() -> ctypes.CDLL | _Unavailable:
    """The library, its calls known to XLA; what stood in its way is found out once as well."""
    try:
        library = _opened()
    except _Unavailable as reason:
        return reason
    for name in ("inference", "training", "gradient"):
        name = f"lstmjax_onednn_{name}"
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library[name]), platform="cpu")
    return library


def _opened() -> ctypes.CDLL:
    """The library from the cache, or built."""
    prefix = _prefix()
    command = _command(prefix)
    key = sha256()
    for part in (*command, jaxlib.__version__, _output(command[0], "--version")):
        key.update(part.encode() + b"\0")
    for file in (SOURCE, *_headers(prefix)):
        key.update(file.read_bytes())
    folder = os.path.expanduser(os.environ.get("LSTMJAX_CACHE") or "~/.cache/lstmjax")
    path = Path(folder) / "native" / f"onednn-{key.hexdigest()[:24]}.so"
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # not there, or not whole
        library = _built(command, path)
    workspace = library.lstmjax_onednn_workspace
    workspace.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_bool] * 2 + [ctypes.c_int]
    workspace.restype = ctypes.c_int64
    library.lstmjax_onednn_version.restype = ctypes.c_char_p
    return library


def _prefix() -> Path:
    """The folder that holds oneDNN's include and lib folders."""
    named = os.environ.get("LSTMJAX_ONEDNN")
    for prefix in map(Path, [named] if named else [sys.prefix, "/usr/local", "/usr"]):
        if all(header.is_file() for header in _headers(prefix)):
            return prefix
    # No path of the machine unless the user gave it: the sentence goes into records.
    where = f"{named} (LSTMJAX_ONEDNN)" if named else "this Python's environment"
    raise _Unavailable(f"oneDNN's headers are not in {where}; it needs {NEEDS}")


def _headers(prefix: Path) -> list[Path]:
    """The two that tell one oneDNN from another."""
    return [prefix / "include/oneapi/dnnl" / f"dnnl_{name}.h" for name in ("version", "config")]


def _command(prefix: Path) -> list[str]:
    """The compiler's, but for the output."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fopenmp"]
    headers = [f"-I{prefix / 'include'}", f"-I{jax.ffi.include_dir()}"]
    libraries = [f"-L{prefix / 'lib'}", "-ldnnl", f"-Wl,-rpath,{prefix / 'lib'}"]
    return [*compiler, *options, *headers, str(SOURCE), *libraries]


def _built(command: list[str], path: Path) -> ctypes.CDLL:
    """Builds the library beside ``path`` and moves it there whole; unkept if that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError:
        beside = tempfile.TemporaryDirectory()
    with beside as own:
        made = os.path.join(own, path.name)
        _output(*command, "-o", made)
        try:
            library = ctypes.CDLL(made)
        except OSError as error:
            raise _Unavailable(f"{error}; it needs {NEEDS}") from error
        if Path(own).parent == path.parent:
            os.replace(made, path)
            library = ctypes.CDLL(str(path))  # the same library, by its name that stays
    return library


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise _Unavailable(f"{command[0]}: {error.strerror}; it needs {NEEDS}") from error
    if done.returncode:
        lines = done.stderr.splitlines() or [f"{command[0]} ended with {done.returncode}"]
        worst = next((line for line in lines if "error" in line), lines[-1])
        raise _Unavailable(f"{worst}; it needs {NEEDS}")
    return done.stdout
