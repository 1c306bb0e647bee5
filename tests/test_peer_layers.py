"""One layer in every framework: what is installed computes what ours does; the tables' words."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lstmjax
from lstmjax import onednn, peer_tables, timings
from lstmjax.records import validate

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PEERS = EXPERIMENTS / "peers.py"
MODULES = {"linen": "flax", "nnx": "flax", "haiku": "haiku", "equinox": "equinox"}
INSTALLED = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]


@pytest.fixture(scope="module")
def layers():
    """peer_layers.py as a module, with peer_workers.py beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        import peer_layers

        yield peer_layers
        for name in ("peer_layers", "peer_workers"):
            del sys.modules[name]


# --- a whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of a small run, of what is installed and of something that is not."""
    folder = tmp_path_factory.mktemp("layers")
    (folder / "torch.py").write_text("raise ModuleNotFoundError('none', name='torch')")
    flags = ["--shapes", "sin", "--dtypes", "float32", "--memory", "as-installed", "--out", "run"]
    flags += ["--seconds", "0.04", "--rounds", "2"]
    flags += ["--frameworks", ",".join(["lstmjax", "torch", *INSTALLED])]
    path = os.pathsep.join([str(EXPERIMENTS.parent), str(folder)])
    done = subprocess.run(
        [sys.executable, str(PEERS), "layers", *flags],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("record in run\n")
    return json.loads((folder / "run" / "record.json").read_text())


def test_every_layer_computes_what_float64_does(record):
    assert validate(record) == []
    metrics, failed = record["metrics"], record["config"]["failed"]
    key = "as-installed|sin|float32|"
    ours = {"lstmjax fused", "lstmjax scan"}
    assert ours | set(INSTALLED) <= {name.split("|")[3] for name in metrics}
    assert failed[f"{key}torch"] == "torch is not installed"
    # oneDNN may be missing; nothing else may fail.
    others = [name for name in failed if not name.startswith(f"{key}lstmjax onednn")]
    assert others == [f"{key}torch"], failed
    for name, value in metrics.items():
        if name.endswith("_error"):  # float32 rounds somewhere, so 0 would be no comparison
            assert 1e-9 < value < 1e-5, name
        else:
            median, low, high, calls = value
            assert 0 < low <= median <= high < 10 and calls >= 2


def test_the_record_says_what_was_run(record):
    assert record["experiment"] == "peer-layers" and record["seed"] == 0
    assert record["command"].startswith("python experiments/peers.py layers --shapes sin ")
    assert record["config"]["sizes"] == {"sin": [50, 20, 10, 10]}
    assert record["config"]["layers"]["linen"]["versions"]["jax"] == record["environment"]["jax"]
    found = {} if onednn.available() else {"oneDNN": onednn.loaded()}
    versions = record["config"]["layers"]["lstmjax"]["versions"]
    assert versions == {"lstmjax": lstmjax.__version__, "jax": jax.__version__} | found
    assert all(seconds > 0 for seconds in record["seconds"].values())
    text = "\n".join(peer_tables.section(record))
    assert "| torch | not timed: torch is not installed | – |" in text
    assert "- Forward + backward: " in text and "batch 50, 20 steps, 10 inputs, 10 units" in text


# --- its parts -----------------------------------------------------------------------------------


def test_weights_come_back_as_they_went(layers):
    given = layers.problem((4, 6, 3, 5), "float32")
    for framework in layers.FRAMEWORKS:
        there = layers.in_layout_of(framework, given)
        back = layers.in_our_layout(framework, {**there, "hs": there["x"][..., :1]})
        if framework == "haiku":  # adds 1 while running, which changes no gradient
            back["b"] = back["b"] + np.repeat(np.float32([0, 1, 0, 0]), 5)
        np.testing.assert_array_equal(back.pop("hs"), given["xs"][..., :1])
        assert back.keys() == given.keys()
        for name, array in given.items():
            np.testing.assert_allclose(back[name], array, rtol=0, atol=1e-7)


def test_only_one_of_torchs_two_biases_counts(layers):
    given = layers.problem((4, 6, 3, 5), "float32")
    found = layers.in_layout_of("torch", given) | {"hs": given["xs"]}
    for bias in ("weights|bias_ih_l0", "weights|bias_hh_l0"):
        found[bias] = np.arange(20, dtype=np.float32)
    np.testing.assert_array_equal(layers.in_our_layout("torch", found)["b"], np.arange(20))


def test_bfloat16_is_rounded_before_anything_is_compared(layers):
    full, rounded = (layers.problem((4, 6, 3, 5), d) for d in ("float32", "bfloat16"))
    for name in full:
        assert rounded[name].dtype == np.float32
        assert (rounded[name].view(np.uint32) & 0xFFFF == 0).all()  # what bfloat16 cuts off
        np.testing.assert_allclose(rounded[name], full[name], rtol=2**-8)
        assert (rounded[name] != full[name]).any()


def test_differences_are_relative_to_the_largest_entry(layers):
    want = {n: np.array([-8.0, 2.0]) for n in ("hs", "w_x", "w_h", "b", "xs")}
    got = want | {"hs": np.array([-8.0, 2.4]), "w_x": np.array([-7.2, 2.0]), "b": want["b"] + 0.16}
    found = layers.differences(got, want)
    np.testing.assert_allclose(list(found.values()), [0.05, 0.1], rtol=1e-12)
    assert list(found) == ["value_error", "gradient_error"]
    found = layers.differences(got | {"w_h": np.array([np.nan, 0.0])}, want)
    assert np.isnan(found["gradient_error"]) and found["value_error"] < 0.06
    with pytest.raises(layers.Failed, match="another shape"):
        layers.differences(got | {"b": np.zeros(3)}, want)


@pytest.mark.parametrize(
    ("batch", "cores", "names"),
    [
        (50, 1, ["lstmjax fused", "lstmjax scan", "lstmjax onednn", "torch"]),
        (50, 4, ["lstmjax fused", "lstmjax scan", "lstmjax onednn", "lstmjax fused x2",
                 "lstmjax scan x2", "lstmjax onednn x2", "torch"]),
    ],
)  # fmt: skip
def test_devices_split_the_batch_evenly(batch, cores, names, layers):
    assert [str(row) for row in layers.rows(["lstmjax", "torch"], batch, cores)] == names


class Actor:
    """Stands in for a worker: answers from a list, and writes down who was asked what."""

    def __init__(self, name, answers, log):
        self.name, self.answers, self.log = name, iter(answers), log

    def ask(self, run, seconds):
        self.log.append((self.name, run, seconds))
        found = next(self.answers)
        if isinstance(found, Exception):
            raise found
        return {"seconds": found}


def test_layers_take_turns_and_one_that_fails_is_left_out(layers):
    log, spent = [], {"train": 0.0, "eval": 0.0}
    workers = {
        "a": Actor("a", [[1.0, 2.0], [5.0], [3.0], [7.0]], log),
        "b": Actor("b", [[1.0], [2.0], layers.Failed("out of luck")], log),
    }
    found = layers.in_turns(workers, layers.Config(seconds=3.0, rounds=2), spent)
    assert found["a"] == {
        "forward": timings.summary([1.0, 2.0, 3.0]),
        "train": timings.summary([5.0, 7.0]),
    }
    assert found["b"] == "out of luck" and min(spent.values()) > 0
    both = [("a", "forward"), ("a", "train"), ("b", "forward"), ("b", "train")]
    assert log == [(name, kind, 1.5) for name, kind in [*both, *both[:3]]]


def test_a_worker_that_dies_says_so(layers):
    worker = layers.Worker("kept", None)
    try:
        worker.process.kill()
        with pytest.raises(layers.Failed, match="^the process ended with code -9: it said nothing"):
            worker.ask(run="forward", seconds=1.0)
    finally:
        worker.close()


def test_reasons_name_no_folders(layers):
    text = "cannot open /opt/some-where/lib.so:\n see https://a.org/b/c"
    assert str(layers.Failed(text)) == "cannot open lib.so: see https://a.org/b/c"


def test_what_a_framework_raises_is_an_answer_of_one_line(layers, tmp_path, monkeypatch):
    import peer_workers

    def raising(problem):
        assert problem.sizes == [3, 5] and problem.weights.keys() == {"b", "w_h", "w_x"}
        raise TypeError("no such gate\nand more")

    given = layers.in_layout_of("lstmjax", layers.problem((4, 6, 3, 5), "float32"))
    np.savez(tmp_path / "asked.npz", **given)
    broken = peer_workers.FRAMEWORKS["lstmjax"]._replace(build=raising)
    monkeypatch.setitem(peer_workers.FRAMEWORKS, "lstmjax", broken)
    asked = {"framework": "lstmjax", "method": "", "devices": 1, "cores": 1, "sizes": [3, 5]}
    asked |= {"dtype": "float32", "asked": str(tmp_path / "asked.npz"), "found": ""}
    answers = []
    peer_workers.answer(iter([json.dumps(asked)]), answers.append)
    assert answers == [{"failed": "TypeError: no such gate"}]


WRONG = [
    ("--shapes sin,tiny", "--shapes: got sin,tiny, expected some of sin, imdb, mnist, smnist, big"),
    ("--dtypes float64", "--dtypes: got float64, expected some of float32, bfloat16"),
    ("--frameworks jax", "--frameworks: got jax, expected some of lstmjax, linen, nnx, haiku"),
    ("--memory lots", "--memory: got 'lots', expected one of as-installed, kept, both"),
    ("--seconds 0", "--seconds: got 0.0, expected a finite number above 0"),
    ("--rounds 0", "--rounds: got 0, expected an integer of at least 1"),
    ("--out here", "--out: here exists and is not empty: choose another --out"),
]


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_a_wrong_value_is_one_clear_line(flags, text, layers, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").write_text("")
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))  # a busy machine adds no line
    monkeypatch.setattr(sys, "argv", [str(PEERS), "layers", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(PEERS), run_name="__main__")
    assert stop.value.code == (1 if "--out" in flags else 2)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {text}") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


# --- the tables ----------------------------------------------------------------------------------


def spread(median, width=0.01):
    return [median, median - width, median + width, 9]


TIMES = {
    "lstmjax fused": spread(3.0),
    "lstmjax scan": spread(4.0),
    "lstmjax fused x2": spread(1.5),
    "linen": spread(6.0),
    "haiku": spread(5.0),
    "torch": spread(2.0),
}


def test_ratios_are_times_divided(layers):
    assert peer_tables.ratio(TIMES, "lstmjax fused", "torch") == 1.5
    assert peer_tables.ratio(TIMES, "torch", "linen") == 2.0 / 6.0
    assert peer_tables.ratio(TIMES, "keras-jax", "torch") is None
    assert peer_tables.ratio(TIMES, "torch", None) is None
    assert peer_tables.fastest(TIMES, ["linen", "nnx", "haiku"]) == "haiku"
    assert peer_tables.fastest(TIMES, ["nnx"]) is None
    assert set(peer_tables.ON_JAX) == set(layers.FRAMEWORKS) - {
        "lstmjax", "torch", "keras-tensorflow"
    }  # fmt: skip


def test_a_peer_that_wins_is_named():
    without = {name: times for name, times in TIMES.items() if " x" not in name}
    sentence = "**torch** is the fastest; lstmjax fused takes 1.50 times as long."
    assert peer_tables.verdict(without) == sentence
    assert peer_tables.beaten_by(without) == "torch"
    # Spread over devices ours is ahead, and the sentence does not hide what one device does.
    assert peer_tables.verdict(TIMES) == (
        "lstmjax fused x2 is the fastest; torch takes 1.33 times as long "
        "(on one device lstmjax fused takes 1.50 times as long as torch)."
    )
    assert peer_tables.beaten_by(TIMES) is None
    ours = {name: times for name, times in TIMES.items() if name != "torch"}
    sentence = "lstmjax fused x2 is the fastest; haiku takes 3.33 times as long."
    assert peer_tables.verdict(ours) == sentence


def test_overlapping_quartiles_are_no_win():
    close = {"lstmjax fused": spread(3.0, 0.2), "torch": spread(2.7, 0.2)}
    sentence = "lstmjax fused and torch are equally fast within their quartiles."
    assert peer_tables.verdict(close) == sentence
    assert peer_tables.beaten_by(close) is None
    assert peer_tables.verdict({"torch": spread(1.0)}) == ""
    assert peer_tables.verdict({"lstmjax scan": spread(1.0)}) == ""


def test_section_of_a_made_up_record():
    key = "kept|big|bfloat16|"
    metrics = {}
    for name, (median, *_) in TIMES.items():
        metrics[f"{key}{name}|forward"] = spread(median / 1000, 0.0001)
        metrics[f"{key}{name}|train"] = spread(median / 10, 0.01)
        metrics |= {f"{key}{name}|value_error": 3e-3, f"{key}{name}|gradient_error": 2.4e-2}
    metrics[f"{key}lstmjax fused x2|train"] = spread(0.31)
    layers = {"torch": {"versions": {"torch": "2.99"}, "how": "`nn.LSTM`", "bfloat16": "all of it"}}
    config = {
        "layers": layers,
        "failed": {f"{key}nnx": "no | nnx"},
        "load": 0.25,
        "dtypes": "float32",
    }
    config["sizes"] = {"big": [64, 128, 512, 256]}
    lines = peer_tables.section({"metrics": metrics, "config": config})
    assert "- torch (torch 2.99): `nn.LSTM`; with bfloat16, all of it" in lines
    assert lines[2].endswith("The machine's load was 0.25 when the run began.")
    assert "**big, bfloat16**: batch 64, 128 steps, 512 inputs, 256 units." in lines
    rows = [line for line in lines if line.startswith("| ")]
    assert rows[1] == (
        "| lstmjax fused | 3 (2.9–3.1) | 1.50 | 0.60 | 300 (290–310) | 1.50 | 0.60 "
        "| 3e-03 | 2e-02 |"
    )
    # To Haiku, the fastest on JAX, the next one is linen.
    assert rows[5].startswith("| haiku | 5 (4.9–5.1) | 2.50 | 0.83 | 500 (490–510) | 2.50 | 0.83 |")
    assert rows[7] == "| nnx | not timed: no / nnx | – | – | – | – | – | – | – |"
    assert lines[-2] == (
        "- Forward: lstmjax fused x2 is the fastest; torch takes 1.33 times as long "
        "(on one device lstmjax fused takes 1.50 times as long as torch)."
    )
    assert lines[-1] == (
        "- Forward + backward: **torch** is the fastest; lstmjax fused takes 1.50 times as long."
    )
    (summary,) = [line for line in lines if line.startswith("In every process")]
    assert summary.endswith(
        "In 1 of 2 comparisons another layer has a smaller median than the best of ours, of all "
        "methods and numbers of devices; in 1 the quartiles are apart: torch (big bfloat16 forward "
        "+ backward)."
    )
    metrics[f"{key}torch|train"] = spread(0.5)
    (summary,) = [line for line in peer_tables.section({"metrics": metrics, "config": config})
                  if line.startswith("In every process")]  # fmt: skip
    assert " In none of 2 comparisons another layer has a smaller median than the best " in summary
    assert summary.endswith("; in none are the quartiles apart.")
    # A smaller median within the quartiles.
    metrics[f"{key}torch|train"] = [0.29, 0.2, 0.4, *spread(0.5)[3:]]
    (summary,) = [line for line in peer_tables.section({"metrics": metrics, "config": config})
                  if line.startswith("In every process")]  # fmt: skip
    assert " In 1 of 2 comparisons " in summary
    assert summary.endswith("; in none are the quartiles apart.")


def test_a_busy_machine_is_told(layers, monkeypatch, capsys):
    monkeypatch.setattr(layers.os, "cpu_count", lambda: 4)
    layers.warn_of(2.0)
    assert capsys.readouterr().err == ""
    layers.warn_of(2.01)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the machine's load is 2.01 on 4 cores: times taken beside ")
