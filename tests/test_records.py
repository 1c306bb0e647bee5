"""The form of a record: the schema file, what is checked of it, and values in JSON's types."""

import copy
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_records import DATASET, SECONDS, SHA, Config, finish

from lstmjax import records, schema
from lstmjax.records import Run

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = sorted((ROOT / "experiments" / "results").glob("*.json"))
# No keyword in the file means anything else in draft 7, the newest that jsonschema 3 knows.
VALIDATOR = getattr(jsonschema, "Draft202012Validator", jsonschema.Draft7Validator)(schema.SCHEMA)


@pytest.fixture
def record(tmp_path):
    with Run.create("sin", Config(), out=str(tmp_path / "valid")) as run:
        return finish(run, row="sin-tf1")


# ---- what is wrong with a record ----------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("command", 3, "command: got 3, expected text"),
        ("config", [1], "config: got [1], expected an object"),
        ("date", "yesterday", "date: got 'yesterday', expected a date in UTC"),
        ("dataset", "x", "dataset: got 'x', expected an object with name, source and sha256"),
        ("dataset", {"name": "x", "source": "file"}, "dataset.sha256 is missing"),
        ("dataset", DATASET | {"source": "internet"}, "dataset.source: got 'internet', expected"),
        ("dataset", DATASET | {"sha256": "abc"}, "dataset.sha256: got 'abc', expected 64 hexadec"),
        ("metrics", {}, "metrics: got {}, expected numbers or lists of numbers"),
        ("metrics", {"a": "high"}, "metrics.a: got 'high', expected a number or a list of numbers"),
        ("metrics", {"a": True}, "metrics.a: got True, expected a number"),
        ("metrics", {"a": []}, "metrics.a: got [], expected a number"),
        ("metrics", {"a": {"b": 1}}, "metrics.a: got {'b': 1}, expected a number"),
        ("metrics", {"a": [1, 2, "x"]}, "metrics.a[2]: got 'x', expected a number, \"nan\""),
        ("metrics", {"a": float("nan")}, "metrics.a: got nan, expected a number"),
        ("metrics", {"diagnostics": {"a": {"b": [None]}}}, "metrics.diagnostics.a.b[0]: got None"),
        ("seconds", {"train": 1, "eval": 1}, "seconds.compile is missing"),
        ("seconds", SECONDS | {"eval": -1}, "seconds.eval: got -1, expected a number not below 0"),
        ("seconds", SECONDS | {"eval": "nan"}, "seconds.eval: got 'nan', expected a number"),
        ("params_sha256", SHA.upper(), "params_sha256: got"),
        ("params_sha256", f"{SHA}\n", "params_sha256: got"),
        ("seed", 1.5, "seed: got 1.5, expected an integer"),
        ("seed", True, "seed: got True, expected an integer"),
        ("row", None, "row: got None, expected text"),
        ("resumed", 0, "resumed: got 0, expected an integer of at least 1"),
        ("first_steps", {"steps": [1]}, "first_steps.loss is missing"),
        ("first_steps", {"steps": [-1], "loss": [1]}, "first_steps.steps[0]: got -1, expected an"),
        ("first_steps", {"steps": [1], "loss": ["x"]}, "first_steps.loss[0]: got 'x', expected a"),
    ],
)
def test_validate_names_what_is_wrong(record, key, value, complaint):
    (problem,) = records.validate(record | {key: value})
    assert problem.startswith(complaint)


def test_a_long_value_is_shown_in_part(record):
    (problem,) = records.validate(record | {"seed": "x" * 500})
    assert len(problem) < 120 and problem.endswith("x…, expected an integer")


def test_validate_names_what_is_missing(record):
    needed = set(record) - {"row"}
    for key in needed:
        problems = records.validate({k: v for k, v in record.items() if k != key})
        assert problems == [f"{key} is missing"]
    assert needed == {
        "experiment", "version", "date", "command", "config", "dataset", "metrics", "seconds",
        "params_sha256", "environment", "seed",
    }  # fmt: skip
    assert records.validate([1]) == ["expected a JSON object, got list"]


def test_nothing_of_the_environment_may_be_missing(record):
    """Commit, dirty flag, versions, XLA's flags, device: whatever a number depends on."""
    optional = {"processor", "driver", "processes", "deterministic", "onednn"}
    for key in set(record["environment"]) - optional:
        environment = {k: v for k, v in record["environment"].items() if k != key}
        problems = records.validate(record | {"environment": environment})
        assert problems == [f"environment.{key} is missing"]
    assert set(record["environment"]) - optional == {
        "git commit", "dirty", "python", "jax", "jaxlib", "flax", "optax", "numpy", "device",
        "devices", "platform", "cores", "XLA_FLAGS",
    }  # fmt: skip
    for key, wrong in {"devices": 0, "processor": 7, "driver": 12, "processes": 1.5,
                       "deterministic": 1, "onednn": 3}.items():  # fmt: skip
        environment = record["environment"] | {key: wrong}
        (problem,) = records.validate(record | {"environment": environment})
        assert problem.startswith(f"environment.{key}: got {wrong}, expected ")


def test_a_peers_record_says_who_the_peer_is(record):
    ours = {"version", "date", "config", "params_sha256"}
    peer = {k: v for k, v in record.items() if k not in ours} | {"experiment": "peers"}
    assert records.validate(peer) == ["peer is missing"]
    peer["peer"] = {"row": "sin-tf1", "framework": "keras 3"}
    assert records.validate(peer) == []
    assert records.validate(peer | {"dataset": DATASET | {"sha256": None}}) == []
    assert records.validate(peer | {"experiment": "sin"}) != []
    (problem,) = records.validate(peer | {"peer": {"row": "sin-tf1"}})
    assert problem == "peer.framework is missing"


# ---- the schema file ----------------------------------------------------------------------------


def test_the_schema_is_one_and_uses_known_keywords_only():
    assert schema.SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    VALIDATOR.check_schema(schema.SCHEMA)
    schemas = [schema.SCHEMA]
    while schemas:
        one = schemas.pop()
        assert set(one) <= schema.KEYWORDS
        if "pattern" in one:  # which both ends must be part of, see schema._OF_ITSELF
            assert one["pattern"][0] + one["pattern"][-1] == "^$"
        if one.get("type") not in (None, "object", "array"):
            assert one.get("description") or one == {"type": "number"}
        assert "minimum" not in one or one["type"] in ("integer", "number")
        for keyword in ("properties", "$defs"):
            schemas += one.get(keyword, {}).values()
        schemas += [
            one[k] for k in ("items", "additionalProperties", "if", "then", "else") if k in one
        ]
        schemas += one.get("anyOf", [])


def test_the_documentation_names_every_key():
    text = (ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8")
    keys = schema.SCHEMA["properties"]
    missing = [k for k in (*keys, *keys["environment"]["properties"]) if f"`{k}`" not in text]
    assert missing == []
    sources = ", ".join(f"`{source}`" for source in schema.SOURCES)
    assert f"source ({sources})" in text and "draft 2020-12" in text


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_records_are_valid(file):
    record = json.loads(file.read_text(encoding="utf-8"))
    assert records.validate(record) == []
    VALIDATOR.validate(record)


def test_there_are_committed_records():
    assert len(COMMITTED) >= 60


SOME = [json.loads((ROOT / "experiments" / "results" / f"{name}-seed0.json").read_text())
        for name in ("sin-tf1", "peers-sin-tf1", "scaling")]  # fmt: skip
SOME[0]["first_steps"] = {"name": "mse", "steps": [0, 1], "loss": [0.5, "nan"]}
SOME[0]["metrics"]["diagnostics"] = {"trained": {"norms": [1, 2.5], "rate": 0.5}}
SOME[0]["environment"] |= {
    "driver": "cuda 12", "processes": 2, "deterministic": True, "processor": "family 6, model 207",
}  # fmt: skip
SOME[0]["resumed"] = 2
# No 1.0 among them: an integer to JSON Schema, and not to Python.
ODD = [None, True, 7, 0, -3, 2.5, "nan", "x", "", SHA, "2026-01-02", "peers", [], [1], [None], {},
       {"a": 1}, {"name": "x", "source": "file"}, {"diagnostics": {"a": {}}}]  # fmt: skip


def places(value, path=()):
    """The path of everything in a value."""
    yield path
    members = value.items() if isinstance(value, dict) else []
    members = list(enumerate(value))[:2] if isinstance(value, list) else members
    for key, item in members:
        yield from places(item, (*path, key))


@settings(max_examples=300)
@given(st.data())
def test_the_file_and_the_check_in_python_agree(data):
    """Records with things changed, removed and added: valid to both or to neither."""
    record = copy.deepcopy(data.draw(st.sampled_from(SOME)))
    for _ in range(data.draw(st.integers(1, 2))):
        paths = [path for path in places(record) if path]
        *way, last = data.draw(st.sampled_from(paths))
        inner = record
        for key in way:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[last] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
        else:
            del inner[last]
        if not record:
            break
    assert (records.validate(record) == []) == VALIDATOR.is_valid(record)


# ---- values in JSON's types ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.float64("nan"), "nan"),
        (np.float16("-inf"), "-inf"),
        (np.int64(7), 7),
        (np.uint8(200), 200),
        (np.bool_(True), True),
        (np.str_("lstm"), "lstm"),
        (jnp.bfloat16(1.5), 1.5),
        (jnp.float32(0.25), 0.25),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array([1.5, np.inf]), [1.5, "inf"]),
        (jnp.asarray([0.5, -2], jnp.bfloat16), [0.5, -2.0]),
        ({"a": [np.float64(2), (None, "x")]}, {"a": [2.0, [None, "x"]]}),
    ],
)
def test_numbers_of_numpy_and_jax_become_pythons(value, expected):
    def types(value):
        if isinstance(value, dict):
            return {key: types(item) for key, item in value.items()}
        return [types(item) for item in value] if isinstance(value, list) else type(value)

    got = records.plain(value)
    assert got == expected and types(got) == types(expected)


@pytest.mark.parametrize(
    "value, complaint",
    [
        ({"a": [0, object()]}, r"x\.a\[1\]: got object, expected numbers, text, lists or mappings"),
        ({"a": {"b": np.array(["high"])}}, r"x\.a\.b: got ndarray of <U4, expected numbers"),
        ([np.array([None])], r"x\[0\]: got ndarray of object, expected numbers"),
        (1j, "x: got complex, expected numbers"),
        (np.complex64(1j), "x: got complex64, expected numbers"),
        (np.array([1j]), "x: got ndarray of complex128, expected numbers"),
        ({1}, "x: got set, expected numbers"),
    ],
)
def test_what_has_no_place_in_json_is_named(value, complaint):
    with pytest.raises(ValueError, match=f"^{complaint}"):
        records.plain(value, "x")


def test_a_random_key_is_no_number():
    with pytest.raises(ValueError, match=r"^x\.key: got \w+ of key<fry>, expected numbers"):
        records.plain({"key": jax.random.key(0)}, "x")


def test_a_metric_in_numpys_types_makes_a_valid_record(tmp_path):
    """np.float64 is a float to Python and was no number to the check."""
    metrics = {"mse": np.float64(0.25), "all": [np.float64(1), np.float32(2)], "n": np.int64(3)}
    with Run.create("sin", {}, out=str(tmp_path / "a")) as run:
        record = finish(run, metrics=metrics)
    assert record["metrics"] == {"mse": 0.25, "all": [1.0, 2.0], "n": 3}
    assert type(record["metrics"]["mse"]) is float


# ---- rows ---------------------------------------------------------------------------------------


def test_a_configuration_finds_its_row_whatever_its_seed_and_folder():
    rows = {"a": Config(), "b": Config(preset="keras")}
    assert records.matching_row(Config(seed=9, out="x"), rows) == "a"
    assert records.matching_row(Config(preset="keras", seed=1), rows) == "b"
    assert records.matching_row(Config(learning_rate=0.007), rows) is None


def test_to_insist_on_the_real_data_makes_no_other_row():
    asked = dataclasses.make_dataclass("Asked", [("data", str, "auto"), ("size", int, 1)])
    rows = {"a": asked(), "b": asked(data="offline", size=2)}
    assert records.matching_row(asked(data="tfds"), rows) == "a"
    assert records.matching_row(asked(data="tfds", size=2), rows) is None
    assert records.matching_row(asked(data="offline"), rows) is None


def test_bits_that_were_asked_for_make_no_other_row():
    asked = dataclasses.make_dataclass("Asked", [("deterministic", bool, False), ("size", int, 1)])
    assert records.matching_row(asked(deterministic=True), {"a": asked()}) == "a"
    assert records.matching_row(asked(deterministic=True, size=2), {"a": asked()}) is None


@pytest.mark.parametrize(
    "name", ["counting_seconds", "train_seconds", "tokens_per_second", "peak_memory_mib",
             "reader_slowest_seconds", "reader_peak_mib"],
)  # fmt: skip
def test_what_a_run_cost_is_known_by_name(name):
    assert schema.is_cost(name) and not schema.is_cost("test_accuracy")
