"""The tests that Keras 3, PyTorch and TensorFlow 1 have for their LSTMs, once more for ours.

Theirs often cannot fail: under constant kernels all gates and units are alike, equal h and c may
be swapped, and many look at shapes alone. Every docstring says whose case it is and what is mended.
Weights come in the framework's own layout; the distinct ones are ``wave``. ``NUMBERS`` were made in
float64 by Keras 3.15, PyTorch 2.13 and (basic, tf1) ``tf.compat.v1`` of TensorFlow 2.21.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import lstmjax
from lstmjax import Bidirectional, LSTMState, bidirectional, interop, lstm, lstm_step, stack

pytestmark = pytest.mark.usefixtures("x64")
close = partial(oracle.assert_close, tolerance=1e-10)
both_ways = partial(bidirectional, lstm)

NUMBERS = """
constant_plain: .6288686710 .8689914482 .9460772839 distinct_plain: .3417036344 -.1942266745
-.2604790085 .3459764396 -.2051061677 -.2618102479 .3498848867 -.2157577260 -.2628268125
constant_backwards: .3562215662 .7478952596 .8872725802 distinct_backwards: .3409916557 -.1881060278
-.2626116755 .3452617708 -.1991081210 -.2640131042 .3491727821 -.2098870403 -.2650997652
constant_drawn_bias: .5701970264 .8661914650 .9459621662 distinct_drawn_bias: .2084928003
-.1209695863 -.1965043111 .2110369280 -.1280378053 -.1987624831 .2132900124 -.1350169818
-.2007673947 constant_no_bias: .5498691994 .8622679087 .9443935207 distinct_no_bias: -.0535217264
-.0186321468 .0587619465 -.0425700580 -.0275055577 .0503718213 -.0315524458 -.0362628392 .0417741976
constant_stateful: .2178102850 .5819324123 .3124785616 .6863671321 distinct_stateful: -.0705122577
.2507462808 .0241344382 -.1589876392 -.1222993691 .0604720643 .1506302539 -.1054231054 -.0320344622
.4553878601 -.0701256955 -.2009391696 -.1340284853 .0750047182 .1246028321 -.1268666194
constant_initial_forwards: .2057444064 .3558822460 .6493083163 .6627600170
constant_initial_backwards: .1328161815 .2790355861 .5839337753 .5992567304
distinct_initial_forwards: -.4004707167 .2443782875 -.2879556656 -.1311982124
distinct_initial_backwards: -.3158004180 .2470333816 -.2347823592 -.1246930034 mask_right:
-.0987127498 .0615306478 -.1546913604 .0265347739 -.1832222803 .1048503116 -.2703563430 .0494390070
-.2558160711 .1338909238 -.2703563430 .0494390070 -.2558160711 .1338909238 -.2703563430 .0494390070
mask_holes: -.0987127498 .0615306478 -.1546913604 .0265347739 -.1832222803 .1048503116 -.1546913604
.0265347739 -.1832222803 .1048503116 -.1546913604 .0265347739 -.2767134520 .1275697319 -.2935878764
.0357117084 mask_left: -.1445719626 .0346304279 -.1708481640 .0055417856 -.2164434490 .0790695988
-.2821352422 .0252560166 -.2428553798 .1237290503 -.2821352422 .0252560166 -.2428553798 .1237290503
-.2821352422 .0252560166 both_plain: -.3188882950 .1525453865 -.1266699930 .2467798561 -.4282294444
.0795142422 -.2629394315 .2243407135 both_stateful: -.3814985045 .2103536116 -.1518025243
.2784411048 -.5184554742 .1452949130 -.3304293051 .2511620021 both_initial: -.2929521782
-.0405178084 -.1439000349 .2743514993 -.1767453762 .1693188250 -.1890389346 .1764562344 both_mask:
-.2767134520 .1275697319 -.1085469024 .2223901176 -.2935878764 .0357117084 -.1748248230 .1716115206
constant_stack: .7792627448 .5997578932 distinct_stack: .2279182436 -.1590605840 -.1971149676
.1457442411 -.1384256219 -.1210626462 .4120994451 -.2688343476 -.5577220244 .2525793167 -.2505039350
-.3168544026 -.0751049515 .2096498753 -.0586504202 .1668096261 -.1503897878 .6792091117 -.1163600201
.4947114984 torch_layers: -.0163469810 .1075053602 -.2634003648 .3573304968 -.0642297476 .0734355414
-.1485074575 .2721435160 .1443595191 -.0446956444 .2253950136 .3662599180 -.0642297476 .0734355414
-.2634003648 .3573304968 .1583681410 -.2316591137 .7031973973 .4583857456 -.2841598213 .5951250878
-.3214683793 .7524650483 .1383637122 -.0587836910 .0538717030 -.0415875947 -.0045551540 .0411623320
-.0710234400 .1285499372 -.7294108364 -.2713069765 .0247741640 .1770278766 -.1672362890 -.0449627919
1.1423491651 -.0336143584 torch_packed: .1092818730 -.1670909999 .0603015664 -.6841986287
.1462074376 -.3358754096 .0968706071 -.5649512711 .1607271690 -.4796913000 0 0 0 0 .2013911927
-.3314304905 0 0 0 0 .1112143046 -.5006117394 0 0 .0588164974 -.6067068662 .0356568079 .0751961572
-.0680905867 -.2014874170 .0426903566 .0813298380 .0455970728 -.1122131712 0 0 0 0 -.0151955878
-.2566883927 0 0 0 0 .0846340726 -.0761953011 0 0 torch_cell_bias: -.5769032800 .0382844947
-.4561893413 -.2801724967 -.6917859041 .0917477851 -.6448976216 -.7066414829 -.1152738244
.2823168554 .0218303063 .0383633637 1.4534798610 .2376641036 1.1979923693 .2277782452
torch_cell_no_bias: -.6247136538 -.2174246579 -.0824812007 -.5008237539 -.9282166616 -.4212510451
-.2256128305 -.9053109584 .0027073651 .0094558137 -.0249598591 -.0046300812 .0654713474 .0317047378
.3478824682 .0199121078 torch_hessian: .0722555416 .2213834010 .2506105838 .0324777422 -.1072299935
.0004104627 .0446193351 .1356104109 -.0941125450 .1251851040 -.0521422045 -.0182680662
constant_basic: .6896727985 .6896727985 .4484843033 .4484843033 .3989705915 .3989705915 .2402470661
.2402470661 distinct_basic: .0205341659 .1413424970 .0088242783 .1319080420 .6625391803
-1.3178613635 .2871243445 -.1800508621 tf1_cell: .5000000000 .3347147720 -.3643527727 .5000000000
.5000000000 -.3053282400 .5000000000 .5000000000 .4228503651 -.3403542562 -.2382438486 -.3643091122
-.2826626613 .2239275817 .0985482491 tf1_dynamic: .1448805923 .0836299332 0 0 .0112381336
.0497625894 .2328698712 .0673277288 0 0 .1800884795 .1056503543 0 0 0 0 -.0434370683 .2112037220
.3369813697 .1547054026 -.9995991426 .1007170970 -.0941317568 .3238461976 .2328698712 .0673277288
-.5639092233 .8916098730 -.0434370683 .2112037220
"""
NUMBERS = {k: v.split() for k, v in re.findall(r"([a-z]\w*):([-.\d\s]*)", NUMBERS)}


def made(name, *shapes):
    """The arrays of these shapes that stand in ``NUMBERS`` under a name."""
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])
    assert ends[-1] == len(NUMBERS[name])
    parts = np.split(np.array(NUMBERS[name], float), ends[:-1])
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


def wave(phase, *shape):
    return np.sin(1.7 * np.arange(1, np.prod(shape, dtype=int) + 1) + phase).reshape(shape)


def waves(phase, shapes):
    return {name: wave(phase + n, *shape) for n, (name, shape) in enumerate(shapes.items())}


def states_of(first, *shapes):
    """An ``LSTMState(h, c)`` for every two of ``shapes``, every array another wave."""
    parts = [wave(first + n, *shape) for n, shape in enumerate(shapes)]
    return [LSTMState(*parts[n : n + 2]) for n in range(0, len(parts), 2)]


# --- Keras: lstm_test, bidirectional_test, stacked_rnn_cells_test ---------------------------------


def keras(inputs, units, kind="distinct", bias="unit", phase=1):
    shapes = {"kernel": (inputs, 4 * units), "recurrent_kernel": (units, 4 * units)}
    weights = waves(phase, shapes | {"bias": (4 * units,)})
    for n, (name, w) in enumerate(weights.items()):
        constant = np.full_like(w, (0.01, 0.02, 0.03)[n])
        weights[name] = (0.02, 0.8, 0.5)[n] * w if kind == "distinct" else constant
    if bias == "unit":
        weights["bias"][units : 2 * units] = 1.0
    return {name: weights[name] for name in shapes} if bias == "none" else weights


def counting(batch, steps, inputs):
    return np.arange(float(batch * steps * inputs)).reshape(batch, steps, inputs).swapaxes(0, 1)


@pytest.mark.parametrize("case", ["plain", "backwards", "drawn_bias", "no_bias"])
def test_keras_correctness(case):
    """``test_correctness``, whose constant kernels let any two gates or units be exchanged.

    The last run has Keras's dropout at inference: ``test_basics`` looks at its shape alone.
    """
    (constant,), (distinct,) = made(f"constant_{case}", (3, 1)), made(f"distinct_{case}", (3, 3))
    bias = {"drawn_bias": "drawn", "no_bias": "none"}.get(case, "unit")
    xs, reverse = counting(3, 6, 4), case == "backwards"
    for kind, last in (("constant", np.tile(constant, 3)), ("distinct", distinct)):
        params = interop.load("keras", keras(4, 3, kind, bias))
        noise = lstmjax.recurrent_noise(None, params, xs, input_dropout=0.5, recurrent_dropout=0.5)
        dropped = lstmjax.variational_dropout(None, xs, 0.5)
        for how in ({}, {"method": "unrolled"}, {"noise": noise}):
            final, hs = lstm(params, dropped, reverse=reverse, **how)
            close((final.h, hs[0 if reverse else -1]), (last, last))


@pytest.mark.parametrize(("kind", "width"), [("constant", 1), ("distinct", 4)])
def test_keras_statefulness(kind, width):
    """``test_statefulness``: the same call twice, and as one call with a reset of one row."""
    first, second = (np.tile(h, 4 // width) for h in made(f"{kind}_stateful", *[(2, width)] * 2))
    params, xs = interop.load("keras", keras(4, 4, kind)), counting(2, 3, 4)
    state = lstm(params, xs)[0]
    close((state.h, lstm(params, xs, state)[0].h), (first, second))
    hs = lstm(params, np.concatenate([xs, xs]), resets=np.arange(6)[:, None] == [3, 6])[1]
    close(hs[-1], np.stack([first[0], second[1]]))


@pytest.mark.parametrize("way", ["forwards", "backwards"])
def test_keras_pass_initial_state(way):
    """``test_pass_initial_state`` gives h and c the same values; here they differ as well."""
    h = np.arange(4.0).reshape(2, 2)
    for kind, c in (("constant", h), ("distinct", wave(4, 2, 2))):
        params, state = interop.load("keras", keras(3, 2, kind)), LSTMState(h, c)
        final, _ = lstm(params, counting(2, 4, 3), state, reverse=way == "backwards")
        close((final.h,), made(f"{kind}_initial_{way}", (2, 2)))


MASKS = {"right": [[1, 1, 1, 0], [1, 1, 0, 0]], "left": [[0, 1, 1, 1], [0, 0, 1, 1]]}
MASKS = {**MASKS, "holes": [[1, 1, 0, 1], [1, 0, 0, 1]]}


@pytest.mark.parametrize("name", MASKS)
def test_keras_masking(name):
    """``test_masking`` with distinct kernels, holes too, and NaN where the mask is 0.

    Keras repeats its last output there, or 0 with ``zero_output_for_mask``: ours is the second. It
    lists backward outputs ("left" runs backwards) as they are made, we by their step.
    """
    (repeated,), mask = made(f"mask_{name}", (4, 2, 2)), np.array(MASKS[name]).T
    way = -1 if name == "left" else 1
    xs = np.where(mask[..., None] == 1, counting(2, 4, 3), np.nan)
    for method in ("scan", "unrolled"):
        how = {"mask": mask, "reverse": way < 0, "method": method}
        final, hs = lstm(interop.load("keras", keras(3, 2)), xs, **how)
        close((final.h, hs[::way]), (repeated[-1], repeated * mask[::way, :, None]))


@pytest.mark.parametrize("case", ["plain", "stateful", "initial", "mask"])
def test_keras_bidirectional(case):
    """The LSTMs of ``bidirectional_test``, where both directions have one constant kernel.

    Keras's output without ``return_sequences`` is the two final h, not the last of the outputs.
    """
    tree = {"forward_lstm": keras(3, 2), "backward_lstm": keras(3, 2, phase=8)}
    (params,), xs = interop.load_stack("keras", tree), counting(2, 4, 3)
    state = both_ways(params, xs)[0] if case == "stateful" else None
    state = Bidirectional(*states_of(1, *[(2, 2)] * 4)) if case == "initial" else state
    mask = np.array(MASKS["holes"]).T if case == "mask" else None
    (one, two), hs = both_ways(params, xs, state, mask=mask)
    close((np.concatenate([one.h, two.h], axis=1),), made(f"both_{case}", (2, 4)))
    close((hs[-1, :, :2], hs[0, :, 2:]), (one.h, two.h))


def test_keras_stacked_cells_with_a_mask():
    """``test_stacked_lstm_cell_mask``: one unit and ones; then 3 and 2 units, all states."""
    small = [{"kernel": np.ones((size, 4)), "recurrent_kernel": np.ones((1, 4))} for size in (4, 1)]
    small = [cell | {"bias": np.array([0.0, 1.0, 0.0, 0.0])} for cell in small]
    large, mask = [keras(4, 3), keras(3, 2, phase=8)], np.array([[1, 1, 1], [1, 1, 0]]).T
    (_, two), _ = stack(lstm, interop.load_stack("keras", small), np.ones((3, 2, 4)), mask=mask)
    close((two.h,), made("constant_stack", (2, 1)))
    xs = wave(5, 2, 3, 4).swapaxes(0, 1)
    (one, two), _ = stack(lstm, interop.load_stack("keras", large), xs, mask=mask)
    close((*one, *two), made("distinct_stack", (2, 3), (2, 3), (2, 2), (2, 2)))


# --- PyTorch: test_nn and the documented behaviour of nn.LSTM and nn.LSTMCell ---------------------


def torch(inputs, hidden, layers=1, directions=1):
    shapes, size = {}, inputs
    for n in range(layers):
        for end in (f"_l{n}", f"_l{n}_reverse")[:directions]:
            wide = {"weight_ih": (size,), "weight_hh": (hidden,), "bias_ih": (), "bias_hh": ()}
            shapes |= {name + end: (4 * hidden, *rest) for name, rest in wide.items()}
        size = directions * hidden
    return waves(0, shapes)


def test_torch_layers_and_directions(values_and_gradients):
    """PyTorch looks at the shapes of h_n, c_n [layers·directions, B, H]; here at their values.

    Every layer and direction starts from a state of its own, whose gradient is PyTorch's too.
    """
    layers = interop.load_stack("torch", torch(2, 2, layers=2, directions=2))

    def run(h, c):
        cells = list(map(LSTMState, h, c))
        states = [Bidirectional(*cells[:2]), Bidirectional(*cells[2:])]
        finals, hs = stack(both_ways, layers, wave(30, 2, 1, 2), states)
        cells = [cell for pair in finals for cell in pair]
        return hs, jnp.stack([cell.h for cell in cells]), jnp.stack([cell.c for cell in cells])

    weights = wave(33, 2, 1, 4), np.zeros((4, 1, 2)), wave(34, 4, 1, 2)
    outputs, of_state = values_and_gradients(run, weights, wave(31, 4, 1, 2), wave(32, 4, 1, 2))
    close((*outputs, *of_state), made("torch_layers", (2, 1, 4), *[(4, 1, 2)] * 4))
    hs, (*_, ahead, back), _ = outputs  # side by side, each up to its own last step
    close((hs[-1, :, :2], hs[0, :, 2:]), (ahead, back))


def test_torch_packed_sequence_is_each_row_alone(values_and_gradients):
    """``test_variable_sequence`` sums the outputs, and sorts the rows: here each has its weight.

    Rows of 2, 4 and 1 steps: PyTorch's numbers, each row cut and run alone, and in another order.
    """
    (params,) = interop.load_stack("torch", torch(2, 1, directions=2))
    lengths, order = np.array([2, 4, 1]), np.array([2, 0, 1])
    xs, weights = wave(30, 4, 3, 2), wave(33, 4, 3, 2)
    xs[np.arange(4)[:, None] >= lengths] = np.nan
    run = lambda lengths: lambda params, xs: both_ways(params, xs, lengths=lengths)[1]  # noqa: E731
    hs, (of_params, of_xs) = values_and_gradients(run(lengths), weights, params, xs)
    close((hs, of_xs), made("torch_packed", (4, 3, 2), (4, 3, 2)))
    close(run(lengths[order])(params, xs[:, order]), hs[:, order])
    total = jax.tree.map(jnp.zeros_like, params)
    for b, n in enumerate(lengths):
        row = np.s_[:n, b : b + 1]
        alone, grads = values_and_gradients(run(None), weights[row], params, xs[row])
        close((hs[row], of_xs[row]), (alone, grads[1]))
        total = jax.tree.map(jnp.add, total, grads[0])
    close(of_params, total)


@pytest.mark.parametrize("bias", ["bias", "no_bias"])
def test_torch_lstm_cell(bias, values_and_gradients):
    """``test_LSTM_cell``, six steps with and without bias, calls itself a smoke test: no number."""
    weights = {name.removesuffix("_l0"): w for name, w in torch(3, 2).items()}
    weights = {name: w for name, w in weights.items() if bias == "bias" or "bias" not in name}
    params = interop.load("torch", weights)

    def six(*state):
        for _ in range(6):
            state = lstm_step(params, LSTMState(*state), wave(30, 2, 3))
        return tuple(state)

    ones = np.ones((2, 2)), np.ones((2, 2))
    state, gradients = values_and_gradients(six, ones, wave(31, 2, 2), wave(32, 2, 2))
    close((*state, *gradients), made(f"torch_cell_{bias}", *[(2, 2)] * 4))


@pytest.mark.parametrize(("steps", "batch"), [(4, 0), (0, 2)])
def test_torch_no_rows_and_no_steps(steps, batch, values_and_gradients):
    """PyTorch takes a batch of no rows, and refuses no steps: both return the initial state."""
    params, (state, of_final) = interop.load("torch", torch(3, 2)), states_of(31, *[(batch, 2)] * 4)
    weights, xs = (of_final, wave(35, steps, batch, 2)), wave(30, steps, batch, 3)
    (final, hs), gradients = values_and_gradients(lstm, weights, params, xs, state)
    assert hs.shape == (steps, batch, 2)
    close((final, gradients[2]), (state, of_final))
    close(gradients[0], oracle.tree_map(np.zeros_like, params))


def test_projection_may_be_wider_than_the_cell(values_and_gradients):
    """PyTorch wants proj_size < hidden_size; the equations do not, and the oracle agrees."""
    params = lstmjax.LSTMParams(wave(1, 2, 8), wave(2, 3, 8), wave(3, 8), None, wave(4, 2, 3))
    state, of_final = states_of(31, *[(2, 3), (2, 2)] * 2)
    weights, args = (of_final, wave(35, 3, 2, 3)), (params, wave(30, 3, 2, 2), state)
    slow = oracle.gradients(lambda *args: oracle.weighted_sum(weights, oracle.lstm(*args)), *args)
    close(values_and_gradients(lstm, weights, *args), (oracle.lstm(*args), slow))


def test_torch_second_derivatives():
    """``gradgradcheck`` compares with finite differences; here PyTorch's Hessian times a vector."""
    params, xs = interop.load("torch", torch(3, 2)), wave(30, 4, 1, 3)

    def loss(v):  # h_0, c_0 and what is added to the bias
        state = LSTMState(v[None, :2], v[None, 2:4])
        final, hs = lstm(params._replace(b=params.b + v[4:]), xs, state)
        return oracle.weighted_sum((wave(33, 4, 1, 2), wave(34, 1, 2)), (hs, final.c))

    point, vector = jnp.append(wave(31, 4), np.zeros(8)), jnp.asarray(wave(36, 12))
    forward = lambda v: jax.jvp(jax.grad(loss), (v,), (vector,))[1]  # noqa: E731
    reverse = jax.grad(lambda v: jax.grad(loss)(v) @ vector)
    close(jax.jit(lambda v: (forward(v), reverse(v)))(point), made("torch_hessian", (12,)) * 2)


def test_torch_dropout_between_layers_bit_by_bit():
    """``test_RNN_dropout`` counts the kept units of one step by weights of 1; 2^k tells which.

    Layer 1 puts out ones, layer 2 adds them up as the bits of an integer, over 1 − rate.
    """
    bits, rate, xs, key = 20, 0.75, wave(1, 6, 5, 20), jax.random.key(3)
    lower = lstmjax.RNNParams(np.zeros((bits, bits)), np.zeros((bits, bits)), np.ones(bits))
    upper = lstmjax.RNNParams(2.0 ** np.arange(bits)[:, None], np.zeros((1, 1)), np.zeros(1))
    model = partial(stack, partial(lstmjax.rnn, activation="relu"), dropout=rate)
    kept = np.asarray(model([lower, upper], xs, key=key)[1][..., 0]) * (1 - rate)
    assert (kept == np.round(kept)).all() and len(np.unique(kept)) == 6 * 5  # fresh everywhere
    share = np.mean(kept.astype(int)[..., None] >> np.arange(bits) & 1)
    assert abs(share - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / (6 * 5 * bits))
    assert (model([lower, upper], xs)[1] == 2.0**bits - 1).all()  # without a key
    assert (model([upper], xs, key=key)[1] == model([upper], xs)[1]).all()  # inputs, top layer


def tf1(inputs, units, phase=0):
    return waves(phase, {"kernel": (inputs + units, 4 * units), "bias": (4 * units,)})


@pytest.mark.parametrize("framework", ["torch", "keras", "tf1"])
def test_a_shifted_bias_moves_its_gate_alone(framework):
    """No framework tests its order of gates. One step from c = 0 and c = 1 tells i·g, f and o."""
    order = "igfo" if framework == "tf1" else "ifgo"
    weights = {"torch": torch, "keras": keras, "tf1": tf1}[framework](2, 3)

    def gates(gate, shift, bias):
        values = weights[bias].copy()
        values.reshape(4, 3)[order.index(gate)] += shift
        params = interop.load(framework, weights | {bias: values})
        states = [LSTMState(wave(31, 1, 3), np.full((1, 3), c)) for c in (0.0, 1.0)]
        at_0, at_1 = (lstm_step(params, state, wave(30, 1, 2)) for state in states)
        return at_0.c, at_1.c - at_0.c, at_1.h / jnp.tanh(at_1.c)

    for bias in (name for name in weights if name.startswith("bias")):
        (ig, f, o), (i, _, _) = gates("i", 0.0, bias), gates("g", 40.0, bias)
        assert (jnp.abs(ig) < i).all() and (i < 1).all()
        close(gates("i", -40.0, bias), (0 * i, f, o))
        close(gates("f", -40.0, bias), (ig, 0 * i, o))
        close(gates("g", -40.0, bias), (-i, f, o))
        close(gates("o", -40.0, bias), (ig, f, 0 * i))


# --- TensorFlow 1: core_rnn_cell_test and rnn_test ------------------------------------------------


def test_tf1_basic_lstm_cells():
    """``testBasicLSTMCellWithStateTuple``: two cells whose weights are all 1/2; and distinct."""
    half = {"kernel": np.full((4, 8), 0.5), "bias": np.zeros(8)}
    tenth = LSTMState(np.full((1, 2), 0.1), np.full((1, 2), 0.1))
    states = [LSTMState(wave(33 + k, 1, 2), wave(31 + k, 1, 2)) for k in (0, 1)]
    layers = interop.load_stack("tf1", {"cell_0": half, "cell_1": half})
    (one, two), _ = stack(lstm, layers, np.ones((1, 1, 2)), [tenth, tenth])
    close((one.c, one.h, two.c, two.h), made("constant_basic", *[(1, 2)] * 4))
    layers = interop.load_stack("tf1", {"cell_0": tf1(2, 2), "cell_1": tf1(2, 2, 10)})
    (one, two), _ = stack(lstm, layers, wave(30, 1, 1, 2), states)
    close((one.c, one.h, two.c, two.h), made("distinct_basic", *[(1, 2)] * 4))


def test_tf1_lstm_cell():
    """``testLSTMCell`` asks that different rows differ, ``_testCellClipping`` for h = 0 at bound 0.

    Here the values after two steps with all that the cell has; a bound of 0 is refused.
    """
    shapes = {"kernel": (4, 12), "bias": (12,), "w_i_diag": (3,), "w_f_diag": (3,)}
    shapes |= {"w_o_diag": (3,), "projection/kernel": (3, 2)}
    params = interop.load("tf1", waves(0, shapes), forget_bias=0.3)
    state, x = LSTMState(wave(32, 3, 2), wave(31, 3, 3)), np.outer([1, 2, 3], [1.0, -0.5])
    for _ in range(2):
        state = lstm_step(params, state, x, cell_clip=0.5, proj_clip=0.4)
    close((state.c, state.h), made("tf1_cell", (3, 3), (3, 2)))
    with pytest.raises(ValueError, match="cell_clip: got 0.0, expected None or"):
        lstm_step(params, state, x, cell_clip=0.0)


def test_tf1_dynamic_rnn():
    """``dynamic_rnn`` with lengths, 0 too: tested there on shapes or a cell that just counts."""
    state, xs = LSTMState(wave(32, 3, 2), wave(31, 3, 2)), wave(30, 3, 3, 2)
    final, hs = lstm(interop.load("tf1", tf1(2, 2)), xs, state, lengths=[2, 0, 3])
    close((hs, final.c, final.h), made("tf1_dynamic", (3, 3, 2), (3, 2), (3, 2)))
    assert not hs[:, 1].any() and (final.h[1] == state.h[1]).all()
