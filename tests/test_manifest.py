"""The manifest: what is read is what was written, and anything else is one kind of error."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from tiny_runs import Run

from graftwork.checkpoint import manifest
from graftwork.checkpoint.manifest import FILE, FileEntry, Manifest, TensorEntry
from graftwork.checkpoint.verification import GoldenFacts
from graftwork.contracts import Choice, ModelSpec, Plan, Verdict
from graftwork.errors import CheckpointError

JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(), inner, max_size=4),
    max_leaves=12,
)
NAMES = some.text(min_size=1)
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(scope="module")
def whole(trained: Run) -> bytes:
    """A real manifest."""
    return (trained.checkpoint / FILE).read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


def read(folder: Path, content: bytes | dict[str, Any]) -> Manifest | str:
    """What a folder with this manifest is read as: a manifest, or a CheckpointError's text. A dictionary gets a seal."""
    if isinstance(content, dict):
        content = json.dumps(content | {"seal": manifest.seal(content)}).encode()
    (folder / FILE).write_bytes(content)
    try:
        found = manifest.read(folder)
        manifest.check_files(found, folder)
    except CheckpointError as error:
        assert "\n" not in error.sentence
        return str(error)
    return found


@SHARED
@given(some.binary(max_size=200))
def test_any_bytes_are_one_kind_of_error(folder: Path, content: bytes) -> None:
    assert isinstance(read(folder, content), str)


@SHARED
@given(some.dictionaries(some.sampled_from([*Manifest.__dataclass_fields__, "other"]), JSON))
def test_any_sealed_json_is_one_kind_of_error(folder: Path, content: dict[str, Any]) -> None:
    assert isinstance(read(folder, content), str)


@SHARED
@given(JSON)
def test_any_json_is_one_kind_of_error(folder: Path, content: Any) -> None:
    assert isinstance(read(folder, json.dumps(content).encode()), str)


@SHARED
@given(some.data())
def test_a_changed_byte_of_a_manifest_is_one_kind_of_error(folder: Path, whole: bytes, data: some.DataObject) -> None:
    at = data.draw(some.integers(0, len(whole) - 1))
    other = data.draw(some.binary(max_size=3).filter(lambda new: new != whole[at : at + 1]))
    said = read(folder, whole[:at] + other + whole[at + 1 :])
    if isinstance(said, Manifest):  # Only white space outside strings was changed.
        raise AssertionError
    assert "is damaged" in said or "changed after it was written" in said or "lacks" in said or "has format" in said


@SHARED
@given(some.data())
def test_any_value_anywhere_in_a_sealed_manifest_is_read_or_one_kind_of_error(
    folder: Path, whole: bytes, data: some.DataObject
) -> None:
    content = here = json.loads(whole)
    del content["seal"]
    for _ in range(data.draw(some.integers(0, 6))):
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = data.draw(some.sampled_from(keys))
        if not isinstance(here[key], dict | list) or not here[key]:
            break
        here = here[key]
    key = data.draw(some.sampled_from(list(here) if isinstance(here, dict) else list(range(len(here)))))
    here[key] = data.draw(JSON)
    read(folder, content)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")], ids=["lists", "tables"])
def test_nesting_of_any_depth_is_one_kind_of_error(folder: Path, opening: str, closing: str) -> None:
    for depth in (10, *range(900, 1000), 5000):  # Python's limit is near 1,000, and reading and writing differ a little
        content = f'{{"seal": 1, "a": {opening * depth}1{closing * depth}}}'
        assert isinstance(read(folder, content.encode()), str)


@pytest.mark.parametrize(
    "content", [b'{"format": 1e999}', b'{"a": "\\ud800"}', b'{"a": ' + b"9" * 9999 + b"}", b"\xff\xfe", b"{}", b"null"]
)
def test_odd_json_is_one_kind_of_error(folder: Path, content: bytes) -> None:
    assert isinstance(read(folder, content), str)


def test_a_lone_surrogate_in_a_sealed_manifest_is_one_kind_of_error(folder: Path, whole: bytes) -> None:
    content = json.loads(whole)
    del content["seal"]
    content["graftwork"] = "\ud800"
    assert isinstance(read(folder, content), str)


def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    with (folder / FILE).open("wb") as stream:
        stream.truncate(manifest.LARGEST + 1)
    with pytest.raises(CheckpointError, match="is larger than any manifest"):
        manifest.read(folder)
    (folder / FILE).unlink()


def test_a_folder_without_one_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        manifest.read(tmp_path)
    assert str(caught.value) == f"'{tmp_path}' is not a Graftwork checkpoint: it has no graftwork.json"


def test_every_mistake_of_a_sealed_manifest_is_said(folder: Path, whole: bytes) -> None:
    content = json.loads(whole)
    del content["seal"]
    content["step"], content["plan"]["model_spec"]["on"] = "4", [1]
    said = read(folder, content)
    assert isinstance(said, str)
    first, *details = said.split("\n")
    assert first == f"'{folder / FILE}' is not a manifest that this version can read"
    assert [line.split(":")[0].strip() for line in details] == ["step", "plan.model_spec.on.0"]


def written(folder: Path, one: Manifest) -> Manifest:
    manifest.write(one, folder)
    return manifest.read(folder)


@SHARED
@given(
    step=some.integers(0, 10**12),
    tensors=some.dictionaries(
        NAMES, some.builds(TensorEntry, some.lists(some.integers(0, 10**9)).map(tuple), some.text())
    ),
    files=some.dictionaries(NAMES, some.builds(FileEntry, some.integers(0, 10**15), some.text())),
    golden=some.builds(
        GoldenFacts, some.text(), some.text(), some.floats(allow_nan=False), some.floats(allow_nan=False)
    ),
    health=some.builds(
        Verdict, some.booleans(), some.lists(some.text()).map(tuple), some.none() | some.floats(allow_nan=False)
    ),
    provenance=some.dictionaries(some.text(), some.text()),
    settings_=some.dictionaries(some.text(), some.none() | some.booleans() | some.integers(-9, 9) | some.text()),
)
def test_what_is_written_is_read(
    folder: Path,
    step: int,
    tensors: dict[str, TensorEntry],
    files: dict[str, FileEntry],
    golden: GoldenFacts,
    health: Verdict,
    provenance: dict[str, str],
    settings_: dict[str, Any],
) -> None:
    plan = Plan(ModelSpec(Choice("model", "m", "p", "d", "1", settings=settings_), on=("language",)))
    one = Manifest("0.1", step, step, plan, tensors, files, golden, {"total": 1}, health, ("a",), provenance=provenance)
    assert written(folder, one) == one


def test_what_is_not_a_number_survives(folder: Path, trained: Run) -> None:
    golden = GoldenFacts("fp32", "cpu", distance=math.nan, largest=math.inf)
    again = written(folder, replace(manifest.read(trained.checkpoint), golden=golden)).golden
    assert math.isnan(again.distance)
    assert again.largest == math.inf


def test_writing_what_was_read_changes_no_byte(folder: Path, trained: Run, whole: bytes) -> None:
    manifest.write(manifest.read(trained.checkpoint), folder)
    assert (folder / FILE).read_bytes() == whole


def test_files_are_described_by_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one").write_bytes(b"abc")
    assert manifest.describe_files(tmp_path) == {
        "sub/one": FileEntry(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    }
