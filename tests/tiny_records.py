"""Small runs and records, for the tests of records, of tables and of their commands."""

import dataclasses
import json

from lstmjax import results

SHA = "0123456789abcdef" * 4
DATASET = {"name": "sin", "source": "generated", "sha256": SHA}
SECONDS = {"compile": 1.5, "train": 2.25, "eval": 0.5}
ENVIRONMENT = {
    "git commit": "1234567890" * 4, "dirty": False, "python": "3.11.7", "jax": "0.10.2",
    **dict.fromkeys(("jaxlib", "flax", "optax", "numpy")), "device": "Processor X", "devices": 2,
    "platform": "cpu", "cores": 2, "XLA_FLAGS": "",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = "tf1"
    seed: int = 3
    sizes: tuple[int, ...] = (4, 5)
    learning_rate: float = 0.006
    out: str | None = None


def finish(run, **changes):
    values = {"dataset": DATASET, "metrics": {"mse": 0.25}, "seconds": SECONDS, "seed": 3}
    return run.finish(params_sha256=SHA, devices=2, **values | changes)


def write_record(folder, seed, accuracy, epochs, train, **changes):
    record = {
        "experiment": "imdb", "row": "imdb-tf2", "version": "0.1.0", "date": "2026-01-02",
        "command": f"python experiments/imdb.py --seed {seed} --out runs/{seed}",
        "config": {"preset": "tf2", "seed": seed, "out": f"runs/{seed}"},
        "dataset": {"name": "imdb_reviews", "source": "tfds", "sha256": SHA},
        "metrics": {"test_accuracy": accuracy, "test_accuracy_epochs": epochs},
        "seconds": {"compile": 2.0, "train": train, "eval": 1.0}, "params_sha256": SHA,
        "environment": ENVIRONMENT, "seed": seed,
    }  # fmt: skip
    record |= changes
    name = f"{record['experiment']}-{changes.get('file', '')}{seed}.json"
    record.pop("file", None)
    (folder / name).write_text(json.dumps(record))
    return record


def fill_benchmark_folder(root):
    """Three seeds of ours and one run of a peer, with a README to write into."""
    folder = root / "experiments" / "results"
    folder.mkdir(parents=True)
    write_record(folder, 0, 0.8312, [0.81, 0.8312], 10.0)
    write_record(folder, 1, 0.8391, [0.83, 0.8391], 14.0)
    write_record(folder, 2, 0.8355, [0.84, 0.8355], 11.0)
    peer = {"row": "imdb-tf2", "framework": "keras 3.15 / tensorflow 2.21"}
    metrics = {"test_accuracy": 0.82}
    write_record(folder, 7, 0, [], 80.0, experiment="peers", peer=peer, metrics=metrics)
    best, end_of_best = results.BEST
    blocks = f"{best}\nolder\n{end_of_best}\n{results.BEGIN}\nold\n{results.END}\n"
    (root / "README.md").write_text(f"# x\n\n{blocks}end\n")
    return root
