"""The content of an HDF5 file, read by a process of its own.

The HDF5 library takes what a file says at its word: it follows links into other files, allocates
what sizes claim, and from some damaged files it does not come back. So it runs in a process with
limits of memory and time (hdf5_process.py), and what comes from there is plain arrays and text.
"""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lstmjax.data import files

PROCESS = Path(__file__).with_name("hdf5_process.py")
MEGABYTES = 256  # for the library, beside what the content may take
SECONDS = 4  # of processor time, and one more for each 10 MB
WALL = 20  # times as much on the clock: the machine may be busy


class Group(dict):
    """A group: groups and arrays by name.

    Attributes:
      name: its own, the last part of its path.
      attrs: lists of names and configurations, by attribute.
    """

    def __init__(self, name: str, attrs: dict[str, Any]):
        super().__init__()
        self.name, self.attrs = name, attrs

    def at(self, path: str) -> Any:
        """What stands at a path within the group; KeyError where there is nothing."""
        node = self
        for part in filter(None, path.split("/")):
            if not isinstance(node, Group) or part not in node:
                raise KeyError(path)
            node = node[part]
        return node


def read(file: str | os.PathLike | bytes) -> Group:
    """The tree of groups and arrays of numbers in a file.

    Args:
      file: its path, or its content.

    Returns:
      The root. Names stand in the order of the file; arrays have the dtype they are stored in, 2
      opaque bytes for bfloat16.

    Raises:
      ValueError: a file that is damaged, refers to others, takes more than `files.unpacked` of its
        size, or more time and memory than its size gives reason for.
    """
    content = file if isinstance(file, bytes) else None
    size = os.stat(file).st_size if content is None else len(content)
    most, seconds = files.unpacked(size), SECONDS + size // 10**7
    megabytes = MEGABYTES + 2 * most // 2**20
    asked = [
        os.path.abspath(file) if content is None else "-",
        *map(str, (megabytes, seconds, most)),
    ]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(PROCESS), *asked],
            input=content or b"",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | variables,
            timeout=WALL * seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"a file that takes more than {seconds} s to read") from error
    if done.returncode in (-signal.SIGKILL, -getattr(signal, "SIGXCPU", 0)):
        raise ValueError(f"a file that takes more than {seconds} s to read")
    if done.returncode:
        raise ValueError(f"a file on which the HDF5 library ends with {done.returncode}")
    return _tree(done.stdout)


def _tree(answer: bytes) -> Group:
    """The tree that a process has written down."""
    root, position = Group("", {}), 0
    while True:
        end = answer.find(b"\n", position)
        if end < 0:
            raise ValueError("a file that is read only in part")
        words, position = files.parse_json(answer[position:end]), end + 1
        if "error" in words:
            raise ValueError(words["error"])
        if "end" in words:
            return _without_gaps(root)
        path = words.get("group") or words["array"]
        above, _, name = path.strip("/").rpartition("/")
        if "group" in words:
            node = Group(name, words["attrs"])
            node |= dict.fromkeys(words["members"])  # so that they stand in this order
        else:
            dtype, shape = np.dtype(words["dtype"]), words["shape"]
            if dtype.kind not in "fiuV" or dtype.itemsize == 0:
                raise ValueError(f"an array of {dtype}, expected numbers")
            count = math.prod(shape)
            node = np.frombuffer(answer, dtype, count, position).reshape(shape).copy()
            position += node.nbytes
        if path == "/":
            root = node
        else:
            root.at(above)[name] = node


def _without_gaps(group: Group) -> Group:
    """The group without members that are no numbers, which have not been written down."""
    for name, node in list(group.items()):
        if node is None:
            del group[name]
        elif isinstance(node, Group):
            _without_gaps(node)
    return group
