"""Weights in one file: what goes in comes out, and every kind of wrong file is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lstmjax import checkpoint
from lstmjax.checkpoint import load_params, save_params
from lstmjax.records import RunError


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "layer_0": {"weights": {"w_x": jnp.float32(rng.normal(size=(3, 8)))}},
        "head": {"kernel": jnp.bfloat16(rng.normal(size=(2, 1))), "bias": jnp.zeros(1)},
    }


def test_what_goes_in_comes_out(params, tmp_path):
    save_params(tmp_path / "p.safetensors", params)
    shapes = jax.eval_shape(lambda: params)
    for like in (params, shapes):
        loaded = load_params(tmp_path / "p.safetensors", like)
        assert jax.tree.structure(loaded) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_arrays_that_do_not_lie_in_a_row_are_written_as_they_are(tmp_path):
    """Views of others: turned round, every other column, one row several times, a single number."""
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    params = {
        "turned": a.T, "columns": a[:, ::2], "fortran": np.asfortranarray(a),
        "rows": np.broadcast_to(a[0], (4, 3)), "one": a[1, 2],
    }  # fmt: skip
    save_params(tmp_path / "p.safetensors", params)
    loaded = load_params(tmp_path / "p.safetensors", jax.eval_shape(lambda: params))
    for name, array in params.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].shape == array.shape


def test_a_file_is_never_written_over(params, tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        save_params(path, params)
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def without(params, *keys):
    params = jax.tree.map(lambda a: a, params)
    inner = params
    for key in keys[:-1]:
        inner = inner[key]
    inner.pop(keys[-1])
    return params


def test_entries_that_do_not_fit_are_named(params, tmp_path):
    path = tmp_path / "p.safetensors"
    save_params(path, params)
    with pytest.raises(RunError, match=r"the weights head\.bias have no place in this model"):
        load_params(path, without(params, "head", "bias"))
    more = {**params, "extra": jnp.zeros(2)}
    with pytest.raises(RunError, match="the weights extra are missing"):
        load_params(path, more)
    other = {**params, "head": {"kernel": params["head"]["kernel"], "bias": jnp.zeros(2)}}
    with pytest.raises(RunError, match=r"head\.bias is float32\[1\], expected float32\[2\]"):
        load_params(path, other)
    other = {**params, "head": {"kernel": jnp.zeros((2, 1)), "bias": params["head"]["bias"]}}
    with pytest.raises(RunError, match=r"head\.kernel is bfloat16\[2, 1\], expected float32"):
        load_params(path, other)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "folder"])
def test_files_that_cannot_be_read_are_one_line(params, tmp_path, damage):
    path = tmp_path / "p.safetensors"
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        save_params(path, params)
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -3])
    with pytest.raises(RunError, match="cannot read the weights in .*p.safetensors") as error:
        load_params(path, params)
    assert "\n" not in str(error.value)


def test_a_file_that_may_not_be_read_is_not_called_missing(params, tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    save_params(path, params)

    def refusing(file, *mode):  # root may read everything
        raise PermissionError(13, "Permission denied", str(file))

    def no_such_file(file):  # what safetensors says of such a file
        raise FileNotFoundError(f'No such file or directory: "{file}"')

    monkeypatch.setattr("builtins.open", refusing)
    monkeypatch.setattr(checkpoint, "load_file", no_such_file)
    with pytest.raises(RunError) as error:
        checkpoint.read_arrays(path)
    assert str(error.value) == f"cannot read the weights in {path}: Permission denied"
