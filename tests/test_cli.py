"""Command lines: presets, flags, and one clear line for every wrong value."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import tyro

import lstmjax
from lstmjax import cli, reviewer
from lstmjax.data.dataset import DataError
from lstmjax.records import RunError

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Config:
    preset: str = "tf1"
    """named settings: tf1 or keras"""
    cell: Literal["lstm", "gru"] = "lstm"
    """which cell"""
    epochs: int = 4
    """passes over the training data"""
    learning_rate: float = 1e-3
    """step size of Adam"""
    dropout: float = 0.25
    """rate"""
    max_norm: float | None = None
    """clip gradients to this norm"""
    seed: int = 0
    """of everything random"""
    live: bool = False
    """draw while training"""
    shuffle: bool = True
    """new order in each epoch"""
    out: str | None = None
    """run folder"""


PRESETS = {"tf1": Config(), "keras": Config(preset="keras", epochs=501, cell="gru", live=True)}


def parse(*argv):
    return cli.parse(Config, presets=PRESETS, argv=argv, description="Trains a thing.")


def complaint(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    return err.strip()


def test_flags_override_the_preset_wherever_they_stand():
    assert parse() == PRESETS["tf1"]
    assert parse("--preset", "keras") == PRESETS["keras"]
    expected = dataclasses.replace(PRESETS["keras"], epochs=3, live=False, max_norm=0.5)
    assert parse("--epochs", "3", "--no-live", "--preset=keras", "--max-norm", "0.5") == expected
    changed = dataclasses.replace(Config(), learning_rate=-0.5, shuffle=False, out="a b")
    assert parse("--learning_rate", "-0.5", "--no-shuffle", "--out", "a b") == changed
    assert parse("--preset", "keras", "--preset", "tf1") == PRESETS["tf1"]
    assert cli.parse(Config, argv=["--seed", "9"]) == Config(seed=9)


def test_arguments_come_from_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["imdb.py", "--seed", "7"])
    assert cli.parse(Config, presets=PRESETS) == Config(seed=7)


def test_help_shows_the_numbers_of_the_preset(capsys):
    for argv, number in ((["--help"], "(default: 4)"), (["--preset", "keras", "-h"], "501")):
        with pytest.raises(SystemExit) as stop:
            parse(*argv)
        out, err = capsys.readouterr()
        assert stop.value.code == 0 and err == "" and number in out
        for text in ("Trains a thing.", "--learning-rate FLOAT", "passes over the", "--no-live"):
            assert text in out


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--epochs x", "error: --epochs: got 'x', expected an integer"),
        ("--epochs=1.5", "error: --epochs: got '1.5', expected an integer"),
        ("--epochs", "error: --epochs: got no value, expected an integer"),
        ("--epochs --live", "error: --epochs: got no value, expected an integer"),
        ("--learning-rate fast", "error: --learning-rate: got 'fast', expected a number"),
        ("--learning_rate fast", "error: --learning-rate: got 'fast', expected a number"),
        ("--max-norm none", "error: --max-norm: got 'none', expected a number or None"),
        ("--cell lsmt", "error: --cell: got 'lsmt', expected one of lstm, gru"),
        ("--preset tf2", "error: --preset: got 'tf2', expected one of tf1, keras"),
        ("--preset=tf2 --help", "error: --preset: got 'tf2', expected one of tf1, keras"),
        ("--preset", "error: --preset: got no value, expected text"),
        ("--epoch 3", "error: --epoch: no such flag, did you mean --epochs?"),
        ("--no-shufle", "error: --no-shufle: no such flag, did you mean --no-shuffle?"),
        ("--qqqq", "error: --qqqq: no such flag, see --help"),
        ("--no-epochs", "error: --no-epochs: no such flag, did you mean --epochs?"),
        ("-e 3", "error: -e: no such flag, see --help"),
        ("--live true", "error: --live: got 'true', expected --live or --no-live alone"),
        ("--no-live=1", "error: --live: got '1', expected --live or --no-live alone"),
        ("train", "error: got 'train', expected a flag, see --help"),
        ("--seed 1 2", "error: got '2', expected a flag, see --help"),
        ("--seed 1 --out", "error: --out: got no value, expected text or None"),
    ],
)
def test_every_wrong_argument_gets_one_line(argv, expected, capsys):
    assert complaint(capsys, *argv.split()) == expected


def test_positional_arguments_are_left_to_tyro(capsys):
    @dataclasses.dataclass(frozen=True)
    class Predict:
        text: Annotated[str, tyro.conf.Positional]
        run: str = "last"

    assert cli.parse(Predict, argv=["so good", "--run", "x"]) == Predict("so good", "x")
    for argv in ([], ["a", "b"]):
        with pytest.raises(SystemExit) as stop:
            cli.parse(Predict, argv=argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert not set("╭│─╰") & set(err)
        assert ("text" if not argv else "b") in err


@dataclasses.dataclass(frozen=True)
class Asked:
    text: tyro.conf.Positional[str] = ""
    run: str | None = None


@pytest.mark.parametrize(
    "text", ["--bad movie", "-10 out of 10", "--run", "--help", "--so_so", "-"]
)
def test_after_two_hyphens_nothing_is_a_flag(text):
    assert cli.parse(Asked, argv=["--run", "r1", "--", text]) == Asked(text, "r1")


ASIDE = "; what is no flag but begins with - goes last, after --"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--bad movie", "--run", "r1"], f"--bad movie: no such flag, see --help{ASIDE}"),
        (["-bad", "--run", "r1"], f"-bad: no such flag, see --help{ASIDE}"),
        (["--", "-10 out of 10", "--run", "r1"], "got '--run' after --, expected flags before it"),
        (["--", "so", "--run=r1"], "got '--run=r1' after --, expected flags before it"),
        (["--rum", "r1"], "--rum: no such flag, did you mean --run?"),
        (["--text", "good"], f"--text: no such flag, see --help{ASIDE}"),
    ],
)
def test_texts_that_look_like_flags_get_one_line(argv, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Asked, argv=argv)
    assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {expected}\n")


def test_what_stands_without_a_flag_is_not_called_one(capsys):
    cli.parse(Asked, argv=[])
    settings = SimpleNamespace(max_length=5, truncating="pre")
    with pytest.raises(SystemExit):
        cli.main(lambda: reviewer.probability(SimpleNamespace(settings=settings), ["?!"]))
    assert capsys.readouterr().err == "error: text: got no word, expected a review\n"


def test_checks_of_values():
    config = Config(epochs=0, dropout=1.0, learning_rate=float("nan"), max_norm=float("inf"))
    for check, name, message in [
        (cli.check_counts, "epochs", "--epochs: got 0, expected an integer of at least 1"),
        (cli.check_rates, "dropout", "--dropout: got 1.0, expected 0 <= dropout < 1"),
        (cli.check_positive, "learning_rate", "--learning-rate: got nan, expected a finite number"),
        (cli.check_positive, "max_norm", "--max-norm: got inf, expected a finite number above 0"),
    ]:
        with pytest.raises(cli.ConfigError) as error:
            check(config, name)
        assert str(error.value).startswith(message)
    with pytest.raises(cli.ConfigError, match="--epochs"):
        cli.check_counts(Config(seed=5, epochs=0), "seed", "epochs")
    for dropout in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="--dropout"):
            cli.check_rates(Config(dropout=dropout), "dropout")
    cli.check_counts(Config(seed=0), "seed", least=0)
    cli.check_rates(Config(dropout=0.0), "dropout")
    cli.check_positive(Config(), "learning_rate", "max_norm")
    cli.check(Config(), "seed", True, "anything")
    with pytest.raises(cli.ConfigError, match="--learning-rate: got 0.001, expected less"):
        cli.check(Config(), "learning_rate", False, "less")


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    "run, code, line",
    [
        (raising(DataError("no data:\n  here")), 1, "error: no data: here"),
        (raising(RunError("a exists")), 1, "error: a exists"),
        (raising(OSError(28, "No space left on device", "a/b")), 1,
         "error: a/b: No space left on device"),
        (raising(OSError("odd")), 1, "error: odd"),
        (raising(KeyboardInterrupt()), 130, "error: interrupted"),
        (lambda: cli.check_rates(Config(dropout=2.0), "dropout"), 2,
         "error: --dropout: got 2.0, expected 0 <= dropout < 1"),
        (lambda: lstmjax.init_lstm(None, 3, 3, proj_size=0), 2, "error: proj_size: got 0,"),
    ],
)  # fmt: skip
def test_main_turns_what_a_user_can_mend_into_one_line(run, code, line, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(run)
    err = capsys.readouterr().err
    assert stop.value.code == code and err.startswith(line) and err.count("\n") == 1


def test_main_says_flags_of_arguments_of_the_same_name(capsys):
    cli.parse(Config, argv=[])
    with pytest.raises(SystemExit):
        cli.main(lambda: lstmjax.dropout(None, None, 2.0))  # its argument is `rate`, no flag here
    with pytest.raises(SystemExit):
        cli.main(lambda: lstmjax.stack(lstmjax.lstm, [], None, dropout=2.0))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: rate: got 2.0, expected 0 <= rate < 1"
    assert second == "error: --dropout: got 2.0, expected 0 <= dropout < 1"


def test_main_leaves_bugs_their_traceback():
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(lambda: int("x"))
    with pytest.raises(ValueError, match="somebody else's"):
        cli.main(raising(ValueError("somebody else's")))
    with pytest.raises(TypeError):
        cli.main(lambda: None + 1)
    with pytest.raises(SystemExit) as stop:
        cli.main(lambda: sys.exit(7))
    assert stop.value.code == 7
    assert cli.main(lambda: 5) is None


SCRIPT = '''
import sys
from lstmjax import cli

def run():
    print("first", flush=True)
    if "check" in sys.argv:
        raise ValueError(
            "--epochs: too many"
        )
    if "bug" in sys.argv:
        a, b = [1]
    for i in range(10**5):
        print(i)

cli.main(run)
'''  # fmt: skip


def test_a_script_says_its_own_errors_in_one_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, str(script), *arguments], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    out, err = start("check").communicate()
    assert (out, err) == ("first\n", "error: --epochs: too many\n")
    bug = start("bug")
    assert "not enough values to unpack" in bug.communicate()[1] and bug.returncode == 1
    with start() as cut:  # as `script.py | head -1` does
        assert cut.stdout.readline() == "first\n"
        cut.stdout.close()
        assert cut.stderr.read() == "" and cut.wait() == 1
