"""JSON files are read piece by piece, and as if they were read at once."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from graftwork.contracts import BadRecord
from graftwork.data import jsonfiles, read_json_lines, read_json_list
from graftwork.errors import DataError


def test_a_list_is_read_the_same_however_it_is_cut_into_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [{"text": "Größe €🙂" * number, "more": ["A" * number, None, 1.5]} for number in range(1, 9)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*contents, 12345, *contents], indent=1, ensure_ascii=False), encoding="utf-8")
    whole = list(read_json_list(path))
    assert [content for _, content in whole] == [*contents, 12345, *contents]
    for size in (1, 7, 64):
        monkeypatch.setattr(jsonfiles, "CHUNK", size)
        assert list(read_json_list(path)) == whole


def test_what_goes_on_for_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonfiles, "LARGEST", 2**20)
    monkeypatch.setattr(jsonfiles, "CHUNK", 2**16)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([1, "a" * 3 * 2**20, 2]))
    _, (where, bad) = read_json_list(path)
    what = "Unterminated string starting at"
    why = f"from here on the file is not JSON ({what}) within 1 MiB; is it damaged?"
    assert bad == BadRecord(where, why) and where == f"{path}:1 (record 2)"
    path.write_text("\n".join(map(json.dumps, ["a" * 3 * 2**20, 1])))
    (where, bad), last = read_json_lines(path)
    assert bad == BadRecord(where, "the line is longer than 1 MiB") and where == f"{path}:1"
    assert last == (f"{path}:2", 1)


def test_a_list_that_ends_in_half_a_character_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes('[1, "ä'.encode()[:-1])
    assert [content for _, content in read_json_list(path)] == [
        1,
        BadRecord(
            f"{path}:1 (record 2)",
            "from here on the file is not JSON (Unterminated string starting at); is it cut off?",
        ),
    ]
    path.write_bytes(b'[1,\n"\xff"]')
    with pytest.raises(DataError, match=r"is not UTF-8 text \(line 2\); is it the right file\?"):
        list(read_json_list(path))


def test_a_large_list_is_not_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonfiles, "CHUNK", 2**16)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "a" * 1000}] * 8000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_json_list(path)) == 8000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 8


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[{"a": 1} {"a": 2}]', "after this record comes neither a comma nor ']', so the rest is not read"),
        ('[{"a": 1}', "after this record comes neither a comma nor ']', so the rest is not read"),
        ("[1] 2", "what comes after the end of the list is not read"),
        ("[" * 100_000, "from here on the file is not JSON (it is nested too deeply); is it cut off?"),
        ("[" + "1" * 5000 + "]", "from here on the file is not JSON (Exceeds the limit"),
        ("[", "from here on the file is not JSON (Expecting value); is it cut off?"),
    ],
)
def test_a_damaged_list_says_from_where_on_it_is_lost(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    *_, (_, last) = read_json_list(path)
    assert isinstance(last, BadRecord)
    assert last.why.startswith(why)
