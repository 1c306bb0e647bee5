"""What differs between two records, as a list, as a table, as JSON and as an exit code."""

import copy
import json
import math

import pytest
from tiny_records import ENVIRONMENT, SECONDS, SHA, write_record

from lstmjax import compare, results
from lstmjax.cli import ConfigError
from lstmjax.compare import Compare, Difference


@pytest.fixture
def record(tmp_path):
    return write_record(tmp_path, 0, 0.8, [0.5, 0.8], 10.0, resumed=1)


def changed(record, **changes):
    """A copy with other values at places such as metrics__loss."""
    other = copy.deepcopy(record)
    for place, value in changes.items():
        *way, last = place.split("__")
        inner = other
        for key in way:
            inner = inner[key]
        inner[last] = value
    return other


def test_every_kind_of_difference_is_found(record):
    other = changed(
        record,
        seed=3,
        config__preset="keras",
        config__limit=None,
        environment__jax="0.12",
        metrics__test_accuracy=0.9,
        metrics__test_accuracy_epochs=[0.5, 0.6],
        metrics__kind=[1, 2],
        seconds__train=12.5,
        dataset__sha256="f" * 64,
    )
    found = compare.differences(record, other)
    assert [(d.place, d.a, d.b, d.counts) for d in found] == [
        ("seed", 0, 3, True),
        ("dataset.sha256", SHA, "f" * 64, True),
        ("config.limit", "absent", None, True),
        ("config.preset", "tf2", "keras", True),
        ("environment.jax", "0.10.2", "0.12", True),
        ("metrics.kind", "absent", [1, 2], True),
        ("metrics.test_accuracy", 0.8, 0.9, True),
        ("metrics.test_accuracy_epochs", [0.5, 0.8], [0.5, 0.6], True),
        ("seconds.train", 10.0, 12.5, False),
    ]
    numbers = {d.place: (d.absolute, d.relative) for d in found}
    assert numbers["seed"] == (3, math.inf)
    assert numbers["metrics.test_accuracy"] == pytest.approx((0.1, 0.125), rel=1e-12)
    assert numbers["metrics.test_accuracy_epochs"] == pytest.approx((-0.2, -0.25), rel=1e-12)
    assert numbers["seconds.train"] == (2.5, 1.25)  # of seconds it is the ratio
    assert numbers["metrics.kind"] == numbers["config.preset"] == (None, None)


def test_swapped_records_differ_in_the_same_places(record):
    other = changed(record, seed=1, metrics__new=1.0, config__zeta=1, config__alpha=2)
    found, swapped = compare.differences(record, other), compare.differences(other, record)
    assert [d.place for d in found] == [d.place for d in swapped]
    assert [(d.a, d.b) for d in found] == [(d.b, d.a) for d in swapped]
    shuffled = {key: other[key] for key in sorted(other, reverse=True)}
    assert compare.differences(record, shuffled) == found


@pytest.mark.parametrize(
    "a, b, absolute, relative",
    [
        (2, 2.5, 0.5, 0.25),
        (-2.0, -1.0, 1.0, 0.5),
        (0, 0.5, 0.5, math.inf),
        (0.0, -0.5, -0.5, -math.inf),
        ("inf", 1.0, -math.inf, math.nan),
        (1.0, "nan", math.nan, math.nan),
        ([1.0, 4.0, 2.0], [1.0, 3.0, 2.5], -1.0, -0.25),
        ([1.0, 2.0], [1.0, "nan"], math.nan, math.nan),
        (["nan", 1.0], ["nan", 2.0], 1.0, 1.0),
        ([1.0, 2.0], [1.0], None, None),
        ([1.0, "x"], [1.0, "y"], None, None),
        (1.0, "x", None, None),
        (1, 10**400, None, None),
        (True, False, None, None),
        (1, None, None, None),
    ],
)
def test_distances_of_numbers(record, a, b, absolute, relative):
    (found,) = compare.differences(changed(record, metrics__x=a), changed(record, metrics__x=b))
    assert (found.place, found.a, found.b, found.counts) == ("metrics.x", a, b, True)
    for got, expected in ((found.absolute, absolute), (found.relative, relative)):
        assert got is None if expected is None else got == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("a, b", [(1, True), (0, False), ([], None), ("1", 1)])
def test_values_of_other_kinds_are_not_the_same(record, a, b):
    assert compare.differences(changed(record, config__x=a), changed(record, config__x=b))


@pytest.mark.parametrize("value", [1, True, None, "nan", [1, 2], {}])
def test_the_same_values_do_not_differ(record, value):
    assert (
        compare.differences(changed(record, config__x=value), changed(record, config__x=value))
        == []
    )


def test_when_and_where_a_run_was_made_does_not_count(record):
    other = changed(
        record,
        date="2026-02-03",
        command="python experiments/imdb.py --out elsewhere",
        config__out="elsewhere",
        config__live=True,
        config__resume="elsewhere",
        resumed=4,
        seconds__compile=9.0,
        metrics__tokens_per_second=2.5e5,
        metrics__lstm_train_seconds=3.0,
        metrics__peak_memory_mib=900.0,
    )
    found = compare.differences(record, other)
    assert len(found) == 10 and not any(d.counts for d in found)
    assert any(d.counts for d in compare.differences(record, changed(other, seed=2)))


# ---- the command --------------------------------------------------------------------------------


def files(tmp_path, a, b):
    for name, record in (("a", a), ("b", b)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    return tmp_path / "a.json", tmp_path / "b.json"


def test_the_table_is_readable(record, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    long = {"command": "python experiments/imdb.py --seed 0 --out runs/0 --cell lstm"}
    b = changed(record, seed=3, metrics__test_accuracy=0.75, seconds__train=5.0) | long
    b["environment"] = ENVIRONMENT | {"git commit": "abcdef7890" * 4, "XLA_FLAGS": "--xla_a=1"}
    files(tmp_path, record, b)
    with pytest.raises(SystemExit) as stop:
        results.command(["compare", "a.json", "b.json"])
    assert stop.value.code == 1
    assert (
        capsys.readouterr().out
        == """\
A  a.json
B  b.json

           A                                 B                                 B − A  relative
  command  python experiments/imdb.py --se…  python experiments/imdb.py --se…
  seed     0                                 3                                 +3     +inf

environment   A              B
  XLA_FLAGS                  --xla_a=1
  git commit  123456789012…  abcdef7890ab…

metrics          A    B     B − A  relative
  test_accuracy  0.8  0.75  -0.05  -6.25e-02

seconds  A   B  B − A  B / A
  train  10  5  -5     0.5

the records differ
"""
    )


def test_exit_codes_are_those_of_diff(record, tmp_path, capsys):
    a, b = files(tmp_path, record, record)
    assert compare.compare(Compare(a, b)) == 0
    assert capsys.readouterr().out.endswith("\n\nnothing differs\n")
    files(tmp_path, record, changed(record, seconds__eval=3.0))
    assert compare.compare(Compare(a, b)) == 0
    assert capsys.readouterr().out.endswith("\n\nnothing differs but time and place\n")
    files(tmp_path, record, changed(record, metrics__test_accuracy=0.8 + 1e-15))
    assert compare.compare(Compare(a, b)) == 1
    assert "+9.99e-16  +1.25e-15" in capsys.readouterr().out
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        results.command(["compare", str(a), str(b)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {b} is no JSON: ")


def test_json_holds_whole_numbers_and_texts(record, tmp_path, capsys):
    a, b = files(tmp_path, record, changed(record, seed=1, metrics__test_accuracy=math.pi))
    assert compare.compare(Compare(a, b, json=True)) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "a": str(a),
        "b": str(b),
        "same": False,
        "differences": [
            {"place": "seed", "a": 0, "b": 1, "absolute": 1.0, "relative": "inf", "counts": True},
            {
                "place": "metrics.test_accuracy", "a": 0.8, "b": math.pi, "counts": True,
                "absolute": math.pi - 0.8, "relative": (math.pi - 0.8) / 0.8,
            },
        ],
    }  # fmt: skip
    assert compare.compare(Compare(a, a, json=True)) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True


def test_a_run_folder_stands_for_its_record(record, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*run/record\.json: No such file"):
        compare.read(tmp_path / "run")
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    assert compare.read(tmp_path / "run") == record
    (tmp_path / "run" / "record.json").write_text(json.dumps(record | {"seed": "x"}))
    with pytest.raises(ConfigError, match="is no valid record: seed: got 'x', expected an integer"):
        compare.read(tmp_path / "run")


def test_null_and_nothing_at_all_are_told_apart():
    record = {"config": {"a": None, "b": 1}}
    found = compare.differences(record, {"config": {"b": None}})
    lines = compare.table(found).splitlines()
    assert [line.split() for line in lines] == [
        ["config", "A", "B"], ["a", "null", "absent"], ["b", "1", "null"],
    ]  # fmt: skip


def test_a_difference_of_one_kind_needs_no_columns_of_numbers():
    found = [Difference("config.cell", "lstm", "gru", None, None, True)]
    assert compare.table(found) == "config  A     B\n  cell  lstm  gru"
    assert compare.table([]) == ""


def test_seconds_of_nothing(record):
    (found,) = compare.differences(
        changed(record, seconds=SECONDS | {"eval": 0.0}), changed(record, seconds=SECONDS)
    )
    assert (found.absolute, found.relative) == (0.5, math.inf)
