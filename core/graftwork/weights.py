"""Folders of weights: what they hold, and a hash that identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from graftwork.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

LazyTensor = Callable[[], "Tensor"]
"""A tensor in a file, read when called."""

FORMS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
"""The files that hold a folder's tensors where no index names them; the first form of which there is one is read."""
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NO_WEIGHTS = ("training_args.bin", "optimizer.pt")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for one in git's large file storage."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read when called."""

    file: Path
    name: str
    read: Callable[[], Tensor] = field(compare=False, repr=False)

    def __call__(self) -> Tensor:
        return self.read()


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor that is made of others when called. Who makes one so keeps the account of the files: where it is used, so are
    its sources."""

    sources: tuple[LazyTensor, ...]
    make: Callable[..., Tensor]
    """Given the sources' values."""

    def __call__(self) -> Tensor:
        return self.make(*(source() for source in self.sources))


def sources_of(tensor: LazyTensor) -> Iterator[StoredTensor]:
    """The tensors of files that a tensor is, or is made of."""
    if isinstance(tensor, StoredTensor):
        yield tensor
    elif isinstance(tensor, DerivedTensor):
        for source in tensor.sources:
            yield from sources_of(source)


def agreeing(name: str, one: LazyTensor, other: LazyTensor) -> DerivedTensor:
    """A tensor that is stored twice; read, it is a WeightsError unless both have one value."""

    def make(value: Tensor, again: Tensor) -> Tensor:
        if not value.float().equal(again.float()):
            places = " and ".join(f"'{stored.file}'" for each in (one, other) for stored in sources_of(each))
            raise WeightsError(
                f"'{name}' is stored twice, in {places}, with different values; remove the one that is stale"
            )
        return value

    return DerivedTensor((one, other), make)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; WeightsError when it is missing or is not one."""
    refuse_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"'{file.parent}' holds no {file.name}; is it the right folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(f"'{file}' is not readable JSON ({error}); fetch the folder again") from None
    if not isinstance(content, dict):
        raise WeightsError(f"'{file}' holds a {type(content).__name__}, not a JSON object; fetch the folder again")
    return content


def refuse_pointer(file: Path) -> None:
    """WeightsError for a file that only stands for one in git's large file storage."""
    try:
        with file.open("rb") as stream:
            is_pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return  # who reads it says so
    if is_pointer:
        raise WeightsError(
            f"'{file}' is a git-lfs pointer and not the file itself, which was never fetched; run 'git lfs pull' in its folder, or "
            "fetch the folder again"
        )


def tensor_files(folder: Path) -> list[Path]:
    """The files of `folder` that hold its tensors (see `tensor_names`)."""
    names = [file.name for file in folder.iterdir() if not file.is_dir()] if folder.is_dir() else []
    chosen, index = tensor_names(names, folder.joinpath)
    return [inside(folder, name) if index else folder / name for name in chosen]


def tensor_names(names: Collection[str], place: Callable[[str], Path]) -> tuple[list[str], str]:
    """Which files of a folder hold its tensors: those an index names, else all safetensors, else all pickles; and the index.

    `place` says where an index is, to read it. A whole `model.safetensors` wins over an index of pickles.
    """
    for index in INDEXES[:1] if "model.safetensors" in names else INDEXES:
        if index in names:
            file = place(index)
            shards = read_json(file).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise WeightsError(f"'{file}' has no usable weight_map; fetch the folder again")
            return sorted(set(shards.values())), index
    for form in FORMS:
        if found := sorted(name for name in names if fnmatchcase(name, form) and name not in NO_WEIGHTS):
            return found, ""
    return [], ""


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`; WeightsError when the name leads out of the folder or to no file."""
    parts, file = PurePosixPath(name), folder / name
    if parts.is_absolute() or ".." in parts.parts:
        raise WeightsError(f"'{folder}' names the file '{name}', which is outside the folder; refused")
    if not file.is_file():
        raise WeightsError(f"'{folder}' lacks the file '{name}'; fetch or copy the folder again")
    return file


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by name, read when called. Pickles are read with `weights_only`, never otherwise."""
    tensors: dict[str, StoredTensor] = {}
    for file in tensor_files(folder):
        names = open_file(file)
        for twice in tensors.keys() & names.keys():
            raise WeightsError(f"'{folder}' holds the tensor '{twice}' in two files; remove the one that is stale")
        tensors.update(names)
    if not tensors:
        raise WeightsError(f"'{folder}' holds no weights (*.safetensors or *.bin); fetch them, or name another folder")
    return tensors


def open_file(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by name, read when called; pickles as `open_weights` reads them."""
    source = _Source(file)
    return {name: StoredTensor(file, name, partial(source.read, name)) for name in source.names()}


class _Source:
    """A file of tensors, opened once for all of them.

    What is read of it shares its memory, so a tensor that is read again comes from the file opened anew.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.given: set[str] = set()
        self.get: Callable[[str], Tensor] | None = None

    def names(self) -> Collection[str]:
        if self.file.suffix == ".safetensors":
            return shapes_in(self.file)
        loaded = _unpickle(str(self.file))
        self.get = loaded.__getitem__
        return loaded

    def read(self, name: str) -> Tensor:
        if self.get is None or name in self.given:
            self.get, self.given = self.opened(), set()
        self.given.add(name)
        return self.get(name)

    def opened(self) -> Callable[[str], Tensor]:
        """What reads a tensor by its name."""
        if self.file.suffix != ".safetensors":
            return _unpickle(str(self.file)).__getitem__
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.file, framework="pt").get_tensor
        except (SafetensorError, OSError) as error:
            raise _damaged(self.file, error) from None


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a folder, without reading data where the format allows; empty without weights."""
    found: dict[str, tuple[int, ...]] = {}
    for file in tensor_files(folder):
        if file.suffix == ".safetensors":
            found.update(shapes_in(file))
        else:
            found.update({name: tuple(tensor.shape) for name, tensor in _unpickle(str(file)).items()})
    return found


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file, from its header; WeightsError for a damaged file."""
    refuse_pointer(file)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(100_000_000, file.stat().st_size):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, error) from None


def dtypes_in(file: Path) -> set[str]:
    """The dtypes of a safetensors file, as its header names them (`F32`, `BF16`, …)."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def _damaged(file: Path, error: Exception) -> WeightsError:
    return WeightsError(f"'{file}' is not a whole safetensors file ({error}); fetch or copy it again")


def _unpickle(file: str) -> dict[str, Tensor]:
    import torch

    refuse_pointer(Path(file))
    try:
        with Path(file).open("rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"  # what torch wrote before 1.6 cannot be mapped
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle makes torch raise almost anything
        message = str(error).strip().split("\n")[0]
        raise WeightsError(f"'{file}' is refused: it is damaged, or holds more than tensors ({message})") from None
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightsError(f"'{file}' holds something other than named tensors; name a folder of weights")
    return loaded


def fingerprint(folder: Path) -> str:
    """The sha256 of the contents of a folder's tensor files, taken in the order of their names.

    File names do not enter, so a folder keeps its fingerprint when it is copied or renamed. A process reads a file once, unless
    it was changed.
    """
    digest = hashlib.sha256()
    for file in tensor_files(folder):
        state = file.stat()
        digest.update(bytes.fromhex(_sha256_once(file.resolve(), state.st_size, state.st_mtime_ns, state.st_ino)))
    return digest.hexdigest()


@cache
def _sha256_once(file: Path, *state: int) -> str:
    return sha256(file)


def sha256(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    for block in blocks(file):
        digest.update(block)
    return digest.hexdigest()


def blocks(file: Path) -> Iterator[bytes]:
    """A file's content, a mebibyte at a time."""
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            yield block


def absolute(path: Path, folder: Path) -> Path:
    """A path that a person wrote: `~` is their home, and a relative one is taken from `folder`."""
    try:
        return folder / path.expanduser()
    except RuntimeError:  # there is no user of that name, but there may be a folder called `~name`
        return folder / path
