"""The import graph: arrows point downwards only, and every foreign package has its place."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lstmjax"

# From top to bottom: a module imports from the lines below its own, never from its own line or from
# above. A new file of lstmjax has to be given its place here.
LAYERS = (
    {"classifier", "review_checks", "review_training"},
    {"card_subjects", "lane_classifiers", "lane_series", "pretrained", "results"},
    {"bag", "diagnose", "lane_runs", "language", "verify", "whole_reviewer"},
    {"keeper", "review_model", "scores"},
    {"compare", "digits_reader", "distributed", "lanes", "reviewer"},
    {"cards", "finished", "releases"},
    {"checkpoint", "cli", "tables"},
    {"overview_tables"},
    {"diagnostic_plots", "flow_plots", "seconds_plots", "truncation_plots", "what_matters_plots"},
    {"flow_tables", "long_lag_plots", "long_lag_tables", "truncation_tables"},
    {"seconds_tables", "soak_plots", "soak_tables", "what_matters_tables"},
    {"reproducible", "seeds"},
    {"diagnostics", "models", "nnx", "parallel", "plots", "records"},
    {"timing_plots", "timing_tables"},
    {"linen", "updates"},
    {"train"},
    {"gates", "interop", "losses", "optim", "precision", "provenance", "rows", "schema", "timings"},
    {"adversary", "averages", "events", "folders", "gpu_tables", "peer_tables"},
    {"keras_files", "layouts", "variants"},
    {"hdf5", "hdf5_process"},
    {"data"},
    {"cells", "streaming"},
    {"gru", "lstm", "rnn"},
    {"gated"},
    {"cudnn", "fused_cells", "onednn"},
    {"fused"},
    {"fused_parts"},
    {"pieces"},
    {"recurrence"},
    {"bptt", "dropout", "initializers", "sharded", "weight_trees"},
    {"tangents"},
    {"checks", "last_words"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
CORE = set().union(*LAYERS[LEVEL["lstm"] :])
FLAX = {"models", "linen", "nnx", "interop"}


def imports(source: str) -> list[str]:
    """The full dotted name of everything a file imports, inside functions too.

    What stands under `if __name__ == "__main__":` is the file as a program, and not followed.
    """
    names = []
    tree = ast.parse(source)
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "__main__" in ast.dump(n))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names += [f"{prefix}.{alias.name}" for alias in node.names]
    return names


def violations(module: str, source: str) -> list[str]:
    """What a module of lstmjax (`lstm`, `data.imdb`) may not import and does."""
    found = []
    own = module.split(".")[0]
    for name in imports(source):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "":
            found.append(f"{name}: relative imports hide where an arrow points")
        elif top == "experiments":
            found.append(f"{name}: nothing imports experiments")
        elif top in ("flax", "haiku", "equinox") and own not in FLAX:
            found.append(f"{name}: only {', '.join(sorted(FLAX))} import {top}")
        elif top in ("tensorflow", "keras", "torch"):
            found.append(f"{name}: other frameworks are not needed to run lstmjax")
        elif own == "data" and top in ("jax", "jaxlib", "optax"):
            found.append(f"{name}: data never sees jax")
        elif own in CORE and top in ("optax", "matplotlib", "tensorflow_datasets", "tyro"):
            found.append(f"{name}: the core needs jax alone")
        elif top == "lstmjax" and own == "data" and target != "data":
            found.append(f"{name}: every other part of lstmjax sees jax")
        elif top == "lstmjax" and target not in ("__version__", "data" if own == "data" else ""):
            if LEVEL.get(target, -1) <= LEVEL[own]:
                found.append(f"{name}: {own} does not lie above {target}")
    return found


def modules() -> list[tuple[str, Path]]:
    """Every module of lstmjax but the package itself, as `(dotted name, file)`."""
    files = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files]
    pairs = zip(names, files, strict=True)
    return [(n.removesuffix(".__init__"), file) for n, file in pairs if n != "__init__"]


@pytest.mark.parametrize("module, file", modules(), ids=lambda value: str(value).split("/")[-1])
def test_arrows_point_downwards(module, file):
    assert module.split(".")[0] in LEVEL, f"give {module} a place in LAYERS"
    assert violations(module, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.py")), ids=lambda f: f.name)
def test_experiments_do_not_import_each_other(file):
    assert [n for n in imports(file.read_text("utf-8")) if n.split(".")[0] == "experiments"] == []


def test_the_package_only_re_exports():
    """`lstmjax/__init__.py` holds its docstring, imports from lstmjax, __version__ and __all__."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert isinstance(tree.body[0], ast.Expr) and ast.get_docstring(tree)
    assigned, imported = [], []
    for node in tree.body[1:]:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] == "lstmjax"
            # Records, figures and command lines are asked for by name: `import lstmjax` is quick.
            assert LEVEL[node.module.split(".")[1]] >= LEVEL["train"], node.module
            imported += [alias.asname or alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.Assign)
            assigned += [target.id for target in node.targets]
    assert sorted(assigned) == ["__all__", "__version__"]
    (exported,) = (n.value for n in tree.body if getattr(n, "targets", [None])[0] is not None
                   and n.targets[0].id == "__all__")  # fmt: skip
    assert sorted(ast.literal_eval(exported)) == sorted(imported)


@pytest.mark.parametrize(
    "module, source, count",
    [
        ("recurrence", "from lstmjax.lstm import lstm", 1),  # upwards
        ("lstm", "from lstmjax import recurrence, checks", 0),
        ("lstm", "from lstmjax.gru import gru", 1),  # sideways
        ("lstm", "def f():\n    import flax.linen as nn", 1),  # hidden in a function
        ("models", "import flax.linen as nn\nfrom lstmjax.lstm import lstm", 0),
        ("train", "from lstmjax import models, optim", 1),
        ("data.imdb", "import numpy\nfrom lstmjax.data import text", 0),
        ("data.imdb", "import jax.numpy as jnp", 1),
        ("data.imdb", "from lstmjax import checks\nfrom lstmjax.records import Run", 2),
        ("optim", "import optax", 0),
        ("gru", "import optax", 1),
        ("train", "from . import losses", 1),
        ("cli", "from experiments import imdb\nfrom experiments.imdb import Config", 2),
        ("records", "if __name__ == '__main__':\n    from lstmjax.results import command", 0),
        ("records", "from lstmjax.results import command", 1),
        ("records", "from lstmjax import __version__", 0),
        ("records", "from lstmjax.nowhere import thing", 1),
    ],
)
def test_the_guard_itself(module, source, count):
    assert len(violations(module, source)) == count
