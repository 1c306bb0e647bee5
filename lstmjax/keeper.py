"""Keeping a run: what it has reached is saved, and it goes on from there to the same bits.

A training loop is wrapped in a ``Keeper``, which knows how far it is (which epoch, which piece of
it), saves that with the state and with whatever else the loop has gathered, and starts the loop
there when the run is taken up again:

    with Run.open("imdb", config) as folder, Keeper(folder, config, parts) as keeper:
        state = parallel.place(keeper.restored(state), devices)
        for epoch in keeper.epochs(config.epochs):
            for piece in parallel.ahead(keeper.left(pieces_of(epoch)), devices):
                state, metrics = advance(state, data, piece)
                metrics = keeper.checked(state, metrics)     # stops at NaN
                ...
                keeper.after_piece(state)                    # saves when it is time, or ends
            ...
            keeper.after_epoch(state, score)

Orders, keys and masks depend on the seed and the step alone, so nothing else has to be kept.
"""

import functools
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lstmjax import distributed, parallel
from lstmjax.checkpoint import named
from lstmjax.records import Run, RunError, RunStopped, described, plain, to_json, write_file

# With on_nan "skip" a bad batch now and then is left out, and training goes on. Where so many steps
# in a row are not finite it is the weights that make them so, and skipping does not change those.
MOST_SKIPPED = 25
_ONCE = 2.0  # seconds in which a second SIGTERM is the first one's echo
# What a second signal does where the first one would have been ignored, as in a shell's background.
SIGNALS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


def save_every(text: str) -> tuple[float, str]:
    """Reads "500" (steps) or "60s" (seconds): ``(number, "steps" or "seconds")``.

    Raises:
      ValueError: neither of them, or a number that is not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)s|(\d+)", text)
    number = float(found[1] or found[2]) if found else 0
    if not 0 < number < math.inf:
        raise ValueError(f"save_every: got {text!r}, expected steps, as 500, or seconds, as 60s")
    return number, "seconds" if found[1] else "steps"


class Keeper:
    """Saves a run as it goes, ends it when it is asked to, and goes on where it was.

    A context manager: within it SIGTERM and SIGINT (Ctrl-C) mean to save after the present piece
    and to end with ``RunStopped``; a second one ends the process at once. (Where a scheduler tells
    all processes of a job and a parent passes it on, SIGTERM comes twice: within two seconds the
    second one does nothing.)

    Attributes:
      epoch: which epoch the run is in, from 1 on.
      piece: how many of its pieces are done.
    """

    def __init__(
        self,
        folder: Run,
        config: Any,
        parts: Mapping[str, Any],
        *,
        dataset: Any = None,
        pack: Callable = lambda state: state,
    ):
        """Takes up the folder's checkpoints.

        Args:
          folder: the run, new or reopened.
          config: with ``save_every`` ("500" steps or "60s"), ``keep`` (checkpoints), ``resume``
            (a folder or None), ``on_nan`` ("stop" or "skip").
          parts: what the loop gathers, by name: lists and dicts of plain values, and objects with
            ``progress() -> JSON`` and ``restore(JSON)``.
          dataset: what is trained on, as in ``Run.finish``: a run does not go on with other data.
            None: nobody looks.
          pack: the part of a state that is saved, a function of the state as NumPy arrays.

        Raises:
          ValueError: ``save_every`` or ``keep`` cannot be used.
          RunError: the folder cannot be used, or its checkpoints have gone.
        """
        self.epoch, self.piece = 1, 0
        self._folder, self._parts, self._pack = folder, dict(parts), pack
        self._data = None if dataset is None else described(dataset)
        self._every, self._unit = save_every(config.save_every)
        self._resume, self._on_nan = config.resume, config.on_nan
        if config.resume is not None and distributed.is_main():
            _check_saved(folder.path)  # before the folder of checkpoints is made
        self._checkpoints = distributed.open_checkpoints(folder, config.keep)
        self._plans: Sequence[Mapping[str, np.ndarray]] = ()
        self._best = -math.inf
        self._skipped = 0
        self._in_a_row: dict[str, int] = {}  # skipped steps up to now, by learner
        self._saved = 0, time.monotonic()  # the step and the time of the last save
        self._signal: int | None = None
        self._asked = 0.0  # when the signal came
        self._before: dict[int, Any] = {}

    # ---- where the loop is ----------------------------------------------------------------------

    def restored(self, state: Any) -> Any:
        """The state to start from: the one given, or that of the run that is taken up again.

        The parts get back what they held then, and the run's files end where they ended then. Where
        a run was ended before its first checkpoint, what it had logged stays under another name.

        Args:
          state: the state before the first step, a pytree of arrays.

        Raises:
          RunError: the checkpoint is of another model or of other data, or none of the checkpoints
            is whole.
        """
        if self._resume is None:
            return state
        found = distributed.from_main(self._checkpoints.latest())
        if found is None:
            aside = _log_aside(self._folder.path) if distributed.is_main() else None
            kept = f"; what was logged is in {aside}" if aside else ""
            self._say(f"{self._folder.path} has no checkpoint yet: from the beginning{kept}")
            self._folder.restore({})
            return state
        step, arrays, progress = found
        like = self._pack(_plain_keys(state))
        try:
            self._check_data(progress.get("data"))  # all processes have what the first one read
            state = _filled(like, arrays, state, self._checkpoints.folder)
            self.epoch, self.piece = progress["epoch"], progress["piece"]
            self._best, self._skipped = float(progress["best_score"]), int(progress["skipped"])
            row = progress.get("in_a_row", {})  # checkpoints of old have none
            self._in_a_row = {str(name): int(count) for name, count in row.items()}
            places = (self.epoch - 1, self.piece)
            if not all(type(place) is int and place >= 0 for place in places):
                raise ValueError(f"epoch {self.epoch}, piece {self.piece}")
            for name, part in self._parts.items():
                _restore(part, progress["parts"][name])
            self._folder.restore(progress["files"])
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            where = f"{self._checkpoints.folder}: the checkpoint of step {step}"
            raise RunError(f"{where} does not hold what this run saves") from error
        self._saved = step, time.monotonic()
        self._say(f"going on from step {step} in {self._folder.path}")
        return state

    def _check_data(self, saved: Any) -> None:
        """Looks whether a checkpoint is of a run on these data.

        Args:
          saved: what the checkpoint says of them; None where it was saved before any did.

        Raises:
          RunError: it is of other data.
          ValueError: it says nothing that can be understood.
        """
        if saved is None or self._data is None:
            return
        if not all(isinstance(saved[key], str) and saved[key].isprintable() for key in self._data):
            raise ValueError(f"data: got {saved!r}, expected {', '.join(self._data)}")
        # The name and the source may be other ones: the same arrays are the same data.
        if saved["sha256"] != self._data["sha256"]:
            was, now = _told(saved), _told(self._data)
            raise RunError(f"--resume: {self._resume} was trained on {was}, got {now}")

    def epochs(self, count: int) -> Iterator[int]:
        """The numbers of the epochs that are not done, up to ``count``."""
        while self.epoch <= count:
            yield self.epoch

    def left(self, plans: Sequence[Mapping[str, np.ndarray]]) -> Sequence[Mapping]:
        """Those of an epoch's plans that have not been trained on."""
        self._plans = plans
        return plans[self.piece :]

    # ---- after each piece and epoch -------------------------------------------------------------

    def checked(
        self, state: Any, metrics: Mapping[str, Any], learner: str = "model"
    ) -> dict[str, Any]:
        """Looks for NaN and infinity in a piece's losses and gradients, before anything is saved.

        Args:
          state: after the piece.
          metrics: of a step made with ``on_nan``, (sums [K], counts [K]) by name.
          learner: whose they are, where several learn from the same pieces.

        Returns:
          The metrics without those that only this is for.

        Raises:
          RunError: a step's loss or gradient is not finite, and it was not skipped, or it is one of
            ``MOST_SKIPPED`` in a row that were. The line names the step and the norm; the rows of
            its batch stand in `nonfinite-<step>.json`.
        """
        metrics = dict(metrics)
        norms = np.asarray(metrics.pop("gradient")[0])
        skipped = np.asarray(metrics.pop("skipped", (np.zeros_like(norms),))[0]) > 0
        sums, counts = (np.asarray(a) for a in metrics["loss"])
        bad = skipped | ~(np.isfinite(norms) & np.isfinite(sums))
        row = in_a_row(skipped, self._in_a_row.get(learner, 0))
        self._in_a_row[learner] = row[-1]
        if not bad.any():
            return metrics
        first = _step(state) - len(norms) + 1
        for k in np.flatnonzero(bad):
            loss = math.nan if skipped[k] else float(sums[k]) / max(float(counts[k]), 1)
            self._report(first + int(k), loss, float(norms[k]), self._plans[self.piece], int(k))
            if not skipped[k] or row[k] >= MOST_SKIPPED:
                raise RunError(self._complaint(first + int(k), loss, float(norms[k]), row[k]))
        self._skipped += int(skipped.sum())
        self._folder.log(_step(state), skipped=int(skipped.sum()))
        return metrics

    def after_piece(self, state: Any) -> None:
        """Counts a piece as done; saves if it is time, and ends the run if a signal came.

        Raises:
          RunStopped: a signal came, and the state is saved.
          RunError: it cannot be saved.
        """
        self.piece += 1
        if parallel.agree(self._signal is not None):
            self._stop(state)
        # At the end of an epoch its scores are still to come: it is saved with them.
        elif self.piece < len(self._plans) and parallel.agree(self._due(state)):
            self._save(state)

    def after_epoch(self, state: Any, score: float | None = None, *, last: bool = False) -> None:
        """Counts an epoch as done; saves if it is time, if it is the best, or the last.

        Args:
          state: after the epoch.
          score: on validation data, the higher the better; None where there is none.
          last: whether no epoch follows.

        Raises:
          RunStopped: a signal came, and the state is saved.
          RunError: it cannot be saved; or it is the last one, and all steps of the run were
            skipped.
        """
        if last and _step(state) in self._in_a_row.values():
            batches = f"their batches are in {self._folder.path}/nonfinite-*.json"
            raise RunError(f"{all_skipped(_step(state))}; {batches}; {self._good()}")
        self.epoch, self.piece = self.epoch + 1, 0
        best = score is not None and score > self._best
        if best:
            self._best = float(score)
        if not last and parallel.agree(self._signal is not None):
            self._stop(state, best)
        elif best or last or parallel.agree(self._due(state)):
            self._save(state, best)
        if last:  # weights are written only where there is a checkpoint of them
            self._checkpoints.wait()

    def numbers(self) -> dict[str, int]:
        """For the record: how many updates were skipped, where they are or have been."""
        skips = self._on_nan == "skip" or self._skipped > 0
        return {"skipped_updates": self._skipped} if skips else {}

    # ---- saving ---------------------------------------------------------------------------------

    def _due(self, state: Any) -> bool:
        if any(self._in_a_row.values()):  # the checkpoints that stay are to be from before
            return False
        step, then = self._saved
        passed = _step(state) - step if self._unit == "steps" else time.monotonic() - then
        return passed >= self._every

    def _save(self, state: Any, best: bool = False) -> None:
        """Starts to save; the files of the run are written as far as is told."""
        step = _step(state)
        arrays = named(self._pack(parallel.fetch(_plain_keys(state))))  # all processes have to ask
        self._saved = step, time.monotonic()
        if not distributed.is_main():
            return
        if not (self._folder.path / "config.json").exists():
            raise RunError(f"the run's folder {self._folder.path} has gone")
        if step in self._checkpoints.steps():  # saved when a signal came, before it was scored
            if best:
                self._checkpoints.mark_best(step)
            return
        progress = {
            "epoch": self.epoch,
            "piece": self.piece,
            "best_score": self._best,
            "skipped": self._skipped,
            "in_a_row": self._in_a_row,
            "data": self._data,
            "parts": {name: _progress(part) for name, part in self._parts.items()},
            "files": self._folder.progress(),
        }
        # An array without elements has nothing to be saved, and Orbax takes none.
        arrays = {name: np.asarray(a) for name, a in arrays.items() if np.size(a)}
        self._checkpoints.save(step, arrays, plain(progress, "progress"), best=best)

    def _stop(self, state: Any, best: bool = False) -> None:
        """Saves and ends the run."""
        self._save(state, best)
        self._checkpoints.wait()
        name = signal.Signals(self._signal).name if self._signal else "another process"
        raise RunStopped(
            f"stopped at step {_step(state)} by {name} and saved; "
            f"go on with --resume {self._folder.path}"
        )

    def _report(self, step: int, loss: float, norm: float, plan: Any, k: int) -> None:
        """Writes down which examples a step that went wrong was made on."""
        if not distributed.is_main():
            return
        path = self._folder.path / f"nonfinite-{step}.json"
        rows = np.asarray(plan["rows"][k])[np.asarray(plan["weight"][k]) > 0]
        if not path.exists():
            write_file(path, to_json({"step": step, "loss": loss, "norm": norm, "rows": rows}))

    def _complaint(self, step: int, loss: float, norm: float, row: int) -> str:
        return (
            f"step {step}: the loss is {loss:g}, the gradient's norm {norm:g}; "
            f"its batch is in {self._folder.path}/nonfinite-{step}.json; {self._good()}; "
            f"{left_out(row)}"
        )

    def _good(self) -> str:
        """From where a run that ended itself can go on."""
        self._checkpoints.wait()
        steps = self._checkpoints.steps()
        return f"the last good checkpoint is of step {steps[-1]}" if steps else "nothing was saved"

    def _say(self, line: str) -> None:
        """Prints a line on standard error, in one process."""
        if distributed.is_main():
            print(line, file=sys.stderr)

    # ---- signals --------------------------------------------------------------------------------

    def __enter__(self) -> "Keeper":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self._give_back()
        try:
            self._checkpoints.close()
        except RunError:
            if kind is None:  # else the first error is the one to be told
                raise

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal, self._asked = number, time.monotonic()
        for other, before in self._before.items():  # from now on they end the process
            ignored = before in (signal.SIG_IGN, None)
            again = SIGNALS[other] if ignored else before
            if other == number == signal.SIGTERM:
                again = functools.partial(self._on_echo, again)
            signal.signal(other, again)
        name = signal.Signals(number).name
        print(f"{name}: saving after these steps; again to end at once", file=sys.stderr)

    def _on_echo(self, again: Any, number: int, frame: Any) -> None:
        """A second SIGTERM: what ``again`` does, but not just after the first one."""
        if time.monotonic() - self._asked >= _ONCE:
            signal.signal(number, again)
            os.kill(os.getpid(), number)

    def _give_back(self) -> None:
        """Makes signals mean what they meant before."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}


# ---- what is not finite -------------------------------------------------------------------------


def in_a_row(skipped: Sequence[bool], before: int) -> list[int]:
    """How many steps in a row were skipped, up to each step of a piece.

    Args:
      skipped: [K] of them.
      before: how many in a row were skipped up to the piece.

    Returns:
      [K] counts, 0 for a step that was not skipped.
    """
    counts = []
    for one in skipped:
        before = before + 1 if one else 0
        counts.append(before)
    return counts


def left_out(row: int) -> str:
    """The end of a complaint of a step: that so many in a row were skipped, or that it could be."""
    return f"{row} steps in a row were left out" if row else "--on-nan skip leaves such steps out"


def all_skipped(steps: int) -> str:
    """The complaint of a run, or of a lane, that has learned nothing."""
    return f"all of the {steps} steps were left out: no loss and gradient was finite"


# ---- the log ------------------------------------------------------------------------------------


def _logged(path: Path) -> bool:
    """Whether a run's folder holds lines of steps."""
    log = path / "metrics.jsonl"
    return log.exists() and log.stat().st_size > 0


def _check_saved(path: Path) -> None:
    """Raises RunError for a run that has logged steps, and lost the folder of its checkpoints.

    The folder is made before the first step: a run without a checkpoint has it, an empty one.
    """
    if _logged(path) and not (path / "checkpoints").exists():
        what = "has gone, and metrics.jsonl holds steps of this run: put it back, or start anew"
        raise RunError(f"--resume: {path}/checkpoints {what}")


def _log_aside(path: Path) -> str | None:
    """Gives the log of a run that begins anew another name, and returns that; None without one."""
    if not _logged(path):
        return None
    aside, number = path / "metrics-before.jsonl", 1
    while aside.exists():
        number += 1
        aside = path / f"metrics-before-{number}.jsonl"
    try:
        os.rename(path / "metrics.jsonl", aside)
    except OSError as error:
        raise RunError(f"cannot rename {error.filename}: {error.strerror}") from error
    return aside.name


# ---- parts and states ---------------------------------------------------------------------------


def _told(data: Mapping[str, str]) -> str:
    """A dataset in a few words."""
    return f"{data['name'][:80]} ({data['source'][:80]}, sha256 {data['sha256'][:12]})"


def _progress(part: Any) -> Any:
    return part if isinstance(part, (list, dict)) else part.progress()


def _restore(part: Any, progress: Any) -> None:
    if isinstance(part, list):
        part[:] = progress
    elif isinstance(part, dict):
        part.clear()
        part.update(progress)
    else:
        part.restore(progress)


def _step(state: Any) -> int:
    """The number of steps of a state: of its first ``TrainState``, in its first lane."""
    while not hasattr(state, "step"):
        state = state[0]
    return int(np.ravel(parallel.fetch(state.step))[0])


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain_keys(state: Any) -> Any:
    """The state with its PRNG keys as numbers."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _filled(like: Any, arrays: Mapping[str, np.ndarray], state: Any, where: Any) -> Any:
    """The arrays in the places of a state, checked against what is expected there."""
    expected = named(like)
    for name in sorted(expected.keys() | arrays.keys()):
        want, got = expected.get(name), arrays.get(name)
        if want is not None and got is None and np.size(want) == 0:
            continue
        if want is None or got is None:
            what = "has no place in this model" if want is None else "is missing"
            raise RunError(f"{where}: {name} {what}")
        if got.shape != want.shape or got.dtype != want.dtype:
            raise RunError(
                f"{where}: {name} is {got.dtype}{list(got.shape)}, "
                f"expected {want.dtype}{list(want.shape)}"
            )

    def place(name, leaf):
        value = arrays.get(name, leaf)
        if _is_key(leaf):
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        return value

    names = list(named(state))
    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, [place(*pair) for pair in zip(names, leaves, strict=True)])
