"""Settings: what is taken, what is refused and in which words, and the way to a checkpoint and back."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import hypothesis
import pytest
from hypothesis import strategies as st

from graftwork.config import settings
from graftwork.config.wording import words
from graftwork.contracts import Component, NoSettings, TrainSettings, setting
from graftwork.errors import CheckpointError, RunFileError


@dataclass(frozen=True)
class Inner:
    size: int = setting(2, "A size", minimum=1)
    file: Path | None = setting(None, "A file")


@dataclass(frozen=True)
class Everything:
    count: int = setting(3, "How many", minimum=1)
    share: float = setting(0.5, "How much", minimum=0.0, maximum=1.0)
    mode: Literal["fast", "slow"] = setting("fast", "How")
    limit: int | None = setting(None, "How many at most", minimum=1)
    path: Path | None = setting(None, "Where")
    paths: tuple[Path, ...] = setting((), "Where else")
    words: tuple[str, ...] = setting(("a",), "Which")
    pair: tuple[float, float] = setting((0.9, 0.99), "Two")
    mixed: tuple[str, int] = setting(("a", 1), "A name and a number")
    flag: bool = setting(False, "Whether")
    weights: dict[str, float] = setting({}, "How heavy", minimum=0.0)
    inner: Inner = setting(Inner(), "More")
    anything: Any = setting(None, "Whatever")

    def __post_init__(self) -> None:
        if self.flag and self.mode == "slow":
            raise ValueError("flag and mode = 'slow' cannot be combined; choose one")


@dataclass(frozen=True)
class Cached:
    cache: Path = setting(Path("cache"), "Where")


@dataclass(frozen=True)
class Needy:
    name: str = field(metadata={"help": "A name"})
    size: int = setting(1, "A size")


def mistakes(cls: type, table: Mapping[str, Any]) -> list[str]:
    with pytest.raises(RunFileError) as caught:
        settings.parse(cls, table, where="here", folder=None)
    return list(caught.value.details)


def test_lists_become_tuples_and_integers_floats() -> None:
    table = {
        "share": 1,
        "words": ["x", "y"],
        "pair": [0, 1],
        "weights": {"a": 2},
        "inner": {"size": 5},
        "anything": [1],
    }
    parsed = settings.parse(Everything, table, where="here", folder=None)
    expected = Everything(
        share=1.0, words=("x", "y"), pair=(0.0, 1.0), weights={"a": 2.0}, inner=Inner(size=5), anything=[1]
    )
    assert parsed == expected
    assert [type(number) for number in (parsed.share, *parsed.pair, parsed.weights["a"])] == [float] * 4


def test_an_empty_table_gives_the_defaults() -> None:
    assert settings.parse(Everything, {}, where="", folder=None) == Everything()
    assert settings.parse(NoSettings, {}, where="", folder=None) == NoSettings()


def test_paths_are_taken_from_the_folder_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    table = {"path": "data/x.json", "paths": ["/abs", "~/y", "../z"], "inner": {"file": "i"}}
    parsed = settings.parse(Everything, table, where="here", folder=Path("/runs"))
    assert parsed.path == Path("/runs/data/x.json")
    assert parsed.paths == (Path("/abs"), Path("/home/me/y"), Path("/runs/../z"))
    assert parsed.inner.file == Path("/runs/i")
    assert settings.parse(Everything, table, where="here", folder=None).path == Path("data/x.json")


def test_a_relative_default_path_is_chosen_from_the_folder_too() -> None:
    assert settings.parse(Cached, {}, where="", folder=Path("/runs")).cache == Path("/runs/cache")


def test_the_home_of_nobody_is_a_plain_name() -> None:
    parsed = settings.parse(Everything, {"path": "~no-such-user/x"}, where="", folder=Path("/runs"))
    assert parsed.path == Path("/runs/~no-such-user/x")


@pytest.mark.parametrize(
    ("table", "mistake"),
    [
        ({"count": "3"}, "here.count: found '3', wanted integer ≥ 1"),
        ({"count": 3.0}, "here.count: found 3.0, wanted integer ≥ 1"),
        ({"count": True}, "here.count: found true, wanted integer ≥ 1"),
        ({"count": 0}, "here.count: found 0, wanted integer ≥ 1"),
        ({"share": 1.5}, "here.share: found 1.5, wanted number from 0 to 1"),
        ({"share": "0.5"}, "here.share: found '0.5', wanted number from 0 to 1"),
        ({"share": math.nan}, "here.share: found nan, wanted number from 0 to 1"),
        ({"share": math.inf}, "here.share: found inf, wanted number from 0 to 1"),
        ({"mode": "quick"}, "here.mode: found 'quick', wanted 'fast' | 'slow'"),
        ({"limit": 0}, "here.limit: found 0, wanted integer ≥ 1 or nothing"),
        ({"path": 3}, "here.path: found 3, wanted path or nothing"),
        ({"paths": ["a", 3]}, "here.paths: found ['a', 3], wanted list of paths"),
        ({"words": "a"}, "here.words: found 'a', wanted list of strings"),
        ({"pair": [1, 2, 3]}, "here.pair: found [1, 2, 3], wanted list of 2 numbers"),
        ({"mixed": [1, "a"]}, "here.mixed: found [1, 'a'], wanted list of string, integer"),
        ({"flag": 1}, "here.flag: found 1, wanted true or false"),
        ({"flag": datetime.date(2024, 5, 1)}, "here.flag: found the date 2024-05-01, wanted true or false"),
        ({"weights": {"a": -1}}, "here.weights: found a table, wanted table of numbers ≥ 0"),
        ({"inner": 3}, "here.inner: found 3, wanted table"),
        ({"inner": {"size": 0}}, "here.inner.size: found 0, wanted integer ≥ 1"),
        ({"inner": {"sise": 3}}, "here.inner.sise: there is no such setting; did you mean 'size'?"),
        ({"cuont": 3}, "here.cuont: there is no such setting; did you mean 'count'?"),
        ({"count": 2**63}, "here.count: found an integer beyond 64 bits, wanted integer ≥ 1"),
        ({"words": "x" * 200}, f"here.words: found '{'x' * 78}…, wanted list of strings"),
        ({"words": list(range(12))}, "here.words: found [0, 1, 2, 3, 4, 5, 6, 7, 8, …], wanted list of strings"),
        ({"flag": True, "mode": "slow"}, "here: flag and mode = 'slow' cannot be combined; choose one"),
    ],
)
def test_a_mistake_says_what_was_found_and_what_is_wanted(table: dict[str, Any], mistake: str) -> None:
    assert mistakes(Everything, table) == [mistake]


def test_a_number_too_long_to_be_printed_is_refused_in_words() -> None:
    assert mistakes(Everything, {"count": 10**5000}) == [
        "here.count: found an integer beyond 64 bits, wanted integer ≥ 1"
    ]


def test_every_mistake_is_said_at_once() -> None:
    table = {"size": "big", "nmae": "x", "zzzzz": 1}
    with pytest.raises(RunFileError) as caught:
        settings.parse(Needy, table, where="here", folder=None)
    assert str(caught.value) == (
        "the settings of 'here' have 4 mistakes\n"
        "  here.nmae: there is no such setting; did you mean 'name'?\n"
        "  here.zzzzz: there is no such setting; known: name, size\n"
        "  here.name: is missing, wanted string\n"
        "  here.size: found 'big', wanted integer"
    )


def test_what_has_no_settings_takes_none() -> None:
    assert mistakes(NoSettings, {"x": 1}) == ["here.x: there is no such setting"]


def test_reading_collects_without_raising() -> None:
    problems = ["before"]
    beside = ("weights",)
    assert settings.read(NoSettings, {"weigths": 1}, where="", folder=None, problems=problems, beside=beside) is None
    assert settings.read(Inner, {"size": 4}, where="", folder=None, problems=problems) == Inner(4)
    assert problems == ["before", "weigths: there is no such setting; did you mean 'weights'?"]


def test_a_dump_is_plain_json_and_reads_back_to_the_same() -> None:
    table = {"path": "/a", "paths": ["/b"], "limit": 2, "inner": {"file": "/c"}, "weights": {"x": 1}}
    instance = settings.parse(Everything, table, where="", folder=None)
    dumped = settings.dump(instance)
    assert dumped["paths"] == ["/b"]
    assert dumped["inner"] == {"size": 2, "file": "/c"}
    assert settings.parse(Everything, json.loads(json.dumps(dumped)), where="", folder=None) == instance


class Renamed(Component[Inner]):
    """A component whose setting 'size' was called 'width' before."""

    kind = "peft"
    name = "renamed"
    Settings = Inner
    settings_version = 2

    @classmethod
    def migrate(cls, settings: Mapping[str, Any], version: int) -> Mapping[str, Any]:
        return {"size": settings["width"]}


def test_recorded_settings_are_restored_and_older_ones_migrated() -> None:
    assert settings.restore(Renamed, {"size": 4, "file": "/f"}, 2) == Inner(4, Path("/f"))
    assert settings.restore(Renamed, {"width": 4}, 1) == Inner(4)


def test_settings_of_a_newer_version_are_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        settings.restore(Renamed, {"size": 4}, 3)
    assert str(caught.value) == (
        "the settings of 'renamed' were written in version 3, and the installed one reads up to version 2; install a "
        "newer version of its plugin"
    )


def test_recorded_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        settings.restore(Renamed, {"size": 0, "depth": 1}, 2)
    assert str(caught.value) == (
        "the recorded settings do not fit the installed 'renamed'; install the version that wrote them\n"
        "  renamed.depth: there is no such setting; known: size, file\n"
        "  renamed.size: found 0, wanted integer ≥ 1"
    )


def test_rows_say_every_setting_as_a_person_reads_it() -> None:
    rows = {row.name: (row.type, row.default, row.help) for row in settings.rows(Everything)}
    assert rows["count"] == ("integer ≥ 1", "3", "How many")
    assert rows["mode"] == ("'fast' | 'slow'", "'fast'", "How")
    assert rows["limit"] == ("integer ≥ 1 or nothing", "nothing", "How many at most")
    assert rows["words"] == ("list of strings", "['a']", "Which")
    assert rows["flag"] == ("true or false", "false", "Whether")
    assert rows["weights"] == ("table of numbers ≥ 0", "{}", "How heavy")
    assert rows["inner"] == ("table", "a table", "More")
    assert rows["anything"][0] == "value"
    assert settings.rows(Needy)[0] == settings.SettingRow("name", "string", "required", "A name")


def test_a_type_without_bounds_and_one_with_only_an_upper_one_have_words() -> None:
    assert words({"type": "number", "maximum": 2.5}) == "number ≤ 2.5"
    assert words({"anyOf": [{"type": "number"}, {"type": "null"}]}) == "number or nothing"
    assert words({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}) == (
        "list of lists of integers"
    )


def test_the_json_schema_has_descriptions_defaults_and_bounds() -> None:
    schema = settings.json_schema(Everything)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["share"] == {
        "type": "number",
        "minimum": 0.0,
        "maximum": 1.0,
        "description": "How much",
        "default": 0.5,
    }
    assert schema["properties"]["mode"]["enum"] == ["fast", "slow"]
    assert schema["properties"]["pair"]["prefixItems"] == [{"type": "number"}, {"type": "number"}]
    assert "default" not in schema["properties"]["limit"]
    assert "required" not in schema
    assert settings.json_schema(Needy)["required"] == ["name"]
    json.dumps(schema)


def test_the_train_table_is_made_of_settings_that_can_be_said() -> None:
    rows = settings.rows(TrainSettings)
    assert all(row.help and row.type != "value" for row in rows)
    assert settings.parse(TrainSettings, settings.dump(TrainSettings()), where="", folder=None) == TrainSettings()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.dictionaries(st.sampled_from(settings.names(Everything)) | st.text(), values, max_size=4))
def test_whatever_a_table_holds_it_is_parsed_or_refused_in_words(table: dict[str, Any]) -> None:
    try:
        parsed = settings.parse(Everything, table, where="here", folder=Path("/runs"))
    except RunFileError as error:
        assert error.details
        assert all(line.startswith("here") and ": " in line for line in error.details)
    else:
        assert set(table) <= set(settings.names(Everything))
        assert isinstance(parsed, Everything)


@dataclass(frozen=True)
class Shelf:
    size: int = field(metadata={"help": "How large"})
    paths: tuple[Path, ...] = setting((), "Where")


@dataclass(frozen=True)
class Shelves:
    by_name: dict[str, Shelf] = setting({}, "Shelves by name")


def test_tables_by_name_are_read_as_settings_and_their_mistakes_have_places() -> None:
    table = {"by_name": {"left": {"size": 2, "paths": ["a"]}, "right": {"size": 3}}}
    parsed = settings.parse(Shelves, table, where="", folder=Path("/runs"))
    assert parsed == Shelves({"left": Shelf(2, (Path("/runs/a"),)), "right": Shelf(3)})
    assert settings.parse(Shelves, settings.dump(parsed), where="", folder=None) == parsed
    with pytest.raises(RunFileError) as caught:
        settings.parse(Shelves, {"by_name": {"left": {"sise": 2}, "right": {"size": "3"}}}, where="here", folder=None)
    assert list(caught.value.details) == [
        "here.by_name.left.sise: there is no such setting; did you mean 'size'?",
        "here.by_name.left.size: is missing, wanted integer",
        "here.by_name.right.size: found '3', wanted integer",
    ]
    with pytest.raises(RunFileError, match="wanted table of tables"):
        settings.parse(Shelves, {"by_name": {"left": 2}}, where="here", folder=None)
