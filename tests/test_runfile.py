"""Run files: what they say, every mistake at once, overrides, and that the documentation is true."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from graftwork.config import runfile, settings, tables
from graftwork.config.runfile import RunFile, Selection
from graftwork.contracts import TrainSettings
from graftwork.contracts.plan import Mix
from graftwork.errors import RunFileError

DOCS = Path(__file__).parents[1] / "docs" / "run-file.md"
WHOLE = """
seed = 3
out = "../results"

[model]
use = "tiny"
weights = "model"
depth = 2

[model.parts.low]
use = "eye"
weights = "owner/eye"
layer = -2

[model.parts.high]
use = "none"

[peft]
use = "lora"
on = ["language"]
also_train = ["connector"]
rank = 4

[attention]
prefer = ["fast", "plain"]

[attention.sites]
"vision.low" = ["plain"]

[memory]
use = ["checkpointing"]

[memory.checkpointing]
every = 2

[data]
strict = true

[[data.source]]
use = "json"
path = "a.json"

[[data.source]]
use = "json"
path = "b.json"

[[data.operator]]
use = "words"

[train]
learning_rate = 1
steps = 10

[evaluate]
on = ["colours", "acme:shapes"]

[evaluate."acme:shapes"]
limit = 5
"""


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(table: dict[str, Any]) -> list[str]:
    with pytest.raises(RunFileError) as caught:
        runfile.parse_run(table, Path("/runs"))
    return list(caught.value.details)


def model(**more: Any) -> dict[str, Any]:
    return {"model": {"use": "tiny"}, **more}


def test_every_table_is_read(tmp_path: Path) -> None:
    source = write(tmp_path, WHOLE)
    assert runfile.load(source) == RunFile(
        source=source,
        folder=tmp_path,
        out=tmp_path / "../results",
        seed=3,
        model=Selection("tiny", {"depth": 2}, weights="model", where="model"),
        parts={
            "low": Selection("eye", {"layer": -2}, weights="owner/eye", where="model.parts.low"),
            "high": Selection("none", where="model.parts.high"),
        },
        peft=Selection("lora", {"rank": 4}, where="peft"),
        on=("language",),
        also_train=("connector",),
        attention={"vision.low": ("plain",), "*": ("fast", "plain")},
        memory=(Selection("checkpointing", {"every": 2}, where="memory.checkpointing"),),
        sources=(
            Selection("json", {"path": "a.json"}, where="data.source.0"),
            Selection("json", {"path": "b.json"}, where="data.source.1"),
        ),
        operators=(Selection("words", where="data.operator.0"),),
        mix=(Mix(), Mix()),
        data=tables.DataTable(strict=True),
        train=TrainSettings(learning_rate=1.0, steps=10),
        train_given=frozenset({"learning_rate", "steps"}),
        evaluate=(
            Selection("colours", where="evaluate.colours"),
            Selection("acme:shapes", {"limit": 5}, where="evaluate.acme:shapes"),
        ),
    )


def test_the_least_run_file_names_a_model(tmp_path: Path) -> None:
    source = write(tmp_path, "[model]\nuse = 'tiny'\n", "night.toml")
    assert runfile.load(source) == RunFile(
        source=source, folder=tmp_path, out=tmp_path / "night-out", seed=17, model=Selection("tiny", where="model")
    )


def test_relative_paths_start_at_the_run_file_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, WHOLE)
    monkeypatch.chdir(tmp_path)
    assert runfile.load("run.toml").folder == tmp_path
    assert runfile.load(Path("run.toml"), ["out=there"]).out == tmp_path / "there"


def test_roles_can_be_trained_without_a_method() -> None:
    run = runfile.parse_run(model(peft={"also_train": ["connector"]}), Path("/runs"))
    assert (run.peft, run.also_train, run.source, run.out) == (None, ("connector",), None, Path("/runs/run-out"))


def test_a_part_may_leave_the_choice_of_its_tower_to_the_model() -> None:
    run = runfile.parse_run({"model": {"use": "tiny", "parts": {"low": {"weights": "w"}}}}, Path("/runs"))
    assert run.parts == {"low": Selection("", weights="w", where="model.parts.low")}


def test_every_mistake_is_said_at_once_with_its_path(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        """
sed = 3
[model]
weights = 3
[model.parts.low]
use = 7
[pefd]
[peft]
on = "language"
[attention]
preffer = ["a"]
[attention.sites]
language = []
[memory]
use = ["zero"]
[memory.zer]
stage = 2
[data]
stric = true
[data.source]
use = "json"
[[data.operator]]
path = "x"
[train]
epochs = "all"
batch_size = 0
learning_rat = 1
schedule = "step"
[evaluate]
on = ["a", "b", "a"]
""",
    )
    with pytest.raises(RunFileError) as caught:
        runfile.load(source)
    assert str(caught.value).replace(str(tmp_path), "") == (
        "'/run.toml' has 16 mistakes\n"
        "  sed: there is no such table or key; did you mean 'seed'?\n"
        "  pefd: there is no such table or key; did you mean 'peft'?\n"
        "  model.parts.low.use: found 7, wanted string\n"
        "  model.use: is missing, wanted string\n"
        "  model.weights: found 3, wanted string or nothing\n"
        "  peft.on: found 'language', wanted list of strings\n"
        "  attention.preffer: there is no such setting; did you mean 'prefer'?\n"
        "  data.stric: there is no such table or key; did you mean 'strict'?\n"
        "  data.source: found a table, wanted tables that begin with [[data.source]]\n"
        "  data.operator.0.use: is missing, wanted string\n"
        "  memory.zer: 'memory.use' does not name it; did you mean 'zero'?\n"
        "  evaluate.on: names 'a' more than once; name it once\n"
        "  train.learning_rat: there is no such setting; did you mean 'learning_rate'?\n"
        "  train.epochs: found 'all', wanted number ≥ 0\n"
        "  train.batch_size: found 0, wanted integer ≥ 1\n"
        "  train.schedule: found 'step', wanted 'cosine' | 'linear' | 'constant'"
    )


@pytest.mark.parametrize(
    ("table", "mistake"),
    [
        ({}, "model.use: is missing, wanted string"),
        ({"model": {"use": "tiny", "parts": 3}}, "model.parts: found 3, wanted table"),
        ({"model": {"use": "tiny", "parts": {"low": "eye"}}}, "model.parts.low: found 'eye', wanted table"),
        (
            {"model": {"use": "tiny", "parts": {"low": {"use": "none", "weights": "w"}}}},
            "model.parts.low: a part that is 'none' has no other keys; remove them, or name a tower",
        ),
        (model(seed=-1), "seed: found -1, wanted integer from 0 to 4294967295"),
        (model(peft={}), "peft.use: is missing, wanted the name of a PEFT method"),
        (model(peft={"on": ["language"]}), "peft.use: is missing, wanted the name of a PEFT method"),
        (model(peft={"also_train": ["a"], "rank": 3}), "peft.use: is missing, wanted the name of a PEFT method"),
        (model(attention=["a"]), "attention: found ['a'], wanted table"),
        (
            model(attention={"sites": {"*": ["a"]}}),
            "attention.sites.*: sites that are not named have 'attention.prefer'",
        ),
        (model(attention={"sites": {"language": []}}), "attention.sites.language: names no kernel"),
        (model(memory={"use": ["zero"], "zero": 3}), "memory.zero: found 3, wanted table"),
        (model(memory={"zero": {}}), "memory.zero: 'memory.use' does not name it"),
        (model(memory={"use": "zero", "zero": {}}), "memory.use: found 'zero', wanted list of strings"),
        (model(evaluate={"on": ["a"], "b": {}}), "evaluate.b: 'evaluate.on' does not name it; known: a"),
        (
            model(data={"source": ["json"]}),
            "data.source: found ['json'], wanted tables that begin with [[data.source]]",
        ),
        (model(data={"sources": []}), "data.sources: there is no such table or key; did you mean 'source'?"),
    ],
)
def test_a_mistake_says_what_was_found_and_what_is_wanted(table: dict[str, Any], mistake: str) -> None:
    assert mistakes(table) == [mistake]


# Files ----------------------------------------------------------------------------------------------------------------


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RunFileError) as caught:
        runfile.load(path, overrides)
    return str(caught.value)


def test_files_that_are_no_run_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert refusal(missing) == f"there is no run file '{missing}'; correct the path"
    assert refusal(missing / "deeper") == f"there is no run file '{missing}/deeper'; correct the path"
    assert refusal(tmp_path) == f"'{tmp_path}' is not a file; name a run file, which is TOML"
    assert refusal(Path("/dev/zero")) == "'/dev/zero' is not a file; name a run file, which is TOML"
    long = tmp_path / ("x" * 300)
    assert refusal(long) == f"'{long}' cannot be read (File name too long); correct the path or its permissions"
    assert "cannot be read (embedded null" in refusal(tmp_path / "a\0b")
    inside = write(tmp_path, "x = 1") / "run.toml"
    assert refusal(inside) == f"'{inside}' cannot be read (Not a directory); correct the path or its permissions"

    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"a = 1\n\xff\xfe")
    assert refusal(binary) == f"'{binary}' is not text in UTF-8 (byte 6); a run file is TOML"
    huge = tmp_path / "huge.toml"
    with huge.open("wb") as stream:
        stream.truncate(1 << 40)
    assert refusal(huge) == f"'{huge}' is larger than 1 MiB, so it is no run file; correct the path"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, WHOLE)
    source.chmod(0)
    assert refusal(source) == f"'{source}' cannot be read (Permission denied); correct the path or its permissions"


def test_a_mistake_in_the_toml_is_said_with_its_line(tmp_path: Path) -> None:
    source = write(tmp_path, "[model]\nuse = tiny\n")
    assert refusal(source) == f"'{source}' is not TOML: Invalid value (at line 2, column 7)"
    source = write(tmp_path, "seed = " + "1" * 5000)
    assert refusal(source).startswith(f"'{source}' is not TOML: Exceeds the limit")
    source = write(tmp_path, "x = " + "[" * 100_000)
    assert refusal(source) == f"'{source}' is nested too deeply to be a run file"


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert runfile.load(write(tmp_path, "\ufeff[model]\nuse = 'tiny'\n")).model.use == "tiny"


# Overrides ------------------------------------------------------------------------------------------------------------


def test_overrides_change_the_run_file_before_it_is_read(tmp_path: Path) -> None:
    overrides = [
        "train.learning_rate=1e-3",
        "train.steps = 7",
        "peft.use=ia3",
        "model.weights=C:\\models # mine",
        'attention.sites."vision.low"=["fast"]',
        "data.source.1.path=c=d.json",
        'memory.checkpointing={"every" = 3}',
        'evaluate.on=["colours"]',
        "out=1\nseed=9",
    ]
    text = WHOLE.replace('[evaluate."acme:shapes"]\nlimit = 5', "")
    run = runfile.load(write(tmp_path, text), overrides)
    assert (run.train.learning_rate, run.train.steps, run.seed) == (1e-3, 7, 3)
    assert run.out == tmp_path / "1\nseed=9"
    assert run.peft == Selection("ia3", {"rank": 4}, where="peft")
    assert run.model.weights == "C:\\models # mine"
    assert run.attention["vision.low"] == ("fast",)
    assert [source.settings["path"] for source in run.sources] == ["a.json", "c=d.json"]
    assert run.memory[0].settings == {"every": 3}
    assert [evaluator.use for evaluator in run.evaluate] == ["colours"]


def test_an_override_makes_the_tables_that_it_needs(tmp_path: Path) -> None:
    source = write(tmp_path, "[model]\nuse = 'tiny'\n")
    run = runfile.load(source, ["model.parts.low.weights=w", "train.steps=2"])
    assert run.parts["low"].weights == "w"
    assert run.train.steps == 2


def test_every_override_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, WHOLE)
    advice = "an override is KEY=VALUE, such as train.learning_rate=1e-3"
    overrides = ["train.steps", "=3", "a b=3", "seed.x=3", "data.source.2.path=x", "data.source.y=x"]
    assert refusal(source, *overrides) == (
        f"'{source}' cannot be changed as asked\n"
        f"  train.steps: {advice}\n"
        f"  =3: {advice}\n"
        f"  a b=3: {advice}\n"
        "  seed.x=3: there is no table 'seed' that could hold 'x'\n"
        "  data.source.2.path=x: there is no table 'data.source' that could hold '2'\n"
        "  data.source.y=x: there is no table 'data.source' that could hold 'y'"
    )


def test_a_mistake_in_an_override_is_said_like_one_in_the_file(tmp_path: Path) -> None:
    source = write(tmp_path, WHOLE)
    assert refusal(source, "train.steps=many") == (
        f"'{source}' has 1 mistake\n  train.steps: found 'many', wanted integer ≥ 1 or nothing"
    )


# The documentation ----------------------------------------------------------------------------------------------------


def test_the_documented_example_is_read(tmp_path: Path) -> None:
    example = DOCS.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]
    run = runfile.load(write(tmp_path, example))
    assert (run.model.use, run.peft and run.peft.settings, len(run.sources)) == ("mgm-gemma", {"rank": 16}, 2)
    assert run.evaluate[0].settings == {"per_group": 50}


@pytest.mark.parametrize(
    "table",
    [
        runfile.RunTable,
        runfile.ModelTable,
        runfile.PartTable,
        runfile.PeftTable,
        runfile.AttentionTable,
        runfile.MemoryTable,
        runfile.DataTable,
        tables.OperatorTable,
        tables.SourceTable,
        runfile.EvaluateTable,
        TrainSettings,
    ],
)
def test_every_key_is_documented_with_its_type_default_and_help(table: type) -> None:
    documented = DOCS.read_text(encoding="utf-8").splitlines()
    for row in settings.rows(table):
        kind = row.type.replace("|", "\\|")
        assert f"| `{row.name}` | {kind} | {row.default} | {row.help} |" in documented
