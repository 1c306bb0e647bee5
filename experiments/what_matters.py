"""What matters: initial laws, variants of the LSTM and kinds of dropout, a figure for each.

    python experiments/what_matters.py --study init         each framework's initial law, four tasks
    python experiments/what_matters.py --study variants     Greff et al.'s eight variants
    python experiments/what_matters.py --study dropout      seven kinds of dropout on film reviews
    python experiments/what_matters.py --study init --only mnist/torch,imdb --limit 2000      a look
    python experiments/what_matters.py --resume runs/what_matters-20260102-030405     go on with it

A cell is one run of sin.py, imdb.py, mnist.py or long_lag.py (the adding problem over 200 steps) in
a process of its own, with all its seeds in one program and one setting changed; each task's first
cell is the program as it is (without dropout, in the study dropout), and the others are held
against it seed by seed.

    init        sin, imdb, mnist, adding: the laws of lstmjax.initializers.INITS, each with its own
                forget bias (haste's is lstmjax's); torch-1 and such: with a forget bias of 1;
                keras-0, keras-chrono, keras-uniform_gate: the program's law with another bias
    variants    sin, imdb, mnist: lstm, peephole, cifg, nig, nfg, nog, niaf, noaf, fgr
    dropout     imdb: none, and each kind at two rates, as in zoneout-0.1

Cells are compared by their accuracy on validation, of the last epoch and of the best; the test
accuracy stands beside it, since each run scores the test split once, at its end, and nothing is
chosen by it. The series sin has no splits, and is compared by the MSE of its last updates; the
adding problem by the updates until it is solved.

Every cell keeps its folder, mnist/torch for example. What is cut short by Ctrl-C, by SIGTERM or by
a power cut goes on with --resume: finished cells stay as they are, and the one that was under way
goes on where it last saved (the adding problem's begins again). The whole of init takes hours.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from lstmjax import cli, tables, what_matters_plots
from lstmjax import what_matters_tables as found_tables
from lstmjax.initializers import INITS, NO_FORGET_BIAS
from lstmjax.lane_classifiers import best_epoch
from lstmjax.records import Run, RunError, RunStopped, params_sha256
from lstmjax.schema import SECONDS
from lstmjax.seeds import apart
from lstmjax.timing_tables import aligned


@dataclasses.dataclass(frozen=True)
class Config:
    study: Literal["init", "variants", "dropout"] = "init"
    """What is changed."""
    only: str | None = None
    """Cells to run, with commas between: mnist/torch, or a task, or a name in all tasks; the
    program as it is runs in any case. All of them when not given."""
    data: Literal["auto", "tfds", "offline"] = "auto"
    """Of imdb and mnist: the real data if they can be had, the real ones or an error, or others."""
    epochs: int = 4
    """Passes over the training data of imdb and mnist."""
    limit: int | None = None
    """Use only the first so many examples of every split, and make no more updates than that on sin
    and adding: a look, not a result."""
    devices: int | None = None
    """Devices to share the seeds; all there are when not given."""
    seeds: int = 5
    """How many seeds, from --seed on, two or more."""
    seed: int = 0
    """The first seed."""
    resume: str | None = None
    """Folder of a study to go on with; its settings are taken from there."""
    out: str | None = None
    """Folder for the study's files, new or empty; a fresh one under runs/ when not given."""


# The program as it is, by study and task.
REFERENCES = {
    "init": {"sin": "tf1", "imdb": "keras", "mnist": "tf1", "adding": "lstmjax"},
    "variants": dict.fromkeys(("sin", "imdb", "mnist"), "lstm"),
    "dropout": {"imdb": "none"},
}
SCRIPTS = {"sin": "sin", "imdb": "imdb", "mnist": "mnist", "adding": "long_lag"}
VARIANTS = ("lstm", "peephole", "cifg", "nig", "nfg", "nog", "niaf", "noaf", "fgr")
RATES = {
    "dropout": ("0.2", "0.5"),
    "recurrent_dropout": ("0.2", "0.5"),
    "weight_drop": ("0.2", "0.5"),
    "zoneout": ("0.1", "0.3"),
    "locked_dropout": ("0.2", "0.5"),
    "embedding_dropout": ("0.1", "0.3"),
    "word_dropout": ("0.1", "0.3"),
}
STEPS = {"imdb": 80, "mnist": 28}  # of the sequences, for chrono; long_lag.py knows its own
MINUTES = {"sin": 0.3, "imdb": 3, "mnist": 1.5, "adding": 6}  # of a cell, for the bar


class Cell(NamedTuple):
    """A run: its task, what is changed there, and the flags that change it."""

    task: str
    name: str
    flags: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name in the record, and the folder."""
        return f"{self.task}/{self.name}"


# ---- what is run --------------------------------------------------------------------------------


def names_of(study: str, task: str) -> list[str]:
    """The names of a task's cells, the reference first."""
    reference = REFERENCES[study][task]
    if study == "variants":
        return list(VARIANTS)
    if study == "dropout":
        return [reference, *(f"{kind}-{rate}" for kind, rates in RATES.items() for rate in rates)]
    laws = [reference, *(law for law in INITS if law not in (reference, "haste"))]
    if task == "sin":  # it has no such flag
        return laws
    biases = [f"{reference}-{bias}" for bias in ("0", "uniform_gate", "chrono")]
    return [*laws, *(f"{law}-1" for law in NO_FORGET_BIAS), *biases]


def changes(study: str, task: str, name: str) -> list[str]:
    """The flags that make a cell of its program."""
    what, _, value = name.partition("-")
    if study == "variants":
        return [f"--cell={name}"]
    if study == "dropout":
        flags = {"dropout": "0"} | ({} if name == "none" else {what: value})
        return [f"--{flag.replace('_', '-')}={rate}" for flag, rate in flags.items()]
    if task == "adding":
        return [f"--init={what}", f"--cells=lstm-{value}" if value else "--cells=lstm"]
    value = f"chrono:{STEPS[task]}" if value == "chrono" else value
    return [f"--init={what}", *([f"--forget-bias={value}"] if value else [])]


def plan(config: Config) -> list[Cell]:
    """The cells of a study, task by task, each task's reference first."""
    wanted = None if config.only is None else config.only.split(",")
    common = [f"--seeds={config.seeds}", f"--seed={config.seed}"]
    common += [] if config.devices is None else [f"--devices={config.devices}"]
    look, limit = config.limit is not None, config.limit
    found = []
    for task, reference in REFERENCES[config.study].items():
        own = list(common)
        if task in STEPS:
            own += [f"--data={config.data}", f"--epochs={config.epochs}"]
            own += [f"--limit={limit}"] if look else []
        elif look:
            own += [f"--updates={min(limit, 200)}" if task == "sin" else f"--updates={limit}"]
            own += [f"--eval-every={limit}"] if task == "adding" else []
        names = names_of(config.study, task)
        if wanted is not None:
            chosen = [n for n in names if {task, n, f"{task}/{n}"} & set(wanted)]
            names = [reference, *(n for n in chosen if n != reference)] if chosen else []
        for name in names:
            found.append(Cell(task, name, (*changes(config.study, task, name), *own)))
    return found


def check(config: Config) -> None:
    cli.check_counts(config, "epochs", "limit", "devices")
    cli.check_counts(config, "seeds", least=2)
    cli.check_counts(config, "seed", least=0)
    tasks = REFERENCES[config.study]
    known = set(tasks)
    for task in tasks:
        names = names_of(config.study, task)
        known |= {*names, *(f"{task}/{name}" for name in names)}
    fits = config.only is None or set(config.only.split(",")) <= known
    name = f"tasks ({', '.join(tasks)}), names or both as {task}/{names[-1]}, commas between"
    cli.check(config, "only", fits, name)


# ---- running ------------------------------------------------------------------------------------


class Stop:
    """SIGINT and SIGTERM: the run that is under way is told to save itself, no other begins.

    A second one ends this process at once.
    """

    def __init__(self):
        self.asked, self.child = False, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, *_: Any) -> None:
        self.asked = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self.tell()

    def tell(self) -> None:
        """Passes it on."""
        if self.asked and self.child is not None:
            self.child.terminate()


def command(cell: Cell, out: Path) -> list[str]:
    """What runs a cell, or goes on with it where it has saved itself."""
    script = str(Path(__file__).with_name(f"{SCRIPTS[cell.task]}.py"))
    if cell.task != "adding" and (out / "run.json").exists():
        return [sys.executable, script, f"--resume={out}"]
    shutil.rmtree(out, ignore_errors=True)  # what was cut short and cannot be gone on with
    return [sys.executable, script, *cell.flags, f"--out={out}"]


def finished(out: Path) -> dict[str, Any] | str | None:
    """A cell's record; where and how it diverged; None where it has not come to its end."""
    if (out / "record.json").exists():
        return tables.load(out / "record.json")
    strays = sorted(out.glob("nonfinite-*.json"))
    return f"{strays[0].stem.removeprefix('nonfinite-')} is not finite" if strays else None


def fit(cell: Cell, folder: Path, stop: Stop) -> dict[str, Any] | str | None:
    """Runs a cell to its end, as ``finished``; None where it was stopped.

    Raises:
      RunError: the run failed; its last line is in the message.
    """
    out = folder / cell.key
    if (done := finished(out)) is not None:
        return done
    out.parent.mkdir(exist_ok=True)
    log = out.with_name(f"{out.name}.log")
    with log.open("ab") as said:
        # A session of its own: Ctrl-C reaches it through ``stop`` alone, once.
        stop.child = subprocess.Popen(
            command(cell, out), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        stop.tell()
        code = stop.child.wait()
    done = finished(out)
    if done is None and not stop.asked:
        last = log.read_text(errors="replace").strip().splitlines() or ["nothing said"]
        raise RunError(f"{cell.key} ended with exit code {code}: {last[-1]}")
    return done


def fit_all(cells: Sequence[Cell], folder: Path) -> dict[str, dict[str, Any] | str]:
    """What became of every cell, as ``fit``, by its key.

    Raises:
      RunStopped: it was asked to end.
      RunError: cells failed, which is said when all others are done.
    """
    stop, found, failed, metrics = Stop(), {}, [], {}
    references = {}
    before = sum(MINUTES[c.task] for c in cells if finished(folder / c.key) is not None)
    bar = tqdm(
        total=sum(MINUTES[c.task] for c in cells), initial=before, disable=None,
        bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
    )  # fmt: skip
    for number, cell in enumerate(cells, start=1):
        bar.set_postfix_str(f"cell {number} of {len(cells)}, {cell.key}")
        reference = references.setdefault(cell.task, cell.key)
        new = finished(folder / cell.key) is None
        done = None
        if not stop.asked:
            try:
                done = fit(cell, folder, stop)
            except RunError as error:
                failed.append(str(error))
                tqdm.write(f"failed: {error}")
        if done is not None:
            found[cell.key] = done
            if isinstance(done, dict):
                metrics |= numbers(cell, done)
            tqdm.write(found_tables.line(metrics, cell.key, reference))
            sys.stdout.flush()
            bar.update(MINUTES[cell.task] if new else 0)
        if stop.asked:
            break
    bar.close()
    if stop.asked and len(found) < len(cells):
        so_far = f"stopped after {len(found)} of {len(cells)} cells"
        raise RunStopped(f"{so_far}: go on with --resume {folder}")
    if failed:
        what = f"{len(failed)} of {len(cells)} cells failed, the first: {failed[0]}"
        raise RunError(f"{what}; --resume {folder} tries them again")
    return found


# ---- what came out ------------------------------------------------------------------------------


def numbers(cell: Cell, record: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's numbers for the study's record, lists over seeds, by name."""
    metrics = record["metrics"]
    if cell.task == "adding":
        own = record["config"]["cells"]
        solved = np.array([float(update) for update in metrics[f"{own}_solved_at"]])
        most = metrics[f"{own}_updates"][-1]  # as many as it may, if a seed has not solved it
        found = {
            "solved_at": solved,
            "updates_to_solve": np.where(np.isfinite(solved), solved, most),
            "test_loss": metrics[f"{own}_test_loss"],
        }
    else:
        by_seed = [(own["seed"], own["metrics"]) for own in apart(record)]
        names = ["mse"] if cell.task == "sin" else ["validation_accuracy", "test_accuracy"]
        found = {name: [own[name] for _, own in by_seed] for name in names}
        if cell.task != "sin":
            best = [best_epoch(own) for _, own in by_seed]
            found["best_epoch"] = best
            found["best_validation_accuracy"] = [
                own["validation_accuracy_epochs"][epoch - 1]
                for epoch, (_, own) in zip(best, by_seed, strict=True)
            ]
            for seed, own in by_seed:
                curve = own["validation_accuracy_epochs"]
                found[f"validation_accuracy_epochs_seed{seed}"] = curve
    found["train_seconds"] = record["seconds"]["train"]
    return {f"{cell.key}/{name}": value for name, value in found.items()}


def summary(cell: Cell, done: dict[str, Any] | str) -> dict[str, Any]:
    """What the study's record says of a cell beside its numbers."""
    if isinstance(done, str):
        return {"diverged": done}
    what = {name: done[name] for name in ("command", "params_sha256", "dataset", "environment")}
    what["environment"] = {k: done["environment"].get(k) for k in ("git commit", "jax", "devices")}
    return what


def joined(datasets: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The data of all cells as a record names them."""
    each = list({one["sha256"]: one for one in datasets}.values())
    sources = {one["source"] for one in each}
    return {
        "name": ", ".join(dict.fromkeys(one["name"] for one in each)),
        "source": next(s for s in ("offline", "tfds", "generated") if s in sources),
        "sha256": sha256("".join(sorted(one["sha256"] for one in each)).encode()).hexdigest(),
    }


def run(config: Config) -> None:
    check(config)
    cells = plan(config)
    with Run.open("what_matters", config) as folder:
        folder.write_story()  # nothing refuses to go on from here
        found = fit_all(cells, folder.path)
        records = {key: done for key, done in found.items() if isinstance(done, dict)}
        if not records:
            raise RunError("no cell came to its end: all diverged")
        metrics = {}
        for cell in cells:
            metrics |= numbers(cell, records[cell.key]) if cell.key in records else {}
        folder.config |= {
            "references": {c.task: REFERENCES[config.study][c.task] for c in cells},
            "runs": {cell.key: summary(cell, found[cell.key]) for cell in cells},
        }
        figure = what_matters_plots.study(folder.config, metrics)
        if figure is not None:
            folder.figure(config.study, figure)
        hashes = {key: bytes.fromhex(done["params_sha256"]) for key, done in records.items()}
        record = folder.finish(
            dataset=joined([done["dataset"] for done in records.values()]),
            metrics=metrics,
            seconds={k: sum(done["seconds"][k] for done in records.values()) for k in SECONDS},
            params_sha256=params_sha256({k: np.frombuffer(h, np.uint8) for k, h in hashes.items()}),
            seed=config.seed,
            devices=next(iter(records.values()))["environment"]["devices"],
        )
    for task in found_tables.cells_of(record):
        title, table = found_tables.title(folder.config, task), found_tables.table(record, task)
        print(f"\n{title}\n{aligned(*table)}")
    if config.study == "init":
        print("\n" + aligned(*found_tables.gap_table(record)))
    data = f"{record['dataset']['name']} ({record['dataset']['source']})"
    print(f"{len(records)} of {len(cells)} cells on {data}; record in {folder.path}")


def main() -> None:
    # Records name the device, and looking at a GPU must not take its memory from the cells.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run(cli.parse(Config, description=__doc__))


if __name__ == "__main__":
    cli.main(main)
