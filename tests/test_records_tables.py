"""Records in, tables out: BENCHMARKS.md and the table in README.md."""

import dataclasses
import json
import re
import runpy
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from tiny_records import ENVIRONMENT, SECONDS, SHA, fill_benchmark_folder, write_record

from lstmjax import results, tables
from lstmjax.records import RunError, validate
from lstmjax.rows import AFTER

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("sin", "forecast", "imdb", "mnist", "smnist", "reviews", "baselines")


@pytest.fixture
def benchmark_folder(tmp_path):
    return fill_benchmark_folder(tmp_path)


def test_tables_hold_the_numbers_of_the_records(benchmark_folder, monkeypatch, capsys):
    monkeypatch.chdir(benchmark_folder)
    results.table(results.Table())
    text = Path("BENCHMARKS.md").read_text()
    accuracies = [0.8312, 0.8391, 0.8355]
    spread = f"{statistics.mean(accuracies):.4f} ± {np.std(accuracies, ddof=1):.4f}"
    assert spread == "0.8353 ± 0.0040"
    ours, theirs = (line for line in text.splitlines() if "imdb_reviews (tfds) |" in line)
    assert ours == (
        f"| lstmjax | {spread} (0.8312–0.8391) | 0.827 0.835 (± ≤ 0.015) | 3 | 2 | 11 | 1 | 14 | "
        "imdb_reviews (tfds) |"
    )
    assert theirs == (
        "| keras 3.15 / tensorflow 2.21 | 0.8200 | – | 1 | 2 | 80 | 1 | 83 | imdb_reviews (tfds) |"
    )
    assert "`python experiments/imdb.py` with seeds 0, 1, 2" in text
    assert "on Processor X, 2 devices, 2 cores; python 3.11.7, jax 0.10.2" in text
    assert "commit 1234567890; data sha256 0123456789ab" in text
    assert "records: `imdb-0.json`, `imdb-1.json`, `imdb-2.json`" in text
    # Without a record of a GPU, its section says that nothing was measured.
    assert re.findall(r"\n## (\S+): ", text) == ["imdb-tf2", "gpu"]
    assert "| sin | 50, 20, 10, 10 | not measured | not measured |" in text
    assert Path("README.md").read_text() == (
        f"# x\n\n{results.BEST[0]}\n"
        "| row | seeds | test, ± 95 % | published | train s | record |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| [imdb-tf2](BENCHMARKS.md#imdb-tf2-imdb-reviews-two-lstms64-on-the-last-80-words-4"
        "-epochs): IMDB reviews, two LSTMs(64) on the last 80 words, 4 epochs, test accuracy | 3 | "
        "0.8353 ± 0.0098 | – | 11 | [imdb-0](experiments/results/imdb-0.json) |\n"
        f"{results.BEST[1]}\n{results.BEGIN}\n"
        "| program | metric | lstmjax | elsewhere | train s | elsewhere | seeds | data |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        f"| imdb-tf2 | test accuracy | {spread} | 0.8200 (keras 3.15 / tensorflow 2.21) | 11 | 80 "
        f"| 3 | imdb_reviews (tfds) |\n{results.END}\nend\n"
    )
    assert "note: imdb-tf2, keras 3.15 / tensorflow 2.21: 1 of at least 3" in capsys.readouterr()[1]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((None, None, None), "2 cores; "),
        (("a", "a", "a"), "2 cores (a); "),
        (("a", "b", "a"), "2 cores (a and b); "),
        ((None, "a", "a"), "2 cores (said of 2 of 3 runs: a); "),
        (("b", "a", None), "2 cores (said of 2 of 3 runs: b and a); "),
    ],
)
def test_records_that_do_not_say_their_processor_are_not_spoken_for(kinds, expected, tmp_path):
    for seed, kind in enumerate(kinds):
        own = {"processor": kind} if kind else {}
        write_record(tmp_path, seed, 0.5, [0.5], 1.0, environment=ENVIRONMENT | own)
    text = tables.benchmarks(tables.load_groups(tmp_path))
    assert f"  - on Processor X, 2 devices, {expected}python 3.11.7" in text


def test_check_tells_and_changes_nothing(benchmark_folder, monkeypatch):
    monkeypatch.chdir(benchmark_folder)
    with pytest.raises(RunError, match="BENCHMARKS.md is not what the records say"):
        results.table(results.Table(check=True))
    assert not Path("BENCHMARKS.md").exists() and "\nold\n" in Path("README.md").read_text()
    results.table(results.Table())
    before = {p: (p.read_text(), p.stat().st_mtime_ns) for p in Path().glob("*.md")}
    results.table(results.Table(check=True))
    results.table(results.Table())
    assert before == {p: (p.read_text(), p.stat().st_mtime_ns) for p in Path().glob("*.md")}
    Path("README.md").write_text(Path("README.md").read_text().replace("0.8353", "0.9353"))
    with pytest.raises(RunError, match="README.md is not what the records say"):
        results.table(results.Table(check=True))
    Path("README.md").write_text("no markers")
    with pytest.raises(RunError, match="README.md: expected the lines"):
        results.table(results.Table())


def write_parity(folder, name="parity", **changes):
    errors = {"float64_value": 3.14e-16, "float64_gradient": 2e-15, "float32_value": 1.5e-7,
              "float32_gradient": 2.5e-6}  # fmt: skip
    steps = {"torch_float64_train": 4.5e-16, "torch_float32_train": 9.5e-6}
    metrics = {f"{f}_{key}": value for f in ("cudnn", "torch") for key, value in errors.items()}
    versions = {"cudnn": {"jax": "0.10.2"}, "torch": {"python": "3.11.7", "torch": "2.13.0+cpu"}}
    record = {
        "experiment": "parity", "version": "0.1.0", "date": "2026-01-02",
        "command": "python experiments/parity.py --out runs/a",
        "config": {"vectors": {f: {"seed": 1997, "versions": v} for f, v in versions.items()}},
        "dataset": {"name": "golden vectors", "source": "generated", "sha256": SHA},
        "metrics": {"cudnn_cases": 4, "torch_cases": 17, **metrics, **steps},
        "seconds": SECONDS, "params_sha256": SHA, "environment": ENVIRONMENT, "seed": 1997,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(record | changes))


def test_timed_layers_have_their_sections(benchmark_folder, monkeypatch):
    """From the records of this checkout: a layer in every framework, scan against unrolled."""
    committed = Path(__file__).resolve().parents[1] / "experiments" / "results"
    monkeypatch.chdir(benchmark_folder)
    for name in ("peer-layers-seed0", "scan-vs-unrolled-seed0"):
        shutil.copy(committed / f"{name}.json", "experiments/results")
    results.table(results.Table())
    text = Path("BENCHMARKS.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    starts = ("all rows", "imdb-tf2: ", "layers: ", "scan against unrolled", "gpu: ")
    assert len(titles) == len(starts)
    assert all(t.startswith(f"## {s}") for t, s in zip(titles, starts, strict=True))
    record = json.loads((committed / "peer-layers-seed0.json").read_text())
    assert re.sub(r" --out \S+$", "", record["command"]) in text
    assert text.count("  - records: `peer-layers-seed0.json`") == 1


def test_parity_is_a_line_for_each_framework(benchmark_folder, monkeypatch, capsys):
    monkeypatch.chdir(benchmark_folder)
    folder = Path("experiments/results")
    results.table(results.Table())
    before = Path("BENCHMARKS.md").read_text()
    assert "parity" not in before
    write_parity(folder)
    with pytest.raises(RunError, match="BENCHMARKS.md is not what the records say"):
        results.table(results.Table(check=True))
    results.table(results.Table())
    results.table(results.Table(check=True))
    text = Path("BENCHMARKS.md").read_text()
    head, mark, gpu = before.partition("\n## gpu: ")
    assert text.startswith(head) and text.endswith(mark + gpu) and gpu
    assert "parity" not in Path("README.md").read_text()
    lines = text.removeprefix(head).removesuffix(mark + gpu).splitlines()
    assert lines[1].startswith("## parity: ") and lines[4:] == [
        "",
        "| vectors | made with | cases | float64 values | float64 gradients | float64 20 steps | "
        "float32 values | float32 gradients | float32 20 steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| cudnn | jax 0.10.2 | 4 | 3.1e-16 | 2.0e-15 | – | 1.5e-07 | 2.5e-06 | – |",
        "| torch | python 3.11.7, torch 2.13.0+cpu | 17 | 3.1e-16 | 2.0e-15 | 4.5e-16 | 1.5e-07 | "
        "2.5e-06 | 9.5e-06 |",
        "",
        "- **lstmjax**: `python experiments/parity.py` with seeds 1997",
        "  - on Processor X, 2 devices, 2 cores; python 3.11.7, jax 0.10.2; commit 1234567890; "
        "data sha256 0123456789ab",
        "  - records: `parity.json`",
    ]
    assert "note: parity" not in capsys.readouterr().err
    write_parity(folder, "parity-b", environment=ENVIRONMENT | {"device": "Accelerator Z"})
    results.table(results.Table())
    text = Path("BENCHMARKS.md").read_text()
    assert text.count("| torch |") == 2 and "on Accelerator Z" in text  # a table for each record
    write_parity(folder, config={})
    with pytest.raises(RunError, match="parity.json: config.vectors is missing"):
        results.table(results.Table())


def test_only_runs_that_differ_in_their_seed_are_averaged(benchmark_folder):
    folder = benchmark_folder / "experiments" / "results"
    assert [len(g.records) for g in tables.load_groups(folder)] == [3, 1]
    offline = {"name": "offline_reviews", "source": "offline", "sha256": SHA}
    write_record(folder, 3, 0.9, [0.9], 1.0, dataset=offline)
    write_record(folder, 4, 0.9, [0.9], 1.0, config={"preset": "tf2", "epochs": 9})
    write_record(folder, 5, 0.9, [0.9], 1.0, environment=ENVIRONMENT | {"device": "Processor Y"})
    write_record(folder, 6, 0.9, [0.9], 1.0, row="imdb-tf2-gru")
    # Younger records say more: what does not change the numbers makes no other program.
    more = {"preset": "tf2", "on_nan": "stop", "save_every": "9s", "keep": 1, "resume": None}
    write_record(folder, 8, 0.9, [0.9], 1.0, config=more | {"deterministic": True, "data": "tfds"})
    write_record(folder, 9, 0.9, [0.9], 1.0, config=more | {"on_nan": "skip"})
    groups = tables.load_groups(folder)
    found = sorted((g.row, g.name == "lstmjax", [r["seed"] for r in g.records]) for g in groups)
    assert found == [
        ("imdb-tf2", False, [7]), ("imdb-tf2", True, [0, 1, 2, 8]), ("imdb-tf2", True, [3]),
        ("imdb-tf2", True, [4]), ("imdb-tf2", True, [5]), ("imdb-tf2", True, [9]),
        ("imdb-tf2-gru", True, [6]),
    ]  # fmt: skip
    write_record(folder, 1, 0.9, [0.9], 1.0, file="again")
    with pytest.raises(RunError, match="imdb-1.json and imdb-again1.json are two runs of the same"):
        tables.load_groups(folder)


def test_two_peers_of_a_row_are_two_lines(tmp_path):
    write_record(tmp_path, 0, 0.84, [0.84], 27.0)
    for name, seed, accuracy, train in (
        ("torch 2.13", 0, 0.81, 40.0), ("keras 3.15 / tensorflow 2.21", 0, 0.82, 80.0),
        ("torch 2.13", 1, 0.83, 60.0),
    ):  # fmt: skip
        peer = {"row": "imdb-tf2", "framework": name}
        what = {"experiment": "peers", "peer": peer, "file": name[:5]}
        write_record(tmp_path, seed, 0, [], train, metrics={"test_accuracy": accuracy}, **what)
    groups = tables.load_groups(tmp_path)
    assert [(g.name, len(g.records)) for g in groups] == [
        ("lstmjax", 1), ("keras 3.15 / tensorflow 2.21", 1), ("torch 2.13", 2),
    ]  # fmt: skip
    text = tables.benchmarks(groups)
    assert "| keras 3.15 / tensorflow 2.21 | 0.8200 | – | 1 | 2 | 80 | 1 | 83 |" in text
    assert "| torch 2.13 | 0.8200 ± 0.0141 (0.8100–0.8300) | – | 2 | 2 | 50 | 1 | 53 |" in text
    assert tables.readme_table(groups).splitlines()[2] == (
        "| imdb-tf2 | test accuracy | 0.8400 | 0.8200 (keras 3.15 / tensorflow 2.21); "
        "0.8200 ± 0.0141 (torch 2.13) | 27 | 80 (keras); 50 (torch) | 1 | "
        "imdb_reviews (tfds) |"
    )


def test_the_same_program_in_another_arithmetic_stands_beside_it(tmp_path):
    write_record(tmp_path, 0, 0.84, [0.84], 27.0)
    write_record(tmp_path, 0, 0.85, [0.85], 9.0, row="imdb-tf2-bfloat16", file="fast")
    peer = {"row": "imdb-tf2", "framework": "keras 3.15"}
    what = {"experiment": "peers", "peer": peer, "metrics": {"test_accuracy": 0.82}}
    write_record(tmp_path, 0, 0, [], 80.0, **what)
    groups = tables.load_groups(tmp_path)
    text = tables.benchmarks(groups)
    plain, fast = re.split("\n## imdb-tf2-bfloat16: .*", text.split("\n## imdb-tf2: ")[1])
    lines = [line for line in fast.splitlines() if line.startswith("|")]
    data = "imdb_reviews (tfds) |"
    assert lines[2:] == [
        f"| lstmjax | 0.8500 | 0.850 | 1 | 2 | 9 | 1 | 12 | {data}",
        f"| imdb-tf2: lstmjax | 0.8400 | 0.840 | 1 | 2 | 27 | 1 | 30 | {data}",
        f"| imdb-tf2: keras 3.15 | 0.8200 | – | 1 | 2 | 80 | 1 | 83 | {data}",
    ]
    # Where the other lines come from is said once, in their own section.
    assert fast.count("records: ") == 1 and "records: `imdb-fast0.json`" in fast
    assert plain.count("records: ") == 2 and "0.85" not in plain
    assert tables.readme_table(groups).splitlines()[3] == (
        f"| imdb-tf2-bfloat16 | test accuracy | 0.8500 | 0.8200 (imdb-tf2: keras 3.15) | 9 | 80 "
        f"| 1 | {data}"
    )


def test_what_stands_beside_a_row_is_a_row():
    named = {row: spec.beside for row, spec in tables.ROWS.items() if spec.beside}
    assert named == {f"{row}-bfloat16": row for row in ("imdb-tf2", "mnist-tf1")}
    for row, other in named.items():
        assert tables.ROWS[row].metrics == tables.ROWS[other].metrics


def test_records_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(RunError, match="a.json is no JSON"):
        tables.load_groups(tmp_path)
    (tmp_path / "a.json").write_text('{"experiment": "sin"}')
    with pytest.raises(RunError, match="a.json is no valid record: command is missing"):
        tables.load_groups(tmp_path)
    (tmp_path / "a.json").unlink()
    write_record(tmp_path, 1, 0.5, [0.5], 1.0, row="imbd")
    with pytest.raises(RunError, match="got the row 'imbd', expected one of sin-tf1"):
        tables.load_groups(tmp_path)


def test_summary_of_numbers_and_lists():
    assert tables.summary([], ".3f") == "–"
    assert tables.summary([0.5], ".3f") == "0.500"
    assert tables.summary([1.0, 2.0, 6.0], ".2f") == "3.00 ± 2.65 (1.00–6.00)"
    assert tables.summary([1.0, "nan"], ".2f").startswith("nan ± nan")
    assert tables.summary([[1.0, 5.0], [3.0, 5.5]], ".1f") == "2.0 5.2 (± ≤ 1.4)"
    with pytest.raises(RunError, match="lists of different lengths"):
        tables.summary([[1.0], [1.0, 2.0]], ".1f")


def test_every_row_is_what_a_script_calls_its_program():
    programs = [
        row
        for name in SCRIPTS
        for row in runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))["ROWS"]
    ]
    assert sorted(programs) == sorted(tables.ROWS)


def test_rows_have_the_settings_that_were_recorded():
    """A row's own configuration is that of every committed record of it, where both have one."""
    free = {"seed", "seeds", "out", "devices", "data", "keep", "save_every", "resume", "live",
            "deterministic"}  # fmt: skip
    configs = {
        row: dataclasses.asdict(config)
        for name in SCRIPTS
        for row, config in runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))["ROWS"].items()
    }
    seen = set()
    for path in sorted((ROOT / "experiments" / "results").glob("*.json")):
        record = tables.load(path)
        if (row := record.get("row")) is None:
            continue
        own, then = configs[row], dict(record["config"])
        for name in ("pretrained", "teacher"):  # a folder of the machine that recorded it
            if then.get(name) is not None:
                then |= {name: "DIR", f"{name}_sha256": None}
        names = sorted((own.keys() & then.keys()) - free)
        assert len(names) > 5
        now = json.loads(json.dumps({name: own[name] for name in names}))
        assert {name: then[name] for name in names} == now, path.name
        seen.add(row)
    assert len(seen) > 20


def test_every_pupil_s_teacher_is_on_record():
    """What a row goes on from is none of its own settings: a teacher's record says how it came."""
    folder = ROOT / "experiments" / "results"
    pupils = sorted(folder.glob("reviews-taught-seed*.json"))
    assert len(pupils) == len(list((folder / "teachers").iterdir())) >= 10
    for path in pupils:
        pupil = json.loads(path.read_text())
        name = f"{AFTER['reviews-taught']}-seed{pupil['seed']}.json"
        teacher = json.loads((folder / "teachers" / name).read_text())
        assert validate(teacher) == [] and teacher["environment"]["dirty"] is False
        assert teacher["params_sha256"] == pupil["config"]["teacher_sha256"]
        row = json.loads((folder / name).read_text())
        for key in ("row", "seed", "dataset", "parameters", "updates"):
            assert teacher[key] == row[key], name


def test_every_row_can_be_written(tmp_path):
    """Each row's metrics and formats, through the whole text of both tables."""
    for i, (row, spec) in enumerate(tables.ROWS.items()):
        values = {key: [0.125 + i, 0.5] if "epochs" in key else 0.25 for key, *_ in spec.metrics}
        write_record(tmp_path, i, 0, [], 1.0, row=row, metrics=values)
    groups = tables.load_groups(tmp_path)
    assert [group.row for group in groups] == list(tables.ROWS)
    text, short = tables.benchmarks(groups), tables.readme_table(groups)
    for row, spec in tables.ROWS.items():
        assert f"## {row}: {spec.title}" in text and f"| {row} | {spec.metrics[0][1]} |" in short
        assert all(label in text for _, label, _ in spec.metrics)
    assert " nan" not in text and "None" not in text


def test_what_makes_another_row_makes_another_group():
    """Runs of two rows of one script are never averaged."""
    for name in SCRIPTS:
        rows = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))["ROWS"]
        configs = [dataclasses.asdict(config) for config in rows.values()]
        differ = {key for key in configs[0] if len({repr(own[key]) for own in configs}) > 1}
        before = {f"{one}{end}" for one in ("pretrained", "teacher") for end in ("", "_sha256")}
        assert not (differ - before) & set(tables._NO_SETTINGS), name
    assert set(tables._NO_SETTINGS) == {
        "seed", "out", "live", "seeds", "sweep", "save_every", "keep", "resume", "deterministic",
        "pretrained", "pretrained_sha256", "teacher", "teacher_sha256", "data",
    }  # fmt: skip
