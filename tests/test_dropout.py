"""Dropout: what is dropped together, how often, and by how much the rest grows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from noises import FAST, assert_share
from problems import problem

from lstmjax import (
    dropout,
    embedding_dropout,
    locked_dropout,
    lstm,
    parallel,
    recurrent_noise,
    variational_dropout,
    weight_drop,
    word_dropout,
)

T, B, F = 30, 20, 40
RATE = 0.3


@pytest.fixture
def xs():
    """Random numbers, none of them 0, so that a zero in the output was dropped."""
    values = np.random.default_rng(50).uniform(0.5, 1.5, size=(T, B, F)).astype(np.float32)
    return values * np.where(np.arange(F) % 2 == 0, 1, -1).astype(np.float32)


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_elements_are_zero_or_scaled(drop, xs):
    ys = np.asarray(drop(jax.random.key(0), xs, RATE))
    assert ys.shape == xs.shape and ys.dtype == xs.dtype
    kept = ys != 0
    assert 0.6 < kept.mean() < 0.8
    np.testing.assert_allclose(ys[kept], (xs / (1 - RATE))[kept], rtol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_draws_every_element_on_its_own(rate, xs):
    kept = np.asarray(dropout(jax.random.key(1), xs, rate)) != 0
    assert_share(kept, 1 - rate)
    for axis in range(3):  # neighbours along each axis are kept together as often as chance says
        both = np.delete(kept, 0, axis) & np.delete(kept, -1, axis)
        assert_share(both, (1 - rate) ** 2)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_variational_dropout_draws_one_mask_for_all_steps(rate, xs):
    kept = np.asarray(variational_dropout(jax.random.key(2), xs, rate)) != 0
    assert np.array_equal(kept, np.broadcast_to(kept[0], kept.shape))
    assert_share(kept[0], 1 - rate)
    for axis in range(2):
        both = np.delete(kept[0], 0, axis) & np.delete(kept[0], -1, axis)
        assert_share(both, (1 - rate) ** 2)


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_the_mean_is_kept(drop, xs):
    keys = jax.random.split(jax.random.key(3), 400)
    mean = jnp.mean(jax.vmap(lambda key: drop(key, xs[:2, :3], RATE))(keys), axis=0)
    # One draw of y/x has the standard deviation √(rate/(1 − rate)) = 0.65; 400 of them 0.033.
    np.testing.assert_allclose(mean / xs[:2, :3], 1.0, atol=5 * 0.033)


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_no_key_or_no_rate_changes_nothing(drop, xs):
    assert drop(None, xs, RATE) is xs
    assert drop(jax.random.key(4), xs, 0.0) is xs
    assert drop(None, xs, 0) is xs


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_the_key_decides(drop, xs):
    one, same, other = (drop(jax.random.key(k), xs, RATE) for k in (5, 5, 6))
    assert np.array_equal(one, same)
    assert np.mean((one == 0) != (other == 0)) > 0.3  # 2·0.3·0.7 = 0.42 of independent masks
    compiled = jax.jit(drop, static_argnums=2)(jax.random.key(5), xs, RATE)
    assert np.array_equal(compiled == 0, one == 0)
    np.testing.assert_allclose(compiled, one, rtol=1e-6)


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_the_gradient_is_the_mask(drop, xs):
    key = jax.random.key(7)
    mask = jax.grad(lambda xs: drop(key, xs, RATE).sum())(xs)
    kept = np.asarray(drop(key, xs, RATE)) != 0
    np.testing.assert_allclose(mask, kept / (1 - RATE), rtol=1e-6)
    assert not np.any(mask[~kept])


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_dtype_is_kept(drop, dtype, xs, x64):
    xs = xs.astype(jnp.dtype(dtype))
    ys = drop(jax.random.key(8), xs, 0.5)
    assert ys.dtype == dtype
    kept = np.asarray(ys) != 0
    assert np.array_equal(np.asarray(ys)[kept], (2 * xs)[kept])  # doubling is exact


@pytest.mark.parametrize("drop", [dropout, variational_dropout])
def test_a_dropped_nan_is_gone(drop):
    """A mask that multiplies would leave NaN behind; one that selects does not."""
    xs = np.full((T, B, F), np.nan, np.float32)
    ys = np.asarray(drop(jax.random.key(9), xs, RATE))
    assert 0.2 < np.mean(ys == 0) < 0.4


def test_a_narrow_dtype_is_rounded_once(xs):
    """1/(1 − 0.3) is no bfloat16: a division in that dtype would make every mean 0.1% too large."""
    narrow = xs.astype(jnp.bfloat16)
    ys = np.asarray(dropout(jax.random.key(10), narrow, RATE))
    kept = ys != 0
    expected = (narrow.astype(np.float32) / np.float32(1 - RATE)).astype(jnp.bfloat16)
    assert np.array_equal(ys[kept], expected[kept])


def test_numpys_float64_becomes_float32_without_64_bit_mode(xs):
    ys = dropout(jax.random.key(10), xs.astype(np.float64), RATE)
    assert ys.dtype == np.float32
    assert np.array_equal(ys, dropout(jax.random.key(10), xs, RATE))


def test_masks_do_not_depend_on_64_bit_mode(xs):
    kept = np.asarray(dropout(jax.random.key(11), xs, RATE)) != 0
    with jax.enable_x64(True):
        assert np.array_equal(np.asarray(dropout(jax.random.key(11), xs, RATE)) != 0, kept)


def test_locked_dropout_is_variational_dropout(xs):
    key = jax.random.key(12)
    assert np.array_equal(locked_dropout(key, xs, RATE), variational_dropout(key, xs, RATE))
    assert locked_dropout(None, xs, RATE) is xs


def test_a_mask_shared_over_the_batch_is_one_row(xs):
    """TensorFlow 1's variational_recurrent: [F], the same for all sequences and steps."""
    rate, width = 0.25, 2000
    xs = np.concatenate([xs[:3, :4]] * (width // F), axis=2)
    drop = functools.partial(variational_dropout, rate=rate, share_batch=True)
    ys = np.asarray(drop(jax.random.key(13), xs))
    kept = ys != 0
    assert np.array_equal(kept, np.broadcast_to(kept[0, 0], kept.shape))
    assert_share(kept[0, 0], 1 - rate)
    assert_share(kept[0, 0, 1:] & kept[0, 0, :-1], (1 - rate) ** 2)
    np.testing.assert_allclose(ys[kept], (xs / (1 - rate))[kept], rtol=1e-6)
    other = np.asarray(drop(jax.random.key(14), xs)) != 0
    assert_share(kept[0, 0] & other[0, 0], (1 - rate) ** 2)
    assert drop(None, xs) is xs


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_embedding_dropout_drops_whole_words(rate):
    table = np.random.default_rng(51).uniform(0.5, 1.5, size=(3000, 3)).astype(np.float32)
    key = jax.random.key(15)
    ys = np.asarray(embedding_dropout(key, table, rate))
    kept = ys != 0
    assert ys.dtype == table.dtype and np.array_equal(kept, np.broadcast_to(kept[:, :1], (3000, 3)))
    assert_share(kept[:, 0], 1 - rate)
    assert_share(kept[1:, 0] & kept[:-1, 0], (1 - rate) ** 2)
    np.testing.assert_allclose(ys[kept], (table / (1 - rate))[kept], rtol=1e-6)
    assert embedding_dropout(None, table, rate) is table is embedding_dropout(key, table, 0)


def test_a_dropped_word_is_dropped_wherever_it_occurs_and_learns_nothing():
    table = np.random.default_rng(52).normal(size=(20, 3)).astype(np.float32)
    ids = np.random.default_rng(53).integers(0, 20, size=(6, 9))
    key = jax.random.key(16)
    dropped = ~np.any(np.asarray(embedding_dropout(key, table, 0.5)), axis=1)
    assert 3 < dropped.sum() < 17
    embed = lambda table: embedding_dropout(key, table, 0.5)[ids]  # noqa: E731
    assert np.array_equal(~np.any(np.asarray(embed(table)), axis=2), dropped[ids])
    gradient = jax.grad(lambda table: embed(table).sum())(table)
    counts = np.bincount(ids.ravel(), minlength=20)
    expected = np.where(dropped, 0, 2 * counts)[
        :, None
    ]  # every word's occurrences, times 1/(1 − p)
    assert np.array_equal(gradient, np.broadcast_to(expected, gradient.shape))


UNKNOWN, PADDING = 1, 0


@pytest.mark.parametrize("rate", [0.1, 0.6])
@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_word_dropout_replaces_words_and_nothing_else(rate, dtype):
    ids = np.random.default_rng(54).integers(2, 200, size=(60, 70)).astype(dtype)
    ids[40:, ::2] = PADDING
    words = ids != PADDING
    ys = word_dropout(jax.random.key(17), ids, rate, UNKNOWN, PADDING)
    assert ys.dtype == dtype and ys.shape == ids.shape
    replaced = np.asarray(ys) == UNKNOWN
    assert np.array_equal(np.where(replaced, ids, ys), ids)  # no scaling, no other change
    assert not np.any(replaced[~words])
    assert_share(replaced[words], rate)
    for axis in range(2):
        both = np.delete(replaced, 0, axis) & np.delete(replaced, -1, axis)
        assert_share(both[:39] if axis == 0 else both[:40], rate**2)
    paddings_too = np.asarray(word_dropout(jax.random.key(17), ids, rate, UNKNOWN)) == UNKNOWN
    assert_share(paddings_too[~words], rate)
    assert np.array_equal(paddings_too[words], replaced[words])  # the key decides, not keep_id


def test_word_dropout_without_key_or_rate_changes_nothing():
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert np.array_equal(word_dropout(None, ids, 0.9, UNKNOWN), ids)
    assert np.array_equal(word_dropout(jax.random.key(0), ids, 0, UNKNOWN), ids)


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "rnn", "gru"])
def test_weight_drop_is_the_mask_times_the_weights_and_reaches_them(
    name, values_and_gradients, x64
):
    """Against the oracle on weights masked by hand; the gradient is masked once more."""
    layer, slow, params, xs, state, weights = problem(name, steps=4)
    before = oracle.tree_map(np.copy, params)
    key = jax.random.key(18)
    ones = params._replace(w_h=np.ones_like(params.w_h))
    mask = np.asarray(weight_drop(key, ones, RATE).w_h)
    dropped = mask == 0
    assert 0 < dropped.sum() < dropped.size
    np.testing.assert_allclose(mask[~dropped], 1 / (1 - RATE), rtol=1e-15)
    by_hand = params._replace(w_h=params.w_h * mask)

    def with_drop(params, xs, state):
        return layer(weight_drop(key, params, RATE), xs, state)

    outputs, (of_params, of_xs, _) = values_and_gradients(with_drop, weights, params, xs, state)
    oracle.assert_close(outputs, slow(by_hand, xs, state), 1e-10)
    expected, of_expected_xs, _ = oracle.gradients(
        lambda *arguments: oracle.weighted_sum(weights, slow(*arguments)), by_hand, xs, state
    )
    oracle.assert_close(of_params, expected._replace(w_h=expected.w_h * mask), 1e-10)
    oracle.assert_close(of_xs, of_expected_xs, 1e-10)
    assert not np.any(np.asarray(of_params.w_h)[dropped])
    oracle.assert_close(params, before, 0.0)


def test_weight_drop_draws_every_weight_on_its_own_and_spares_the_other_fields():
    ones = problem("lstm").params._replace(w_h=np.ones((50, 80)), w_x=np.ones((50, 80)))
    ones = oracle.tree_map(np.float32, ones)
    key = jax.random.key(19)
    one = weight_drop(key, ones, RATE)
    kept = np.asarray(one.w_h) != 0
    assert_share(kept, 1 - RATE)
    for axis in range(2):
        assert_share(np.delete(kept, 0, axis) & np.delete(kept, -1, axis), (1 - RATE) ** 2)
    assert all(getattr(one, f) is getattr(ones, f) for f in ones._fields if f != "w_h")
    both = weight_drop(key, ones, RATE, ("w_x", "w_h"))
    assert np.array_equal(both.w_h, one.w_h)  # whatever else is dropped
    assert_share((np.asarray(both.w_x) != 0) & kept, (1 - RATE) ** 2)
    assert weight_drop(None, ones, RATE) is ones is weight_drop(key, ones, 0)
    narrow = weight_drop(key, ones._replace(w_h=ones.w_h.astype(jnp.bfloat16)), RATE)
    assert narrow.w_h.dtype == jnp.bfloat16
    assert np.array_equal(narrow.w_h != 0, kept)


# --- several devices -----------------------------------------------------------------------------


def drop_everything(key, xs, ids, table):
    """All kinds at once, and a layer on top, so that one program is compiled for all."""
    keys = jax.random.split(key, 5)
    params = weight_drop(keys[4], problem("lstm", inputs=F).params, RATE)
    params = oracle.tree_map(lambda p: jnp.asarray(p, jnp.float32), params)
    return (
        dropout(keys[0], xs, RATE),
        variational_dropout(keys[1], xs, RATE),
        embedding_dropout(keys[2], table, RATE)[ids],
        word_dropout(keys[3], ids, RATE, UNKNOWN),
        lstm(params, xs)[1],
    )


on_one_device = jax.jit(drop_everything, **FAST)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_sharded_batch_drops_what_it_drops_on_one_device(count, xs):
    rng = np.random.default_rng(55)
    ids, table = rng.integers(0, 50, size=(T, B)), rng.normal(size=(50, 3)).astype(np.float32)
    key = jax.random.key(20)
    expected = on_one_device(key, xs, ids, table)
    mesh = parallel.mesh(jax.devices()[:count])
    split = NamedSharding(mesh, P(None, parallel.AXIS))
    placed = jax.device_put((xs, ids), split), jax.device_put(table, NamedSharding(mesh, P()))
    got = jax.jit(drop_everything, out_shardings=split, **FAST)(key, *placed[0], placed[1])
    assert all(len(ys.sharding.device_set) == count for ys in got)
    for ours, wanted in zip(got[:4], expected[:4], strict=True):
        assert np.array_equal(ours == 0, wanted == 0)
        np.testing.assert_allclose(ours, wanted, rtol=1e-6)
    np.testing.assert_allclose(got[4], expected[4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fold", [False, True])
def test_inside_shard_map_every_device_draws_for_its_own_rows(fold, xs):
    """The same key drops the same rows' features on all devices; a key of its own, others."""
    mesh = parallel.mesh(jax.devices()[:4])

    def local(key, xs):
        key = jax.random.fold_in(key, jax.lax.axis_index(parallel.AXIS)) if fold else key
        return variational_dropout(key, xs, RATE)

    split, key = P(None, parallel.AXIS), jax.random.key(21)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), split), out_specs=split)
    got = np.asarray(jax.jit(mapped)(key, xs))
    parts = np.split(xs, 4, axis=1)
    keys = [jax.random.fold_in(key, n) if fold else key for n in range(4)]
    expected = [variational_dropout(k, part, RATE) for k, part in zip(keys, parts, strict=True)]
    np.testing.assert_allclose(got, np.concatenate(expected, axis=1), rtol=1e-6)
    first, second = (part == 0 for part in np.split(got, 4, axis=1)[:2])
    assert np.array_equal(first, second) is not fold


# --- errors --------------------------------------------------------------------------------------

KEY, XS = jax.random.key(0), np.ones((3, 2, 4), np.float32)
IDS, TABLE, CELL = np.ones((3, 2), np.int32), np.ones((5, 4), np.float32), problem("lstm").params


@pytest.mark.parametrize(
    ("drop", "parts"),
    [
        (lambda: locked_dropout(KEY, XS, 1.0), ("rate", "1.0", "0 <= rate < 1")),
        (lambda: locked_dropout(KEY, XS[0], 0.1), ("xs", "[2, 4]", "[T, B, F]")),
        *(
            (functools.partial(drop, key), ("key", got, expected))
            for drop in (
                lambda key: dropout(key, XS, 0.1),
                lambda key: locked_dropout(key, XS, 0.1),
                lambda key: embedding_dropout(key, TABLE, 0.1),
                lambda key: word_dropout(key, IDS, 0.1, 1),
                lambda key: weight_drop(key, CELL, 0.1),
                lambda key: recurrent_noise(key, CELL, XS, zoneout_h=0.1),
            )
            for key, got, expected in (
                (5, "int", "a PRNG key"),
                (jax.random.split(KEY), "[2]", "a single key"),
            )
        ),
        (
            lambda: variational_dropout(KEY, XS, 0.1, share_batch=1),
            ("share_batch", "1", "True or False"),
        ),
        (lambda: embedding_dropout(KEY, TABLE, -0.1), ("rate", "-0.1", "0 <= rate < 1")),
        (lambda: embedding_dropout(KEY, XS, 0.1), ("table", "[3, 2, 4]", "[V, E]")),
        (lambda: embedding_dropout(KEY, IDS, 0.1), ("table", "int32", "floating")),
        (lambda: word_dropout(KEY, IDS, "0.1", 1), ("rate", "'0.1'", "0 <= rate < 1")),
        (lambda: word_dropout(KEY, XS[0], 0.1, 1), ("ids", "float32", "integer")),
        (lambda: word_dropout(KEY, IDS[0], 0.1, 1), ("ids", "[2]", "[T, B]")),
        (lambda: word_dropout(KEY, IDS, 0.1, 1.0), ("unknown_id", "1.0", "whole number")),
        (lambda: word_dropout(KEY, IDS, 0.1, True), ("unknown_id", "True", "whole number")),
        (lambda: word_dropout(KEY, IDS, 0.1, 2**31), ("unknown_id", "2147483648", "int32")),
        (
            lambda: word_dropout(KEY, IDS.astype(np.uint8), 0.1, 1, -1),
            ("keep_id", "-1", "whole number in uint8"),
        ),
        (lambda: weight_drop(KEY, CELL, 1), ("rate", "1", "0 <= rate < 1")),
        (lambda: weight_drop(KEY, tuple(CELL), 0.1), ("params", "tuple", "cell's parameters")),
        (lambda: weight_drop(KEY, CELL, 0.1, "w_h"), ("fields", "'w_h'", "list of names")),
        (lambda: weight_drop(KEY, CELL, 0.1, ("w_h", "w_h")), ("fields", "'w_h'", "once")),
        (lambda: weight_drop(KEY, CELL, 0.1, ("w",)), ("fields", "'w'", "'w_x'", "'w_h'")),
        (
            lambda: weight_drop(KEY, CELL._replace(w_proj=None), 0.1, ("w_proj",)),
            ("params.w_proj", "NoneType", "array"),
        ),
    ],
)
def test_wrong_arguments(drop, parts):
    with pytest.raises(ValueError) as error:
        drop()
    message = str(error.value)
    assert all(part in message for part in parts) and "\n" not in message, message
