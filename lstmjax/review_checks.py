"""Which settings of experiments/reviews.py go together: one ValueError names the first that do not.

``config`` is its configuration, whose defaults are what a setting has where it has no say.
"""

from typing import Any

from lstmjax import cli, whole_reviewer
from lstmjax.keeper import save_every
from lstmjax.models import gate_bias


def check(config: Any) -> None:
    """Checks every setting by itself, then those that depend on others.

    Raises:
      ValueError: a setting is out of its range, or does not go with another one.
    """
    _numbers(config)
    _paths(config)
    _inputs(config)
    if config.embedding == "gates":
        _gates(config)
    if config.task == "language":
        _language(config)
    else:
        told = f"{_default(config, 'samples')} without --task language"
        cli.check(config, "samples", _as_default(config, "samples"), told)
    _going_on(config)
    decayed = config.weight_decay > 0 or not config.decay_embeddings
    cli.check(config, "decay_embeddings", decayed, "no, with --weight-decay 0")
    select = config.select == "last" or config.validation_size > 0
    cli.check(config, "select", select, "last with --validation-size 0")
    gate_bias(config.forget_bias, config.cell)


def _default(config: Any, name: str) -> Any:
    return type(config).__dataclass_fields__[name].default


def _as_default(config: Any, name: str) -> bool:
    return getattr(config, name) == _default(config, name)


def _numbers(config: Any) -> None:
    """Each number by itself."""
    counts = ["max_length", "batch_segments", "embedding_size", "hidden_size", "pairs_size"]
    counts += ["samples", "min_count", "epochs", "limit", "unroll", "devices", "keep"]
    cli.check_counts(config, *counts)
    save_every(config.save_every)
    cli.check_counts(config, "vocabulary_size", least=5)
    cli.check_counts(config, "folds", least=2)
    cli.check_counts(config, "chop", "warm_up", "validation_size", "seed", least=0)
    cli.check_rates(config, "path_dropout", "word_dropout", "embedding_dropout", "input_dropout")
    cli.check_rates(config, "dropout", "average")
    cli.check_positive(config, "learning_rate", "clip_norm")
    for name in ("adversarial", "virtual", "weight_decay"):
        fits = 0 <= getattr(config, name) < float("inf")
        cli.check(config, name, fits, "a finite number of at least 0")
    cli.check(config, "path_loss", 0 <= config.path_loss <= 1, "0 <= path_loss <= 1")
    cli.check(config, "deep_share", 0 < config.deep_share <= 1, "0 < deep_share <= 1")
    cli.check(config, "confidence", 0.5 <= config.confidence < 1, "0.5 <= confidence < 1")


def _paths(config: Any) -> None:
    """The wide path, and what counts runs of words."""
    for name in ("path_loss", "deep_share", "path_dropout"):
        fits = config.pairs == "path" or _as_default(config, name)
        cli.check(config, name, fits, f"{_default(config, name):g} without --pairs path")
    fits = config.pairs == "path" or config.leave_out
    cli.check(config, "leave_out", fits, "yes, without --pairs path")
    fits = config.ratio_inputs or _as_default(config, "folds")
    cli.check(config, "folds", fits, "5 without --ratio-inputs")
    fits = config.pairs == "path" or config.ratio_inputs or config.path_order == 2
    cli.check(config, "path_order", fits, "2 without --pairs path or --ratio-inputs")
    for name in ("pairs_size", "min_count"):
        fits = whole_reviewer.knows_runs(config) or _as_default(config, name)
        told = f"{_default(config, name)} without --pairs or --ratio-inputs"
        cli.check(config, name, fits, told)
    fits = config.pairs != "input" or not config.ratio_inputs
    cli.check(config, "ratio_inputs", fits, "none with --pairs input")
    known = config.vocabulary_size**config.path_order < 2**63  # a run is one number
    fits = known or not whole_reviewer.knows_runs(config)
    cli.check(config, "vocabulary_size", fits, "fewer with --pairs or --ratio-inputs")


def _inputs(config: Any) -> None:
    """What is read beside a word's vector."""
    for name in (name for name in ("ratio_inputs", "place_inputs") if getattr(config, name)):
        flag = f"--{name.replace('_', '-')}"
        cli.check(config, "embedding", config.embedding == "vectors", f"vectors with {flag}")
        cli.check(config, "task", config.task == "sentiment", f"sentiment with {flag}")


def _gates(config: Any) -> None:
    """Words that go straight into the gates."""
    told = "lstm or cifg with --embedding gates"
    cli.check(config, "cell", config.cell in ("lstm", "cifg"), told)
    told = "none with --embedding gates"
    cli.check(config, "normalise_embeddings", not config.normalise_embeddings, told)
    cli.check(config, "pretrained", config.pretrained is None, told)
    told = "float32 with --embedding gates"
    cli.check(config, "precision", config.precision == "float32", told)
    cli.check(config, "method", config.method != "unrolled", "fused or scan with gates")


def _language(config: Any) -> None:
    """What a language model has no use for."""
    names = ("adversarial", "virtual", "pairs", "pretrained", "embedding", "loss", "pooling")
    for name in names:
        told = f"{_default(config, name) or 'none'} with --task language"
        cli.check(config, name, _as_default(config, name), told)


def _going_on(config: Any) -> None:
    """Reviews without labels, and what is taken from earlier runs."""
    taught, begun = config.teacher is not None, config.pretrained is not None
    use = not config.unlabelled or config.task == "language" or config.virtual > 0 or taught
    for name, fits, told in (
        ("unlabelled", use, "no, without --virtual, --teacher or --task language"),
        ("teacher", not taught or config.unlabelled, "none without --unlabelled"),
        ("teacher", not taught or config.task == "sentiment", "none with --task language"),
        ("virtual", not taught or config.virtual == 0, "0 with --teacher"),
        ("teacher_sha256", taught or config.teacher_sha256 is None, "none without --teacher"),
        ("confidence", taught or _as_default(config, "confidence"), "0.9 without --teacher"),
    ):
        cli.check(config, name, fits, told)
    labelled = not config.unlabelled or config.pairs != "path" or taught
    cli.check(config, "pairs", labelled, "none or input with --unlabelled")
    hashed = begun or config.pretrained_sha256 is None
    cli.check(config, "pretrained_sha256", hashed, "none without --pretrained")
    for name in ("init", "forget_bias"):
        told = f"{_default(config, name)} with --pretrained, which has that layer"
        cli.check(config, name, not begun or _as_default(config, name), told)
