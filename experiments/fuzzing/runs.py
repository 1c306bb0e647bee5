"""Readers of what a run leaves, and of texts: predict, resume, records, checkpoints."""

import dataclasses
import functools
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import imdb as experiment
import jax
import jax.numpy as jnp
import numpy as np

from fuzzing.mutations import Files, scratch, taken
from lstmjax import (
    checkpoint,
    cli,
    compare,
    optim,
    parallel,
    provenance,
    results,
    reviewer,
    tables,
    train,
)
from lstmjax.checkpoint import Checkpoints, named
from lstmjax.data import characters, long_text, text
from lstmjax.keeper import Keeper, _plain_keys
from lstmjax.records import Run, to_json, validate

ROOT = Path(__file__).resolve().parents[2]
RUN = experiment.Config(
    vocabulary_size=20, max_length=7, embedding_size=3, hidden_size=2, num_layers=2, devices=1
)
WORDS = (text.UNUSED, *"the a film was good bad not it all i loved hated never great".split())
TEXTS = (
    "I loved it: a great film, <br /> not bad at all.",
    "ΟΔΥΣΣΕΥΣ. naïve 😀 \u202e \x00 İstanbul ǅ ﬁlm",
    "film " * 3000,
    "",
)


# ---- the folder of a run ------------------------------------------------------------------------


@functools.cache
def trained() -> tuple[Any, dict[str, Any]]:
    """The model of RUN and its parameters."""
    model = experiment.make_model(RUN)
    ids = np.zeros((1, RUN.max_length), np.int32)
    return model, jax.jit(model.init)(jax.random.key(0), ids)["params"]


def run_seeds() -> list[Files]:
    with scratch() as folder:
        checkpoint.save_params(folder / "params.safetensors", trained()[1])
        (folder / "config.json").write_bytes(to_json(RUN))
        (folder / "vocabulary.txt").write_text("\n".join(WORDS))
        return [taken(folder)]


def run_read(folder: Path) -> None:
    """What `predict` does; a valid answer is a probability."""
    run = reviewer.read(folder, experiment.Config, experiment.check, experiment.make_model)
    check_answer(reviewer.probability(run, ["a good film, not bad at all"]))


def check_answer(answer: tuple[float, int, int]) -> None:
    positive, known, words = answer
    assert 0 <= positive <= 1 and 0 <= known <= words


def resume_seeds() -> list[Files]:
    with scratch() as folder:
        with Run.create("imdb", RUN, out=str(folder / "run")) as run:
            for step in (10, 20):
                run.log(step, loss=0.5 / step)
        events = next((folder / "run").glob("events*"))
        events.rename(events.with_name("events.out.tfevents.1.lstmjax"))
        return [taken(folder / "run")]


def resume_read(folder: Path) -> None:
    """What `--resume` does before it reads a checkpoint."""
    config = cli.stored_config(experiment.Config, folder, "resume")
    experiment.check(config)
    with redirect_stderr(io.StringIO()), Run.reopen("imdb", folder) as run:
        run.restore({"sizes": {"metrics.jsonl": 30}})
        provenance.first_steps(provenance.read_lines(folder / "metrics.jsonl"))


def checkpoint_state(step: int) -> tuple[dict[str, np.ndarray], Any]:
    rng = np.random.default_rng(step)
    arrays = {"params.w": rng.normal(size=(3, 4)), "step": np.int32(step), "key": np.uint32([1, 2])}
    return arrays, {"epoch": step, "piece": 0, "parts": {"scores": [0.5]}}


def checkpoint_seeds() -> list[Files]:
    with scratch() as folder:
        states = Checkpoints(folder)
        for step in (3, 6):
            states.save(step, *checkpoint_state(step))
        states.close()
        return [taken(folder)]


def checkpoint_seal(files: Files) -> Files:
    """The hashes of the files are right again: what lies within has to stand for itself."""
    return {name: content for name, content in files.items() if not name.endswith(checkpoint.SUMS)}


def checkpoint_read(folder: Path) -> None:
    """What is found is what was saved, at step 6 or else at step 3."""
    states = Checkpoints(folder)
    try:
        with redirect_stderr(io.StringIO()):
            found = states.latest()
    finally:
        states.close()
    if found is not None:
        step, arrays, progress = found
        saved, said = checkpoint_state(step)
        assert step in (3, 6) and progress == said
        assert all(np.array_equal(arrays[name], value) for name, value in saved.items())


@dataclasses.dataclass(frozen=True)
class Kept:
    save_every: str = "2"
    keep: int = 2
    resume: str | None = None
    on_nan: str = "stop"
    out: str | None = None


SAID = "checkpoints/0/said/metadata"


def keeper_parts() -> dict[str, Any]:
    return {"history": [], "epoch": train.Tally(), "seconds": train.Clock().seconds}


@functools.cache
def keeper_state() -> train.TrainState:
    params = {"w": jnp.arange(3.0), "b": jnp.zeros(())}
    return train.init_state(params, optim.tf_adam(0.1), jax.random.key(7))


@functools.cache
def keeper_seeds() -> list[Files]:
    with scratch() as folder:
        config, parts = Kept(out=str(folder / "run")), keeper_parts()
        parts["history"] += [0.5, 0.25]
        parts["epoch"].add({"loss": (np.ones(2, np.float32), np.ones(2, np.float32))})
        with Run.open("toy", config) as run, Keeper(run, config, parts) as keeper:
            run.log(0, loss=0.5)
            keeper.after_epoch(keeper_state(), 0.5)
        for path in (folder / "run").glob("events*"):
            path.rename(path.with_name("events.out.tfevents.1.lstmjax"))
        files = taken(folder / "run")
    files[SAID] = files[SAID].replace(path.name.encode(), b"events.out.tfevents.1.lstmjax")
    return [keeper_seal(files)]


def keeper_seal(files: Files) -> Files:
    """What is said has its right hash, and the hashes of the files are not there."""
    state = jax.tree.map(lambda a: a, keeper_state())
    arrays = named(parallel.fetch(_plain_keys(state)))
    said = json.loads(files[SAID])["said"]
    text = json.dumps({"said": said, "sha256": checkpoint._sha256(arrays, said)})
    return checkpoint_seal(files) | {SAID: text.encode()}


def keeper_read(folder: Path) -> None:
    """What `--resume` does until it trains."""
    config = dataclasses.replace(Kept(), resume=str(folder))
    with redirect_stderr(io.StringIO()), Run.open("toy", config) as run:
        with Keeper(run, config, keeper_parts()) as keeper:
            state = keeper.restored(keeper_state())
            assert jax.tree.structure(state) == jax.tree.structure(keeper_state())
            assert keeper.epoch >= 1 and keeper.piece >= 0
            list(zip(range(3), keeper.epochs(2), strict=False))


# ---- records ------------------------------------------------------------------------------------


def record_seeds() -> list[Files]:
    files = sorted((ROOT / "experiments/results").glob("*-seed[01]*.json"))
    return [{"record.json": path.read_bytes()} for path in files]


def record_read(folder: Path) -> None:
    """What `collect`, `table` and `compare` do with it."""
    record = tables.load(folder / "record.json")
    assert validate(record) == []
    assert results._record_name(record, None)
    groups = tables.load_groups(folder)
    tables.readme_table(groups).encode()
    text = tables.benchmarks(groups, tables.load_parity(folder), tables.load_timed(folder))
    assert text.encode()
    compare.differences(record, record | {"seed": -1})


# ---- texts --------------------------------------------------------------------------------------


def review_seeds() -> list[Files]:
    return [{"text": text.encode()} for text in TEXTS]


def review_reader() -> Callable[[Path], None]:
    """What `predict -` does with its standard input."""
    model, params = trained()
    run = reviewer.Trained(Path("run"), RUN, list(WORDS), model, params)

    def read(folder: Path) -> None:
        with open(folder / "text", "rb") as file:
            check_answer(reviewer.probability(run, long_text.decoded(file)))

    return read


def text_seeds() -> list[Files]:
    return [{"text": (text * 3).encode()} for text in TEXTS]


def text_read(folder: Path) -> None:
    data = characters.load(folder / "text")
    for split in data.splits.values():
        ids = split["ids"]
        assert len(ids) > 0 and ids.min() >= 0 and ids.max() < len(data.vocabulary)
