"""Archives, arrays, TFDS folders, HDF5 and JSON made to do harm: what is looked at first."""

import gzip
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "experiments"))  # where the readers stand that fuzz.py tries, too

from fuzzing import folders, worker  # noqa: E402
from fuzzing.mutations import written  # noqa: E402

from lstmjax import hdf5, interop, weight_trees  # noqa: E402
from lstmjax.data import DataError, cache, files, prepare, prepared, shards  # noqa: E402

needs_h5py = pytest.mark.skipif(importlib.util.find_spec("h5py") is None, reason="needs h5py")


def refused(call, *parts):
    """Asserts that a call ends in one line of ours with these words."""
    with pytest.raises((DataError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.fixture(scope="module")
def digits():
    """A folder of digits as TFDS leaves it, as {path: content}."""
    return folders.tfds_seeds("mnist")[0]


@pytest.fixture
def read():
    return worker.READERS["tfds_digits"].read


# ---- archives -----------------------------------------------------------------------------------


def tar(*members):
    """A .tar.gz of (name, content or None, more fields of the header)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, None if content is None else io.BytesIO(content))
    return gzip.compress(packed.getvalue())


GOOD = ("aclImdb/train/pos/0_7.txt", b"a film", {})
LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
TARS = {
    "absolute": (tar(("/etc/outside.txt", b"x", {})), "lies outside of it"),
    "above": (tar(GOOD, ("aclImdb/../../outside.txt", b"x", {})), "lies outside of it"),
    "symlink": (tar(GOOD, ("aclImdb/a.txt", None, LINK)), "neither a file nor a folder"),
    "hard link": (tar(GOOD, ("aclImdb/a", None, LINK | {"type": b"1"})), "neither a file nor"),
    "device": (tar(("aclImdb/a.txt", None, {"type": b"3"})), "neither a file nor a folder"),
    "pipe": (tar(("aclImdb/a.txt", None, {"type": b"6"})), "neither a file nor a folder"),
    "sparse": (tar(("aclImdb/a.txt", None, {"type": b"S"})), "it"),
    "large": (tar(("aclImdb/a.txt", b"x" * 3000, {})), "takes 3,000 bytes"),
    "claims": (tar(GOOD, ("aclImdb/a.txt", None, {"size": 10**15})), "takes 1,000,000,000,000,000"),
    "claims unread": (tar(GOOD, ("aclImdb/a.feat", None, {"size": 2**80})), "takes 1,208,925,819"),
    "claims below 0": (tar(GOOD, ("aclImdb/a.feat", None, {"size": -(2**40)})), ""),
    "long name": (tar(("a" * 5000, b"", {})), "a header of 5,001 bytes"),
    "many": (tar(*[GOOD] * 30), "more than 20 members"),
    "bomb": (tar(*[("aclImdb/a.bin", bytes(9000), {})] * 15), "unpacks to more than 100,000 bytes"),
    "no gzip": (b"x" * 100, "BadGzipFile"),
    "half": (tar(GOOD)[:-20], "is no archive of reviews"),
}


@pytest.mark.parametrize("kind", TARS)
def test_archives_are_refused_and_nothing_is_written(kind, tmp_path, monkeypatch):
    for name, value in {"REVIEW": 2000, "ARCHIVE": 100_000, "HEADER": 4000}.items():
        monkeypatch.setattr(prepare, f"{name}_BYTES", value)
    monkeypatch.setattr(prepare, "ARCHIVE_MEMBERS", 20)
    content, words = TARS[kind]
    path = tmp_path / "in" / "reviews.tar.gz"
    written({"reviews.tar.gz": content}, tmp_path / "in")
    refused(lambda: list(prepare._members(path)), "reviews.tar.gz", words, "download it again")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "in", path]


def test_a_whole_archive_is_read(tmp_path):
    more = [("aclImdb", None, {"type": tarfile.DIRTYPE}), ("aclImdb/imdb.vocab", b"the", {})]
    written({"a": tar(*more, GOOD)}, tmp_path / "in")
    found = list(prepare._members(tmp_path / "in" / "a"))
    assert [(name, file.read()) for name, file in found] == [(GOOD[0], GOOD[1])]


def npz(method=zipfile.ZIP_DEFLATED, **members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def npy(shape, dtype, data):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


NPZ = {
    "huge shape": (npz(a=npy((10**12,), "<f8", b"")), "an array of float64[1000000000000] in 0"),
    "two minus": (npz(a=npy((-1, -5), "|u1", bytes(5))), "an array of uint8[-1, -5] in 5 bytes"),
    "no size": (npz(a=npy((10**9,), "|S0", b"")), "expected numbers or text"),
    "objects": (npz(a=npy((1,), "|O", b"\x80\x04.")), "an array of object"),
    "structure": (npz(a=npy((1,), "|V8", bytes(8))), "expected numbers or text"),
    "twice": (npz(**{"a.npy": npy((1,), "|u1", b"1"), "a": npy((1,), "|u1", b"1")}), "same name"),
    "bomb": (npz(a=npy((2**25,), "|u1", bytes(2**25))), "bytes that unpack to 33,"),
    "bzip2": (npz(zipfile.ZIP_BZIP2, a=npy((1,), "|u1", b"1")), "another method than deflate"),
    "deep": (npz(a=npy("(" * 90, "|u1", b"")), ""),
    "no zip": (b"PK\x03\x04 nothing", "not a zip file"),
}


@pytest.mark.parametrize("kind", NPZ)
def test_npz_files_take_no_more_than_they_hold(kind, tmp_path):
    content, words = NPZ[kind]
    path = written({"a.npz": content}, tmp_path / "in") / "a.npz"
    tracemalloc.start()
    refused(lambda: files.read_arrays(path), words)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    # The cache makes such a file again, and the new one is whole.
    for _ in range(2):
        got = cache.cached("a", "k", lambda: {"x": np.arange(3)}, tmp_path)
        np.testing.assert_array_equal(got["x"], np.arange(3))
        (tmp_path / "a-k.npz").write_bytes(content)


def test_a_cache_that_is_whole_and_not_ours_is_made_again(tmp_path):
    cache.cached("a", "k", lambda: {"x": np.arange(4)}, tmp_path)
    kept = cache.cached("a", "k", lambda: pytest.fail("made again"), tmp_path, lambda a: True)
    np.testing.assert_array_equal(kept["x"], np.arange(4))
    made = cache.cached("a", "k", lambda: {"x": np.arange(3)}, tmp_path, lambda a: len(a["x"]) == 3)
    np.testing.assert_array_equal(made["x"], np.arange(3))


def test_idx_files_take_no_more_than_their_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "IDX_BYTES", 1000)
    good = bytes([0, 0, 8, 1, 0, 0, 0, 4])
    cases = {
        good + b"1234": None,
        good + bytes(10**7): "reshape",
        bytes([0, 0, 8, 1, 0, 0, 3, 233]) + bytes(1001): "its sizes are (1001,)",
        bytes([0, 0, 8, 2]) + b"\xff" * 8 + b"1": "its sizes are (-1, -1)",
        bytes([0, 0, 8, 255]) + b"\x7f" * 1020: "its sizes are",
        bytes([0, 0, 8, 0]): "does not begin like",
        b"\0\0": "does not begin like",
    }
    for content, words in cases.items():
        (tmp_path / "a.gz").write_bytes(gzip.compress(content))
        tracemalloc.start()
        if words is None:
            np.testing.assert_array_equal(prepare.read_idx(tmp_path / "a.gz"), list(b"1234"))
        else:
            refused(lambda: prepare.read_idx(tmp_path / "a.gz"), "no whole idx file", words)
        assert tracemalloc.get_traced_memory()[1] < 2**18
        tracemalloc.stop()


@needs_h5py
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_keras_archive_takes_no_more_than_it_holds(method, tmp_path):
    path = tmp_path / "bomb.keras"
    members = {"config.json": "{}", "model.weights.h5": bytes(2**25)}
    path.write_bytes(npz(method, **members))
    tracemalloc.start()
    refused(lambda: interop.load_keras_file(path), "bomb.keras: got")
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


# ---- TFDS folders -------------------------------------------------------------------------------


def test_no_module_is_imported_because_a_file_names_it(digits, read, tmp_path, monkeypatch):
    marker = tmp_path / "imported"
    (tmp_path / "evil_module.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    named = {"pythonClassName": "evil_module.X"}
    for place, more in (
        ((), named),
        (("featuresDict", "features", "label"), named),
        (("featuresDict", "features", "label"), {"type": "evil_module.X"}),
        (("featuresDict", "features"), {"more": named}),
    ):
        whole = inner = json.loads(digits["features.json"])
        for key in place:
            inner = inner[key]
        inner |= more
        folder = tmp_path / f"{len(place)} {list(more)}"
        written(digits | {"features.json": json.dumps(whole).encode()}, folder)
        result = worker.once(read, folder)
        assert result.outcome == "refused" and "features.json does not describe" in result.words
    assert not marker.exists()
    from tensorflow_datasets.core.features import FeatureConnector

    with pytest.raises(ValueError):
        FeatureConnector.cls_from_name("evil_module.X")
    assert marker.exists()  # TFDS would have


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shardLengths": ["1000000000000"]}, "has fewer than 1000000000000 records"),
        ({"shardLengths": ["-3"]}, "files, and lengths for"),
        ({"shardLengths": ["3", "3"]}, "train has 1 files, and lengths for 2"),
        ({"filepathTemplate": "../../{DATASET}"}, "does not describe train of mnist"),
        ({"name": "test"}, "does not describe train of mnist"),
    ],
)
def test_a_tfds_folder_holds_what_it_says(change, words, digits, read, tmp_path):
    info = json.loads(digits["dataset_info.json"])
    info["splits"][0] |= change
    folder = written(digits | {"dataset_info.json": json.dumps(info).encode()}, tmp_path / "in")
    result = worker.once(read, folder)
    assert result.outcome == "refused" and words in result.words, result


def test_what_chunks_claim_is_what_they_hold(tmp_path, monkeypatch):
    from array_record.python import array_record_module

    rng = np.random.default_rng(0)
    records = [rng.bytes(int(size)) for size in rng.integers(0, 30_000, 40)]  # over many blocks
    folders.write_records(tmp_path / "a", records)
    count, unpacked = shards.chunk_sizes(tmp_path / "a")
    reader = array_record_module.ArrayRecordReader(str(tmp_path / "a"))
    assert reader.num_records() == 40
    assert 40 <= count <= 90 and sum(map(len, records)) <= unpacked < sum(map(len, records)) + 9000
    whole = (tmp_path / "a").read_bytes()
    for content in (whole[:-1], whole[:30], b"x" * len(whole)):
        (tmp_path / "b").write_bytes(content)
        refused(lambda: shards.chunk_sizes(tmp_path / "b"))
    # A file that unpacks to more than its bound is not opened by the library.
    folders.write_records(tmp_path / "c", [bytes(2**20)])
    assert (tmp_path / "c").stat().st_size < 2**18
    info = {"name": "mnist", "splits": [{"name": "train", "shardLengths": ["1"]}]}
    shards.check_split("mnist", "train", info, [tmp_path / "c"])
    monkeypatch.setattr(shards, "UNPACKED_BYTES", 2**19)
    split = lambda: shards.check_split("mnist", "train", info, [tmp_path / "c"])  # noqa: E731
    refused(split, "train unpacks to more than 524,288 bytes")


@pytest.mark.parametrize(("name", "label"), [("imdb_reviews", 2), ("mnist", 10), ("mnist", -1)])
def test_labels_are_classes(name, label, tmp_path):
    refused(lambda: prepared._labels(name, tmp_path, [{"label": label}], [2, 10][name == "mnist"]))


# ---- Keras's files ------------------------------------------------------------------------------


@needs_h5py
def test_a_heap_that_hdf5_does_not_come_back_from_is_seen_first():
    from lstmjax import hdf5_process as hdf5

    whole = (ROOT / "tests/golden/keras_files/keras3.h5").read_bytes()
    place = whole.find(b"GCOL\x01\0\0\0")
    assert place > 0
    hdf5.check_content(whole)
    free = place + 16
    while whole[free : free + 2] != b"\0\0":  # to the object that stands for what is free
        free += 16 + -(-int.from_bytes(whole[free + 8 : free + 16], "little") // 8) * 8
    for at, size in ((free, 0), (free, 8), (free, 2**63), (place + 16, 2**64 - 8), (place, 2**40)):
        content = bytearray(whole)
        content[at + 8 : at + 16] = size.to_bytes(8, "little")
        refused(
            lambda content=content: hdf5.check_content(bytes(content)), "a damaged heap at byte"
        )
    for content, words in ((b"", "signature"), (whole[:13] + b"\4" + whole[14:], "8 bytes")):
        refused(lambda content=content: hdf5.check_content(content), words)


BEYOND = (
    "link to elsewhere", "the same at", "bytes, expected at most", "in another file",
    "in another file", "bytes, expected at most",
)  # fmt: skip


@needs_h5py
@pytest.mark.parametrize("number", range(len(BEYOND)))
def test_hdf5_files_stay_within_themselves(number, tmp_path):
    path = written(folders.hdf5()[number], tmp_path / "in") / "model"
    tracemalloc.start()
    refused(lambda: interop.load_keras_file(path), BEYOND[number])
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


KERAS = ROOT / "tests/golden/keras_files"


@needs_h5py
def test_a_text_of_a_gigabyte_that_is_not_there(tmp_path):
    """The library allocates what a length says before it looks."""
    content = bytearray((KERAS / "tf_keras_weights.h5").read_bytes())
    assert content[1912:1916] == b"\x28\0\0\0"  # the length of a name among the attributes
    content[1915] = 0x40
    (tmp_path / "a.h5").write_bytes(content)
    refused(lambda: interop.load_keras_file(tmp_path / "a.h5"), "got")
    # From a small process: a child's memory counts from what its parent had when it was started.
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    asked = map(str, (tmp_path / "a.h5", hdf5.MEGABYTES, hdf5.SECONDS, 2**24))
    command = [sys.executable, "-c", code, sys.executable, str(hdf5.PROCESS), *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 20 < int(done.stdout) / 1024 < 450


PROCESSES = {
    "loops": ("resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile 1: 1", "takes more than 1 s"),
    "sleeps": ("time.sleep(60)", "takes more than 1 s to read"),
    "crashes": ("os.abort()", "the HDF5 library ends with -6"),
    "stops": ("os._exit(0)", "read only in part"),
    "lies": ('print(\'{"array": "/a", "dtype": "<f8", "shape": [9]}\')', "buffer"),
    "lies more": ('print(\'{"array": "/a/b", "dtype": "<f8", "shape": []}12345678\')', "a"),
    "objects": ('print(\'{"array": "/a", "dtype": "O", "shape": [1]}\\n12345678\')', ""),
}


@needs_h5py
@pytest.mark.parametrize("kind", PROCESSES)
def test_a_process_that_does_not_answer(kind, tmp_path, monkeypatch):
    code, words = PROCESSES[kind]
    (tmp_path / "process.py").write_text(f"import os, resource, time\n{code}")
    monkeypatch.setattr(hdf5, "PROCESS", tmp_path / "process.py")
    monkeypatch.setattr(hdf5, "SECONDS", 1)
    monkeypatch.setattr(hdf5, "WALL", 2)
    (tmp_path / "a.h5").write_bytes((KERAS / "keras3.h5").read_bytes())
    refused(lambda: interop.load_keras_file(tmp_path / "a.h5"), "a.h5: got", words)


@needs_h5py
def test_a_whole_file_is_read_as_h5py_reads_it():
    import h5py

    tree = hdf5.read(KERAS / "keras3.h5")
    assert hdf5.read((KERAS / "keras3.h5").read_bytes()).keys() == tree.keys()
    found = []
    with h5py.File(KERAS / "keras3.h5") as opened:

        def compare(name, stored):
            node = tree.at(name)
            assert node.keys() == stored.keys() if isinstance(node, hdf5.Group) else True
            if isinstance(stored, h5py.Dataset):
                np.testing.assert_array_equal(node, stored[...])
                assert node.dtype == stored.dtype and node.flags.writeable
                found.append(name)

        opened.visititems(compare)
        assert list(tree) == list(opened)
        assert tree.attrs["model_config"] == opened.attrs["model_config"]
    assert len(found) > 8


def test_names_with_many_digits_are_sorted_in_no_time():
    names = ["b_10", "b_9", "b_" + "1" * 5000, "b", "b_010", "1" * 60_000 + "a", "b_" + "0" * 5000]
    start = time.process_time()
    got = weight_trees.by_number(names)
    assert time.process_time() - start < 1
    assert got == ["b", "b_" + "0" * 5000, "b_9", "b_010", "b_10", names[5], names[2]]


# ---- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 10**5, "nested too deeply"),
        (b'{"a": 9223372036854775808}', "does not fit into 64 bits"),
        (b"1" * 5000, "does not fit into 64 bits"),
        (b"NaN", "NaN is no finite number"),
        (b"1e999", "1e999 is no finite number"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b"\xff", "can't decode"),
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
    ],
)
def test_json_is_strict(content, words):
    refused(lambda: files.parse_json(content), words)
    assert files.parse_json(b'{"a": [-9223372036854775808, 1e308, "\xc3\xa9"]}') == {
        "a": [-(2**63), 1e308, "é"]
    }
