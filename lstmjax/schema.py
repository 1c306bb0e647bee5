"""The form of a record (record.json), which record.schema.json beside this file states.

That file is JSON Schema (draft 2020-12), for whoever reads records with other tools; the keywords
it uses are checked here in plain Python, so that nothing has to be installed for it. Values are
brought into that form by ``plain``.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

FILE = Path(__file__).with_name("record.schema.json")
SCHEMA = json.loads(FILE.read_text(encoding="utf-8"))
SOURCES = tuple(SCHEMA["properties"]["dataset"]["properties"]["source"]["enum"])
SECONDS = tuple(SCHEMA["properties"]["seconds"]["required"])
# Metrics that say what a run cost: they are another machine's, or another hour's, like seconds.
COSTS = (
    "tokens_per_second", "train_seconds", "counting_seconds", "slowest_seconds", "peak_memory_mib",
    "peak_mib",
)  # fmt: skip
DATASET = ("name", "source", "sha256")


def is_cost(metric: str) -> bool:
    """Whether a metric of this name says what a run cost, and not what it gave."""
    return metric.endswith(COSTS)


def validate(record: Any) -> list[str]:
    """What is wrong with a record, one sentence each; an empty list where it is valid.

    A peer's record (experiment "peers", another framework's run of the same program) has `peer
    {row, framework}` in place of version, date, config and params_sha256, and its data need no
    sha256.

    Args:
      record: what was read from JSON. Python's numbers are taken at their word: an integer is an
        int, so that 1.0 is none, and NaN and infinity, which JSON does not have, are no numbers.

    Returns:
      `metrics.loss: got 'high', expected a number or a list of numbers` and the like; what is
      missing first.
    """
    if not isinstance(record, dict):
        return [f"expected a JSON object, got {type(record).__name__}"]
    found = list(dict.fromkeys(_problems(record, SCHEMA, "")))
    return sorted(found, key=lambda problem: not problem.endswith(" is missing"))


def _problems(value: Any, schema: dict[str, Any], name: str) -> Iterator[str]:
    """One line for every place where a value is not what a schema says."""
    if "$ref" in schema:
        yield from _problems(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], name)
    if not all(holds(value, schema[key]) for key, holds in _OF_ITSELF.items() if key in schema):
        yield f"{name}: got {_short(value)}, expected {schema.get('description')}"
        return
    if "anyOf" in schema:
        yield from _best(value, schema, name)
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            yield from _problems(item, schema["items"], f"{name}[{i}]")
    if isinstance(value, dict):
        yield from _problems_inside(value, schema, f"{name}." if name else "")
    if "if" in schema:
        holds = not any(_problems(value, schema["if"], name))
        yield from _problems(value, schema["then" if holds else "else"], name)


def _problems_inside(value: dict[str, Any], schema: dict[str, Any], prefix: str) -> Iterator[str]:
    """Those of an object's members."""
    missing = [key for key in schema.get("required", ()) if key not in value]
    yield from (f"{prefix}{key} is missing" for key in missing)
    known = schema.get("properties", {})
    for key, item in value.items():
        if rule := known.get(key, schema.get("additionalProperties")):
            yield from _problems(item, rule, f"{prefix}{key}")


def _best(value: Any, schema: dict[str, Any], name: str) -> list[str]:
    """The problems with the alternative that comes closest; none where one of them fits."""
    every = [list(_problems(value, one, name)) for one in schema["anyOf"]]
    if not all(every):
        return []
    # What is wrong within the value says more than that the value is of none of the kinds.
    inside = [problems for problems in every if not problems[0].startswith(f"{name}: ")]
    outside = f"{name}: got {_short(value)}, expected {schema.get('description')}"
    return inside[0] if inside else [outside]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _is_a(value: Any, types: str | list[str]) -> bool:
    return any(_TYPES[name](value) for name in ([types] if isinstance(types, str) else types))


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) is int or type(value) is float and math.isfinite(value),
}
# Keywords that speak of a value and not of what is in it; all patterns have anchors at both ends.
_OF_ITSELF: dict[str, Callable[[Any, Any], bool]] = {
    "type": _is_a,
    "const": lambda value, rule: value == rule,
    "enum": lambda value, rule: value in rule,
    "minimum": lambda value, rule: value >= rule,
    "pattern": lambda value, rule: re.fullmatch(rule, value) is not None,
    "minItems": lambda value, rule: len(value) >= rule,
    "minProperties": lambda value, rule: len(value) >= rule,
}
KEYWORDS = {
    *_OF_ITSELF, "$ref", "required", "properties", "additionalProperties", "items", "anyOf", "if",
    "then", "else", "$defs", "$schema", "title", "description", "$comment",
}  # fmt: skip


# ---- values in JSON's types ---------------------------------------------------------------------


def plain(value: Any, name: str = "value") -> Any:
    """The value in JSON's types: dataclasses and mappings to dicts, arrays to lists.

    Numbers of NumPy and JAX become Python's; non-finite floats become "nan", "inf", "-inf".

    Raises:
      ValueError: something has no place in JSON; its place below ``name`` is named.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: plain(getattr(value, f.name), f"{name}.{f.name}") for f in fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (str, os.PathLike)):
        return str(value)
    if isinstance(value, float):  # np.float64 is one
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, int):
        return int(value)
    kind = type(value).__name__
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        if _is_real(value.dtype):
            array = np.asarray(value)
            # bfloat16 and its like are no floats to NumPy: `tolist` would leave them as they are.
            array = array if array.dtype.kind in "biuf" else array.astype(float)
            return plain(array.tolist(), name)
        kind += f" of {value.dtype}" if value.shape or isinstance(value, jax.Array) else ""
    raise ValueError(f"{name}: got {kind}, expected numbers, text, lists or mappings")


def _is_real(dtype: Any) -> bool:
    """Whether it is a type of truth values, integers or real numbers."""
    kinds = (np.bool_, np.integer, np.floating)
    return any(jax.dtypes.issubdtype(dtype, kind) for kind in kinds)


def to_json(value: Any) -> bytes:
    """The value as indented JSON in UTF-8, keys in the order given, a newline at the end."""
    return (json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
