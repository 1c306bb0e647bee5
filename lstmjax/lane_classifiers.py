"""Classifiers of many lanes: the loop of experiments/imdb.py and mnist.py for `--seeds`, `--sweep`.

It is the loop of those scripts, with ``lanes.Program`` in place of a train step, a list over lanes
in place of a number, and a choice before the test split is scored.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from lstmjax import cli, train
from lstmjax.data.dataset import Dataset
from lstmjax.lane_runs import Opened, about, by_value, draw, finish, opened, said, which
from lstmjax.lanes import Choice, Program, choose, evaluator, first_device, pieces
from lstmjax.records import write_file


class Split(NamedTuple):
    """A split of the data: ``arrays`` [N, ...] by name, and ``rows(seed)``, its examples there."""

    arrays: Mapping[str, np.ndarray]
    rows: Callable[[int], np.ndarray]

    @classmethod
    def whole(cls, arrays: Mapping[str, np.ndarray]) -> "Split":
        """All examples, whatever the seed."""
        count = len(next(iter(arrays.values())))
        return cls(arrays, lambda seed: np.arange(count))


class Problem(NamedTuple):
    """What a classifier's experiment says of one run.

    Attributes:
      loss_fn: ``loss_fn(params, batch, key)``; without a key nothing is dropped.
      init: ``init(key)``: parameters.
      optimiser: ``optimiser(config)``.
      splits: "train", "test", and "validation" where there is one.
      unit: what the examples are called.
      drop_remainder, at_most: as in ``train.plan_epoch``.
    """

    loss_fn: Callable
    init: Callable
    optimiser: Callable
    splits: Mapping[str, Split]
    unit: str
    drop_remainder: bool = False
    at_most: int = 25


def classify(
    experiment: str,
    config: Any,
    problem: Problem,
    dataset: Dataset,
    *,
    row: str | None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """A classifier's run of many lanes: trains, chooses, scores the test split, and records.

    Args:
      experiment: its name.
      config: its configuration, with ``epochs``, ``batch_size``, ``test_every_epoch`` and what
        ``lanes.check`` has checked.
      problem: what to train on.
      dataset: for the record, of all seeds.
      row: of BENCHMARKS.md, or None.
      files: further files for the folder, by name.
    """
    size = len(problem.splits["train"].rows(config.seed))
    fits = config.batch_size <= size or not problem.drop_remainder
    cli.check(config, "batch_size", fits, f"at most {size}, the training {problem.unit}")
    print(f"training on {dataset.title}, sha256 {dataset.sha256[:12]}: {about(config)}")
    clock = train.Clock()
    program = _program(config, problem, clock)
    everyone, size = range(len(program.lanes)), size * len(program.lanes)
    with opened(experiment, config, program, clock) as work:
        keeper, score = work.keeper, _scorer(problem, work)
        done = (keeper.epoch - 1) * size
        bar = tqdm(total=config.epochs * size, initial=done, unit=f" {problem.unit}", disable=None)
        for epoch in keeper.epochs(config.epochs):
            _train_epoch(problem, work, bar)
            if "validation" in problem.splits:
                score("validation", epoch, everyone)
            last = epoch == config.epochs
            if last or config.test_every_epoch:
                score("test", epoch, _choice(work).lanes)
            found = [work.scores.metrics(n).get("validation_accuracy") for n in everyone]
            best = None if None in found else float(np.mean(found))
            keeper.after_epoch(program.states, best, last=last)
        bar.close()
        for name, content in (files or {}).items():
            write_file(work.folder.path / name, content)
        metrics = _leave(work, dataset, row)
    print(
        f"test accuracy {said(metrics, 'test_accuracy', '.4f')} ({which(config)}) after "
        f"{config.epochs} epochs on {dataset.title}; record in {work.folder.path}"
    )


def _program(config: Any, problem: Problem, clock: train.Clock) -> Program:
    """The training of all lanes."""

    def start(config):
        init_key, step_key = jax.random.split(jax.random.key(config.seed))
        return train.init_state(problem.init(init_key), problem.optimiser(config), step_key)

    def make_step(config):
        tx = problem.optimiser(config)
        return train.make_train_step(first_device(problem.loss_fn), tx, on_nan=config.on_nan)

    data = problem.splits["train"].arrays
    return Program.of(config, clock, start=start, make_step=make_step, data=data)


def _train_epoch(problem: Problem, work: Opened, bar: tqdm) -> None:
    """What is left of an epoch of every lane."""
    program, epoch = work.program, work.keeper.epoch
    rows = [problem.splits["train"].rows(lane.seed) for lane in program.lanes]
    options = {"drop_remainder": problem.drop_remainder, "at_most": problem.at_most}
    all_pieces = pieces(program.lanes, rows, epoch, work.config.batch_size, **options)
    for plans in work.keeper.left(all_pieces):
        metrics = work.watch.checked(plans, program.advance(plans))
        now = work.scores.piece(program.step(), epoch, metrics)
        bar.update(int(sum(own["loss"][1].sum() for own in metrics)))
        bar.set_postfix(epoch=epoch, loss=f"{np.mean([own['loss'] for own in now]):.4f}")
        work.keeper.after_piece(program.states)
    means = work.scores.trained()
    work.scores.add("train", program.step(), epoch, means, range(len(rows)))


def _scorer(problem: Problem, work: Opened) -> Callable:
    """``score(split, epoch, places)``: adds what the lanes at some places reach on a split."""
    program = work.program
    evaluate = evaluator(lambda params, batch: problem.loss_fn(params, batch)[1], work.clock)

    def score(split, epoch, places):
        arrays, rows = problem.splits[split]
        arrays = program.data if arrays is problem.splits["train"].arrays else arrays
        params, own = program.params(), [rows(program.lanes[n].seed) for n in places]
        means = evaluate(program, [params[n] for n in places], arrays, own)
        work.scores.add(split, program.step(), epoch, means, places)

    return score


def _choice(work: Opened) -> Choice:
    """The lanes with the best validation accuracy, or all where nothing is swept."""
    found = []
    for place in range(len(work.program.lanes)):
        metrics = work.scores.metrics(place)
        # Outputs that are NaN are right now and then.
        fine = math.isfinite(metrics.get("validation_loss", math.nan))
        found.append(metrics["validation_accuracy"] if fine else math.nan)
    return choose(work.program.lanes, "validation_accuracy", found, highest=True)


def _leave(work: Opened, dataset: Dataset, row: str | None) -> dict[str, Any]:
    """The figures and the record; returns its metrics."""
    choice, lanes = _choice(work), work.program.lanes
    title = f"{work.config.cell} on {dataset.title}, {which(work.config)}"
    curve = functools.partial(work.scores.curve, name="accuracy")
    curves = {split: curve(split, places=choice.lanes) for split in work.scores.epochs}
    draw(work.folder, "accuracy", title, curves, "accuracy", xlabel="epoch")
    if choice.swept:
        swept = by_value(lanes, *curve("validation", places=range(len(lanes))))
        draw(work.folder, "sweep", title, swept, "validation accuracy", xlabel="epoch")
    found = [work.scores.metrics(n) for n in choice.lanes]
    return finish(work, found, choice, dataset=dataset, row=row)
