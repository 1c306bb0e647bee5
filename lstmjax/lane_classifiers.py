"""Classifiers of many lanes: the loop of experiments/imdb.py and others for `--seeds`, `--sweep`.

It is the loop of classifier.py, with ``lanes.Program`` in place of a train step, a list over lanes
in place of a number, and a choice before the test split is scored.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from lstmjax import cli, distributed, lanes, train
from lstmjax import seeds as many
from lstmjax.lane_runs import Opened, about, by_value, draw, finish, opened, said, which
from lstmjax.records import write_file
from lstmjax.scores import say


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
    """What a classifier's experiment says of its task.

    Attributes:
      loss_fn: ``loss_fn(params, batch, key) -> (loss, metrics)`` with the metrics "loss" and
        "accuracy"; without a key nothing is dropped.
      init: ``init(key)``: parameters; it is compiled.
      optimiser: ``optimiser(config, updates)``: an optax transformation, for so many updates.
      splits: "train", "test", and "validation" where there is one.
      unit: what the examples are called.
      diagnosis: ``diagnosis(few)``: a ``diagnose.Diagnosis`` of training examples, arrays by name;
        None where nothing but lanes is trained, which are not looked at.
      select: whether the weights of the best epoch on validation count; else, and without
        validation, those of the last epoch do.
      test_every_epoch: whether to score the test split after every epoch.
      drop_remainder, at_most: as in ``train.plan_epoch``.
      at_once: examples that are scored in one batch.
    """

    loss_fn: Callable
    init: Callable
    optimiser: Callable
    splits: Mapping[str, Split]
    unit: str
    diagnosis: Callable | None = None
    select: bool = False
    test_every_epoch: bool = False
    drop_remainder: bool = False
    at_most: int = 25
    at_once: int = 500

    @property
    def selects(self) -> bool:
        """Whether there is a best epoch."""
        return self.select and "validation" in self.splits

    def updates(self, config: Any) -> int:
        """How many updates a run makes."""
        size = len(self.splits["train"].rows(config.seed))
        whole, rest = divmod(size, config.batch_size)
        return config.epochs * (whole + (rest > 0 and not self.drop_remainder))


class Kept(NamedTuple):
    """What a run goes on from: its state, and the best weights so far, () where none count."""

    state: train.TrainState
    best: Any


def best_epoch(metrics: Mapping[str, Any]) -> int:
    """The epoch with the highest validation accuracy, from 1 on; of equal ones the first.

    One whose loss is not finite counts as the worst: outputs that are NaN are right now and then.

    Args:
      metrics: of a record, validation's lists over epochs among them.
    """
    pairs = zip(
        metrics["validation_accuracy_epochs"], metrics["validation_loss_epochs"], strict=True
    )
    # A number that was kept as JSON may be the text "nan".
    found = [float(value) if math.isfinite(float(loss)) else -1.0 for value, loss in pairs]
    return 1 + int(np.argmax(found))


def check_batch(config: Any, problem: Problem) -> None:
    """Raises ConfigError for a batch that is never full where only full ones count."""
    size = len(problem.splits["train"].rows(config.seed))
    fits = config.batch_size <= size or not problem.drop_remainder
    cli.check(config, "batch_size", fits, f"at most {size}, the training {problem.unit}")


def selected(problem: Problem, metrics: Mapping[str, Any]) -> dict[str, float]:
    """For the record: which epoch's weights count, and how good they are on validation."""
    if not problem.selects:
        return {}
    epoch = best_epoch(metrics)
    found = {name: metrics[f"validation_{name}_epochs"][epoch - 1] for name in ("accuracy", "loss")}
    return {"best_epoch": epoch} | {f"best_validation_{name}": v for name, v in found.items()}


def weights_of(kept: Kept, problem: Problem) -> Any:
    """The weights that count."""
    return kept.best if problem.selects else kept.state.params


def progress_bar(config: Any, problem: Problem, size: int, epoch: int) -> tqdm:
    """A bar of all epochs' examples, at the beginning of an epoch."""
    options = {"total": config.epochs * size, "initial": (epoch - 1) * size}
    return tqdm(unit=f" {problem.unit}", disable=distributed.quiet(), **options)


# ---- training -----------------------------------------------------------------------------------


def classify(
    experiment: str,
    config: Any,
    problem: Problem,
    dataset: Any,
    *,
    row: str | None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """A run for each seed, or value to choose from, all in one program, and its record.

    Args:
      experiment: its name.
      config: its configuration, with ``epochs``, ``batch_size`` and what ``lanes.check`` has
        checked.
      problem: what to train on.
      dataset: for the record, of all seeds, with ``title``, ``name``, ``source`` and ``sha256``.
      row: of BENCHMARKS.md, or None.
      files: further files for the folder, by name.

    Raises:
      ConfigError: a batch that is never full where only full ones count.
    """
    check_batch(config, problem)
    print(f"training on {dataset.title}, sha256 {dataset.sha256[:12]}: {about(config)}")
    clock = train.Clock()
    program = _program(config, problem, clock)
    size = len(problem.splits["train"].rows(config.seed)) * len(program.lanes)
    with opened(experiment, config, program, clock, dataset=dataset) as work:
        keeper, score = work.keeper, _lane_scorer(problem, work)
        bar = progress_bar(config, problem, size, keeper.epoch)
        for epoch in keeper.epochs(config.epochs):
            _train_lanes(problem, work, bar)
            mean, last = None, epoch == config.epochs
            if "validation" in problem.splits:
                everyone = range(len(program.lanes))
                score("validation", epoch, program.params(), everyone)
                mean = np.mean([work.scores.metrics(n)["validation_accuracy"] for n in everyone])
            _keep_best(problem, work, epoch)
            if last or problem.test_every_epoch:
                states = program.states
                counting = lanes.split(weights_of(states, problem), len(program.lanes))
                score("test", epoch, counting, _choice(problem, work).lanes)
            keeper.after_epoch(program.states, mean, last=last)
        bar.close()
        for name, content in (files or {}).items():
            write_file(work.folder.path / name, content)
        metrics = _leave(problem, work, dataset, row)
    print(
        f"test accuracy {said(metrics, 'test_accuracy', '.4f')} ({which(config)}) after "
        f"{config.epochs} epochs on {dataset.title}; record in {work.folder.path}"
    )


def _program(config: Any, problem: Problem, clock: train.Clock) -> lanes.Program:
    """The training of all lanes; the best weights go through a step as they are."""
    updates = problem.updates(config)

    def start(config):
        init_key, step_key = jax.random.split(jax.random.key(config.seed))
        params, tx = problem.init(init_key), problem.optimiser(config, updates)
        return Kept(train.init_state(params, tx, step_key), params if problem.selects else ())

    def make_step(config):
        tx, loss_fn = problem.optimiser(config, updates), lanes.first_device(problem.loss_fn)
        own = train.make_train_step(loss_fn, tx, on_nan=config.on_nan)

        def step(kept, batch):
            state, metrics = own(kept.state, batch)
            return kept._replace(state=state), metrics

        return step

    data = problem.splits["train"].arrays
    return lanes.Program.of(config, clock, start=start, make_step=make_step, data=data)


def _train_lanes(problem: Problem, work: Opened, bar: tqdm) -> None:
    """What is left of an epoch of every lane."""
    program, epoch = work.program, work.keeper.epoch
    rows = [problem.splits["train"].rows(lane.seed) for lane in program.lanes]
    options = {"drop_remainder": problem.drop_remainder, "at_most": problem.at_most}
    pieces = lanes.pieces(program.lanes, rows, epoch, work.config.batch_size, **options)
    for plans in work.keeper.left(pieces):
        metrics = work.watch.checked(plans, program.advance(plans))
        now = work.scores.piece(program.step(), epoch, metrics)
        bar.update(int(sum(own["loss"][1].sum() for own in metrics)))
        bar.set_postfix(epoch=epoch, loss=f"{np.mean([own['loss'] for own in now]):.4f}")
        work.keeper.after_piece(program.states)
    means = work.scores.trained()
    _add(work, "train", epoch, means, range(len(rows)))


def _lane_scorer(problem: Problem, work: Opened) -> Callable:
    """``score(split, epoch, params, places)``: adds what the lanes at some places reach.

    ``params`` are those of all lanes.
    """
    program = work.program
    metrics = lambda params, batch: problem.loss_fn(params, batch)[1]  # noqa: E731
    evaluate = lanes.evaluator(metrics, work.clock, problem.at_once)

    def score(split, epoch, params, places):
        arrays, rows = problem.splits[split]
        arrays = program.data if arrays is problem.splits["train"].arrays else arrays
        own = [rows(program.lanes[n].seed) for n in places]
        means = evaluate(program, [params[n] for n in places], arrays, own)
        _add(work, split, epoch, means, places)

    return score


def _add(work: Opened, split: str, epoch: int, means: Sequence[Mapping], places: Iterable) -> None:
    """Adds the means of the lanes at some places, and prints their mean, lowest and highest."""
    work.scores.add(split, work.program.step(), epoch, means, places)
    shown = {}
    for name in means[0]:
        values = [own[name] for own in means]
        apart = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
        shown[name] = f"{np.mean(values):.4f}{apart}"
    say(epoch, split, shown)


def _keep_best(problem: Problem, work: Opened, epoch: int) -> None:
    """Keeps each lane's weights where they are its best so far."""
    if not problem.selects:
        return
    program, states = work.program, work.program.states
    best = lanes.split(states.best, len(program.lanes))
    for place, params in enumerate(program.params()):
        if best_epoch(work.scores.metrics(place)) == epoch:
            best[place] = params
    program.states = states._replace(best=many.stack(best, program.devices))


def _choice(problem: Problem, work: Opened) -> lanes.Choice:
    """The lanes whose weights that count are best on validation, or all if nothing is swept."""
    found = []
    for place in range(len(work.program.lanes)):
        metrics = work.scores.metrics(place)
        prefix = "best_validation" if problem.selects else "validation"
        metrics = metrics | selected(problem, metrics)
        fine = math.isfinite(metrics.get(f"{prefix}_loss", math.nan))
        found.append(metrics[f"{prefix}_accuracy"] if fine else math.nan)
    return lanes.choose(work.program.lanes, "validation_accuracy", found, highest=True)


def _leave(problem: Problem, work: Opened, dataset: Any, row: str | None) -> dict[str, Any]:
    """The weights that count, the figures and the record; returns its metrics."""
    program, choice = work.program, _choice(problem, work)
    state = program.states.state
    state = state._replace(params=weights_of(program.states, problem))
    program.states = program.states._replace(state=state)
    title = f"{work.config.cell} on {dataset.title}, {which(work.config)}"
    curve = functools.partial(work.scores.curve, name="accuracy")
    curves = {split: curve(split, places=choice.lanes) for split in work.scores.epochs}
    draw(work.folder, "accuracy", title, curves, "accuracy", xlabel="epoch")
    if choice.swept:
        swept = by_value(program.lanes, *curve("validation", places=range(len(program.lanes))))
        draw(work.folder, "sweep", title, swept, "validation accuracy", xlabel="epoch")
    found = [work.scores.metrics(n) for n in choice.lanes]
    found = [own | selected(problem, own) for own in found]
    return finish(work, found, choice, dataset=dataset, row=row)
