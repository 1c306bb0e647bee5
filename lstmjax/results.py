"""The commands over records: collect and compare them, verify one, write the tables.

python -m lstmjax.records collect runs/imdb-20260102-030405
python -m lstmjax.records table --check
python -m lstmjax.records verify experiments/results/imdb-tf2-seed0.json
python -m lstmjax.records compare experiments/results/imdb-tf2-seed0.json runs/imdb-20260102-030405
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lstmjax import cli, overview_tables
from lstmjax.compare import Compare, compare
from lstmjax.records import RunError, write_file
from lstmjax.rows import ROWS
from lstmjax.seeds import seeds_of
from lstmjax.tables import benchmarks, load, load_groups, load_parity, load_timed, readme_table
from lstmjax.verify import Verify, verify

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
BEST = "<!-- best:begin -->", "<!-- best:end -->"


@dataclass(frozen=True)
class Collect:
    """Copies the records of finished runs to where they are kept."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders, each with a record.json"""
    into: Path = Path("experiments/results")
    """the folder of records"""
    name: str | None = None
    """<experiment>-<name>-seed<seed>.json; by default the record's row; of a record of no row its
    preset, and no-row where that would be a row's name"""
    replace: bool = False
    """overwrite records of the same name; that of a row only by another one of that row"""


@dataclass(frozen=True)
class Table:
    """Writes BENCHMARKS.md, and the two tables in README.md between their markers."""

    results: Path = Path("experiments/results")
    """the folder of records"""
    benchmarks: Path = Path("BENCHMARKS.md")
    """the file to write"""
    readme: Path = Path("README.md")
    """the file that holds the markers"""
    check: bool = False
    """write nothing; exit with 1 where a file is not what the records say"""


def collect(options: Collect) -> list[Path]:
    """Copies every run's record, or none of them where one cannot be. Returns the new paths."""
    if not options.runs:
        raise RunError("runs: got none, expected at least one run folder")
    copies: dict[Path, bytes] = {}
    for run in options.runs:
        path = run / "record.json"
        target = options.into / f"{_record_name(load(path), options.name)}.json"
        if target in copies:
            raise RunError(f"{run}: another of these runs is to be {target} too")
        if target.exists():
            if not options.replace:
                other = "--replace overwrites it, --name gives another name"
                raise RunError(f"{target} exists: {other}")
            _check_replaced(run, target)
        copies[target] = path.read_bytes()
    options.into.mkdir(parents=True, exist_ok=True)
    for target, data in copies.items():
        write_file(target, data)
        print(target)
    return list(copies)


def _check_replaced(run: Path, target: Path) -> None:
    """Raises RunError where a row's record would give way to one that is not of that row."""
    try:
        before = _row_of(load(target))
    except RunError:  # what is no record is no loss
        return
    now = _row_of(load(run / "record.json"))
    if before not in (None, now):
        raise RunError(f"{run}: got a run of {now or 'no row'}, expected one of {before}: {target}")


def _row_of(record: Mapping[str, Any]) -> str | None:
    return record.get("peer", record).get("row")


def _record_name(record: Mapping[str, Any], name: str | None) -> str:
    """`imdb-tf2-gru-seed0`: experiment and name, else the row, else experiment and preset.

    A record of several seeds is called `imdb-tf2-gru-seeds0-7`, one of no row whose experiment and
    preset are a row's name `imdb-tf2-no-row-seed0`.
    """
    experiment = record["experiment"]
    preset = record.get("config", {}).get("preset")
    if "peer" in record:
        parts = [experiment, name or f"{record['peer']['row']}-{record['peer']['framework']}"]
    elif name is None and record.get("row"):
        parts = [record["row"]]
    else:
        parts = [experiment, *([name or preset] if name or preset else [])]
        parts += ["no-row"] if name is None and "-".join(parts) in ROWS else []
    seeds = seeds_of(record)
    parts.append(f"seed{seeds[0]}" if len(seeds) == 1 else f"seeds{seeds[0]}-{seeds[-1]}")
    text = "-".join(parts)
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")


def table(options: Table) -> None:
    """Writes both files, or compares them (`--check`)."""
    _check_records(options.results)
    groups = load_groups(options.results)
    for group in groups:
        if len(group.records) < 3:
            found = f"{len(group.records)} of at least 3 seeds"
            print(f"note: {group.row}, {group.name}: {found}", file=sys.stderr)
    try:
        readme = options.readme.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot read {options.readme}: {error.strerror}") from error
    timed = load_timed(options.results)
    readme = _between(options.readme, readme, BEST, overview_tables.best(groups, timed["long_lag"]))
    texts = {
        options.benchmarks: benchmarks(groups, load_parity(options.results), timed),
        options.readme: _between(options.readme, readme, (BEGIN, END), readme_table(groups)),
    }
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if options.check:
            raise RunError(
                f"{path} is not what the records say: run the table command without --check"
            )
        write_file(path, text.encode())


def _check_records(folder: Path) -> None:
    """Raises RunError for a folder without a record: its tables would be empty ones."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror}") from error
    if not any(name.endswith(".json") for name in names):
        raise RunError(f"{folder}: got no record, expected a folder of records")


def _between(path: Path, text: str, markers: tuple[str, str], content: str) -> str:
    """A file's text with something else between two markers; RunError where they are not there."""
    begin, end = markers
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise RunError(f"{path}: expected the lines {begin} and {end}, one after another")
    return f"{before}{begin}\n{content}\n{end}{after}"


COMMANDS = {
    "collect": (Collect, collect),
    "table": (Table, table),
    "verify": (Verify, verify),
    "compare": (Compare, compare),
}


def command(argv: Sequence[str] | None = None) -> None:
    """`python -m lstmjax.records {collect,table,verify,compare}`."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def run() -> None:
        name = argv[0] if argv else "nothing"
        if name in ("-h", "--help"):
            print(f"usage: python -m lstmjax.records {{{','.join(COMMANDS)}}} [-h] [OPTIONS]")
            for name, (options_class, _) in COMMANDS.items():
                print(f"  {name:8} {options_class.__doc__}")
            return
        if name not in COMMANDS:
            raise ValueError(f"command: got {name}, expected one of {', '.join(COMMANDS)}")
        options_class, function = COMMANDS[name]
        options = cli.parse(options_class, argv=argv[1:], description=options_class.__doc__)
        code = function(options)
        if isinstance(code, int):  # of what was found, and not of an error
            sys.exit(code)

    cli.main(run)
