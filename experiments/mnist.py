"""Tell handwritten digits apart, reading an image row by row (or pixel by pixel).

    python experiments/mnist.py                          about 1 minute on 2 CPU cores
    python experiments/mnist.py --preset tf1             the tutorial as it was published
    python experiments/mnist.py --layout permuted        784 pixels in a fixed random order
    python experiments/mnist.py --cell refine --forget-bias uniform_gate      a variant
    python experiments/mnist.py --seeds 3 --sweep lr=1e-3,3e-3            six runs in one program
    python experiments/mnist.py predict four.png five.png      which digits the newest run sees

The preset tf1 is a published TensorFlow 1 tutorial: 28 rows of 28 pixels, one LSTM of 100 units,
the final output read by a dense layer, batches of 50, Adam at 1e-4, 10 epochs, the whole test set
scored after each epoch. It applies softmax twice, so its loss cannot fall below 1.4612 and learning
is slow: public runs of it reach 0.92 after 6 epochs. The preset corrected has one softmax and is
otherwise the same: expect 0.96 after 10 epochs. It watches 5,000 validation images and scores the
test images once, at the end.

Without prepared data and without a network the digits are rendered ones, and said to be so.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lstmjax import (
    classifier,
    cli,
    diagnose,
    digits_reader,
    distributed,
    lanes,
    losses,
    optim,
    reproducible,
)
from lstmjax.data import Dataset, mnist
from lstmjax.keeper import save_every
from lstmjax.lane_classifiers import Problem, Split
from lstmjax.models import Cell, Init, Method, Precision, SequenceModel, gate_bias
from lstmjax.records import matching_row
from lstmjax.variants import VARIANTS


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["corrected", "tf1"] = "corrected"
    """Where the defaults come from."""
    data: Literal["auto", "tfds", "offline"] = "auto"
    """The real digits if they can be had, the real ones or an error, or rendered ones."""
    layout: Literal["rows", "pixels", "permuted"] = "rows"
    """28 rows of 28 pixels, 784 pixels, or 784 pixels in another order."""
    permutation: str = "RandomState(92916)"
    """Which order, for the permuted layout: a name that lstmjax.data.mnist.permutation knows."""
    loss: Literal["softmax", "double_softmax"] = "softmax"
    """Cross-entropy of the logits, or (tf1's mistake) of their softmax taken as logits."""
    cell: Cell = "lstm"
    """The recurrent cell: the LSTM, a variant of it, the GRU or a simple RNN."""
    hidden_size: int = 100
    """Units of each layer."""
    num_layers: int = 1
    """Recurrent layers."""
    dropout: float = 0.0
    """Rate of dropout on each layer's inputs, one mask per image."""
    recurrent_dropout: float = 0.0
    """Rate of dropout on h inside the recurrence, one mask for each gate and image."""
    weight_drop: float = 0.0
    """Rate of dropping weights of the recurrent kernels, at all steps alike."""
    zoneout: float = 0.0
    """Probability of keeping an element of the old state, drawn anew at every step."""
    locked_dropout: float = 0.0
    """Rate of dropout on each layer's outputs, one mask per image."""
    init: Init = "tf1"
    """Initial law of the recurrent layers (the GRU and the RNNs have keras and lstmjax alone)."""
    forget_bias: str | None = None
    """The forget gate's initial bias: a number, chrono:T, log_uniform:T or uniform_gate; that of
    init if None, as it has to be with the GRU and the RNNs."""
    learned_state: bool = False
    """Whether the state before the first step is learned, or zero."""
    learning_rate: float = 1e-4
    """Adam's step size."""
    clip_norm: float | None = None
    """Bound on the gradient's global norm."""
    batch_size: int = 50
    """Images in a batch, over all devices."""
    epochs: int = 10
    """Passes over the training images."""
    validation_size: int = 5_000
    """Images held out from train: its first ones."""
    test_every_epoch: bool = False
    """Whether to score the test images after every epoch, as the tutorial does."""
    limit: int | None = None
    """Use only the first so many images of every split: a look, not a result."""
    method: Method = "fused"
    """How the recurrence runs; onednn and cudnn know the plain LSTM alone, where installed."""
    unroll: int = 1
    """Steps written out in one iteration of the scan."""
    precision: Precision = "float32"
    """Of the factors of products, h included; sums, parameters and c are float32 in any case."""
    devices: int | None = None
    """Devices to split a batch over, in all processes; all there are when not given."""
    distributed: bool = False
    """Whether this is one process of several; SLURM and Kubernetes tell by themselves which one."""
    coordinator: str | None = None
    """By hand: HOST:PORT where all processes find process 0."""
    num_processes: int | None = None
    """By hand: how many processes there are."""
    process_id: int | None = None
    """By hand: which of them this one is, from 0 on."""
    seed: int = 0
    """Of initial weights, dropout and batch order."""
    seeds: int = 1
    """How many seeds, from --seed on, all in one program, each as if run alone on one device."""
    sweep: str | None = None
    """Values to choose from by validation accuracy at the end: lr=1e-3,3e-3 or clip_norm=1,5."""
    diagnose: bool = False
    """Whether to look at gradients through time, at gates and at clipping as well."""
    save_every: str = "60s"
    """When to save a checkpoint: after so many steps, as 500, or seconds, as 60s."""
    keep: int = 3
    """Checkpoints that stay: the last ones, beside the best on validation."""
    resume: str | None = None
    """Folder of a run to go on with, to the same bits; its settings are taken from there."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is not finite: end the run, or leave the step out, unless
    25 in a row are such."""
    deterministic: bool = False
    """Whether to ask XLA for the same bits on every run, on a GPU too, and to check it."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


PRESETS = {
    "corrected": Config(),
    "tf1": Config(preset="tf1", loss="double_softmax", test_every_epoch=True),
}
ROWS = {
    "mnist-corrected": PRESETS["corrected"],
    "mnist-tf1": PRESETS["tf1"],
    "mnist-tf1-bfloat16": dataclasses.replace(
        PRESETS["tf1"], method="onednn", precision="bfloat16"
    ),
}
LOSSES = {
    "softmax": losses.cross_entropy,
    "double_softmax": losses.double_softmax_cross_entropy,
}


def check(config: Config) -> None:
    cli.check_counts(config, "hidden_size", "num_layers", "batch_size", "epochs", "limit")
    cli.check_counts(config, "unroll", "devices", "keep")
    save_every(config.save_every)
    cli.check_counts(config, "validation_size", "seed", least=0)
    cli.check_rates(config, "dropout", "recurrent_dropout", "weight_drop", "zoneout")
    cli.check_rates(config, "locked_dropout")
    cli.check_positive(config, "learning_rate", "clip_norm")
    cli.check_method(config)
    cli.check(config, "zoneout", not (config.diagnose and config.zoneout), "0 with --diagnose")
    fits = config.init in ("keras", "lstmjax") or config.cell in VARIANTS
    cli.check(config, "init", fits, f"keras or lstmjax with --cell {config.cell}")
    gate_bias(config.forget_bias, config.cell)
    orders = tuple(mnist.PERMUTATIONS)
    cli.check(config, "permutation", config.permutation in orders, f"one of {', '.join(orders)}")
    default = config.permutation == Config.permutation
    fits = default or config.layout == "permuted"
    cli.check(config, "permutation", fits, "no other order without --layout permuted")
    lanes.check(config, validation=config.validation_size > 0)


def load(config: Config) -> Dataset:
    return mnist.load(
        config.data,
        layout=config.layout,
        permutation=config.permutation if config.layout == "permuted" else None,
        validation_size=config.validation_size,
    ).first(config.limit)


def inputs(images: np.ndarray, config: Config) -> np.ndarray:
    """uint8 [N, 28, 28] to what the model reads: float32 [N, T, D] in [0, 1]."""
    if config.layout != "rows":
        images = images.reshape(len(images), -1, 1)
    if config.layout == "permuted":
        images = images[:, mnist.permutation(config.permutation)]
    return images.astype(np.float32) / 255


def make_model(config: Config) -> SequenceModel:
    return SequenceModel(
        cell=config.cell,
        hidden_size=config.hidden_size,
        output_size=10,
        num_layers=config.num_layers,
        dropout=config.dropout,
        recurrent_dropout=config.recurrent_dropout,
        weight_drop=config.weight_drop,
        zoneout=config.zoneout,
        locked_dropout=config.locked_dropout,
        cell_init=config.init,
        forget_bias=gate_bias(config.forget_bias, config.cell),
        learned_state=config.learned_state,
        head_init=jax.nn.initializers.truncated_normal(0.1),
        head_bias=jax.nn.initializers.constant(0.1),
        method=config.method,
        unroll=config.unroll,
        precision=config.precision,
    )


def make_optimiser(config: Config, updates: int):
    adam = optim.tf_adam(config.learning_rate, eps=1e-8)  # TensorFlow 1's Adam
    return optim.clipped(adam, config.clip_norm)


def make_loss(model: SequenceModel, config: Config):
    """``loss_fn(params, batch, key)``; without a key nothing is dropped."""

    def loss_fn(params, batch, key=None):
        image = batch["image"].astype(jnp.float32) / 255.0  # [B, T, D] in [0, 1]
        _, logits = model.apply({"params": params}, image, key=key)
        loss = losses.total(LOSSES[config.loss](logits, batch["label"]), batch["weight"])
        accuracy = losses.total(losses.correct(logits, batch["label"]), batch["weight"])
        return losses.mean(loss), {"loss": loss, "accuracy": accuracy}

    return loss_fn


def make_problem(config: Config, dataset: Dataset) -> Problem:
    model = make_model(config)
    one_image = np.zeros((1, *dataset.splits["train"]["image"].shape[1:]), np.float32)

    def diagnosis(few):
        return diagnose.Diagnosis(
            config.diagnose,
            model,
            LOSSES[config.loss],
            few["image"].astype("float32") / 255,
            few["label"],
            clip_norm=config.clip_norm,
        )

    names = ["train", "test"] + ["validation"] * (config.validation_size > 0)
    return Problem(
        make_loss(model, config),
        lambda key: model.init(key, one_image)["params"],
        make_optimiser,
        {split: Split.whole(dataset.splits[split]) for split in names},
        "images",
        diagnosis,
        test_every_epoch=config.test_every_epoch,
        at_most=100,
    )


def run(config: Config) -> None:
    check(config)
    reproducible.ask(config.deterministic)
    dataset = load(config)
    row = matching_row(dataclasses.replace(config, seeds=1), ROWS)
    classifier.classify("mnist", config, make_problem(config, dataset), dataset, row=row)


def read(folder: Path, which: str | None = None) -> digits_reader.Trained:
    """The trained run in a folder."""
    return digits_reader.read(folder, Config, check, make_model, inputs, which)


def main() -> None:
    if sys.argv[1:2] == ["predict"]:
        about = {"argv": sys.argv[2:], "description": digits_reader.predict.__doc__}
        asked = cli.parse(digits_reader.PredictDigits, **about)
        digits_reader.predict(asked, "mnist", read)
    else:
        distributed.run(run, cli.parse(Config, presets=PRESETS, description=__doc__))


if __name__ == "__main__":
    cli.main(main)
