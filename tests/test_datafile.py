"""Data files: what they resolve to, and what is said of those that cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import COMPONENTS, run_table

from graftwork.config.datafile import DataPlan, resolve_data
from graftwork.contracts import DictLookup, Record
from graftwork.errors import DataError, GraftworkError, PlanRefused, RunFileError
from graftwork_registry import Catalog

LOOKUP = DictLookup(*COMPONENTS)
SHAPES = {"source": [{"use": "shapes", "count": 3}]}


def resolved(given: Any, **options: Any) -> DataPlan:
    return resolve_data(given, LOOKUP, **options)


def test_a_data_file_gives_its_sources_and_operators_without_a_model(tmp_path: Path) -> None:
    file = tmp_path / "data.toml"
    file.write_text(
        'seed = 3\n[data]\nstrict = true\n[[data.source]]\nuse = "shapes"\ncount = 3\n'
        '[[data.operator]]\nuse = "drop-broken-images"\n'
    )
    plan = resolved(file)
    assert (plan.seed, plan.strict, plan.out, plan.run) == (3, True, tmp_path / "data-out", None)
    assert [each.name for each in (*plan.sources, *plan.operators)] == ["shapes", "drop-broken-images"]
    assert len(list(plan.sources[0].records())) == 3


def test_a_run_file_gives_its_data_and_keeps_its_run() -> None:
    plan = resolved({**run_table(None), "out": "there"}, folder=Path("/somewhere"))
    assert plan.run is not None and plan.run.model.use == "mgm-gemma"
    assert (plan.out, plan.seed) == (Path("/somewhere/there"), 5)


def test_data_is_read_by_the_one_source_that_recognises_it(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    file.write_text(json.dumps({"conversations": talk}))
    plan = resolved(file)
    (record,) = plan.sources[0].records()
    assert isinstance(record, Record) and record.question == "What?"
    assert plan.run_context.sources[0].settings["path"] == str(file)


@pytest.mark.parametrize(
    ("line", "source"),
    [
        ({"conversations": [{"from": "human", "value": "?"}]}, "llava-json"),
        ({"conversations": [{"role": "user", "content": "?"}]}, "messages-jsonl"),
        ({"messages": []}, "messages-jsonl"),
        ({"text": "[[human]]: ?"}, "data-juicer-jsonl"),
    ],
)
def test_a_file_of_json_lines_is_told_by_its_first_object(tmp_path: Path, line: Any, source: str) -> None:
    (tmp_path / "data.jsonl").write_text(f"\n{{cut\n{json.dumps(line)}\n")
    catalog = Catalog.discover()
    assert resolve_data(tmp_path / "data.jsonl", catalog).run_context.sources[0].name == source


def test_the_recipe_of_the_challenge_is_planned_where_its_files_are_missing() -> None:
    missing: list[str] = []
    example = Path(__file__).parents[1] / "examples" / "mgm-2b" / "data.toml"
    try:
        plan = resolve_data(example, Catalog.discover(), missing_files=missing)
    except PlanRefused as refused:  # Where Data-Juicer is not installed, that is all there is against it.
        assert all("data-juicer" in line for line in refused.details)
    else:
        assert plan.run_context.operators[-1].settings["count"] == 200_000
    assert any("mgm_pretrain_stage_1.jsonl" in line for line in missing)


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        ({"data": {"source": [{"use": "shape"}]}}, PlanRefused, "data.source.0: nothing is called 'shape'"),
        ({"data": {"source": [{"use": "shapes", "cuont": 3}]}}, PlanRefused, "did you mean 'count'?"),
        ({"data": {"source": [{"use": "llava-json"}]}}, PlanRefused, "data.source.0: 'path' is not set"),
        ({"data": {"strict": True}}, RunFileError, "data.source: is missing"),
        ({"data": SHAPES, "train": {}}, RunFileError, "train: there is no such table or key"),
        (
            {"data": SHAPES, "verify": {}},
            PlanRefused,
            "verify: asks a writer, which graftwork data synthesize alone does",
        ),
    ],
)
def test_what_cannot_work_is_said_with_its_place(
    table: dict[str, Any], error: type[GraftworkError], words: str
) -> None:
    with pytest.raises(error) as caught:
        resolved(table)
    assert words in str(caught.value)


def test_data_that_no_source_recognises_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        resolved(tmp_path / "none")
    (tmp_path / "data.csv").touch()
    with pytest.raises(DataError, match=r"no data source says that .*data.csv' is its own; write a data file"):
        resolved(tmp_path / "data.csv")


def test_missing_files_are_noted_where_that_is_asked_for(tmp_path: Path) -> None:
    missing: list[str] = []
    plan = resolved(
        {"data": {"source": [{"use": "llava-json", "path": "none.json"}]}}, folder=tmp_path, missing_files=missing
    )
    assert missing == [f"data.source.0: there is no file '{tmp_path / 'none.json'}'; correct 'path'"]
    assert plan.sources[0].settings.path == tmp_path / "none.json"
