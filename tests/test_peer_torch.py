"""The source programs in PyTorch: the same functions, laws, batches and scores as ours."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peer_runs
import problems
import pytest

from lstmjax import interop, tables
from lstmjax.records import RunError, validate
from lstmjax.train import Clock

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
# PyTorch's own warnings are not ours to mend.
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def modules():
    """peers.py and peer_torch.py as modules."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.syspath_prepend(str(EXPERIMENTS))
        import peer_torch
        import peers

        peer_torch.load(0)
        yield peers, peer_torch
        for name in ("peers", "peer_torch", "peer_tasks"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def programs(modules):
    return modules[1]


def test_the_programs_are_those_that_peers_knows(modules):
    peers, programs = modules
    assert sorted(programs.PROGRAMS) == sorted(peers.ROWS["torch"])


# ---- the functions ------------------------------------------------------------------------------


def randomise(programs, model, seed):
    """Other weights than the laws', of all that is trained."""
    rng = np.random.default_rng(seed)
    with programs.torch.no_grad():
        for weights in programs.trained(model):
            drawn = rng.normal(0, 0.3, weights.shape).astype(np.float32)
            weights.copy_(programs.torch.from_numpy(drawn))


def lstm_of(layer, of):
    """A layer's weights, or their gradients, as ours."""
    arrays = {name: np.array(of(weights)) for name, weights in layer.named_parameters()}
    params = interop.load("torch", arrays)._asdict()
    return {name: a for name, a in params.items() if a is not None}


def values(weights):
    return weights.detach().numpy()


def gradients(weights):  # of the bias that is not trained there is none
    return np.zeros(weights.shape, np.float32) if weights.grad is None else weights.grad.numpy()


def tree_of(model, of):
    """A model of PyTorch as the parameters of ``SequenceModel``."""
    head = {"kernel": of(model.head.weight).T, "bias": of(model.head.bias)}
    if hasattr(model, "embed"):
        layers = {
            f"layer_{n}": {"weights": lstm_of(layer, of)}
            for n, layer in enumerate((model.first, model.second))
        }
        return {"embed": {"embedding": of(model.embed.weight)}, **layers, "head": head}
    return {"layer_0": {"weights": lstm_of(model.lstm, of)}, "head": head}


def reviews_of(rng):
    ids = rng.integers(0, 10_000, (5, 9)).astype(np.int32)
    return {"ids": ids, "label": np.array([1, 0, 0, 1, 1], np.int32)}


def digits_of(rng):
    image = rng.integers(0, 256, (6, 28, 28)).astype(np.uint8)
    return {"image": image, "label": rng.integers(0, 10, 6).astype(np.int32)}


@pytest.mark.parametrize("row", ["imdb-tf2", "mnist-tf1", "mnist-corrected"])
def test_the_loss_and_the_gradient_of_the_first_step_are_ours(row, programs):
    ours = runpy.run_path(str(EXPERIMENTS / f"{row.partition('-')[0]}.py"))
    config, rng = ours["ROWS"][row], np.random.default_rng(4)
    if row == "imdb-tf2":
        problem, batch = programs.reviews_problem(), reviews_of(rng)
        splits = programs.in_torch({"few": tuple(batch.values())}, np.int64, np.float32)
    else:
        problem, batch = programs.digits_problem(row == "mnist-tf1"), digits_of(rng)
        arrays = np.float32(batch["image"]) / 255, batch["label"]
        splits = programs.in_torch({"few": arrays}, np.float32, np.int64)
    model, (x, y) = problem.model, splits["few"]
    randomise(programs, model, 7)
    params = jax.tree.map(jnp.array, tree_of(model, values))

    model.eval()  # nothing is dropped; what is, is looked at below
    logits = model(x)
    loss = problem.loss(logits, y)
    loss.backward()

    loss_fn = ours["make_loss"](ours["make_model"](config), config)
    batch["weight"] = np.ones(len(y), np.float32)
    run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=problems.QUICK)
    (expected, metrics), wanted = run(params, jax.tree.map(jnp.array, batch))
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    assert int(problem.right(logits, y).sum()) == float(metrics["accuracy"][0])
    found = tree_of(model, gradients)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        error = np.max(np.abs(np.asarray(got, float) - want)) / np.max(np.abs(want))
        assert error < 1e-5, (path, error)


def test_a_review_drops_the_same_features_at_all_steps(programs):
    torch = programs.torch
    xs = torch.randint(1, 9, (40, 6, 50)).float()  # so that 1.25 x / x is exact
    assert programs.dropped(xs, 0.2, False) is xs
    kept = values(programs.dropped(xs, 0.2, True) / xs)
    np.testing.assert_array_equal(kept, np.broadcast_to(kept[:, :1], kept.shape))
    masks = kept[:, 0]
    assert set(np.unique(masks.round(5))) == {0.0, 1.25}
    assert abs(np.mean(masks == 0) - 0.2) < 4 * (0.2 * 0.8 / masks.size) ** 0.5
    assert len({row.tobytes() for row in masks}) == 40

    # Both layers' inputs go through it, in training alone.
    model, seen = programs.Reviews(), []
    for layer in (model.first, model.second):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(values(inputs[0])))
    with torch.no_grad():
        ids = torch.randint(1, 10_000, (8, 5))
        model(ids)
        model.eval()(ids)
    shares = [np.mean(np.all(inputs == 0, axis=1)) for inputs in seen]
    assert 0.1 < shares[0] < 0.3 and 0.1 < shares[1] < 0.3 and shares[2:] == [0, 0]


# ---- laws and optimisers ------------------------------------------------------------------------


def test_initial_laws_are_those_of_the_sources(programs):
    programs.torch.manual_seed(5)
    reviews, digits = programs.Reviews(), programs.Digits()
    for layer in (reviews.first, reviews.second, digits.lstm):
        hidden = layer.hidden_size
        bias = np.repeat([0.0, 1.0, 0.0, 0.0], hidden)
        np.testing.assert_array_equal(values(layer.bias_ih_l0), bias)
        np.testing.assert_array_equal(values(layer.bias_hh_l0), 0)
    limits = [
        (reviews.embed.weight, 0.05), (reviews.first.weight_ih_l0, (6 / 356) ** 0.5),
        (reviews.second.weight_ih_l0, (6 / 320) ** 0.5), (reviews.head.weight, (6 / 65) ** 0.5),
        (digits.lstm.weight_ih_l0, (6 / 528) ** 0.5), (digits.lstm.weight_hh_l0, (6 / 528) ** 0.5),
    ]  # fmt: skip
    for weights, limit in limits:
        assert 0.93 * limit < np.abs(values(weights)).max() <= limit
        assert abs(values(weights).std() * 3**0.5 / limit - 1) < 0.15
    for layer in (reviews.first, reviews.second):
        w_h = values(layer.weight_hh_l0).astype(float)
        np.testing.assert_allclose(w_h.T @ w_h, np.eye(64), atol=1e-5)
    assert np.abs(values(digits.head.weight)).max() <= 0.2
    assert abs(values(digits.head.weight).std() / 0.08796 - 1) < 0.1  # cut off at 2 σ
    np.testing.assert_array_equal(values(digits.head.bias), np.float32(0.1))
    np.testing.assert_array_equal(values(reviews.head.bias), 0)


@pytest.mark.parametrize("row", ["imdb-tf2", "mnist-corrected"])
def test_an_update_is_adams_and_leaves_the_second_bias_at_zero(row, programs):
    torch, rng = programs.torch, np.random.default_rng(2)
    if row == "imdb-tf2":
        problem, rate, epsilon = programs.reviews_problem(), 1e-3, 1e-7
        x, y = torch.from_numpy(rng.integers(0, 10_000, (5, 9))), torch.ones(5)
        layers = (problem.model.first, problem.model.second)
        assert (problem.batch_size, problem.drop_remainder) == (128, True)
    else:
        problem, rate, epsilon = programs.digits_problem(False), 1e-4, 1e-8
        x, y = torch.rand(5, 28, 28), torch.from_numpy(rng.integers(0, 10, 5))
        layers = (problem.model.lstm,)
        assert (problem.batch_size, problem.drop_remainder) == (50, False)
    settings = problem.adam.defaults
    assert (settings["lr"], settings["eps"], settings["betas"]) == (rate, epsilon, (0.9, 0.999))
    assert settings["weight_decay"] == 0 and not settings["amsgrad"]
    before = [values(weights).copy() for weights in problem.model.parameters()]
    problem.loss(problem.model(x), y).backward()
    problem.adam.step()
    after = [values(weights) for weights in problem.model.parameters()]
    for layer in layers:
        np.testing.assert_array_equal(values(layer.bias_hh_l0), 0)
    moved = [np.abs(b - a) for a, b in zip(before, after, strict=True)]
    assert sum(np.max(step) > 0 for step in moved) == len(moved) - len(layers)
    # Adam's first step is the learning rate but where gradients are tiny.
    np.testing.assert_allclose(max(np.max(step) for step in moved), rate, rtol=1e-2)
    np.testing.assert_allclose(np.median(moved[-1]), rate, rtol=1e-2)  # the head's bias


def test_a_seed_says_which_weights_orders_and_masks(programs):
    def drawn(seed):
        assert programs.load(seed) == {"torch": programs.torch.__version__}
        model = programs.Reviews()
        ids = programs.torch.arange(40).reshape(8, 5)
        (batch, _), *_ = programs.shuffled(ids, ids[:, 0], 8, False)
        return [values(model.first.weight_hh_l0), values(batch), values(model(batch))]

    one, again, other = drawn(3), drawn(3), drawn(4)
    for a, b, c in zip(one, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(a != c)


# ---- loops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_every_pass_has_its_own_order_of_all_rows(drop_remainder, programs):
    torch = programs.torch
    torch.manual_seed(7)
    x, y = torch.arange(53.0)[:, None] + torch.zeros(1, 3), 10 * torch.arange(53)
    orders = []
    for _ in range(2):
        batches = list(programs.shuffled(x, y, 10, drop_remainder))
        assert [len(a) for a, _ in batches] == [10] * 5 + [3] * (not drop_remainder)
        rows, labels = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
        np.testing.assert_array_equal(10 * rows[:, 2], labels)
        assert len(set(labels.tolist())) == len(labels)
        orders.append(labels.tolist())
    assert orders[0] != orders[1] != sorted(orders[1])


def test_the_first_batch_is_compile_and_the_rest_is_not(programs):
    class Steps(Clock):  # a clock on which each batch takes what it says
        now = 0.0

        def __call__(self, name):
            self.name = name
            return super().__call__(name)

    clock, on = Steps(), []
    run = lambda a, b: on.append((clock.name, a + b)) or a + b  # noqa: E731
    assert programs.timed(clock, "train", run, [(1, 2), (3, 4), (5, 6)]) == [3, 7, 11]
    assert programs.timed(clock, "train", run, [(7, 8)]) == [15]
    assert programs.timed(clock, "eval", run, [(9, 9)]) == [18]
    names = ["compile", "train", "train", "train", "compile"]
    assert on == list(zip(names, (3, 7, 11, 15, 18), strict=True))


def test_means_weigh_every_example_alike(programs):
    found = programs.means([(2.0, 3, 4), (5.0, 1, 2)])
    assert found == {"loss": pytest.approx(3.0), "accuracy": pytest.approx(4 / 6)}


@pytest.mark.parametrize("row", peer_runs.ROWS)
def test_scores_are_those_that_the_tables_show(row, modules, monkeypatch):
    peers, programs = modules
    config = peers.Config(row, "torch", seed=6, data="offline")
    counted = {"test": 21, "validation": 9, "train": 128 if "imdb" in row else 130}
    peer_runs.check_scores(programs, config, monkeypatch, counted)


def test_a_look_leaves_what_the_tables_refuse(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(EXPERIMENTS.parent), "JAX_PLATFORMS": "cpu"}
    flags = "--row imdb-tf2 --framework torch --data offline --limit 150 --seed 2"
    arguments = [sys.executable, str(EXPERIMENTS / "peers.py"), *flags.split(), "--out", "a.json"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("record in a.json\n")
    record = json.loads((tmp_path / "a.json").read_text())
    assert validate(record) == []
    name = f"torch {record['environment']['torch']}"
    assert record["peer"] == {
        "row": "imdb-tf2, the first 150, on made-up data",
        "framework": name,
    }
    assert record["command"] == f"python experiments/peers.py {flags} --out a.json"
    assert record["dataset"]["name"] == "offline_reviews" and record["seed"] == 2
    assert not {"jax", "jaxlib", "flax", "optax"} & set(record["environment"])
    assert len(record["seconds"]["train_epochs"]) == 4
    with pytest.raises(RunError, match="a.json: got the row 'imdb-tf2, the first 150', expected"):
        tables.load_groups(tmp_path)
