"""The programs that BENCHMARKS.md has a section for, each with the metrics that it shows.

``SOURCES`` are the programs of five published tutorials, which peers run as well; ``FAST`` are some
of them in another arithmetic; ``TASKS`` are the tasks of papers, and the baselines that a recurrent
network has to beat there.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """A section of BENCHMARKS.md: one program, with its seeds and its peers.

    Attributes:
      title: what it is, in words.
      source: where its setting comes from.
      metrics: (key, label, format) of each that is shown; the first one goes to README.md.
      note: what else is to be said.
      published: what an LSTM has reached there before (or, of a baseline, what it has), by whom.
      beside: the row whose lines stand beside this one's: the same program; "" where there is none.
    """

    title: str
    source: str
    metrics: tuple[tuple[str, str, str], ...]
    note: str
    published: str = "–"
    beside: str = ""


_ACCURACY = ("test_accuracy", "test accuracy", ".4f")
_EPOCHS = ("test_accuracy_epochs", "test accuracy after each epoch", ".3f")
_FORECAST = (
    ("rmse_window", "RMSE of 50 steps, window re-run", ".1e"),
    ("rmse_carried", "RMSE of 50 steps, state carried", ".1e"),
    ("train_mse", "training MSE", ".1e"),
)
_NO_NUMBER = "The source states no number."

SOURCES = {
    "sin-tf1": Row(
        "cos from sin, one LSTM(10) with its state carried, 200 updates", "000 (TensorFlow 1)",
        (("mse", "MSE", ".5f"), ("source_loss", "the source's loss (20 × MSE)", ".4f")),
        _NO_NUMBER,
    ),
    "sin-keras": Row(
        "cos from sin, one stateful LSTM(20), 501 updates", "001 (Keras 1)",
        (
            ("mse", "MSE", ".5f"),
            ("mse_advanced", "MSE with the state advanced twice, as published", ".5f"),
        ),
        _NO_NUMBER + " Its `predict` after each update advances the state once more.",
    ),
    "imdb-tf2": Row(
        "IMDB reviews, two LSTMs(64) on the last 80 words, 4 epochs", "002 (TensorFlow 2)",
        (_ACCURACY, _EPOCHS), _NO_NUMBER + " Validation is held out from the training reviews.",
    ),
    "imdb-tf2-gru": Row(
        "the same with GRU cells", "002 (TensorFlow 2)", (_ACCURACY, _EPOCHS), _NO_NUMBER
    ),
    "imdb-tf2-rnn": Row(
        "the same with the simple RNN cell", "002 (TensorFlow 2)", (_ACCURACY, _EPOCHS), _NO_NUMBER
    ),
    "imdb-tf2-source": Row(
        "IMDB reviews under the source's own protocol", "002 (TensorFlow 2)",
        (_ACCURACY, _EPOCHS),
        "All 25,000 training reviews train, and the test reviews are scored after each epoch.",
    ),
    "forecast-rnn": Row(
        "sin forecast by a linear RNN(64), 100 epochs", "003 (TensorFlow 1)", _FORECAST, _NO_NUMBER
    ),
    "forecast-lstm": Row(
        "sin forecast by one LSTM(128), 50 epochs", "003 (TensorFlow 1)", _FORECAST, _NO_NUMBER
    ),
    "mnist-tf1": Row(
        "MNIST by rows, LSTM(100), softmax applied twice, 10 epochs", "004 (TensorFlow 1)",
        (_ACCURACY, _EPOCHS),
        "Two public runs of the source's code print, after epochs 1 to 6, 0.743 0.811 0.832 0.835 "
        "0.916 0.927 and 0.702 0.798 0.820 0.832 0.902 0.917.",
        "0.922 after 6 epochs, two runs of the source's code",
    ),
    "mnist-corrected": Row(
        "MNIST by rows with one softmax, 10 epochs", "004 (TensorFlow 1), corrected",
        (_ACCURACY, _EPOCHS), _NO_NUMBER,
    ),
}  # fmt: skip

_FAST = (
    "Recurrences by oneDNN (`pip install -e '.[native]'`), their products of bfloat16 factors; "
    "weights, cell states and sums in float32."
)
FAST = {
    "imdb-tf2-bfloat16": SOURCES["imdb-tf2"]._replace(
        title="imdb-tf2 in bfloat16, by oneDNN", note=_FAST, beside="imdb-tf2"
    ),
    "mnist-tf1-bfloat16": SOURCES["mnist-tf1"]._replace(
        title="mnist-tf1 in bfloat16, by oneDNN", note=_FAST, beside="mnist-tf1"
    ),
}

_CHOSEN = (
    _ACCURACY,
    ("best_validation_accuracy", "validation accuracy of that epoch", ".4f"),
    ("best_epoch", "best epoch", ".0f"),
)
_BEST = "Tested once, with the weights of the epoch that is best on 5,000 validation images."
_LOOKED = (
    f"{_BEST} Step size and forget bias ({{}}) are those, of the few that were tried, that were "
    "furthest on validation after two to four epochs of one seed"
)
_FOUND = f"{_LOOKED.format('1, chrono or uniform_gate')}."
_FOUND_LONG = f"{_LOOKED.format('1, chrono, log_uniform or uniform_gate')}: docs/through-time.md."
_FOUND_PERMUTED = f"{_LOOKED.format('1, log_uniform or uniform_gate')}: docs/through-time.md."
_FOUND_ELSEWHERE = (
    f"{_BEST} Step size and forget bias are those of smnist-numpy-92916: nothing was chosen here."
)
_BESIDE_TESTS = " Tests of the code ran on the same cores now and then."
_PERMUTED = "permuted MNIST, 784 pixels in the order {}, LSTM(128) with zoneout, 15 epochs"
_HELD_OUT = (
    _ACCURACY,
    ("validation_accuracy", "validation accuracy of each hold-out", ".4f"),
    ("features", "n-grams", ",.0f"),
    ("peak_memory_mib", "MiB", ",.0f"),
)
_CHOICE = "Everything is chosen on the hold-outs; what was chosen is fitted to all of train."

_WHOLE = (
    _ACCURACY,
    ("best_validation_accuracy", "best validation accuracy", ".4f"),
    ("best_epoch", "in epoch", ".0f"),
    ("tokens_per_second", "words a second", ",.0f"),
)
_PATHS = (
    _WHOLE[0],
    ("test_accuracy_deep", "of the LSTM alone", ".4f"),
    ("test_accuracy_wide", "of the linear path alone", ".4f"),
    *_WHOLE[1:],
)
_BESIDE = (
    " Each path is trained for itself, z = z_wide + 0.3 z_deep is what is scored: the LSTM's share "
    "was chosen on 5,000 reviews held out of train. Nearly an ensemble: docs/reviews.md."
)
_ALIKE = (
    " One recurrent model. What is held out is held out by film, as far as words tell which: "
    "docs/reviews.md."
)
_LABELLED = "0.9186 (Johnson & Zhang, 2016); 0.865 (Dai & Le, 2015)"
_PUBLISHED = f"Published, labelled reviews alone: {_LABELLED}."
_UNLABELLED = "0.9276 (Dai & Le, 2015); 0.9409 (Miyato et al., 2017)"
_PUBLISHED_MORE = (
    "With 50,000 unlabelled reviews. Published: 0.9276 (Dai & Le, 2015); 0.9409 with virtual "
    "adversarial training (Miyato et al., 2017); 0.9406 (Johnson & Zhang, 2016)."
)
# Among what is published of LSTMs with 100 to 130 units, and with 512 units.
_PIXELS = (
    "0.910 (Campos et al., 2018), 0.989 (Cooijmans et al., 2017); 0.989 with 512 units (Gu et al., "
    "2020)"
)
_ORDERS = (
    "0.902 (Cooijmans et al., 2017), 0.951 with 512 units (Gu et al., 2020), in whichever order "
    "they used"
)

TASKS = {
    "smnist-small": Row(
        "MNIST pixel by pixel, 14 × 14, LSTM(128), 20 epochs", "no paper's", _CHOSEN,
        f"{_FOUND_LONG} Four seeds with uniform_gate came before, tested too: 0.9902, 0.9881, "
        f"0.7779 and 0.9898; the third was at chance for eleven epochs.",
    ),
    "smnist-small-permuted": Row(
        "the same in the order numpy-92916, zoneout", "no paper's", _CHOSEN,
        _FOUND + _BESIDE_TESTS,
    ),
    "smnist-pixels": Row(
        "MNIST pixel by pixel, 784 pixels, LSTM(128), 20 epochs", "Le et al. (2015)", _CHOSEN,
        f"{_FOUND_LONG} Two whole runs with chrono biases came before, tested too: 0.9825 and, "
        f"with images moved by up to a pixel, 0.9829.{_BESIDE_TESTS}", _PIXELS,
    ),
    "smnist-numpy-92916": Row(
        _PERMUTED.format("numpy-92916"), "expRNN (Lezcano-Casado, 2019)", _CHOSEN,
        f"{_FOUND_PERMUTED} Zoneout is for what was seen without it and with a forget bias of 1: "
        "validation 0.902, train 0.986. A run with that bias, zoneout and 20 epochs came before, "
        f"tested too: 0.9207.{_BESIDE_TESTS}", _ORDERS,
    ),
    "smnist-torch-12008": Row(
        _PERMUTED.format("torch-12008"), "coRNN (Rusch & Mishra, 2021)", _CHOSEN,
        _FOUND_ELSEWHERE + _BESIDE_TESTS, _ORDERS,
    ),
    "smnist-numpy-0": Row(
        _PERMUTED.format("numpy-0"), "LMU (Voelker et al., 2019)", _CHOSEN,
        _FOUND_ELSEWHERE + _BESIDE_TESTS, _ORDERS,
    ),
    "smnist-bit-reversal": Row(
        _PERMUTED.format("bit-reversal"), "S4 (Gu et al., 2022)", _CHOSEN,
        _FOUND_ELSEWHERE + _BESIDE_TESTS, _ORDERS,
    ),
    "smnist-rows": Row(
        "MNIST by rows, LSTM(128), 40 epochs, images moved by up to a pixel",
        "004 (TensorFlow 1), trained longer", _CHOSEN, _BEST + _BESIDE_TESTS,
    ),
    "smnist-pixels-refine": Row(
        "MNIST pixel by pixel, 784 pixels, refined gates, 512 units, 100 epochs",
        "Gu et al. (2020)", _CHOSEN, _BEST, "0.9928 (Gu et al., 2020)",
    ),
    "smnist-numpy-92916-refine": Row(
        "the same in the order numpy-92916", "Gu et al. (2020)", _CHOSEN, _BEST,
        "0.9696 (Gu et al., 2020, in their order)",
    ),
    "reviews-lstm": Row(
        "IMDB, whole reviews, one bidirectional LSTM", "after Johnson & Zhang (2016)", _WHOLE,
        _PUBLISHED + _BESIDE_TESTS, _LABELLED,
    ),
    "reviews-language": Row(
        "IMDB, each word from those around it, 72,500 reviews", "after Dai & Le (2015)",
        (
            ("test_loss", "nats a word on 500 test reviews", ".3f"),
            ("validation_loss_epochs", "on validation after each epoch", ".3f"),
            ("test_accuracy", "words told right", ".4f"),
            ("tokens_per_second", "words a second", ",.0f"),
        ),
        "For reviews-pretrained to begin with. Scored on 500 reviews of a split, over all words.",
    ),
    "reviews-pretrained": Row(
        "IMDB, whole reviews, begun with reviews-language", "after Dai & Le (2015)", _WHOLE,
        _PUBLISHED_MORE + _ALIKE + " DIR: a run of reviews-language with the same seed, whose time "
        "is not in the seconds here." + _BESIDE_TESTS, _UNLABELLED,
    ),
    "reviews-pairs": Row(
        "IMDB, whole reviews, LSTM and a linear path of pairs", "after Wang & Manning (2012)",
        _PATHS, _PUBLISHED + _BESIDE, _LABELLED,
    ),
    "reviews-triples": Row(
        "IMDB, whole reviews, LSTM and a linear path of triples", "after Wang & Manning (2012)",
        _PATHS, _PUBLISHED + _BESIDE, _LABELLED,
    ),
    "reviews-ratios": Row(
        "IMDB, whole reviews, LSTM that reads log-count ratios", "after Wang & Manning (2012)",
        _WHOLE, _PUBLISHED + _ALIKE, _LABELLED,
    ),
    "reviews-taught": Row(
        "reviews-ratios with the labels that a run of it gives 50,000 reviews", "Yarowsky (1995)",
        _WHOLE,
        _PUBLISHED_MORE + _ALIKE + " DIR: a run of reviews-ratios with the same seed, whose time "
        "is not in the seconds here. It was made for this: its weights are not those of the "
        "row reviews-ratios to the last bit, most were made on another processor. These teachers' "
        "records are in experiments/results/teachers/, each with the hash that its pupil's record "
        "has as teacher_sha256." + _BESIDE_TESTS, _UNLABELLED,
    ),
    "reviews-ratios-pairs": Row(
        "reviews-ratios of words and pairs, without triples", "after Wang & Manning (2012)",
        _WHOLE, _PUBLISHED + _ALIKE + _BESIDE_TESTS, _LABELLED,
    ),
    "reviews-ratios-unplaced": Row(
        "reviews-ratios without places in the review", "after Wang & Manning (2012)", _WHOLE,
        _PUBLISHED + _ALIKE + _BESIDE_TESTS, _LABELLED,
    ),
    **{
        f"reviews-{name}": Row(f"reviews-lstm {what}", source, _WHOLE, _PUBLISHED + _BESIDE_TESTS)
        for name, what, source in (
            ("gates", "with a row of all gates for each word", "Johnson & Zhang (2016)"),
            ("coupled", "with coupled gates", "Greff et al. (2017)"),
            ("chop-200", "in chops of 200 words", "after Johnson & Zhang (2016)"),
            ("max", "with the maximum over time alone", "Johnson & Zhang (2016)"),
            ("undropped", "without dropout of words and vectors", "no paper's"),
            ("unaveraged", "with the last weights, not their average", "no paper's"),
            ("adversarial", "with an adversary, ε = 5", "Miyato et al. (2017)"),
            ("pair-inputs", "with the vectors of known pairs added", "no paper's"),
        )
    },
    "baseline-nbsvm-2": Row(
        "IMDB reviews, NB-SVM of words and pairs", "Wang & Manning (2012)", _HELD_OUT,
        _CHOICE + " Published: 0.9122; 0.9155 (Mesnil et al., 2014).",
        "0.9122; 0.9155 (Mesnil et al., 2014)",
    ),
    "baseline-nbsvm-3": Row(
        "the same with triples", "Wang & Manning (2012)", _HELD_OUT,
        _CHOICE + " Published: 0.9182 (Mesnil et al., 2014).", "0.9182 (Mesnil et al., 2014)",
    ),
    "baseline-tfidf-2": Row(
        "IMDB reviews, TF-IDF of words and pairs, logistic regression", "no paper's", _HELD_OUT,
        _CHOICE,
    ),
    "baseline-bag-1": Row(
        "IMDB reviews, the mean of the words' vectors", "Joulin et al. (2016)", _HELD_OUT, _CHOICE
    ),
    "baseline-bag-2": Row(
        "the same with pairs", "Joulin et al. (2016)", _HELD_OUT, _CHOICE
    ),
}  # fmt: skip

ROWS = SOURCES | FAST | TASKS

# Rows that go on from what a run of another row, with the same seed, has left: which one's; and the
# flags that name its folder.
GOES_ON = ("--pretrained", "--teacher")
AFTER = {"reviews-pretrained": "reviews-language", "reviews-taught": "reviews-ratios"}

# README.md shows the first five of these that were run.
FIRST = (
    "reviews-taught", "reviews-ratios", "smnist-rows", "smnist-pixels", "smnist-numpy-92916",
    "reviews-triples", "reviews-lstm", "smnist-small", "smnist-small-permuted", "mnist-corrected",
    "imdb-tf2", "imdb-tf2-gru", "sin-tf1",
)  # fmt: skip
