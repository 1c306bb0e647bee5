"""Truncated backpropagation through time: layers of layers, noise and several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from bptt_oracle import B, D, H, P, at, cell, defined, gradients, plain
from jax.sharding import PartitionSpec
from problems import QUICK, holes_and_resets

from lstmjax import Bidirectional, GRUState, bidirectional, dropout, lstm, recurrent_noise, stack
from lstmjax.variants import LearnedState, learned_state

# ---- layers of layers ---------------------------------------------------------------------------


def tower(name, layers, seed=82):
    """``(layer, params, states, final, of)`` of a stack."""
    cells = [cell(name, seed=seed)]
    width = cells[0][2][0].h.shape[1]
    cells += [cell(name, inputs=width, seed=seed + n) for n in range(1, layers)]
    states, finals = (tuple(c[2][n] for c in cells) for n in (0, 2))
    return cells[0][0], tuple(c[1] for c in cells), states, finals, cells[0][3]


@pytest.mark.parametrize(
    ("name", "layers", "window", "steps", "method", "dropped"),
    [
        ("lstm", 2, (2, 6), 9, "fused", False),
        ("lstm", 3, (1, 3), 7, "fused", True),
        ("lstm", 2, (2, 4), 7, "scan", True),
        ("lstm", 2, (2, 2), 7, "fused", False),
        ("gru after", 3, (2, 4), 7, "fused", False),
        ("gru before", 2, (2, 4), 7, "fused", True),
        ("rnn tanh", 2, (3, 9), 37, "fused", False),
        ("layer_norm", 2, (2, 4), 7, "fused", False),
    ],
)
def test_a_stack_is_truncated_in_absolute_time(name, layers, window, steps, method, dropped, x64):
    layer, params, states, finals, of = tower(name, layers)
    xs, width = of(steps, B, D), states[0].h.shape[1]
    weights = (finals, of(steps, B, width))
    options = {"method": method, "reverse": dropped}
    factors = np.ones((layers, steps, B, width))
    if dropped:
        options |= {"dropout": 0.5, "key": jax.random.key(3)}
        keys = [jax.random.fold_in(options["key"], n) for n in range(layers)]
        factors = [dropout(key, np.ones((steps, B, width)), 0.5) for key in keys]

    def step(arguments, state, place):
        params, xs = arguments
        h, after = at(place, xs), []
        for n, (weights, old) in enumerate(zip(params, state, strict=True)):
            h = h if n == 0 else h * at(place, factors[n])
            new, h = layer(weights, h, old, method="scan")
            after.append(new)
        return tuple(after), h

    def run(params, xs, states, **more):
        return stack(layer, params, xs, states, **options, **more)

    truncated = functools.partial(run, truncation=window)
    of_rest, of_state = defined(step, window, (params, xs), states, weights, dropped)
    got = gradients(truncated, (params, xs, states), weights)
    oracle.assert_close(got, (*of_rest, of_state), 1e-12)
    both = jax.jit(lambda *a: (truncated(*a), run(*a)), compiler_options=QUICK)
    oracle.assert_close(*both(params, xs, states), 1e-14)


def test_layers_truncated_each_on_its_own_are_another_estimator(x64):
    layer, params, states, _, of = tower("rnn tanh", 2)
    xs, weights = of(9, B, D), of(9, B, H)

    def each(xs):
        for p, state in zip(params, states, strict=True):
            xs = layer(p, xs, state, truncation=(1, 3))[1]
        return xs[8]

    def together(xs):
        return stack(layer, params, xs, states, truncation=(1, 3))[1][8]

    reached = []
    for run in (each, together):
        (of_xs,) = gradients(run, (xs,), weights[8])
        reached.append(np.flatnonzero(np.any(np.asarray(of_xs) != 0, axis=(1, 2))))
    assert [list(r) for r in reached] == [[4, 5, 6, 7, 8], [6, 7, 8]]


def test_a_stack_of_learned_states(x64):
    layer, params, states, finals, of = tower("gru after", 2)
    firsts = [GRUState(state.h[0]) for state in states]
    learned = tuple(LearnedState(p, s) for p, s in zip(params, firsts, strict=True))
    xs, weights = of(7, B, D), (finals, of(7, B, H))

    def of_learned(learned, xs):
        return stack(learned_state(layer), learned, xs, truncation=(2, 4))

    def of_rows(learned, xs):
        rows = [GRUState(jnp.tile(p.state.h, (B, 1))) for p in learned]
        return stack(layer, [p.params for p in learned], xs, rows, truncation=(2, 4))

    got, want = (gradients(run, (learned, xs), weights) for run in (of_learned, of_rows))
    oracle.assert_close(got, want, 1e-13)
    assert np.any(got[0][1].state.h)


def test_both_directions_count_in_their_own_order(x64):
    layer, params, (state, _, final), of = cell("lstm")
    both = Bidirectional(params, cell("lstm", seed=83)[1])
    states, finals = Bidirectional(state, state), Bidirectional(final, final)
    mask, _ = holes_and_resets()
    xs, of_hs = of(7, B, D), of(7, B, 2 * P)

    def step(arguments, state, place):
        valid = at(place, mask)
        return layer(arguments[0], at(place, arguments[1]), state, mask=valid, method="scan")

    want = [
        defined(step, (2, 4), (both[n], xs), state, (final, half), reverse=n == 1)
        for n, half in enumerate(np.split(of_hs, 2, -1))
    ]
    run = functools.partial(bidirectional, layer, mask=mask, truncation=(2, 4))
    got = gradients(run, (both, xs, states), (finals, of_hs))
    (ahead, of_ahead), (behind, of_behind) = want
    want = (Bidirectional(ahead[0], behind[0]), ahead[1] + behind[1])
    oracle.assert_close(got, (*want, Bidirectional(of_ahead, of_behind)), 1e-12)


def test_noise_goes_by_the_scan(x64):
    (params, xs, state), weights = plain(7)
    drops = {"input_dropout": 0.3, "recurrent_dropout": 0.3, "state_dropout": 0.2}
    drops |= {"zoneout_h": 0.2, "zoneout_c": 0.2}
    noise = recurrent_noise(jax.random.key(1), params, xs, **drops)
    timed = ("state", "zoneout_h", "zoneout_c")

    def step(arguments, state, place):
        own = noise._replace(**{name: at(place, getattr(noise, name)) for name in timed})
        return lstm(arguments[0], at(place, arguments[1]), state, noise=own)

    of_rest, of_state = defined(step, (2, 4), (params, xs), state, weights)
    layer = functools.partial(lstm, noise=noise, truncation=(2, 4))
    oracle.assert_close(gradients(layer, (params, xs, state), weights), (*of_rest, of_state), 1e-12)


@pytest.mark.parametrize(
    ("method", "window"), [("fused", (2, 4)), ("fused", (3, 3)), ("scan", (2, 4))], ids=str
)
def test_training_across_devices_is_training_on_one(method, window):
    (params, xs, _), _ = plain(9)
    target = np.broadcast_to(np.linspace(-0.5, 0.5, H), (9, B, H))
    params, xs, target = jax.tree.map(np.float32, (params, xs, target))
    layers = [params, params._replace(w_x=params.w_h)]

    def loss(layers, xs, target):
        _, hs = stack(lstm, layers, xs, truncation=window, method=method)
        return jnp.mean((hs - target) ** 2)

    def mean_over_devices(layers, xs, target):
        own = jax.tree.map(lambda w: jax.lax.pcast(w, "data", to="varying"), layers)
        found = jax.value_and_grad(loss)(own, xs, target)
        return jax.tree.map(lambda a: jax.lax.pmean(a, "data"), found)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec(None, "data"), PartitionSpec()
    spread = jax.shard_map(
        mean_over_devices, mesh=mesh, in_specs=(whole, rows, rows), out_specs=whole
    )
    trained = []
    for grad in (jax.value_and_grad(loss), spread):

        def step(layers, _, grad=grad):
            value, grads = grad(layers, xs, target)
            return jax.tree.map(lambda w, g: w - g, layers, grads), value

        train = jax.jit(lambda layers, step=step: jax.lax.scan(step, layers, length=20))
        trained.append(train.lower(layers).compile(QUICK)(layers))
    losses = trained[0][1]
    assert losses[-1] < 0.9 * losses[0]
    for one, other in zip(*map(jax.tree.leaves, trained), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
