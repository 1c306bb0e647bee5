"""Command lines: a frozen dataclass becomes the flags, and every wrong value gets one clear line.

An experiment states its settings as a frozen dataclass, with a docstring below each field for
`--help`, and starts with

    if __name__ == "__main__":
        cli.main(lambda: train(cli.parse(Config, presets=PRESETS, description=__doc__)))
"""

import dataclasses
import difflib
import inspect
import io
import linecache
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jax.errors import JaxRuntimeError

from lstmjax.data.dataset import DataError
from lstmjax.records import RunError, RunStopped, read_config

Config = TypeVar("Config")

# What may be given beside --resume: none of it changes what a run computes, but that another number
# of devices draws other masks, of which the run warns.
RESUMED_WITH = (
    "resume", "devices", "save_every", "keep", "on_nan", "live", "budget",
    "distributed", "coordinator", "num_processes", "process_id",
)  # fmt: skip
STOPPED = 75  # the exit code of a run that was asked to end and has saved itself

# The fields of the configuration that was parsed: what is said of an argument of the same name is
# said of the flag.
_fields: set[str] = set()

_WORDS = {int: "an integer", float: "a number", str: "text", type(None): "None"}


class ConfigError(ValueError):
    """A flag's value that cannot be used; the message is one clear line."""


# ---- parsing ------------------------------------------------------------------------------------


def parse(
    config_class: type[Config],
    *,
    presets: Mapping[str, Config] | None = None,
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> Config:
    """Reads the command line into a frozen dataclass.

    Every field is a flag `--field-name`; booleans are `--flag` and `--no-flag`. `--preset NAME`
    chooses the defaults (so `--preset keras --help` shows the numbers of that preset), and every
    other flag overrides it. `--resume DIR` takes all settings from the run in that folder; only
    what does not change its numbers (`RESUMED_WITH`) can be given beside it.

    Args:
      config_class: a dataclass; with presets it has a field `preset: str`.
      presets: configurations by name. Without `--preset` the default of the field `preset` holds.
      argv: the arguments; those of this process where None.
      description: the text above the flags in `--help`.

    Returns:
      An instance of `config_class`.

    Raises:
      SystemExit: with 0 after `--help`; with 2 after one line `error: …` on standard error, which
        names the flag, what came and what was expected.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    _fields.clear()
    _fields.update(f.name for f in dataclasses.fields(config_class) if not _is_positional(f.type))
    folder = _value(argv, "resume") if "resume" in _fields else None
    if folder is not None:
        before = stored_config(config_class, folder, "resume")
        defaults = {"default": dataclasses.replace(before, resume=folder)}
    else:
        defaults = {} if presets is None else {"default": _preset(config_class, presets, argv)}
    description = inspect.cleandoc(description) if description else None
    complaint = io.StringIO()
    try:
        # tyro draws its complaints as a box of several lines; ours is one line.
        with redirect_stderr(complaint):
            prog = Path(sys.argv[0]).name
            config = tyro.cli(
                config_class, prog=prog, args=argv, description=description, **defaults
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    else:
        if folder is not None:
            _check_resumed(config, defaults["default"], folder)
        return config
    _fail(_explain(config_class, argv) or _condensed(complaint.getvalue()), 2)


def _preset(config_class: type, presets: Mapping[str, Any], argv: Sequence[str]) -> Any:
    """The preset that the arguments ask for (the last one, as with every flag)."""
    name = next(f.default for f in dataclasses.fields(config_class) if f.name == "preset")
    name = _value(argv, "preset") or name
    if name not in presets:
        _fail(f"--preset: got {name!r}, expected one of {', '.join(presets)}", 2)
    return presets[name]


def _value(argv: Sequence[str], name: str) -> str | None:
    """What the arguments give for a flag, the last time they do; None where they do not."""
    found = None
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag == f"--{name}" and (equals or i + 1 < len(argv)):
            found = value if equals else argv[i + 1]
    return found


def stored_config(config_class: type[Config], folder: str | os.PathLike, flag: str) -> Config:
    """The configuration of the run in a folder; settings that it does not know have defaults.

    Args:
      config_class: the dataclass.
      folder: of the run.
      flag: that named the folder, for errors.

    Raises:
      RunError: the folder or its config.json cannot be read; a setting is unknown or not of the
        kind that the dataclass says.
    """
    settings = read_config(folder)
    fields = {field.name for field in dataclasses.fields(config_class)}
    if strange := sorted(settings.keys() - fields):
        raise RunError(f"--{flag}: the run in {folder} has the setting {strange[0]}, unknown here")
    hints = typing.get_type_hints(config_class)
    for name, value in settings.items():
        if not any(_holds(kind, value) for kind in _kinds(hints[name])):
            raise RunError(f"--{flag}: {folder}/config.json is damaged: {name} is {value!r}")
    return config_class(**settings)


def _holds(kind: Any, value: Any) -> bool:
    """Whether a value from JSON is of a kind that ``_kinds`` gives; kinds not known here pass."""
    if kind is type(None):
        return value is None
    if kind in (int, float):
        return type(value) in (int, kind)
    return isinstance(value, kind) if isinstance(kind, type) else value == kind


def _check_resumed(config: Any, before: Any, folder: str) -> None:
    """A run that is taken up again keeps the settings that its numbers depend on."""
    for name in (field.name for field in dataclasses.fields(config)):
        was, given = getattr(before, name), getattr(config, name)
        if given != was and name not in RESUMED_WITH:
            flag = f"--{name.replace('_', '-')}"
            _fail(f"{flag}: got {given}, expected {was} as in {folder}, or --resume without it", 2)


def _is_positional(hint: Any) -> bool:
    """Whether an argument is no flag: nothing else is annotated here."""
    return typing.get_origin(hint) is typing.Annotated


def _explain(config_class: type, argv: Sequence[str]) -> str | None:
    """The first argument that does not fit the dataclass, in one line; None where all seem to."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    flags = {n.replace("_", "-"): hint for n, hint in hints.items() if not _is_positional(hint)}
    # Positional arguments and flags of several values are left to tyro.
    positional = len(flags) < len(hints)
    one_each = not positional and not {tuple, list} & set(map(typing.get_origin, hints.values()))
    aside = "; what is no flag but begins with - goes last, after --" if positional else ""
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "--" and positional:  # no flag follows
            late = next((a for a in rest if a[:2] == "--" and _flag(a) in flags), None)
            return late and f"got {late!r} after --, expected flags before it"
        flag, equals, value = argument.removeprefix("--").partition("=")
        name = _flag(argument)
        switch = name if flags.get(name) is bool else name.removeprefix("no-")
        if not argument.startswith("--"):
            if argument.startswith("-") and argument != "-h":
                return f"{argument}: no such flag, see --help{aside}"
            if one_each:
                return f"got {argument!r}, expected a flag, see --help"
            continue
        if flags.get(switch) is bool:
            stray = value if equals else next((a for a in rest[:1] if not a.startswith("-")), None)
            if stray is not None:
                return f"--{switch}: got {stray!r}, expected --{switch} or --no-{switch} alone"
            continue
        if name not in flags:
            return f"--{flag}: no such flag, {_suggestion(name, flags) or f'see --help{aside}'}"
        kinds = _kinds(flags[name])
        if not equals:
            if not rest or rest[0].startswith("--"):
                return f"--{name}: got no value, expected {_expected(kinds)}"
            value = rest.pop(0)
        if not any(_reads(kind, value) for kind in kinds):
            return f"--{name}: got {value!r}, expected {_expected(kinds)}"
    return None


def _flag(argument: str) -> str:
    """The name in `--name`, `--name=value`, with hyphens."""
    return argument.removeprefix("--").partition("=")[0].replace("_", "-")


def _suggestion(name: str, flags: Mapping[str, Any]) -> str:
    """The flag that looks most like a misspelt one; "" where none does."""
    known = list(flags)
    if name.startswith("no-"):
        known += [f"no-{flag}" for flag, hint in flags.items() if hint is bool]
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean --{close[0]}?" if close else ""


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint: the choices of a Literal, the members of a union."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for member in typing.get_args(hint) for kind in _kinds(member))
    return (hint,)


def _reads(kind: Any, text: str) -> bool:
    """Whether an argument's text can be read as that kind; kinds not known here pass."""
    if not isinstance(kind, type):
        return text == str(kind) if isinstance(kind, (str, int)) else True
    if kind is type(None):
        return text == "None"
    if kind not in (int, float):
        return True
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _expected(kinds: Sequence[Any]) -> str:
    """`one of lstm, gru` or `an integer or None`."""
    choices = [str(kind) for kind in kinds if not isinstance(kind, type)]
    words = [_WORDS.get(kind, kind.__name__) for kind in kinds if isinstance(kind, type)]
    return " or ".join(([f"one of {', '.join(choices)}"] if choices else []) + words)


def _condensed(boxed: str) -> str:
    """tyro's own words without the box around them, in one line."""
    # The box is drawn with + - | where the output cannot take its proper characters.
    text = re.sub(r"[\u2500-\u257f]+|-{3,}|^[+|]|[+|]$", " ", boxed.partition("\n")[2], flags=re.M)
    return " ".join(text.split("For full helptext")[0].split())


# ---- checking -----------------------------------------------------------------------------------


def check(config: Any, name: str, holds: bool, expected: str) -> None:
    """Raises ConfigError, `--dropout: got 1.5, expected 0 <= dropout < 1`, where `holds` is False.

    Args:
      config: the dataclass.
      name: the field, as it is written there.
      holds: whether its value can be used.
      expected: what would have been right.
    """
    if not holds:
        value = getattr(config, name)
        raise ConfigError(f"--{name.replace('_', '-')}: got {value}, expected {expected}")


def check_counts(config: Any, *names: str, least: int = 1) -> None:
    """Each field is an integer of at least `least`; None passes where the field may be None.

    Sizes and seeds are 32-bit numbers to JAX: a larger one would overflow, or be cut off.
    """
    for name in names:
        value = getattr(config, name)
        check(config, name, value is None or value >= least, f"an integer of at least {least}")
        check(config, name, value is None or value < 2**31, f"an integer below {2**31}")


def check_rates(config: Any, *names: str) -> None:
    """Each field is a dropout rate: 0 <= rate < 1."""
    for name in names:
        check(config, name, 0 <= getattr(config, name) < 1, f"0 <= {name} < 1")


def check_positive(config: Any, *names: str) -> None:
    """Each field is a finite number above 0; None passes where the field may be None."""
    for name in names:
        value = getattr(config, name)
        holds = value is None or (math.isfinite(value) and value > 0)
        check(config, name, holds, "a finite number above 0")


def check_method(config: Any) -> None:
    """A kernel of others, onednn or cudnn, runs the plain LSTM, and drops nothing on its way.

    Of its options a program need not have more than the cell and the unrolling.
    """
    if config.method in ("onednn", "cudnn"):
        method = f"with --method {config.method}"
        check(config, "cell", config.cell == "lstm", f"lstm {method}")
        check(config, "unroll", config.unroll == 1, f"1 {method}")
        for name in ("recurrent_dropout", "zoneout"):
            check(config, name, not getattr(config, name, 0), f"0 {method}")
        check(config, "mask", not getattr(config, "mask", False), f"none {method}")


# ---- running ------------------------------------------------------------------------------------


def main(run: Callable[[], Any]) -> None:
    """Runs an experiment; what the user can mend becomes one line on standard error.

    Exit codes: 2 for a value that cannot be used (a ValueError raised by lstmjax or the script), 1
    for data, run folders, the operating system (DataError, RunError, OSError) and memory that does
    not suffice, 130 for Ctrl-C.
    Everything else is a bug and keeps its traceback.
    """
    try:
        run()
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except RunStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(STOPPED)
    except BrokenPipeError:
        # Whoever read our output has gone (`… | head`): nothing is left to be said to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError as error:
        _fail(f"out of memory: {error}", 1)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        _fail(f"out of memory: {str(error).splitlines()[0]}", 1)
    except (DataError, RunError) as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except ValueError as error:
        if not _is_ours(error):
            raise
        name = str(error).partition(":")[0]
        flag = f"--{name.replace('_', '-')}" if name in _fields else name
        _fail(str(error).replace(name, flag, 1), 2)


def _is_ours(error: ValueError) -> bool:
    """Whether lstmjax or the script raised the error on purpose.

    A ValueError that NumPy or a failed unpacking raises is a bug, whatever line of ours it
    passed through; one whose last traceback line is a `raise` statement of ours is a message.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    file = Path(last.tb_frame.f_code.co_filename)
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "-")
    ours = Path(__file__).resolve().parent in file.resolve().parents
    statement = linecache.getline(str(file), last.tb_lineno).strip()
    return (ours or file.resolve() == script.resolve()) and statement.startswith("raise ")


def _fail(message: str, code: int) -> NoReturn:
    """One line on standard error, and the exit code."""
    line = " ".join(message.split())  # which may hold a file's content: not all of it is shown
    print(f"error: {line if len(line) <= 1000 else f'{line[:1000]} …'}", file=sys.stderr)
    sys.exit(code)
