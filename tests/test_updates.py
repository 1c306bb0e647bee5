"""Update policies against a slow version: a Python loop over windows that are written out.

The slow version knows nothing of scans, masks or truncated derivatives: it keeps the state before
every step in a list, runs ``lstm_step`` from the state at lo(t) under ``jax.grad``, adds up, and
updates by momentum written out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import problems
import pytest

from lstmjax import (
    LSTMParams,
    LSTMState,
    RNNParams,
    RNNState,
    init_state,
    lstm,
    lstm_step,
    rnn,
    rnn_step,
    stack,
)
from lstmjax.updates import Params, make_update

B, D, H, OUT = 3, 2, 4, 2
RATE, MOMENTUM = 0.3, 0.8
TX = optax.sgd(RATE, momentum=MOMENTUM)


def loss_fn(head, hs, ys):
    """Half the squared error of an affine head: hs [S, B, H], ys [S, B, OUT] give [S, B]."""
    w, b = head
    predicted = hs @ w + jnp.broadcast_to(b, (*hs.shape[:2], OUT))
    return 0.5 * jnp.sum(jnp.square(predicted - ys), -1)


def given(name, steps, sequences=2, seed=0):
    """(Params, initial state, batches): random and all different."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    if name == "rnn":
        cell = RNNParams(normal(D, H), 0.6 * normal(H, H), normal(H))
        carry = RNNState(normal(B, H))
    else:
        cell = LSTMParams(normal(D, 4 * H), 0.6 * normal(H, 4 * H), normal(4 * H))
        carry = LSTMState(normal(B, H), normal(B, H))
    if name == "stack":
        upper = LSTMParams(normal(H, 4 * H), 0.6 * normal(H, 4 * H), normal(4 * H))
        cell, carry = (cell, upper), (carry, LSTMState(normal(B, H), normal(B, H)))
    params = Params(cell, (normal(H, OUT), normal(OUT)))
    batches = [{"x": normal(steps, B, D), "y": normal(steps, B, OUT)} for _ in range(sequences)]
    return jax.tree.map(jnp.asarray, (params, carry, batches))


def stacked_step(cell, carry, x):
    lower = lstm_step(cell[0], carry[0], x)
    return lower, lstm_step(cell[1], carry[1], lower.h)


LAYERS = {
    "rnn": (rnn, rnn_step, lambda carry: carry.h),
    "lstm": (lstm, lstm_step, lambda carry: carry.h),
    "stack": (functools.partial(stack, lstm), stacked_step, lambda carry: carry[-1].h),
}


def quick(function):
    return jax.jit(function, compiler_options=problems.QUICK)


# ---- the slow version ---------------------------------------------------------------------------


class Slow:
    """One policy, a sequence at a time."""

    def __init__(self, name, k1, k2, policy, norm):
        _, self.step, self.output = LAYERS[name]
        self.k1, self.k2, self.policy, self.norm = k1, k2, policy, norm
        gradient = jax.value_and_grad(self.window, has_aux=True)
        options = {"compiler_options": problems.QUICK, "static_argnames": "counted"}
        self.gradient = jax.jit(gradient, **options)

    def window(self, params, carry, xs, ys, counted):
        """(Σ of the last ``counted`` losses, the state before every step and after the last)."""
        states, outputs = [carry], []
        for x in xs:
            states.append(self.step(params.cell, states[-1], x))
            outputs.append(self.output(states[-1]))
        return jnp.sum(loss_fn(params.head, jnp.stack(outputs[-counted:]), ys)), states

    def start(self, t):
        return max(0, (t // self.k1 + 1) * self.k1 - self.k2)

    def update(self, params, velocity, summed, counted, steps):
        """θ and velocity after the gradient of a sum over ``counted`` steps of B rows."""
        of_cell = counted if self.norm == "mean" else min(self.k2, steps)
        grads = Params(
            jax.tree.map(lambda g: g / (B * of_cell), summed.cell),
            jax.tree.map(lambda g: g / (B * counted), summed.head),
        )
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)
        return jax.tree.map(lambda p, v: p - RATE * v, params, velocity), velocity

    def sequence(self, params, velocity, carry, xs, ys):
        steps, total = len(xs), 0.0
        if self.policy == "per_sequence":
            summed = jax.tree.map(jnp.zeros_like, params)
            _, states = self.window(params, carry, xs, ys, steps)
            for t in range(steps):
                lo = self.start(t)
                one = xs[lo : t + 1], ys[t : t + 1]
                (loss, _), grads = self.gradient(params, states[lo], *one, counted=1)
                summed, total = jax.tree.map(jnp.add, summed, grads), total + loss
            params, velocity = self.update(params, velocity, summed, steps, steps)
            return params, velocity, states[-1], total
        states = {0: carry}  # the latest state known before each step
        for end in range(self.k1, steps + 1, self.k1):
            lo = self.start(end - 1)
            one = xs[lo:end], ys[end - self.k1 : end]
            (loss, again), grads = self.gradient(params, states[lo], *one, counted=self.k1)
            states.update(zip(range(lo, end + 1), again, strict=True))
            params, velocity = self.update(params, velocity, grads, self.k1, steps)
            total = total + loss
        return params, velocity, states[steps], total


CASES = [
    # T, k1, k2, policy
    (6, 3, 3, "per_chunk"),
    (8, 2, 6, "per_chunk"),
    (6, 2, 8, "per_chunk"),  # windows longer than the sequence
    (6, 6, 6, "per_chunk"),
    (5, 1, 1, "per_step"),
    (6, 1, 3, "per_step"),
    (4, 1, 7, "per_step"),
    (6, 3, 3, "per_sequence"),
    (7, 1, 3, "per_sequence"),
    (7, 2, 4, "per_sequence"),  # T is no multiple of k1
    (6, 6, 12, "per_sequence"),
]


SOME = [case for case in CASES if case[1:3] in ((2, 6), (1, 3))]
STACKED = [case for case in CASES if case[1:3] in ((2, 6), (2, 4))]


@pytest.mark.parametrize(
    ("name", "norm", "case"),
    [
        *(("lstm", "mean", case) for case in SOME),
        *(("rnn", "r2rt", case) for case in CASES),
        *(("stack", "mean", case) for case in STACKED),
    ],
    ids=str,
)
def test_parameters_after_several_updates(name, norm, case, x64):
    steps, k1, k2, policy = case
    params, carry, batches = given(name, steps)
    compiled = quick(make_update(loss_fn, LAYERS[name][0], TX, k1, k2, policy, norm=norm))
    state = init_state(params, TX, jax.random.key(0))

    slow, velocity = Slow(name, k1, k2, policy, norm), jax.tree.map(jnp.zeros_like, params)
    both, want, held = (state, carry), params, carry
    for batch in batches:
        both, metrics = compiled(both, batch)
        want, velocity, held, total = slow.sequence(want, velocity, held, batch["x"], batch["y"])
        assert metrics["loss"][1] == steps * B
        oracle.assert_close(metrics["loss"][0], total, 1e-12)
    assert both[0].step == len(batches) * (1 if policy == "per_sequence" else steps // k1)
    oracle.assert_close(both[0].params, want, 1e-12)
    oracle.assert_close(both[1], held, 1e-12)
    # The updates are no small change: what is compared is not the initial parameters.
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), want, params)
    assert min(jax.tree.leaves(moved)) > 1e-3


# ---- laws ---------------------------------------------------------------------------------------


def after(policy, k1, k2, norm="mean"):
    """The LSTM's parameters and state after a sequence of six steps."""
    params, carry, (batch,) = given("lstm", 6, 1)
    update = quick(make_update(loss_fn, lstm, TX, k1, k2, policy, norm=norm))
    (state, carry), _ = update((init_state(params, TX, jax.random.key(0)), carry), batch)
    return state.params, carry


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_errors_of_16_bits_are_counted_in_float32(dtype):
    """float16 ends at 65,504, and bfloat16 has no 72,000."""
    steps, rows = 4, 18_000
    params, carry, (batch, _) = given("rnn", steps)
    wide = lambda a: jnp.broadcast_to(a[..., :1, :], (*a.shape[:-2], rows, a.shape[-1]))  # noqa: E731
    carry, batch = jax.tree.map(wide, (carry, batch))
    tx, found = optax.sgd(1.0), []
    for kind in (dtype, jnp.float32):
        own = jax.tree.map(lambda a, kind=kind: a.astype(kind), (params, carry, batch))
        state = init_state(own[0], tx, jax.random.key(0))
        (state, _), metrics = quick(make_update(loss_fn, rnn, tx, 2, 2))((state, own[1]), own[2])
        assert [a.dtype for a in metrics["loss"]] == [jnp.float32] * 2
        found.append(jax.tree.map(np.float32, (state.params.head, metrics["loss"])))
    (head, loss), (wide_head, wide_loss) = found
    assert loss[1] == wide_loss[1] == 72_000
    np.testing.assert_allclose(loss[0], wide_loss[0], rtol=0.02)
    for narrow, other in zip(head, wide_head, strict=True):
        np.testing.assert_allclose(narrow, other, rtol=0.05, atol=0.05)


def test_policies_meet_where_they_must(x64):
    oracle.assert_close(after("per_step", 1, 3), after("per_chunk", 1, 3), 1e-14)
    whole = after("per_chunk", 6, 6)
    oracle.assert_close(after("per_sequence", 6, 6), whole, 1e-13)
    # Where the window is the chunk, both norms are one.
    chunks = after("per_chunk", 2, 2)
    oracle.assert_close(after("per_chunk", 2, 2, norm="r2rt"), chunks, 1e-13)
    # And they are three different things elsewhere.
    frozen, online = after("per_sequence", 1, 2), after("per_step", 1, 2)
    for one, other in ((whole, chunks), (chunks, frozen), (frozen, online), (online, whole)):
        assert float(jnp.max(jnp.abs(one[0].cell.w_h - other[0].cell.w_h))) > 1e-3


def test_full_depth_is_ordinary_backpropagation(x64):
    params, carry, (batch,) = given("lstm", 6, 1)

    def loss(params):
        return jnp.mean(loss_fn(params.head, lstm(params.cell, batch["x"], carry)[1], batch["y"]))

    grads = jax.grad(loss)(params)
    want = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    oracle.assert_close(after("per_sequence", 6, 6)[0], want, 1e-13)


@pytest.mark.parametrize(("policy", "k1"), [("per_chunk", 2), ("per_sequence", 2), ("per_step", 1)])
def test_many_seeds_in_one_program(policy, k1, x64):
    each = [given("rnn", 4, 1, seed) for seed in range(3)]
    update = make_update(loss_fn, rnn, TX, k1, 2 * k1, policy)
    states = [init_state(params, TX, jax.random.key(0)) for params, _, _ in each]
    pairs = [((s, carry), batch) for s, (_, carry, (batch,)) in zip(states, each, strict=True)]
    together = jax.tree.map(lambda *a: jnp.stack(a), *pairs)
    got, alone = quick(jax.vmap(update))(*together)[0][0].params, quick(update)
    for row, (both, batch) in enumerate(pairs):
        want = alone(both, batch)[0][0].params
        oracle.assert_close(jax.tree.map(lambda a, row=row: a[row], got), want, 1e-13)


@pytest.mark.parametrize(("policy", "k1"), [("per_chunk", 2), ("per_sequence", 2), ("per_step", 1)])
def test_a_batch_split_over_devices_gives_the_same_update(policy, k1, x64):
    from jax.sharding import PartitionSpec as P

    params, carry, (batch,) = given("lstm", 4, 1)
    both = init_state(params, TX, jax.random.key(0)), carry
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:B]), ("d",))
    splits = (P(), P("d")), P(None, "d")
    split = make_update(loss_fn, lstm, TX, k1, 2 * k1, policy, axis_name="d")
    run = jax.shard_map(split, mesh=mesh, in_specs=splits, out_specs=(splits[0], P()))
    got, metrics = quick(run)(both, batch)
    want, alone = quick(make_update(loss_fn, lstm, TX, k1, 2 * k1, policy))(both, batch)
    oracle.assert_close((got[0].params, got[1]), (want[0].params, want[1]), 1e-13)
    oracle.assert_close(metrics["loss"], alone["loss"], 1e-13)


def test_what_does_not_fit_is_named():
    def build(*ks, policy="per_chunk", loss=loss_fn, tx=TX, layer=lstm, **options):
        return make_update(loss, layer, tx, *ks, policy, **options)

    for wrong, text in (
        ((0, 2), "k1: got 0, expected a whole number >= 1"),
        ((2, 2.0), "k2: got 2.0, expected a whole number >= 1"),
        ((2, 3), "k2: got 3, expected a multiple of k1 = 2"),
    ):
        with pytest.raises(ValueError, match=text):
            build(*wrong)
    with pytest.raises(ValueError, match="k1: got 2, expected 1 with policy 'per_step'"):
        build(2, 4, policy="per_step")
    with pytest.raises(ValueError, match="policy: got 'per_epoch', expected one of 'per_chunk', "):
        build(2, 2, policy="per_epoch")
    with pytest.raises(ValueError, match="norm: got 'sum', expected one of 'mean', 'r2rt'"):
        build(2, 2, norm="sum")
    with pytest.raises(ValueError, match="loss_fn: got 3, expected a function"):
        build(2, 2, loss=3)
    with pytest.raises(ValueError, match="layer: got None, expected a function"):
        build(2, 2, layer=None)
    with pytest.raises(ValueError, match="tx: got 0.1, expected an optax transformation"):
        build(2, 2, tx=0.1)

    params, carry, (batch,) = given("lstm", 5, 1)
    both = init_state(params, TX, jax.random.key(0)), carry
    with pytest.raises(
        ValueError, match=r"batch\['x'\]: got 5 steps, expected a multiple of k1 = 2"
    ):
        build(2, 4)(both, batch)
    with pytest.raises(ValueError, match=r"losses: got shape \[5\], expected \[5, 3\]"):
        build(5, 5, loss=lambda *args: jnp.mean(loss_fn(*args), 1))(both, batch)
