"""The variants of the LSTM against loops in NumPy, and where they are one another."""

import functools
import inspect
import pickle

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import variants_oracle as slow
from variants_problems import (
    CLIPS,
    LAYERS,
    OWN,
    STEPS,
    B,
    D,
    H,
    T,
    draw,
    expected,
    problem,
    random_params,
    run,
    values_and_gradients,
)

from lstmjax import (
    Bidirectional,
    LSTMParams,
    LSTMState,
    bidirectional,
    init_lstm,
    lstm,
    lstm_step,
    stack,
    variants,
)
from lstmjax.dropout import Noise
from lstmjax.variants import VARIANTS, FGRState

# ---- against the oracle -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_the_oracles(name, x64):
    arguments, weights, options = problem(name, True)
    layer = functools.partial(LAYERS[name], **options)
    got = values_and_gradients(layer, weights, *arguments)
    oracle.assert_close(got, expected(name, True), 1e-10)
    assert type(got[0][0]) is (FGRState if name == "fgr" else LSTMState)


@pytest.mark.parametrize("name", LAYERS)
def test_float32_without_extras_is_the_oracle_to_1e_5(name):
    short = lambda a: a.astype(np.float32)  # noqa: E731
    arguments, weights = jax.tree.map(short, problem(name, False)[:2])
    outputs, gradients = values_and_gradients(LAYERS[name], weights, *arguments)
    assert outputs[1].dtype == outputs[0].c.dtype == jnp.float32
    oracle.assert_close((outputs, gradients), expected(name, False), 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_problems_meet_their_clips_and_kinks(name):
    """Without this an option could do nothing and the tests above still pass."""
    (params, xs, state), _, options = problem(name, True)
    (_, c, *_), hs = slow.layer(name, params, xs, state, **options)
    for values, bound in ((c, 0.8), (hs, 0.4)):
        assert 0 < np.mean(np.abs(values) == bound) < 1
    for option in ("mask", "resets", "reset_to", "noise"):
        without = slow.layer(name, params, xs, state, **{**options, option: None})
        assert np.abs(without[1] - hs).max() > 0.01, option
    if name in ("keras1", "hard_sigmoid", "mixed"):
        (params, xs, state), _, _ = problem(name, False)
        z = xs @ params.w_x + params.b
        assert 0.02 < np.mean(np.abs(z) > 3.0) < 0.9


@pytest.mark.parametrize("name", ["nog", "refine", "fgr", "layer_norm"])
def test_unrolled_is_the_oracle(name, x64):
    arguments, _, options = problem(name, True)
    got = run(LAYERS[name], *arguments, **options, method="unrolled")
    oracle.assert_close(got, expected(name, True)[0], 1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_the_step_is_the_oracles_with_and_without_a_batch_axis(name, x64):
    (params, xs, state), _, options = problem(name, True)
    noise = options["noise"]

    def several(params, xs, state):
        row = type(state)(*(part[1] for part in state))
        of_row = {"x_mask": noise.x[:, 1], "h_mask": noise.h[:, 1]}
        whole = STEPS[name](params, state, xs[0], **CLIPS, x_mask=noise.x, h_mask=noise.h)
        return whole, STEPS[name](params, row, xs[0, 1], **CLIPS, **of_row)

    whole, row = run(several, params, xs, state)
    for b in range(B):
        masks = noise.x[:, b], noise.h[:, b]
        want = slow.step(name, params, [part[b] for part in state], xs[0, b], *masks, **CLIPS)
        oracle.assert_close(tuple(part[b] for part in whole), want, 1e-10)
    oracle.assert_close(row, tuple(part[1] for part in whole), 1e-12)


def signature(function):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters]


@pytest.mark.parametrize("name", OWN)
def test_signatures_are_the_lstms(name):
    assert signature(STEPS[name]) == signature(lstm_step)
    of_lstm = [p for p in signature(lstm) if p[0] != "residuals"]
    assert signature(VARIANTS[name].layer) == of_lstm
    assert signature(VARIANTS[name].init) == signature(init_lstm)
    for function in (STEPS[name], VARIANTS[name].layer, VARIANTS[name].init):
        assert function.__doc__ and function.__name__ != "step"


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_keeps_the_cell_state_in_float32(name):
    short = lambda a: a.astype(jnp.bfloat16)  # noqa: E731
    params, xs = jax.tree.map(short, problem(name, True)[0][:2])
    state, hs = jax.eval_shape(LAYERS[name], params, xs)
    assert state.h.dtype == hs.dtype == jnp.bfloat16
    assert {part.dtype for part in state[1:]} == {jnp.dtype(jnp.float32)}


# ---- limits in which a variant is another one ---------------------------------------------------


def blocks_of(params, *order):
    """LSTM weights whose blocks are those of ``params``, −1 times them, or closed with b = 50.

    ``order`` has one entry for each of i, f, g, o: (block, sign), or None for a gate that is 1.
    Peepholes likewise; those of g are skipped.
    """
    count = params.b.shape[0] // H
    pieces = [np.split(w, count, axis=-1) for w in params[:3]]
    nothing = [np.zeros_like(p[0]) for p in pieces[:2]] + [np.full(H, 50.0)]
    picked = [
        nothing if one is None else [one[1] * p[one[0]] for p in pieces] for one in order
    ]  # fmt: skip
    return [np.concatenate(parts, axis=-1) for parts in zip(*picked, strict=True)]


def as_lstm(name, params):
    """``params`` of the LSTM that is the same function."""
    zero, rows = np.zeros(H), params.peephole
    order, peephole = {
        "cifg": (((0, 1), (0, -1), (1, 1), (2, 1)), (rows[0], -rows[0], rows[1])),
        "nig": ((None, (0, 1), (1, 1), (2, 1)), (zero, rows[0], rows[1])),
        "nfg": (((0, 1), None, (1, 1), (2, 1)), (rows[0], zero, rows[1])),
        "nog": (((0, 1), (1, 1), (2, 1), None), (rows[0], rows[1], zero)),
    }[name]
    return LSTMParams(*blocks_of(params, *order), np.stack(peephole), params.w_proj)


@pytest.mark.parametrize("name", ["cifg", "nig", "nfg", "nog"])
def test_a_gate_less_is_the_lstm_with_that_gate_tied_or_open(name, x64):
    """σ(50) is 1 to 2e-22, and σ(−z) = 1 − σ(z)."""
    (params, xs, state), _, _ = problem(name, True)
    ours = run(LAYERS[name], params, xs, state, **CLIPS)
    oracle.assert_close(ours, run(lstm, as_lstm(name, params), xs, state, **CLIPS), 1e-12)


def test_full_gate_recurrence_without_its_matrices_is_the_lstm(x64):
    (params, xs, state), _, _ = problem("fgr", True)
    params = params._replace(w_gates=0 * params.w_gates)
    (h, c, *_), hs = run(variants.fgr, params, xs, state, **CLIPS)
    plain = run(lstm, LSTMParams(*params[:5]), xs, LSTMState(*state[:2]), **CLIPS)
    oracle.assert_close(((h, c), hs), plain, 1e-12)


def test_a_half_open_refine_gate_leaves_the_forget_gate_alone(x64):
    """r = 1/2: c = f c + (1 − f) g, which is cifg with i = 1 − f = σ(−z_f)."""
    (params, xs, state), _, _ = problem("refine", True)
    w_x, w_h, b = (np.where(np.arange(4 * H) < H, 0.0, w) for w in params[:3])
    peephole = params.peephole * np.array([0.0, 1.0, 1.0])[:, None]
    refine = LSTMParams(w_x, w_h, b, peephole, params.w_proj)
    signs = np.repeat([-1.0, 1.0, 1.0], H)
    coupled = LSTMParams(
        *(w[..., H:] * signs for w in refine[:3]),
        peephole[1:] * np.array([[-1.0], [1.0]]),
        params.w_proj,
    )
    ours = run(variants.refine, refine, xs, state, **CLIPS)
    oracle.assert_close(ours, run(variants.cifg, coupled, xs, state, **CLIPS), 1e-12)


@pytest.mark.parametrize(("bias", "power"), [(50.0, 1), (-50.0, 2)])
def test_the_refine_gate_spans_f_squared_to_its_mirror(bias, power, x64):
    """c' with g = 0: F c, where F = 1 − (1 − f)² for r = 1, and f² for r = 0."""
    (params, xs, state), _, _ = problem("refine", False)
    blocks = np.repeat([0, 1, 0, 1], H)
    b = np.where(np.arange(4 * H) < H, bias, params.b * blocks)
    params = LSTMParams(params.w_x * blocks, params.w_h * blocks, b)
    f = oracle.sigmoid(xs[0] @ params.w_x + state.h @ params.w_h + b)[:, H : 2 * H]
    kept = 1 - (1 - f) ** 2 if power == 1 else f**2
    oracle.assert_close(run(variants.refine_step, params, state, xs[0]).c, kept * state.c, 1e-12)


def test_layer_normalisation_does_not_see_a_common_shift_nor_the_scale(x64):
    (params, xs, state), _, _ = problem("layer_norm", False)
    rng = np.random.default_rng(91)
    plain = variants.layer_norm(params, xs, state)
    shifted = params._replace(w_h=params.w_h + rng.normal(size=(H, 1)))
    oracle.assert_close(variants.layer_norm(shifted, xs, state), plain, 1e-12)
    # The scale is seen through ε = 1e-5 alone, which is small beside a variance of 1e12.
    big, bigger = (params._replace(w_x=s * params.w_x, w_h=s * params.w_h) for s in (1e6, 3e6))
    big, bigger = (variants.layer_norm(p, xs, state) for p in (big, bigger))
    oracle.assert_close(big, bigger, 1e-10)


def test_activations_of_one_name_are_one_layer_compiled_once():
    assert variants.activations("hard_sigmoid") is variants.activations(gate="hard_sigmoid")
    assert variants.activations("hard_sigmoid") is VARIANTS["hard_sigmoid"].layer
    assert variants.activations(gate=jax.nn.hard_sigmoid) is VARIANTS["hard_sigmoid"].layer
    assert variants.activations(candidate="linear") is variants.niaf
    assert variants.activations(output="linear") is variants.noaf
    compilations = []

    def listen(event, seconds, **_):
        compilations.append(event) if "backend_compile" in event else None

    params = draw(init_lstm, jax.random.key(0), init="haiku")
    xs = np.ones((T, B, D), np.float32)
    variants.activations(candidate="relu")(params, xs)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        variants.activations(candidate="relu")(params, 2 * xs)
        assert not compilations
        variants.activations(candidate="hard_sigmoid")(params, xs)
        assert compilations  # the count works
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_default_activations_are_the_lstm(x64):
    rng = np.random.default_rng(92)
    params, xs, state = random_params(rng, "lstm", False), rng.normal(size=(T, B, D)), None
    got = variants.activations()(params, xs, state)
    oracle.assert_close(got, lstm(params, xs, state), 1e-12)


# ---- inside larger layers, and under transformations --------------------------------------------


@pytest.mark.parametrize("name", ["nog", "fgr"])
def test_a_stack_of_both_directions_is_its_layers_by_hand(name, x64):
    rng = np.random.default_rng(93)
    layer = VARIANTS[name].layer
    params = [random_params(rng, name, False) for _ in range(4)]
    gates = params[0].b.shape[0] // H
    wide = [p._replace(w_x=rng.normal(size=(2 * H, gates * H))) for p in params[2:]]
    params = params[:2] + wide
    pairs = [Bidirectional(*params[:2]), Bidirectional(*params[2:])]
    xs, lengths = rng.normal(size=(T, B, D)), np.array([3, T, 0])
    noises = [Noise(h=rng.uniform(0.3, 1.7, size=(gates, B, H))) for _ in range(4)]
    noise = [Bidirectional(*noises[:2]), Bidirectional(*noises[2:])]

    def by_hand(params, xs):
        below, finals = xs, []
        for n in (0, 2):
            halves = []
            for m in (n, n + 1):
                options = {"lengths": lengths, "noise": noises[m], "reverse": m > n}
                final, half = layer(params[m], below, **options)
                halves.append(half)
                finals.append(final)
            below = jnp.concatenate(halves, -1)
        return (tuple(finals[:2]), tuple(finals[2:])), below

    both = functools.partial(bidirectional, layer)
    ours = run(functools.partial(stack, both), pairs, xs, lengths=lengths, noise=noise)
    oracle.assert_close(ours, run(by_hand, params, xs), 1e-12)


def test_a_variant_can_be_pickled():
    for found in (variants.cifg, variants.cifg_step, variants.init_cifg):
        assert pickle.loads(pickle.dumps(found)) is found


@pytest.mark.parametrize("name", ["fgr"])
def test_vmap_over_weights_is_a_loop(name, x64):
    arguments, weights, _ = problem(name, False)
    rng = np.random.default_rng(94)
    several = [random_params(rng, name, False) for _ in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *several)

    def loss_and_gradient(params):
        def loss(params):
            return oracle.weighted_sum(weights, LAYERS[name](params, *arguments[1:]))

        return jax.value_and_grad(loss)(params)

    together = run(jax.vmap(loss_and_gradient), stacked)
    for n, params in enumerate(several):
        one = jax.tree.map(lambda leaf, n=n: leaf[n], together)
        oracle.assert_close(one, run(loss_and_gradient, params), 1e-12)
