"""The operator data-juicer as far as it needs no Data-Juicer: what it reads, what it refuses, and how records pass as rows."""

from __future__ import annotations

import json
import resource
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from graftwork.config.runfile import load
from graftwork.config.settings import json_schema, parse, rows
from graftwork.contracts import BadRecord, Image, Record, Turn
from graftwork.contracts.plan import Choice, ModelSpec, Plan, RunContext
from graftwork.errors import DataError, RunFileError
from graftwork_data_juicer import DataJuicer, DataJuicerSettings
from graftwork_data_juicer.recipe import Step, read_steps
from graftwork_data_juicer.rows import kept_records, read_rows, write_rows
from graftwork_data_juicer.worker.judging import around_images, deciding, filter_text

RATIO = {"op": "image_aspect_ratio_filter", "max_ratio": 5.0}


def operator(*process: dict[str, Any], **others: Any) -> DataJuicer:
    return DataJuicer(DataJuicerSettings(process=process, **others))


def record(id: str = "1", *turns: str, images: tuple[Image, ...] = ()) -> Record:
    texts = turns or ("What?", "A cat.")
    roles = ("user", "assistant")
    return Record(
        id, tuple(Turn(roles[place % 2], text) for place, text in enumerate(texts)), images, where=f"a.json:{id}"
    )


def problems(*process: Any, recipe: Path | None = None, folder: Path = Path()) -> list[str]:
    return read_steps(process, recipe, folder)[1]


# What it reads ----------------------------------------------------------------------------------------------------------


def test_operators_stand_in_a_run_file_as_tables(tmp_path: Path) -> None:
    table = {"process": [RATIO, {"op": "clean_links_mapper"}], "recipe": "a.yaml"}
    settings = parse(DataJuicerSettings, table, where="data.operator.0", folder=tmp_path)
    assert settings.process == (RATIO, {"op": "clean_links_mapper"})
    assert (settings.recipe, settings.folder) == (tmp_path / "a.yaml", tmp_path)
    with pytest.raises(RunFileError, match="1 mistake") as caught:
        parse(DataJuicerSettings, {"process": ["clean_links_mapper"]}, where="data.operator.0", folder=tmp_path)
    assert caught.value.details == ("data.operator.0.process: found ['clean_links_mapper'], wanted list of tables",)
    assert {row.name: row.type for row in rows(DataJuicerSettings)}["process"] == "list of tables"


def test_the_two_forms_of_an_operator_mean_the_same() -> None:
    steps, wrong = read_steps([RATIO, {"image_aspect_ratio_filter": {"max_ratio": 5.0}}], None, Path())
    assert not wrong
    assert [(step.op, step.params) for step in steps] == [("image_aspect_ratio_filter", {"max_ratio": 5.0})] * 2
    assert problems({"a": 1, "b": 2})[0].startswith("process.0: is neither a table with 'op'")


def test_a_recipe_gives_its_list_and_may_have_no_other_key_that_changes_what_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "project_name: demo\nnp: 4\nprocess:\n  - text_length_filter:\n      min_len: 5\n  - clean_links_mapper:\n"
        "  - fix_unicode_mapper\nop_fusion: true\nexecutor_type: ray\n"
    )
    steps, wrong = read_steps((), path, tmp_path)
    assert [(step.at, step.op, step.params) for step in steps] == [
        ("recipe.yaml: process.0", "text_length_filter", {"min_len": 5}),
        ("recipe.yaml: process.1", "clean_links_mapper", {}),
        ("recipe.yaml: process.2", "fix_unicode_mapper", {}),
    ]
    assert wrong == [
        "the key 'op_fusion' of the recipe 'recipe.yaml' is not read here; take it out",
        "the key 'executor_type' of the recipe 'recipe.yaml' is not read here; set 'engine' instead",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("process: [", "recipe.yaml', line 1 is not YAML"),
        ("np: 4\n", "has no list 'process'"),
        ("process: {}\n", "has no list 'process'"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str | None, why: str) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    (found,) = problems(recipe=path)
    assert why in found


def test_operators_come_from_one_place() -> None:
    assert problems() == ["neither 'process' nor 'recipe' is set; name the operators that shall run"]
    assert problems(RATIO, recipe=Path("a.yaml"))[0] == "both 'recipe' and 'process' are set; keep one of them"


# What it refuses --------------------------------------------------------------------------------------------------------


def test_operators_that_may_not_run_are_all_named_with_the_reason() -> None:
    names = (
        "image_aspect_ratio_filte",
        "python_lambda_mapper",
        "image_blur_mapper",
        "video_nsfw_filter",
        "random_selector",
    )
    found = problems(*({"op": name} for name in names), {"op": "nothing_like_it"})
    assert [line.partition(": ")[0] for line in found] == [f"process.{number}" for number in range(6)]
    assert found[0].endswith("is no operator that may run here; did you mean 'image_aspect_ratio_filter'?")
    assert found[1].endswith("'python_lambda_mapper' may not run here: it runs any code")
    assert found[2].endswith("Graftwork takes texts alone from Data-Juicer")
    assert found[3].endswith("it is about videos")
    assert found[4].endswith("use 'sample'")
    assert found[5].endswith("docs/data.md lists those that may")


def test_models_are_folders_of_this_machine(tmp_path: Path) -> None:
    similar = "image_text_similarity_filter"
    (tmp_path / "empty").mkdir()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}")
    assert problems({"op": similar}) == [
        f"process.0: '{similar}' needs 'hf_clip', a folder with 'config.json' on this machine; nothing is fetched"
    ]
    hub = problems({"op": similar, "hf_clip": "openai/clip-vit-base-patch32"}, folder=tmp_path)
    assert "there is no such folder; fetch it first, as hub ids are not followed" in hub[0]
    assert "which holds no 'config.json'" in problems({"op": similar, "hf_clip": "empty"}, folder=tmp_path)[0]
    steps, wrong = read_steps([{"op": similar, "hf_clip": "clip"}], None, tmp_path)
    assert (wrong, steps[0].params["hf_clip"]) == ([], str(tmp_path / "clip"))
    aesthetics = {"op": "image_aesthetics_filter", "hf_scorer_model": "clip"}
    assert "tells the kind of model by a 'v1' or 'v2' in its path" in problems(aesthetics, folder=tmp_path)[0]


def test_what_data_juicer_would_fetch_is_refused() -> None:
    (found,) = problems({"op": "words_num_filter", "tokenization": True})
    assert found.endswith("'tokenization' of 'words_num_filter' may not be true: Data-Juicer would fetch a tokenizer")


def test_operators_that_read_images_stand_behind_drop_broken_images() -> None:
    def clauses(process: dict[str, Any], *before: str) -> list[str]:
        own = Choice("data_operator", "data-juicer", "", "", "", {"process": [process], "recipe": None})
        operators = [*(Choice("data_operator", name, "", "", "") for name in before), own]
        model = Choice("model", "none", "", "", "")
        plan = Plan(ModelSpec(model), RunContext(operators=operators))
        nowhere = Path("no-such-python")
        return [clause for clause in operator(process, python=nowhere).validate(plan) if "python" not in clause]

    assert clauses(RATIO) == ["it reads images, and 'drop-broken-images' does not stand before it; put it there"]
    assert clauses(RATIO, "drop-broken-images") == []
    assert clauses({"op": "clean_links_mapper"}) == []


def test_deduplicators_of_texts_are_refused_for_records_with_images() -> None:
    both = [record("1"), record("2", "<image>\nWhat?", "A cat.", images=(Image(data=b""),))]
    with pytest.raises(DataError, match="'document_deduplicator' compares texts alone"):
        list(operator({"op": "document_deduplicator"}).apply(both, seed=0))


def test_all_that_is_wrong_is_said_before_anything_runs() -> None:
    with pytest.raises(DataError, match="cannot run, for 2 reasons") as caught:
        list(operator({"op": "nothing"}, {"op": "image_nsfw_filter"}).apply([record()], seed=0))
    assert len(caught.value.details) == 2


@pytest.mark.skipif(find_spec("data_juicer") is not None, reason="Data-Juicer is installed")
def test_an_environment_without_data_juicer_is_named() -> None:
    with pytest.raises(
        DataError, match=f"Data-Juicer in '{sys.executable}': Data-Juicer is not installed in it"
    ) as caught:
        list(operator(RATIO).apply([record()], seed=0))
    plan = Plan(ModelSpec(Choice("model", "none", "", "", "")))
    assert list(operator(RATIO).validate(plan)) == [caught.value.sentence]


def test_an_interpreter_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be started .*; set 'python' to the interpreter that has Data-Juicer"):
        list(operator(RATIO, python=tmp_path / "python").apply([record()], seed=0))


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DataError, match=r"cannot be kept in .*; free some space, or set TMPDIR"):
            list(operator(RATIO).apply([record(str(number), "x" * 1000, "y") for number in range(200)], seed=0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_it_depends_on_its_recipe_its_models_and_the_release_of_data_juicer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, recipe, release = (
        tmp_path / "clip",
        tmp_path / "recipe.yaml",
        tmp_path / "site" / "py_data_juicer-1.dist-info",
    )
    (clip / "deep").mkdir(parents=True), release.mkdir(parents=True)
    (clip / "config.json").write_text("{}"), (clip / "deep" / "weights").touch()
    recipe.write_text(f"process:\n  - image_text_similarity_filter:\n      hf_clip: {clip}\n  - clean_links_mapper\n")
    (release / "METADATA").write_text("Metadata-Version: 2.1\nName: py-data-juicer\nVersion: 1\n")
    (release / "RECORD").write_text("py_data_juicer-1.dist-info/METADATA,,\n")
    monkeypatch.setattr(sys, "path", [str(release.parent)])
    expected = [release / "METADATA", recipe, clip / "config.json", clip / "deep" / "weights"]
    assert operator(recipe=recipe).files() == operator(recipe=recipe, python=Path(sys.executable)).files() == expected
    assert operator(recipe=recipe, python=tmp_path / "python").files() is None
    assert operator(recipe=recipe, engine="ray", address="host:1").files() is None
    monkeypatch.setattr(sys, "path", [])
    assert operator(recipe=recipe).files() is None


# Records and rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("What?", ("", "What?", "")),
        ("<image>\nWhat?", ("<image>\n", "What?", "")),
        ("What? <image>", ("", "What?", " <image>")),
        ("<image> <image>\n", ("<image> <image>\n", "", "")),
        ("  two  spaces ", ("", "  two  spaces ", "")),
        ("Is <image> it?", ("", "Is <image> it?", "")),
        ("<image>\na <image> b\n<image>", ("<image>\n", "a <image> b", "\n<image>")),
    ],
)
def test_a_mapper_sees_a_text_without_the_images_at_its_ends(text: str, parts: tuple[str, str, str]) -> None:
    assert around_images(text) == parts
    assert "".join(parts) == text


def test_a_filter_sees_all_turns_and_marks_where_it_needs_them() -> None:
    assert filter_text(["<image>\nWhat?", "A cat."]) == "What?\nA cat."
    assert filter_text(["<image>\nWhat?", "A cat."], "<img>") == "<img> What?\nA cat."


def test_the_limit_that_decided_is_told() -> None:
    limits = {"min_ratio": 0.3, "max_ratio": 5.0}
    assert deciding({"aspect_ratios": [30.0, 1.0]}, limits) == {"max_ratio": 5.0}
    assert deciding({"aspect_ratios": [0.1]}, limits) == {"min_ratio": 0.3}
    assert deciding({"aspect_ratios": [5.0]}, limits) == limits


def test_rows_say_where_images_are(tmp_path: Path) -> None:
    images = (
        Image(tmp_path / "a.png"),
        Image(tmp_path / "b.tar", span=(512, 20)),
        Image(data=b"1234"),
        Image(data=b"56"),
    )
    write_rows([record("1", "<image>" * 4 + "What?", "A cat.", images=images)], tmp_path)
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    stored = str(tmp_path / "images.bin")
    assert row["images"] == [[str(images[0].path)], [str(images[1].path), 512, 20], [stored, 0, 4], [stored, 4, 2]]
    assert (tmp_path / "images.bin").read_bytes() == b"123456"


def test_records_that_come_once_are_kept_on_disk(tmp_path: Path) -> None:
    given = [record(str(number), images=(Image(tmp_path / f"{number}.png"),)) for number in range(50)]
    written = write_rows(iter(given), tmp_path, keep=True)
    assert (written.records, written.images) == (50, [str(tmp_path / f"{number}.png") for number in range(32)])
    assert list(kept_records(tmp_path)) == given
    assert write_rows(given, tmp_path / "..") == written and not (tmp_path / ".." / "records.pickle").exists()


def outcomes(path: Path, given: list[Record], *rows: dict[str, Any]) -> list[Record | BadRecord]:
    path.write_text("".join(json.dumps({"changed": [], "turns": []} | row) + "\n" for row in rows))
    return list(read_rows(path, given))


def test_rows_become_records_again(tmp_path: Path) -> None:
    given = [record(str(number), "<image>\nWhat?", "A cat.") for number in range(4)]
    dropped = {"op": "a_filter", "stats": {"ratios": [30.0, 1 / 3]}, "limits": {"max_ratio": 5.0}}
    found = outcomes(
        tmp_path / "rows.jsonl",
        given,
        {"n": 0},
        {"n": 1, "changed": ["a_mapper"], "turns": ["<image>\nWhat?", "A dog."]},
        {"n": 2, "dropped": dropped},
        {"n": 3, "dropped": {"op": "a_mapper", "error": "no"}},
        {"n": 3, "made": 1, "op": "captioner", "turns": ["<image>\nDescribe the image.", "A dog."]},
    )
    assert found[0] is given[0]
    assert isinstance(found[1], Record)
    assert (found[1].id, found[1].turns[1].text) == ("1", "A dog.")
    why = "a_filter: ratios [30.0, 0.333333], max_ratio 5.0"
    assert found[2] == BadRecord("a.json:2", why, "2", {"ratios": [30.0, 1 / 3]})
    assert found[3] == BadRecord("a.json:3", "a_mapper: no", "3")
    assert isinstance(found[4], Record)
    assert (found[4].id, dict(found[4].meta)) == ("3/caption/1", {"made_by": "data-juicer", "of": ["3"]})


def test_numbers_that_json_does_not_know_are_texts(tmp_path: Path) -> None:
    stats = {"score": float("nan"), "all": [float("inf"), 1.5], "by": {"x": float("-inf")}}
    (bad,) = outcomes(
        tmp_path / "rows.jsonl", [record("0")], {"n": 0, "dropped": {"op": "f", "stats": stats, "limits": {}}}
    )
    assert isinstance(bad, BadRecord)
    assert bad.stats == {"score": "nan", "all": ["inf", 1.5], "by": {"x": "-inf"}}


def test_a_row_that_is_missing_is_no_loss_in_silence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row for record '1'"):
        outcomes(tmp_path / "rows.jsonl", [record("0"), record("1")], {"n": 0})


def test_a_step_tells_the_worker_what_it_needs() -> None:
    task = Step("process.0", "image_text_similarity_filter", {"hf_clip": "clip"}).task()
    assert (task["images"], task["marks"], task["model"], task["duplicates"]) == (True, True, True, False)


def test_the_schema_of_run_files_knows_the_tables() -> None:
    own = json_schema(DataJuicerSettings)["properties"]["process"]
    assert (own["type"], own["items"]) == ("array", {"type": "object", "additionalProperties": {}})


def test_a_run_file_with_such_tables_is_read(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text(
        '[model]\nuse = "mgm-gemma"\n[[data.operator]]\nuse = "data-juicer"\n[[data.operator.process]]\n'
        'op = "image_aspect_ratio_filter"\nmax_ratio = 5.0\n[[data.operator.process]]\nop = "clean_links_mapper"\n'
    )
    (selection,) = load(run).operators
    assert selection.settings == {"process": [RATIO, {"op": "clean_links_mapper"}]}
