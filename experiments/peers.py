"""The source programs in Keras 3 on TensorFlow, or in PyTorch, for BENCHMARKS.md to show by ours.

    pip install -e '.[peers]'
    python experiments/peers.py --row imdb-tf2 --seed 0
    python experiments/peers.py --row imdb-tf2 --framework torch
    python experiments/peers.py --row mnist-tf1 --limit 1000     a look, which leaves no record
    python experiments/peers.py layers     one LSTM layer in every framework: see peer_layers.py

Each program gets the arrays that ours gets, the same initial laws, optimiser, batches, epochs and
scores. It is written as the framework's users write it (peer_keras.py, peer_torch.py, the latter
for reviews and digits alone), all cores are for the taking, GPUs are not used. On 2 CPU cores sin
takes seconds, forecast half a minute, imdb and mnist some minutes.

Keras traces a program in its first call: `compile` is the time until the first batch of training
and the first of scoring have come out (the first call of a compiled function), all that follows is
`train` and `eval`. PyTorch, which compiles nothing here, is held to the same rule. Loading a
framework and the data counts nowhere, as with ours.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

import jax

from lstmjax import cli
from lstmjax.records import RunError, command_line, environment, to_json, validate, write_file
from lstmjax.rows import SOURCES
from lstmjax.schema import DATASET
from lstmjax.train import Clock

# The rows that a framework has a program for. The frameworks are imported when they are run.
ROWS = {
    "keras": tuple(SOURCES),
    "torch": ("imdb-tf2", "imdb-tf2-source", "mnist-tf1", "mnist-corrected"),
}
NOT_INVOLVED = ("jax", "jaxlib", "flax", "optax", "driver")  # they have no part in these numbers


@dataclass(frozen=True)
class Config:
    row: Literal[
        "sin-tf1", "sin-keras", "forecast-rnn", "forecast-lstm", "imdb-tf2", "imdb-tf2-gru",
        "imdb-tf2-rnn", "imdb-tf2-source", "mnist-tf1", "mnist-corrected",
    ] = "imdb-tf2"  # fmt: skip
    """The program: a section of BENCHMARKS.md."""
    framework: Literal["keras", "torch"] = "keras"
    """Keras on TensorFlow, or PyTorch."""
    seed: int = 0
    """Of initial weights, dropout, batch order and hold-out."""
    data: Literal["auto", "tfds", "offline"] = "auto"
    """The real data if they can be had, the real ones or an error, or made-up ones."""
    limit: int | None = None
    """Use only so many examples of every split, or updates of sin: a look, not a row's record."""
    out: str | None = None
    """The record's file, new; when not given, experiments/results/peers-<row>-seed<N>.json (of
    PyTorch peers-torch-<row>-seed<N>.json), or with --limit none."""


def check(config: Config) -> None:
    cli.check_counts(config, "seed", least=0)
    cli.check_counts(config, "limit", least=128 if config.row.startswith("imdb") else 1)  # a batch
    known = ROWS[config.framework]
    what = f"one of {', '.join(known)} with --framework {config.framework}"
    cli.check(config, "row", config.row in known, what)


def load(framework: str, seed: int) -> tuple[ModuleType, dict[str, str]]:
    """The module of a framework's programs, the framework loaded and seeded, and its versions."""
    try:
        programs = importlib.import_module(f"peer_{framework}")
        return programs, programs.load(seed)
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed: pip install -e '.[peers]'") from error


def free_file(config: Config) -> Path | None:
    """Where the record goes, if anywhere; RunError where something is there already."""
    if config.limit is not None and config.out is None:
        return None
    prefix = "peers" if config.framework == "keras" else f"peers-{config.framework}"
    name = f"{prefix}-{config.row}-seed{config.seed}.json"
    target = Path(config.out or Path("experiments", "results", name))
    if target.exists():
        raise RunError(f"{target} exists: move it away, or choose another --out")
    return target


def run(config: Config) -> None:
    check(config)
    free_file(config)  # or an error now, not after minutes
    # The code as it is now, when it has just been imported: it may be edited during a long run.
    circumstances = environment(jax.devices("cpu")[:1])
    programs, versions = load(config.framework, config.seed)
    framework = " / ".join(f"{name} {version}" for name, version in versions.items())
    print(f"the program of {config.row} in {framework}")
    clock = Clock()
    dataset, metrics = programs.PROGRAMS[config.row](config, clock)
    shown = {k: f"{v:.4g}" for k, v in metrics.items() if not isinstance(v, list)}
    times = {k: v for k, v in clock.seconds.items() if not isinstance(v, list)}
    shown |= {f"{k} seconds": f"{v:.1f}" for k, v in times.items()}
    print(", ".join(f"{k} {v}" for k, v in shown.items()), f"on {dataset.title}")
    # The tables know no such row as one of few examples or of made-up ones, and refuse it.
    few = "" if config.limit is None else f", the first {config.limit}"
    made_up = dataset.source == "offline"
    few += ", on made-up data" if made_up else ""
    record = {
        "experiment": "peers",
        "peer": {"row": config.row + few, "framework": framework},
        "command": command_line(),
        "dataset": {key: getattr(dataset, key) for key in DATASET},
        "metrics": metrics,
        "seconds": clock.seconds,
        "environment": {k: v for k, v in circumstances.items() if k not in NOT_INVOLVED} | versions,
        "seed": config.seed,
    }
    # Made-up data has no place among the results, unless that is asked for.
    leave(record, None if made_up and config.out is None else free_file(config))


def leave(record: dict[str, Any], target: Path | None) -> None:
    """Writes a record that is valid."""
    if problems := validate(record):
        raise ValueError(f"record: {'; '.join(problems)}")
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, to_json(record))
        print(f"record in {target}")


def no_script(file: str) -> NoReturn:
    """What a part of this says when it is started by itself."""
    sys.exit(f"error: {Path(file).name} is a part of peers.py: python experiments/peers.py --help")


if __name__ == "__main__":
    if sys.argv[1:2] == ["layers"]:
        import peer_layers

        cli.main(peer_layers.main)
    else:
        cli.main(lambda: run(cli.parse(Config, description=__doc__)))
