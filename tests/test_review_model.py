"""The model over chops and its training, against NumPy in float64, in value and gradient.

Gradients of the oracle are by the complex step (see oracle.py).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import COMPLEX_STEP, gradients, sigmoid

from lstmjax import parallel, review_model, train
from lstmjax.averages import averaged
from lstmjax.data import chops
from lstmjax.dropout import dropout, embedding_dropout, word_dropout
from lstmjax.review_model import ReviewModel

V, P, E, H, T = 9, 3, 2, 3, 4
LENGTHS = np.array([4, 2, 3, 0, 1, 4], np.int32)  # of segments; the fourth is none
SLOT = np.array([1, 0, 1, 4, 2, 2], np.int32)  # of four reviews; the last has no segment
LABEL, WEIGHT = np.array([1, 0, 1, 0], np.int32), np.array([1, 1, 1, 0], np.float32)
S, R = len(LENGTHS), len(LABEL)


def make_batch():
    draw = np.random.default_rng(8)
    valid = np.arange(T)[:, None] < LENGTHS
    frequency = draw.uniform(0.5, 2, V)
    path = np.stack([draw.integers(4, V, (T, S)), draw.integers(V - 1, V + P, (T, S))], axis=2)
    return {
        "ids": np.where(valid, draw.integers(4, V, (T, S)), 0).astype(np.int32),
        "length": LENGTHS, "slot": SLOT, "label": LABEL, "weight": WEIGHT,
        "pairs": np.where(valid, draw.integers(0, P + 1, (T, S)), 0).astype(np.int32),
        "path": np.where(valid[:, :, None], path, 0).astype(np.int32),
        "ratios": np.where(valid[:, :, None], np.random.default_rng(7).normal(size=(T, S, 3)), 0),
        "places": np.where(valid[:, :, None], np.random.default_rng(6).normal(size=(T, S, 4)), 0),
        "ratio": np.concatenate([[0], draw.normal(size=V + P - 1)]),
        "frequency": frequency / frequency.sum(),
    }  # fmt: skip


def make_params(model):
    """Random weights of the shapes of ``init``."""
    draw = np.random.default_rng(9)
    like = jax.eval_shape(lambda: review_model.init(model, jax.random.key(0)))
    return jax.tree.map(lambda leaf: draw.normal(size=leaf.shape), like)


# ---- the oracle ---------------------------------------------------------------------------------


def vectors_by_hand(model, params, batch):
    """x of every step, [T, S, ·]."""
    table = params["embed"]
    if model.normalise:
        f = batch["frequency"][:, None]
        mean = (f * table).sum(axis=0)
        table = (table - mean) / np.sqrt((f * (table - mean) ** 2).sum(axis=0) + 1e-6)
    xs = table[batch["ids"]]
    if model.pairs == "input":
        pairs = batch["pairs"]
        xs = xs + np.where((pairs > 0)[:, :, None], params["pairs"][pairs], 0)
    if model.ratio_inputs:
        xs = np.concatenate([xs, batch["ratios"]], axis=2)
    return np.concatenate([xs, batch["places"]], axis=2) if model.place_inputs else xs


def cell_by_hand(model, weights, xs):
    """Outputs of one segment [n, ·] in one direction."""
    h = c = np.zeros(H, complex)
    hs = []
    for x in xs:
        z = (x @ weights["w_x"] if "w_x" in weights else x) + h @ weights["w_h"] + weights["b"]
        blocks = [z[k : k + H] for k in range(0, len(z), H)]
        i, f = sigmoid(blocks[0]), sigmoid(blocks[1])
        if model.cell == "cifg":
            f = 1 - i
        c = f * c + i * np.tanh(blocks[-2])
        h = sigmoid(blocks[-1]) * np.tanh(c)
        hs.append(h)
    return np.array(hs).reshape(len(xs), H)


def deep_by_hand(model, params, xs):
    """z of each review."""
    outputs = [[] for _ in range(R)]
    for s in range(S):
        if LENGTHS[s] == 0:
            continue
        x = xs[: LENGTHS[s], s]
        size = x.shape[1] // len(model.directions) if model.embedding == "gates" else x.shape[1]
        parts = []
        for n, name in enumerate(model.directions):
            own = x[:, n * size : (n + 1) * size] if model.embedding == "gates" else x
            turn = slice(None, None, -1 if name == "backward" else 1)
            parts.append(cell_by_hand(model, params[name], own[turn])[turn])
        outputs[SLOT[s]].append(np.concatenate(parts, axis=1))
    z = []
    for segments in outputs:
        if not segments:
            z.append(params["bias"][0] + 0j)
            continue
        hs = np.concatenate(segments)
        largest = hs[hs.real.argmax(axis=0), np.arange(hs.shape[1])]
        v = {"max": [largest], "mean": [hs.mean(axis=0)], "both": [largest, hs.mean(axis=0)]}
        z.append(np.concatenate(v[model.pooling]) @ params["kernel"][:, 0] + params["bias"][0])
    return np.array(z)


def wide_by_hand(params, batch):
    """z of each review from a dictionary of its features."""
    z = np.zeros(R, complex)
    weight = dict(enumerate(params["path"] * batch["ratio"]))
    for s in range(S):
        for t in range(LENGTHS[s]):
            for feature in batch["path"][t, s].tolist():
                z[SLOT[s]] += weight[feature]
    return z


def loss_by_hand(model, z):
    if model.loss == "squared":
        return (z - np.where(LABEL > 0, 1, -1)) ** 2
    return np.log(1 + np.exp(np.where(LABEL > 0, -z, z)))


def judged_by_hand(model, alone, across):
    """J of each review, and z."""
    z = across + model.deep_share * alone
    apart = model.path_loss
    return (1 - apart) * loss_by_hand(model, z) + apart * loss_by_hand(model, alone), z


def step_by_hand(model, params, batch):
    """r of the adversary."""
    xs = vectors_by_hand(model, params, batch).astype(complex)
    across = wide_by_hand(params, batch) if model.pairs == "path" else 0
    g = np.zeros(xs.shape)
    for place in np.ndindex(xs.shape):
        moved = xs.copy()
        moved[place] += 1j * COMPLEX_STEP
        loss, _ = judged_by_hand(model, deep_by_hand(model, params, moved), across)
        g[place] = (WEIGHT @ loss).imag / COMPLEX_STEP
    r = np.zeros(xs.shape)
    for review in range(R):
        own = g[:, SLOT == review]
        if own.any():
            r[:, SLOT == review] = model.adversarial * own / np.sqrt((own**2).sum())
    return r


def total_by_hand(model, params, batch, r):
    """(loss, the metric "loss"'s sum, z)."""
    xs = vectors_by_hand(model, params, batch)
    across = wide_by_hand(params, batch) if model.pairs == "path" else 0
    loss, z = judged_by_hand(model, deep_by_hand(model, params, xs), across)
    clean = loss_by_hand(model, z)
    if model.pairs == "path":
        loss = loss + model.path_loss * loss_by_hand(model, across)
    if r is not None:
        loss = loss + judged_by_hand(model, deep_by_hand(model, params, xs + r), across)[0]
    return WEIGHT @ loss / WEIGHT.sum(), WEIGHT @ clean, z


MODELS = {
    "vectors": ReviewModel(V, normalise=True, adversarial=0.7),
    "input": ReviewModel(V, cell="cifg", pairs="input", pairs_size=P, both=False, pooling="mean"),
    "ratios": ReviewModel(
        V, path_order=3, ratio_inputs=True, place_inputs=True, adversarial=0.6, both=False
    ),
    "path": ReviewModel(
        V,
        pairs="path",
        pairs_size=P,
        path_loss=0.3,
        deep_share=0.6,
        adversarial=0.4,
        pooling="max",
        path_order=3,
        ratio_inputs=True,
    ),
    "gates": ReviewModel(V, embedding="gates", loss="squared", adversarial=1.5),
    "gates cifg": ReviewModel(V, embedding="gates", cell="cifg", pooling="max", loss="squared"),
}
MODELS = {k: dataclasses.replace(m, embedding_size=E, hidden_size=H) for k, m in MODELS.items()}


@pytest.mark.parametrize("name", list(MODELS))
def test_the_loss_and_its_gradient(name, x64):
    model, batch = MODELS[name], make_batch()
    params = make_params(model)
    run = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True))
    (loss, metrics), gradient = run(params, batch, jax.random.key(0))

    r = step_by_hand(model, params, batch) if model.adversarial else None
    want, clean, z = total_by_hand(model, params, batch, r)
    np.testing.assert_allclose(loss, want.real, rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"][0], clean.real, rtol=1e-12)
    hits = ((z.real > 0) == (LABEL > 0)) @ WEIGHT
    assert (float(metrics["accuracy"][0]), float(metrics["accuracy"][1])) == (hits, 3.0)
    paths = {"accuracy_deep", "accuracy_wide"} if model.pairs == "path" else set()
    assert metrics.keys() == {"loss", "accuracy"} | paths
    if paths:
        across = wide_by_hand(params, batch)
        alone = (z - across) / model.deep_share
        for name, own in (("deep", alone), ("wide", across)):
            hits = float(((own.real > 0) == (LABEL > 0)) @ WEIGHT)
            assert tuple(map(float, metrics[f"accuracy_{name}"])) == (hits, 3.0)

    (slow,) = gradients(lambda params: total_by_hand(model, params, batch, r)[0], params)
    for own, other in zip(*map(jax.tree.leaves, (gradient, slow)), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-10, atol=1e-12)
        assert other.any()


@pytest.mark.parametrize("name", list(MODELS))
def test_the_loss_in_float32(name):
    model = MODELS[name]
    batch, params = (
        jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == float else a, tree)
        for tree in (make_batch(), make_params(model))
    )
    (loss, _), gradient = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True))(
        params, batch, jax.random.key(0)
    )
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True))
        (want, _), exact = run(make_params(model), make_batch(), jax.random.key(0))
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for got, wide in zip(*map(jax.tree.leaves, (gradient, exact)), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wide, rtol=1e-5, atol=1e-5 * np.abs(wide).max())


def test_without_a_key_there_is_no_adversary_and_nothing_is_dropped(x64):
    model, batch = MODELS["vectors"], make_batch()
    rates = {"word_dropout": 0.5, "embedding_dropout": 0.5, "input_dropout": 0.5, "dropout": 0.5}
    params = make_params(model)
    loss, metrics = dataclasses.replace(model, **rates).loss_fn(params, batch)
    _, clean, _ = total_by_hand(model, params, batch, None)
    np.testing.assert_allclose([loss, metrics["loss"][0] / 3], clean.real / 3, rtol=1e-12)


def test_what_the_padding_holds_changes_nothing():
    model = MODELS["vectors"]
    xs = np.random.default_rng(1).normal(size=(T, S, E)).astype(np.float32)
    params = jax.tree.map(np.float32, make_params(model))
    valid = np.arange(T)[:, None] < LENGTHS
    dirty = np.where(valid[:, :, None], xs, np.nan)
    read = lambda xs: review_model.deep(model, params, xs, make_batch(), NONE)  # noqa: E731
    np.testing.assert_array_equal(read(dirty), read(xs))
    gradient = jax.grad(lambda xs: jnp.sum(read(xs)))(dirty)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~valid].any()


# ---- what is dropped ----------------------------------------------------------------------------

NONE = review_model._Keys(*[None] * 5)
BIG = {"slot": np.zeros(7, np.int32), "label": np.zeros(1, np.int32)}


def big_batch():
    draw = np.random.default_rng(4)
    ids, pairs = draw.integers(4, V, (30, 7)), draw.integers(0, P + 1, (30, 7))
    return {"ids": ids.astype(np.int32), "pairs": pairs.astype(np.int32)}


def test_no_key_is_used_twice():
    key = jax.random.key(3)
    keys = [*review_model.split_keys(key), review_model.other_key(key)]
    assert len({tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}) == 6
    model = MODELS["vectors"]
    rates = {"word_dropout": 0.5, "embedding_dropout": 0.5, "input_dropout": 0.5, "dropout": 0.5}
    params, batch = jax.tree.map(np.float32, make_params(model)), make_batch()
    batch = {n: np.float32(a) if a.dtype == np.float64 else a for n, a in batch.items()}
    with jax.debug_key_reuse(True):  # JAX's own look at it
        for size, other in ((0.3, 0.0), (0.0, 0.3)):
            own = dataclasses.replace(model, adversarial=size, virtual=other, **rates)
            jax.jit(jax.grad(lambda *a, own=own: own.loss_fn(*a)[0]))(
                params, batch, jax.random.key(4)
            )


def test_a_dropped_word_takes_its_pairs_with_it():
    model = dataclasses.replace(MODELS["input"], word_dropout=0.3)
    params, batch = jax.tree.map(np.float32, make_params(model)), big_batch()
    key = jax.random.key(6)
    got = review_model.inputs(model, params, batch, NONE._replace(words=key))
    read = np.asarray(word_dropout(key, batch["ids"], 0.3, 2))
    assert 0.2 < np.mean(read == 2) < 0.4
    for t in range(30):
        for s in range(7):
            want = params["embed"][read[t, s]]
            whole = read[t, s] != 2 and (t == 0 or read[t - 1, s] != 2)
            if whole and batch["pairs"][t, s]:
                want = want + params["pairs"][batch["pairs"][t, s]]
            np.testing.assert_allclose(got[t, s], want, rtol=1e-6)


def test_ratios_and_places_stay_whatever_is_dropped():
    rates = dict.fromkeys(("word_dropout", "embedding_dropout", "input_dropout"), 0.6)
    model = dataclasses.replace(MODELS["ratios"], **rates)
    params, batch = jax.tree.map(np.float32, make_params(model)), big_batch()
    beside = np.random.default_rng(1).normal(size=(30, 7, 7)).astype(np.float32)
    batch |= {"ratios": beside[:, :, :3], "places": beside[:, :, 3:]}
    keys = review_model.split_keys(jax.random.key(3))
    got = np.asarray(review_model.inputs(model, params, batch, keys))
    np.testing.assert_array_equal(got[:, :, E:], beside)
    assert 0.5 < np.mean(got[:, :, :E] == 0) < 0.95


def test_a_words_vector_is_dropped_wherever_it_occurs():
    model = dataclasses.replace(MODELS["vectors"], embedding_dropout=0.5, normalise=False)
    params, batch = jax.tree.map(np.float32, make_params(model)), big_batch()
    keys = NONE._replace(embedding=jax.random.key(2))
    got = np.asarray(review_model.inputs(model, params, batch, keys))
    table = np.asarray(embedding_dropout(jax.random.key(2), params["embed"], 0.5))
    np.testing.assert_array_equal(got, table[batch["ids"]])
    dropped = {word for word in range(4, V) if not table[word].any()}
    assert 0 < len(dropped) < V - 4


def test_what_is_read_and_what_is_pooled_are_dropped_by_their_own_keys():
    """Features of the inputs at all steps of a segment alike; of the pooled vector, one by one."""
    batch, none = make_batch(), review_model.split_keys(None)
    model = ReviewModel(V, embedding_size=E, hidden_size=H, input_dropout=0.5, dropout=0.5)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), make_params(model))
    key = jax.random.key(4)
    whole = review_model.inputs(model, params, batch, none)
    xs = review_model.inputs(model, params, batch, none._replace(inputs=key))
    gone = np.asarray(xs == 0)
    assert 0.2 < gone.mean() < 0.8
    np.testing.assert_array_equal(gone, np.broadcast_to(gone[:1], gone.shape))
    np.testing.assert_allclose(xs, np.where(gone, 0, 2 * whole), rtol=1e-6)
    hs = review_model.outputs(model, params, whole, batch["length"])
    v = review_model.pooled(model.pooling, hs, batch["length"], batch["slot"], R)
    want = dropout(key, v, 0.5) @ params["kernel"][:, 0] + params["bias"][0]
    got = review_model.deep(model, params, whole, batch, none._replace(pooled=key))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.abs(got - review_model.deep(model, params, whole, batch, none)).max() > 0.1


def test_initial_laws_reach_the_parameters():
    own = review_model.init(ReviewModel(200, hidden_size=H, embedding_size=50), jax.random.key(0))
    table = np.abs(own["embed"])
    assert 0.049 < table.max() <= 0.05 and abs(table.mean() - 0.025) < 1e-3
    model = ReviewModel(V, hidden_size=H, embedding_size=E, forget_bias=2.5)
    for name in ("forward", "backward"):
        b = review_model.init(model, jax.random.key(0))[name]["b"]
        np.testing.assert_array_equal(b[H : 2 * H], np.full(H, 2.5))
        torch = dataclasses.replace(model, forget_bias=None, cell_init="torch")
        assert np.all(review_model.init(torch, jax.random.key(0))[name]["b"] != 0)


def test_terms_of_the_wide_path_are_dropped_one_by_one():
    draw = np.random.default_rng(5)
    path = draw.integers(1, V + P, (30, 7, 2)).astype(np.int32)
    params = {"path": draw.normal(size=V + P).astype(np.float32)}
    batch = {**BIG, "path": path, "ratio": draw.normal(size=V + P).astype(np.float32)}
    got = review_model.wide(params, batch, 1, jax.random.key(1), 0.25)
    terms = (params["path"] * batch["ratio"])[path]
    kept = np.asarray(dropout(jax.random.key(1), jnp.asarray(terms), 0.25))
    assert 0.15 < np.mean(kept == 0) < 0.35
    np.testing.assert_allclose(got, [kept.sum()], rtol=1e-5)


def test_a_review_is_left_out_of_its_own_ratios_in_training(x64):
    model = MODELS["path"]
    batch, params = make_batch(), make_params(model)
    without = np.random.default_rng(6).normal(size=(2, V + P))
    without[:, 0] = 0
    batch["ratio_without"] = without
    batch = jax.tree.map(jnp.asarray, batch)
    for key in (None, jax.random.key(1)):
        got = review_model.wide(params, batch, R, key, 0.0)
        want = np.zeros(R)
        for s in range(S):
            for t in range(LENGTHS[s]):
                for f in batch["path"][t, s].tolist():
                    ratio = batch["ratio"] if key is None else without[LABEL[SLOT[s]]]
                    want[SLOT[s]] += params["path"][f] * ratio[f]
        np.testing.assert_allclose(got, want, rtol=1e-12)


# ---- batches from a plan ------------------------------------------------------------------------


def tiny_data(count=23, seed=0):
    """Reviews of 1 to 17 ids, a plan's segments, and what a model reads beside them."""
    draw = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(draw.integers(1, 18, count))])
    total = offsets[-1]
    data = {
        "ids": draw.integers(1, V, total).astype(np.int32),
        "path": draw.integers(0, V + P, (total, 2)).astype(np.int32),
        "ratio": np.concatenate([[0], draw.normal(size=V + P - 1)]),
        "label": draw.integers(0, 2, count).astype(np.int32),
        "ratios": draw.normal(size=(total, 3)).astype(np.float32),
        "places": draw.normal(size=(total, 4)).astype(np.float32),
    }
    return data, offsets, chops.segments(offsets, T)


def test_a_batch_has_the_tokens_of_its_reviews():
    data, offsets, cut = tiny_data()
    cut_like_ids = ("ids", "path", "ratios", "places")
    packed = chops.pack(cut, np.arange(1, 23)[::-1], 9)
    plan = chops.lay_out(cut, packed, 10)
    take = jax.jit(review_model.chops(T))
    for k in range(len(packed.load)):
        batch = take(data, {name: array[k] for name, array in plan.items()})
        found = {}
        for s in range(10):
            n = int(batch["length"][s])
            assert not any(batch[name][n:, s].any() for name in cut_like_ids)
            if n:
                row = int(plan["rows"][k, batch["slot"][s]])
                so_far = found.setdefault(row, {name: [] for name in cut_like_ids})
                for name, own in so_far.items():
                    own += batch[name][:n, s].tolist()
        assert list(found) == packed.rows[packed.batch == k].tolist()
        for row, each in found.items():
            for name, own in each.items():
                assert own == data[name][offsets[row] : offsets[row + 1]].tolist()
        np.testing.assert_array_equal(batch["label"], data["label"][plan["rows"][k]])
        np.testing.assert_array_equal(batch["weight"], plan["weight"][k])
        np.testing.assert_array_equal(batch["ratio"], np.float32(data["ratio"]))


@pytest.mark.parametrize("name", ["path", "gates"])
def test_two_devices_take_the_steps_of_one(name, x64):
    """Nothing is dropped; the adversary is there."""
    model, (data, _, cut) = MODELS[name], tiny_data()
    if name == "gates":
        data = {k: data[k] for k in ("ids", "label")}
    params, clock = make_params(model), train.Clock()
    found = {}
    for count in (1, 2, 3):
        devices = jax.devices()[:count]
        packed = chops.pack(cut, np.arange(23), 14, count)
        plan = chops.lay_out(cut, packed, chops.width([packed]))
        tx = optax.sgd(0.1)
        step = train.make_train_step(model.loss_fn, tx, axis_name=parallel.AXIS)
        advance = parallel.runner(step, devices, clock, batch_of=review_model.chops(T))
        state = train.init_state(params, tx, jax.random.key(1))
        state, metrics = advance(
            parallel.place(state, devices), parallel.place(data, devices), plan
        )
        found[count] = jax.tree.leaves((jax.device_get(state.params), metrics))
        assert len(plan["rows"]) > 4

        metric = lambda p, batch: model.loss_fn(p, batch)[1]  # noqa: E731
        evaluate = parallel.evaluator(metric, devices, clock, batch_of=review_model.chops(T))
        placed = parallel.place((params, data), devices)
        means = evaluate(*placed, plan)
        found[count] += [means["loss"], means["accuracy"]]
    for count in (2, 3):
        for one, several in zip(found[1], found[count], strict=True):
            np.testing.assert_allclose(several, one, rtol=1e-10, atol=1e-12)


# ---- averages -----------------------------------------------------------------------------------


def test_the_average_by_hand(x64):
    tx, plain = averaged(optax.sgd(0.5), 0.75), optax.sgd(0.5)
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    state, other, history = tx.init(params), plain.init(params), []
    draw, mean = np.random.default_rng(3), None
    for t in range(1, 9):
        g = {"a": jnp.asarray(draw.normal(size=2)), "b": jnp.asarray(draw.normal())}
        updates, state = tx.update(g, state, params)
        wanted, other = plain.update(g, other, params)
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), updates, wanted))
        params = optax.apply_updates(params, updates)
        history.append(np.array([*params["a"], params["b"]]))
        mean = history[0] if t == 1 else mean
        d = min(0.75, (t - 1) / t)
        mean = d * mean + (1 - d) * history[-1]
        got = np.array([*state.mean["a"], state.mean["b"]])
        np.testing.assert_allclose(got, mean, rtol=1e-12)
        if t <= 4:
            np.testing.assert_allclose(got, np.mean(history, axis=0), rtol=1e-12)
    assert int(state.count) == 8


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_average_of_16_bit_weights_goes_on_moving(dtype):
    """0.999 is 1 in bfloat16: a mean of 16 bits would stand still at the first steps' one."""
    tx = averaged(optax.sgd(1.0), 0.999)
    params = jnp.zeros(2, dtype)

    def step(both, t):
        params, state = both
        down = jnp.where(t % 400 < 200, -1, 1).astype(dtype)  # up to 200, which 8 bits hold
        updates, state = tx.update(down * jnp.array([1, 0.5], dtype), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), weights = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(3000))
    assert state.mean.dtype == jnp.float32
    mean = np.zeros(2)
    for t, row in enumerate(np.float64(weights.astype(jnp.float32)), 1):
        d = min(0.999, (t - 1) / t)
        mean = d * mean + (1 - d) * row
    assert np.abs(mean).min() > 1
    np.testing.assert_allclose(state.mean, mean, rtol=1e-4)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_is_below_1(decay):
    with pytest.raises(ValueError, match=f"decay: got {decay}"):
        averaged(optax.sgd(0.5), decay)
