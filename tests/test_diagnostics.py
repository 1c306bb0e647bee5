"""diagnostics.py and gates.py against NumPy: complex steps, eigvals, gates by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import variants_oracle
from oracle import assert_close, sigmoid
from problems import QUICK
from variants_problems import B, D, H, P, T, random_params, random_state

from lstmjax import (
    GRUParams,
    GRUState,
    LSTMState,
    RNNParams,
    RNNState,
    diagnostics,
    init_lstm,
    models,
)
from lstmjax.diagnostics import (
    STEPS,
    CellPath,
    cell_path,
    clip_report,
    gate_saturation,
    gates,
    gradient_norms,
    jacobian_radius,
    memory_half_life,
    spectral_radius,
    states_of,
)

CELLS = ["lstm", "projected", "rnn", "linear_rnn", "gru"]
CLIPS = {"cell_clip": 0.9, "proj_clip": 0.7}


def run(function, *arguments):
    return jax.jit(function, compiler_options=QUICK)(*arguments)


def problem(name):
    """(step, the oracle's step of one row, params, state, xs)."""
    rng = np.random.default_rng(7)
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    xs = normal(T, B, D)
    if name in ("lstm", "projected"):
        everything = name == "projected"
        params = random_params(rng, "lstm", everything)
        clips = CLIPS if everything else {}
        step, slow = partial(STEPS["lstm"], **clips), partial(oracle.lstm_step, **clips)
        return step, slow, params, random_state(rng, "lstm", P if everything else H), xs
    if name == "gru":
        params = GRUParams(normal(D, 3 * H), normal(H, 3 * H), normal(3 * H), normal(H))
        return STEPS["gru"], oracle.gru_step, params, GRUState(normal(B, H)), xs
    params = RNNParams(normal(D, H), normal(H, H), normal(H) if name == "rnn" else None)
    kind = "tanh" if name == "rnn" else "linear"
    slow = partial(oracle.rnn_step, activation=kind)
    return STEPS[name], slow, params, RNNState(normal(B, H)), xs


def slow_step(slow, params, x_t, state):
    """The oracle's step on a batch: a tuple of [B, ·] to a tuple of [B, ·]."""
    rows = [slow(params, x_t[b], *(part[b] for part in state)) for b in range(len(x_t))]
    return tuple(np.stack(parts) for parts in zip(*rows, strict=True))


def slow_states(slow, params, state, xs):
    found = [tuple(state)]
    for x_t in xs:
        found.append(slow_step(slow, params, x_t, found[-1]))
    return found


def slow_adjoints(slow, params, states, xs, loss, t):
    """By lag, the gradient of ``loss(state after step t)`` in the state k steps before."""

    def gradient(k):
        def from_there(state):
            for x_t in xs[t - k + 1 : t + 1]:
                state = slow_step(slow, params, x_t, state)
            return loss(state)

        return oracle.gradients(from_there, states[t + 1 - k])[0]

    return [gradient(k) for k in range(t + 1)]


def mean_norms(adjoints):
    """[K] for each field of the state."""
    return [np.array([np.mean(np.linalg.norm(a, axis=-1)) for a in f]) for f in zip(*adjoints)]  # noqa: B905


@pytest.mark.parametrize("name", CELLS)
def test_states_and_gradient_norms(name, x64):
    step, slow, params, state, xs = problem(name)
    wanted = slow_states(slow, params, state, xs)
    assert_close(tuple(run(partial(states_of, step), params, state, xs)),
                 tuple(map(np.stack, zip(*wanted, strict=True))), 1e-12)  # fmt: skip
    weights = np.random.default_rng(8).normal(size=state.h.shape)

    def loss(h):  # [B]
        return jnp.sum(weights * h**2, axis=-1)

    def slow_loss(state):
        return np.sum(weights * state[0] ** 2)

    got = run(lambda *a: gradient_norms(step, *a, loss), params, state, xs)
    norms = mean_norms(slow_adjoints(slow, params, wanted, xs, slow_loss, T - 1))
    assert set(got) == set(state._fields)  # jit sorts the names
    assert_close(tuple(got[field] for field in state._fields), tuple(norms), 1e-11)
    if "c" in got:
        assert got["c"][0] == 0 and got["c"][1] > 0

    # The errors of several steps, each with its own lags; and a gradient in place of a loss.
    ats = (T - 1, 1, 3)
    several = run(lambda *a: gradient_norms(step, *a, weights, at=ats), params, state, xs)

    def linear(state):
        return np.sum(weights * state[0])

    found = [mean_norms(slow_adjoints(slow, params, wanted, xs, linear, t)) for t in ats]
    for field, name in enumerate(state._fields):
        for k in range(T):
            assert_close(
                several[name][k], np.mean([f[field][k] for f in found if len(f[field]) > k]), 1e-11
            )
    one = run(lambda *a: gradient_norms(step, *a, weights, at=2), params, state, xs)
    only = mean_norms(slow_adjoints(slow, params, wanted, xs, linear, 2))
    assert_close(tuple(one[field] for field in state._fields), tuple(only), 1e-11)


def test_norms_of_powers(x64):
    """A linear RNN whose kernel is a rotation of radius r: r^k exactly, under vmap and jit."""
    angle = np.array([[np.cos(0.3), np.sin(0.3)], [-np.sin(0.3), np.cos(0.3)]])
    radii = np.array([0.9, 1.0, 1.1])
    xs, start = np.ones((60, 3, 2)), RNNState(np.zeros((3, 2)))
    loss = np.array([[3.0, 4.0], [0.0, 5.0], [5.0, 0.0]])  # norm 5 each

    def norms(radius):
        params = RNNParams(jnp.eye(2), radius * angle)
        found = gradient_norms(STEPS["linear_rnn"], params, start, xs, loss)
        states = states_of(STEPS["linear_rnn"], params, start, xs)
        return found["h"], jacobian_radius(STEPS["linear_rnn"], params, states, xs)

    got, radius = run(jax.vmap(norms), radii)
    np.testing.assert_allclose(got, 5 * radii[:, None] ** np.arange(60), rtol=1e-12)
    np.testing.assert_allclose(
        radius, np.broadcast_to(radii[:, None, None], (3, 60, 3)), rtol=1e-12
    )


def test_norms_neither_underflow_nor_overflow():
    """float32, whose squares end at 1e-38 and 1e38."""
    params = RNNParams(jnp.zeros((1, 2)), jnp.diag(jnp.array([0.1, 0.1])))
    xs, start = jnp.zeros((36, 1, 1)), RNNState(jnp.zeros((1, 2)))
    tiny = gradient_norms(STEPS["linear_rnn"], params, start, xs, jnp.array([[3.0, 4.0]]))["h"]
    np.testing.assert_allclose(np.asarray(tiny, float), 5 * 0.1 ** np.arange(36.0), rtol=1e-5)
    huge = gradient_norms(STEPS["linear_rnn"], params, start, xs, jnp.full((1, 2), 5e37))["h"]
    np.testing.assert_allclose(huge[0], 5e37 * 2**0.5, rtol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_radius_is_that_of_eigvals(name, x64):
    step, slow, params, state, xs = problem(name)
    states = slow_states(slow, params, state, xs)
    stacked = type(state)(*map(np.stack, zip(*states, strict=True)))
    got = run(partial(jacobian_radius, step), params, stacked, xs)
    assert got.shape == (T, B)
    for t in range(T):
        for b in range(B):
            row = tuple(part[b : b + 1] for part in states[t])
            flat = np.concatenate(row, axis=1)[0].astype(complex)
            columns = []
            for n in range(len(flat)):
                moved = flat.copy()
                moved[n] += 1j * oracle.COMPLEX_STEP
                parts = np.split(moved[None], np.cumsum([p.shape[1] for p in row])[:-1], axis=1)
                new = np.concatenate(slow_step(slow, params, xs[t, b : b + 1], parts), axis=1)[0]
                columns.append(new.imag / oracle.COMPLEX_STEP)
            wanted = np.max(np.abs(np.linalg.eigvals(np.stack(columns, axis=1))))
            np.testing.assert_allclose(got[t, b], wanted, rtol=1e-10)


def test_radius_of_matrices(x64):
    rng = np.random.default_rng(9)
    many = rng.normal(size=(5, 2, 6, 6))
    wanted = np.max(np.abs(np.linalg.eigvals(many)), axis=-1)
    np.testing.assert_allclose(run(spectral_radius, many), wanted, rtol=1e-11)
    in32 = run(spectral_radius, many.astype(np.float32))
    assert in32.dtype == jnp.float32
    np.testing.assert_allclose(in32, wanted, rtol=1e-5)
    # Far from normal: the norm of the first powers is 1e4 times the radius.
    skew = np.array([[0.5, 1e4], [0.0, 0.25]])
    jordan = np.array([[0.5, 1.0], [0.0, 0.5]])
    nilpotent = np.array([[0.0, 1e3], [0.0, 0.0]])
    tiny, huge = np.diag([1e-200, -1e-220]), np.array([[0.0, 1e200], [1e180, 0.0]])
    special = np.stack([skew, jordan, nilpotent, np.zeros((2, 2)), tiny, huge])
    wanted = [0.5, 0.5, 0.0, 0.0, 1e-200, 1e190]
    np.testing.assert_allclose(run(spectral_radius, special), wanted, rtol=1e-11)
    assert np.isnan(spectral_radius(jnp.full((2, 2), np.nan)))


@pytest.mark.parametrize("name", ["lstm", "projected", "fgr", "cifg"])
def test_cell_path(name, x64):
    rng = np.random.default_rng(11)
    if name in ("fgr", "cifg"):  # fgr: gates that feed back beside h; all with peepholes

        def slow(params, x_t, *state):
            ones = np.ones((4, max(D, P)))
            return variants_oracle.step(name, params, state, x_t, ones[:, :D], ones[:, :P])

        step, params, state = (
            STEPS[name],
            random_params(rng, name, True),
            random_state(rng, name, P),
        )
        xs = rng.normal(size=(T, B, D))
    else:
        step, slow, params, state, xs = problem(name)
    states = slow_states(slow, params, state, xs)
    of_h, of_c = rng.normal(size=state.h.shape), rng.normal(size=state.c.shape)
    none = type(state)(*map(np.zeros_like, state))

    def along_c(t, h_too):  # ∂(h or c after step t)/∂c before it, everything else held
        moved = [part.astype(complex) for part in states[t]]
        found = np.zeros((B, states[0][0].shape[1] if h_too else H, H))
        for k in range(H):
            moved[1][:, k] += 1j * oracle.COMPLEX_STEP
            new = slow_step(slow, params, xs[t], moved)
            found[:, :, k] = new[0 if h_too else 1].imag / oracle.COMPLEX_STEP
            moved[1][:, k] -= 1j * oracle.COMPLEX_STEP
        return found

    for loss in (none._replace(c=of_c), none._replace(h=of_h, c=of_c), of_h):
        path = run(lambda loss: cell_path(step, params, state, xs, loss), loss)
        given = loss if isinstance(loss, tuple) else none._replace(h=of_h)

        def slow_loss(state, given=given):
            return oracle.weighted_sum(tuple(given), tuple(state))

        total = [a[1] for a in slow_adjoints(slow, params, states, xs, slow_loss, T - 1)]
        direct = [given.c]
        for k in range(1, T):
            before = np.einsum("bn,bnk->bk", direct[-1], along_c(T - k, False))
            if k == 1:
                before += np.einsum("bn,bnk->bk", given.h, along_c(T - 1, True))
            direct.append(before)
        wanted = CellPath(np.stack(direct), np.stack(total) - np.stack(direct), np.stack(total))
        assert_close(tuple(path), tuple(wanted), 1e-11)
        # The two summands are computed apart from the whole.
        np.testing.assert_allclose(path.direct + path.rest, path.total, rtol=1e-11, atol=1e-14)
        assert np.max(np.abs(path.rest[2:])) > 1e-3
    if name == "lstm":  # the product of the forget gates, and nothing else
        stacked = LSTMState(*map(np.stack, zip(*states, strict=True)))
        f = np.asarray(gates("lstm", params, stacked, xs)["f"])
        path = cell_path(step, params, state, xs, none._replace(c=of_c))
        products = [of_c * np.prod(f[T - k :], axis=0) for k in range(T)]
        np.testing.assert_allclose(path.direct, np.stack(products), rtol=1e-13)


# ---- gates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in diagnostics.GATED if name != "gru"])
def test_gates(name, x64, monkeypatch):
    rng = np.random.default_rng(12)
    params, xs = random_params(rng, name, True), rng.normal(size=(T, B, D))
    state = random_state(rng, name, P)
    states = run(partial(states_of, STEPS[name]), params, state, xs)
    got = run(partial(gates, name), params, states, xs)

    functions = variants_oracle.FUNCTIONS.get(name, (sigmoid, np.tanh, np.tanh))
    seen = []

    def noted(x):
        seen.append(functions[0](x))
        return seen[-1]

    monkeypatch.setitem(variants_oracle.FUNCTIONS, name, (noted, *functions[1:]))
    blocks = variants_oracle.BLOCKS.get(name, "ifgo")
    inner = [gate for gate in ("i", "f", "r") if gate in blocks]
    ones = np.ones((4, max(D, P)))
    for t in range(T):
        for b in range(B):
            seen.clear()
            row = [np.asarray(part[t, b]) for part in states]
            new = variants_oracle.step(name, params, row, xs[t, b], ones[:, :D], ones[:, :P])
            assert_close(tuple(part[t + 1, b] for part in states), tuple(new), 1e-12)
            cut = len(inner) * H
            wanted = {gate: np.array(seen[n : cut : len(inner)]) for n, gate in enumerate(inner)}
            wanted |= {"o": np.array(seen[cut:])} if "o" in blocks else {}
            if name == "cifg":
                wanted["f"] = 1 - wanted["i"]
            if name == "refine":
                f, r = wanted["f"], wanted["r"]
                wanted["f"] = f + f * (1 - f) * (2 * r - 1)
            assert set(got) == set(wanted)
            for gate, of_gate in wanted.items():
                np.testing.assert_allclose(got[gate][t, b], of_gate, rtol=1e-11, atol=1e-13)


def test_gates_of_the_gru(x64):
    step, slow, params, state, xs = problem("gru")
    states = GRUState(np.stack([h for (h,) in slow_states(slow, params, state, xs)]))
    got = run(partial(gates, "gru"), params, states, xs)
    z = xs @ params.w_x[:, : 2 * H] + states.h[:-1] @ params.w_h[:, : 2 * H] + params.b[: 2 * H]
    assert_close((got["r"], got["z"]), (sigmoid(z)[..., :H], sigmoid(z)[..., H:]), 1e-12)


@pytest.mark.parametrize(
    ("cell", "other", "message"),
    [
        ("gru", {}, "params: got LSTMParams, expected GRUParams with cell 'gru'"),
        ("fgr", {}, "params: got LSTMParams, expected FGRParams with cell 'fgr'"),
        ("lstm", {"states": GRUState}, "states: got GRUState, expected LSTMState with cell 'lstm'"),
        ("lstm", {"states": tuple}, "states: got tuple, expected a state of [T+1, B, H] arrays"),
    ],
)
def test_weights_and_states_of_another_cell_have_no_gates(cell, other, message):
    params = init_lstm(jax.random.key(0), D, H)
    h = jnp.zeros((T + 1, B, H))
    make = other.get("states")
    states = (h, h) if make is tuple else GRUState(h) if make else LSTMState(h, h)
    with pytest.raises(ValueError) as error:
        gates(cell, params, states, jnp.zeros((T, B, D)))
    assert str(error.value) == message
    if make is tuple:
        with pytest.raises(ValueError, match="^states: got tuple, expected a state of"):
            diagnostics.jacobian_radius(STEPS["lstm"], params, states, jnp.zeros((T, B, D)))


def test_every_cell_has_a_step_and_gates_where_it_has_gates():
    assert set(STEPS) == set(models.CELLS)
    assert set(models.CELLS) - set(diagnostics.GATED) == {"rnn", "linear_rnn"}


def test_saturation_and_half_life(x64):
    rng = np.random.default_rng(13)
    f = rng.uniform(size=(7, 5, 4)) ** np.array([0.2, 1.0, 4.0, 1.5])
    got = run(gate_saturation, {"f": f, "o": f[::-1] / 2})
    assert_close(tuple(got["f"]), (np.mean(f < 0.1, (0, 1)), np.mean(f > 0.9, (0, 1))), 1e-15)
    assert_close(tuple(got["o"]), (np.mean(f < 0.2, (0, 1)), np.zeros(4)), 1e-15)
    assert np.ptp(got["f"].left) > 0.2 and np.ptp(got["f"].right) > 0.2
    wanted = -np.log(2) / np.mean(np.log(f), axis=(0, 1))
    np.testing.assert_allclose(run(memory_half_life, f), wanted, rtol=1e-13)
    # By its definition: that many equal gates multiply to 1/2.
    n = memory_half_life(jnp.array([[0.3, 0.99]]))
    np.testing.assert_allclose(np.array([0.3, 0.99]) ** np.asarray(n), 0.5, rtol=1e-13)
    edges = memory_half_life(jnp.array([[1.0, 0.0, 1.0], [1.0, 0.5, 0.25]]))
    np.testing.assert_array_equal(edges, [np.inf, 0.0, 1.0])


def test_clip_report():
    rng = np.random.default_rng(14)
    grads = {"a": rng.normal(size=(3, 2)), "b": [rng.normal(size=4), rng.normal()]}
    grads = jax.tree.map(lambda a: np.asarray(a, np.float32), grads)
    for max_norm in (0.5, 50.0):
        clipped, _ = optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())
        before, after, changed = run(partial(clip_report, max_norm=max_norm), grads)
        np.testing.assert_allclose(before, optax.tree.norm(grads), rtol=1e-6)
        np.testing.assert_allclose(after, optax.tree.norm(clipped), rtol=1e-6)
        assert bool(changed) == (max_norm == 0.5)
    assert clip_report(grads, None).after == clip_report(grads, None).before
    large = clip_report({"a": jnp.full(4, 2e30)}, 1.0)  # optax squares it to infinity
    np.testing.assert_allclose(large.before, 4e30, rtol=1e-6)
    assert large.after == 1.0 and large.clipped
    for bad in (np.nan, np.inf):
        assert clip_report({"a": jnp.array([1.0, bad])}, 1.0).clipped


def test_bad_arguments_are_named():
    step, _, params, state, xs = problem("lstm")
    params, state, xs = jax.tree.map(jnp.float32, (params, state, xs))
    good = np.ones((B, H), np.float32)
    norms, path = partial(gradient_norms, step, params), partial(cell_path, step, params)
    rnn = problem("rnn")
    cases = [
        (lambda: states_of(3, params, state, xs), "step: got 3"),
        (lambda: states_of(step, params, tuple(state), xs), "state: got tuple"),
        (lambda: states_of(step, params, state, xs[0]), "xs: got shape"),
        (lambda: norms(state, xs, good[:, :2]), "loss: got shape"),
        (lambda: norms(state, xs, jnp.sum), "loss: got values of shape []"),
        (lambda: norms(state, xs, LSTMState(good, good[:1])), "loss.c: got shape"),
        (lambda: norms(state, xs[:0], good), "xs: got no steps"),
        (lambda: norms(state, xs, good, at=T), f"at: got {T}, expected"),
        (lambda: norms(state, xs, good, at=-1), "at: got -1"),
        (lambda: norms(state, xs, good, at=()), "at: got ()"),
        (lambda: norms(state, xs, good, at=1.0), "at: got 1.0"),
        (lambda: path(state, xs[:0], good), "xs: got no steps"),
        (lambda: cell_path(rnn[0], *jax.tree.map(jnp.float32, rnn[2:]), good), "state: got RNN"),
        (lambda: jacobian_radius(step, params, state, xs), "states.h: got shape"),
        (lambda: gates("rnn", params, state, xs), "cell: got 'rnn'"),
        (lambda: gates("lstm", params, state, xs), "states.h: got shape"),
        (lambda: clip_report({"a": good}, 0), "max_norm: got 0"),
        (lambda: clip_report({}, 1.0), "grads: got no arrays"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError) as raised:
            call()
        assert str(raised.value).startswith(message), str(raised.value)


@pytest.mark.parametrize("f", ["x", 1, 0.5, [1, 2]])
def test_a_half_life_is_that_of_gates(f):
    with pytest.raises(ValueError, match="^f: got"):
        diagnostics.memory_half_life(f)
