"""The README's Python, run as a reader would type it."""

import re
from pathlib import Path

import jax
import numpy as np

from lstmjax import init_state

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_snippets_run():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["hs"].shape == (20, 4, 16)
    assert not np.any(names["hs"][:, 2])  # the row of length 0
    # The last step defined is the one with an axis; on one device it goes under vmap.
    state = init_state(names["params"], names["tx"], jax.random.key(2))
    batch = {"x": names["xs"][:, None], "y": np.ones((1, 4, 16), np.float32)}
    batch["weight"] = np.ones((1, 4), np.float32)
    axes = ({"x": 1, "y": 0, "weight": 0},)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam
        step = jax.vmap(names["step"], (None, *axes), None, axis_name="batch")
        state, metrics = step(state, batch)
    assert int(state.step) == 1 and float(metrics["loss"][1]) == 4


def test_the_files_it_links_to_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 6
    missing = [link for link in links if not (Path(__file__).parents[1] / link).exists()]
    assert missing == []
