"""Run files of any content: they are read, or refused with a RunFileError, and nothing else comes out."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.config import runfile
from graftwork.config.runfile import RunFile
from graftwork.errors import RunFileError

DOCS = Path(__file__).parents[1] / "docs" / "run-file.md"
EXAMPLE = DOCS.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]

scalars = st.booleans() | st.integers() | st.floats() | st.text() | st.datetimes() | st.dates() | st.times()
names = st.sampled_from(sorted(set(re.findall(r"\w+", EXAMPLE)) | {"none", "*", "config"})) | st.text()
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)


def assert_read_or_refused(table: dict[str, Any]) -> None:
    before = copy.deepcopy(table)
    try:
        run = runfile.parse_run(table, Path("/runs"))
    except RunFileError as error:
        assert error.details
        assert all(": " in line for line in error.details)
    else:
        assert isinstance(run, RunFile)
        assert run.out.is_absolute()
    assert repr(table) == repr(before)


@settings(deadline=None)
@given(st.dictionaries(names, anything, max_size=6))
def test_any_table_is_read_or_refused_in_words(table: dict[str, Any]) -> None:
    assert_read_or_refused(table)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path to everything inside nested tables and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(*path, key), *places(inner, (*path, key))]]


@settings(deadline=None)
@given(st.sampled_from(places(tomllib.loads(EXAMPLE))), names, anything)
def test_a_good_run_file_with_one_thing_replaced_is_read_or_refused_in_words(
    place: tuple[str | int, ...], name: str, value: Any
) -> None:
    table: Any = tomllib.loads(EXAMPLE)
    here = table
    for key in place[:-1]:
        here = here[key]
    here[place[-1]] = value
    if isinstance(here, dict):
        here[name] = value
    assert_read_or_refused(table)


@settings(deadline=None)
@given(st.binary() | st.text().map(str.encode) | st.text(alphabet="[]{}=.,\"'#\\\n a1").map(str.encode))
def test_any_bytes_are_read_or_refused_in_words(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        path.write_bytes(content)
        with pytest.raises(RunFileError):
            runfile.load(path)


@settings(deadline=None)
@given(st.lists(st.text() | st.tuples(names, st.text()).map("=".join), max_size=3))
def test_any_overrides_are_applied_or_refused_in_words(overrides: list[str]) -> None:
    with TemporaryDirectory() as folder:
        source = Path(folder) / "run.toml"
        source.write_text(EXAMPLE, encoding="utf-8")
        try:
            runfile.load(source, overrides)
        except RunFileError as error:
            assert error.details
