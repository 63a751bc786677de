"""The standard files of image sets, as arrays; what is missing or damaged is named."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 28
"""Height and width of an MNIST image, in pixels."""

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

CIFAR_BATCHES = (*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch")
CIFAR_PIXELS = 3 * 32 * 32

FACES_FILE = "newfaces_rot_single.mat"
"""The 165,600 patches of Hinton & Salakhutdinov (2006), as Martens (2010) gave them out."""


def mnist_images(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images, (n, 784) bytes.

    Raises:
        FileNotFoundError: naming the four files, gzipped or not, and those that are not there.
        ValueError: a file is not what its name says.
    """
    found = {}
    for name in MNIST_FILES:
        candidates = (data / name, data / f"{name}.gz")
        found[name] = next((file for file in candidates if file.is_file()), None)
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise FileNotFoundError(
            f"mnist needs the four files {', '.join(MNIST_FILES)} (or each with .gz) in {data}; "
            f"not there: {', '.join(missing)}"
        )
    return _idx_images(found[MNIST_FILES[0]]), _idx_images(found[MNIST_FILES[2]])


def _idx_images(file: Path) -> np.ndarray:
    content = (gzip.open if file.suffix == ".gz" else open)(file, "rb").read()
    magic, count, height, width = struct.unpack(">4I", content[:16].ljust(16, b"\0"))
    whole = len(content) == 16 + count * height * width
    if magic != 0x803 or (height, width) != (SIDE, SIDE) or not whole:
        raise ValueError(f"{file} must be an IDX file of {SIDE} x {SIDE} images, but it is not")
    return np.frombuffer(content, np.uint8, offset=16).reshape(count, height * width)


def cifar_batches(data: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """CIFAR-10's five training batches and its test batch: (n, 3072) bytes and (n,) labels.

    Reads the python or the binary version, from its folder or its archive, whichever is found
    first.

    Raises:
        FileNotFoundError: naming the folders and archives, or the batches that one lacks.
        ValueError: a file is not what its name says.
    """
    versions: tuple[tuple[str, str, str, Callable], ...] = (
        ("cifar-10-batches-py", "cifar-10-python.tar.gz", "", _cifar_pickle),
        ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", _cifar_records),
    )
    for folder, archive, suffix, parse in versions:
        names = [f"{folder}/{batch}{suffix}" for batch in CIFAR_BATCHES]
        if (data / folder).is_dir():
            where = data / folder
            contents = {n: (data / n).read_bytes() for n in names if (data / n).is_file()}
        elif (data / archive).is_file():
            where = data / archive
            contents = _members(where, names)
        else:
            continue
        missing = [name for name in names if name not in contents]
        if missing:
            raise FileNotFoundError(f"{where} lacks {', '.join(missing)}")
        return [parse(f"{data / name}", contents[name]) for name in names]
    wanted = ", ".join(f"{folder}/ or {archive}" for folder, archive, *_ in versions)
    raise FileNotFoundError(f"cifar needs one of {wanted} in {data}; none is there")


def _members(archive: Path, names: list[str]) -> dict[str, bytes]:
    try:
        with tarfile.open(archive) as tar:
            return {m.name: tar.extractfile(m).read() for m in tar if m.name in names}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{archive} must be a gzipped tar archive, but: {error}") from error


class _ArraysOnly(pickle.Unpickler):
    """Refuses whatever a pickled array does not need: other names could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "_reconstruct": np.empty(0).__reduce__()[0],
            "ndarray": np.ndarray,
            "dtype": np.dtype,
        }
        if module.partition(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")


def _cifar_pickle(file: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        images, labels = batch[b"data"], np.asarray(batch[b"labels"])
        return _cifar_checked(file, images, labels)
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(
            f"{file} must be a batch of CIFAR-10's python version, but: {error}"
        ) from error


def _cifar_records(file: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    if len(content) % (1 + CIFAR_PIXELS):
        raise ValueError(
            f"{file} must have records of {1 + CIFAR_PIXELS} bytes, got {len(content)} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + CIFAR_PIXELS)
    return _cifar_checked(file, records[:, 1:], records[:, 0])


def _cifar_checked(
    file: str, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if images.dtype != np.uint8 or images.shape != (len(labels), CIFAR_PIXELS) or not len(labels):
        raise ValueError(f"{file} must have one label for each row of {CIFAR_PIXELS} bytes")
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{file} must have labels from 0 to 9")
    return images, labels.astype(np.int64)


def faces_patches(data: Path) -> np.ndarray | None:
    """The augmented file's patches, (n, 625) float32, a person's in a row; None without it."""
    file = data / FACES_FILE
    return _matlab(file, "newfaces_single", 625).T if file.is_file() else None


def olivetti_images(data: Path) -> np.ndarray:
    """The 400 Olivetti faces, ten in a row of each of 40 people: (400, 64, 64) in [0, 1].

    Raises:
        FileNotFoundError: naming the files that would do.
        ValueError: a file is not what its name says.
    """
    matlab, pickled = data / "olivettifaces.mat", data / "olivetti_py3.pkz"
    if matlab.is_file():
        images = _matlab(matlab, "faces", 64 * 64).T
        if len(images) != 400:
            raise ValueError(f"{matlab} must have 400 faces, got {len(images)}")
        # Matlab stores columns first.
        return (images / np.float32(255)).reshape(400, 64, 64).transpose(0, 2, 1)
    if not pickled.is_file():
        raise FileNotFoundError(
            f"faces needs {FACES_FILE}, olivettifaces.mat or scikit-learn's olivetti_py3.pkz in "
            f"{data}; none is there"
        )
    from sklearn.datasets import fetch_olivetti_faces

    try:
        return fetch_olivetti_faces(data_home=data, download_if_missing=False).images
    except Exception as error:  # as any pickle
        raise ValueError(f"{pickled} must be scikit-learn's file, but: {error}") from error


def _matlab(file: Path, name: str, rows: int) -> np.ndarray:
    from scipy.io import loadmat

    try:
        matrix = loadmat(file, variable_names=[name])[name]
    except Exception as error:  # a damaged file raises almost anything
        raise ValueError(f"{file} must be a Matlab file with {name!r}, but: {error}") from error
    if matrix.ndim != 2 or len(matrix) != rows:
        raise ValueError(f"{file} must have {rows} rows in {name!r}, got shape {matrix.shape}")
    return matrix.astype(np.float32)
