"""Tell handwritten digits apart pixel by pixel, in order or under a named permutation, or by rows.

    python experiments/smnist.py                              14 x 14 pixels, 196 steps
    python experiments/smnist.py --preset small-permuted      in the order numpy-92916, zoneout
    python experiments/smnist.py --preset pixels              all 784 pixels, row by row
    python experiments/smnist.py --preset torch-12008         784 pixels in another order
    python experiments/smnist.py --preset rows                28 rows of 28 pixels, a little moved
    python experiments/smnist.py --forget-bias chrono         another law of long memories
    python experiments/smnist.py --preset pixels-refine       512 units, refined gates: for a GPU
    python experiments/smnist.py --seeds 5 --sweep lr=5e-4,1e-3       ten runs in one program
    python experiments/smnist.py predict four.png five.png      which digits the newest run sees

"Permuted MNIST" is a different task in nearly every paper, for each draws an order of its own. The
orders here have names and hashes (lstmjax/data/permutations.py); a record holds both.

    none            row by row
    numpy-92916     of expRNN (Lezcano-Casado, 2019)
    torch-12008     of coRNN (Rusch & Mishra, 2021)
    numpy-0         of the LMU (Voelker et al., 2019)
    bit-reversal    of S4 (Gu et al., 2022)

With --order small a pixel is the mean of 2 x 2 pixels, and an order is one of 196 positions, drawn
in the same way: a task for CPUs, and not to be compared with published numbers. The 5,000 images
held out from train are scored after every epoch; the weights of the best epoch there are those that
are left, and that the test images are scored with, once, after the last epoch. mnist.py has the
weights of its last epoch, as its source has; here training is longer and accuracy falls now and
then for an epoch or two. Refined gates with uniform initialisation are those of Gu et al. (2020),
the chrono initialisation is that of Tallec & Ollivier (2018); log_uniform spreads the logarithms of
the lags where chrono spreads the lags.

Without prepared data and without a network the digits are rendered ones, and said to be so.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
from lstmjax.data import mnist
from lstmjax.data.dataset import Splits, content_sha256
from lstmjax.data.permutations import PERMUTATIONS, permutation, permutation_sha256
from lstmjax.initializers import GateBias
from lstmjax.keeper import save_every
from lstmjax.lane_classifiers import Problem, Split
from lstmjax.models import Cell, Init, Method, Precision, SequenceModel, gate_bias
from lstmjax.records import matching_row
from lstmjax.variants import VARIANTS

POSITIONS = {"pixels": 784, "small": 196, "rows": 28}
SIDE = {"pixels": 28, "small": 14, "rows": 28}
LARGEST = {"pixels": 255, "small": 4 * 255, "rows": 255}  # a small pixel is kept as the sum of four


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal[
        "small",
        "small-permuted",
        "pixels",
        "numpy-92916",
        "torch-12008",
        "numpy-0",
        "bit-reversal",
        "rows",
        "pixels-refine",
        "numpy-92916-refine",
    ] = "small"
    """Where the defaults come from."""
    data: Literal["auto", "tfds", "offline"] = "auto"
    """The real digits if they can be had, the real ones or an error, or rendered ones."""
    order: Literal["pixels", "small", "rows"] = "small"
    """All 784 pixels, 196 that are the means of 2 x 2 of them, or 28 rows of 28, as in mnist.py."""
    permutation: Literal["none", "numpy-92916", "torch-12008", "numpy-0", "bit-reversal"] = "none"
    """The order in which they are read."""
    permutation_sha256: str | None = None
    """What that order's sha256 has to be; filled in when not given, and so in every record."""
    cell: Cell = "lstm"
    """The recurrent cell: the LSTM, a variant of it, the GRU or a simple RNN."""
    hidden_size: int = 128
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
    shift: int = 0
    """Positions that training images move by at most, each way, every time; row by row only."""
    init: Init = "lstmjax"
    """Initial law of the recurrent layers (the GRU and the RNNs have keras and lstmjax alone)."""
    forget_bias: str | None = None
    """The forget gate's initial bias: a number, chrono:T, log_uniform:T (without :T, it is the
    sequence's own) or uniform_gate; that of init if None, as it has to be with the GRU and the
    RNNs."""
    learned_state: bool = False
    """Whether the state before the first step is learned, or zero."""
    learning_rate: float = 1e-3
    """Adam's step size, the first one under a schedule."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Whether the step size stays, or falls along a half cosine to 0 at the last update."""
    clip_norm: float | None = 1.0
    """Bound on the gradient's global norm."""
    batch_size: int = 100
    """Images in a batch, over all devices."""
    epochs: int = 20
    """Passes over the training images."""
    validation_size: int = 5_000
    """Images held out from train: its first ones. Of 0, the last epoch's weights are tested."""
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
    """Values to choose from by validation accuracy: lr=1e-3,3e-3 or clip_norm=1,5."""
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


def complete(config: Config) -> Config:
    """The configuration with its order's hash.

    Raises:
      ConfigError: it has another one.
    """
    order = permutation(config.permutation, POSITIONS[config.order])
    expected, given = permutation_sha256(order), config.permutation_sha256
    cli.check(config, "permutation_sha256", given in (None, expected), expected)
    return dataclasses.replace(config, permutation_sha256=expected)


def _refined(name: str) -> Config:
    """The gates and the size of Gu et al. (2020): hours on a GPU, days on a CPU."""
    return Config(
        preset=f"{name}-refine",
        order="pixels",
        permutation="none" if name == "pixels" else name,
        cell="refine",
        forget_bias="uniform_gate",
        hidden_size=512,
        epochs=100,
    )


# Step sizes and forget biases are those that were furthest on validation after two to four epochs.
# On small uniform_gate is as far as log_uniform, but leaves one seed in six at chance at first.
# Zoneout is for what 128 units otherwise learn by heart: 0.99 of train and 0.90 of validation.
PRESETS = {
    "small": Config(forget_bias="log_uniform", learning_rate=8e-3),
    "small-permuted": Config(
        preset="small-permuted",
        permutation="numpy-92916",
        forget_bias="uniform_gate",
        learning_rate=8e-3,
        zoneout=0.15,
    ),
    "pixels": Config(
        preset="pixels", order="pixels", forget_bias="log_uniform", learning_rate=8e-3
    ),
    **{
        name: Config(
            preset=name,
            order="pixels",
            permutation=name,
            forget_bias="log_uniform",
            learning_rate=8e-3,
            zoneout=0.15,
            epochs=15,
        )
        for name in PERMUTATIONS
        if name != "none"
    },
    "rows": Config(
        preset="rows", order="rows", epochs=40, learning_rate=3e-3, locked_dropout=0.2, shift=1
    ),
    **{f"{name}-refine": _refined(name) for name in ("pixels", "numpy-92916")},
}
ROWS = {f"smnist-{name}": complete(settings) for name, settings in PRESETS.items()}


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
    forget_bias(config)
    fits = config.order != "rows" or config.permutation == "none"
    cli.check(config, "permutation", fits, "none with --order rows")
    cli.check_counts(config, "shift", least=0)
    most = SIDE[config.order] - 1
    cli.check(config, "shift", config.shift <= most, f"at most {most} with --order {config.order}")
    fits = not config.shift or config.permutation == "none"
    cli.check(config, "shift", fits, f"0 with --permutation {config.permutation}")
    complete(config)
    lanes.check(config, validation=config.validation_size > 0)


# ---- data ---------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images as sequences: {"image" [N, T, D], "label" int32 [N]} by split, and what they are.

    An image is uint8, of numbers up to 255, or, where it is small, uint16 up to 1020.
    """

    title: str
    name: str
    source: str
    sha256: str
    splits: Splits


def load(config: Config) -> Digits:
    whole = mnist.load(config.data, validation_size=config.validation_size).first(config.limit)
    count = POSITIONS[config.order]
    order = permutation(config.permutation, count)
    splits = {
        split: {"image": lay_out(fields["image"], order), "label": fields["label"]}
        for split, fields in whole.splits.items()
    }
    read = f"in the order {config.permutation}" * (config.permutation != "none") or "row by row"
    title = f"{whole.title}, {count} {'rows' if config.order == 'rows' else 'pixels'} {read}"
    title = title.removesuffix(" row by row") if config.order == "rows" else title
    return Digits(title, whole.name, whole.source, content_sha256(splits), splits)


def lay_out(images: np.ndarray, order: np.ndarray) -> np.ndarray:
    """uint8 [N, 28, 28] to [N, T, D]: as many pixels, or rows, as the order has places, in it."""
    if len(order) == POSITIONS["rows"]:
        return images[:, order]
    if len(order) == POSITIONS["small"]:  # the sums of 2 x 2
        images = images.reshape(len(images), 14, 2, 14, 2).sum(axis=(2, 4), dtype=np.uint16)
    return images.reshape(len(images), len(order))[:, order, None]


def inputs(images: np.ndarray, config: Config) -> np.ndarray:
    """uint8 [N, 28, 28] to what the model reads: float32 [N, T, D] in [0, 1]."""
    order = permutation(config.permutation, POSITIONS[config.order])
    return lay_out(images, order).astype(np.float32) / LARGEST[config.order]


# ---- training -----------------------------------------------------------------------------------


def forget_bias(config: Config) -> float | GateBias | None:
    """What the text says; a law of lags without one is that of the sequence's length."""
    return gate_bias(config.forget_bias, config.cell, POSITIONS[config.order])


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
        forget_bias=forget_bias(config),
        learned_state=config.learned_state,
        method=config.method,
        unroll=config.unroll,
        precision=config.precision,
    )


def make_optimiser(config: Config, updates: int) -> optax.GradientTransformation:
    rate = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, updates)
    return optim.clipped_adam(rate, config.clip_norm)


def make_loss(model: SequenceModel, config: Config):
    """``loss_fn(params, batch, key)``; without a key nothing is dropped."""

    def loss_fn(params, batch, key=None):
        image = batch["image"].astype(jnp.float32) / LARGEST[config.order]  # in [0, 1]
        if config.shift and key is not None:
            square = image.reshape(-1, SIDE[config.order], SIDE[config.order])
            square = moved(jax.random.fold_in(key, 0), square, config.shift)
            image = square.reshape(image.shape)
            key = jax.random.fold_in(key, config.num_layers)  # layers fold in 0 and on
        _, logits = model.apply({"params": params}, image, key=key)
        loss = losses.total(losses.cross_entropy(logits, batch["label"]), batch["weight"])
        accuracy = losses.total(losses.correct(logits, batch["label"]), batch["weight"])
        return losses.mean(loss), {"loss": loss, "accuracy": accuracy}

    return loss_fn


def moved(key: jax.Array, images: jax.Array, most: int) -> jax.Array:
    """Images [B, R, C], each moved by -most to most pixels along both axes; what comes in is 0."""
    around = jnp.pad(images, ((0, 0), (most, most), (most, most)))
    start = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)
    return jax.vmap(lambda one, at: jax.lax.dynamic_slice(one, at, images.shape[1:]))(around, start)


def make_problem(config: Config, digits: Digits) -> Problem:
    model = make_model(config)

    def diagnosis(few):
        return diagnose.Diagnosis(
            config.diagnose,
            model,
            losses.cross_entropy,
            few["image"].astype("float32") / LARGEST[config.order],
            few["label"],
            clip_norm=config.clip_norm,
        )

    size = digits.splits["train"]["image"].shape[2]
    names = ["train", "test"] + ["validation"] * (config.validation_size > 0)
    return Problem(
        make_loss(model, config),
        lambda key: model.init(key, jnp.zeros((1, 1, size)))["params"],
        make_optimiser,
        {split: Split.whole(digits.splits[split]) for split in names},
        "images",
        diagnosis,
        select=True,
        at_once=100,  # of so many steps, more take more memory and no less time
    )


def run(config: Config) -> None:
    check(config)
    config = complete(config)
    reproducible.ask(config.deterministic)
    digits = load(config)
    row = matching_row(dataclasses.replace(config, seeds=1), ROWS)
    classifier.classify("smnist", config, make_problem(config, digits), digits, row=row)


def read(folder: Path, which: str | None = None) -> digits_reader.Trained:
    """The trained run in a folder."""
    return digits_reader.read(folder, Config, check, make_model, inputs, which)


def main() -> None:
    if sys.argv[1:2] == ["predict"]:
        about = {"argv": sys.argv[2:], "description": digits_reader.predict.__doc__}
        asked = cli.parse(digits_reader.PredictDigits, **about)
        digits_reader.predict(asked, "smnist", read)
    else:
        distributed.run(run, cli.parse(Config, presets=PRESETS, description=__doc__))


if __name__ == "__main__":
    cli.main(main)
