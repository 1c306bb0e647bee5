"""Streams and rollouts: the numbers of the whole sequence, one compilation, memory given back."""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import variants_oracle as slow
import variants_problems
from problems import problem

from lstmjax import (
    GRUParams,
    LSTMParams,
    LSTMState,
    RNNParams,
    RNNState,
    bidirectional,
    gru,
    gru_step,
    init_lstm,
    lstm,
    lstm_step,
    rnn,
    rnn_step,
    stack,
)
from lstmjax.models import SequenceModel
from lstmjax.recurrence import Bidirectional
from lstmjax.streaming import rollout, stream, stream_layer, stream_model
from lstmjax.variants import init_learned_state, learned_state

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"gru": {"reset_after": False}, "rnn": {"activation": "relu"}}
CLIPS = {"cell_clip": 0.8, "proj_clip": 0.6}


def cases():
    """(name, everything): each cell of lstmjax; variants bare, and with all they can have."""
    yield from ((name, False) for name in ("lstm", "gru", "rnn"))
    yield from ((name, True) for name in ("gru", "rnn"))
    yield from ((name, more) for name in variants_problems.OWN for more in (False, True))


def cell(name, everything):
    """(step, layer, oracle's layer, params, xs, state) with random numbers in float64."""
    if name in ("lstm", "gru", "rnn"):
        _, oracle_layer, params, xs, state, _ = problem(name)
        options = CLIPS if name == "lstm" else OPTIONS[name] if everything else {}
        step, layer = {"lstm": (lstm_step, lstm), "gru": (gru_step, gru), "rnn": (rnn_step, rnn)}[
            name
        ]
        if options.get("reset_after") is False:
            params = params._replace(b_n=None)
        if name != "lstm":  # the LSTM's problem has the clips already
            oracle_layer = functools.partial(oracle_layer, **options)
    else:
        rng = np.random.default_rng(7)
        options = variants_problems.CLIPS if everything else {}
        step, layer = variants_problems.STEPS[name], variants_problems.LAYERS[name]
        params = variants_problems.random_params(rng, name, everything)
        xs = rng.normal(size=(6, variants_problems.B, variants_problems.D))
        state = variants_problems.random_state(rng, name, params.w_h.shape[0])
        oracle_layer = functools.partial(slow.layer, name, **options)
    step, layer = (functools.partial(function, **options) for function in (step, layer))
    return step, layer, oracle_layer, params, xs, state


def fed(advance, params, state, xs):
    """Feeds a stream with all steps; its outputs are kept, and looked at when all is over."""
    outputs = []
    for x_t in xs:
        state, output = advance(params, state, x_t)
        outputs.append(output)
    return jax.tree.map(np.asarray, state), np.stack(outputs)


def arrays(tree):
    """Fresh arrays, which may be donated."""
    return jax.tree.map(jnp.array, tree)


def normal(rng, *shape):
    return rng.normal(size=shape)


def drawn(model, rng, inputs):
    """A model's parameters, drawn anew in float64."""
    inputs = inputs if inputs.dtype == int else inputs.astype(np.float32)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs)["params"])
    return jax.tree.map(lambda leaf: jnp.array(normal(rng, *leaf.shape)), like)


@pytest.mark.parametrize("name, everything", list(cases()))
def test_a_stream_is_the_whole_sequence(name, everything, x64):
    step, layer, oracle_layer, params, xs, state = cell(name, everything)
    params = arrays(params)
    streamed = fed(stream(step), params, arrays(state), xs)
    oracle.assert_close(streamed, layer(params, jnp.array(xs), arrays(state)), 1e-12)
    plain = jax.tree.map(np.asarray, params)
    oracle.assert_close((tuple(streamed[0]), streamed[1]), oracle_layer(plain, xs, state), 1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_stream_of_stacked_layers(name, x64):
    """Three layers of unequal sizes against the oracle's, one whole sequence after the other."""
    rng, sizes, (steps, batch) = np.random.default_rng(3), (3, 5, 2, 4), (6, 3)
    gates, kind, layer, slow_layer = {
        "lstm": (4, LSTMParams, lstm, oracle.lstm),
        "gru": (3, GRUParams, gru, oracle.gru),
    }[name]
    weights, states, finals = [], [], []
    xs = hs = normal(rng, steps, batch, sizes[0])
    for inputs, hidden in zip(sizes, sizes[1:], strict=False):
        shapes = (inputs, gates * hidden), (hidden, gates * hidden), (gates * hidden,)
        weights.append(kind(*(normal(rng, *shape) for shape in shapes)))
        parts = 2 if name == "lstm" else 1
        states.append(tuple(normal(rng, batch, hidden) for _ in range(parts)))
        final, hs = slow_layer(weights[-1], hs, states[-1])
        finals.append(final)
    kinds = {"lstm": LSTMState, "gru": lambda h: problem("gru").state._replace(h=h)}
    given = tuple(kinds[name](*arrays(state)) for state in states)
    advance = stream_layer(functools.partial(stack, layer))
    got, outputs = fed(advance, arrays(tuple(weights)), given, xs)
    oracle.assert_close((tuple(map(tuple, got)), outputs), (tuple(finals), hs), 1e-12)


@pytest.mark.parametrize("every_step, ids", [(True, False), (False, True)])
def test_a_stream_of_a_model(every_step, ids, x64):
    """From the model's own first states; what it says at a step is what it says of the steps up
    to there."""
    rng, (steps, batch) = np.random.default_rng(4), (5, 3)
    vocabulary = {"vocabulary_size": 7} if ids else {}
    model = SequenceModel("peephole", 4, 2, 2, every_step=every_step, input_size=3, **vocabulary)
    xs = rng.integers(0, 7, size=(steps, batch)) if ids else normal(rng, steps, batch, 2)
    whole = jnp.swapaxes(jnp.asarray(xs), 0, 1)
    params = drawn(model, rng, whole)
    states, outputs = fed(stream_model(model), params, None, xs)
    run = jax.jit(lambda xs: model.apply({"params": params}, xs))
    if every_step:
        expected = np.swapaxes(run(whole)[1], 0, 1)
    else:
        expected = np.stack([run(whole[:, : t + 1])[1] for t in range(steps)])
    oracle.assert_close((states, outputs), (run(whole)[0], expected), 1e-12)
    assert np.abs(outputs[1] - outputs[0]).max() > 1e-3  # the steps do differ


def test_without_a_state_a_layer_starts_from_its_own(x64):
    rng = np.random.default_rng(5)
    _, layer, _, params, xs, state = cell("lstm", False)
    learned = init_learned_state(arrays(params))
    first = LSTMState(jnp.array(normal(rng, 2)), jnp.array(normal(rng, 5)))
    learned = learned._replace(state=first)
    streamed = fed(stream_layer(learned_state(layer)), learned, None, xs)
    rows = LSTMState(*(np.tile(part, (xs.shape[1], 1)) for part in first))
    oracle.assert_close(streamed, layer(params, jnp.array(xs), arrays(rows)), 1e-12)
    assert np.asarray(first.h).shape == (2,)  # the weights were not given away


def test_it_compiles_once_and_gives_the_old_state_away(caplog):
    traced = []

    def step(params, state, x_t):
        traced.append(x_t.shape)
        return lstm_step(params, state, x_t)

    params, advance = init_lstm(jax.random.key(0), 3, 5), stream(step)
    state = LSTMState(jnp.ones((2, 5)), jnp.zeros((2, 5)))
    xs = jax.random.normal(jax.random.key(1), (9, 2, 3))
    xs = list(xs)
    with jax.log_compiles(True), caplog.at_level("WARNING"):
        for x_t in xs:
            old, (state, _) = state, advance(params, state, x_t)
            assert old.h.is_deleted() and old.c.is_deleted()
    compiled = [line for line in caplog.messages if line.startswith("Compiling")]
    assert len(traced) == 1 and len(compiled) == 1, compiled
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, xs, state)))


def test_numpy_states_are_copied():
    params = init_lstm(jax.random.key(0), 3, 5)
    state = LSTMState(np.full((2, 5), 0.5, np.float32), np.full((2, 5), -2.0, np.float32))
    advance, x_t = stream(lstm_step), np.ones((2, 3), np.float32)
    first, second = (advance(params, state, x_t)[1] for _ in range(2))
    assert np.all(state.h == 0.5) and np.all(state.c == -2.0)
    np.testing.assert_array_equal(first, second)


PARAMS = LSTMParams(np.ones((3, 20), np.float32), np.ones((5, 20), np.float32), np.ones(20, "f4"))
SAME = jnp.zeros((2, 5))
ZEROS = LSTMState(np.zeros((2, 5), np.float32), np.zeros((2, 5), np.float32))
WRONG = {
    "x_t's size": (lstm_step, PARAMS, ZEROS, np.ones((2, 4), "f4"), r"x_t: got shape \[2, 4\]"),
    "x_t's dtype": (lstm_step, PARAMS, ZEROS, np.ones((2, 3), int), "x_t: got dtype int"),
    "the state's size": (
        lstm_step, PARAMS, ZEROS._replace(c=np.ones((2, 4), "f4")), np.ones((2, 3), "f4"),
        r"state.c: got shape \[2, 4\], expected \[2, 5\]",
    ),
    "the state's dtype": (
        lstm_step, PARAMS, ZEROS._replace(c=np.zeros((2, 5), jnp.bfloat16)), np.ones((2, 3), "f4"),
        r"state.c: got bfloat16 \[2, 5\], expected float32 \[2, 5\], which the step returns",
    ),
    "no state": (lstm_step, PARAMS, None, np.ones((2, 3), "f4"), "state: got NoneType"),
    "a bare pair": (lstm_step, PARAMS, tuple(ZEROS), np.ones((2, 3), "f4"), "state: got tuple"),
    "one array twice": (
        lstm_step, PARAMS, LSTMState(SAME, SAME), np.ones((2, 3), "f4"),
        "state: got one array in two places, expected one for each place",
    ),
    "a step of its own": (
        lambda params, state, x_t: (state, x_t), PARAMS, ZEROS, np.ones((2, 3), "f4"),
        "step: got one that returns tuple, expected a state with a field h",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_a_stream_says_what_is_wrong(case):
    step, params, state, x_t, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        stream(step)(params, state, x_t)


def test_a_state_is_used_up():
    params, x_t, advance = init_lstm(jax.random.key(0), 3, 5), jnp.ones((2, 3)), stream(lstm_step)
    state = arrays(ZEROS)
    advance(params, state, x_t)
    with pytest.raises(ValueError, match="^state: got one that a call has used up, expected the"):
        advance(params, state, x_t)
    with pytest.raises(ValueError, match="^state: got one array in two places"):
        stream(rnn_step)(RNNParams(SAME, jnp.ones((5, 5))), RNNState(SAME), x_t)
    assert not SAME.is_deleted()


def test_streams_of_layers_say_what_is_wrong():
    both = functools.partial(bidirectional, lstm)
    params, x_t = Bidirectional(PARAMS, PARAMS), np.ones((2, 3), "f4")
    with pytest.raises(ValueError, match="^state: got Bidirectional, expected the state of one"):
        stream_layer(both)(params, Bidirectional(ZEROS, ZEROS), x_t)
    with pytest.raises(ValueError, match="^layer: got both directions, expected one"):
        stream_layer(both)(params, None, x_t)
    with pytest.raises(ValueError, match=r"^x_t: got shape \[3\], expected \[B, D\]"):
        stream_layer(lstm)(PARAMS, None, np.ones(3, "f4"))
    with pytest.raises(ValueError, match="^reverse: got True, expected False: a stream runs forw"):
        stream_layer(functools.partial(lstm, reverse=True))
    with pytest.raises(ValueError, match="^reverse: got True, expected False: a stream runs forw"):
        stream_layer(functools.partial(stack, functools.partial(lstm, reverse=True)))
    with pytest.raises(ValueError, match="^reverse: got True, expected False: a stream runs forw"):
        stream_layer(functools.partial(stack, lstm, reverse=True))
    with pytest.raises(ValueError, match=r"^x_t: got shape \[2\], expected \[B, D\]"):
        stream_model(SequenceModel("lstm", 3, 1))({}, None, np.ones(2, "f4"))
    with pytest.raises(ValueError, match="^model: got function, expected a SequenceModel"):
        stream_model(lstm)
    for make in (stream, stream_layer):
        with pytest.raises(ValueError, match="expected a function"):
            make("lstm")


# ---- rollout ------------------------------------------------------------------------------------


def reader(step):
    """``predict``: a cell's step, whose h is read by a matrix; and the same in NumPy, by rows."""

    def predict(params, state, value):
        state = step(params[0], state, value)
        return state, state.h @ params[1]

    def slow_rollout(params, state, value, steps):
        slow_step = {lstm_step: oracle.lstm_step, rnn_step: oracle.rnn_step}[step]
        values, finals = [], [[] for _ in state]
        for b in range(len(value)):
            row, x_t, said = [part[b] for part in state], value[b], []
            for _ in range(steps):
                row = slow_step(params[0], x_t, *row)
                x_t = row[0] @ params[1]
                said.append(x_t)
            values.append(np.stack(said))
            for final, part in zip(finals, row, strict=True):
                final.append(part)
        return tuple(map(np.stack, finals)), np.stack(values, axis=1)

    return predict, slow_rollout


@pytest.mark.parametrize("name", ["lstm", "rnn"])
def test_a_rollout_is_a_loop_in_value_and_gradient(name, x64):
    rng, (batch, inputs, hidden, steps) = np.random.default_rng(6), (2, 3, 4, 5)
    gates, kind, step, parts, state_kind = {
        "lstm": (4, LSTMParams, lstm_step, 2, LSTMState),
        "rnn": (1, RNNParams, rnn_step, 1, RNNState),
    }[name]
    shapes = (inputs, gates * hidden), (hidden, gates * hidden), (gates * hidden,)
    params = (kind(*(normal(rng, *s) for s in shapes)), normal(rng, hidden, inputs))
    state, final = (tuple(normal(rng, batch, hidden) for _ in range(parts)) for _ in range(2))
    value, weights = normal(rng, batch, inputs), (final, normal(rng, steps, batch, inputs))
    predict, slow_rollout = reader(step)

    def loss(params, state, value):
        end, values = rollout(predict, params, state_kind(*state), value, steps)
        outputs = tuple(end), values
        return oracle.weighted_sum(weights, outputs), outputs

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, outputs), gradients = run(*arrays((params, state, value)))
    oracle.assert_close(outputs, slow_rollout(params, state, value, steps), 1e-12)

    def slow_loss(params, state, value):
        return oracle.weighted_sum(weights, slow_rollout(params, state, value, steps))

    oracle.assert_close(gradients, oracle.gradients(slow_loss, params, state, value), 1e-10)


def test_rollouts_put_together(x64):
    """n steps, then m from where they ended, are n + m; none change nothing; streams predict."""
    rng = np.random.default_rng(8)
    params = LSTMParams(*arrays([normal(rng, 4, 16), normal(rng, 4, 16), normal(rng, 16)]))
    state, value = arrays((LSTMState(*normal(rng, 2, 3, 4)), normal(rng, 3, 4)))
    advance = stream(lstm_step)
    end, values = rollout(advance, params, state, value, 7)
    middle, first = rollout(advance, params, state, value, 3)
    again, second = rollout(advance, params, middle, first[-1], 4)
    oracle.assert_close((again, np.concatenate([first, second])), (end, values), 1e-12)
    same, nothing = rollout(advance, params, state, value, 0)
    oracle.assert_close((same, nothing), (state, np.zeros((0, 3, 4))), 0)

    carried, said = arrays(state), value  # the same, value by value
    for expected in values:
        carried, said = advance(params, carried, said)
        oracle.assert_close(said, expected, 1e-12)


def test_a_rollout_says_what_is_wrong():
    def predict(params, state, value):
        return state, params * value

    value = np.ones(2, np.float32)
    run = functools.partial(rollout, predict, np.float32(2), value, value)
    assert run(3)[1].tolist() == [[2, 2], [4, 4], [8, 8]]
    for bad in (-1, 2.0, True, None):
        with pytest.raises(ValueError, match="^steps: got .*, expected a whole number >= 0"):
            run(bad)
    with pytest.raises(ValueError, match=r"^value: got float32 \[2\], expected float32 \[1, 2\]"):
        rollout(lambda p, s, v: (s, v[None]), None, value, value, 1)
    with pytest.raises(ValueError, match=r"^state\.h: got float32 \[2\], expected int32 \[2\]"):
        rollout(
            lambda p, s, v: (RNNState(s.h.astype(np.int32)), v), None, RNNState(value), value, 1
        )
    with pytest.raises(ValueError, match="^state: got PyTreeDef.*expected PyTreeDef"):
        rollout(lambda p, s, v: ((s, s), v), None, value, value, 1)
    with pytest.raises(ValueError, match="^predict: got one that returns list, expected"):
        rollout(lambda p, s, v: [s, v], None, value, value, 1)
    with pytest.raises(ValueError, match="^predict: got None, expected a function"):
        rollout(None, None, value, value, 1)


@pytest.mark.parametrize("cell_name", ["keras1", "gru"])
def test_forecasts_are_rollouts(cell_name, x64):
    """Both ways of experiments/forecast.py against a loop over whole windows."""
    ways = runpy.run_path(str(ROOT / "experiments" / "forecast.py"))
    rng, steps = np.random.default_rng(9), 4
    model, window = SequenceModel(cell_name, 3, 1), jnp.array(normal(rng, 5, 1))
    params = drawn(model, rng, window[None])
    say = jax.jit(lambda window: model.apply({"params": params}, window[None])[1])
    slid, grown, sliding, growing = [], [], window, window
    for _ in range(steps):
        slid.append(say(sliding)[0, 0])
        grown.append(say(growing)[0, 0])
        sliding = jnp.concatenate([sliding[1:], slid[-1][None, None]])
        growing = jnp.concatenate([growing, grown[-1][None, None]])
    for way, expected in (("rerun_window", slid), ("carry_state", grown)):
        got = jax.jit(lambda p, w, way=way: ways[way](model, p, w, steps))(params, window)
        oracle.assert_close(got, np.stack(expected), 1e-12)
    assert np.abs(np.subtract(slid, grown))[1:].max() > 1e-4  # two ways indeed
    assert ways["carry_state"](model, params, window, 1).shape == (1,)
