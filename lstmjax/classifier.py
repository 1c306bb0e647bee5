"""The loop of a classifier's experiment: one run, or many lanes for `--seeds` and `--sweep`.

A script says what it trains on as a ``Problem`` and leaves the rest to ``classify``: it trains on
one or several devices, keeps what it has reached, scores validation after every epoch and the test
split once, after the last one, and leaves the record. With ``select`` the weights that are tested
and left are those of the epoch with the highest validation accuracy, and not the last ones; they
are part of what is kept, so that a run that is taken up again tests the same bits.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lstmjax import (
    diagnose,
    distributed,
    lane_classifiers,
    lanes,
    parallel,
    reproducible,
    scores,
    train,
)
from lstmjax.keeper import Keeper
from lstmjax.lane_classifiers import (
    Kept,
    Problem,
    best_epoch,
    check_batch,
    progress_bar,
    selected,
    weights_of,
)
from lstmjax.records import params_sha256, write_file


def classify(
    experiment: str,
    config: Any,
    problem: Problem,
    dataset: Any,
    *,
    row: str | None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Trains, chooses, scores the test split and records.

    Args:
      experiment: its name.
      config: its configuration, with ``cell``, ``epochs``, ``batch_size``, what ``Keeper`` reads
        and what ``lanes.check`` has checked.
      problem: what to train on.
      dataset: for the record, with ``title``, ``name``, ``source`` and ``sha256``.
      row: of BENCHMARKS.md, or None.
      files: further files for the folder, by name.

    Raises:
      ConfigError: a batch that is never full where only full ones count.
    """
    if lanes.asked_for(config):
        how = {"row": row, "files": files}
        return lane_classifiers.classify(experiment, config, problem, dataset, **how)
    check_batch(config, problem)
    _one(experiment, config, problem, dataset, row, files or {})


# ---- one run ------------------------------------------------------------------------------------


class _Ready(NamedTuple):
    """One run before its first step."""

    devices: list[jax.Device]
    clock: train.Clock
    splits: dict[str, dict[str, np.ndarray]]
    kept: Kept
    diagnosis: diagnose.Diagnosis
    advance: Callable
    evaluate: Callable


def _ready(config: Any, problem: Problem, dataset: Any) -> _Ready:
    """One step for any number of devices; many steps in one compiled call."""
    devices, clock = parallel.use_devices(config.devices), train.Clock()
    splits = {
        name: {field: a[split.rows(config.seed)] for field, a in split.arrays.items()}
        for name, split in problem.splits.items()
    }
    tx = problem.optimiser(config, problem.updates(config))
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(problem.init)(init_key)
    distributed.check_same(data=dataset.sha256, weights=params_sha256(params))
    kept = Kept(train.init_state(params, tx, step_key), params if problem.selects else ())
    diagnosis = problem.diagnosis({name: a[: diagnose.ROWS] for name, a in splits["train"].items()})
    diagnosis.look("initialisation", params)
    step = train.make_train_step(
        problem.loss_fn,
        tx,
        axis_name=parallel.AXIS,
        of_gradient=diagnosis.of_gradient,
        on_nan=config.on_nan,
    )
    advance = parallel.runner(step, devices, clock)
    advance = reproducible.checked(advance, config.deterministic)
    metrics = lambda params, batch: problem.loss_fn(params, batch)[1]  # noqa: E731
    evaluate = parallel.evaluator(metrics, devices, clock, problem.at_once)
    return _Ready(devices, clock, splits, kept, diagnosis, advance, evaluate)


def _one(
    experiment: str, config: Any, problem: Problem, dataset: Any, row: str | None, files: Mapping
) -> None:
    """One run, its batches split over the devices."""
    print(f"training on {dataset.title}, sha256 {dataset.sha256[:12]}")
    ready = _ready(config, problem, dataset)
    devices, diagnosis, size = ready.devices, ready.diagnosis, len(ready.splits["train"]["label"])
    data = parallel.place(ready.splits["train"], devices)  # and there it stays
    options = {"drop_remainder": problem.drop_remainder, "at_most": problem.at_most}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(distributed.open_run(experiment, config))
        found, seen = scores.Scores(folder), train.Tally()
        parts = {"scores": found.epochs, "epoch": seen, "seconds": ready.clock.seconds}
        parts |= {"diagnosis": diagnosis}
        keeper = stack.enter_context(Keeper(folder, config, parts, dataset=dataset))
        kept = parallel.place(keeper.restored(ready.kept), devices)
        bar = progress_bar(config, problem, size, keeper.epoch)
        for epoch in keeper.epochs(config.epochs):
            pieces = train.plan_epoch(
                size, config.batch_size, seed=config.seed, epoch=epoch, multiple=len(devices),
                **options,
            )  # fmt: skip
            for piece in parallel.ahead(keeper.left(pieces), devices):
                state, metrics = ready.advance(kept.state, data, piece)
                kept = kept._replace(state=state)
                metrics = keeper.checked(kept, metrics)
                now = scores.means(metrics)
                folder.log(int(state.step), epoch=epoch, **now)
                diagnosis.log(int(state.step), metrics)
                bar.update(int(metrics["loss"][1].sum()))
                bar.set_postfix(epoch=epoch, loss=f"{now['loss']:.4f}")
                seen.add(metrics)
                keeper.after_piece(kept)
            ready.clock.end_epoch()
            kept = _score(problem, ready, kept, found, epoch, seen, last=epoch == config.epochs)
            keeper.after_epoch(kept, found.last("validation"), last=epoch == config.epochs)
        bar.close()
        if not distributed.is_main():
            return

        for name, content in files.items():
            write_file(folder.path / name, content)
        title, params = (
            f"{config.cell} on {dataset.title}",
            parallel.fetch(weights_of(kept, problem)),
        )
        diagnosis.look("trained", params)
        chosen = selected(problem, found.metrics())
        if chosen:
            accuracy = f"validation accuracy {chosen['best_validation_accuracy']:.4f}"
            print(f"the weights are those of epoch {chosen['best_epoch']}, {accuracy}")
        more = diagnosis.finish(folder, title) | keeper.numbers() | chosen
        how = {"seconds": ready.clock.seconds, "seed": config.seed, "devices": devices, "row": row}
        how |= {"updates": int(kept.state.step)}
        scores.finish(folder, found, params, title=title, dataset=dataset, more=more, **how)


def _score(
    problem: Problem,
    ready: _Ready,
    kept: Kept,
    found: scores.Scores,
    epoch: int,
    seen: train.Tally,
    last: bool,
) -> Kept:
    """Scores the splits after an epoch, and keeps its weights where they are the best so far."""
    step = int(kept.state.step)
    found.add("train", step, epoch, scores.means(seen.take()))
    if "validation" in problem.splits:
        means = ready.evaluate(kept.state.params, ready.splits["validation"])
        found.add("validation", step, epoch, means)
    if problem.selects and best_epoch(found.metrics()) == epoch:
        kept = kept._replace(best=parallel.fetch(kept.state.params))
    if last or problem.test_every_epoch:
        weights = parallel.place(weights_of(kept, problem), ready.devices)
        found.add("test", step, epoch, ready.evaluate(weights, ready.splits["test"]))
    return kept
