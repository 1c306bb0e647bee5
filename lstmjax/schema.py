"""The form of a record (record.json), checked in plain Python."""

from typing import Any

SOURCES = ("tfds", "offline", "generated", "file")
SECONDS = ("compile", "train", "eval")
DATASET = ("name", "source", "sha256")
_COMMON = ("experiment", "command", "dataset", "metrics", "seconds", "environment", "seed")
_OURS = ("version", "date", "config", "params_sha256")


def validate(record: Any) -> list[str]:
    """What is wrong with a record, one sentence each; an empty list where it is valid.

    A peer's record (experiment "peers", another framework's run of the same program) has `peer
    {row, framework}` in place of version, date, config and params_sha256, and its data need no
    sha256.
    """
    if not isinstance(record, dict):
        return [f"expected a JSON object, got {type(record).__name__}"]
    peer = record.get("experiment") == "peers"
    data = record.get("dataset")
    needed = _COMMON + (("peer",) if peer else _OURS)
    problems = [f"{key} is missing" for key in needed if key not in record]
    for key, (holds, expected) in _FORM.items():
        if key in record and not holds(record[key]):
            problems.append(f"{key}: got {str(record[key])[:80]}, expected {expected}")
    if not peer and _is_dataset(data) and not _is_sha256(data.get("sha256")):
        problems.append("dataset: got no sha256, expected 64 hexadecimal digits")
    return problems


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or value in ("nan", "inf", "-inf")


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_dataset(value: Any) -> bool:
    named = _is_object(value) and isinstance(value.get("name"), str)
    return named and value.get("source") in SOURCES


def _is_metrics(value: Any) -> bool:
    """Numbers and lists of numbers by name; under "diagnostics" they may stand in groups."""
    values = value.items() if _is_object(value) else []
    grouped = [_is_group(v) if k == "diagnostics" else _are_numbers(v) for k, v in values]
    return bool(grouped) and all(grouped)


def _is_group(value: Any) -> bool:
    if not (_is_object(value) and value):
        return False
    return all(_are_numbers(v) or _is_group(v) for v in value.values())


def _are_numbers(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(map(_is_number, items))


def _is_seconds(value: Any) -> bool:
    times = [value.get(key) for key in SECONDS] if _is_object(value) else [None]
    return all(type(t) in (int, float) and t >= 0 for t in times)


def _is_peer(value: Any) -> bool:
    return _is_object(value) and all(_is_text(value.get(key)) for key in ("row", "framework"))


_FORM = {
    "experiment": (_is_text, "text"),
    "row": (_is_text, "text"),
    "peer": (_is_peer, "row and framework, both text"),
    "command": (_is_text, "text"),
    "config": (_is_object, "an object"),
    "dataset": (_is_dataset, f"name and source (one of {', '.join(SOURCES)})"),
    "metrics": (_is_metrics, "numbers or lists of numbers, at least one"),
    "seconds": (_is_seconds, "compile, train and eval, each a number not below 0"),
    "params_sha256": (_is_sha256, "64 hexadecimal digits"),
    "environment": (_is_object, "an object"),
    "seed": (lambda value: type(value) is int, "an integer"),
}
