"""Tell handwritten digits apart, reading an image row by row (or pixel by pixel).

    python experiments/mnist.py                          about 1 minute on 2 CPU cores
    python experiments/mnist.py --preset tf1             the tutorial as it was published
    python experiments/mnist.py --layout permuted        784 pixels in a fixed random order
    python experiments/mnist.py --cell refine --forget-bias uniform_gate      a variant

The preset tf1 is a published TensorFlow 1 tutorial: 28 rows of 28 pixels, one LSTM of 100 units,
the final output read by a dense layer, batches of 50, Adam at 1e-4, 10 epochs, the whole test set
scored after each epoch. It applies softmax twice, so its loss cannot fall below 1.4612 and learning
is slow: public runs of it reach 0.92 after 6 epochs. The preset corrected has one softmax and is
otherwise the same: expect 0.96 after 10 epochs. It watches 5,000 validation images and scores the
test images once, at the end.

Without prepared data and without a network the digits are rendered ones, and said to be so.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from tqdm import tqdm

from lstmjax import cli, diagnose, losses, optim, parallel, train
from lstmjax.data import mnist
from lstmjax.models import Cell, Init, Method, Precision, SequenceModel, gate_bias
from lstmjax.records import Run, matching_row
from lstmjax.scores import Scores, finish
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
    """The forget gate's initial bias: a number, chrono:T or uniform_gate; that of init if none."""
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
    """Devices to split a batch over; all accelerators, or all CPU cores, when not given."""
    seed: int = 0
    """Of initial weights, dropout and batch order."""
    diagnose: bool = False
    """Whether to look at gradients through time, at gates and at clipping as well."""
    out: str | None = None
    """Folder for the run's files, new or empty; a fresh one under runs/ when not given."""


PRESETS = {
    "corrected": Config(),
    "tf1": Config(preset="tf1", loss="double_softmax", test_every_epoch=True),
}
ROWS = {"mnist-corrected": PRESETS["corrected"], "mnist-tf1": PRESETS["tf1"]}
LOSSES = {
    "softmax": losses.cross_entropy,
    "double_softmax": losses.double_softmax_cross_entropy,
}


def check(config: Config) -> None:
    cli.check_counts(config, "hidden_size", "num_layers", "batch_size", "epochs", "limit")
    cli.check_counts(config, "unroll", "devices")
    cli.check_counts(config, "validation_size", "seed", least=0)
    cli.check_rates(config, "dropout", "recurrent_dropout", "weight_drop", "zoneout")
    cli.check_rates(config, "locked_dropout")
    cli.check_positive(config, "learning_rate", "clip_norm")
    cli.check(config, "zoneout", not (config.diagnose and config.zoneout), "0 with --diagnose")
    fits = config.init in ("keras", "lstmjax") or config.cell in VARIANTS
    cli.check(config, "init", fits, f"keras or lstmjax with --cell {config.cell}")
    gate_bias(config.forget_bias, config.cell)
    orders = tuple(mnist.PERMUTATIONS)
    cli.check(config, "permutation", config.permutation in orders, f"one of {', '.join(orders)}")
    default = config.permutation == Config.permutation
    fits = default or config.layout == "permuted"
    cli.check(config, "permutation", fits, "no other order without --layout permuted")


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


def make_loss(model: SequenceModel, config: Config):
    """``loss_fn(params, batch, key)``; without a key nothing is dropped."""

    def loss_fn(params, batch, key=None):
        image = batch["image"].astype(jnp.float32) / 255.0  # [B, T, D] in [0, 1]
        _, logits = model.apply({"params": params}, image, key=key)
        loss = losses.total(LOSSES[config.loss](logits, batch["label"]), batch["weight"])
        accuracy = losses.total(losses.correct(logits, batch["label"]), batch["weight"])
        return losses.mean(loss), {"loss": loss, "accuracy": accuracy}

    return loss_fn


def run(config: Config) -> None:
    check(config)
    dataset = mnist.load(
        config.data,
        layout=config.layout,
        permutation=config.permutation if config.layout == "permuted" else None,
        validation_size=config.validation_size,
    ).first(config.limit)
    print(f"training on {dataset.title}, sha256 {dataset.sha256[:12]}")
    devices = parallel.use_devices(config.devices)
    clock = train.Clock()

    model = make_model(config)
    loss_fn = make_loss(model, config)
    adam = optim.tf_adam(config.learning_rate, eps=1e-8)  # TensorFlow 1's Adam
    tx = optim.clipped(adam, config.clip_norm)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    one_image = jnp.zeros((1, *dataset.splits["train"]["image"].shape[1:]))
    params = model.init(init_key, one_image)["params"]
    state = parallel.place(train.init_state(params, tx, step_key), devices)
    few = {name: a[: diagnose.ROWS] for name, a in dataset.splits["train"].items()}
    diagnosis = diagnose.Diagnosis(
        config.diagnose,
        model,
        LOSSES[config.loss],
        few["image"].astype("float32") / 255,
        few["label"],
        clip_norm=config.clip_norm,
    )
    diagnosis.look("initialisation", params)

    # One step for any number of devices; many steps in one compiled call, on data that stays put.
    of_gradient = diagnosis.of_gradient
    step = train.make_train_step(loss_fn, tx, axis_name=parallel.AXIS, of_gradient=of_gradient)
    advance = parallel.runner(step, devices, clock)
    evaluate = parallel.evaluator(lambda p, batch: loss_fn(p, batch)[1], devices, clock)
    data = {name: dataset.splits["train"][name] for name in ("image", "label")}
    size, data = len(data["label"]), parallel.place(data, devices)

    with Run.create("mnist", config, out=config.out) as folder:
        scores = Scores(folder)
        bar = tqdm(total=config.epochs * size, unit=" images", disable=None)
        for epoch in range(1, config.epochs + 1):
            pieces = train.plan_epoch(
                size,
                config.batch_size,
                seed=config.seed,
                epoch=epoch,
                multiple=len(devices),
                at_most=100,
            )
            seen = []
            for piece in parallel.ahead(pieces, devices):
                state, metrics = advance(state, data, piece)
                now = losses.means(metrics)
                folder.log(int(state.step), epoch=epoch, **now)
                diagnosis.log(int(state.step), metrics)
                bar.update(int(metrics["loss"][1].sum()))
                bar.set_postfix(epoch=epoch, loss=f"{now['loss']:.4f}")
                seen.append(metrics)
            scores.add("train", int(state.step), epoch, losses.means(train.added(seen)))
            splits = ["validation"] if config.validation_size else []
            # The test split is scored once, after the last epoch, unless asked for.
            splits += ["test"] if config.test_every_epoch or epoch == config.epochs else []
            for split in splits:
                means = evaluate(state.params, dataset.splits[split])
                scores.add(split, int(state.step), epoch, means)
        bar.close()

        title = f"{config.cell} on {dataset.title}"
        diagnosis.look("trained", state.params)
        finish(
            folder,
            scores,
            state.params,
            title=title,
            dataset=dataset,
            seconds=clock.seconds,
            seed=config.seed,
            devices=devices,
            row=matching_row(config, ROWS),
            more=diagnosis.finish(folder, title),
        )


if __name__ == "__main__":
    cli.main(lambda: run(cli.parse(Config, presets=PRESETS, description=__doc__)))
