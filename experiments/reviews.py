"""Tell positive film reviews from negative ones, whole, by one bidirectional LSTM over chops.

    python experiments/reviews.py                               chops of 50 tokens
    python experiments/reviews.py --embedding gates --cell cifg --pooling max --loss squared
    python experiments/reviews.py --adversarial 1 --normalise-embeddings
    python experiments/reviews.py --ratio-inputs --place-inputs --path-order 3
    python experiments/reviews.py --pairs path --path-order 3   a wide path beside the LSTM
    python experiments/reviews.py --epochs 1 --limit 5000       a look
    python experiments/reviews.py --validation-size 0 --select last
    python experiments/reviews.py --task language --unlabelled --out words
    python experiments/reviews.py --pretrained words            goes on from there
    python experiments/reviews.py --virtual 5 --normalise-embeddings --unlabelled
    python experiments/reviews.py --unlabelled --teacher DIR    an earlier run answers for them
    python experiments/reviews.py predict "not bad at all, I loved it"
    python experiments/reviews.py predict - < review.txt

Nothing but the 25,000 labelled training reviews is learned from, unless asked for. A review is read
in chops of 50 tokens, all at the same time, and the outputs of all steps are pooled (Johnson &
Zhang, 2016). Every step towards accuracy is an option of its own: dropout of words, of their
vectors and of the pooled vector, averaged weights, an adversary (Miyato et al., 2017), known pairs
of words as inputs, the log-count ratios of words, pairs and triples (Wang & Manning, 2012) as
inputs, or as a wide path, which is nearly a second model.

The 50,000 unlabelled reviews help in three ways. `--task language` learns each word from those
before it and, backwards, after it; its vectors and recurrent layer are something to begin with (Dai
& Le, 2015). `--virtual` asks that an answer, whatever it is, stays when the inputs change a little
(Miyato et al., 2017). Both learn from the labelled reviews as well, and without `--unlabelled` from
no others. `--teacher` takes the answers of an earlier run for labels where they are sure enough
(Yarowsky, 1995), and learns and counts n-grams in these reviews as in the labelled ones.

Reviews held out of train are scored after every epoch, and the weights of the best epoch there, or
of the last one, are scored on the test reviews once, at the end. The test reviews are of other
films than the training ones, so that a random hold-out can flatter; `--hold-out alike` holds out
reviews together with those of the same film, as far as words tell.

Without prepared data and without a network the reviews are generated ones, and said to be so.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from lstmjax import (
    cli,
    language,
    parallel,
    pretrained,
    reproducible,
    review_model,
    train,
    whole_reviewer,
)  # fmt: skip
from lstmjax.data import Dataset, chops, reviews
from lstmjax.keeper import Keeper
from lstmjax.lane_classifiers import Kept
from lstmjax.models import Init, Precision, gate_bias
from lstmjax.records import Run, matching_row
from lstmjax.review_checks import check
from lstmjax.review_training import best, chosen, make_optimiser, score_of, scored
from lstmjax.rows import AFTER
from lstmjax.scores import Scores, finish, means

PIECE = 10  # batches in one call of the compiled program
SCORED = 500  # reviews whose words a language model is scored on


@dataclasses.dataclass(frozen=True)
class Config:
    task: Literal["sentiment", "language"] = "sentiment"
    """What is learned: the reviews' labels, or their words from those around them."""
    data: Literal["auto", "tfds", "offline"] = "auto"
    """The real reviews if they can be had, the real ones or an error, or generated ones."""
    tokens: Literal["punctuation", "words"] = "punctuation"
    """Whether marks are tokens, or are left out."""
    vocabulary_size: int = 30_000
    """Ids in use: 4 special ones and the most frequent tokens."""
    max_length: int = 1_000
    """Tokens of a review; of longer ones the last so many are read."""
    chop: int = 50
    """The most steps of a segment; 0 reads every review in one."""
    batch_segments: int = 256
    """Segments of a batch, over all devices; reviews are not divided among batches."""
    embedding: Literal["vectors", "gates"] = "vectors"
    """Words have vectors, or go straight into the gates (cells lstm and cifg)."""
    embedding_size: int = 128
    """Size of a word's vector."""
    normalise_embeddings: bool = False
    """Whether vectors are scaled to mean 0 and variance 1 over the running text."""
    cell: Literal[
        "lstm",
        "peephole",
        "cifg",
        "nig",
        "nfg",
        "nog",
        "niaf",
        "noaf",
        "fgr",
        "layer_norm",
        "refine",
        "hard_sigmoid",
        "keras1",
    ] = "lstm"
    """The recurrent cell: the LSTM or a variant of it."""
    hidden_size: int = 128
    """Units of each direction."""
    directions: Literal["both", "forward"] = "both"
    """Whether segments are read backwards, too."""
    pooling: Literal["max", "mean", "both"] = "both"
    """What is taken of the outputs of all steps."""
    pairs: Literal["none", "input", "path"] = "none"
    """Known pairs of neighbours: no part, added to the inputs, or a wide path with the words."""
    path_order: Literal[2, 3] = 2
    """Words in a row that the wide path or ratios are of: pairs, or pairs and triples."""
    pairs_size: int = 200_000
    """The most pairs, or pairs and triples."""
    min_count: int = 3
    """Training reviews that one of them has to be in."""
    leave_out: bool = True
    """With --pairs path: whether a review is left out of the ratios that it is trained on."""
    ratio_inputs: bool = False
    """Whether a step reads the log-count ratios of the word and of the runs that end with it."""
    folds: int = 5
    """With --ratio-inputs: parts of the training reviews; what one reads the others say."""
    place_inputs: bool = False
    """Whether a step reads, too, where in the review it is, and how long that is."""
    path_dropout: float = 0.5
    """With --pairs path: rate of dropout on the terms of the wide path."""
    path_loss: float = 0.0
    """How much each path is trained for itself: 0 for one model, 1 for two side by side."""
    deep_share: float = 1.0
    """What the recurrent layer's answer is multiplied by before the wide path's is added."""
    word_dropout: float = 0.1
    """Rate of replacing a word by the unknown one."""
    embedding_dropout: float = 0.4
    """Rate of dropping a word's vector, wherever the word occurs in the batch."""
    input_dropout: float = 0.0
    """Rate of dropping elements of the vectors, the same ones in all of a segment."""
    dropout: float = 0.5
    """Rate of dropout on the pooled vector."""
    loss: Literal["logistic", "squared"] = "logistic"
    """Cross-entropy, or the square of the distance to ±1."""
    adversarial: float = 0.0
    """Length of the step by which the inputs of a review are made worse; 0 for none."""
    virtual: float = 0.0
    """Length of the step that changes the answer most, which it is not to; 0 for none."""
    unlabelled: bool = False
    """Whether the 50,000 reviews without labels are learned from: by --virtual or --teacher, or as
    language."""
    teacher: str | None = None
    """Folder of a run whose answers are labels for them; it held out the same reviews, and read as
    many tokens of each."""
    teacher_sha256: str | None = None
    """What that run's params_sha256 has to be; filled in when not given, and so in every record."""
    confidence: float = 0.9
    """With --teacher: the least probability of an answer that counts as a label, 0.5 for all."""
    pretrained: str | None = None
    """Folder of a run of --task language whose vectors and recurrent layer are the first ones."""
    pretrained_sha256: str | None = None
    """What that run's params_sha256 has to be; filled in when not given, and so in every record."""
    samples: int = 1_000
    """With --task language: the words that the right one is told from at an update."""
    init: Init = "lstmjax"
    """Initial law of the recurrent layer."""
    forget_bias: str | None = None
    """The forget gate's initial bias: a number, chrono:T, log_uniform:T or uniform_gate; that of
    init if None."""
    learning_rate: float = 1e-3
    """Adam's step size, the largest one under a schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    """Whether the step size stays, or falls to 0 along a half cosine or a line."""
    warm_up: int = 0
    """Updates over which the step size rises from 0."""
    clip_norm: float | None = 1.0
    """Bound on the gradient's global norm."""
    weight_decay: float = 0.0
    """Share of the weights that a step size of 1 would take away, beside the gradient (AdamW)."""
    decay_embeddings: bool = False
    """Whether what each word or pair has of its own decays, too."""
    average: float = 0.999
    """Decay of the average of the weights, which is what is scored; 0 scores them themselves."""
    epochs: int = 8
    """Passes over the training reviews."""
    validation_size: int = 2_500
    """Reviews held out from train, at random by the seed."""
    hold_out: Literal["random", "alike"] = "random"
    """Whether they are drawn one by one, or with those that share rare words, as of one film."""
    select: Literal["best", "last"] = "best"
    """Which epoch's weights are tested: the best one's on validation, or the last one's."""
    limit: int | None = None
    """Use only the first so many reviews of every split: a look, not a result."""
    method: Literal["fused", "scan", "unrolled"] = "fused"
    """How the recurrence runs."""
    unroll: int = 1
    """Steps written out in one iteration of the scan."""
    precision: Precision = "float32"
    """Of the factors of the recurrent layer's products; all else is float32 in any case."""
    devices: int | None = None
    """Devices to split a batch over; all there are when not given."""
    seed: int = 0
    """Of initial weights, dropout, batch order and hold-out."""
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

    @property
    def tokens_read(self) -> int:
        """Of a review, the last ones: max_length, or as many as a batch has room for."""
        return whole_reviewer.longest(self)


_BESIDE = Config(pairs="path", path_loss=1.0, deep_share=0.3)
_RATIOS = Config(
    ratio_inputs=True, path_order=3, pairs_size=1_000_000, min_count=2, place_inputs=True,
    embedding_size=64, hidden_size=64, epochs=4, hold_out="alike",
)  # fmt: skip
ROWS = {
    "reviews-lstm": Config(),
    "reviews-pairs": _BESIDE,
    "reviews-triples": dataclasses.replace(
        _BESIDE, path_order=3, pairs_size=1_000_000, min_count=2
    ),
    "reviews-ratios": _RATIOS,
    "reviews-ratios-pairs": dataclasses.replace(_RATIOS, path_order=2),
    "reviews-ratios-unplaced": dataclasses.replace(_RATIOS, place_inputs=False),
    # What each step is worth: reviews-lstm with one thing changed.
    "reviews-gates": Config(embedding="gates"),
    "reviews-coupled": Config(cell="cifg"),
    "reviews-chop-200": Config(chop=200, batch_segments=64),  # as many words in a batch
    "reviews-max": Config(pooling="max"),
    "reviews-undropped": Config(word_dropout=0.0, embedding_dropout=0.0),
    "reviews-unaveraged": Config(average=0.0),
    "reviews-adversarial": Config(adversarial=5.0, normalise_embeddings=True),
    "reviews-pair-inputs": Config(pairs="input"),
    # Begun with what another row's run has left, lstmjax.rows.AFTER: DIR is its folder.
    "reviews-taught": dataclasses.replace(
        _RATIOS, unlabelled=True, teacher="DIR", confidence=0.5, epochs=2
    ),
    # So many words that nothing is learned by heart, so that nothing is dropped.
    "reviews-language": Config(
        task="language",
        unlabelled=True,
        word_dropout=0.0,
        embedding_dropout=0.0,
        dropout=0.0,
        learning_rate=2e-3,
        epochs=4,
        hold_out="alike",
    ),  # fmt: skip
    "reviews-pretrained": Config(pretrained="DIR", hold_out="alike"),
}


# ---- data ---------------------------------------------------------------------------------------


def load(config: Config) -> Dataset:
    return reviews.load(
        config.data,
        tokens=config.tokens,
        vocabulary_size=config.vocabulary_size,
        max_length=config.tokens_read,
        limit=config.limit,
        unlabelled=config.unlabelled,
    )


def make_parts(config: Config, data: Dataset) -> tuple[dict[str, reviews.Part], int]:
    """Training, validation and test reviews, and how many pairs are known.

    Of a language model, the first ``SCORED`` of what is held out and of test are scored: all words
    at every step take a hundred times what the words that are drawn in training take.
    """
    same = ("validation_size", "seed", "hold_out", "vocabulary_size", "chop", "place_inputs")
    of_pairs = (
        "ratio_inputs",
        "pairs",
        "path_order",
        "pairs_size",
        "min_count",
        "leave_out",
        "folds",
    )
    options = {name: getattr(config, name) for name in same + of_pairs}
    parts, pairs = reviews.parts(data, **options, frequency=config.normalise_embeddings)
    for name in ("validation", "test") if config.task == "language" else ():
        parts[name] = parts[name]._replace(rows=parts[name].rows[:SCORED])
    return parts, pairs


# ---- model --------------------------------------------------------------------------------------


def make_model(config: Config, pairs: int) -> review_model.ReviewModel:
    same = {f.name for f in dataclasses.fields(review_model.ReviewModel)}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k in same}
    settings["forget_bias"] = gate_bias(config.forget_bias, config.cell)
    return review_model.ReviewModel(
        **settings | {"pairs_size": pairs},
        normalise=config.normalise_embeddings,
        both=config.directions == "both",
        cell_init=config.init,
    )


def make_loss(config: Config, model: review_model.ReviewModel):
    """What is learned, as ``train.make_train_step`` wants it."""
    if config.task == "language":
        return functools.partial(language.loss_fn, model, config.samples)
    return model.loss_fn


# What a run has in common with the one that answers for reviews without labels, so that neither
# has read what is held out here; and with the one whose weights it begins with. Which reviews are
# alike is told by the tokens that are read of them.
HELD_OUT = (
    "tokens", "vocabulary_size", "max_length", "data", "limit", "seed", "validation_size",
    "hold_out", "tokens_read",
)  # fmt: skip
COMMON = (
    "tokens", "vocabulary_size", "embedding_size", "normalise_embeddings", "cell", "hidden_size",
    "directions", "data", "limit", "seed", "validation_size", "hold_out",
)  # fmt: skip


def begin(
    config: Config, params: Any, vocabulary: Any, teachers: Sequence[Config] = ()
) -> tuple[Any, Config, str | None]:
    """The first weights, the settings with the hash of ``--pretrained``, and the row of a run."""
    if config.pretrained is None:
        return params, config, row_of(config, teachers)

    def like(settings):
        return jax.eval_shape(lambda: language.init(make_model(settings, 0), jax.random.key(0)))

    same = (*COMMON, "tokens_read") if config.hold_out == "alike" else COMMON
    expected = {"task": "language"} | {name: getattr(config, name) for name in same}
    found = pretrained.read(Path(config.pretrained), Config, expected, vocabulary, like)
    config = with_hash(config, "pretrained", found.sha256)
    row = row_of(config, [*teachers, found.settings])
    return pretrained.begun(params, found.params), config, row


def answered(config: Config, data: Dataset) -> tuple[Dataset, Config, list[Config]]:
    """The reviews with the labels that ``--teacher`` gives, the settings with the hash of its
    weights, and its own."""
    if config.teacher is None:
        return data, config, []
    expected = {name: getattr(config, name) for name in HELD_OUT}
    folder = Path(config.teacher)
    trained, sha256 = pretrained.teacher(
        folder, Config, check, make_model, expected, data.vocabulary
    )
    config = with_hash(config, "teacher", sha256)
    of = data.splits["unlabelled"]
    z = whole_reviewer.logits(trained, of["ids"], of["offsets"])
    data = reviews.taught(data, whole_reviewer.positive(trained.settings, z), config.confidence)
    return data, config, [trained.settings]


def with_hash(config: Config, name: str, sha256: str) -> Config:
    """The settings with the hash of an earlier run's weights, which has to be the one given."""
    name = f"{name}_sha256"
    cli.check(config, name, getattr(config, name) in (None, sha256), f"{sha256}, of its weights")
    return dataclasses.replace(config, **{name: sha256})


def row_of(config: Config, before: Sequence[Config]) -> str | None:
    """The row of a run, by its own settings and by those of the runs that it goes on from."""
    named = {}
    for name in ("pretrained", "teacher"):
        named |= {name: "DIR" if getattr(config, name) else None, f"{name}_sha256": None}
    row = matching_row(dataclasses.replace(config, **named), ROWS)
    expected = [AFTER[row]] if row in AFTER else []
    return row if [matching_row(one, ROWS) for one in before] == expected else None


# ---- the run ------------------------------------------------------------------------------------


def make_scorer(config: Config, model: review_model.ReviewModel, steps: int, devices, clock):
    """``score(part, params, arrays)``: the means of a part, whose arrays are on the devices."""
    loss_fn = make_loss(config, model)
    metrics = lambda params, batch: loss_fn(params, batch)[1]  # noqa: E731
    batch_of = review_model.chops(steps)
    evaluate = parallel.evaluator(metrics, devices, clock, batch_of=batch_of)

    def score(part: reviews.Part, params: Any, arrays: Any) -> dict[str, float]:
        packed = chops.pack(part.cut, part.rows, config.batch_segments, len(devices))
        return evaluate(params, arrays, chops.lay_out(part.cut, packed, chops.width([packed])))

    return score


def run(config: Config) -> None:
    check(config)
    reproducible.ask(config.deterministic)
    devices, clock = parallel.use_devices(config.devices), train.Clock()
    dataset = load(config)
    with clock("eval"):
        dataset, config, teachers = answered(config, dataset)
    parts, pairs = make_parts(config, dataset)
    print(f"training on {dataset.title}, sha256 {dataset.sha256[:12]}", flush=True)
    if config.teacher is not None:
        count = len(dataset.splits["taught"]["label"])
        print(f"{count:,} reviews without labels have those that {config.teacher} gives them")
    if config.tokens_read < config.max_length:
        segments = f"{config.batch_segments} segments of {config.chop}"
        read = f"{config.tokens_read:,} tokens are read"
        print(f"of a review the last {read}: a batch has {segments}")
    (rows, cut, data, _), size = parts["train"], len(parts["train"].rows)
    steps = max(int(part.cut.length.max()) for part in parts.values())
    packing = {"capacity": config.batch_segments, "devices": len(devices)}
    batches = chops.Batches.of(cut, rows, epochs=config.epochs, seed=config.seed, **packing)

    model = make_model(config, pairs)
    tx = make_optimiser(config, batches.updates)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    init = language.init if config.task == "language" else review_model.init
    params, select = jax.jit(functools.partial(init, model))(init_key), config.select == "best"
    params, config, row = begin(config, params, dataset.vocabulary, teachers)
    kept = Kept(train.init_state(params, tx, step_key), params if select else ())
    loss_fn = make_loss(config, model)
    step = train.make_train_step(loss_fn, tx, axis_name=parallel.AXIS, on_nan=config.on_nan)
    advance = parallel.runner(step, devices, clock, batch_of=review_model.chops(steps))
    advance = reproducible.checked(advance, config.deterministic)
    score = make_scorer(config, model, steps, devices, clock)
    data = parallel.place(data, devices)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(Run.open("reviews", config))
        scores, seen = Scores(folder), train.Tally()
        gathered = {"scores": scores.epochs, "epoch": seen, "seconds": clock.seconds}
        keeper = stack.enter_context(Keeper(folder, config, gathered, dataset=dataset))
        kept = parallel.place(keeper.restored(kept), devices)
        done = (keeper.epoch - 1) * size
        bar = tqdm(total=config.epochs * size, initial=done, unit=" reviews", disable=None)
        for epoch in keeper.epochs(config.epochs):
            pieces = chops.pieces(batches.plan(epoch), PIECE)
            for piece in parallel.ahead(keeper.left(pieces), devices):
                state, metrics = advance(kept.state, data, piece)
                kept = kept._replace(state=state)
                metrics = keeper.checked(kept, metrics)
                now = means(metrics)
                folder.log(int(state.step), epoch=epoch, **now)
                bar.update(int(np.sum(piece["weight"])))
                bar.set_postfix(epoch=epoch, loss=f"{now['loss']:.4f}")
                seen.add(metrics)
                keeper.after_piece(kept)
            clock.end_epoch()
            updates, last = int(kept.state.step), epoch == config.epochs
            scores.add("train", updates, epoch, means(seen.take()))
            weights = scored(config, kept.state)
            if config.validation_size:
                scores.add("validation", updates, epoch, score(parts["validation"], weights, data))
            if select and best(config, scores.metrics()) == epoch:
                kept = kept._replace(best=parallel.place(weights, devices))
            if last:  # the test reviews are scored once, and not before
                weights = kept.best if select else weights
                test = parallel.place(parts["test"].arrays, devices)
                scores.add("test", updates, epoch, score(parts["test"], weights, test))
            keeper.after_epoch(kept, score_of(config, scores), last=last)
        bar.close()

        whole_reviewer.leave(folder.path, dataset.vocabulary, parts["train"].counted)
        weights = parallel.fetch(kept.best if select else scored(config, kept.state))
        more = {
            "pairs": pairs,
            "fill_share": batches.fill(steps),
            "tokens_per_second": batches.tokens / clock.seconds["train"],
        }
        finish(
            folder,
            scores,
            weights,
            title=f"{config.cell} on {dataset.title}, whole reviews",
            dataset=dataset,
            seconds=clock.seconds,
            seed=config.seed,
            devices=devices,
            row=row,
            more=more | chosen(config, scores) | keeper.numbers(),
            updates=int(kept.state.step),
        )


def main() -> None:
    if sys.argv[1:2] == ["predict"]:
        description = whole_reviewer.predict.__doc__
        asked = cli.parse(whole_reviewer.Predict, argv=sys.argv[2:], description=description)
        whole_reviewer.predict(asked, Config, check, make_model)
    else:
        run(cli.parse(Config, description=__doc__))


if __name__ == "__main__":
    cli.main(main)
