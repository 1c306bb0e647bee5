"""Repeat rows of BENCHMARKS.md here, and say whether they come out as recorded.

    python experiments/reproduce.py --row imdb-tf2             one row, by its heading there
    python experiments/reproduce.py --row long-lag-order       all cells of a long-lag task
    python experiments/reproduce.py --all --budget 2h          as many as fit, the cheapest first
    python experiments/reproduce.py --resume runs/reproduce-20260102-030405        go on with that
    python experiments/reproduce.py --list                     the rows, and what they take

A row is run again with the settings in its records and one of their seeds (another one with
--seed). Its numbers are held against two things: those of the recorded run with that seed, which
are equal in every bit where versions and machine are the same (to round-off where several seeds ran
in one program), and the interval in which the recorded seeds say that 95 % of further runs lie,
mean ± t · s · √(1 + 1/n) of n seeds. What a run cost is not held against anything. The exit code is
1 where a number lies outside or a row failed, and 0 otherwise. A single recorded seed has no
interval: where its numbers are not the recorded ones, the last line says that nobody can tell.
With --all a row that fails (scikit-learn or oneDNN is not installed, say) does not end the others.

A row that goes on from what a run of another row has left has that one run first, same seed.

Every run keeps its folder. What is cut short by --budget, by SIGTERM or by a power cut goes on
where it last saved, with --resume; baselines and long-lag tasks, which save nothing, begin again.
"""

import contextlib
import dataclasses
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from scipy.special import stdtrit
from tqdm import tqdm

from lstmjax import cli, long_lag_tables, tables, verify
from lstmjax.records import RunError, hold, to_json, write_file
from lstmjax.rows import AFTER
from lstmjax.schema import SECONDS, is_cost

RESULTS = Path(__file__).with_name("results")
REPEATED = (*verify.TRAINING, "baselines")  # and long_lag, whose records hold several rows
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600}


@dataclasses.dataclass(frozen=True)
class Config:
    row: str | None = None
    """A row of BENCHMARKS.md, by its heading."""
    all: bool = False
    """All rows, the cheapest first."""
    list: bool = False
    """Only say which rows there are."""
    budget: str | None = None
    """Time for all of it, as 90s, 30m or 2h: what is not expected to fit is left out."""
    seed: int | None = None
    """Of the runs; the first recorded one when not given."""
    devices: int | None = None
    """Devices of the runs; as many as recorded when not given, 1 for seeds of one program."""
    results: str = str(RESULTS)
    """Folder of the records."""
    resume: str | None = None
    """Folder of a repetition to go on with."""
    out: str | None = None
    """Folder for the runs, new or empty; a fresh one under runs/ when not given."""


class Repeated(NamedTuple):
    """A metric of a row: what was recorded, and what came out here.

    Attributes:
      name: the metric's.
      recorded: of the recorded run with the same seed, or None.
      now: of the repetition.
      interval: (lowest, highest) of further runs, or None from a single seed.
    """

    name: str
    recorded: float | None
    now: float
    interval: tuple[float, float] | None

    @property
    def within(self) -> bool | None:
        """Whether it is the recorded number or lies within the interval; None: nobody can say."""
        if self.now == self.recorded:
            return True
        if self.interval is None:
            return None
        return self.interval[0] <= self.now <= self.interval[1]


# ---- what can be repeated -----------------------------------------------------------------------


def rows(results: str | Path) -> dict[str, tables.Group]:
    """The rows that our experiments can repeat, the cheapest first.

    Raises:
      RunError: a record that is none, or no record at all.
    """
    found = {}
    for group in tables.load_groups(results):
        if group.name == "lstmjax" and group.records[0]["experiment"] in REPEATED:
            found.setdefault(group.row, group)
    for group in tables.load_timed(results)["long_lag"]:
        name = long_lag_tables.row(group.files[0])
        found.setdefault(name, tables.Group(name, *_by_seed(group)))
    if not found:
        raise RunError(f"--results: {results} holds no record of a row that can be repeated")
    return dict(sorted(found.items(), key=lambda item: seconds(item[1])))


def _by_seed(group: tables.Group) -> tuple[str, tuple[dict[str, Any], ...], tuple[str, ...]]:
    """The name, records and files of a long-lag group, a record for each seed."""
    (record,) = group.records
    return group.name, long_lag_tables.apart(record), group.files


def seconds(group: tables.Group) -> float:
    """How long one run of a row took, the median over its seeds.

    Seeds of one program share its seconds, but each of them has one device of several.
    """
    median = statistics.median(sum(r["seconds"][k] for k in SECONDS) for r in group.records)
    first = group.records[0]
    return median * (first["environment"]["devices"] if first.get("together") else 1)


def parse_budget(text: str | None) -> float:
    """Seconds of a text such as 90s, 30m, 1.5h; infinitely many of None."""
    if text is None:
        return math.inf
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|min|h)", text)
    if parts is None or float(parts[1]) == 0:
        raise cli.ConfigError(f"--budget: got {text}, expected a time such as 90s, 30m or 2h")
    return float(parts[1]) * UNITS[parts[2]]


def prediction(values: Sequence[float]) -> tuple[float, float] | None:
    """In which one more value lies with 95 %, if they come from a normal distribution.

    mean ± t₀.₉₇₅(n − 1) · s · √(1 + 1/n); None of fewer than two, or where one is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values)
    half *= math.sqrt(1 + 1 / len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def compared(group: tables.Group, record: Mapping[str, Any]) -> list[Repeated]:
    """The metrics that a row shows, of a repetition and of its records; not those by epoch."""
    found = []
    shown = tables.ROWS[group.row].metrics if group.row in tables.ROWS else ()
    for name in [name for name, *_ in shown] or group.records[0]["metrics"]:
        now = record["metrics"].get(name)
        if now is None or isinstance(now, list) or is_cost(name):
            continue
        values = [float(value) for value in group.values(name)]
        same = [r["metrics"][name] for r in group.records if r["seed"] == record["seed"]]
        recorded = float(same[0]) if same else None
        found.append(Repeated(name, recorded, float(now), prediction(values)))
    return found


# ---- running ------------------------------------------------------------------------------------


def saved(group: tables.Group, out: Path) -> bool:
    """Whether a run was cut short and can be gone on with."""
    return group.records[0]["experiment"] in verify.TRAINING and (out / "run.json").exists()


def command(group: tables.Group, config: Config, out: Path) -> list[str]:
    """What runs a row again, or goes on with it where it has saved itself."""
    record = group.records[0]
    script = str(Path(__file__).with_name(f"{record['experiment']}.py"))
    if saved(group, out):
        return [sys.executable, script, f"--resume={out}"]
    record = record | {"seed": record["seed"] if config.seed is None else config.seed}
    settings = record["config"] | {"seed": record["seed"], "seeds": 1, "sweep": None}
    settings = {k: v for k, v in settings.items() if k in record["config"] or k == "seed"}
    if group.row in AFTER:  # whose weights need not have the recorded bits here
        named = [name for name in ("pretrained", "teacher") if settings.get(name) is not None]
        settings |= dict.fromkeys(named, str(first_folder(group, out, record["seed"])))
        settings |= {f"{name}_sha256": None for name in named}
    # A seed among others in one program has a device to itself.
    recorded = 1 if record.get("together") else record["environment"]["devices"]
    devices = config.devices or recorded
    environment = record["environment"] | {"devices": devices}
    asked = verify.flags(record | {"config": settings, "environment": environment})
    if settings.get("model") in ("nbsvm", "tfidf"):  # which run on no device
        asked.remove(f"--devices={devices}")
    return [sys.executable, script, *asked, f"--out={out}"]


def first_folder(group: tables.Group, out: Path, seed: int) -> Path:
    """Where the run lies that a row in a folder goes on from."""
    return out.with_name(f"{AFTER[group.row]}-seed{seed}")


def repeat(group: tables.Group, config: Config, out: Path, limit: float) -> dict[str, Any] | None:
    """Runs a row to its end; its record, or None where the time was over before.

    Raises:
      RunError: the run failed; its last line is in the message.
    """
    if not (out / "record.json").exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        if not saved(group, out):
            shutil.rmtree(out, ignore_errors=True)  # begun by us, and nothing to go on with
        log = out.with_suffix(".log")
        with log.open("ab") as said:
            # A session of its own: Ctrl-C reaches it through us alone, once.
            child = subprocess.Popen(
                command(group, config, out), stdout=said, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = child.wait(None if math.isinf(limit) else limit)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGTERM)  # it saves itself
                code = child.wait()
            except BaseException:
                child.send_signal(signal.SIGTERM)
                child.wait()
                raise
        if code in (cli.STOPPED, -signal.SIGTERM):  # saved, or not begun yet
            return None
        if code:
            last = log.read_text(errors="replace").strip().splitlines() or ["nothing said"]
            raise RunError(f"{group.row} ended with exit code {code}: {last[-1]}")
    record = tables.load(out / "record.json")
    return long_lag_tables.apart(record)[0] if record["experiment"] == "long_lag" else record


def told(group: tables.Group, record: Mapping[str, Any]) -> list[str]:
    """What is to be said of a row that was repeated."""
    lines = []
    for metric in compared(group, record):
        words = {True: "within", False: "OUTSIDE", None: "nobody can tell"}
        low, high = metric.interval or (math.nan, math.nan)
        further = f"{low:.6g} to {high:.6g}" if metric.interval else "no interval"
        ours = "the same in every bit" if metric.now == metric.recorded else f"{metric.recorded}"
        ours = "no run of this seed" if metric.recorded is None else ours
        lines.append(
            f"  {metric.name}: {metric.now!r}; recorded: {ours}; "
            f"further runs: {further}; {words[metric.within]}"
        )
    now = sum(record["seconds"][k] for k in SECONDS)
    lines.append(f"  {now:.0f} s, recorded {seconds(group):.0f} s")
    return lines


def folder_of(config: Config) -> Path:
    """The folder of all runs, which says what was asked for."""
    if config.resume is not None:
        return Path(config.resume).expanduser()
    path = Path(config.out or f"runs/reproduce-{datetime.now():%Y%m%d-%H%M%S}").expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"--out: {path} exists and is not empty: choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    write_file(path / "config.json", to_json(dataclasses.asdict(config)))
    return path


def run(config: Config) -> int:
    """Repeats what is asked for; the exit code."""
    cli.check_counts(config, "devices")
    cli.check_counts(config, "seed", least=0)
    end = time.monotonic() + parse_budget(config.budget)
    known = rows(config.results)
    if config.list:
        for name, group in known.items():
            print(f"{name:24} {seconds(group):6.0f} s a run, {len(group.records)} seeds")
        return 0
    if config.all == (config.row is not None):
        raise cli.ConfigError("--row: got both or none of --row and --all, expected one of them")
    if config.row is not None and config.row not in known:
        raise cli.ConfigError(f"--row: got {config.row}, expected one of {', '.join(known)}")
    chosen = known if config.all else {config.row: known[config.row]}
    folder = folder_of(config)
    with hold(folder) or contextlib.nullcontext():
        return repeat_all(chosen, known, config, folder, end)


def repeat_first(
    group: tables.Group, known: Mapping[str, tables.Group], config: Config, out: Path, end: float
) -> bool:
    """Runs what a row goes on from, where it does and that is not there; whether it is, then."""
    if group.row not in AFTER:
        return True
    seed = group.records[0]["seed"] if config.seed is None else config.seed
    first, before = AFTER[group.row], first_folder(group, out, seed)
    if first not in known:
        raise RunError(f"{group.row} goes on from {first}, of which there is no record")
    done, remaining = (before / "record.json").exists(), end - time.monotonic()
    if not done and seconds(known[first]) + seconds(group) > remaining:
        return False
    config = dataclasses.replace(config, seed=seed)
    return repeat(known[first], config, before, remaining) is not None


def repeat_all(
    chosen: Mapping[str, tables.Group],
    known: Mapping[str, tables.Group],
    config: Config,
    folder: Path,
    end: float,
) -> int:
    """Repeats rows one after the other, until a time of ``time.monotonic``; the exit code."""
    # So that a run that is under way is told to save itself, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(cli.STOPPED))
    outside, unsure, left, failed = [], [], [], []
    bar = tqdm(chosen.items(), unit=" rows", disable=None)
    for name, group in bar:
        bar.set_postfix_str(name)
        out, remaining = folder / name, end - time.monotonic()
        if not (out / "record.json").exists() and seconds(group) > remaining:
            left.append(name)
            continue
        try:
            record = None
            if repeat_first(group, known, config, out, end):
                record = repeat(group, config, out, end - time.monotonic())
        except RunError as error:
            if not config.all:
                raise
            tqdm.write(str(error))
            failed.append(name)
            continue
        if record is None:
            left.append(name)
            continue
        tqdm.write("\n".join([f"{name}, seed {record['seed']}", *told(group, record)]))
        results = compared(group, record)
        outside += [f"{name} {metric.name}" for metric in results if metric.within is False]
        unsure += [f"{name} {metric.name}" for metric in results if metric.within is None]
        summary = {"row": name, "results": [metric._asdict() for metric in results]}
        write_file(out / "reproduced.json", to_json(summary))
    if left:
        print(f"left out for time: {', '.join(left)}; --resume {folder} goes on")
    if failed:
        print(f"failed: {', '.join(failed)}; --resume {folder} tries again")
    done = len(chosen) - len(left) - len(failed)
    verdict = f"outside: {', '.join(outside)}" if outside else "none outside of its interval"
    verdict += f"; nobody can tell: {', '.join(unsure)}" if unsure else ""
    print(f"{done} of {len(chosen)} rows repeated; {verdict}; runs in {folder}")
    return int(bool(outside or failed))


def main() -> None:
    sys.exit(run(cli.parse(Config, description=__doc__)))


if __name__ == "__main__":
    cli.main(main)
