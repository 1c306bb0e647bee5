"""The variants of the LSTM against loops in NumPy, their limits, and their initial laws."""

import functools
import inspect

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import variants_oracle as slow

from lstmjax import (
    Bidirectional,
    LSTMParams,
    LSTMState,
    bidirectional,
    gru,
    init_gru,
    init_lstm,
    lstm,
    lstm_step,
    stack,
    variants,
)
from lstmjax.dropout import Noise
from lstmjax.initializers import chrono, uniform_gate
from lstmjax.variants import VARIANTS, FGRParams, FGRState, LayerNormParams, LearnedState

T, B, D, H, P = 5, 3, 3, 4, 2
OWN = [name for name in VARIANTS if name not in ("lstm", "peephole")]
CLIPS = {"cell_clip": 0.8, "proj_clip": 0.4}
MIXED = {"gate": "hard_sigmoid", "candidate": "relu", "output": "linear"}
LAYERS = {name: VARIANTS[name].layer for name in OWN} | {"mixed": variants.activations(**MIXED)}
STEPS = {name: getattr(variants, f"{name}_step", None) for name in OWN} | {
    "hard_sigmoid": variants.activations_step("hard_sigmoid"),
    "keras1": variants.activations_step("hard_sigmoid_keras1"),
    "mixed": variants.activations_step(**MIXED),
}


# Compiling takes nearly all the time here, and running none.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def run(function, *arguments, **options):
    """``function`` as one program."""
    return jax.jit(functools.partial(function, **options), compiler_options=QUICK)(*arguments)


def values_and_gradients(layer, weights, *arguments):
    """A layer's outputs, and the gradients of Σ weights·outputs in all ``arguments``."""

    def loss(*arguments):
        outputs = layer(*arguments)
        return oracle.weighted_sum(weights, outputs), outputs

    differentiated = jax.value_and_grad(loss, tuple(range(len(arguments))), has_aux=True)
    (_, outputs), gradients = run(differentiated, *arguments)
    return outputs, gradients


def random_params(rng, name, everything):
    gates = len(slow.BLOCKS.get(name, "ifgo"))
    rows, proj = len(slow.PEEPHOLES.get(name, "ifo")), P if everything else H
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    extras = (normal(rows, H), normal(H, P)) if everything else (None, None)
    params = normal(D, gates * H), normal(proj, gates * H), normal(gates * H), *extras
    if name == "fgr":
        return FGRParams(*params, normal(3 * H, 3 * H))
    if name == "layer_norm":
        return LayerNormParams(*params, normal(4 * H), normal(4 * H), normal(H), normal(H))
    return LSTMParams(*params)


def random_state(rng, name, proj):
    kind = FGRState if name == "fgr" else LSTMState
    return kind(rng.normal(size=(B, proj)), *rng.normal(size=(len(kind._fields) - 1, B, H)))


@functools.cache
def problem(name, everything):
    """(params, xs, state), weights of a loss on all outputs, and options.

    Everything: peepholes, projection, both clips, a mask with holes, resets to a state, backwards,
    masks of noise (any numbers, not only 0 and 1/(1 − rate)) and zoneout.
    """
    rng = np.random.default_rng(90)
    proj = P if everything else H
    params, xs = random_params(rng, name, everything), rng.normal(size=(T, B, D))
    state, final, reset_to = (random_state(rng, name, proj) for _ in range(3))
    weights = (final, rng.normal(size=(T, B, proj)))
    if not everything:
        return (params, xs, state), weights, {}
    gates = len(slow.BLOCKS.get(name, "ifgo"))
    masks = (rng.uniform(0.3, 1.7, size=(n, B, w)) for n, w in ((gates, D), (gates, P), (T, P)))
    noise = Noise(*masks, *(rng.random((T, B, w)) < 0.3 for w in (P, H)))
    over_time = {
        "mask": np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).T,
        "resets": np.array([[0, 0, 1, 1, 0], [1, 0, 0, 0, 1], [0, 1, 0, 0, 0]]).T,
    }
    options = {**CLIPS, **over_time, "reset_to": reset_to, "reverse": True, "noise": noise}
    return (params, xs, state), weights, options


@functools.cache
def expected(name, everything):
    """The oracle's outputs, and the gradients of Σ weights·outputs in (params, xs, state)."""
    arguments, weights, options = problem(name, everything)

    def loss(*arguments):
        return oracle.weighted_sum(weights, slow.layer(name, *arguments, **options))

    outputs = slow.layer(name, *arguments, **options)
    return outputs, oracle.gradients(loss, *arguments)


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
    assert signature(VARIANTS[name].layer) == signature(lstm)
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


def draw(init_cell, key, inputs=D, hidden=H, **options):
    return run(lambda key: init_cell(key, inputs, hidden, **options), key)


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


# ---- initial laws -------------------------------------------------------------------------------

FORGETS = {  # what each block's bias is of the forget bias
    "cifg": (-1, 0, 0),
    "nig": (1, 0, 0),
    "nfg": (0, 0, 0),
    "nog": (0, 1, 0),
    "refine": (-1, 1, 0, 0),
    "fgr": (0, 1, 0, 0),
    "layer_norm": (0, 1, 0, 0),
}
DRAWN = list(FORGETS)


def test_cells_of_four_plain_gates_are_drawn_as_the_lstm():
    for name in ("lstm", "niaf", "noaf", "hard_sigmoid", "keras1"):
        assert VARIANTS[name].init is init_lstm
    peephole, plain = (
        draw(init, jax.random.key(1), init="tf1")
        for init in (VARIANTS["peephole"].init, functools.partial(init_lstm, peephole=True))
    )
    oracle.assert_close(peephole, plain, 0)


@pytest.mark.parametrize("name", DRAWN)
def test_initial_biases_and_kernels(name):
    init = VARIANTS[name].init
    of_blocks = np.array(FORGETS[name])
    given = {
        "lstmjax": {},
        "flax": {"init": "flax", "peephole": True, "proj_size": 2},
        "tf1": {"init": "tf1", "forget_bias": 2.5, "dtype": "bfloat16", "proj_size": 2},
    }

    def several(key):
        plain = init_lstm(key, D, H, **given["tf1"])
        return {law: init(key, D, H, **options) for law, options in given.items()}, plain

    drawn, plain = run(several, jax.random.key(1))
    for law, bias in (("lstmjax", 1.0), ("flax", 0.0), ("tf1", 2.5)):
        assert type(drawn[law]) is VARIANTS[name].params
        np.testing.assert_array_equal(drawn[law].b, np.repeat(of_blocks * bias, H))
    for block in np.split(np.asarray(drawn["lstmjax"].w_h), len(of_blocks), axis=1):
        np.testing.assert_allclose(block.T @ block, np.eye(H), atol=1e-5)
    for block in np.split(np.asarray(drawn["flax"].w_h), len(of_blocks), axis=1):
        np.testing.assert_allclose(block @ block.T, np.eye(2), atol=1e-5)
    rows = len(slow.PEEPHOLES.get(name, "ifo"))
    assert drawn["flax"].peephole.shape == (rows, H) and drawn["flax"].w_proj.shape == (H, 2)
    assert drawn["lstmjax"].peephole is None and drawn["lstmjax"].w_proj is None
    assert {w.dtype.name for w in drawn["tf1"] if w is not None} == {"bfloat16"}
    if name in ("fgr", "layer_norm"):
        oracle.assert_close(tuple(np.float64(w) for w in drawn["tf1"][:3]), plain[:3], 0)


@pytest.mark.parametrize("name", DRAWN)
def test_laws_of_the_forget_bias(name):
    """chrono: exp(b_f) ~ U(1, 99), b_i = −b_f. uniform_gate: σ(b_f) ~ U(1/H, 1 − 1/H)."""
    hidden = 400
    laws = {
        chrono(100): lambda b: (np.exp(b) - 1) / 98,
        uniform_gate: lambda b: (oracle.sigmoid(b) * hidden - 1) / (hidden - 2),
    }

    def several(key):
        options = {"init": "haiku"}  # no orthogonal matrix of 400 × 400
        return [VARIANTS[name].init(key, 1, hidden, forget_bias=law, **options).b for law in laws]

    for b, uniform in zip(run(several, jax.random.key(2)), laws.values(), strict=True):
        b = np.asarray(b, np.float64).reshape(-1, hidden)
        blocks = {"refine": "rfgo"}.get(name) or slow.BLOCKS.get(name, "ifgo")
        forget = b[blocks.index("f")] if "f" in blocks else -b[0]
        # Kolmogorov and Smirnov: the largest gap is below 1.63/√n in 99 of 100 draws.
        gap = np.abs(np.sort(uniform(forget)) - (np.arange(hidden) + 0.5) / hidden).max()
        assert gap < 1.63 / np.sqrt(hidden)
        for n, block in enumerate(blocks):
            want = {"f": forget, "i": -forget, "r": -forget}.get(block, np.zeros(hidden))
            np.testing.assert_array_equal(b[n], want)


def test_extra_weights_start_neutral_or_by_the_recurrent_law():
    norms = variants.init_layer_norm(jax.random.key(3), D, 6, init="keras1")
    weights = [w for w in norms if w is not None]
    assert len({w.unsafe_buffer_pointer() for w in weights}) == len(weights)  # to be donated
    for gain, size in ((norms.gain_x, 24), (norms.gain_h, 24), (norms.gain_c, 6)):
        np.testing.assert_array_equal(gain, np.ones(size, np.float32))
    np.testing.assert_array_equal(norms.bias_c, np.zeros(6))
    full = draw(variants.init_fgr, jax.random.key(3), hidden=6)
    for block in np.split(np.asarray(full.w_gates), 3, axis=1):  # 18 × 6
        np.testing.assert_allclose(block.T @ block, np.eye(6), atol=1e-5)
    drawn = draw(variants.init_fgr, jax.random.key(3), hidden=6, init="torch").w_gates
    assert 0.95 * 6**-0.5 < np.abs(drawn).max() <= 6**-0.5


# ---- learned initial state ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "gru", "fgr"])
def test_a_learned_state_is_every_rows_and_its_gradient_their_sum(name, x64):
    layer, init = (gru, init_gru) if name == "gru" else VARIANTS[name][:0:-1]
    options = {} if name == "gru" else {"proj_size": P, "peephole": True}
    params = draw(init, jax.random.key(4), dtype="float64", **options)
    learned = variants.init_learned_state(params)
    sizes = {"h": P if options else H, "c": H, "i": H, "f": H, "o": H}
    fields = learned.state._fields
    for field, start in zip(fields, learned.state, strict=True):
        np.testing.assert_array_equal(start, np.zeros(sizes[field]))
    rng = np.random.default_rng(95)
    start = type(learned.state)(*(rng.normal(size=sizes[field]) for field in fields))
    rows = jax.tree.map(lambda v: np.stack([v] * B), start)
    xs, resets = rng.normal(size=(T, B, D)), np.array([[0, 0, 1, 0, 0], [1] * 5, [0] * 5]).T
    weights = (
        oracle.tree_map(lambda v: rng.normal(size=v.shape), rows),
        rng.normal(size=(T, B, sizes["h"])),
    )
    learns = functools.partial(variants.learned_state(layer), resets=resets)
    weighted = LearnedState(params, start), xs
    got, (of_weights, of_xs) = values_and_gradients(learns, weights, *weighted)

    def by_hand(params, xs, rows):
        return layer(params, xs, rows, resets=resets, reset_to=rows)

    want, (of_params, of_xs2, of_rows) = values_and_gradients(by_hand, weights, params, xs, rows)
    oracle.assert_close(got, want, 1e-12)
    sums = jax.tree.map(lambda g: g.sum(0), of_rows)
    oracle.assert_close((of_weights, of_xs), ((of_params, sums), of_xs2), 1e-12)
    assert min(np.abs(g).max() for g in sums) > 1e-3


def test_a_given_state_goes_before_the_learned_one(x64):
    rng = np.random.default_rng(96)
    params, xs = random_params(rng, "lstm", False), rng.normal(size=(T, B, D))
    start = LSTMState(rng.normal(size=H), rng.normal(size=H))
    rows = jax.tree.map(lambda v: np.stack([v] * B), start)
    given, other = (random_state(rng, "lstm", H) for _ in range(2))
    resets = rng.random((T, B)) < 0.4
    weights, layer = LearnedState(params, start), variants.learned_state(lstm)

    def several(weights, xs):
        return (
            layer(weights, xs, given),
            layer(weights, xs, given, resets=resets),
            layer(weights, xs, resets=resets, reset_to=other),
        )

    def by_hand(params, xs):
        return (
            lstm(params, xs, given),
            lstm(params, xs, given, resets=resets, reset_to=rows),
            lstm(params, xs, rows, resets=resets, reset_to=other),
        )

    oracle.assert_close(run(several, weights, xs), run(by_hand, params, xs), 1e-12)


def test_learned_states_in_a_stack_of_both_directions(x64):
    rng = np.random.default_rng(97)
    xs, layer = rng.normal(size=(T, B, D)), variants.learned_state(variants.cifg)
    params = [
        LearnedState(random_params(rng, "cifg", False), LSTMState(*rng.normal(size=(2, H))))
        for _ in range(4)
    ]
    for n in (2, 3):
        wide = params[n].params._replace(w_x=rng.normal(size=(2 * H, 3 * H)))
        params[n] = params[n]._replace(params=wide)
    pairs = [Bidirectional(*params[:2]), Bidirectional(*params[2:])]
    lengths = np.array([2, T, 0])
    both = functools.partial(bidirectional, layer)

    def by_hand(pairs, xs):
        below = xs
        for pair in pairs:
            rows = [LSTMState(*(jnp.stack([v] * B) for v in one.state)) for one in pair]
            inner, state = Bidirectional(*(one.params for one in pair)), Bidirectional(*rows)
            final, below = bidirectional(variants.cifg, inner, below, state, lengths=lengths)
        return final, below

    finals, hs = run(functools.partial(stack, both), pairs, xs, lengths=lengths)
    oracle.assert_close((finals[1], hs), run(by_hand, pairs, xs), 1e-12)
    np.testing.assert_allclose(finals[1].backward.c[2], params[3].state.c)  # a row of length 0


# ---- errors -------------------------------------------------------------------------------------


def wrong(name="cifg", state=None, cell=None, **replaced):
    (params, xs, _), _, _ = problem(name, False)
    return lambda: (cell or LAYERS[name])(params._replace(**replaced), xs, state)


def learned(params, state):
    xs = problem("cifg", False)[0][1]
    return lambda: variants.learned_state(lstm)(LearnedState(params, state), xs)


LSTM = random_params(np.random.default_rng(98), "lstm", False)
ERRORS = {
    "params.w_h: got shape [4, 12], expected [3, 12] ([H, 4H])": wrong(cell=variants.refine),
    "params.w_x: got shape [3, 16], expected [D, 12]": wrong(w_x=np.ones((D, 16))),
    "params.peephole: got shape [3, 4], expected [2, 4]": wrong(peephole=np.ones((3, H))),
    "params: got LSTMParams, expected FGRParams": wrong(cell=variants.fgr),
    "params: got LSTMParams, expected LayerNormParams": wrong(cell=variants.layer_norm),
    "params.w_gates: got shape [4, 4], expected [12, 12]": wrong("fgr", w_gates=np.ones((H, H))),
    "params.gain_x: got shape [4], expected [16]": wrong("layer_norm", gain_x=np.ones(H)),
    "params.gain_h: got shape [4], expected [16]": wrong("layer_norm", gain_h=np.ones(H)),
    "params.gain_c: got shape [16], expected [4]": wrong("layer_norm", gain_c=np.ones(4 * H)),
    "params.bias_c: got shape [16], expected [4]": wrong("layer_norm", bias_c=np.ones(4 * H)),
    "params.gain_c: got dtype int32, expected a floating point dtype": wrong(
        "layer_norm", gain_c=np.ones(H, np.int32)
    ),
    "state: got LSTMState, expected FGRState(h, c, i, f, o) or None": wrong(
        "fgr", LSTMState(np.ones((B, H)), np.ones((B, H)))
    ),
    "state.i: got shape [3, 1], expected [3, 4]": wrong(
        "fgr", FGRState(*[np.ones((B, H))] * 2, *[np.ones((B, 1))] * 3)
    ),
    "gate: got 'sigmod', expected a function or one of 'sigmoid', ": lambda: variants.activations(
        "sigmod"
    ),
    "output: got None, expected a function or one of 'sigmoid', ": lambda: (
        variants.activations_step(output=None)
    ),
    "init: got 'keras9', expected one of": lambda: variants.init_fgr(
        jax.random.key(0), D, H, init="keras9"
    ),
    "peephole: got 1, expected True or False": lambda: variants.init_nog(
        jax.random.key(0), D, H, peephole=1
    ),
    "params: got LSTMParams, expected LearnedState(params, state)": wrong(
        cell=variants.learned_state(lstm)
    ),
    "params: got tuple, expected one of LSTMParams, GRUParams, RNNParams, FGRParams": lambda: (
        variants.init_learned_state((1, 2))
    ),
    "params.state.h: got shape [3, 4], expected [": learned(
        LSTM, LSTMState(np.ones((B, H)), np.ones(H))
    ),
    "state.c: got shape [3, 5], expected [3, 4]": learned(LSTM, LSTMState(np.ones(H), np.ones(5))),
    "layer: got 'lstm', expected a function": lambda: variants.learned_state("lstm"),
}


@pytest.mark.parametrize("message", list(ERRORS))
def test_what_is_wrong_is_said_in_one_line(message, x64):
    with pytest.raises(ValueError) as error:
        ERRORS[message]()
    assert str(error.value).startswith(message)
