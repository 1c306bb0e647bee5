"""The recurrence by oneDNN's primitive, against the one that JAX differentiates by itself."""

import functools
import os
import re
import stat
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as Spec
from problems import QUICK

from lstmjax import LSTMParams, LSTMState, lstm, onednn

ROOT = Path(__file__).parents[1]
T, B, D, H = 7, 4, 3, 5
MISSING = onednn.available()
needs_library = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def problem(sizes=(T, B, D, H)):
    """``(params, state, xs), weights of a loss``, all random float32."""
    steps, batch, size, hidden = sizes
    rng = np.random.default_rng(90)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    scale = np.float32((size + hidden) ** -0.5)
    params = normal(size, 4 * hidden) * scale, normal(hidden, 4 * hidden) * scale
    params = LSTMParams(*params, normal(4 * hidden))
    states = [LSTMState(normal(batch, hidden), normal(batch, hidden)) for _ in range(2)]
    return (params, states[0], normal(steps, batch, size)), (states[1], normal(*sizes[:2], hidden))


def by_onednn(params, state, xs, **options):
    return onednn.onednn(LSTMParams(*params), state, xs, **options)


def by_scan(params, state, xs, **options):
    return lstm(params, xs, state, method="scan", **options)


def loss(layer, weights, *arguments, **options):
    return oracle.weighted_sum(weights, layer(*arguments, **options))


def run(layer, arguments, weights, **options):
    """The outputs of a layer and the gradients of a loss on them, as one program."""

    def both(*arguments):
        gradients = jax.grad(partial(loss, layer, weights, **options), (0, 1, 2))(*arguments)
        return layer(*arguments, **options), gradients

    return jax.jit(both, compiler_options=QUICK)(*arguments)


def exactly(sizes, **options):
    """What the scan says of the same numbers in float64."""
    with jax.enable_x64(True):
        return run(by_scan, *jax.tree.map(np.float64, problem(sizes)), **options)


@needs_library
@pytest.mark.parametrize("reverse", [False, True])
def test_values_and_gradients_are_the_oracle_s(reverse):
    arguments, weights = problem((5, 3, 2, 4))
    slow = lambda params, state, xs: oracle.lstm(params, xs, state, reverse=reverse)  # noqa: E731
    exact = oracle.tree_map(np.float64, arguments)
    value = slow(*exact)
    gradients = oracle.gradients(lambda *given: oracle.weighted_sum(weights, slow(*given)), *exact)
    got = run(by_onednn, arguments, weights, reverse=reverse)
    oracle.assert_close(got, (value, gradients), 1e-5)


# Sizes where a vector is not full, weights are rewritten into another layout, or nothing is left
# of an axis but one entry.
SIZES = [(1, 1, 1, 1), (9, 2, 1, 20), (3, 17, 33, 16), (4, 20, 24, 65)]


@needs_library
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_the_scan_s(sizes, devices, monkeypatch):
    """With one device, by as many threads as there are."""
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    reverse = sizes[0] == 3
    got = run(by_onednn, *problem(sizes), reverse=reverse)
    oracle.assert_close(got, exactly(sizes, reverse=reverse), 1e-5)


@needs_library
@pytest.mark.parametrize("devices", [1, 2])
def test_among_several_devices_each_has_one_thread(devices, monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    threads = 1 if devices == 2 else onednn._found().lstmjax_onednn_threads()
    program = jax.jit(lambda *given: by_onednn(*given)).lower(*problem()[0]).as_text()
    assert f"threads = {threads} : i64" in program


SEVERAL_CALLERS = """
import os, threading
import jax
from lstmjax import init_lstm, lstm

params = init_lstm(jax.random.key(0), 3, 8)
xs = jax.random.normal(jax.random.key(1), (9, 4, 3))
layer = jax.jit(lambda xs: lstm(params, xs, method="onednn")[1])
want = jax.jit(lambda xs: lstm(params, xs)[1])(xs)
meet, errors = threading.Barrier(7), []


def call():
    meet.wait()
    errors.extend(float(abs(layer(xs) - want).max()) for _ in range(3))
    meet.wait()
    meet.wait()


for _ in range(6):
    threading.Thread(target=call).start()
before = len(os.listdir("/proc/self/task"))
meet.wait()
meet.wait()
print(len(os.listdir("/proc/self/task")) - before, len(errors), max(errors))
meet.wait()
"""


@needs_library
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_whoever_calls_one_team_of_threads_computes():
    own = {"OMP_NUM_THREADS": "3", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_CALLERS],
        env=os.environ | own, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    threads, calls, error = done.stdout.split()
    assert int(threads) == 3  # one that leads, two that help; a team for each caller would be 12
    assert int(calls) == 18 and float(error) < 1e-6


@needs_library
def test_without_jit_and_without_a_gradient_the_values_are_the_same():
    arguments, _ = problem()
    oracle.assert_close(by_onednn(*arguments), by_scan(*arguments), 1e-6)


@needs_library
@pytest.mark.parametrize("check_vma", [True, False])
def test_split_over_devices_the_gradients_are_the_same(check_vma):
    arguments, (of_final, of_hs) = problem()
    mesh = Mesh(np.array(jax.devices()[:2]), ("b",), axis_types=(AxisType.Auto,))
    states, steps = LSTMState(Spec("b"), Spec("b")), Spec(None, "b")
    specs, results = (Spec(), states, steps, states, steps), (Spec(), states, steps)

    @partial(
        jax.shard_map, mesh=mesh, in_specs=specs, out_specs=(Spec(), results), check_vma=check_vma
    )
    def split(params, state, xs, of_final, of_hs):
        local = partial(loss, by_onednn, (of_final, of_hs))
        value, gradients = jax.value_and_grad(local, (0, 1, 2))(params, state, xs)
        if not check_vma:  # where JAX knows what varies, it adds these up by itself
            gradients = (jax.lax.psum(gradients[0], "b"), *gradients[1:])
        return jax.lax.psum(value, "b"), gradients

    whole = jax.value_and_grad(partial(loss, by_scan, (of_final, of_hs)), (0, 1, 2))
    got = jax.jit(split)(*arguments, of_final, of_hs)
    oracle.assert_close(got, jax.jit(whole)(*arguments), 1e-5)


@needs_library
def test_vmap_over_weights_is_a_loop_over_weights():
    (params, state, xs), weights = problem()
    several = jax.tree.map(lambda w: np.stack([w, -w, 0.5 * w]), params)
    gradient = jax.grad(partial(loss, by_onednn, weights), (0, 1, 2))
    at_once = jax.jit(jax.vmap(gradient, (0, None, None)))(several, state, xs)
    one_by_one = [gradient(jax.tree.map(lambda w, n=n: w[n], several), state, xs) for n in range(3)]
    oracle.assert_close(at_once, jax.tree.map(lambda *a: np.stack(a), *one_by_one), 1e-6)


@needs_library
@pytest.mark.parametrize("outer", ["forwards", "backwards"])
def test_second_derivatives_are_the_scan_s(outer):
    arguments, weights = problem()

    def second(layer):
        def first(*arguments):  # not linear in the outputs, so that cotangents have tangents too
            square = lambda *given: loss(layer, weights, *given) ** 2  # noqa: E731
            return jax.grad(square, (0, 1, 2))(*arguments)

        if outer == "forwards":
            return jax.jit(lambda *given: jax.jvp(first, given, given)[1])
        dot = lambda a, b: sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: E731
        return jax.jit(jax.grad(lambda *given: dot(arguments, first(*given)), (0, 1, 2)))

    got, want = second(by_onednn)(*arguments), second(by_scan)(*arguments)
    size = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(want))
    scaled = lambda tree: oracle.tree_map(lambda leaf: leaf / np.float32(size), tree)  # noqa: E731
    oracle.assert_close(scaled(got), scaled(want), 1e-5)


@needs_library
def test_forward_mode_is_refused_in_one_line():
    arguments, _ = problem()
    with pytest.raises(TypeError, match="forward-mode") as caught:
        jax.jvp(by_onednn, arguments, arguments)
    assert "\n" not in str(caught.value)


def in_dtype(dtype, arguments):
    """The arguments with everything but the cell state in another dtype."""
    params, state, xs = jax.tree.map(lambda a: jnp.asarray(a, dtype), arguments)
    return params, state._replace(c=jnp.asarray(state.c, jnp.float32)), xs


@needs_library
def test_bfloat16_is_float32_but_for_its_rounding():
    """bfloat16 keeps 8 bits: a rounding is off by 2⁻⁹ = 0.002 of the number at most."""
    arguments, weights = problem((T, 8, 6, 20))
    arguments = in_dtype(jnp.bfloat16, arguments)
    large = lambda outputs: jax.tree.map(lambda a: a.astype(np.float32), outputs)  # noqa: E731
    outputs, gradients = run(lambda *given: large(by_onednn(*given)), arguments, weights)
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert dtypes(by_onednn(*arguments)) == [jnp.bfloat16, jnp.float32, jnp.bfloat16]
    assert dtypes(gradients) == dtypes(arguments)
    values, wanted = run(by_scan, large(arguments), weights)
    oracle.assert_close(outputs, values, 2.0**-8)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert abs(got.astype(np.float32) - want).max() <= 2.0**-6 * abs(want).max()


@needs_library
def test_calls_at_the_same_time_do_not_disturb_one_another():
    """They share primitives, and write to memory that others have used before."""
    problems = [problem(), problem((9, 20, 24, 65))]
    runs = [jax.jit(jax.grad(partial(loss, by_onednn, w), (0, 1, 2))) for _, w in problems]
    alone = [run(*arguments) for run, (arguments, _) in zip(runs, problems, strict=True)]
    wrong = []

    def again(n):
        for _ in range(20):
            got = runs[n % 2](*problems[n % 2][0])
            same = jax.tree.map(lambda a, b: np.array_equal(a, b), got, alone[n % 2])
            wrong.extend(name for name in jax.tree.leaves(same) if not name)

    threads = [threading.Thread(target=again, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_library
@pytest.mark.parametrize("sizes", [(0, B, D, H), (T, 0, D, H), (T, B, D, 0)])
def test_of_nothing_it_makes_what_the_scan_makes(sizes):
    arguments, weights = problem(sizes)
    got = run(by_onednn, arguments, weights)
    oracle.assert_close(got, run(by_scan, arguments, weights), 1e-6)


# ---- what is refused ----------------------------------------------------------------------------


REFUSED = {
    "mask or lengths: got shape [7, 4], expected None": {"mask": np.ones((T, B), bool)},
    "resets: got shape [7, 4], expected None": {"resets": np.ones((T, B), bool)},
    "cell_clip: got a number, expected None": {"cell_clip": 1.0},
    "proj_clip: got a number, expected None": {"proj_clip": 1.0},
    "unroll: got 2, expected 1": {"unroll": 2},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_primitive_cannot_do_is_refused(message):
    arguments, _ = problem()
    with pytest.raises(ValueError) as caught:
        onednn.onednn(*arguments, **REFUSED[message])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("field, shape", [("peephole", (3, H)), ("w_proj", (H, H))])
def test_weights_that_the_primitive_does_not_know_are_refused(field, shape):
    (params, *others), _ = problem()
    with pytest.raises(ValueError) as caught:
        onednn.onednn(params._replace(**{field: np.ones(shape)}), *others)
    assert str(caught.value).startswith(f"params.{field}: got shape {list(shape)}, expected None")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float64])
def test_other_dtypes_are_refused(dtype, x64):
    arguments, _ = problem()
    expected = f"dtype: got {jnp.dtype(dtype)}, expected float32 or bfloat16"
    with pytest.raises(ValueError, match=expected):
        onednn.onednn(*jax.tree.map(lambda a: jnp.asarray(a, dtype), arguments))


def test_inputs_without_an_entry_are_refused():
    with pytest.raises(ValueError, match=r"^xs: got shape \[7, 4, 0\], expected D >= 1"):
        onednn.onednn(*problem((T, B, 0, H))[0])


# ---- the library that is built ------------------------------------------------------------------


@pytest.fixture
def asked_anew(monkeypatch):
    """Whether there is a library is found out once in a process; not so here."""
    monkeypatch.setattr(onednn, "_found", functools.cache(onednn._found.__wrapped__))


@pytest.fixture
def prefix(tmp_path, monkeypatch):
    """A folder that oneDNN might be in, by the two headers that tell its version."""
    folder = tmp_path / "prefix" / "include" / "oneapi" / "dnnl"
    folder.mkdir(parents=True)
    for name in ("version", "config"):
        (folder / f"dnnl_{name}.h").write_text("#define DNNL_VERSION_MAJOR 3\n")
    monkeypatch.setenv("LSTMJAX_ONEDNN", str(tmp_path / "prefix"))
    monkeypatch.setenv("LSTMJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "prefix"


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def refusal():
    """What ``onednn`` says of a library that is missing, without what is the same every time."""
    arguments, _ = problem()
    with pytest.raises(ValueError) as caught:
        onednn.onednn(*arguments)
    before, reason = str(caught.value).split(": ", 2)[1:]
    assert before == "got 'onednn', expected one that can run here"
    assert reason.endswith(onednn.NEEDS) and "\n" not in reason
    return reason


def test_without_onednn_it_says_where_it_looked(asked_anew, tmp_path, monkeypatch):
    monkeypatch.setenv("LSTMJAX_ONEDNN", str(tmp_path))
    assert refusal().startswith(f"oneDNN's headers are not in {tmp_path} (LSTMJAX_ONEDNN); it")


def test_without_a_compiler_it_says_so(asked_anew, prefix, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert refusal().startswith("no-such-compiler: No such file or directory; it")


def test_what_a_compiler_objects_to_is_said(asked_anew, prefix, tmp_path, monkeypatch):
    lines = "echo 'In file x:'; echo 'x.h: error: this oneDNN is old'; echo 'note: y'"
    compiler = script(tmp_path / "cxx", f'[ "$1" = --version ] || {{ ({lines}) >&2; exit 1; }}')
    monkeypatch.setenv("CXX", compiler)
    assert refusal().startswith("x.h: error: this oneDNN is old; it")


def test_what_cannot_be_loaded_is_said_and_not_kept(asked_anew, prefix, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", "for last; do :; done; echo no > $last"))
    monkeypatch.chdir(tmp_path)  # where the script's other outputs go
    assert "; it needs" in refusal()
    assert onednn.available() == refusal()
    assert not list((tmp_path / "cache" / "native").iterdir())


def test_what_was_not_asked_for_is_not_loaded(asked_anew):
    assert onednn.loaded() is None  # and asking does not load it
    assert onednn._found.cache_info().currsize == 0
    onednn.available()
    assert (onednn.loaded() is None) == (onednn.available() is not None)


def test_what_could_not_be_loaded_has_no_version(asked_anew, monkeypatch):
    monkeypatch.setattr(onednn, "_opened", lambda: (_ for _ in ()).throw(onednn._Unavailable("no")))
    assert onednn.available() == "no" and onednn.loaded() is None


@needs_library
def test_the_version_is_the_librarys(asked_anew):
    onednn.available()
    header = onednn._prefix() / "include" / "oneapi" / "dnnl" / "dnnl_version.h"
    parts = [re.search(rf"VERSION_{n} (\d+)", header.read_text())[1] for n in ("MAJOR", "MINOR")]
    assert re.fullmatch(rf"{parts[0]}\.{parts[1]}\.\d+", onednn.loaded())


@needs_library
def test_it_is_built_once_and_again_where_something_changed(prefix, tmp_path, monkeypatch):
    calls, whole = tmp_path / "calls", onednn._found()._name
    if not os.path.isfile(whole):
        pytest.skip("this process's own library is not kept")
    build = f"for last; do :; done; echo >> {calls}; cp {whole} $last"
    text = f'[ "$1" = --version ] || {{ {build}; }}'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", text))

    def builds():
        assert onednn._opened().lstmjax_onednn_threads() >= 1
        return len(calls.read_text().splitlines())

    assert [builds(), builds()] == [1, 1]
    (file,) = (tmp_path / "cache" / "native").iterdir()
    other = tmp_path / "other" / "native"  # elsewhere, because this process keeps what it loaded
    other.mkdir(parents=True)
    (other / file.name).write_bytes(b"half a library")
    monkeypatch.setenv("LSTMJAX_CACHE", str(tmp_path / "other"))
    assert [builds(), builds()] == [2, 2]
    (prefix / "include/oneapi/dnnl/dnnl_version.h").write_text("#define DNNL_VERSION_MINOR 1")
    assert [builds(), builds()] == [3, 3]
    assert len(list(other.iterdir())) == 2
    monkeypatch.setenv("LSTMJAX_CACHE", str(calls))  # no folder: nothing can be kept in it
    assert [builds(), builds()] == [4, 5]
