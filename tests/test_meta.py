"""The files around the code: licence, citation, changelog, contributing, .ci/run, README."""

import hashlib
import os
import re
import tomllib
from pathlib import Path

import pytest

import lstmjax
from lstmjax import results

ROOT = Path(__file__).resolve().parents[1]
# A fingerprint of the licence's text as the Apache Software Foundation publishes it.
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def project():
    return tomllib.loads(read("pyproject.toml"))["project"]


def test_citation_is_valid_and_would_be_found_invalid():
    from cffconvert import Citation

    text = read("CITATION.cff")
    Citation(text).validate()
    assert f"(version {lstmjax.__version__})" in Citation(text).as_apalike()
    for wrong in (text.replace("title:", "titel:"), text.replace("Apache-2.0", "Apache-9.0")):
        with pytest.raises(Exception, match="titel|title|Apache-9.0"):
            Citation(wrong).validate()


def test_one_version_everywhere():
    (cited,) = re.findall(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE)
    newest = re.findall(r"^## \[(.+?)\] - (.+)$", read("CHANGELOG.md"), re.MULTILINE)[0]
    assert cited == newest[0] == lstmjax.__version__
    assert f"version = {{{cited}}}" in read("README.md")
    assert newest[1] == "Unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", newest[1])
    assert "version" in project()["dynamic"]  # which takes it from lstmjax/__init__.py


def test_licence_is_apache_2_and_named_alike():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2
    (cited,) = re.findall(r"^license: (.+)$", read("CITATION.cff"), re.MULTILINE)
    assert cited == project()["license"] == "Apache-2.0"


def test_types_are_published():
    assert (ROOT / "lstmjax" / "py.typed").read_bytes() == b""


def test_every_dependency_has_a_tested_lower_bound():
    needs = project()["dependencies"] + project()["optional-dependencies"]["test"]
    assert [need for need in needs if not re.match(r"^[\w-]+>=\d", need)] == []
    assert "--resolution lowest-direct" in read("CONTRIBUTING.md")
    # 0.11.1 runs a scan in quadratic time.
    assert "jaxlib>=0.10.2,!=0.11.1" in needs and "jax>=0.10.2,!=0.11.1" in needs


def test_ci_runs_the_commands_of_the_readme_and_of_contributing():
    script, readme, contributing = read(".ci/run"), read("README.md"), read("CONTRIBUTING.md")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    test_command = "pip install -e '.[test]' && pytest"
    assert f"\n{test_command}" in script and test_command in readme
    assert "pip install -e . && python experiments/imdb.py" in readme
    for command in ("ruff check .", "ruff format --check ."):
        assert f"\n{command}\n" in script and command in contributing


def test_tables_are_what_the_records_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    results.table(results.Table(check=True))


def test_no_published_file_names_a_folder_of_somebodys_machine():
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *(ROOT / "experiments").rglob("*.json")]
    assert len(files) >= 3
    found = {
        f.name: re.findall(r"(?<![\w.~:/])/[a-z]+/[\w.-]+", f.read_text("utf-8")) for f in files
    }
    assert {name: paths for name, paths in found.items() if paths} == {}
