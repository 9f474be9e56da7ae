"""Folders of weights: read safely, and told apart."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from graftwork import weights
from graftwork.errors import WeightsError


def write(folder: Path, **files: dict[str, torch.Tensor]) -> Path:
    """A folder with safetensors files, each with its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def index(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def refusal(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        call(*args, **options)
    return str(caught.value)


ONE = {"a": torch.tensor([1.0, 2.0])}
TWO = {"b": torch.tensor([[3.0]])}


# What is in them ------------------------------------------------------------------------------------------------------


def test_an_index_says_which_files_count(tmp_path: Path) -> None:
    folder = write(tmp_path, one=ONE, two=TWO, stale={"a": torch.zeros(9)})
    index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    opened = weights.open_weights(folder)
    assert {name: read().tolist() for name, read in opened.items()} == {"a": [1.0, 2.0], "b": [[3.0]]}
    assert weights.shapes(folder) == {"a": (2,), "b": (1, 1)}


def test_without_an_index_all_safetensors_count_and_pickles_do_not(tmp_path: Path) -> None:
    folder = write(tmp_path, one=ONE, two=TWO)
    torch.save({"c": torch.zeros(3)}, folder / "pytorch_model.bin")
    assert set(weights.open_weights(folder)) == {"a", "b"}


@pytest.mark.parametrize("nested", [False, True], ids=["bare", "under state_dict"])
def test_a_pickle_of_tensors_is_read(tmp_path: Path, nested: bool) -> None:
    torch.save({"state_dict": ONE} if nested else ONE, tmp_path / "model.bin")
    torch.save({}, tmp_path / "training_args.bin")
    assert weights.open_weights(tmp_path)["a"]().tolist() == [1.0, 2.0]
    assert weights.shapes(tmp_path) == {"a": (2,)}


def test_a_pickle_can_be_replaced_and_is_read_anew(tmp_path: Path) -> None:
    torch.save(ONE, tmp_path / "model.bin")
    weights.open_weights(tmp_path)["a"]()
    (tmp_path / "model.bin").unlink()
    torch.save({"a": torch.tensor([7.0])}, tmp_path / "model.bin")
    assert weights.open_weights(tmp_path)["a"]().tolist() == [7.0]


def test_changing_what_was_read_from_a_pickle_changes_nothing_that_is_read_later(tmp_path: Path) -> None:
    torch.save(ONE, tmp_path / "model.bin")
    weights.open_weights(tmp_path)["a"]().zero_()
    assert weights.open_weights(tmp_path)["a"]().tolist() == [1.0, 2.0]


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """What a function is called with from now on."""
    calls, function = [], getattr(module, name)

    def call(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return function(*args, **options)

    monkeypatch.setattr(module, name, call)
    return calls


def test_a_file_is_opened_once_for_all_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"layer.{number}": torch.full((3,), float(number)) for number in range(20)}
    folder = write(tmp_path, one=tensors)
    calls = counted(monkeypatch, safetensors, "safe_open")
    opened = weights.open_weights(folder)
    assert all(opened[name]().equal(value) for name, value in tensors.items())
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_a_tensor_that_is_read_twice_is_in_memory_twice(tmp_path: Path, name: str) -> None:
    (save_file if name.endswith("safetensors") else torch.save)(ONE | TWO, tmp_path / name)
    opened = weights.open_weights(tmp_path)
    first, other = opened["a"](), opened["b"]()
    first.zero_()
    assert opened["a"]().tolist() == [1.0, 2.0]
    assert other.tolist() == [[3.0]]


class Malice:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "harm"),)


@pytest.mark.parametrize("way", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, way: Any) -> None:
    with (tmp_path / "model.bin").open("wb") as stream:
        way({"a": Malice(tmp_path)}, stream)
    said = refusal(weights.open_weights, tmp_path)
    assert "is refused: it is damaged, or holds more than tensors" in said
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": 3}, {"state_dict": [1]}, 5], ids=str)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.bin")
    assert "something other than named tensors" in refusal(weights.open_weights, tmp_path)


def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "model.bin")
    whole = (tmp_path / "model.bin").read_bytes()
    for damaged in (b"", b"x", whole[: len(whole) // 2], b"no pickle at all" * 99):
        (tmp_path / "model.bin").unlink()
        (tmp_path / "model.bin").write_bytes(damaged)
        assert "is refused" in refusal(weights.open_weights, tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "holds no weights" in refusal(weights.open_weights, tmp_path)
    assert weights.shapes(tmp_path) == {}


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/../../secret.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path, secret=ONE)
    folder = write(tmp_path / "base")
    index(folder, {"a": name})
    assert f"names the file '{name}', which is outside the folder; refused" in refusal(weights.open_weights, folder)


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, one=ONE)
    index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    assert "lacks the file 'two.safetensors'" in refusal(weights.open_weights, folder)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "[" * 100_000, '{"weight_map": null}']
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, one=ONE)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json'" in refusal(weights.tensor_files, folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, one=ONE, two={"a": torch.zeros(2)})
    assert "holds the tensor 'a' in two files" in refusal(weights.open_weights, folder)


def test_a_truncated_safetensors_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    file = write(tmp_path, one={"a": torch.zeros(100)}) / "one.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 8, 20, len(whole) - 400, len(whole) - 1):
        file.unlink()
        file.write_bytes(whole[:length])

        def read() -> None:
            weights.open_weights(tmp_path)["a"]()

        assert "is not a whole safetensors file" in refusal(read)


@pytest.mark.parametrize("header", ["[]", '{"a": 3}', '{"a": {}}', '{"a": {"shape": 3}}', "[" * 100_000, "\xff"])
def test_a_safetensors_header_of_nonsense_is_refused(tmp_path: Path, header: str) -> None:
    text = header.encode("latin-1")
    (tmp_path / "one.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert "is not a whole safetensors file" in refusal(weights.open_weights, tmp_path)


def test_the_dtypes_of_a_file_are_read_from_its_header(tmp_path: Path) -> None:
    mixed = {"a": torch.zeros(1, dtype=torch.bfloat16), "b": torch.zeros(1), "c": torch.zeros(1, dtype=torch.int64)}
    assert weights.dtypes_in(write(tmp_path, one=mixed) / "one.safetensors") == {"BF16", "F32", "I64"}


# Which they are -------------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", one=ONE, two=TWO)
    first = weights.fingerprint(folder)
    shutil.move(folder, tmp_path / "moved")
    assert weights.fingerprint(tmp_path / "moved") == first
    (tmp_path / "moved" / "README.md").write_text("Not a tensor.")
    assert weights.fingerprint(tmp_path / "moved") == first
    file = tmp_path / "moved" / "two.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert weights.fingerprint(tmp_path / "moved") != first


def test_a_process_hashes_a_file_of_weights_once_unless_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, one=ONE, two=TWO)
    calls = counted(monkeypatch, weights, "sha256")
    first = weights.fingerprint(folder)
    assert weights.fingerprint(folder) == first
    assert len(calls) == 2
    file = folder / "two.safetensors"
    state = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert weights.fingerprint(folder) != first
    assert len(calls) == 3


def test_a_fingerprint_does_not_move_bytes_between_files(tmp_path: Path) -> None:
    for name, contents in (("x", (b"ab", b"c")), ("y", (b"a", b"bc"))):
        (tmp_path / name).mkdir()
        for number, content in enumerate(contents):
            (tmp_path / name / f"{number}.bin").write_bytes(content)
    assert weights.fingerprint(tmp_path / "x") != weights.fingerprint(tmp_path / "y")
