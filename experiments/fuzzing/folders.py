"""Readers of archives, TFDS folders and Keras's files."""

import gzip
import io
import os
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import parity

from fuzzing import mutations
from fuzzing.mutations import Again, Files, scratch, taken
from lstmjax import interop
from lstmjax.data import prepare, prepared
from lstmjax.records import to_json


def archive_seeds() -> list[Files]:
    found = []
    for seed in range(3):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for k in range(2 + seed):
                info = tarfile.TarInfo(f"aclImdb/train/{('pos', 'neg')[k % 2]}/{k}_7.txt")
                info.size = 40 * (k + 1)
                archive.addfile(info, io.BytesIO(b"a film " * 60))
        content = gzip.compress(packed.getvalue(), mtime=0)
        found.append({"reviews.tar.gz": content})
    return found


def archive_read(folder: Path) -> None:
    for name, file in prepare._members(folder / "reviews.tar.gz"):
        assert ".." not in name.split("/") and not name.startswith("/")
        assert len(file.read()) <= prepare.REVIEW_BYTES


def tfds_seeds(name: str) -> list[Files]:
    """Folders as TFDS leaves them, of a few examples."""
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(num_classes=10 if name == "mnist" else 2)
    kinds = {"mnist": ("image", tfds.features.Image(shape=(28, 28, 1)))}
    field, kind = kinds.get(name, ("text", tfds.features.Text()))
    features = tfds.features.FeaturesDict({field: kind, "label": label})
    rng, found = np.random.default_rng(0), []
    for count in (3, 5):
        with scratch() as folder:
            features.save_config(folder)
            for split in prepared.SPLITS:
                shard = folder / f"{name}-{split}.array_record-00000-of-00001"
                pictures = [prepare._png(rng.integers(0, 256, (28, 28), np.uint8)) for _ in "12345"]
                values = pictures if name == "mnist" else ["a film", "ψ", "", "bad", "<br />"]
                examples = [{field: value, "label": k % 2} for k, value in enumerate(values)]
                encoded = map(features.encode_example, examples[:count])
                write_records(shard, [features.serialize_example(one) for one in encoded])
            (folder / "dataset_info.json").write_bytes(to_json(tfds_info(name, count)))
            found.append(taken(folder))
    return found


def tfds_info(name: str, count: int) -> dict[str, Any]:
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    splits = [
        {
            "filepathTemplate": template,
            "name": split,
            "numBytes": "99",
            "shardLengths": [str(count)],
        }
        for split in prepared.SPLITS
    ]
    return {"fileFormat": "array_record", "name": name, "splits": splits, "version": "1.0.0"}


def write_records(path: Path, records: list[bytes]) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def changed_records(draw: Random, content: bytes) -> bytes:
    """An array_record file, whole, with records in it that were changed."""
    from array_record.python import array_record_module

    with scratch() as folder:
        path = folder / "records"
        path.write_bytes(content)
        reader = array_record_module.ArrayRecordReader(str(path))
        records = reader.read([*range(reader.num_records())])
        at = draw.randrange(len(records))
        if draw.random() < 0.01:
            records[at] = records[at] + bytes(mutations.BOMB)
        else:
            records[at] = mutations.changed_bytes(draw, records[at], records)
        write_records(path, records)
        return path.read_bytes()


def tfds_read(name: str, folder: Path) -> None:
    version = folder / prepared.FULL_NAMES[name] / "1.0.0"
    version.parent.mkdir(parents=True)
    os.symlink(folder, version)
    found = prepared.find(name, folder)
    if found is None:
        raise Again("no data here")
    if name == "mnist":
        for images, labels in prepared.read_digits(found).values():
            assert images.shape[1:] == (28, 28) and set(labels.tolist()) <= set(range(10))
    else:
        for texts, labels in prepared.read_reviews(found).values():
            assert len(texts) == len(labels) and set(labels.tolist()) <= {0, 1}


def keras_seeds() -> list[Files]:
    folder = parity.GOLDEN / "keras_files"
    paths = [*sorted(folder.glob("*.h5")), *sorted(folder.glob("*.keras"))]
    return [{f"model{'.keras' * (p.suffix == '.keras')}": p.read_bytes()} for p in paths] + hdf5()


def hdf5() -> list[Files]:
    """Files that are well formed and make a reader go where it should not."""
    import h5py

    def plain(file):
        file.attrs["layer_names"], group = [b"lstm"], file.create_group("lstm")
        group["lstm/kernel:0"], group["lstm/recurrent_kernel:0"] = np.ones((3, 8)), np.ones((2, 8))
        return group

    def elsewhere(group):
        group["lstm/bias:0"] = h5py.ExternalLink("/etc/passwd", "/")

    def circle(group):
        group["lstm/a"] = group["lstm/b"] = group

    def huge(group):
        group.create_dataset("lstm/bias:0", (2**40,), "f4", chunks=(2**20,))

    def outside(group):
        group.create_dataset("lstm/bias:0", (8,), "f4", external=[("/etc/passwd", 0, 32)])

    def virtual(group):
        layout = h5py.VirtualLayout((8,), "f4")
        layout[:] = h5py.VirtualSource("/etc/passwd", "x", (8,))
        group.create_virtual_dataset("lstm/bias:0", layout)

    def bomb(group):
        made = np.zeros((2**12, 2**12), "f4")
        group.create_dataset("lstm/bias:0", data=made, compression="gzip")

    found = []
    for more in (elsewhere, circle, huge, outside, virtual, bomb, lambda group: None):
        file = io.BytesIO()
        with h5py.File(file, "w") as opened:
            group = plain(opened)
            names = ("kernel", "recurrent_kernel", "bias")
            group.attrs["weight_names"] = [f"lstm/{name}:0".encode() for name in names]
            more(group)
        found.append({"model": file.getvalue()})
    return found


def keras_read(folder: Path) -> None:
    paths = sorted(folder.glob("model*"))
    file = interop.load_keras_file(paths[0] if paths else folder / "model")
    assert file.weights
    interop.load_stack("keras", file.weights)
