"""Batches spread over the explicit axes of a mesh, which is what ``jax.make_mesh`` makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import NAMES, problem

from lstmjax import (
    Bidirectional,
    bidirectional,
    clipped_adam,
    init_state,
    linen,
    losses,
    make_train_step,
    parallel,
    recurrent_noise,
    stack,
)
from lstmjax.models import SequenceModel

T, B = 6, 8
METHODS = ["fused", "scan", "unrolled"]


@pytest.fixture(scope="module")
def mesh():
    made = jax.make_mesh((2, 2), ("data", "model"))
    assert set(made.axis_types) == {AxisType.Explicit}  # what its users get unless they say more
    return made


def spread(mesh, tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def numbers(name, seed=1):
    """``(layer, params, xs, state, weights)``, with rows for every device."""
    layer, _, params, xs, state, _ = problem(name)
    rng = np.random.default_rng(seed)
    xs = rng.normal(size=(T, B, xs.shape[-1]))
    state = oracle.tree_map(lambda s: rng.normal(size=(B, s.shape[-1])), state)
    weights = rng.normal(size=(T, B, state.h.shape[-1]))
    return layer, params, xs, state, (oracle.tree_map(np.cos, state), weights)


def compiled(layer, weights):
    """Value and gradients of a layer, to be compiled for whatever its arguments are."""

    def loss(*arguments):
        outputs = layer(*arguments)
        return oracle.weighted_sum(weights, outputs), outputs

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_spread_changes_nothing(name, method, mesh, x64):
    """Values, gradients and where they lie, with a mask, resets and a state to begin with."""
    layer, params, xs, state, weights = numbers(name)
    rng = np.random.default_rng(3)
    mask, resets = rng.random((2, T, B)) < [[[0.8]], [[0.3]]]
    mask[:, 1] = False  # a row without a step
    xs[~mask] = np.nan
    reset_to = oracle.tree_map(lambda s: 0.5 * s[::-1], state)

    def run(params, xs, state, mask, resets, reset_to):
        return layer(params, xs, state, mask=mask, resets=resets, reset_to=reset_to, method=method)

    both = compiled(run, weights)
    want = both(params, xs, state, mask, resets, reset_to)
    rows = functools.partial(spread, mesh)
    by_step = (rows(a, None, "data") for a in (xs, mask, resets))
    xs, mask, resets = by_step
    # What is not spread as the inputs are is spread by the layer.
    got = both(rows(params), xs, rows(state), mask, resets, rows(reset_to, "data"))
    oracle.assert_close(got, want, 1e-12)
    (_, (final, hs)), (of_params, of_xs, _) = got
    assert jax.typeof(hs).sharding.spec == P(None, "data", None)
    assert jax.typeof(final.h).sharding.spec == P("data", None)
    assert jax.typeof(of_xs).sharding.spec == P(None, "data", None)
    assert jax.typeof(of_params.w_h).sharding.spec == P(None, None)


@pytest.mark.parametrize("names", ["model", ("data", "model")])
def test_over_any_axes_of_the_mesh(names, mesh, x64):
    layer, params, xs, state, weights = numbers("lstm")
    both = compiled(lambda *a: layer(*a, lengths=np.arange(B) % T), weights)
    want = both(params, xs, state)
    got = both(params, spread(mesh, xs, None, names), state)
    oracle.assert_close(got, want, 1e-12)
    assert jax.typeof(got[0][1][1]).sharding.spec == P(None, names, None)


@pytest.mark.parametrize("method", ["fused", "scan"])
def test_gradients_of_the_weights_are_summed_once(method, mesh):
    """One all-reduce after the loops; the same on an axis that XLA spreads takes five, or one in
    the loop."""
    layer, *arrays, _ = numbers("lstm")
    params, xs, _ = jax.tree.map(np.float32, arrays)
    loss = jax.jit(jax.grad(lambda *a: jnp.sum(layer(*a, method=method)[1] ** 2)))
    text = loss.lower(spread(mesh, params), spread(mesh, xs, None, "data")).compile().as_text()
    (found,) = parallel.collectives(text)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    assert found == parallel.Collective("all-reduce", len(sizes), 4 * sum(sizes), 0)


def test_weights_that_are_spread_are_gathered(mesh, x64):
    """As where each device keeps its share of them; its share of the gradient comes back."""
    layer, params, xs, state, weights = numbers("lstm")
    both = compiled(layer, weights)
    want = both(params, xs, state)
    wide = params._replace(w_h=spread(mesh, params.w_h, None, "model"))
    got = both(wide, spread(mesh, xs, None, "data"), state)
    oracle.assert_close(got, want, 1e-12)
    assert jax.typeof(got[1][0].w_h).sharding.spec == P(None, "model")


def test_noise_is_that_of_the_whole_batch(mesh, x64):
    layer, params, xs, state, weights = numbers("lstm")
    for rates in ({"recurrent_dropout": 0.3, "zoneout_c": 0.2}, {"zoneout_h": 0.4}):

        def run(params, xs, state, rates=rates):
            noise = recurrent_noise(jax.random.key(4), params, xs, **rates)
            return layer(params, xs, state, noise=noise)

        both = compiled(run, weights)
        want = both(params, xs, state)
        oracle.assert_close(both(params, spread(mesh, xs, None, "data"), state), want, 1e-12)


def test_larger_layers(mesh, x64):
    """Both directions; a truncated stack, whose layers hand each other outputs by slot."""
    layer, params, xs, state, _ = numbers("lstm")
    of_hs = np.random.default_rng(8).normal(size=(state.h.shape[-1], params.w_x.shape[1]))
    above = params._replace(w_x=of_hs)

    def two_ways(params, xs, state):
        both = Bidirectional(params, params)
        return bidirectional(
            layer, both, xs, Bidirectional(state, state), lengths=np.arange(B) % T
        )[1]

    def cut(params, xs, state):
        return stack(layer, (params, above), xs, (state, state), truncation=(2, 4))[1]

    for run in (two_ways, cut):
        weights = np.random.default_rng(9).normal(size=jax.eval_shape(run, params, xs, state).shape)
        both = compiled(run, weights)
        want = both(params, xs, state)
        oracle.assert_close(both(params, spread(mesh, xs, None, "data"), state), want, 1e-12)


def test_a_layer_in_the_place_of_flax_s(mesh, x64):
    rng = np.random.default_rng(5)
    xs = rng.normal(size=(B, T, 3))
    layer = linen.LSTM(features=4)
    params = jax.tree.map(np.float64, layer.init(jax.random.key(0), xs)["params"])
    weights = rng.normal(size=(B, T, 4))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def both(params, xs):
        hs = layer.apply({"params": params}, xs, seq_lengths=np.arange(B) % T)
        return oracle.weighted_sum(weights, hs)

    (value, (of_params, of_xs)), rows = both(params, xs), spread(mesh, xs, "data")
    got, (for_params, for_xs) = both(params, rows)
    oracle.assert_close((got, for_xs), (value, of_xs), 1e-12)
    leaves = (tuple(jax.tree.leaves(tree)) for tree in (for_params, of_params))
    oracle.assert_close(*leaves, 1e-12)
    assert jax.typeof(for_xs).sharding.spec == P("data", None, None)


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("every_step", [False, True])
def test_a_model_with_all_that_is_dropped(words, every_step, mesh):
    rng = np.random.default_rng(6)
    inputs = rng.integers(0, 20, (B, T)) if words else rng.normal(size=(B, T, 3)).astype("f4")
    rates = ("dropout", "recurrent_dropout", "weight_drop", "zoneout", "locked_dropout")
    own = {"vocabulary_size": 20, "unknown_id": 2, "padding_id": 0}
    own |= {"embedding_dropout": 0.2, "word_dropout": 0.2}
    model = SequenceModel(
        cell="lstm", hidden_size=4, output_size=3, num_layers=2, input_size=5,
        every_step=every_step, **dict.fromkeys(rates, 0.2) | (own if words else {}),
    )  # fmt: skip
    params = model.init(jax.random.key(0), inputs)["params"]
    mask = np.arange(T) <= np.arange(B)[:, None] % T

    def both(key):
        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def run(params, inputs, mask):
            outputs = model.apply({"params": params}, inputs, mask=mask, key=key)[1]
            return jnp.sum(outputs**2), outputs

        return run

    for key in (None, jax.random.key(7)):
        run = both(key)
        (value, outputs), of_params = run(params, inputs, mask)
        (got, spread_outputs), found = run(
            spread(mesh, params), spread(mesh, inputs, "data"), spread(mesh, mask, "data")
        )
        assert jax.typeof(spread_outputs).sharding.spec[0] == "data"
        oracle.assert_close((got, spread_outputs), (value, outputs), 1e-5)
        leaves = (tuple(jax.tree.leaves(tree)) for tree in (found, of_params))
        oracle.assert_close(*leaves, 1e-5)


def test_bounds_and_outside_of_jit(mesh, x64):
    layer, params, xs, state, _ = numbers("lstm")
    rows = spread(mesh, xs, None, "data")
    want = layer(params, xs, state, cell_clip=0.3)
    oracle.assert_close(layer(params, rows, state, cell_clip=0.3), want, 1e-12)
    traced = jax.jit(lambda xs, bound: layer(params, xs, state, cell_clip=bound))
    oracle.assert_close(traced(rows, 0.3), want, 1e-12)
    assert np.abs(want[1] - layer(params, xs, state)[1]).max() > 1e-3


@pytest.mark.parametrize("spec", [("data", None, None), (None, None, "data")])
def test_other_axes_cannot_be_spread(spec, mesh):
    layer, _, params, *_ = problem("lstm")
    params = jax.tree.map(np.float32, params)
    params = params._replace(w_x=np.ones((4, params.w_x.shape[1]), np.float32))
    xs = spread(mesh, np.zeros((4, 4, 4), np.float32), *spec)
    with pytest.raises(ValueError, match=r"^xs: got the sharding .*, expected .* spreads B alone$"):
        layer(params, xs)


def test_under_vmap_and_forwards(mesh, x64):
    """Several layers on one batch that is spread, and derivatives in other modes."""
    layer, params, xs, state, weights = numbers("lstm")
    many = jax.tree.map(lambda w: np.stack([w, 0.5 * w, -w]), params)
    rows = spread(mesh, xs, None, "data")

    def total(params, xs):
        return oracle.weighted_sum(weights, layer(params, xs, state))

    lanes = jax.jit(jax.vmap(jax.grad(total), in_axes=(0, None)))
    oracle.assert_close(lanes(many, rows), lanes(many, xs), 1e-12)

    @jax.jit
    def curvature(params, xs):
        return jax.jvp(jax.grad(total), (params, xs), (params, jnp.cos(xs)))

    oracle.assert_close(curvature(params, rows), curvature(params, xs), 1e-10)


def test_a_train_step_under_jit(mesh, x64):
    """Every loss, weights for padding, clipping, and the weights after an update."""
    layer, params, xs, *_ = numbers("lstm")
    rng = np.random.default_rng(11)
    size = jax.eval_shape(layer, params, xs)[0].h.shape[-1]
    batch = {"x": xs, "y": rng.normal(size=(B, size)), "label": rng.integers(0, size, B)}
    batch |= {"weight": np.arange(B) * 0.5, "lengths": np.arange(B) % T}

    def loss_fn(params, batch, key):
        h, label = layer(params, batch["x"], lengths=batch["lengths"])[0].h, batch["label"]
        each = {
            "squared": losses.squared_error(h, batch["y"]),
            "cross": losses.cross_entropy(h, label),
            "binary": losses.binary_cross_entropy(jnp.sum(h, axis=1), label % 2),
            "accuracy": losses.correct(h, label),
        }
        found = {name: losses.total(values, batch["weight"]) for name, values in each.items()}
        return sum(map(losses.mean, found.values())), found

    tx = clipped_adam(1e-2, max_norm=0.01)
    step = jax.jit(make_train_step(loss_fn, tx))
    state = init_state(params, tx, jax.random.key(0))
    rows = {k: spread(mesh, v, *([None] * (k == "x")), "data") for k, v in batch.items()}
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        want = step(state, batch)
        new, metrics = step(spread(mesh, state), rows)
    oracle.assert_close(new.params, want[0].params, 1e-12)
    for name, average in want[1].items():
        oracle.assert_close(metrics[name], average, 1e-12)
    assert np.abs(new.params.w_h - params.w_h).max() > 0.005
