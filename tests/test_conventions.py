"""docs/conventions.md: its examples run, and its tables know what the code knows; other pages'."""

import doctest
import re
from pathlib import Path

import lstmjax
from lstmjax import interop
from lstmjax.initializers import INITS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "conventions.md"


def test_the_examples_run():
    text = re.sub(r"^```.*$", "", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    example = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    output = []
    runner.run(example, out=output.append)
    assert runner.tries > 15
    assert runner.failures == 0, "".join(output)


def test_every_framework_and_law_is_named():
    text = PAGE.read_text(encoding="utf-8")
    for name in INITS:
        assert f"`{name}`" in text, name
    assert all(name in text for name in interop.FRAMEWORKS)


def test_every_function_that_is_named_exists():
    text = PAGE.read_text(encoding="utf-8")
    section = text[text.index("## Dropout") : text.index("## Training")]
    column = "".join(line.split("|")[3] for line in section.splitlines() if line.count("|") == 4)
    names = set(re.findall(r"`(\w+)", column))
    assert len(names) >= 7
    assert not [name for name in names if not hasattr(lstmjax, name)]


def test_the_example_of_truncation_runs():
    """docs/through-time.md; its last line says two numbers in a comment."""
    text = PAGE.with_name("through-time.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    *lines, last = code.strip().splitlines()
    names = {}
    exec("\n".join(lines), names)
    said, comment = last.split("#")
    assert [str(int(n)) for n in eval(said, names)] == re.findall(r"\d+", comment)
    assert names["g"].w_h.shape == (8, 32)
