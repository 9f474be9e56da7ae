"""What upstream's loader says of its own folders (golden/errors.json), and what happens to the same folders here."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from foreign_folders import edit, run_folder, zoo
from mgm_folders import GOLDEN, LOOKUP

from graftwork.checkpoint.store import open_checkpoint
from graftwork.cli import main
from graftwork.errors import GraftworkError
from graftwork.foreign.diagnosis import BASE, Diagnosis, diagnose
from graftwork.foreign.importing import Imported, import_folder

REPORTED = [label.split()[0] for label, _ in json.loads((GOLDEN / "errors.json").read_text(encoding="utf-8"))]
PAGE = Path(__file__).parents[1] / "docs" / "upstream-folders.md"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case is tried from a working directory that has nothing to do with it."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def works(folder: Path, out: Path, **places: Path) -> tuple[Diagnosis, Imported]:
    """Import a folder and open the result."""
    found = diagnose(folder, LOOKUP, **places)
    imported = import_folder(found, LOOKUP, out)
    assert open_checkpoint(out, LOOKUP, device="cpu").verification.error == 0.0
    return found, imported


def case_1a(folder: Path) -> None:
    run, base = run_folder(folder), zoo(folder) / "LLM" / "gemma" / "gemma-2b-it"
    given = Path(os.path.relpath(base))
    assert diagnose(run, LOOKUP, base=given).places[BASE].found == base
    with pytest.raises(GraftworkError, match=r"^--base: there is no folder '/.*/elsewhere/model_zoo/LLM/gemma', and "):
        diagnose(run, LOOKUP, base=Path("model_zoo/LLM/gemma"))


def case_1b(folder: Path) -> None:
    base = zoo(folder) / "LLM" / "gemma" / "gemma-2b-it"
    assert diagnose(run_folder(folder), LOOKUP).places[BASE].found == base


def case_1c(folder: Path) -> None:
    said = CliRunner().invoke(main, ["inspect", "../output/training_dirs/MGM-2B-x"])
    assert (said.exit_code, said.output) == (
        1,
        "Error: there is no folder '../output/training_dirs/MGM-2B-x'; correct the path\n",
    )


def case_1d(folder: Path) -> None:
    run, models = run_folder(folder), zoo(folder)
    assert diagnose(run, LOOKUP).places["low"].found == models / "OpenAI" / "clip-vit-large"
    (models / "OpenAI" / "clip-vit-large").rename(models / "renamed")
    found = diagnose(run, LOOKUP)
    assert [place.what for place in found.not_found] == ["low"]
    assert found.command.endswith("-o run-graftwork --part low=DIR")
    assert diagnose(run, LOOKUP, search=[models]).places["low"].found == models / "renamed"


def case_2a(folder: Path) -> None:
    zoo(folder)
    assert not (run_folder(folder, name="MGM-2B-run") / "mm_projector.bin").exists()
    found = diagnose(folder / "work_dirs" / "MGM-2B-run", LOOKUP)
    assert (found.refused, ("holds besides", "connector, mining (15,616 parameters)") in found.import_plan.facts) == (
        "",
        True,
    )


def case_2b(folder: Path) -> None:
    zoo(folder)
    run = run_folder(folder, name="MGM-2B-run", mm_vision_tower=None)
    shutil.copy(GOLDEN / "stage1" / "mm_projector.bin", run)
    found = diagnose(run, LOOKUP, parts={"low": GOLDEN / "clip"})
    assert (
        "it has mm_projector.bin beside non_lora_trainables.bin; the latter was written when the run ended, and counts"
        in (found.inconsistent)
    )
    assert any("'NoneType' object has no attribute 'is_loaded'" in line for line in found.inconsistent)
    import_folder(found, LOOKUP, folder / "out")
    checkpoint = open_checkpoint(folder / "out", LOOKUP, device="cpu")
    trained = open_checkpoint(works(run_folder(folder), folder / "plain")[1].folder, LOOKUP, device="cpu")
    for name, tensor in trained.assembly.state_to_save().items():
        assert tensor.equal(checkpoint.assembly.state_to_save()[name]), name


def case_2c(folder: Path) -> None:
    zoo(folder)
    run = run_folder(folder, name="MGM-2B-merged")
    shutil.copy(GOLDEN / "base" / "tokenizer.json", run)
    copied = (
        "it has a tokenizer, like a whole model, but no weights of one: nothing was merged into it, files were copied"
    )
    assert copied in diagnose(run, LOOKUP).inconsistent
    (run / "non_lora_trainables.bin").unlink()
    assert diagnose(run, LOOKUP).refused.startswith(
        "it lacks non_lora_trainables.bin, which holds the connector; restore it"
    )


def case_3a(folder: Path) -> None:
    found = diagnose(GOLDEN / "base", LOOKUP)
    assert found.description == "a plain language model, of the kind that 'mgm-gemma' is built on"
    assert found.refused == (
        "nothing was trained here that could be imported: train from it, with model.weights set to this folder"
    )


def case_3b(folder: Path) -> None:
    zoo(folder)
    assert diagnose(run_folder(folder, name="nothing-of-the-name"), LOOKUP).architecture == "mgm-gemma"


def case_3c(folder: Path) -> None:
    (line,) = [line for line in diagnose(run_folder(folder), LOOKUP).inconsistent if "architectures" in line]
    assert line == (
        "config.json says architectures ['GemmaForCausalLM'] and model_type 'mgm_gemma': by the former it would be opened "
        "without its vision towers; the latter counts"
    )


def case_3d(folder: Path) -> None:
    run = run_folder(folder)
    for name in ("config.json", "non_lora_trainables.bin", "trainer_state.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoint-240")
    zoo(folder)
    found = diagnose(run, LOOKUP)
    assert found.description.startswith("an adapter alone: LoRA of rank 16, alpha 32, dropout 0.1, on 14 linear layers")
    assert "so it has no connector to see images with" in found.refused


def case_3e(folder: Path) -> None:
    zoo(folder)
    _, imported = works(run_folder(folder), folder / "out")
    assert imported.manifest.plan.model_spec.model.name == "mgm-gemma"
    assert {*imported.manifest.plan.model_spec.parts} == {"low", "high"}
    assert imported.manifest.golden.distance > 1


def case_A(folder: Path) -> None:
    zoo(folder)
    assert "the tokenizer: it is its base's" in diagnose(run_folder(folder), LOOKUP).import_plan.missing
    _, imported = works(folder / "work_dirs" / "run", folder / "out")
    assert (imported.folder / "processor" / "tokenizer.json").is_file()


def case_B(folder: Path) -> None:
    zoo(folder)
    run = run_folder(folder, "merged")
    (run / "model.safetensors.index.json").unlink()
    (run / "model-00001-of-00001.safetensors").rename(run / "model.safetensors")
    found = diagnose(run, LOOKUP)
    assert found.refused == ""
    assert "its weights are in one file without an index, which upstream's loader insists on; none is needed here" in (
        found.inconsistent
    )


def case_C(folder: Path) -> None:
    zoo(folder)
    found, imported = works(run_folder(folder, "full"), folder / "out")
    assert found.description == "a whole MGM model (MGMGemmaForCausalLM), in 2 files"
    assert imported.stored_parts == ("low",)


def case_D(folder: Path) -> None:
    zoo(folder)
    found, imported = works(run_folder(folder, "stage1"), folder / "out")
    assert found.description == "a stage-1 run of MGM (MGMGemmaForCausalLM): the connector, without the language model"
    assert imported.manifest.plan.model_spec.also_train == ("connector", "mining")
    assert len(imported.manifest.tensors) == 16


CASES: dict[str, Callable[[Path], None]] = {
    name.removeprefix("case_"): case for name, case in dict(globals()).items() if name.startswith("case_")
}


@pytest.mark.parametrize("case", REPORTED)
def test_each_folder_that_upstream_cannot_open_is_opened_or_explained(case: str, tmp_path: Path) -> None:
    CASES[case](tmp_path)


def test_every_reported_case_is_in_the_documents() -> None:
    rows = re.findall(r"^\| (\d?[a-eA-D]) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == REPORTED


def test_an_edited_configuration_does_not_change_what_a_folder_is(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    edit(run / "config.json", architectures=["LlamaForCausalLM"])
    assert diagnose(run, LOOKUP).architecture == "mgm-gemma"
