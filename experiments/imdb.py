"""Tell positive film reviews from negative ones with two recurrent layers.

    python experiments/imdb.py                        about 1 minute on 2 CPU cores
    python experiments/imdb.py --cell rnn             the simple RNN in place of the LSTM
    python experiments/imdb.py --cell cifg --recurrent-dropout 0.2      a variant, dropped inside
    python experiments/imdb.py --epochs 1 --limit 2000      a look
    python experiments/imdb.py --seeds 3 --sweep lr=5e-4,1e-3       six runs in one program
    python experiments/imdb.py predict "not bad at all, I loved it"
    python experiments/imdb.py predict - < review.txt

The preset tf2 is a published TensorFlow 2 tutorial: the 10,000 most frequent words, the last 80
tokens of each review (padded in front, not masked), embedding of 100, two layers of 64 with
variational input dropout of 0.2, batches of 128, Adam at 1e-3, 4 epochs. Expect 0.817 to 0.827 on
the 25,000 test reviews; a model this small overfits from the second epoch on. Validation reviews
are held out from train, and the test reviews are scored once, at the end. The tutorial itself
trains on all 25,000 and scores the test reviews after every epoch (its batches leave out what is
over, 40 of them, and it shuffles 1,000 at a time; here all count, in an order drawn of all):

    python experiments/imdb.py --validation-size 0 --test-every-epoch

Without prepared data and without a network the reviews are generated ones, and said to be so.
"""

import contextlib
import dataclasses
import sys
from typing import Literal, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from lstmjax import (
    cli,
    diagnose,
    distributed,
    lanes,
    losses,
    optim,
    parallel,
    reproducible,
    train,
)
from lstmjax.data import Dataset, imdb, text
from lstmjax.data.dataset import make_dataset
from lstmjax.initializers import uniform
from lstmjax.keeper import Keeper, save_every
from lstmjax.lane_classifiers import Problem, Split, classify
from lstmjax.models import Cell, Init, Method, Precision, SequenceModel, gate_bias
from lstmjax.records import Run, matching_row, params_sha256, write_file
from lstmjax.reviewer import Predict, predict
from lstmjax.scores import Scores, finish, means
from lstmjax.variants import VARIANTS


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["tf2"] = "tf2"
    """Where the defaults come from."""
    data: Literal["auto", "tfds", "offline"] = "auto"
    """The real reviews if they can be had, the real ones or an error, or generated ones."""
    cell: Cell = "lstm"
    """The recurrent cell: the LSTM, a variant of it, the GRU or a simple RNN."""
    vocabulary_size: int = 10_000
    """Ids in use: 4 special ones and the most frequent words."""
    max_length: int = 80
    """Tokens of each review."""
    padding: Literal["pre", "post"] = "pre"
    """Where short reviews are filled up."""
    truncating: Literal["pre", "post"] = "pre"
    """Which end of a long review is cut off."""
    mask: bool = False
    """Whether the recurrence skips the padding."""
    embedding_size: int = 100
    """Size of a word's vector."""
    hidden_size: int = 64
    """Units of each layer."""
    num_layers: int = 2
    """Recurrent layers."""
    dropout: float = 0.2
    """Rate of dropout on each layer's inputs, one mask per review."""
    recurrent_dropout: float = 0.0
    """Rate of dropout on h inside the recurrence, one mask for each gate and review."""
    weight_drop: float = 0.0
    """Rate of dropping weights of the recurrent kernels, at all steps alike."""
    zoneout: float = 0.0
    """Probability of keeping an element of the old state, drawn anew at every step."""
    locked_dropout: float = 0.0
    """Rate of dropout on each layer's outputs, one mask per review."""
    embedding_dropout: float = 0.0
    """Rate of dropping a word's vector, wherever the word occurs in the batch."""
    word_dropout: float = 0.0
    """Rate of replacing a word by the unknown one."""
    init: Init = "keras"
    """Initial law of the recurrent layers (the GRU and the RNNs have keras and lstmjax alone)."""
    forget_bias: str | None = None
    """The forget gate's initial bias: a number, chrono:T, log_uniform:T or uniform_gate; that of
    init if None, as it has to be with the GRU and the RNNs."""
    learned_state: bool = False
    """Whether the state before the first word is learned, or zero."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    clip_norm: float | None = None
    """Bound on the gradient's global norm."""
    batch_size: int = 128
    """Reviews in a batch, over all devices."""
    drop_remainder: bool = True
    """Whether the reviews that do not fill a last training batch sit out the epoch."""
    epochs: int = 4
    """Passes over the training reviews."""
    validation_size: int = 2_500
    """Reviews held out from train."""
    test_every_epoch: bool = False
    """Whether to score the test reviews after every epoch, as the tutorial does."""
    limit: int | None = None
    """Use only the first so many reviews of every split: a look, not a result."""
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
    """Of initial weights, dropout, batch order and hold-out."""
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


PRESETS = {"tf2": Config()}
ROWS = {
    "imdb-tf2": Config(),
    "imdb-tf2-gru": Config(cell="gru"),
    "imdb-tf2-rnn": Config(cell="rnn"),
    "imdb-tf2-source": Config(validation_size=0, test_every_epoch=True),
    "imdb-tf2-bfloat16": Config(method="onednn", precision="bfloat16"),
}


def check(config: Config) -> None:
    sizes = ["max_length", "embedding_size", "hidden_size", "num_layers", "unroll", "devices"]
    cli.check_counts(config, *sizes, "batch_size", "epochs", "limit", "keep")
    save_every(config.save_every)
    cli.check_counts(config, "vocabulary_size", least=5)
    cli.check_counts(config, "validation_size", "seed", least=0)
    cli.check_rates(config, "dropout", "recurrent_dropout", "weight_drop", "zoneout")
    cli.check_rates(config, "locked_dropout", "embedding_dropout", "word_dropout")
    cli.check_positive(config, "learning_rate", "clip_norm")
    cli.check_method(config)
    cli.check(config, "zoneout", not (config.diagnose and config.zoneout), "0 with --diagnose")
    fits = config.init in ("keras", "lstmjax") or config.cell in VARIANTS
    cli.check(config, "init", fits, f"keras or lstmjax with --cell {config.cell}")
    gate_bias(config.forget_bias, config.cell)
    lanes.check(config, validation=config.validation_size > 0)


def check_batch(config: Config, size: int) -> None:
    fits = config.batch_size <= size or not config.drop_remainder
    cli.check(config, "batch_size", fits, f"at most {size}, the training reviews")


def make_model(config: Config) -> SequenceModel:
    return SequenceModel(
        cell=config.cell,
        hidden_size=config.hidden_size,
        output_size=1,
        num_layers=config.num_layers,
        vocabulary_size=config.vocabulary_size,
        input_size=config.embedding_size,
        input_init=uniform(0.05),  # Keras's law for embeddings
        dropout=config.dropout,
        recurrent_dropout=config.recurrent_dropout,
        weight_drop=config.weight_drop,
        zoneout=config.zoneout,
        locked_dropout=config.locked_dropout,
        embedding_dropout=config.embedding_dropout,
        word_dropout=config.word_dropout,
        unknown_id=text.UNKNOWN,
        padding_id=text.PADDING,
        cell_init=config.init,
        forget_bias=gate_bias(config.forget_bias, config.cell),
        learned_state=config.learned_state,
        method=config.method,
        unroll=config.unroll,
        precision=config.precision,
    )


def make_optimiser(config: Config, updates: int | None = None):
    adam = optim.tf_adam(config.learning_rate)  # Keras's Adam
    return optim.clipped(adam, config.clip_norm)


def make_loss(model: SequenceModel, config: Config):
    """``loss_fn(params, batch, key)``; without a key nothing is dropped."""

    def loss_fn(params, batch, key=None):
        mask = batch["ids"] != 0 if config.mask else None
        _, outputs = model.apply({"params": params}, batch["ids"], mask=mask, key=key)
        logits, label, weight = outputs[:, 0], batch["label"], batch["weight"]
        loss = losses.total(losses.binary_cross_entropy(logits, label), weight)
        accuracy = losses.total(losses.binary_correct(logits, label), weight)
        return losses.mean(loss), {"loss": loss, "accuracy": accuracy}

    return loss_fn


def load(config: Config) -> Dataset:
    return imdb.load(
        config.data,
        num_words=config.vocabulary_size,
        max_length=config.max_length,
        padding=config.padding,
        truncating=config.truncating,
        validation_size=config.validation_size,
        seed=config.seed,
    ).first(config.limit)


def make_diagnosis(config: Config, model: SequenceModel, dataset: Dataset) -> diagnose.Diagnosis:
    few = {name: a[: diagnose.ROWS] for name, a in dataset.splits["train"].items()}
    return diagnose.Diagnosis(
        config.diagnose,
        model,
        lambda outputs, label: losses.binary_cross_entropy(outputs[:, 0], label),
        few["ids"],
        few["label"],
        mask=few["ids"] != 0 if config.mask else None,
        clip_norm=config.clip_norm,
    )


class Work(NamedTuple):
    """What a run writes and counts beside its weights."""

    folder: Run
    scores: Scores
    seen: train.Tally
    clock: train.Clock
    diagnosis: diagnose.Diagnosis

    def parts(self) -> dict:
        """What is saved with the weights, so that a run can go on."""
        return {
            "scores": self.scores.epochs,
            "epoch": self.seen,
            "seconds": self.clock.seconds,
            "diagnosis": self.diagnosis,
        }


def learn(
    config: Config,
    model: SequenceModel,
    dataset: Dataset,
    devices: list,
    state: train.TrainState,
    keeper: Keeper,
    work: Work,
) -> train.TrainState:
    """Train to the last epoch from where the keeper stands, and score."""
    loss_fn, (folder, scores, seen, clock, diagnosis) = make_loss(model, config), work
    # One step for any number of devices; many steps in one compiled call, on data that stays put.
    step = train.make_train_step(
        loss_fn,
        make_optimiser(config),
        axis_name=parallel.AXIS,
        of_gradient=diagnosis.of_gradient,
        on_nan=config.on_nan,
    )
    advance = parallel.runner(step, devices, clock)
    advance = reproducible.checked(advance, config.deterministic)
    evaluate = parallel.evaluator(lambda p, batch: loss_fn(p, batch)[1], devices, clock)
    data = {name: dataset.splits["train"][name] for name in ("ids", "label")}
    data, size = parallel.place(data, devices), len(data["label"])

    done, hidden = (keeper.epoch - 1) * size, distributed.quiet()
    bar = tqdm(total=config.epochs * size, initial=done, unit=" reviews", disable=hidden)
    for epoch in keeper.epochs(config.epochs):
        pieces = train.plan_epoch(
            size,
            config.batch_size,
            seed=config.seed,
            epoch=epoch,
            multiple=len(devices),
            drop_remainder=config.drop_remainder,
        )
        for piece in parallel.ahead(keeper.left(pieces), devices):
            state, metrics = advance(state, data, piece)
            metrics = keeper.checked(state, metrics)
            now = means(metrics)
            folder.log(int(state.step), epoch=epoch, **now)
            diagnosis.log(int(state.step), metrics)
            bar.update(int(metrics["loss"][1].sum()))
            bar.set_postfix(epoch=epoch, loss=f"{now['loss']:.4f}")
            seen.add(metrics)
            keeper.after_piece(state)
        clock.end_epoch()
        scores.add("train", int(state.step), epoch, means(seen.take()))
        splits = ["validation"] if config.validation_size else []
        # The test split is scored once, after the last epoch, unless asked for.
        splits += ["test"] if config.test_every_epoch or epoch == config.epochs else []
        for split in splits:
            scores.add(split, int(state.step), epoch, evaluate(state.params, dataset.splits[split]))
        keeper.after_epoch(state, scores.last("validation"), last=epoch == config.epochs)
    bar.close()
    return state


def run(config: Config) -> None:
    check(config)
    reproducible.ask(config.deterministic)
    if lanes.asked_for(config):
        return run_lanes(config)
    dataset = load(config)
    check_batch(config, len(dataset.splits["train"]["label"]))
    print(f"training on {dataset.title}, sha256 {dataset.sha256[:12]}")
    devices = parallel.use_devices(config.devices)
    clock = train.Clock()

    model = make_model(config)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(model.init)(init_key, dataset.splits["train"]["ids"][:1])["params"]
    distributed.check_same(data=dataset.sha256, weights=params_sha256(params))
    state = train.init_state(params, make_optimiser(config), step_key)
    diagnosis = make_diagnosis(config, model, dataset)
    diagnosis.look("initialisation", params)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(distributed.open_run("imdb", config))
        work = Work(folder, Scores(folder), train.Tally(), clock, diagnosis)
        keeper = stack.enter_context(Keeper(folder, config, work.parts(), dataset=dataset))
        state = parallel.place(keeper.restored(state), devices)
        state = learn(config, model, dataset, devices, state, keeper, work)
        if not distributed.is_main():
            return
        write_file(folder.path / "vocabulary.txt", "\n".join(dataset.vocabulary).encode())
        title = f"{config.cell} on {dataset.title}"
        params = parallel.fetch(state.params)
        diagnosis.look("trained", params)
        finish(
            folder,
            work.scores,
            params,
            title=title,
            dataset=dataset,
            seconds=clock.seconds,
            seed=config.seed,
            devices=devices,
            row=matching_row(config, ROWS),
            more=diagnosis.finish(folder, title) | keeper.numbers(),
            updates=int(state.step),
        )


def load_lanes(config: Config) -> tuple[dict[str, Split], Dataset]:
    """The splits of many seeds, each with its rows of all reviews, and what the record says."""
    whole = load(dataclasses.replace(config, validation_size=0, limit=None))
    parts = (whole.splits["train"], whole.first(config.limit).splits["test"])
    data, test = ({name: part[name] for name in ("ids", "label")} for part in parts)
    numbers = {"label": np.arange(len(data["label"]))}

    def rows(seed):
        parts = imdb.hold_out(numbers, config.validation_size, seed)
        kept, held = (part["label"][: config.limit] for part in parts)
        return {"train": kept, "validation": held}

    check_batch(config, len(rows(config.seed)["train"]))  # before the work of every seed
    splits = {"train": Split(data, lambda seed: rows(seed)["train"]), "test": Split.whole(test)}
    if config.validation_size:
        splits["validation"] = Split(data, lambda seed: rows(seed)["validation"])
    own = range(config.seed, config.seed + config.seeds)
    described = {"train": data, "test": test, **{f"rows of seed {s}": rows(s) for s in own}}
    return splits, make_dataset(whole.name, whole.source, described, whole.vocabulary)


def run_lanes(config: Config) -> None:
    """``run`` for many seeds, or values to choose from."""
    splits, dataset = load_lanes(config)
    ids = splits["train"].arrays["ids"][:1]
    model = make_model(config)
    classify(
        "imdb",
        config,
        Problem(
            make_loss(model, config),
            lambda key: model.init(key, ids)["params"],
            make_optimiser,
            splits,
            "reviews",
            test_every_epoch=config.test_every_epoch,
            drop_remainder=config.drop_remainder,
        ),
        dataset,
        row=matching_row(dataclasses.replace(config, seeds=1), ROWS),
        files={"vocabulary.txt": "\n".join(dataset.vocabulary).encode()},
    )


def main() -> None:
    if sys.argv[1:2] == ["predict"]:
        asked = cli.parse(Predict, argv=sys.argv[2:], description=predict.__doc__)
        predict(asked, Config, check, make_model)
    else:
        distributed.run(run, cli.parse(Config, presets=PRESETS, description=__doc__))


if __name__ == "__main__":
    cli.main(main)
