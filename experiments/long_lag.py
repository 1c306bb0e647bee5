"""What recurrent networks can remember: adding, temporal order and copying, over many steps.

    python experiments/long_lag.py                          the adding problem over 200 steps
    python experiments/long_lag.py --preset adding-hs       as Hochreiter & Schmidhuber posed it
    python experiments/long_lag.py --preset order           which of X and Y came first (their 6a)
    python experiments/long_lag.py --preset order-3         the same of three (their 6b)
    python experiments/long_lag.py --preset copy            ten symbols, after a wait of 50 steps
    python experiments/long_lag.py --preset adding-1000     over 1,000 steps: a long command

Every cell is trained by Adam on sequences that are never seen twice, all its seeds in one compiled
program, and stops where all of them have solved the task. After every --eval-every updates it is
scored on the same held-out sequences; "solved at" is the first of these evaluations that meets the
criterion below. The weights of that evaluation (or the last ones) are what is tested at the end, on
sequences that are used for nothing else.

    task        an answer is right where               solved where
    adding      |error| < 0.08                         the mean squared error is below 0.01
    adding-hs   |error| < 0.04                         at most 1 of 2,560 is wrong
    order       every output is within 0.3 of 0 or 1   at most 1 of 2,560 is wrong
    order-3     the same                               at most 2 of 2,560 are wrong
    copy        a symbol is the most probable          the loss is below a tenth of the baseline

The criteria of adding-hs, order and order-3, and the lengths there, are those of the paper (Neural
Computation 9(8), 1997); 0.08 is its 0.04 where values are from [0, 1] and the sum is not divided by
4. Its networks had sigmoid outputs, four to six cells and no forget gates, and learned by truncated
gradients, one sequence at a time; these have a softmax or a linear output and learn as is usual
today. A cell is one of lstmjax.models.CELLS. A number after it, as in lstm-4, is the forget gate's
initial bias, which is 1 otherwise (half of a memory is gone after 2 steps; with 4, after 38), and
-chrono lets memories start with lengths of up to the sequence's (Tallec & Ollivier, 2018).
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lstmjax import checkpoint, cli, long_lag_plots, long_lag_tables, losses, optim, parallel, train
from lstmjax import seeds as many
from lstmjax.data import long_lag
from lstmjax.data.dataset import make_dataset
from lstmjax.initializers import GateBias
from lstmjax.models import CELLS, Init, Method, SequenceModel, gate_bias
from lstmjax.records import Run, params_sha256
from lstmjax.variants import VARIANTS

IN_ONE_CALL = 25  # updates whose sequences are on the devices at the same time
EVALUATED = 256  # sequences at a time
HELD = 0  # the seed of the sequences that all are scored on, whichever their own are


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["adding", "adding-1000", "adding-hs", "order", "order-3", "copy"] = "adding"
    """Where the defaults come from."""
    task: Literal["adding", "adding-hs", "order", "order-3", "copy"] = "adding"
    """What is to be remembered."""
    length: int = 200
    """T: steps (adding), least steps (adding-hs), or steps to wait (copy)."""
    cells: str = "lstm,gru,rnn,lstm-chrono"
    """Recurrent cells, each trained on its own, with commas between them."""
    hidden_size: int = 64
    """Units of the one recurrent layer."""
    init: Init = "lstmjax"
    """Initial law of the recurrent layer (the GRU and the RNNs have keras and lstmjax alone)."""
    learning_rate: float = 2e-3
    """Adam's step size."""
    clip_norm: float | None = 1.0
    """Bound on the gradient's global norm."""
    batch_size: int = 50
    """Sequences in an update."""
    updates: int = 3_000
    """Updates at most."""
    eval_every: int = 100
    """Updates from one evaluation to the next."""
    eval_size: int = 2_560
    """Sequences of an evaluation."""
    method: Method = "fused"
    """How the recurrence runs; onednn and cudnn know the plain LSTM alone, where installed."""
    devices: int | None = None
    """Devices to share the seeds; all accelerators, or all CPU cores, when not given."""
    seeds: int = 5
    """How many seeds, from --seed on."""
    seed: int = 0
    """The first seed, of initial weights and of the sequences to learn from."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


_SETTINGS = {
    "adding": {"updates": 5_000},
    "adding-1000": {"length": 1_000, "updates": 6_000, "eval_every": 200},
    "adding-hs": {"length": 100, "cells": "lstm,lstm-4,lstm-chrono,gru,rnn", "updates": 6_000},
    **dict.fromkeys(("order", "order-3"), {"length": 100, "learning_rate": 1e-3}),
    "copy": {"length": 50, "learning_rate": 5e-3, "updates": 12_000, "eval_every": 400},
}
PRESETS = {
    name: Config(preset=name, task=name.removesuffix("-1000"), **settings)
    for name, settings in _SETTINGS.items()
}


class Task(NamedTuple):
    """A task at a length.

    Attributes:
      draw: ``draw(seed, index, batch_size=, split=)``, a batch of lstmjax/data/long_lag.py.
      kinds: how many symbols an input is one of, or None where it is a pair of numbers.
      outputs: how many outputs there are at a step.
      steps: in the longest sequence.
      measure: ``measure(outputs, y) -> (loss [B], wrong [B])``: the loss that is trained, and the
        share of wrong answers, of each sequence.
      baseline: the loss of the best answer that remembers nothing.
      solved: ``solved(loss, wrong)``, of the means over an evaluation.
    """

    draw: Callable
    kinds: int | None
    outputs: int
    steps: int
    measure: Callable
    baseline: float
    solved: Callable


def make_task(name: str, length: int) -> Task:
    """The task of that name; ``length`` is the configuration's."""

    def task(draw, kinds, outputs, steps, measure, baseline):
        solved = partial(long_lag_tables.met, name, baseline)
        return Task(draw, kinds, outputs, steps, measure, baseline, solved)

    if name == "adding":
        draw = partial(long_lag.adding, length=length)
        measure = partial(measure_sum, tolerance=0.08)
        return task(draw, None, 1, length, measure, 1 / 6)
    if name == "adding-hs":
        draw, longest = partial(long_lag.adding_hs, length=length), length + length // 10
        measure, base = partial(measure_sum, tolerance=0.04), long_lag.adding_hs_baseline(length)
        return task(draw, None, 1, longest, measure, base)
    if name == "copy":
        draw, steps = partial(long_lag.copy_memory, length=length), length + 2 * long_lag.COPIED
        kinds, base = long_lag.DELIMITER + 1, long_lag.COPIED * math.log(long_lag.KINDS) / steps
        return task(draw, kinds, kinds - 1, steps, measure_copy, base)
    symbols = 3 if name == "order-3" else 2
    draw, classes = partial(long_lag.temporal_order, symbols=symbols), 2**symbols
    kinds, steps = len(long_lag.SYMBOLS), long_lag.ORDER_LENGTHS[1]
    return task(draw, kinds, classes, steps, measure_order, math.log(classes))


def measure_sum(outputs, y, tolerance):
    return losses.squared_error(outputs, y), (jnp.abs(outputs - y) >= tolerance)[:, 0]


def measure_order(logits, y):
    off = jnp.abs(jax.nn.softmax(logits) - jax.nn.one_hot(y, logits.shape[-1]))
    return losses.cross_entropy(logits, y), jnp.any(off >= 0.3, axis=-1)


def measure_copy(logits, y):
    wrong = 1 - losses.correct(logits, y)[:, -long_lag.COPIED :]
    return jnp.mean(losses.cross_entropy(logits, y), axis=-1), jnp.mean(wrong, axis=-1)


def check(config: Config) -> None:
    cli.check_counts(config, "hidden_size", "batch_size", "updates", "eval_every", "eval_size")
    cli.check_counts(config, "devices", "seeds")
    cli.check_counts(config, "seed", least=0)
    cli.check_counts(config, "length", least={"adding-hs": 20, "adding": 2}.get(config.task, 1))
    cli.check_positive(config, "learning_rate", "clip_norm")
    fits = not config.task.startswith("order") or config.length == 100
    cli.check(config, "length", fits, f"100 with --task {config.task}")
    fits = config.updates % config.eval_every == 0
    cli.check(config, "updates", fits, f"a multiple of --eval-every {config.eval_every}")
    cells = config.cells.split(",")
    for cell in cells:
        name, what = cell.partition("-")[0], "known cells with commas between, such as lstm,rnn"
        cli.check(config, "cells", name in CELLS, what)
        forget_bias(cell, 2)  # says what is wrong with it
        fits = config.init in ("keras", "lstmjax") or name in VARIANTS
        cli.check(config, "init", fits, f"keras or lstmjax with the cell {cell}")
    cli.check(config, "cells", len(set(cells)) == len(cells), "no cell twice")
    by_others = config.method in ("onednn", "cudnn")
    fits = not by_others or all(cell.partition("-")[0] == "lstm" for cell in cells)
    cli.check(config, "method", fits, "another one with cells that are no lstm")
    fits = not by_others or config.task in ("adding", "copy")  # of one length
    cli.check(config, "method", fits, f"another one with --task {config.task}, which has lengths")
    fits = config.seed + config.seeds <= 2**31
    cli.check(config, "seeds", fits, f"so many that the last seed is below {2**31}")


def forget_bias(cell: str, steps: int) -> float | GateBias | None:
    """What a cell's name says: lstm nothing, lstm-4 a number, lstm-chrono a law for the length."""
    name, _, law = cell.partition("-")
    return gate_bias(law or None, name, steps)


def make_model(config: Config, task: Task, cell: str) -> SequenceModel:
    return SequenceModel(
        cell=cell.partition("-")[0],
        hidden_size=config.hidden_size,
        output_size=task.outputs,
        every_step=config.task == "copy",
        cell_init=config.init,
        forget_bias=forget_bias(cell, task.steps),
        method=config.method,
    )


def make_loss(model: SequenceModel, task: Task):
    """``loss_fn(params, batch, key)``."""

    def loss_fn(params, batch, key=None):
        x, lengths = batch["x"], batch.get("lengths")
        mask = None
        if lengths is not None:
            mask = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
        if task.kinds is not None:
            x = jax.nn.one_hot(x, task.kinds)
        _, outputs = model.apply({"params": params}, x, mask=mask)
        loss, wrong = task.measure(outputs, batch["y"])
        weight = batch.get("weight", jnp.ones_like(loss))
        loss = losses.total(loss, weight)
        wrong = losses.total(wrong.astype(jnp.float32), weight)
        return losses.mean(loss), {"loss": loss, "wrong": wrong}

    return loss_fn


class Result(NamedTuple):
    """What a cell came to, S seeds, N evaluations.

    Attributes:
      updates: [N], of the evaluations.
      curves: {"loss", "wrong"}, [S, N] each, on the held-out sequences.
      solved_at: [S] updates, infinite where never.
      test: {"loss", "wrong"}, [S] each, of ``params`` on the test sequences.
      params: with a first axis of seeds; those with which a seed first met the criterion, or the
        last.
      seconds: of training.
    """

    updates: np.ndarray
    curves: dict[str, np.ndarray]
    solved_at: np.ndarray
    test: dict[str, np.ndarray]
    params: Any
    seconds: float


def start_of(config: Config, task: Task, cell: str):
    """``(loss_fn, tx, start)`` of a cell; ``start(seed)`` is the ``TrainState`` it begins with."""
    model = make_model(config, task, cell)
    tx = optim.clipped_adam(config.learning_rate, config.clip_norm)
    one = jnp.zeros((1, 1, task.kinds or 2))

    @jax.jit
    def start(seed):
        init_key, step_key = jax.random.split(jax.random.key(seed))
        return train.init_state(model.init(init_key, one)["params"], tx, step_key)

    return make_loss(model, task), tx, start


def evaluator(config: Config, loss_fn: Callable, held: dict, params: Any, devices: list, clock):
    """``evaluate(params, split) -> {"loss" [S], "wrong" [S]}``, compiled for such ``params``."""
    step = train.make_eval_step(lambda params, batch: loss_fn(params, batch)[1])

    def scores_of(params, data, plan):
        sums = train.scan_eval(step)(params, data, plan)
        return {name: losses.mean(average) for name, average in sums.items()}

    plan = parallel.place(train.plan_batches(np.arange(config.eval_size), EVALUATED), devices)
    held = {split: parallel.place(batch, devices) for split, batch in held.items()}
    spread_out = many.spread(scores_of, devices, shared=(1, 2), donate=())
    compiled = clock.compile(spread_out, params, held["test"], plan)

    def evaluate(params, split):
        with clock("eval"):
            return many.unstack(compiled(params, held[split], plan), config.seeds)

    return evaluate


def fit(
    config: Config, task: Task, cell: str, held: dict, devices: list, clock: train.Clock, log
) -> Result:
    """Trains all seeds of a cell until each has solved the task, or the updates are used up.

    Args:
      held: {"validation", "test"}: batches of ``eval_size`` sequences.
      log: called with (update, scores) at every evaluation, scores [S] by name.
    """
    loss_fn, tx, start = start_of(config, task, cell)
    own = range(config.seed, config.seed + config.seeds)
    piece = max(n for n in range(1, IN_ONE_CALL + 1) if config.eval_every % n == 0)

    def batches(first):  # those of ``piece`` updates, [S, K, B, …]
        drawn = (
            [task.draw(seed, first + k, batch_size=config.batch_size) for k in range(piece)]
            for seed in own
        )
        return many.stack([jax.tree.map(lambda *b: np.stack(b), *d) for d in drawn], devices)

    def weights(states):  # a copy of them, [S, …]
        return jax.tree.map(np.array, many.unstack(states.params, config.seeds))

    def updates_of(state, batches):
        return jax.lax.scan(train.make_train_step(loss_fn, tx), state, batches)

    before = clock.seconds["train"]
    states = many.stack([start(seed) for seed in own], devices)
    advance = clock.compile(many.spread(updates_of, devices), states, batches(0))
    evaluate = evaluator(config, loss_fn, held, states.params, devices, clock)
    at, found, solved_at, kept = [], [], np.full(config.seeds, np.inf), weights(states)
    for update in range(0, config.updates + 1, config.eval_every):
        at.append(update)
        found.append(evaluate(states.params, "validation"))
        log(update, found[-1])
        learning = np.isinf(solved_at)
        for old, new in zip(*map(jax.tree.leaves, (kept, weights(states))), strict=True):
            old[learning] = new[learning]
        solved_at[task.solved(**found[-1]) & learning] = update
        if np.all(np.isfinite(solved_at)) or update == config.updates:
            break
        for first in range(update, update + config.eval_every, piece):
            with clock("train"):
                states, _ = jax.block_until_ready(advance(states, batches(first)))
    curves = jax.tree.map(lambda *values: np.stack(values, axis=1), *found)
    by_seed = [jax.tree.map(lambda a, n=n: a[n], kept) for n in range(config.seeds)]
    test = evaluate(many.stack(by_seed, devices), "test")
    return Result(np.array(at), curves, solved_at, test, kept, clock.seconds["train"] - before)


def metrics_of(results: dict[str, Result], task: Task) -> dict[str, Any]:
    """The numbers of a record; names begin with the cell's, and end with the seed's place."""
    found = {"baseline_loss": task.baseline}
    for cell, result in results.items():
        found[f"{cell}_solved_at"] = result.solved_at
        found[f"{cell}_updates"] = result.updates
        found[f"{cell}_train_seconds"] = result.seconds
        for name, values in result.test.items():
            found[f"{cell}_test_{name}"] = values
            mean, half = many.interval(values)
            found[f"{cell}_test_{name}_mean"] = float(mean)
            found[f"{cell}_test_{name}_half_width"] = float(half)
        for name, curves in result.curves.items():
            for number, curve in enumerate(curves):  # four digits: it is for looking at
                found[f"{cell}_{name}_{number}"] = [float(f"{value:.4g}") for value in curve]
    return found


def run(config: Config) -> None:
    check(config)
    task = make_task(config.task, config.length)
    title = long_lag_tables.title(config.task, config.length)
    print(f"training on the {title}")
    held = {
        split: task.draw(HELD, 0, batch_size=config.eval_size, split=split)
        for split in ("validation", "test")
    }
    # The first batch of each seed stands for all that it trains on.
    own = range(config.seed, config.seed + config.seeds)
    first = {f"train {seed}": task.draw(seed, 0, batch_size=config.batch_size) for seed in own}
    dataset = make_dataset(title, "generated", held | first)
    devices = parallel.use_devices(config.devices)[: config.seeds]
    clock, results = train.Clock(), {}
    with Run.create("long_lag", config, out=config.out) as folder:
        for cell in config.cells.split(","):
            bar = tqdm(total=config.updates, unit=" updates", desc=cell, disable=None)

            def log(update, scores, cell=cell, bar=bar):
                bar.update(update - bar.n)
                means = {f"{cell}_{name}": float(np.mean(v)) for name, v in scores.items()}
                folder.log(update, **means)

            results[cell] = fit(config, task, cell, held, devices, clock, log)
            bar.close()
            done = results[cell]
            print(long_lag_tables.line(cell, done.solved_at, done.updates[-1]), flush=True)
        curves = {
            name: {cell: (r.updates, r.curves[name]) for cell, r in results.items()}
            for name in ("loss", "wrong")
        }
        what = long_lag_tables.LOSSES[config.task]
        folder.figure("curves", long_lag_plots.curves(title, curves, what, task.baseline))
        params = {cell: done.params for cell, done in results.items()}
        checkpoint.save_params(folder.path / "params.safetensors", params)
        folder.finish(
            dataset=dataset,
            metrics=metrics_of(results, task),
            seconds=clock.seconds,
            params_sha256=params_sha256(params),
            seed=config.seed,
            devices=devices,
        )
    print(f"{title}: record in {folder.path}")


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, presets=PRESETS, description=__doc__)))
