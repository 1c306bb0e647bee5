"""A run that is kept: it goes on to the same bits, ends when asked to, and stops at NaN."""

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import signal
import time
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lstmjax import checkpoint, keeper, losses, optim, parallel, train
from lstmjax.keeper import Keeper, save_every
from lstmjax.records import Run, RunError, RunStopped
from lstmjax.scores import means

rng = np.random.default_rng(1)
SIZE, EPOCHS = 24, 3
DATA = {"x": rng.normal(size=(SIZE, 3)).astype("float32")}
DATA["y"] = np.tanh(DATA["x"] @ rng.normal(size=3).astype("float32"))


@dataclasses.dataclass(frozen=True)
class Config:
    save_every: str = "2"
    keep: int = 2
    resume: str | None = None
    on_nan: str = "stop"
    out: str | None = None


class Kill(BaseException):
    """Stands in for the end of the process: nothing catches it."""


def loss_fn(params, batch, key):
    noise = jax.random.normal(key, batch["x"].shape)  # so that the key of every step counts
    guess = jnp.tanh((batch["x"] + 0.1 * noise) @ params["w"] + params["b"])
    loss = losses.total(losses.squared_error(guess, batch["y"]), batch["weight"])
    return losses.mean(loss), {"loss": loss}


@pytest.fixture(scope="module")
def compiled():
    """``advance`` by (on_nan, devices), compiled once for all tests."""
    made, clock = {}, train.Clock()

    def get(on_nan, count):
        if (on_nan, count) not in made:
            devices = parallel.use_devices(4)[:count]
            tx = optim.tf_adam(0.05)
            step = train.make_train_step(loss_fn, tx, axis_name=parallel.AXIS, on_nan=on_nan)
            made[on_nan, count] = tx, parallel.runner(step, devices, clock), devices
        return made[on_nan, count]

    return get


def go(compiled, config, count=1, data=DATA, at=lambda epoch, piece: None, dataset=None, at_most=2):
    """A training loop as the experiments have it; ``at`` may end it or send a signal."""
    tx, advance, devices = compiled(config.on_nan, count)
    params = {"w": jnp.asarray([0.1, -0.2, 0.3]), "b": jnp.zeros(()), "none": jnp.zeros((0, 2))}
    state = train.init_state(params, tx, jax.random.key(7))
    data = parallel.place(data, devices)
    with Run.open("toy", config) as folder:
        history, seen = [], train.Tally()
        parts = {"history": history, "epoch": seen}
        with Keeper(folder, config, parts, dataset=dataset) as keeper:
            state = parallel.place(keeper.restored(state), devices)
            for epoch in keeper.epochs(EPOCHS):
                how = {"seed": 0, "epoch": epoch, "multiple": count, "at_most": at_most}
                pieces = train.plan_epoch(SIZE, 4, **how)
                for piece in parallel.ahead(keeper.left(pieces), devices):
                    at(epoch, keeper.piece)
                    state, metrics = advance(state, data, piece)
                    metrics = keeper.checked(state, metrics)
                    folder.log(int(state.step), **means(metrics))
                    seen.add(metrics)
                    keeper.after_piece(state)
                mean = means(seen.take())["loss"]
                history.append([epoch, mean])
                folder.log(int(state.step), epoch_loss=mean)
                at(epoch, "scored")
                keeper.after_epoch(state, -mean, last=epoch == EPOCHS)
            return jax.tree.map(np.asarray, state.params), history, keeper.numbers()


@pytest.fixture(scope="module")
def undisturbed(compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return *go(compiled, Config(out=str(folder))), (folder / "metrics.jsonl").read_bytes()


PLACES = [(e, p) for e in range(1, EPOCHS + 1) for p in (0, 1, 2, "scored")]


def raising(error, *places):
    """Raises the error, each time the loop comes to the next of the places."""
    left = list(places)

    def at(epoch, piece):
        if left and (epoch, piece) == left[0]:
            left.pop(0)
            raise error

    return at


@pytest.mark.parametrize("places", [[p] for p in PLACES] + [PLACES[2::3], [(1, 1), (1, 1), (3, 2)]])
@pytest.mark.parametrize("every", ["2", "1000"])
def test_killed_anywhere_it_ends_the_same(compiled, undisturbed, tmp_path, places, every):
    folder = str(tmp_path / "run")
    config, at = Config(out=folder, save_every=every), raising(Kill(), *places)
    for _ in places:
        with pytest.raises(Kill):
            go(compiled, config, at=at)
        config = dataclasses.replace(config, resume=folder)
    params, history, _ = go(compiled, config)
    expected, expected_history, _, lines = undisturbed
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert history == expected_history
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines


def test_it_goes_on_where_it_was_saved_and_not_before(compiled, tmp_path):
    folder, visited = str(tmp_path / "run"), []
    with pytest.raises(Kill):
        go(compiled, Config(out=folder, save_every="3"), at=raising(Kill(), (3, 1)))
    steps = sorted(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints"))
    assert steps == [10, 12]  # after two pieces of epoch 2, and after it: the last two
    go(compiled, Config(resume=folder), at=lambda *place: visited.append(place))
    assert visited == [(3, 0), (3, 1), (3, 2), (3, "scored")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(compiled, undisturbed, tmp_path, capfd, number):
    folder = str(tmp_path / "run")
    before = signal.getsignal(number)

    def at(epoch, piece):
        if (epoch, piece) == (2, 1):
            os.kill(os.getpid(), number)

    with pytest.raises(RunStopped) as stopped:
        go(compiled, Config(out=folder, save_every="1000"), at=at)
    assert str(stopped.value) == (
        f"stopped at step 10 by {number.name} and saved; go on with --resume {folder}"
    )
    assert f"{number.name}: saving after these steps" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    assert (tmp_path / "run" / "checkpoints" / "10").is_dir()
    params, history, _ = go(compiled, Config(resume=folder))
    jax.tree.map(np.testing.assert_array_equal, params, undisturbed[0])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == undisturbed[3]


def test_a_signal_at_the_end_of_an_epoch_loses_no_score(compiled, undisturbed, tmp_path):
    """Saved before it is scored, scored after it is taken up again."""
    folder = str(tmp_path / "run")

    def at(epoch, piece):
        if (epoch, piece) == (2, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped, match="at step 12 "):
        go(compiled, Config(out=folder), at=at)
    _, history, _ = go(compiled, Config(resume=folder))
    assert history == undisturbed[1]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == undisturbed[3]


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_signal_ends_at_once(compiled, tmp_path, before):
    """Even where it would have been ignored, as in the background of a shell."""

    def at(epoch, piece):
        if (epoch, piece) == (1, 1):
            keepers = signal.getsignal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) == keepers:  # until the first one was heard
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    mine = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(KeyboardInterrupt):
            go(compiled, Config(out=str(tmp_path / "run")), at=at)
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, mine)


def test_an_echo_of_sigterm_does_not_end_it(compiled, tmp_path):
    """A scheduler tells all processes of a job, and a parent passes it on."""

    def at(epoch, piece):
        if (epoch, piece) == (1, 1):
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

    with pytest.raises(RunStopped, match=" by SIGTERM and saved"):
        go(compiled, Config(out=str(tmp_path / "run")), at=at)


def test_a_later_sigterm_ends_it(compiled, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(keeper, "_ONCE", 0.0)
    mine = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:

        def at(epoch, piece):
            if (epoch, piece) == (1, 1):
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.01)
                assert heard == [1]

        with pytest.raises(RunStopped):
            go(compiled, Config(out=str(tmp_path / "run")), at=at)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_another_number_of_devices(compiled, undisturbed, tmp_path):
    folder = str(tmp_path / "run")
    with pytest.raises(Kill):
        go(compiled, Config(out=folder), count=1, at=raising(Kill(), (3, 0)))
    visited = []
    params, _, _ = go(
        compiled, Config(resume=folder), count=2, at=lambda *place: visited.append(place)
    )
    # The noise is each device's own, so that only the first two epochs are the same.
    assert visited[0] == (3, 0) and not np.array_equal(params["w"], undisturbed[0]["w"])


def test_the_best_is_kept(compiled, tmp_path):
    tx, advance, devices = compiled("stop", 1)
    config = Config(out=str(tmp_path / "run"), keep=1, save_every="1")
    params = {"w": jnp.zeros(3), "b": jnp.zeros(()), "none": jnp.zeros((0, 2))}
    state = train.init_state(params, tx, jax.random.key(0))
    with Run.open("toy", config) as folder, Keeper(folder, config, {}) as keeper:
        for score in (0.1, 0.7, 0.7, 0.2):
            keeper.left([{}])
            state = state._replace(step=state.step + 1)
            keeper.after_epoch(state, score)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["2", "4"]


def test_what_was_best_and_skipped_is_known_after_a_resume(compiled, tmp_path):
    tx, advance, devices = compiled("stop", 1)
    config = Config(out=str(tmp_path / "run"), keep=1, save_every="1")
    params = {"w": jnp.zeros(3), "b": jnp.zeros(()), "none": jnp.zeros((0, 2))}
    state = train.init_state(params, tx, jax.random.key(0))
    for scores in ((0.1, 0.7), (0.2, 0.3)):
        with Run.open("toy", config) as folder, Keeper(folder, config, {}) as keeper:
            state = keeper.restored(state)
            for score in scores:
                keeper.left([{}])
                state = state._replace(step=state.step + 1)
                keeper.after_epoch(state, score)
        config = Config(resume=str(tmp_path / "run"), keep=1, save_every="1")
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["2", "4"]
    folder, how = str(tmp_path / "skips"), {"on_nan": "skip", "save_every": "1"}
    with pytest.raises(Kill):
        go(compiled, Config(out=folder, **how), data=with_nan(5), at=raising(Kill(), (3, 0)))
    numbers = go(compiled, Config(resume=folder, **how), data=with_nan(5))[2]
    assert numbers == {"skipped_updates": EPOCHS}


def test_what_was_skipped_counts_when_nothing_is_skipped_any_more(compiled, tmp_path):
    folder, how = str(tmp_path / "run"), {"on_nan": "skip", "save_every": "1"}
    with pytest.raises(Kill):
        go(compiled, Config(out=folder, **how), data=with_nan(5), at=raising(Kill(), (3, 0)))
    assert go(compiled, Config(resume=folder))[2] == {"skipped_updates": EPOCHS - 1}
    assert go(compiled, Config(out=str(tmp_path / "other")))[2] == {}


def with_nan(row):
    return {**DATA, "x": np.where(np.arange(SIZE)[:, None] == row, np.nan, DATA["x"])}


def test_nan_stops_with_step_norm_and_rows(compiled, tmp_path):
    order = np.random.default_rng([0, 2]).permutation(SIZE)  # epoch 2: step 6 + 3 has rows 8 to 11
    bad = with_nan(order[10])
    folder = tmp_path / "run"
    with pytest.raises(Kill):
        go(compiled, Config(out=str(folder)), at=raising(Kill(), (2, 1)))
    with pytest.raises(RunError) as stopped:
        go(compiled, Config(resume=str(folder)), data=bad)
    assert str(stopped.value) == (
        "step 9: the loss is nan, the gradient's norm nan; its batch is in "
        f"{folder}/nonfinite-9.json; the last good checkpoint is of step 8; "
        "--on-nan skip leaves such steps out"
    )
    said = json.loads((folder / "nonfinite-9.json").read_text())
    assert said == {"step": 9, "loss": "nan", "norm": "nan", "rows": order[8:12].tolist()}
    assert not (folder / "checkpoints" / "10").exists()
    # Once the data are mended it goes on from the good checkpoint, to where it would have come.
    params, _, _ = go(compiled, Config(resume=str(folder)))
    expected = go(compiled, Config(out=str(tmp_path / "other")))[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_skipping_leaves_the_step_out(compiled, tmp_path):
    """As if the loop had been run without that batch, but for the step's number and key."""
    row = 5
    params, history, numbers = go(
        compiled, Config(out=str(tmp_path / "run"), on_nan="skip"), data=with_nan(row)
    )
    assert numbers == {"skipped_updates": EPOCHS}
    assert all(np.isfinite(mean) for _, mean in history)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert sum(line.get("skipped", 0) for line in lines) == EPOCHS

    tx = optim.tf_adam(0.05)
    like = {"w": jnp.asarray([0.1, -0.2, 0.3]), "b": jnp.zeros(()), "none": jnp.zeros((0, 2))}
    state, number = train.init_state(like, tx, jax.random.key(7)), itertools.count()
    for epoch in range(1, EPOCHS + 1):
        for rows in np.random.default_rng([0, epoch]).permutation(SIZE).reshape(-1, 4):
            at = next(number)
            if row in rows:
                continue
            # The key of a device is folded from that of the step.
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), at), 0)
            batch = {name: a[rows] for name, a in DATA.items()} | {"weight": np.ones(4, "f4")}
            grads = jax.grad(loss_fn, has_aux=True)(state.params, batch, key)[0]
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            state = state._replace(
                params=optax.apply_updates(state.params, updates), opt_state=opt_state
            )
    np.testing.assert_allclose(params["w"], state.params["w"], rtol=1e-5)
    np.testing.assert_allclose(params["b"], state.params["b"], rtol=1e-5)


BAD = {**DATA, "x": np.full_like(DATA["x"], np.inf)}


@pytest.mark.parametrize("at_most", [1, 2, 6])
def test_skipping_everything_is_an_error(compiled, tmp_path, at_most):
    config = Config(out=str(tmp_path / "run"), on_nan="skip")
    with pytest.raises(RunError) as error:
        go(compiled, config, data=BAD, at_most=at_most)
    assert str(error.value) == (
        "all of the 18 steps were left out: no loss and gradient was finite; "
        f"their batches are in {tmp_path}/run/nonfinite-*.json; nothing was saved"
    )
    assert not os.listdir(tmp_path / "run" / "checkpoints")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert {line["loss"] for line in found if "loss" in line} == {"nan"}  # and no loss of 0


def test_one_bad_step_that_is_all_of_a_piece_is_left_out(compiled, tmp_path):
    config = Config(out=str(tmp_path / "one"), on_nan="skip")
    one = go(compiled, config, data=with_nan(5), at_most=1)
    config = Config(out=str(tmp_path / "two"), on_nan="skip")
    two = go(compiled, config, data=with_nan(5), at_most=2)
    assert one[2] == two[2] == {"skipped_updates": EPOCHS}
    jax.tree.map(np.testing.assert_array_equal, one[0], two[0])
    assert one[1] == two[1]


@pytest.mark.parametrize("at_most", [1, 2])
def test_too_many_skipped_in_a_row_end_it(compiled, tmp_path, monkeypatch, at_most):
    """Wherever the run was ended and taken up again, and with the checkpoint from before them."""
    assert keeper.MOST_SKIPPED == 25
    monkeypatch.setattr(keeper, "MOST_SKIPPED", 5)
    folder, how = tmp_path / "run", {"on_nan": "skip", "save_every": "1", "keep": 1}
    with pytest.raises(Kill):
        go(compiled, Config(out=str(folder), **how), at=raising(Kill(), (2, 0)))

    def at(epoch, piece):  # within the row: what is saved then counts those before it
        if piece == 2 // at_most and not (folder / "checkpoints" / "10").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    resumed = Config(resume=str(folder), **how)
    for end, good in ((RunError, 6), (RunStopped, None), (RunError, {1: 9, 2: 10}[at_most])):
        with pytest.raises(end) as error:
            options = {"at": at} if end is RunStopped else {}
            go(compiled, resumed, data=BAD, at_most=at_most, **options)
        if end is RunError:
            assert str(error.value) == (
                "step 11: the loss is nan, the gradient's norm nan; its batch is in "
                f"{folder}/nonfinite-11.json; the last good checkpoint is of step {good}; "
                "5 steps in a row were left out"
            )


def test_skipped_steps_in_a_row_are_those_of_one_learner(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "MOST_SKIPPED", 3)
    assert keeper.in_a_row([True, False, True, True], 4) == [5, 0, 1, 2]
    state = train.init_state({"w": jnp.zeros(3)}, optax.sgd(1.0), jax.random.key(0))
    one, config = np.ones(1, np.float32), Config(out=str(tmp_path / "run"), on_nan="skip")

    def metrics(skipped):
        norm = np.where(skipped, np.inf, one)
        return {"loss": (one, one), "gradient": (norm, one), "skipped": (skipped * one, one)}

    with Run.open("toy", config) as folder, Keeper(folder, config, {}) as kept:
        kept.left([{"rows": np.zeros((1, 1), int), "weight": np.ones((1, 1))}])
        for step in range(1, 4):
            state = state._replace(step=step)
            kept.checked(state, metrics(False), "first")
            with pytest.raises(RunError) if step == 3 else contextlib.nullcontext() as error:
                kept.checked(state, metrics(True), "second")
    assert str(error.value).endswith("; nothing was saved; 3 steps in a row were left out")


def test_a_gradient_that_is_not_finite_where_the_loss_is(compiled):
    """√x at 0 has a value and no slope."""
    tx = optax.sgd(0.1)

    def root(params, batch, key):
        loss = losses.total(jnp.sqrt(jnp.abs(params["w"] * batch["x"])), batch["weight"])
        return losses.mean(loss), {"loss": loss}

    step = jax.jit(train.make_train_step(root, tx, on_nan="skip"))
    state = train.init_state({"w": jnp.zeros(())}, tx, jax.random.key(0))
    batch = {"x": jnp.ones(3), "weight": jnp.ones(3)}
    after, metrics = step(state, batch)
    assert float(metrics["skipped"][0]) == 1 and not np.isfinite(float(metrics["gradient"][0]))
    assert float(after.params["w"]) == 0 and int(after.step) == 1
    assert [float(n) for n in metrics["loss"]] == [0, 0]


def test_watching_changes_nothing_beyond_round_off():
    batch = {name: a[:4] for name, a in DATA.items()} | {"weight": np.ones(4, "f4")}
    tx = optim.tf_adam(0.05)
    params = {"w": jnp.asarray([0.1, -0.2, 0.3]), "b": jnp.zeros(())}
    state = train.init_state(params, tx, jax.random.key(7))
    plain = jax.jit(train.make_train_step(loss_fn, tx))(state, batch)
    for on_nan in train.ON_NAN:
        watched = jax.jit(train.make_train_step(loss_fn, tx, on_nan=on_nan))(state, batch)
        for name, value in plain[0].params.items():
            np.testing.assert_allclose(watched[0].params[name], value, rtol=1e-6)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(
            jax.grad(loss_fn, has_aux=True)(params, batch, jax.random.fold_in(state.key, 0))[0]
        )))  # fmt: skip
        np.testing.assert_allclose(watched[1]["gradient"][0], norm, rtol=1e-5)


def test_a_damaged_checkpoint_costs_only_what_came_after(compiled, undisturbed, tmp_path, capfd):
    folder, visited = tmp_path / "run", []
    with pytest.raises(Kill):
        go(compiled, Config(out=str(folder)), at=raising(Kill(), (3, 2)))
    assert {"14", "16"} <= set(os.listdir(folder / "checkpoints"))
    arrays = folder / "checkpoints" / "16" / "arrays" / "manifest.ocdbt"
    arrays.write_bytes(arrays.read_bytes()[:-1])
    params, _, _ = go(compiled, Config(resume=str(folder)), at=lambda *place: visited.append(place))
    assert visited == [(3, 1), (3, 2), (3, "scored")]
    assert f"warning: the checkpoint {folder}/checkpoints/16 is damaged" in capfd.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, params, undisturbed[0])
    assert (folder / "metrics.jsonl").read_bytes() == undisturbed[3]
    assert {"16", "18", "damaged-16"} <= set(os.listdir(folder / "checkpoints"))


def test_checkpoints_that_have_gone_are_told_and_nothing_is_cut(compiled, tmp_path, capfd):
    folder = tmp_path / "run"
    with pytest.raises(Kill):
        go(compiled, Config(out=str(folder)), at=raising(Kill(), (2, 1)))
    os.rename(folder / "checkpoints", tmp_path / "elsewhere")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    for _ in range(2):  # nor is a folder made that would be taken for the missing one
        with pytest.raises(RunError) as error:
            go(compiled, Config(resume=str(folder)))
        assert str(error.value) == (
            f"--resume: {folder}/checkpoints has gone, and metrics.jsonl holds steps of this run: "
            "put it back, or start anew"
        )
        # Nor does a run that was not gone on with count as resumed.
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    os.rename(tmp_path / "elsewhere", folder / "checkpoints")
    capfd.readouterr()
    go(compiled, Config(resume=str(folder)))
    assert capfd.readouterr().err == f"going on from step 8 in {folder}\n"
    assert len(json.loads((folder / "run.json").read_text())["opened"]) == 2


def test_what_was_logged_before_the_first_checkpoint_is_kept(
    compiled, undisturbed, tmp_path, capfd
):
    folder, logs = tmp_path / "run", []
    config = Config(out=str(folder), save_every="1000")
    for place in ((1, 0), (1, 1), (1, 2)):  # the first one before anything is logged
        with pytest.raises(Kill):
            go(compiled, config, at=raising(Kill(), place))
        config = Config(resume=str(folder), save_every="1000")
        logs += [p.read_bytes() for p in [folder / "metrics.jsonl"] if p.exists()]
    capfd.readouterr()
    go(compiled, config)
    assert capfd.readouterr().err == (
        f"{folder} has no checkpoint yet: from the beginning; "
        "what was logged is in metrics-before-2.jsonl\n"
    )
    kept = [(folder / f"metrics-before{n}.jsonl").read_bytes() for n in ("", "-2")]
    assert kept == logs and [log.count(b"\n") for log in kept] == [1, 2]
    assert (folder / "metrics.jsonl").read_bytes() == undisturbed[3]


def test_a_clock_that_jumps_changes_nothing(compiled, undisturbed, tmp_path, monkeypatch):
    now, jumps = time.time, {(1, 1): 4e9, (2, 0): -1.7e9, (3, 1): 1e6}

    def at(epoch, piece):
        if (epoch, piece) in jumps:  # once each
            ahead = jumps.pop((epoch, piece))
            monkeypatch.setattr(time, "time", lambda: now() + ahead)

    folder = tmp_path / "run"
    config = Config(out=str(folder), save_every="0.001s")
    for _ in range(6):  # Orbax gives up a checkpoint if the clock jumps while it is written
        try:
            params, _, _ = go(compiled, config, at=at)
            break
        except RunError as error:
            assert "cannot save a checkpoint" in str(error) or "cannot use the folder" in str(error)
            time.sleep(1)  # its thread is still writing, which in another process it would not be
            config = dataclasses.replace(config, resume=str(folder))
        with warnings.catch_warnings():  # of what Orbax meant to do when it gave up: here, and now
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            gc.collect()
    jax.tree.map(np.testing.assert_array_equal, params, undisturbed[0])
    assert (folder / "metrics.jsonl").read_bytes() == undisturbed[3]


def test_a_folder_that_vanishes_is_one_line(compiled, tmp_path):
    folder = tmp_path / "run"

    def at(epoch, piece):
        if (epoch, piece) == (2, 0):
            while not (folder / "checkpoints" / "6").exists():
                time.sleep(0.01)
            os.rename(folder, tmp_path / "elsewhere")

    with pytest.raises(RunError, match="run.* has gone"):
        go(compiled, Config(out=str(folder)), at=at)
    assert not folder.exists()  # nothing grows in its place
    assert (tmp_path / "elsewhere" / "checkpoints" / "6").is_dir()


def test_metrics_that_were_cut_are_told(compiled, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Kill):
        go(compiled, Config(out=str(folder)), at=raising(Kill(), (2, 1)))
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="metrics.jsonl is shorter than when"):
        go(compiled, Config(resume=str(folder)))
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="metrics.jsonl is missing"):
        go(compiled, Config(resume=str(folder)))


def test_a_run_in_use_or_of_another_kind_or_finished(compiled, tmp_path):
    folder = str(tmp_path / "run")
    with Run.open("toy", Config(out=folder)):
        with pytest.raises(RunError, match="is in use by another process"):
            Run.reopen("toy", folder)
    with pytest.raises(RunError, match="is a run of toy, expected one of imdb"):
        Run.reopen("imdb", folder)
    (tmp_path / "run" / "record.json").write_text("{}")
    with pytest.raises(RunError, match="has come to its end"):
        Run.reopen("toy", folder)
    with pytest.raises(RunError, match="cannot read .*config.json: No such file"):
        Run.reopen("toy", tmp_path / "nowhere")


def test_a_checkpoint_of_another_model(compiled, tmp_path, monkeypatch):
    folder = str(tmp_path / "run")
    with pytest.raises(Kill):
        go(compiled, Config(out=folder), at=raising(Kill(), (2, 0)))
    wide = {**DATA, "x": np.zeros((SIZE, 4), "f4")}
    assert wide["x"].shape[1] == 4

    def init_state(params, tx, key):
        params = {**params, "w": jnp.zeros(4)}
        return train.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key)

    monkeypatch.setattr(train, "init_state", init_state)
    with pytest.raises(RunError, match=r"mu.w is float32\[3\], expected float32\[4\]"):
        go(compiled, Config(resume=folder), data=wide)


# ---- the data -----------------------------------------------------------------------------------

DIGITS = {"name": "mnist", "source": "tfds", "sha256": "b45fe5a91b8c" + 52 * "0"}
OTHERS = {"name": "offline_digits", "source": "offline", "sha256": 64 * "1"}


@pytest.fixture
def begun(compiled, tmp_path):
    """The folder of a run on DIGITS that was killed after its first epoch."""
    with pytest.raises(Kill):
        config = Config(out=str(tmp_path / "run"))
        go(compiled, config, at=raising(Kill(), (2, 0)), dataset=DIGITS)
    return tmp_path / "run"


def test_other_data_are_refused_and_nothing_is_touched(compiled, undisturbed, begun, capfd):
    files = {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()}
    with pytest.raises(RunError) as error:
        go(compiled, Config(resume=str(begun)), dataset=OTHERS)
    assert str(error.value) == (
        f"--resume: {begun} was trained on mnist (tfds, sha256 b45fe5a91b8c), "
        "got offline_digits (offline, sha256 111111111111)"
    )
    assert {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()} == files
    # Of another name and source, and the same in every bit.
    same = SimpleNamespace(name="digits", source="offline", sha256=DIGITS["sha256"])
    params, _, _ = go(compiled, Config(resume=str(begun)), dataset=same)
    jax.tree.map(np.testing.assert_array_equal, params, undisturbed[0])


@pytest.mark.parametrize("first, then", [(None, DIGITS), (DIGITS, None)])
def test_a_checkpoint_that_does_not_know_its_data_is_gone_on_with(
    compiled, undisturbed, tmp_path, monkeypatch, first, then
):
    """As those that were saved before any did."""
    folder, latest = str(tmp_path / "run"), checkpoint.Checkpoints.latest
    with pytest.raises(Kill):
        go(compiled, Config(out=folder), at=raising(Kill(), (2, 0)), dataset=first)

    def of_old(self):
        step, arrays, progress = latest(self)
        new = {"data", "in_a_row"} if first is None else {"in_a_row"}
        return step, arrays, {k: v for k, v in progress.items() if k not in new}

    monkeypatch.setattr(checkpoint.Checkpoints, "latest", of_old)
    params, _, _ = go(compiled, Config(resume=folder), dataset=then)
    jax.tree.map(np.testing.assert_array_equal, params, undisturbed[0])


@pytest.mark.parametrize(
    "change",
    [{"data": 3}, {"data": []}, {"data": {"name": "x"}}, {"data": DIGITS | {"name": "a\nb"}},
     {"data": DIGITS | {"sha256": None}}, {"in_a_row": 3}, {"in_a_row": {"model": "many"}}],
    ids=str,
)  # fmt: skip
def test_data_that_cannot_be_understood(compiled, begun, monkeypatch, change):
    latest = checkpoint.Checkpoints.latest

    def changed(self):
        step, arrays, progress = latest(self)
        return step, arrays, progress | change

    monkeypatch.setattr(checkpoint.Checkpoints, "latest", changed)
    with pytest.raises(RunError, match="checkpoint of step 6 does not hold what this run saves"):
        go(compiled, Config(resume=str(begun)), dataset=DIGITS)


def test_the_last_checkpoint_is_written_before_anything_else_is(tmp_path, monkeypatch, capfd):
    """Weights that were written without it would stand in the way of those of a resume."""

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_file", full)
    state = train.init_state({"w": jnp.zeros(3)}, optax.sgd(1.0), jax.random.key(0))
    config = Config(out=str(tmp_path / "run"))
    with pytest.raises(RunError, match="cannot save a checkpoint in .*: .*No space left"):
        with Run.open("toy", config) as folder, Keeper(folder, config, {}) as kept:
            kept.left([{}])
            kept.after_epoch(state._replace(step=state.step + 1), last=True)
            (tmp_path / "weights").touch()
    assert not (tmp_path / "weights").exists()
    assert capfd.readouterr().err == ""  # what Orbax logs of it


@pytest.mark.parametrize(
    "text, expected",
    [("500", (500, "steps")), ("60s", (60, "seconds")), ("0.5s", (0.5, "seconds"))],
)
def test_when_to_save(text, expected):
    assert save_every(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0s", "-1", "5m", "1.5", "s", "nan", "1e3"])
def test_when_to_save_wrongly(text):
    with pytest.raises(ValueError, match=f"save_every: got '{text}', expected steps, as 500"):
        save_every(text)
