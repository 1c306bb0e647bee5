"""Mixed precision: what is rounded to bfloat16, and what is not, in every cell.

bfloat16 has 8 binary digits, so rounding changes a number by at most 2^-8 of itself.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import variants_oracle as slow
from problems import QUICK, holes_and_resets

from lstmjax import LSTMState, losses, lstm, optim, recurrent_noise, train
from lstmjax.dropout import Noise
from lstmjax.models import CELLS, Recurrent, SequenceModel
from lstmjax.precision import in_bfloat16

T, B, D, E, H, O = 5, 3, 3, 4, 4, 2  # noqa: E741
SHORT = 2.0**-8
STEPS = {
    "gru": oracle.gru_step,
    "rnn": oracle.rnn_step,
    "linear_rnn": functools.partial(oracle.rnn_step, activation="linear"),
}


def model_of(cell, precision="bfloat16", **options):
    """Everything that has a product: a dense layer, a recurrent one, a dense layer."""
    sizes = {"every_step": True, "input_size": E, "learned_state": True}
    return SequenceModel(cell, H, O, **sizes | options, precision=precision)


def problem(cell, seed=0, **options):
    """Parameters, inputs [B, T, D] and the weights of a loss, all at random."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    model, xs = model_of(cell, **options), normal(B, T, D)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), xs)["params"])
    return jax.tree.map(lambda leaf: 0.6 * normal(*leaf.shape), shapes), xs, normal(B, T, O)


# ---- against the oracle -------------------------------------------------------------------------


class Rounded:
    """Rounding to bfloat16 for the oracle; ``nearest`` is how near a sum came to a tie."""

    def __init__(self):
        self.nearest = np.inf

    def __call__(self, z):
        short = given(z)
        spacing = np.ldexp(1.0, np.frexp(z)[1] - 8)
        off_tie = np.abs(spacing / 2 - np.abs(z - short)) / np.maximum(1, np.abs(z))
        self.nearest = min(self.nearest, off_tie.min())
        return short


def given(w):
    """A given float32 number, rounded to bfloat16."""
    return np.asarray(w).astype(jnp.bfloat16).astype(np.float64)


def disturbed(rng):
    """In place of rounding: errors at random, as large as those of rounding can be."""
    return lambda z: z * (1 + SHORT * rng.uniform(-1, 1, np.shape(z)))


def same(z):
    return z


def oracle_model(cell, params, xs, of_given, of_sums):
    """``(final state, outputs)`` of the model in NumPy; two roundings are the arguments."""

    def dense(name, x):
        return x @ of_given(params[name]["kernel"]) + params[name]["bias"]

    weights, start = params["layer_0"]["weights"], params["layer_0"]["state"]
    kind = CELLS[cell].params
    own = {name: of_given(w) for name, w in weights.items()}
    own = kind(**dict.fromkeys(kind._fields) | own)
    rows, finals = [], []
    for row in of_sums(dense("input", of_given(xs))):
        state = [start[part] for part in "hcifo" if part in start]
        state[0], outputs = of_given(state[0]), []
        for x_t in row:
            used = oracle.tree_map(of_sums, own)  # what returns from a step to them is rounded
            if cell in STEPS:
                state = list(STEPS[cell](used, x_t, *state))
            else:
                seen = [*state[:2], *map(of_sums, state[2:])]  # fgr's gates are factors too
                state = list(slow.step(cell, used, seen, x_t, *[np.ones((4, 1))] * 2))
            state[0] = of_sums(state[0])
            outputs.append(state[0])
        rows.append(outputs)
        finals.append(state)
    return tuple(map(np.array, zip(*finals, strict=True))), dense("head", np.array(rows))


@functools.cache
def clear_problem(cell):
    """A problem whose sums float32 rounds as float64 does, and the rounded oracle's answer."""
    for seed in itertools.count():
        params, xs, weights = problem(cell, seed)
        rounded = Rounded()
        answer = oracle_model(cell, params, xs, given, rounded)
        if rounded.nearest > 5e-7:
            return params, xs, weights, answer


@functools.cache
def of_model(cell, method):
    """``(state, outputs)`` and gradients of the model on ``clear_problem``."""
    params, xs, weights, _ = clear_problem(cell)

    def loss(params, xs):
        (state,), outputs = model_of(cell, method=method).apply({"params": params}, xs)
        return jnp.sum(weights * outputs), (state, outputs)

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=QUICK)
    gradients, values = run(params, xs)
    return values, gradients


CASES = [(cell, "fused") for cell in CELLS] + [("lstm", "scan"), ("gru", "unrolled")]


@pytest.mark.parametrize(("cell", "method"), CASES)
def test_weights_inputs_and_h_are_rounded_and_nothing_else(cell, method):
    """Were anything else, a sum, a gate, c, or a dense bias, it would show in the third digit."""
    *_, (final, want) = clear_problem(cell)
    (state, outputs), _ = of_model(cell, method)
    oracle.assert_close(outputs, want, 3e-6)
    oracle.assert_close(tuple(state), final, 3e-6)
    assert [part.dtype for part in state] == ["bfloat16", "float32", *["float32"] * 3][: len(state)]
    assert outputs.dtype == jnp.float32


@pytest.mark.parametrize(("cell", "method"), CASES)
def test_errors_are_those_of_rounding(cell, method):
    """Values and gradients against float64: errors of up to 2^-8 in all factors do as much.

    Three times as much is allowed, for there is one draw of these errors, and size is the mean of
    many. Measured: 0.3 to 0.9 for values, 0.3 to 1.7 for gradients.
    """
    params, xs, weights, _ = clear_problem(cell)
    (_, outputs), gradients = of_model(cell, method)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    gradients = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradients)
    rng = np.random.default_rng(4)

    def numbers(along, rounding):
        """The outputs, and the derivative of the loss along a direction."""
        step = lambda leaf, by: leaf + 1j * oracle.COMPLEX_STEP * by  # noqa: E731
        moved = jax.tree.map(step, (params, xs), along)
        out = oracle_model(cell, *moved, rounding, rounding)[1]
        return np.append(out.real, np.sum(weights * out.imag) / oracle.COMPLEX_STEP)

    errors, sizes = [], []
    for _ in range(8):  # every array has an equal part in a direction
        draw = lambda leaf: rng.normal(size=leaf.shape) / np.linalg.norm(leaf)  # noqa: E731
        along = jax.tree.map(draw, gradients)
        dot = sum(jax.tree.leaves(jax.tree.map(np.vdot, along, gradients)))
        exact = numbers(along, same)
        errors.append(np.append(outputs, dot) - exact)
        sizes += [numbers(along, disturbed(rng)) - exact for _ in range(2)]
    for part in (slice(-1), slice(-1, None)):
        error, size = (
            np.sqrt(np.mean(np.square(a)[:, part])) for a in map(np.array, (errors, sizes))
        )
        assert size / 8 < error < 3 * size


# ---- the layer ----------------------------------------------------------------------------------


def layer_problem(cell, steps, seed=5):
    """Float32 weights of a cell and inputs [T, B, D]."""
    rng = np.random.default_rng(seed)
    init = functools.partial(CELLS[cell].init, jax.random.key(2), D, H)
    shapes = jax.eval_shape(init)
    draw = lambda leaf: 0.4 * rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes), rng.normal(size=(steps, 4, D)).astype(np.float32)


def rounded(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.bfloat16), tree)


@pytest.mark.parametrize("case", ["lstm", "lstm, noise", "lstm, zoneout", "gru", "gru, before"])
def test_every_option_is_the_layers(case):
    """Its value is that of the layer whose weights were rounded before; its gradient is not."""
    cell = case.partition(",")[0]
    (params, xs), layer = layer_problem(cell, 7), CELLS[cell].layer
    rng = np.random.default_rng(6)
    normal = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    state, reset_to = (jax.tree.map(normal, jax.eval_shape(layer, params, xs)[0]) for _ in "ab")
    mask, resets = holes_and_resets()
    options = {"mask": mask, "lengths": np.array([7, 6, 5, 3]), "resets": resets}
    options |= {"reset_to": reset_to}
    rates = {}
    if "noise" in case:
        rates = {"input_dropout": 0.3, "recurrent_dropout": 0.4, "state_dropout": 0.2}
    if "noise" in case or "zoneout" in case:
        rates |= {"zoneout_h": 0.3, "zoneout_c": 0.4}
        options["noise"] = recurrent_noise(jax.random.key(3), params, xs, **rates)
    own = {"reverse": True}
    if case == "gru, before":
        params, own["reset_after"] = params._replace(b_n=None), False
    if cell == "lstm":
        own["cell_clip"] = 0.5

    def compiled(layer, *arguments):
        run = jax.jit(functools.partial(layer, **own), compiler_options=QUICK)
        return functools.partial(run, *arguments, state)

    want = compiled(layer, rounded(params), rounded(xs))(**options)
    run = compiled(functools.partial(in_bfloat16, layer), params, xs)
    got = run(**options)
    assert changed(got, want) < 1e-6
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, want)
    nothing = {"mask": np.ones_like(mask), "lengths": np.full(4, 7), "resets": 0 * resets}
    nothing |= {"reset_to": state}
    if "noise" in options:
        nothing["noise"] = jax.tree.map(jnp.zeros_like, options["noise"])
    for name in options:  # each does something
        assert changed(got, run(**options | {name: nothing[name]})) > 0.01, name


def changed(got, want):
    """The largest difference between two trees of arrays."""
    far = jax.tree.map(lambda a, b: np.abs(np.float64(a) - np.float64(b)).max(), got, want)
    return max(jax.tree.leaves(far))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "keras1"])
def test_gradients_are_summed_over_time_in_float32(cell, x64):
    """784 steps: summed in bfloat16 they would be wrong by a sixth, those of biases by a half."""
    params, xs = layer_problem(cell, 784)
    layer = CELLS[cell].layer

    def loss(layer, params, xs):
        return jnp.mean(layer(params, xs)[1], dtype=jnp.float32).astype(jnp.float64)

    gradient = jax.jit(jax.grad(loss, 1), static_argnums=0, compiler_options=QUICK)
    exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), (params, xs))
    want = gradient(layer, *exact)
    got = gradient(functools.partial(in_bfloat16, layer), params, xs)
    for name, g, w in zip(params._fields, got, want, strict=True):
        if w is not None:
            error = np.linalg.norm(np.asarray(g, np.float64) - w) / np.linalg.norm(w)
            assert error < 4 * SHORT, name


@pytest.mark.parametrize("cell", ["lstm", "gru", "peephole"])
def test_options_of_a_partial_are_the_calls_own(cell):
    (params, xs), layer = layer_problem(cell, 7), CELLS[cell].layer
    noise = recurrent_noise(jax.random.key(3), params, xs, zoneout_h=0.3)
    options = {"reverse": True, "noise": noise, "truncation": (2, 4)}
    if cell != "gru":
        options["cell_clip"] = 0.5

    def both(*where):
        def loss(xs):
            hs = in_bfloat16(functools.partial(layer, **where[0]), params, xs, **where[1])[1]
            return jnp.sum(hs[2].astype(jnp.float32) ** 2), hs

        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(xs)

    want = both({}, options)
    assert changed(both(options, {}), want) == 0
    for name in options:  # each does something, and the call's own goes before the partial's
        less = {n: o for n, o in options.items() if n != name}
        assert changed(both(less, {}), want) > 0.001, name
    assert changed(both(options, {"reverse": False}), both({}, options | {"reverse": False})) == 0


def test_clips_may_be_traced_and_residuals_want_a_derivative_by_hand():
    params, xs = layer_problem("lstm", 7)
    run = functools.partial(in_bfloat16, CELLS["lstm"].layer, params, xs)
    for method in ("fused", "scan"):
        traced = jax.jit(
            lambda clip, m=method: run(cell_clip=clip, method=m), compiler_options=QUICK
        )
        assert changed(traced(0.25), run(cell_clip=0.25, method=method)) < 1e-6
        assert changed(traced(0.25), traced(4.0)) > 0.01
    assert changed(run(residuals="sqrt"), run()) < 1e-6
    with pytest.raises(ValueError, match="^residuals: got 'sqrt', expected 'gates' without a deri"):
        run(residuals="sqrt", method="scan")
    # What trains is evaluated: with zoneout's probabilities, and with a noise that has no part.
    mean = recurrent_noise(None, params, xs, zoneout_h=0.1, zoneout_c=0.2)
    assert changed(run(noise=mean, residuals="sqrt"), run(noise=mean)) == 0
    assert changed(run(noise=Noise(), residuals="sqrt"), run(residuals="sqrt")) == 0
    dropped = recurrent_noise(jax.random.key(1), params, xs, recurrent_dropout=0.2)
    with pytest.raises(ValueError, match="^residuals: got 'sqrt', expected 'gates' without a deri"):
        run(noise=dropped, residuals="sqrt")
    with pytest.raises(ValueError, match="^residuals: got 'all', expected one of 'gates', "):
        run(noise=mean, residuals="all")


@pytest.mark.parametrize("cell", ["lstm", "gru", "keras1"])
def test_truncation_reaches_every_layer(cell):
    """With (2, 4) the error of step 5 reaches step 2, and none before it."""
    params, xs = layer_problem(cell, 7)
    layer = functools.partial(in_bfloat16, CELLS[cell].layer, truncation=(2, 4))

    def error(xs, layer=layer):
        return jnp.sum(layer(params, xs)[1][5].astype(jnp.float32) ** 2)

    reached = np.abs(jax.jit(jax.grad(error))(xs)).max((1, 2)) > 0
    assert reached.tolist() == [False, False, True, True, True, True, False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("how", ["scan", "fused", "dropped"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "nig"])
def test_gradients_of_narrow_weights_are_summed_over_steps_in_float32(cell, how, dtype):
    """Summed in bfloat16, those of a bias are off by a quarter after 300 equal steps."""
    steps = 1000 if dtype == "float16" else 300
    (params, _), xs = layer_problem(cell, 7), jnp.full((steps, B, D), 0.5)
    noise = None
    if how == "dropped":
        noise = recurrent_noise(jax.random.key(1), params, xs, recurrent_dropout=0.2)
    method = "fused" if how == "dropped" else how

    def total(params, xs):
        hs = CELLS[cell].layer(params, xs, method=method, noise=noise)[1]
        return jnp.sum(hs.astype(jnp.float32))

    gradient = jax.jit(jax.grad(total), compiler_options=QUICK)
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    found = gradient(narrow, xs.astype(dtype))
    exact = gradient(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow), xs)
    for got, want in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        assert got.dtype == dtype
        assert np.abs(np.float32(got) - want).max() < 0.02 * np.abs(want).max()


# ---- the model ----------------------------------------------------------------------------------


def dtypes_of(primitive, jaxpr):
    """The dtypes of a primitive's arguments and result, wherever it stands, in loops too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            found.add(tuple(v.aval.dtype.name for v in (*equation.invars, *equation.outvars)))
        for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                found |= dtypes_of(primitive, getattr(value, "jaxpr", value))
    return found


products = functools.partial(dtypes_of, "dot_general")


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


DROPPED = {"dropout": 0.2, "recurrent_dropout": 0.2, "weight_drop": 0.1, "zoneout": 0.1}
DROPPED |= {"locked_dropout": 0.1}


@pytest.mark.parametrize("cell", CELLS)
def test_every_product_is_of_bfloat16_factors_in_float32(cell):
    """In a gradient's products one factor is what came back, and may be wider."""
    params, xs, _ = problem(cell)
    for options in ({}, DROPPED):
        model = model_of(cell, **options)

        def run(params, xs, model=model):
            return model.apply({"params": params}, xs, key=jax.random.key(1))[1]

        def loss(params, xs, run=run):
            return jnp.sum(run(params, xs))

        expected = {("bfloat16", "bfloat16", "float32")}
        assert products(jax.make_jaxpr(run)(params, xs).jaxpr) == expected
        for *factors, result in products(jax.make_jaxpr(jax.grad(loss))(params, xs).jaxpr):
            assert "bfloat16" in factors and result == "float32"


def test_float32_is_what_it_was():
    """Bit for bit the core's function; the parameters drawn are those of bfloat16 as well."""
    xs = np.random.default_rng(7).normal(size=(T, B, D)).astype(np.float32)
    params, _ = layer_problem("lstm", T)
    weights = {name: w for name, w in params._asdict().items() if w is not None}
    hs = Recurrent("lstm", H).apply({"params": {"weights": weights}}, xs)[1]
    np.testing.assert_array_equal(hs, lstm(params, xs)[1])
    apply = jax.make_jaxpr(lambda p, x: model_of("lstm", "float32").apply({"params": p}, x))
    assert "bf16" not in str(apply(problem("lstm")[0], xs))

    def draw(precision):
        init = functools.partial(model_of("lstm", precision).init, jax.random.key(4))
        return jax.jit(init, compiler_options=QUICK)(xs)

    for a, b in zip(*map(jax.tree.leaves, (draw("float32"), draw("bfloat16"))), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cell", ["lstm", "gru", "fgr"])
def test_a_state_handed_out_can_be_handed_in(cell):
    """As if the sequence had not been cut: h, as it is stored, is what the next step reads."""
    params, xs, _ = problem(cell, num_layers=2)
    apply = functools.partial(model_of(cell, num_layers=2).apply, {"params": params})
    apply = jax.jit(apply, compiler_options=QUICK)
    whole_states, whole = apply(xs)
    states, first = apply(xs[:, :2])
    states, second = apply(xs[:, 2:], states)
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, rtol=1e-6, atol=1e-6)
    assert changed(states, whole_states) < 1e-6
    assert jax.tree.map(jnp.result_type, states) == jax.tree.map(jnp.result_type, whole_states)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "keras1"])
def test_training_keeps_float32_and_compiles_once(cell, stateful):
    params, xs, ys = problem(cell)
    model = model_of(cell)
    tx = optim.clipped(optim.tf_adam(1e-2), 1.0)

    def loss_fn(params, batch, key, carry=None):
        carry, outputs = model.apply({"params": params}, batch["x"], carry, key=key)
        loss = losses.total(losses.squared_error(outputs, batch["y"]), batch["weight"])
        return losses.mean(loss), ({"loss": loss}, carry) if stateful else {"loss": loss}

    step = jax.jit(train.make_train_step(loss_fn, tx, stateful=stateful), compiler_options=QUICK)
    state = train.init_state(jax.tree.map(jnp.asarray, params), tx, jax.random.key(0))
    if stateful:
        zeros = LSTMState(jnp.zeros((B, H), jnp.bfloat16), jnp.zeros((B, H)))
        state = (state, (zeros,))
    batch, seen = {"x": xs, "y": ys, "weight": np.ones(B, np.float32)}, []
    kinds = jax.tree.map(lambda leaf: leaf.dtype, state)
    for _ in range(4):
        state, metrics = step(state, batch)
        seen.append(float(losses.mean(metrics["loss"])))
        assert metrics["loss"][0].dtype == jnp.float32
    assert seen[-1] < seen[0]
    assert step._cache_size() == 1 and kinds == jax.tree.map(lambda leaf: leaf.dtype, state)
    trained = state[0] if stateful else state
    floating = [
        a.dtype for a in jax.tree.leaves(trained[1:3]) if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    assert len(floating) > 10 and set(floating) == {jnp.dtype("float32")}


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_gradients_of_words_are_added_up_in_float32(dropped):
    ids = np.array([[1, 2, 1, 1], [1, 1, 0, 2]], np.int32)
    words = {"vocabulary_size": 3, "embedding_dropout": dropped}
    model = model_of("lstm", **words, learned_state=False)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), ids)["params"])

    def loss(params):
        return model.apply({"params": params}, ids, key=jax.random.key(1))[1].sum()

    added = dtypes_of("scatter-add", jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    assert added == {("float32", "int32", "float32", "float32")}


@pytest.mark.parametrize("wrong", ["float16", "bf16", None])
def test_an_unknown_precision_is_named(wrong):
    expected = f"precision: got {wrong!r}, expected one of 'float32', 'bfloat16'"
    for sizes in ({}, {"input_size": E}):
        with pytest.raises(ValueError) as error:
            SequenceModel("lstm", H, O, **sizes, precision=wrong).init(
                jax.random.key(0), np.ones((B, T, D), np.float32)
            )
        assert str(error.value) == expected


def test_inputs_that_are_no_numbers_are_named():
    params, xs = layer_problem("gru", 3)
    with pytest.raises(ValueError, match="xs: got dtype int32, expected a floating point dtype"):
        in_bfloat16(CELLS["gru"].layer, params, xs.astype(np.int32))
    with pytest.raises(ValueError, match="state: got LSTMState, expected GRUState"):
        in_bfloat16(CELLS["gru"].layer, params, xs, LSTMState(xs[0], xs[0]))
