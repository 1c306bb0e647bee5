"""Many runs in one program: each lane is the run it stands for, and a sweep never sees the test."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from matplotlib.colors import to_rgba

from lstmjax import lane_classifiers, lane_runs, lanes, losses, optim, parallel, plots, seeds, train
from lstmjax.cli import ConfigError
from lstmjax.lanes import Lane
from lstmjax.models import SequenceModel
from lstmjax.records import RunError

# ---- a lane is its run --------------------------------------------------------------------------

MODEL = SequenceModel("lstm", 3, 1, dropout=0.4, recurrent_dropout=0.3)
SIZE, HELD, BATCH, EPOCHS = 26, 5, 4, 2


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 3
    seeds: int = 1
    sweep: str | None = None
    learning_rate: float = 0.05
    clip_norm: float | None = None
    epochs: int = EPOCHS
    batch_size: int = BATCH
    test_every_epoch: bool = False
    devices: int | None = 2
    save_every: str = "60s"
    keep: int = 2
    resume: str | None = None
    on_nan: str = "stop"
    deterministic: bool = False
    cell: str = "lstm"
    out: str | None = None


def a_problem():
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(SIZE, 4, 2)), "y": rng.normal(size=(SIZE, 1))}


def loss_fn(params, batch, key=None):
    _, said = MODEL.apply({"params": params}, batch["x"], key=key)
    loss = losses.total(losses.squared_error(said, batch["y"]), batch["weight"])
    return losses.mean(loss), {"loss": loss}


def optimiser(config):
    return optim.clipped(optim.tf_adam(config.learning_rate), config.clip_norm)


def start(config, data):
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    params = MODEL.init(init_key, data["x"][:1].astype(np.float32))["params"]
    params = jax.tree.map(lambda a: a.astype(data["x"].dtype), params)
    return train.init_state(params, optimiser(config), step_key)


def rows_of(seed):
    """Which examples a seed trains on: not those that it holds out."""
    return np.sort(np.random.default_rng(seed).permutation(SIZE)[HELD:])


def like(plan, data):
    return {**plan, "weight": plan["weight"].astype(data["x"].dtype)}


def runner(config, device):
    step = train.make_train_step(loss_fn, optimiser(config), axis_name=parallel.AXIS)
    return parallel.runner(step, [device], Counting())


def alone(config, data, device, advance):
    """The run of one seed as the experiments make it, on its own examples: state and losses."""
    own = {name: a[rows_of(config.seed)] for name, a in data.items()}
    state = parallel.place(start(config, data), [device])
    placed, found = parallel.place(own, [device]), []
    for epoch in range(1, config.epochs + 1):
        for plan in train.plan_epoch(
            len(own["y"]), config.batch_size, seed=config.seed, epoch=epoch, at_most=3
        ):
            state, metrics = advance(state, placed, like(plan, data))
            found.append(metrics["loss"])
    return state, [np.concatenate(part) for part in zip(*found, strict=True)]


class Counting(train.Clock):
    """Compiles quickly, and counts."""

    compiled = 0

    def compile(self, run, *arguments):
        self.compiled += 1
        return run.lower(*arguments).compile(problems.QUICK)


def together(config, data, devices, how=None):
    """The same of all lanes: program, and the losses of each."""

    def make_step(config):
        return train.make_train_step(lanes.first_device(loss_fn), optimiser(config))

    clock = Counting()
    program = lanes.Program(
        config, devices, clock, start=lambda config: start(config, data), make_step=make_step,
        data=data, how=how,
    )  # fmt: skip
    own = program.lanes
    found = [[] for _ in own]
    rows = [rows_of(lane.seed) for lane in own]
    for epoch in range(1, config.epochs + 1):
        for plans in lanes.pieces(own, rows, epoch, config.batch_size, at_most=3):
            metrics = program.advance([like(plan, data) for plan in plans])
            for losses_of_lane, one in zip(found, metrics, strict=True):
                losses_of_lane.append(one["loss"])
    assert clock.compiled == 1  # for every piece of every epoch of every lane
    return program, [[np.concatenate(p) for p in zip(*own, strict=True)] for own in found]


def compare(config, devices, how, data, rtol):
    program, found = together(config, data, jax.devices()[:devices], how)
    assert len(program.devices) == min(devices, len(program.lanes))
    device = jax.devices()[0]
    params, finals, runners = program.params(), [], {}
    for lane, own, losses_of_lane in zip(program.lanes, params, found, strict=True):
        single = dataclasses.replace(config, seed=lane.seed, **lane.swept)
        key = tuple(lane.swept.items())
        runners[key] = runners.get(key) or runner(single, device)
        state, (sums, counts) = alone(single, data, device, runners[key])
        got, want = jax.tree.leaves(own), jax.tree.leaves(state.params)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype == data["x"].dtype
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(losses_of_lane[0], sums, rtol=rtol)
        np.testing.assert_array_equal(losses_of_lane[1], counts)
        assert program.step() == state.step == len(sums) == 12
        finals.append(own["layer_0"]["weights"]["w_h"])
    apart = [np.abs(a - b).max() for i, a in enumerate(finals) for b in finals[:i]]
    assert min(apart) > 1e-3  # or the comparison would say nothing
    return program


def test_two_seeds_at_once_are_their_own_runs(x64):
    compare(Config(seeds=2), 1, "vmap", a_problem(), 1e-10)


def test_three_seeds_on_two_devices_are_their_own_runs_and_go_on_elsewhere(x64):
    data, config = a_problem(), Config(seeds=3)
    program = compare(config, 2, None, data, 1e-10)
    assert len(program.states.step) == 4  # the last one twice: three are no multiple of two
    packed = program.pack(program.states)
    packed = packed._replace(**{n: np.asarray(getattr(packed, n)) for n in ("step",)})
    assert len(packed.step) == len(packed.key) == 3
    other, _ = together(dataclasses.replace(config, epochs=1), data, jax.devices()[:1])
    other.put(packed)
    plans = [like(p, data) for p in lanes.pieces(program.lanes, [rows_of(3)] * 3, 9, 4)[0]]
    for got, want in zip(other.advance(plans), program.advance(plans), strict=True):
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-12)


def test_in_float32_seeds_are_their_own_runs_and_have_their_own_scores():
    data = jax.tree.map(np.float32, a_problem())
    program = compare(Config(seeds=3), 4, "vmap", data, 1e-5)
    metric_fn = lambda params, batch: loss_fn(params, batch)[1]  # noqa: E731
    evaluate = lanes.evaluator(metric_fn, Counting(), batch_size=4)
    held = [np.setdiff1d(np.arange(SIZE), rows_of(lane.seed)) for lane in program.lanes]
    single = parallel.evaluator(metric_fn, jax.devices()[:1], Counting(), batch_size=4)
    params = program.params()
    for places, arrays in (([0, 1, 2], program.data), ([2], {n: -a for n, a in data.items()})):
        found = evaluate(program, [params[n] for n in places], arrays, [held[n] for n in places])
        for place, got in zip(places, found, strict=True):
            own = {name: np.asarray(a)[held[place]] for name, a in arrays.items()}
            assert got == pytest.approx(single(params[place], own), rel=1e-6)


@pytest.mark.parametrize("sweep", ["lr=0.02,0.07", "clip_norm=0.1,0.3"])
def test_each_value_of_a_sweep_is_its_own_run(sweep, x64):
    # Adam forgets how long a gradient is, but for ε and for its first steps.
    compare(Config(seeds=1, sweep=sweep), 2, None, a_problem(), 1e-10)


def test_equal_parts_are_equal():
    plan = train.plan_batches(np.arange(36), 3)
    for at_most, sizes in ((5, [4] * 3), (12, [12]), (100, [12]), (1, [1] * 12)):
        parts = lanes.equal_parts(plan, at_most)
        assert [len(part["rows"]) for part in parts] == sizes
        for name, whole in plan.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole)


# ---- choosing -----------------------------------------------------------------------------------


def swept(*values, count=2):
    return [Lane(s, {"learning_rate": v}, f"lr{v}-seed{s}") for v in values for s in range(count)]


def test_the_best_mean_is_chosen():
    own = swept(0.1, 0.2, 0.3)
    values = [0.9, 0.1, 0.5, 0.7, 0.6, 0.5]  # means 0.5, 0.6, 0.55: the best seed does not count
    found = lanes.choose(own, "validation_accuracy", values, highest=True)
    assert found.lanes == [2, 3] and found.swept == {"learning_rate": 0.2}
    half = 12.706204736 * math.sqrt(0.02) / math.sqrt(2)
    assert found.metrics["sweep_validation_accuracy_ci95"][1] == pytest.approx(half, rel=1e-8)
    assert found.metrics["sweep_validation_accuracy_mean"] == pytest.approx([0.5, 0.6, 0.55])
    assert found.metrics["sweep_lr"] == [0.1, 0.2, 0.3]
    assert found.metrics["sweep_chosen_lr"] == 0.2 and found.metrics["sweep_used_validation"] == 1
    assert found.line.startswith("chosen by validation_accuracy: lr 0.2 (lr 0.1: 0.5 ± 5.08")
    found = lanes.choose(own, "train_mse", values, highest=False)
    assert found.lanes == [0, 1] and found.metrics["sweep_used_validation"] == 0
    assert "chosen by train_mse (there is no validation split): lr 0.1" in found.line


def test_of_equal_ones_the_first_is_chosen_and_what_is_not_finite_never():
    own = swept(0.1, 0.2, 0.3, 0.4)
    values = [0.0, math.inf, 0.5, 0.5, 0.4, 0.6, 1.0, math.nan]
    for highest in (True, False):
        assert lanes.choose(own, "mse", values, highest=highest).lanes == [2, 3]
    with pytest.raises(RunError, match="--sweep: no value ended in a finite mse"):
        lanes.choose(own, "mse", [math.nan, 1.0] * 4, highest=False)


def test_without_a_sweep_all_are_chosen():
    own = lanes.lanes_of(Config(seeds=3))
    found = lanes.choose(own, "validation_accuracy", [math.nan] * 3, highest=True)
    assert found == ([0, 1, 2], {}, {}, "")


def test_the_lanes_of_a_configuration():
    own = lanes.lanes_of(Config(seeds=2, sweep="lr=1e-3,3e-3"))
    assert [lane.name for lane in own] == [
        "lr0.001-seed3", "lr0.001-seed4", "lr0.003-seed3", "lr0.003-seed4"
    ]  # fmt: skip
    assert [lane.seed for lane in own] == [3, 4, 3, 4]
    assert [lane.swept["learning_rate"] for lane in own] == [1e-3, 1e-3, 3e-3, 3e-3]
    assert lanes.lanes_of(Config(sweep="clip_norm=1,2"))[1] == (
        3,
        {"clip_norm": 2.0},
        "clip_norm2.0-seed3",
    )
    assert [lane.name for lane in lanes.lanes_of(Config(seeds=2))] == ["seed3", "seed4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds: got 0, expected an integer of at least 1"),
        ({"seeds": 2**31 - 2}, "--seeds: got 2147483646, expected seeds below 2147483648"),
        ({"seeds": 1001}, "--seeds: got 1001, expected at most 1000 in one program"),
        ({"sweep": "dropout=0.1,0.2"}, "sweep: got 'dropout=0.1,0.2', expected lr=A,B,… or clip_n"),
        ({"sweep": "lr"}, "sweep: got 'lr', expected lr=A,B,… with two or more different numbers"),
        ({"sweep": "lr=0.1"}, "sweep: got 'lr=0.1', expected lr=A,B,… with two or more"),
        ({"sweep": "lr=0.1,0.1"}, "sweep: got 'lr=0.1,0.1', expected lr=A,B,… with two or more"),
        ({"sweep": "lr=0.1,-1"}, "sweep: got 'lr=0.1,-1', expected lr=A,B,… with two or more"),
        ({"sweep": "lr=0.1,nan"}, "sweep: got 'lr=0.1,nan', expected lr=A,B,… with two or more"),
        ({"sweep": "lr=0.1,x"}, "sweep: got 'lr=0.1,x', expected lr=A,B,… with two or more"),
        ({"sweep": "lr=0.1,0.2", "test_every_epoch": True}, "--test-every-epoch: got True, expec"),
    ],
)
def test_what_cannot_be_asked_for_is_named(changes, message):
    with pytest.raises(ValueError) as error:
        lanes.check(dataclasses.replace(Config(), **changes))
    assert str(error.value).startswith(message)


def test_some_flags_are_for_one_run_alone():
    for flag in ("live", "diagnose", "distributed"):
        config = SimpleNamespace(seed=0, seeds=2, sweep=None, **{flag: True})
        with pytest.raises(ConfigError, match=f"--{flag}: got True, expected none with --seeds 2"):
            lanes.check(config)
        lanes.check(SimpleNamespace(seed=0, seeds=1, sweep=None, **{flag: True}))
    with pytest.raises(ConfigError, match="--sweep: got lr=1,2, expected no sweep without valid"):
        lanes.check(Config(sweep="lr=1,2"), validation=False)
    lanes.check(Config(seeds=2), validation=False)


# ---- whole runs of classifiers ------------------------------------------------------------------


def guess(params, batch, key=None):
    """Says yes where w > 1/2; trained on yeses alone, w grows by the learning rate at each step."""
    logits = jnp.where(batch["weight"] >= 0, params["w"] - 0.5, 0)
    loss = losses.total(losses.binary_cross_entropy(logits, batch["label"]), batch["weight"])
    accuracy = losses.total(losses.binary_correct(logits, batch["label"]), batch["weight"])
    return losses.mean(loss), {"loss": loss, "accuracy": accuracy}


def labels(value, count=8):
    return lane_classifiers.Split.whole({"label": np.full(count, value, np.int32)})


PLANTED = lane_classifiers.Problem(
    guess,
    lambda key: {"w": jnp.zeros(())},
    lambda config, updates: optax.sgd(config.learning_rate),
    # The larger rate is right on all of the test split, and wrong on all of validation.
    {"train": labels(1), "validation": labels(0), "test": labels(1)},
    "answers",
)
DATASET = SimpleNamespace(
    title="yes or no", name="sin", source="generated", sha256="0123456789abcdef" * 4
)


def test_a_sweep_is_chosen_on_validation_alone(tmp_path, capsys):
    config = Config(seeds=2, sweep="lr=3,0.01", out=str(tmp_path / "a"))
    lane_classifiers.classify("mnist", config, PLANTED, DATASET, row=None)
    record = json.loads((tmp_path / "a" / "record.json").read_text())["metrics"]
    assert record["sweep_chosen_lr"] == 0.01
    assert record["sweep_validation_accuracy_mean"] == [0.0, 1.0]
    assert record["validation_accuracy"] == [1.0, 1.0] and record["test_accuracy"] == [0.0, 0.0]
    lines = [
        json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    scored = [name for line in lines for name in line if name.startswith("test_")]
    # Once, at the end, and only the lanes that were chosen.
    assert sorted(scored) == sorted(
        f"test_{metric}{lane}"
        for metric in ("accuracy", "loss")
        for lane in ("", "/lr0.01-seed3", "/lr0.01-seed4")
    )
    names = {path.name for path in (tmp_path / "a").iterdir()}
    saved = {f"params-lr{value}-seed{n}.safetensors" for value in ("3.0", "0.01") for n in (3, 4)}
    assert saved | {"accuracy.png", "sweep.png"} <= names
    every = capsys.readouterr().out.splitlines()
    said = [line for line in every if not line.startswith("epoch ")]
    assert len(every) - len(said) == 2 + 2 + 1  # test is scored after the last epoch alone
    assert said[0].endswith(": seeds 3 to 4, lr=3,0.01, in one program")
    assert said[1].startswith("chosen by validation_accuracy: lr 0.01 (lr 3.0: 0 ± 0, lr 0.01: 1 ±")
    assert said[2].startswith("test accuracy 0.0000 ± 0.0000 (seeds 3 to 4) after 2 epochs on yes")


def test_a_value_that_is_too_large_ends_no_sweep_and_is_not_chosen(tmp_path):
    right = {"train": labels(1), "validation": labels(1), "test": labels(1)}

    def broken(params, batch, key=None):  # beyond w = 1 the loss is NaN, and yes is said for ever
        loss, metrics = guess(params, batch, key)
        nan = jnp.where(params["w"] > 1, jnp.nan, 1.0)
        return loss * nan, {**metrics, "loss": (metrics["loss"][0] * nan, metrics["loss"][1])}

    problem = PLANTED._replace(loss_fn=broken, splits=right)
    config = Config(sweep="lr=5,0.01", out=str(tmp_path / "a"))
    lane_classifiers.classify("mnist", config, problem, DATASET, row=None)
    record = json.loads((tmp_path / "a" / "record.json").read_text())["metrics"]
    assert record["sweep_validation_accuracy_mean"] == ["nan", 0.0]
    assert record["sweep_chosen_lr"] == 0.01
    # Of seeds alone none may end so.
    config = Config(seeds=2, learning_rate=5.0, out=str(tmp_path / "b"))
    with pytest.raises(RunError, match="^seed3, step 2: the loss is nan, the gradient's norm") as e:
        lane_classifiers.classify("mnist", config, problem, DATASET, row=None)
    assert "nonfinite-seed3-2.json" in str(e.value)
    report = json.loads((tmp_path / "b" / "nonfinite-seed3-2.json").read_text())
    assert report["step"] == 2 and report["loss"] == "nan"
    order = np.random.default_rng([3, 1]).permutation(8)[4:]  # of the first epoch, the second batch
    assert report["rows"] == order.tolist()


def test_more_than_the_batch_wants_is_refused(tmp_path):
    problem = PLANTED._replace(drop_remainder=True)
    config = Config(seeds=2, batch_size=9, out=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match="--batch-size: got 9, expected at most 8, the training"):
        lane_classifiers.classify("mnist", config, problem, DATASET, row=None)
    assert not list(tmp_path.iterdir())


# ---- what is kept and drawn ---------------------------------------------------------------------


class Log(list):
    def log(self, step, **line):
        self.append((step, line))


def test_scores_of_lanes_by_hand_and_as_they_were_saved():
    own, log = lanes.lanes_of(Config(seeds=2)), Log()
    scores = lane_runs.Scores(log, own)
    half = [
        {"loss": (np.float32([1, 2]), np.float32([2, 2]))},
        {"loss": (np.float32([5]), np.float32([1]))},
    ]
    assert scores.piece(2, 1, half) == [{"loss": 0.75}, {"loss": 5.0}]
    assert log[-1] == (2, {"epoch": 1, "loss": 2.875, "loss/seed3": 0.75, "loss/seed4": 5.0})
    again = lane_runs.Scores(log, own)
    again.restore(json.loads(json.dumps(scores.progress())))
    for one in (scores, again):
        one.count(half)
        trained = one.trained()
        assert trained == [{"loss": 0.75}, {"loss": 5.0}]
        one.add("train", 4, 1, trained, [0, 1])
        one.add("train", 8, 2, [{"loss": 0.5}, {"loss": 4.0}], [0, 1])
        one.add("test", 8, 2, [{"loss": 0.25}], [1])
        assert one.metrics(0) == {"train_loss": 0.5, "train_loss_epochs": [0.75, 0.5]}
        assert one.metrics(1)["test_loss_epochs"] == [0.25]
        assert one.curve("train", "loss", [1]) == ([1, 2], [[5.0, 4.0]])
    assert log[-1] == (8, {"epoch": 2, "test_loss": 0.25, "test_loss/seed4": 0.25})
    skipped = {"loss": (np.zeros(1, np.float32), np.zeros(1, np.float32))}
    scores.count([half[0], skipped])
    first, second = scores.trained()
    assert first == {"loss": 0.75} and np.isnan(second["loss"])  # and no best loss of all
    third = lane_runs.Scores(log, own)
    third.restore(json.loads(json.dumps(again.progress())))
    assert third.metrics(1) == again.metrics(1)


def test_skipped_steps_are_counted_by_lane_and_a_lane_of_nothing_else_is_an_error(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lane_runs, "MOST_SKIPPED", 4)
    one = np.ones(3, np.float32)
    plan = {"rows": np.arange(6).reshape(3, 2), "weight": np.ones((3, 2))}

    def metrics(*skipped):
        gone = np.float32(skipped)
        norms = np.where(gone, np.inf, one)
        return {"loss": (one, one), "gradient": (norms, one), "skipped": (gone, one)}

    at = [24]
    program = SimpleNamespace(lanes=lanes.lanes_of(Config(seeds=2)), step=lambda: at[0])
    watch = lane_runs.Watch(SimpleNamespace(path=tmp_path), program, Config(on_nan="skip"))
    left = watch.checked([plan] * 2, [metrics(0, 1, 1), metrics(0, 0, 0)])
    assert [list(own) for own in left] == [["loss"]] * 2
    assert [watch.numbers(n)["skipped_updates"] for n in (0, 1)] == [2, 0]
    at[0] = 27
    watch.checked([plan] * 2, [metrics(1, 0, 0), metrics(0, 0, 0)])
    again = lane_runs.Watch(SimpleNamespace(path=tmp_path), program, Config(on_nan="skip"))
    again.restore(json.loads(json.dumps(watch.progress())))
    assert again.numbers(0) == {"skipped_updates": 3}
    at[0] = 30
    watch.checked([plan] * 2, [metrics(0, 1, 1), metrics(1, 1, 1)])
    again.restore(json.loads(json.dumps(watch.progress())))
    # Of another learner, to the same step: its steps are not in a row with those.
    watch.checked([plan] * 2, [metrics(1, 1, 0), metrics(1, 1, 0)])
    assert watch.progress() == {"skipped": [7, 5], "in_a_row": [[2, 3], [0, 0]]}
    at[0] = 33
    with pytest.raises(RunError) as error:
        again.checked([plan] * 2, [metrics(0, 1, 1), metrics(1, 1, 1)])
    assert str(error.value) == (
        "seed4, step 31: the loss is nan, the gradient's norm inf; its batch is in "
        f"{tmp_path}/nonfinite-seed4-31.json; what was saved before stays; "
        "4 steps in a row were left out"
    )
    stop = lane_runs.Watch(SimpleNamespace(path=tmp_path), program, Config())
    assert stop.numbers(0) == {}
    stop.restore([0, 3])  # as it was saved before there was more to it, of a run that did skip
    assert [stop.numbers(n) for n in (0, 1)] == [{"skipped_updates": 0}, {"skipped_updates": 3}]
    with pytest.raises(RunError, match="^seed4, step 32: .*; --on-nan skip leaves such steps out$"):
        bad = metrics(0, 0, 0) | {"gradient": (np.float32([1, np.nan, 1]), one)}
        stop.checked([plan] * 2, [metrics(0, 0, 0), bad])


def test_a_lane_that_skips_all_of_its_steps_ends_the_run(tmp_path):
    own, one = lanes.lanes_of(Config(seeds=2)), np.ones(1, np.float32)
    watch = lane_runs.Watch(None, SimpleNamespace(lanes=own, step=lambda: 1), Config(on_nan="skip"))
    for learner in (0, 1):
        gone = [{"skipped": (np.float32([n * learner]), one)} for n in (0, 1)]
        watch.ended()
        metrics = [{"loss": (one, one), "gradient": (one, one)} | own for own in gone]
        watch.checked([{}] * 2, metrics)
    with pytest.raises(RunError) as error:
        watch.ended()
    said = "seed4: all of the 1 steps were left out: no loss and gradient was finite"
    assert str(error.value) == said


def test_bands_show_mean_interval_and_every_run():
    values = np.array([[1.0, 2.0, 4.0], [3.0, 2.0, 8.0]])
    band = plots.Band([1, 2, 3], values, values.mean(0), values.mean(0) - 9, values.mean(0) + 9)
    alone = plots.Band([3], [[5.0], [6.0]], [5.5], [5.0], [6.0])
    (axes,) = plots.learning_bands("t", {"a": band, "b": alone}, "loss", xlabel="epoch").axes
    drawn = [line.get_ydata().tolist() for line in axes.lines]
    assert drawn[:2] == [[2.0, 2.0, 6.0], [5.5]] and drawn[2:4] == values.tolist()
    area = axes.collections[0].get_paths()[0].vertices
    assert {(1.0, -7.0), (3.0, -3.0), (3.0, 15.0)} <= {tuple(v) for v in area.tolist()}
    assert axes.get_ylim() == pytest.approx((1 - 0.35, 8 + 0.35))  # by the runs, not by the band
    colours = {to_rgba(line.get_color()) for line in axes.lines}
    assert colours == {to_rgba(colour) for colour in plots.COLOURS[:2]}
    with pytest.raises(ValueError, match=r"curves: got \(2, 2\) for 'a', expected \[S, 3\]"):
        plots.learning_bands("t", {"a": band._replace(values=values[:, :2])}, "loss")
    with pytest.raises(ValueError, match="curves: got none"):
        plots.learning_bands("t", {}, "loss")


def test_on_a_logarithmic_axis_the_interval_is_that_of_the_logarithm():
    values = np.array([[1.0, 0.0, 2.0], [100.0, 5.0, 2.0]])
    kept = {}
    folder = SimpleNamespace(figure=lambda name, figure: kept.setdefault(name, figure))
    lane_runs.draw(folder, "loss", "t", {"a": ([1, 2, 3], values)}, "MSE", logy=True)
    (axes,) = kept["loss"].axes
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "MSE (mean, 95 % interval)"
    mean = axes.lines[0].get_ydata()
    assert mean[::2] == pytest.approx([10.0, 2.0]) and np.isnan(mean[1])  # 0 has no place on it
    _, half = seeds.interval(np.log([1.0, 100.0]))
    top = max(y for _, y in axes.collections[0].get_paths()[0].vertices)
    assert top == pytest.approx(10.0 * np.exp(half))
    assert axes.get_ylim() == pytest.approx((1 / 1.5, 150.0))
