"""The variants of the LSTM: initial laws, learned initial states, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import variants_oracle as slow
from variants_problems import (
    LAYERS,
    B,
    D,
    H,
    P,
    T,
    draw,
    problem,
    random_params,
    random_state,
    run,
    values_and_gradients,
)

from lstmjax import (
    Bidirectional,
    LSTMState,
    bidirectional,
    gru,
    init_gru,
    init_lstm,
    lstm,
    stack,
    variants,
)
from lstmjax.initializers import chrono, log_uniform, uniform_gate
from lstmjax.variants import VARIANTS, FGRState, LearnedState

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
    """chrono: exp(b_f) ~ U(1, 99), b_i = −b_f. log_uniform: b_f ~ U(0, log 99).
    uniform_gate: σ(b_f) ~ U(1/H, 1 − 1/H)."""
    hidden = 400
    laws = {
        chrono(100): lambda b: (np.exp(b) - 1) / 98,
        log_uniform(100): lambda b: b / np.log(99),
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
    plain = draw(init_lstm, jax.random.key(3), hidden=6)
    norms = variants._with_gains(None, plain, "lstmjax")
    weights = [w for w in norms if w is not None]
    assert len({w.unsafe_buffer_pointer() for w in weights}) == len(weights)  # to be donated
    oracle.assert_close(norms, draw(variants.init_layer_norm, jax.random.key(3), hidden=6), 0)
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


def test_a_partial_s_own_resets_lead_to_the_learned_state(x64):
    """As those do that are given."""
    rng = np.random.default_rng(5)
    params = init_lstm(jax.random.key(0), 2, 3, dtype=jnp.float64)
    learned = LearnedState(params, LSTMState(*rng.normal(size=(2, 3))))
    xs, resets = rng.normal(size=(6, 2, 2)), np.arange(6)[:, None] == np.array([2, 4])
    for options in ({}, {"reset_to": LSTMState(*rng.normal(size=(2, 2, 3)))}):
        options = {"resets": resets, **options}
        wanted = variants.learned_state(lstm)(learned, xs, **options)
        got = variants.learned_state(functools.partial(lstm, **options))(learned, xs)
        oracle.assert_close(got, wanted, 0.0)


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
