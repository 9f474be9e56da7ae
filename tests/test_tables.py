"""The sources `parquet` and `hf-dataset`: which columns they read, and what becomes of damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from format_files import PNG, read, refused

from graftwork.contracts import BadRecord, Image, Record, Turn
from graftwork_tables import HfDataset, Parquet


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Writes a parquet file of columns."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def write(_schema: Any = None, /, **columns: Any) -> Path:
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=2)
        return path

    return write


def test_common_layouts_of_tables_are_recognised_and_others_named(table: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PNG)
    path = table(image=["x.png", None], question=["Q", "R"], answers=[["b", "a", "a"], ["c"]], junk=[1, 2])
    one, two = read(Parquet, path)
    assert (one.id, one.where, one.turns, one.reference) == (  # type: ignore[union-attr]
        *("1", f"{path}:1"),
        (Turn("user", "<image>\nQ"), Turn("assistant", "a")),
        ("a", "b"),
    )
    assert two.turns == (Turn("user", "R"), Turn("assistant", "c"))  # type: ignore[union-attr]
    path = table(picture=[{"bytes": PNG, "path": "y.png"}], query=["Q"], label=["A"])
    [record] = read(Parquet, path, image="picture", question="query", answer="label")
    assert record.images == (Image(data=PNG),) and record.reference == ()  # type: ignore[union-attr]
    path = table(
        images=[[PNG, PNG]],
        chat=[[{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "A"}]],
    )
    [record] = read(Parquet, path, messages="chat")
    assert len(record.images) == 2  # type: ignore[union-attr]


def test_a_bad_row_costs_only_itself(table: Callable[..., Path]) -> None:
    path = table(image=["lost.png", None, None], question=["Q", "", "Q"], answer=["A", "A", "A"])
    items = read(Parquet, path)
    assert [type(item) for item in items] == [BadRecord, BadRecord, Record]
    assert items[:2] == [
        BadRecord(f"{path}:1", f"there is no image '{path.parent / 'lost.png'}'; check 'image_folder'"),
        BadRecord(f"{path}:2", "'question' is empty, not a text"),
    ]
    path = table(image=[1, 2], question=["Q", "R"], answer=[1.5, 2.5])
    assert {item.why for item in read(Parquet, path)} == {"an answer is a number, not a text"}  # type: ignore[union-attr]


def test_a_table_that_cannot_be_read_is_one_sentence(table: Callable[..., Path]) -> None:
    path = table(a=[1], b=[2])
    assert refused(read, Parquet, path) == (
        f"'{path}' has neither a column of messages nor one of questions and one of answers, but a, b; "
        "name them in 'messages', or in 'question' and 'answer'"
    )
    assert (
        refused(read, Parquet, path, question="c") == f"'{path}' has no column 'c', which 'question' names; it has a, b"
    )
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PAR1", b"no table at all", whole.replace(b"a", b"\xe2")):
        path.write_bytes(content)
        said = refused(read, Parquet, path)
        assert said.startswith(f"'{path}' is not a parquet file, or not a whole one (")
        assert said.endswith("); copy or download it again")


def test_damage_within_a_parquet_file_costs_a_group_of_rows(table: Callable[..., Path]) -> None:
    path = table(question=[f"Q{n}" * 50 for n in range(6)], answer=["A"] * 6)
    content = bytearray(path.read_bytes())
    place = content.index(b"Q2Q2")
    content[place - 40 : place + 20] = b"\xff" * 60
    path.write_bytes(content)
    items = read(Parquet, path)
    assert [type(item) for item in items] == [Record, Record, BadRecord, Record, Record]
    assert items[2].where == f"{path}:3"
    assert items[2].why.startswith("the rows 3 to 4 cannot be read (")  # type: ignore[union-attr]


def test_without_its_library_a_table_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftwork_tables.missing_packages", lambda requires: f"needs {requires.packages[0]}")
    assert refused(read, Parquet, tmp_path) == "'parquet' needs pyarrow>=15"
    assert refused(read, HfDataset, tmp_path) == "'hf-dataset' needs datasets>=4"


def test_a_data_set_of_the_library_is_read_by_split_and_from_any_folder(
    table: Callable[..., Path], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"question": ["Q"], "answer": ["A"], "image": [{"bytes": PNG, "path": None}]}
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    saved = tmp_path / "saved"
    datasets.DatasetDict({"val": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(str(saved))
    [record] = read(HfDataset, saved, split="val")
    assert record.images == (Image(data=PNG),) and record.where == f"{saved}[val]:1"  # type: ignore[union-attr]
    assert refused(read, HfDataset, saved) == f"'{saved}' has no split 'train'; it has val"
    plain = tmp_path / "plain"
    Parquet.write([record], plain)  # type: ignore[list-item]
    found = datasets.load_dataset(str(plain), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.features["images"] == datasets.List(datasets.Image()), (
        "other readers are told which columns are images"
    )
    assert refused(read, HfDataset, tmp_path / "none") == (
        f"'path' is '{tmp_path / 'none'}', which does not exist; set 'path' to a folder, or 'dataset' to a hub id"
    )
    (tmp_path / "junk").mkdir()
    assert refused(read, HfDataset, tmp_path / "junk").startswith(
        f"the data set '{tmp_path / 'junk'}' cannot be loaded ("
    )
    assert list(HfDataset(HfDataset.Settings(path=saved, dataset="a/b")).validate(None)) == [
        "both 'path' and 'dataset' are set; leave out one of them"
    ]


def test_a_row_of_the_hub_names_no_file_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(PNG)
    rows = datasets.Dataset.from_dict({"question": ["Q"], "answer": ["A"], "image": ["x.png"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)  # as the hub is not reached
    [bad] = HfDataset(HfDataset.Settings(dataset="owner/name")).records()
    assert isinstance(bad, BadRecord) and bad.why.endswith("it is not known in which folder; set 'image_folder'")
    [record] = HfDataset(HfDataset.Settings(dataset="owner/name", image_folder=tmp_path)).records()
    assert isinstance(record, Record) and record.images == (Image(tmp_path / "x.png"),)
