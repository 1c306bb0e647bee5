"""A series read window by window, by many lanes: the loop of experiments/sin.py for `--seeds`.

Learners of one run (the state carried, or advanced twice) are steps side by side in its lane, so
that one program trains them all.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lstmjax import train
from lstmjax.data.dataset import Dataset
from lstmjax.lane_runs import Opened, about, draw_losses, finish, log, opened, said, which
from lstmjax.lanes import Program, choose, equal_parts, first_device


class Series(NamedTuple):
    """What an experiment says of one run.

    Attributes:
      first_state: ``first_state(config)``: a train step's state and what it carries, before the
        first update, the same for every learner.
      loss_fns: ``loss_fn(params, batch, key, carry)`` of each learner, by label.
      optimiser: ``optimiser(config)``.
      windows: arrays [K·B, ...] by name, batch after batch.
      batch_size: B.
      numbers: ``numbers(config, curves)``: a record's metrics, "mse" among them, from the MSE
        [K] of each learner.
      title: of the data.
    """

    first_state: Callable
    loss_fns: Mapping[str, Callable]
    optimiser: Callable
    windows: Mapping[str, np.ndarray]
    batch_size: int
    numbers: Callable
    title: str


def learn(
    experiment: str, config: Any, series: Series, dataset: Dataset, *, row: str | None
) -> None:
    """A run of many lanes: trains on all batches in their order, chooses, and records.

    Args:
      experiment: its name.
      config: its configuration, with what ``lanes.check`` has checked.
      series: what to train on.
      dataset, row: as in ``Run.finish``.
    """
    print(f"training on {dataset.title}, sha256 {dataset.sha256[:12]}: {about(config)}")
    clock = train.Clock()
    program = _program(config, series, clock)
    examples = np.arange(len(next(iter(series.windows.values()))))
    plan = train.plan_batches(examples, series.batch_size)
    pieces = [[piece] * len(program.lanes) for piece in equal_parts(plan, at_most=50)]
    mse: dict[str, list] = {label: [] for label in series.loss_fns}  # of each update, by lane
    with opened(experiment, config, program, clock, dataset=dataset, mse=mse) as work:
        bar = tqdm(total=len(plan["rows"]), unit=" updates", disable=None)
        for _ in work.keeper.epochs(1):  # one pass over the series
            for plans in work.keeper.left(pieces):
                _count(work, plans, program.advance(plans), mse)
                bar.update(program.step() - bar.n)
                work.keeper.after_piece(program.states)
            work.keeper.after_epoch(program.states, last=True)
        bar.close()
        metrics = _leave(work, series, mse, dataset, row)
    print(
        f"MSE {said(metrics, 'mse', '.5f')} ({which(config)}) over the last 20 of "
        f"{len(plan['rows'])} updates on {dataset.title}; record in {work.folder.path}"
    )


def _program(config: Any, series: Series, clock: train.Clock) -> Program:
    """The training of all lanes, whose states are tuples of all learners'."""

    def start(config):
        return (series.first_state(config),) * len(series.loss_fns)

    def make_step(config):
        tx = series.optimiser(config)
        make = functools.partial(train.make_train_step, stateful=True, on_nan=config.on_nan)
        steps = [make(first_device(loss_fn), tx) for loss_fn in series.loss_fns.values()]

        def step(states, batch):
            done = [own(state, batch) for own, state in zip(steps, states, strict=True)]
            return tuple(state for state, _ in done), [metrics for _, metrics in done]

        return step

    data = series.windows
    return Program.of(config, clock, start=start, make_step=make_step, data=data)


def _count(work: Opened, plans: Sequence, found: Sequence, mse: Mapping[str, list]) -> None:
    """Adds the MSE of a piece's updates, a list over lanes for each, to every learner's.

    An update that was skipped has none: NaN.
    """
    for number, values in enumerate(mse.values()):
        own = work.watch.checked(plans, [metrics[number] for metrics in found])
        sums, counts = np.stack([metrics["loss"] for metrics in own], axis=1)  # [S, updates]
        values.extend(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).T.tolist())


def _leave(
    work: Opened, series: Series, mse: Mapping[str, list], dataset: Dataset, row: str | None
) -> dict[str, Any]:
    """Lines, figures and the record; returns its metrics."""
    curves = {label: np.array(values, float).T for label, values in mse.items()}  # [S, updates]
    lanes, first = work.program.lanes, next(iter(curves.values()))
    for update, values in enumerate(first.T):
        log(work.folder, lanes, update, [{"mse": float(value)} for value in values])
    found = [
        series.numbers(work.config, [own[n].tolist() for own in curves.values()])
        for n in range(len(lanes))
    ]
    choice = choose(lanes, "mse", [own["mse"] for own in found], highest=False)
    updates = np.arange(first.shape[1])
    drawn = {label: (updates, values) for label, values in curves.items()}
    draw_losses(work, choice, f"{series.title}, {which(work.config)}", drawn)
    return finish(work, [found[n] for n in choice.lanes], choice, dataset=dataset, row=row)
