"""The data of the published experiments, in the folders that they come in.

An image is named, not read: DomainNet has 600,000 of them. ``read`` turns it into what can be
decoded. Classes come in the order of their published numbers.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks import data

Named = bytes | Path | NDArray[np.uint8]
"""An encoded image, the file that holds one, or (h, w, 3) uint8 RGB."""
Splits = dict[str, tuple[list[Named], list[Named]]]

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


def read(image: Named) -> bytes | NDArray[np.uint8]:
    """Return an encoded image, or its pixels (h, w, 3) uint8 RGB."""
    return image.read_bytes() if isinstance(image, Path) else image


def splits_of(layout: str, source: str, seed: int) -> Splits:
    """Return the training and the test images of every class.

    Args:
        layout: ``plain`` for what ``data.load`` reads; or a key of ``LAYOUTS``.
        source: What to read: for a layout a folder, or the folder that it lies in.
        seed: Decides which images are for testing, where the data does not.
    """
    if layout == "plain":
        return {name: (list(a), list(b)) for name, (a, b) in _plain(source, seed).items()}
    return LAYOUTS[layout](Path(source), seed)


def cifar100(root: Path, seed: int = 0) -> Splits:
    """Read ``cifar-100-python/{train,test,meta}``, the pickles for Python."""
    folder = _inside(root, "cifar-100-python")
    names = [name.decode() for name in _unpickle(folder / "meta")[b"fine_label_names"]]
    splits: Splits = {name: ([], []) for name in names}
    for side, split in enumerate(("train", "test")):
        content = _unpickle(folder / split)
        # Rows of 1024 red, 1024 green, 1024 blue values, each plane row by row.
        planes = np.asarray(content[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        for pixels, label in zip(
            np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), content[b"fine_labels"], strict=True
        ):
            splits[names[label]][side].append(pixels)
    return splits


def imagenet_r(root: Path, seed: int) -> Splits:
    """Read ``imagenet-r/{train,test}/class/image``, or cut ``imagenet-r/class/image`` 80 to 20."""
    folder = _inside(root, "imagenet-r")
    if (folder / "train").is_dir():
        train, test = _folders(folder / "train"), _folders(folder / "test")
        if train.keys() != test.keys():
            missing = ", ".join(sorted(train.keys() ^ test.keys())[:5])
            raise SystemExit(f"{folder}: classes of train and test differ: {missing}")
        return {name: (train[name], test[name]) for name in train}
    generator, splits = np.random.default_rng(seed), {}
    for name, files in _folders(folder).items():
        order, tests = generator.permutation(len(files)), max(1, len(files) // 5)
        splits[name] = [files[i] for i in order[tests:]], [files[i] for i in order[:tests]]
    return splits


def domainnet(root: Path, seed: int = 0) -> Splits:
    """Read ``domainnet/{domain}_{train,test}.txt``: lines of an image's path and its class."""
    folder = _inside(root, "domainnet")
    names: dict[int, str] = {}
    sides: tuple[dict[str, list[Named]], ...] = ({}, {})
    for domain in DOMAINS:
        for side, split in zip(sides, ("train", "test"), strict=True):
            path = folder / f"{domain}_{split}.txt"
            if not path.exists():
                raise SystemExit(f"there is no {path}")
            for line in path.read_text("utf-8").splitlines():
                image, label = line.rsplit(" ", 1)
                name = names.setdefault(int(label), Path(image).parent.name)
                side.setdefault(name, []).append(folder / image)
    train, test = sides
    ordered = [names[label] for label in sorted(names)]
    return {name: (train.get(name, []), test.get(name, [])) for name in ordered}


LAYOUTS: dict[str, Callable[[Path, int], Splits]] = {
    "cifar100": cifar100,
    "imagenet-r": imagenet_r,
    "domainnet": domainnet,
}


def digest(splits: Splits) -> str:
    """Return a hash that changes with the images: of files it reads name, size and time alone."""
    content = hashlib.sha256()
    for name, sides in splits.items():
        for side in sides:
            content.update(f"{name}\0{len(side)}\0".encode())
            for image in side:
                content.update(hashlib.sha256(_identity(image)).digest())
    return content.hexdigest()


def _identity(image: Named) -> bytes | NDArray[np.uint8]:
    if isinstance(image, Path):
        stat = image.stat()
        return f"{image.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()
    return image


def _plain(source: str, seed: int) -> data.Splits:
    return data.split_by_class(source, seed)


def _inside(root: Path, name: str) -> Path:
    folder = root / name if (root / name).is_dir() else root
    if not folder.is_dir():
        raise SystemExit(f"there is no folder {folder}")
    return folder


def _folders(root: Path) -> dict[str, list[Named]]:
    found = {
        folder.name: [x for x in sorted(folder.iterdir()) if x.suffix.lower() in data.KINDS]
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }
    if not found:
        raise SystemExit(f"{root} holds no sub-folder with images")
    return {name: list(files) for name, files in found.items() if files}


class _Unpickler(pickle.Unpickler):
    """Builds numbers, text and arrays; a pickle that asks for anything else is refused.

    Pickles run what they name, and these files come from the network.
    """

    def find_class(self, module: str, name: str) -> Any:
        # numpy moved its core; files are older than that.
        module = module.replace("numpy._core.", "numpy.core.")
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return _empty_array
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}: not loaded")


def _empty_array(kind: object, shape: object, code: object) -> NDArray[Any]:
    """What numpy's own function makes; content and type come with the state that follows."""
    return np.empty(0, np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 2's strings are written by Python 3."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"the file asks for the encoding {encoding}: not loaded")
    return text.encode("latin-1")


def _unpickle(path: Path) -> dict[bytes, Any]:
    if not path.is_file():
        raise SystemExit(f"there is no file {path}")
    with path.open("rb") as file:
        content: dict[bytes, Any] = _Unpickler(file, encoding="bytes").load()
    return content


@dataclass(frozen=True)
class Published:
    """A published experiment: ``make bench-NAME``."""

    layout: str
    preset: str
    tasks: int


PUBLISHED = {
    "cifar100": Published("cifar100", "published-cifar100", 10),
    "imagenet-r": Published("imagenet-r", "published-imagenet-r", 10),
    "domainnet": Published("domainnet", "published-domainnet", 5),
}
