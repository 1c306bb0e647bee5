"""What runs of many lanes share: lines, figures, scores, what is not finite, and the record.

A line of metrics.jsonl has the mean over the lanes under a number's own name, and each lane's as
"loss/seed3" or "loss/lr0.001-seed3". A record has a list over seeds for each number, with its mean,
standard deviation and 95 % interval (``seeds.together``), and the means of the values that a sweep
chose from. The weights of lane "seed3" are in params-seed3.safetensors.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lstmjax import checkpoint, plots, train
from lstmjax import seeds as many
from lstmjax.keeper import MOST_SKIPPED, Keeper, all_skipped, in_a_row, left_out
from lstmjax.lanes import Choice, Lane, Program, plus_minus
from lstmjax.provenance import count_parameters
from lstmjax.records import Run, RunError, params_sha256, to_json, write_file
from lstmjax.scores import means

# ---- lines, figures and the record --------------------------------------------------------------


class Opened(NamedTuple):
    """What a loop over many lanes works with."""

    config: Any
    program: Program
    clock: train.Clock
    folder: Run
    scores: "Scores"
    watch: "Watch"
    keeper: Keeper


@contextlib.contextmanager
def opened(
    experiment: str,
    config: Any,
    program: Program,
    clock: train.Clock,
    *,
    dataset: Any = None,
    **parts: Any,
) -> Iterator[Opened]:
    """The run's folder and keeper, the latter with scores, seconds and further parts to be kept.

    The program goes on from where the run was, if it was on the same ``dataset`` (see ``Keeper``).
    """
    with Run.open(experiment, config) as folder:
        scores, watch = Scores(folder, program.lanes), Watch(folder, program, config)
        parts |= {"scores": scores, "watch": watch, "seconds": clock.seconds}
        with Keeper(folder, config, parts, dataset=dataset, pack=program.pack) as keeper:
            program.put(keeper.restored(program.states))
            yield Opened(config, program, clock, folder, scores, watch, keeper)


def log(folder: Run, lanes: Sequence[Lane], step: int, found: Sequence[Mapping], **common) -> None:
    """Logs a line: {"loss": mean over lanes, "loss/seed0": …}, for every name in ``found``.

    Args:
      folder: the run.
      lanes: S lanes.
      step: updates so far, of each lane.
      found: S dicts of numbers.
      common: further numbers, that are no lane's.
    """
    line = dict(common)
    for name in found[0]:
        values = [own[name] for own in found]
        line[name] = float(np.mean(values))
        line |= {f"{name}/{lane.name}": v for lane, v in zip(lanes, values, strict=True)}
    folder.log(step, **line)


def draw(
    folder: Run, name: str, title: str, curves: Mapping[str, tuple], ylabel: str, **options: Any
) -> None:
    """Saves a figure of curves ``(x [N], values [S, N])`` by label, with means and 95 % intervals.

    ``options`` are those of ``plots.learning_bands``; on a logarithmic axis mean and interval are
    those of the logarithm.
    """
    logy, found = options.get("logy", False), {}
    for label, (x, values) in curves.items():
        values = np.asarray(values, float)
        if logy:
            values = np.where((values > 0) & np.isfinite(values), values, np.nan)
        with np.errstate(invalid="ignore"):  # of a lane that has diverged
            mean, half = many.interval(np.log(values) if logy else values)
            edges = mean, mean - half, mean + half
        found[label] = plots.Band(x, values, *(np.exp(e) if logy else e for e in edges))
    ylabel = f"{ylabel} (mean, 95 % interval)"
    folder.figure(name, plots.learning_bands(title, found, ylabel, **options))


def by_value(lanes: Sequence[Lane], x: Any, values: Sequence[Any]) -> dict[str, tuple]:
    """The curves [S, N] of all lanes, by the value that was swept; empty without a sweep."""
    places: dict[str, list[int]] = {}
    for place, lane in enumerate(lanes):
        for field, value in lane.swept.items():
            places.setdefault(f"{field.replace('_', ' ')} {value!r}", []).append(place)
    return {label: (x, [values[n] for n in own]) for label, own in places.items()}


def finish(
    work: Opened,
    found: Sequence[Mapping[str, Any]],
    choice: Choice,
    *,
    dataset: Any,
    row: str | None,
) -> dict[str, Any]:
    """Saves every lane's weights, writes the record and says what was chosen.

    Args:
      work: of ``opened``.
      found: the metrics of the chosen lanes, each as a single run's record has them.
      choice: from ``choose``.
      dataset, row: as in ``Run.finish``.

    Returns:
      The record's metrics.

    Raises:
      RunError: a lane has skipped all of its steps.
    """
    program = work.program
    work.watch.ended()
    named = zip(program.lanes, program.params(), strict=True)
    weights = {lane.name: params for lane, params in named}
    for name, params in weights.items():
        checkpoint.save_params(work.folder.path / f"params-{name}.safetensors", params)
    found = [own | work.watch.numbers(n) for n, own in zip(choice.lanes, found, strict=True)]
    metrics = many.together(found, [program.lanes[n].seed for n in choice.lanes]) | choice.metrics
    work.folder.finish(
        dataset=dataset,
        metrics=metrics,
        seconds=work.clock.seconds,
        params_sha256=params_sha256(weights),
        parameters=count_parameters(weights) // len(weights),
        updates=program.step(),
        seed=work.config.seed,
        devices=program.devices,
        row=row,
    )
    if choice.line:
        print(choice.line)
    return metrics


def draw_losses(
    work: Opened, choice: Choice, title: str, curves: Mapping[str, tuple], **options: Any
) -> None:
    """The figures "loss", of the chosen lanes, and "sweep", of all values that were swept.

    Args:
      work: of ``opened``.
      choice: from ``choose``.
      title: what was trained, and on which data.
      curves: MSE ``(x [N], values [S, N])`` of all lanes, by label; a sweep shows the first one.
      options: as in ``draw``.
    """
    chosen = {
        label: (x, [values[n] for n in choice.lanes]) for label, (x, values) in curves.items()
    }
    draw(work.folder, "loss", title, chosen, "MSE", logy=True, **options)
    if choice.swept:
        swept = by_value(work.program.lanes, *next(iter(curves.values())))
        draw(work.folder, "sweep", title, swept, "MSE", logy=True, **options)


def said(metrics: Mapping[str, Any], name: str, form: str) -> str:
    """A number of a record from ``finish``: mean ± 95 % interval."""
    return plus_minus(float(metrics[f"{name}_mean"]), float(metrics[f"{name}_ci95"]), form)


def which(config: Any) -> str:
    """Whose mean and interval they are: "seeds 0 to 7"."""
    if config.seeds == 1:
        return f"seed {config.seed}"
    return f"seeds {config.seed} to {config.seed + config.seeds - 1}"


def about(config: Any) -> str:
    """What is run at once: "seeds 0 to 7, lr=1e-3,3e-3, in one program"."""
    return f"{which(config)}, {config.sweep + ', ' if config.sweep else ''}in one program"


class Scores:
    """``scores.Scores`` and ``train.Tally`` for many lanes: the means of each split by epoch.

    Attributes:
      epochs: {split: {metric: [(epoch, [value of each lane]), …]}} so far.
      places: {split: which lanes}.
    """

    def __init__(self, folder: Run, lanes: Sequence[Lane]):
        """Args: folder: the run whose metrics.jsonl gets a line for every split and epoch."""
        self._folder, self._lanes = folder, lanes
        self._sums = [train.Tally() for _ in lanes]
        self.epochs: dict[str, dict[str, list]] = {}
        self.places: dict[str, list[int]] = {}

    def count(self, metrics: Sequence[Any]) -> None:
        """Adds the metrics of some training steps, of all lanes."""
        for sums, own in zip(self._sums, metrics, strict=True):
            sums.add(own)

    def piece(self, step: int, epoch: int, metrics: Sequence[Any]) -> list[dict[str, float]]:
        """Adds and logs the metrics of some training steps, of all lanes; returns their means."""
        self.count(metrics)
        found = [means(own) for own in metrics]
        log(self._folder, self._lanes, step, found, epoch=epoch)
        return found

    def trained(self) -> list[dict[str, float]]:
        """The means of all pieces since the last call, of all lanes; NaN where all was skipped."""
        return [means(sums.take()) for sums in self._sums]

    def add(
        self, split: str, step: int, epoch: int, means: Sequence[Mapping], places: Sequence[int]
    ) -> None:
        """Adds the means of the lanes at some places, the same ones each time, after an epoch."""
        lines = [{f"{split}_{name}": v for name, v in own.items()} for own in means]
        log(self._folder, [self._lanes[n] for n in places], step, lines, epoch=epoch)
        self.places[split] = list(places)
        for name in means[0]:
            values = [own[name] for own in means]
            self.epochs.setdefault(split, {}).setdefault(name, []).append((epoch, values))

    def metrics(self, place: int) -> dict[str, Any]:
        """What a single run's record has of the lane at a place."""
        flat = {}
        for split, metrics in self.epochs.items():
            if place in self.places[split]:
                row = self.places[split].index(place)
                for name, points in metrics.items():
                    values = [values[row] for _, values in points]
                    flat |= {f"{split}_{name}": values[-1], f"{split}_{name}_epochs": values}
        return flat

    def curve(self, split: str, name: str, places: Sequence[int]) -> tuple[list, list]:
        """One metric of the lanes at some places: ``(epochs [N], values [S, N])``."""
        epochs = [epoch for epoch, _ in self.epochs[split][name]]
        return epochs, [self.metrics(place)[f"{split}_{name}_epochs"] for place in places]

    def progress(self) -> dict[str, Any]:
        """All of it in JSON's types, for ``restore``."""
        sums = [own.progress() for own in self._sums]
        return {"epochs": self.epochs, "places": self.places, "sums": sums}

    def restore(self, progress: dict[str, Any]) -> None:
        """Goes on from a ``progress``."""
        self.epochs = {
            split: {
                name: [(epoch, [float(v) for v in values]) for epoch, values in points]
                for name, points in metrics.items()
            }
            for split, metrics in progress["epochs"].items()
        }
        self.places = dict(progress["places"])
        for own, sums in zip(self._sums, progress["sums"], strict=True):
            own.restore(sums)


class Watch:
    """``--on-nan`` for many lanes: a ``Keeper`` looks after one.

    In a sweep a lane may come to NaN (its value is too large, and will not be chosen); of seeds
    alone none may, unless such steps are skipped, and not ``MOST_SKIPPED`` of them in a row.
    """

    def __init__(self, folder: Run, program: Program, config: Any):
        """Args: config: with ``on_nan`` and ``sweep``."""
        self._folder, self._program, self._config = folder, program, config
        self._skipped = [0] * len(program.lanes)
        self._in_a_row: list[list[int]] = []  # by learner: skipped steps up to now, of each lane
        self._last = None, 0  # up to which step the last call was, and of which learner

    def checked(self, plans: Sequence[Mapping], metrics: Sequence[Mapping]) -> list[dict]:
        """The metrics of a piece's steps without those that only this is for.

        Where each lane has several learners there is a call for each of them, always in one order.

        Raises:
          RunError: a lane's loss or gradient is not finite; the line names lane, step and norm, and
            the rows of the batch stand in `nonfinite-<lane>-<step>.json`.
        """
        metrics, rows = [dict(own) for own in metrics], self._rows()
        for place, (plan, own) in enumerate(zip(plans, metrics, strict=True)):
            norms = np.asarray(own.pop("gradient")[0])
            skipped = np.asarray(own.pop("skipped", (np.zeros_like(norms),))[0]) > 0
            sums, counts = own["loss"]
            self._skipped[place] += int(skipped.sum())
            bad = skipped | ~(np.isfinite(norms) & np.isfinite(sums))
            row = in_a_row(skipped, rows[place])
            rows[place] = row[-1]
            ends = np.flatnonzero(bad & ~skipped | (np.array(row) >= MOST_SKIPPED))
            if self._config.sweep is None and len(ends):
                k = int(ends[0])
                loss = np.nan if skipped[k] else sums[k] / max(counts[k], 1)
                self._stop(place, plan, k, row, float(loss), float(norms[k]))
        return metrics

    def _rows(self) -> list[int]:
        """Of the learner whose turn it is: how many steps in a row each lane has skipped."""
        step, learner = self._program.step(), 0
        if self._last[0] == step:
            learner = self._last[1] + 1
        if learner == len(self._in_a_row):
            self._in_a_row.append([0] * len(self._skipped))
        self._last = step, learner
        return self._in_a_row[learner]

    def _stop(
        self, place: int, plan: Any, k: int, row: list[int], loss: float, norm: float
    ) -> None:
        lane, step = self._program.lanes[place].name, self._program.step() - len(row) + k + 1
        path = self._folder.path / f"nonfinite-{lane}-{step}.json"
        rows = np.asarray(plan["rows"][k])[np.asarray(plan["weight"][k]) > 0]
        write_file(path, to_json({"step": step, "loss": loss, "norm": norm, "rows": rows}))
        raise RunError(
            f"{lane}, step {step}: the loss is {loss:g}, the gradient's norm {norm:g}; its batch "
            f"is in {path}; what was saved before stays; {left_out(row[k])}"
        )

    def ended(self) -> None:
        """Looks, at the end of a run, for a lane that has learned nothing.

        Raises:
          RunError: all steps of a lane were skipped.
        """
        steps = self._program.step()
        for rows in self._in_a_row if self._config.sweep is None else []:
            for place, row in enumerate(rows):
                if row == steps:
                    lane = self._program.lanes[place].name
                    raise RunError(f"{lane}: {all_skipped(steps)}")

    def numbers(self, place: int) -> dict[str, int]:
        """For the record: how many updates of a lane were skipped, where they are or have been."""
        skips = self._config.on_nan == "skip" or any(self._skipped)
        return {"skipped_updates": self._skipped[place]} if skips else {}

    def progress(self) -> dict[str, list]:
        """For ``restore``."""
        return {"skipped": self._skipped, "in_a_row": self._in_a_row}

    def restore(self, progress: Mapping[str, list] | Sequence[int]) -> None:
        """Goes on from a ``progress``; those of old are the first of its lists alone."""
        if not isinstance(progress, Mapping):
            progress = {"skipped": progress, "in_a_row": []}
        self._skipped = [int(count) for count in progress["skipped"]]
        self._in_a_row = [[int(count) for count in rows] for rows in progress["in_a_row"]]
