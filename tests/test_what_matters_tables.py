"""What is said and drawn of studies: the numbers of made-up records, against NumPy and SciPy."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from tiny_records import SHA

from lstmjax import what_matters_plots
from lstmjax import what_matters_tables as texts
from lstmjax.what_matters_plots import Panel

RNG = np.random.default_rng(0)
NAMES = {
    "imdb": ["keras", "torch", "flax", "torch-1", "flax-1", "keras-0"],
    "adding": ["lstmjax", "torch"],
}
METRICS = {}
for _name in NAMES["imdb"]:
    for _key in ("validation_accuracy", "best_validation_accuracy", "test_accuracy"):
        METRICS[f"imdb/{_name}/{_key}"] = RNG.uniform(0.8, 0.9, 4).tolist()
    METRICS[f"imdb/{_name}/best_epoch"] = [1, 2, 2, 4]
    METRICS[f"imdb/{_name}/train_seconds"] = 61.7
METRICS |= {
    "adding/lstmjax/solved_at": [1000, 1500, 1200, 900], "adding/lstmjax/train_seconds": 9.6,
    "adding/lstmjax/updates_to_solve": [1000, 1500, 1200, 900],
    "adding/lstmjax/test_loss": [0.002, 0.004, 0.009, 0.001],
    "adding/torch/solved_at": ["inf", 4000, "inf", 3000], "adding/torch/train_seconds": 90.0,
    "adding/torch/updates_to_solve": [5000, 4000, 5000, 3000],
    "adding/torch/test_loss": [0.1, 0.004, 0.2, 0.003],
}  # fmt: skip
DATA = {"name": "imdb_reviews", "source": "tfds", "sha256": SHA}
RUNS = {
    f"{task}/{name}": {"command": "python x.py", "params_sha256": SHA, "dataset": DATA}
    for task, names in NAMES.items()
    for name in names
}
RUNS["imdb/haiku"] = {"diverged": "seed2-17 is not finite"}
CONFIG = {
    "study": "init", "references": {"imdb": "keras", "adding": "lstmjax"}, "runs": RUNS,
    "seeds": 4, "epochs": 4, "limit": None,
}  # fmt: skip
RECORD = {"seed": 3, "config": CONFIG, "metrics": METRICS}


def interval_of(values):
    """Mean and half-width by SciPy's own t interval."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return (low + high) / 2, (high - low) / 2


def test_cells_are_compared_seed_by_seed():
    own, base = (np.array(METRICS[f"imdb/{n}/validation_accuracy"]) for n in ("flax", "keras"))
    got = texts.compared(METRICS, "imdb/flax", "imdb/keras")
    np.testing.assert_allclose(got, [*interval_of(own), *interval_of(own - base)], rtol=1e-12)
    own, base = (np.array(METRICS[f"imdb/{n}/test_accuracy"]) for n in ("torch", "keras"))
    got = texts.compared(METRICS, "imdb/torch", "imdb/keras", "test_accuracy")
    np.testing.assert_allclose(got, [*interval_of(own), *interval_of(own - base)], rtol=1e-12)
    # The adding problem's are ratios: means and differences are of logarithms.
    own, base = (np.log(METRICS[f"adding/{n}/updates_to_solve"]) for n in ("torch", "lstmjax"))
    got = texts.compared(METRICS, "adding/torch", "adding/lstmjax")
    np.testing.assert_allclose(got, [*interval_of(own), *interval_of(own - base)], rtol=1e-12)
    assert texts.compared(METRICS, "imdb/haiku", "imdb/keras") is None
    without = texts.compared(METRICS, "imdb/torch", "imdb/haiku")
    assert np.isfinite(without.mean) and np.isnan(without.difference)


def test_tables_show_the_numbers():
    head, lines = texts.table(RECORD, "imdb")
    assert head == [
        "", "validation accuracy", "against keras, paired", "best epoch's validation accuracy",
        "against it, paired", "best epoch", "test accuracy", "train s",
    ]  # fmt: skip
    by_name = {line[0]: line[1:] for line in lines}
    assert list(by_name) == [
        "keras", "torch", "flax", "torch, forget bias 1", "flax, forget bias 1",
        "keras, forget bias 0", "haiku",
    ]  # fmt: skip
    for name in ("keras", "torch"):
        want = []
        for key in ("validation_accuracy", "best_validation_accuracy"):
            own, base = (np.array(METRICS[f"imdb/{n}/{key}"]) for n in (name, "keras"))
            mean, half = interval_of(own)
            want.append(f"{mean:.4f} ± {half:.4f}")
            difference = (0, 0) if name == "keras" else interval_of(own - base)
            want.append("–" if name == "keras" else "{:+.4f} ± {:.4f}".format(*difference))
        mean, half = interval_of(METRICS[f"imdb/{name}/test_accuracy"])
        assert by_name[name] == [*want, "2.2", f"{mean:.4f} ± {half:.4f}", "61.7"]
    assert by_name["haiku"] == ["diverged: seed2-17 is not finite", *"––––––"]

    _, (first, second) = texts.table(RECORD, "adding")
    own, base = (np.log(METRICS[f"adding/{n}/updates_to_solve"]) for n in ("torch", "lstmjax"))
    mean, half = interval_of(own)
    low, middle, high = np.exp([mean - half, mean, mean + half])
    assert second[:2] == ["torch", f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"]
    mean, half = interval_of(own - base)
    low, middle, high = np.exp([mean - half, mean, mean + half])
    assert second[2] == f"× {middle:.2f} ({low:.2f} to {high:.2f})" and first[2] == "–"
    mean, half = interval_of(np.log(METRICS["adding/torch/test_loss"]))
    low, middle, high = np.exp([mean - half, mean, mean + half])
    assert second[3:] == ["2 of 4", f"{middle:#.2g} ({low:#.2g} to {high:#.2g})", "90"]


def test_the_line_on_the_screen():
    assert texts.line(METRICS, "imdb/haiku", "imdb/keras") == "imdb/haiku: diverged"
    mean, half = interval_of(METRICS["imdb/keras/validation_accuracy"])
    want = f"imdb/keras: validation accuracy {mean:.4f} ± {half:.4f}"
    assert texts.line(METRICS, "imdb/keras", "imdb/keras") == want
    other = texts.line(METRICS, "imdb/flax", "imdb/keras")
    assert ", against keras " in other and other.count("±") == 2


@pytest.mark.parametrize(
    ("count", "want"), [(2, 2 / np.pi**0.5), (3, 3 / np.pi**0.5), (9, 2.970026), (16, 3.531983)]
)
def test_the_range_of_cells_that_are_all_alike(count, want):
    assert texts.expected_range(count) == pytest.approx(want, rel=1e-6)  # d₂ of control charts


def test_what_laws_change_beside_what_seeds_do():
    cells = [f"imdb/{name}" for name in ("keras", "torch", "flax", "haiku")]
    found = texts.gap(METRICS, cells)
    own = {c: np.array(METRICS[f"{c}/validation_accuracy"]) for c in cells[:3]}
    means = {cell: v.mean() for cell, v in own.items()}
    spread = np.sqrt(np.mean([v.var(ddof=1) for v in own.values()]))
    assert (found.worst, found.best) == (min(means, key=means.get), max(means, key=means.get))
    # Least squares on a mean for each cell and each seed: what is left has (3 − 1)(4 − 1) degrees.
    numbers = np.concatenate(list(own.values()))
    cell, seed = np.repeat(np.eye(3), 4, axis=0), np.tile(np.eye(4), (3, 1))
    design = np.concatenate([cell, seed], axis=1)
    left = numbers - design @ np.linalg.lstsq(design, numbers, rcond=None)[0]
    alone = np.sqrt(np.sum(left**2) / 6)
    assert abs(alone / spread - 1) > 0.01  # two different things
    want = [max(means.values()) - min(means.values()), spread, 3 / np.pi**0.5 * alone / 4**0.5]
    assert found.count == 3
    np.testing.assert_allclose(found[3:], want, rtol=1e-6)
    found = texts.gap(METRICS, ["adding/lstmjax", "adding/torch"])
    assert (found.worst, found.best) == ("adding/torch", "adding/lstmjax")  # fewer is better
    own = [np.log(METRICS[f"adding/{n}/updates_to_solve"]) for n in ("torch", "lstmjax")]
    assert found.range == pytest.approx(np.mean(own[0]) - np.mean(own[1]), rel=1e-12)
    assert texts.gap(METRICS, ["imdb/keras", "imdb/haiku"]) is None

    head, lines = texts.gap_table(RECORD)
    assert [line[:3] for line in lines] == [
        ["imdb", "initial law with its own forget bias", "3"],  # one diverged
        ["imdb", "initial law, forget bias 1", "3"],
        ["imdb", "forget bias alone", "2"],
        ["adding", "initial law with its own forget bias", "2"],
    ]
    by_head = dict(zip(head, lines[3], strict=True))
    assert by_head["range of means"] == f"× {np.exp(found.range):.2f}"
    assert by_head["spread over seeds"] == f"× {np.exp(found.spread):.2f}"
    assert by_head["range / spread"] == f"{found.range / found.spread:.1f}"
    assert (by_head["worst"], by_head["best"]) == ("torch", "lstmjax")


def test_groups_of_laws():
    laws = ["keras", "tf1", "torch", "equinox"]
    groups = texts.groups([*laws, "torch-1", "keras-0", "keras-chrono"], "keras")
    assert groups == {
        "initial law with its own forget bias": laws,
        "forget bias alone": ["keras", "keras-0", "keras-chrono"],
    }
    groups = texts.groups([*laws, "torch-1", "equinox-1"], "keras")
    assert groups["initial law, forget bias 1"] == ["keras", "tf1", "torch-1", "equinox-1"]
    assert texts.groups(["keras"], "keras") == {}


def test_section_of_benchmarks():
    variants = {
        "study": "variants", "references": {"imdb": "keras"}, "seeds": 4, "epochs": 2,
        "limit": 2000, "runs": {k: v for k, v in RUNS.items() if k[:4] == "imdb"},
    }  # fmt: skip
    groups = [SimpleNamespace(records=[r]) for r in (RECORD, RECORD | {"config": variants})]
    text = "\n".join(texts.section(groups, lambda group: ["- from here"]))
    assert text.count("- from here") == 2
    assert "### init on imdb, adding; seeds 3 to 6\n" in text
    assert "### variants on imdb; seeds 3 to 6\n" in text
    assert text.count("A look, and not a result: --limit 2000.") == 1
    assert "4 epochs. Data: imdb_reviews (tfds).\n" in text and " 2 epochs. Data:" in text
    assert text.count("How much of a gap between frameworks") == 1
    head, lines = texts.table(RECORD, "adding")
    rows = [f"| {' | '.join(line)} |" for line in (head, ["---"] * 6, *lines)]
    assert "\n".join(rows) in text


def test_made_up_data_are_not_called_by_the_name_of_the_real():
    made_up = {"dataset": {"name": "offline_digits", "source": "offline"}}
    real = {"dataset": {"name": "mnist", "source": "tfds"}}
    runs = {"mnist/tf1": made_up, "imdb/keras": real, "imdb/torch": {"diverged": "at step 3"}}
    assert texts.title({"runs": runs}, "mnist") == "rendered digits by rows"
    assert texts.title({"runs": runs}, "imdb") == "IMDB reviews"
    config = CONFIG | {"runs": {c: r | made_up if c[:4] == "imdb" else r for c, r in RUNS.items()}}
    figure = what_matters_plots.study(config, METRICS)
    assert figure.axes[0].get_title(loc="left").startswith("generated reviews; keras: ")
    text = "\n".join(
        texts.section([SimpleNamespace(records=[RECORD | {"config": config}])], lambda _: [])
    )
    assert "**generated reviews.**" in text and "IMDB reviews" not in text


def test_no_point_is_left_at_the_end_of_a_number():
    got = texts.mean_text(texts.TASKS["sin"], np.log(1.3), np.log(12.0))
    assert got == "1.3 (0.11 to 16)"


def test_words_for_names():
    assert texts.label("init", "torch-1") == "torch, forget bias 1"
    assert texts.label("init", "nnx_fused") == "nnx_fused"
    assert texts.label("dropout", "recurrent_dropout-0.5") == "recurrent dropout 0.5"
    assert texts.label("dropout", "none") == "none"
    assert texts.label("variants", "peephole") == "peephole (Greff's vanilla)"
    assert texts.label("variants", "cifg") == "cifg"


# ---- the figure ---------------------------------------------------------------------------------


def test_figure_has_dots_intervals_and_a_line_of_no_difference():
    values = {"a": [0.5, 0.6, 0.64], "b": [0.7, 0.71, 0.9]}
    logs = {"one": {"a": [10.0, 20.0, 35.0]}, "none": {}, "two": {"b": [1.0, 2.0, 7.0]}}
    panels = [Panel("first", "accuracy", {"one": values}, line=0.6), Panel("2nd", "x", logs, True)]
    figure = what_matters_plots.dots("title", panels)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b"]
    assert left.get_ylim() == (1.6, -0.6)  # from top to bottom
    for y, seeds in enumerate(values.values()):
        dots, mean = left.lines[4 * y], left.lines[4 * y + 1]
        np.testing.assert_array_equal(dots.get_xydata(), [[v, y] for v in seeds])
        np.testing.assert_allclose(mean.get_xydata(), [[np.mean(seeds), y]])
        middle, half = interval_of(seeds)
        segment = left.collections[y].get_segments()[0]
        np.testing.assert_allclose(segment, [[middle - half, y], [middle + half, y]])
    assert list(left.lines[-1].get_xdata()) == [0.6, 0.6]
    assert left.get_xlim() == pytest.approx((0.5 - 0.06 * 0.4, 0.9 + 0.06 * 0.4))
    assert right.get_xscale() == "log"
    middle, half = interval_of(np.log(logs["two"]["b"]))
    segment = right.collections[-1].get_segments()[0]
    np.testing.assert_allclose(segment, [[np.exp(middle - half), 1], [np.exp(middle + half), 1]])
    assert right.get_xlim() == pytest.approx((35**-0.06, 35 * 35**0.06))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    with pytest.raises(ValueError, match="^panels: got none or one without names"):
        what_matters_plots.dots("title", [Panel("first", "accuracy", {"one": {}})])


def test_figure_of_a_record_shows_differences_seed_by_seed():
    left, right = what_matters_plots.study(CONFIG, METRICS).axes
    shown = [label.get_text() for label in left.get_yticklabels()]
    assert shown == [
        "torch", "flax", "torch, forget bias 1", "flax, forget bias 1", "keras, forget bias 0",
    ]  # fmt: skip
    own, base = (np.array(METRICS[f"imdb/{n}/validation_accuracy"]) for n in ("flax-1", "keras"))
    np.testing.assert_allclose(left.lines[4 * 3].get_xdata(), own - base, rtol=1e-12)
    middle, half = interval_of(own - base)
    segment = left.collections[3].get_segments()[0]
    np.testing.assert_allclose(segment, [[middle - half, 3], [middle + half, 3]])
    assert left.get_title("left") == f"IMDB reviews; keras: {base.mean():.4f}"
    assert (left.get_xscale(), right.get_xscale()) == ("linear", "log")
    assert [axes.lines[-1].get_xdata()[0] for axes in (left, right)] == [0, 1]
    ours, torch = (METRICS[f"adding/{n}/updates_to_solve"] for n in ("lstmjax", "torch"))
    np.testing.assert_allclose(right.lines[0].get_xdata(), np.divide(torch, ours), rtol=1e-12)
    assert right.get_title("left").endswith(f"; lstmjax: {np.exp(np.mean(np.log(ours))):,.0f}")
    assert left.get_xlabel() == "validation accuracy, difference"
    assert right.get_xlabel() == "updates to solve it, quotient"


def test_figure_of_dropout_has_the_last_and_the_best_epoch():
    runs = {f"imdb/{n}": RUNS["imdb/keras"] for n in ("none", "zoneout-0.1")}
    metrics = {f"imdb/{n}/{best}validation_accuracy": RNG.uniform(size=4).tolist()
               for n in ("none", "zoneout-0.1") for best in ("", "best_")}  # fmt: skip
    config = CONFIG | {"study": "dropout", "runs": runs, "references": {"imdb": "none"}}
    (axes,) = (figure := what_matters_plots.study(config, metrics)).axes
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["last epoch", "best epoch"]
    last, best = axes.lines[0], axes.lines[4]  # zoneout's seeds
    np.testing.assert_allclose(best.get_ydata() - last.get_ydata(), 0.36)
    for line, which in ((last, ""), (best, "best_")):
        own, base = (
            np.array(metrics[f"imdb/{n}/{which}validation_accuracy"])
            for n in ("zoneout-0.1", "none")
        )
        np.testing.assert_allclose(line.get_xdata(), own - base, rtol=1e-12)


def test_a_task_whose_reference_diverged_is_not_drawn():
    metrics = {k: v for k, v in METRICS.items() if not k.startswith("imdb/keras/")}
    (axes,) = what_matters_plots.study(CONFIG, metrics).axes
    assert axes.get_title("left").startswith("adding problem")
    kept = ("imdb/keras/", "adding/lstmjax/")  # nothing is left to be compared
    references = {k: v for k, v in METRICS.items() if k.startswith(kept)}
    assert what_matters_plots.study(CONFIG, references) is None


def test_the_page_says_what_the_tables_say():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "what-matters.md").read_text(encoding="utf-8")
    tables = (root / "BENCHMARKS.md").read_text(encoding="utf-8")
    studies, times = page.split("\n## The framework: ")
    for text, section in ((studies, "what matters"), (times, "seconds")):
        table = tables.split(f"\n## {section}: ")[1].split("\n## ")[0]
        said = re.findall(r"[-+×]? ?\d+\.\d{2,4}(?: ± \d+\.\d{4})?", text)
        assert len(said) > 5
        for number in said:
            assert number.strip() in table, number
