"""Make a release of a finished run's weights, with a model card, and check one.

    python experiments/card.py make runs/imdb-20260102-030405 --out imdb-tf2
    python experiments/card.py make runs/mnist-20260102-030405 --which seed3 --out mnist
    python experiments/card.py verify imdb-tf2                 all hashes, and the whole test split
    python experiments/card.py verify imdb-tf2 --limit 500     its first 500 examples
    python experiments/imdb.py predict "not bad at all" --run imdb-tf2

A release is a folder: the weights, under a name that holds the first 12 digits of their sha256,
the run's settings, record and vocabulary, MODEL_CARD.md, release.json with the numbers of the card
and which test examples the model gets right, and SHA256SUMS (`sha256sum -c` reads it too). Runs of
imdb.py, reviews.py, mnist.py and smnist.py can be released. What a card says of groups of test
examples is computed here, once, of a finished run; it chooses nothing.
"""

import dataclasses
import hashlib
import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from lstmjax import cards, cli, finished, lanes, releases, tables
from lstmjax.card_subjects import SUBJECTS, Subject
from lstmjax.data import files
from lstmjax.provenance import params_sha256
from lstmjax.records import RunError, plain, read_config, to_json
from lstmjax.schema import SECONDS

CARD, RELEASE = "MODEL_CARD.md", "release.json"
FORMAT = 1  # of release.json
MOST_BYTES = 2**33
# Settings that a record shows without the machine's own, and one that --resume may change.
FOLDERS = {"out", "resume", "pretrained", "teacher", "on_nan"}


@dataclasses.dataclass(frozen=True)
class Make:
    """Makes a release: scores the whole test split, writes the card and copies the weights."""

    run: tyro.conf.Positional[str] = ""
    """Folder of a finished run."""
    out: str | None = None
    """Folder for the release, new or empty."""
    which: str | None = None
    """Whose weights, where the run has several: seed3, lr0.001-seed3."""
    tolerance: float = 5e-4
    """Share of the examples (at least one) that may come out otherwise: processors round unlike."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Checks a release: every hash, and the answers to the test split or its first examples."""

    release: tyro.conf.Positional[str] = ""
    """Folder of a release."""
    limit: int | None = None
    """How many test examples to score, the first ones; all when not given."""
    tolerance: float = 5e-4
    """Share of the examples (at least one) that may come out otherwise: processors round unlike."""


# ---- a run or a release -------------------------------------------------------------------------


class Opened(NamedTuple):
    """A run or a release that was read.

    Attributes:
      subject: what it is about.
      script: the module of its experiment.
      record: its record.
      trained: its model.
      settings: its settings, with the data that the record says.
    """

    subject: Subject
    script: Any
    record: dict[str, Any]
    trained: Any
    settings: Any


def opened(folder: Path, which: str | None) -> Opened:
    """Reads a folder.

    Raises:
      RunError: it holds no record of an experiment that can be released, or is damaged.
    """
    record = tables.load(folder / "record.json")
    experiment = record["experiment"]
    if experiment not in SUBJECTS:
        known = ", ".join(SUBJECTS)
        raise RunError(f"{folder} is a run of {experiment}, expected one of {known}")
    subject, script = SUBJECTS[experiment], importlib.import_module(experiment)
    stored, recorded = read_config(folder), record["config"]
    for name in sorted((stored.keys() | recorded.keys()) - FOLDERS):
        if stored.get(name) != recorded.get(name):
            raise RunError(f"{folder}/config.json is not what record.json says: {name}")
    trained = subject.read(script, folder, which)
    accuracies = record["metrics"].get("test_accuracy")
    count, seeds = np.size(accuracies), getattr(trained.settings, "seeds", 1)
    if count != seeds:  # a list of lanes is made of them: it is to be as long as the record's
        raise RunError(f"{folder}/record.json is of {count} test accuracies, expected {seeds}")
    source = "offline" if record["dataset"]["source"] == "offline" else "tfds"
    settings = dataclasses.replace(trained.settings, data=source)
    return Opened(subject, script, record, trained, settings)


class Data(NamedTuple):
    """What a card says of data: a title, the hash in the record, how many examples by split."""

    title: str
    sha256: str
    sizes: dict[str, int]


def several(settings: Any) -> list[lanes.Lane]:
    """The lanes of a run that has many; empty for one of an experiment that knows none."""
    asked = hasattr(settings, "seeds") and lanes.asked_for(settings)
    return lanes.lanes_of(settings) if asked else []


def check_data(run: Opened) -> Data:
    """The data of a run; raises RunError where they are not those of its record."""
    dataset = run.script.load(run.settings)
    sizes = sizes_of(dataset, run.settings)
    sha256, recorded = dataset.sha256, run.record["dataset"]
    if several(run.settings) and hasattr(run.script, "load_lanes"):
        sha256 = run.script.load_lanes(run.settings)[1].sha256  # of the rows of all seeds
    if sha256 != recorded.get("sha256"):
        raise RunError(
            f"the data here ({dataset.title}, sha256 {sha256[:12]}) are not those of the record "
            f"({recorded['name']}, {recorded.get('sha256')!s:.12})"
        )
    return Data(dataset.title, sha256, sizes)


def sizes_of(dataset: Any, settings: Any) -> dict[str, int]:
    """How many examples there are by split; validation stands by itself in any case.

    Whole reviews are held out of train after they are loaded.
    """
    sizes = {split: len(fields["label"]) for split, fields in dataset.splits.items()}
    if "validation" in sizes:
        return sizes
    held = settings.validation_size
    return {"train": sizes.pop("train") - held, "validation": held} | sizes


def recorded_accuracy(run: Opened, which: str | None) -> float:
    """The test accuracy in the record, of one lane where there are several.

    Raises:
      RunError: there is none.
    """
    metrics = run.record["metrics"]
    found = metrics.get("test_accuracy")
    if isinstance(found, list):
        chosen = {v for name, v in metrics.items() if name.startswith("sweep_chosen_")}
        every = several(run.settings)
        names = [lane.name for lane in every if set(lane.swept.values()) <= chosen]
        if which not in names or len(found) != len(names):
            expected = f"expected one of {', '.join(names)}: no other was scored on the test split"
            raise RunError(f"--which: got {which or 'none'}, {expected}")
        found = found[names.index(which)]
    if not isinstance(found, float | int):
        raise RunError("record.json holds no test accuracy, expected one")
    if not 0 <= found <= 1:
        raise RunError(f"record.json: got a test accuracy of {found:.4g}, expected one from 0 to 1")
    return float(found)


def agrees(found: float, expected: float, count: int, tolerance: float) -> bool:
    """Whether two numbers of right answers to ``count`` examples are equal but for round-off."""
    return abs(round(found) - round(expected)) <= max(1, tolerance * count)


# ---- make ---------------------------------------------------------------------------------------


def make(options: Make) -> None:
    """Computes everything, then writes the folder, SHA256SUMS last."""
    if not options.run:
        raise ValueError("got no run, expected the folder of a finished one")
    check_tolerance(options)
    cli.check(options, "out", bool(options.out), "a folder, new or empty")
    folder, out, which = Path(options.run), Path(options.out), options.which
    releases.check_empty(out)
    run = opened(folder, which)
    check_recorded_weights(run, folder)
    expected, data = recorded_accuracy(run, which), check_data(run)
    print(f"scoring {data.title}, sha256 {data.sha256[:12]}")
    scored = run.subject.score(run.script, run.trained, run.settings, None)
    measured = cards.measure(scored)
    correct, count = measured["correct"], measured["count"]
    if not agrees(correct, expected * count, count, options.tolerance):
        raise RunError(f"test accuracy {correct / count:.4f}, expected the record's {expected:.4f}")

    row = run.record.get("row") or run.record["experiment"]
    title = f"{row}, {which or 'seed' + str(run.record['seed'])}"
    weights = files.read_bytes(finished.weights(folder, which), MOST_BYTES)
    digest = hashlib.sha256(weights).hexdigest()
    name = f"{re.sub(r'[^A-Za-z0-9.]+', '-', title).strip('-.')}-{digest[:12]}.safetensors"
    release = {
        "format": FORMAT,
        "weights": name,
        "which": which,
        "params_sha256": params_sha256(run.trained.params),
        "measured": measured,
        "correct": np.packbits(scored.correct).tobytes().hex(),
    }
    text = run.subject.text(run.record["experiment"], run.settings)
    others = run.subject.files(run.settings)
    kept = {other: files.read_bytes(folder / other, MOST_BYTES) for other in others}
    hashes = {name: digest} | {other: hashlib.sha256(kept[other]).hexdigest() for other in kept}
    facts = facts_of(run, data, hashes, release)
    card = cards.card(title, text, facts, results(run, which), scored.classes, measured)
    kept["record.json"] = files.read_bytes(folder / "record.json", files.JSON_BYTES)
    made = {"config.json": to_json(run.record["config"]), RELEASE: to_json(plain(release, RELEASE))}
    releases.write(out, {name: weights} | kept | made | {CARD: card.encode()})
    print(
        f"test accuracy {correct / count:.4f} of {count:,} {text.unit} of {data.title}; "
        f"release in {out}"
    )


def check_tolerance(options: Make | Verify) -> None:
    cli.check(options, "tolerance", 0 <= options.tolerance < 1, "0 <= tolerance < 1")


def check_recorded_weights(run: Opened, folder: Path) -> None:
    """Raises RunError where the weights in a run's folder are not those of its record."""
    names = finished.lanes(folder)
    if names:
        own = {name: run.subject.read(run.script, folder, name).params for name in names}
    else:
        own = run.trained.params
    if params_sha256(own) != run.record.get("params_sha256"):
        raise RunError(
            f"the weights in {folder} are not those of its record: params_sha256 differs"
        )


def facts_of(
    run: Opened, data: Data, hashes: Mapping[str, str], release: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """The card's tables of facts; ``hashes`` of the files that make the model."""
    record, settings, seen = run.record, run.settings, run.record["environment"]
    numbers = sum(array.size for array in jax.tree.leaves(run.trained.params))
    dirty = ", with changes that are not in it" if seen.get("dirty") else ""
    count = len(several(settings))
    together = f", for {count} runs together" if count else ""
    each_way = " in each direction" if getattr(settings, "directions", None) == "both" else ""
    return {
        "Model": {
            "cell": f"{settings.cell}, {getattr(settings, 'num_layers', 1)} x "
            f"{settings.hidden_size} units{each_way}",
            "parameters": f"{numbers:,}",
            "files": ", ".join(f"{name} sha256 {digest}" for name, digest in hashes.items()),
            "params_sha256": release["params_sha256"],
        },
        "Data": {
            "name": data.title,
            "sha256": data.sha256,
            "examples": ", ".join(f"{split} {count:,}" for split, count in data.sizes.items()),
        },
        "Training": {
            "command": f"`{record['command']}`",
            "weights of": release["which"] or f"seed {record['seed']}",
            "commit": (seen.get("git commit") or "unknown") + dirty,
            "versions": f"lstmjax {record.get('version')}, jax {seen.get('jax')}",
            "date": str(record.get("date")),
            "device": f"{seen.get('devices')} x {seen.get('device')}",
            "seconds": f"{sum(record['seconds'][name] for name in SECONDS):.0f}{together}",
        },
    }


def results(run: Opened, which: str | None) -> str:
    """What a card says of seeds, and of data that are not the real ones."""
    metrics = run.record["metrics"]
    if "test_accuracy_mean" in metrics and len(metrics["test_accuracy"]) > 1:
        # What is no finite number is text in a record.
        each = ", ".join(f"{float(value):.4f}" for value in metrics["test_accuracy"])
        mean, half = (float(metrics[f"test_accuracy_{name}"]) for name in ("mean", "ci95"))
        said = (
            f"The run has {len(metrics['test_accuracy'])} seeds, with test accuracies of {each}: "
            f"mean {mean:.4f} ± {half:.4f} (95 %, Student); the weights are those of {which}."
        )
    else:
        said = (
            "One run, of one seed: the interval is about the test examples, and says nothing "
            "about what another seed would give."
        )
    if "best_epoch" in metrics:
        said += " Of the epochs of a run, the one that is best on validation counts."
    if getattr(run.settings, "test_every_epoch", False):
        said += " The run scored the test split after every epoch, and kept its last weights."
    if run.settings.limit is not None:
        said += f" Only the first {run.settings.limit:,} examples of every split were used."
    if run.record["dataset"]["source"] == "offline":
        said += " The data are generated: these numbers say nothing about real ones."
    return said


# ---- verify -------------------------------------------------------------------------------------


def verify(options: Verify) -> None:
    """Prints what was checked; the first thing that is not as it should be is an error."""
    if not options.release:
        raise ValueError("got no release, expected the folder of one")
    check_tolerance(options)
    cli.check_counts(options, "limit")
    folder = Path(options.release)
    names = releases.check(folder)
    print(f"files       {len(names)}, as {releases.SUMS} says")
    run, release = opened(folder, None), read_release(folder)
    print(f"weights     params_sha256 {check_weights(run, release, folder)}")
    data = check_data(run)
    print(f"data        {data.title}, sha256 {data.sha256[:12]}: the record's")
    scored = run.subject.score(run.script, run.trained, run.settings, options.limit)
    print(f"accuracy    {compared(run, release, scored, options.tolerance)}")


def read_release(folder: Path) -> dict[str, Any]:
    """What release.json says; raises RunError where it is none."""
    path = folder / RELEASE
    try:
        found = files.read_json(path)
        which, measured = found["which"], found["measured"]
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(found["correct"]), np.uint8))
        right = bits[: measured["count"]].astype(bool)
        good = found["format"] == FORMAT and isinstance(which, str | None)
        good = good and len(right) == measured["count"] and right.sum() == measured["correct"]
        if not good:
            raise ValueError("its parts do not fit each other")
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(f"{path} is damaged: {files.reason(error)}") from error
    return found | {"right": right}


def check_weights(run: Opened, release: Mapping[str, Any], folder: Path) -> str:
    """What is to be said of the weights; raises RunError where they are not the recorded ones."""
    found, path = params_sha256(run.trained.params), finished.weights(folder)
    if path.name != release.get("weights") or found != release.get("params_sha256"):
        raise RunError(f"{path} does not hold the weights that {RELEASE} names")
    recorded = run.record.get("params_sha256")
    if release["which"] is not None:  # one of several, of which the record has a hash in common
        return f"{found[:12]}: release.json's; the record's {recorded!s:.12} is of all lanes"
    if found != recorded:
        raise RunError(f"{path} does not hold the weights of record.json: params_sha256 differs")
    return f"{found[:12]}: the record's"


def compared(
    run: Opened, release: Mapping[str, Any], scored: cards.Scored, tolerance: float
) -> str:
    """What is to be said of the answers; raises RunError where they are not the recorded ones."""
    right, all_of_them = scored.correct, len(release["right"])
    count, unit = len(right), run.subject.text(run.record["experiment"], run.settings).unit
    if count > all_of_them:
        raise RunError(f"{RELEASE} is of {all_of_them:,} {unit}, expected {count:,}")
    other = int((right != release["right"][:count]).sum())
    part = "all" if count == all_of_them else "the first"
    said = f"{right.mean():.4f} of {part} {count:,} test {unit}"
    if other > max(1, tolerance * count):
        raise RunError(f"{said}: {other} come out otherwise than when the release was made")
    said += f", {other or 'none'} otherwise than when the release was made"
    if count < all_of_them:
        return f"{said} (the record's accuracy is of all {all_of_them:,})"
    expected = recorded_accuracy(run, release["which"])
    if not agrees(right.sum(), expected * count, count, tolerance):
        raise RunError(f"{said}; the record's is {expected:.4f}")
    equal = round(expected * count) == right.sum()
    return f"{said}: {'' if equal else 'nearly '}the record's {expected:.4f}"


COMMANDS = {"make": (Make, make), "verify": (Verify, verify)}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        raise ValueError(f"command: got {name}, expected make or verify, see --help")
    options_class, function = COMMANDS[name]
    function(cli.parse(options_class, argv=sys.argv[2:], description=options_class.__doc__))


if __name__ == "__main__":
    cli.main(main)
