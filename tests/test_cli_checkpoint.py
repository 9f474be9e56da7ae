"""The commands that take a checkpoint, as a person calls them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from tiny_runs import Run

from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import GOLDEN_INPUTS, TENSORS
from graftwork.cli import Session, main
from graftwork.contracts import StepTaken
from graftwork.errors import CheckpointError
from graftwork.jobs.verify import FreshProcess


def graftwork(*arguments: str | Path) -> Result:
    """What the command line says and how it ends."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fine(*arguments: str | Path) -> str:
    result = graftwork(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def error(*arguments: str | Path, status: int = 1) -> str:
    result = graftwork(*arguments)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def copy(trained: Run, tmp_path: Path) -> Path:
    """A copy of a trained checkpoint, to be damaged."""
    return Path(shutil.copytree(trained.checkpoint, tmp_path / "copy"))


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)


# inspect --------------------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_checkpoint_is(trained: Run, base: Path) -> None:
    said = fine("inspect", trained.out)
    assert said.startswith(f"{trained.checkpoint}: a Graftwork checkpoint\n")
    for fact in (
        "4 of 4 steps, by Graftwork 0.1.0",
        "healthy: loss ",
        f"mgm-gemma (dictionary 0), base weights '{base}' at {base}",
        "on language.attention, language.mlp; rank = 4, alpha = 8.0",
        "parameters",
        "56 tensors with ",
        "moves the golden inputs' logits by up to ",
        "sdpa ran in fp32 on the cpu",
        "24 records: circle (12), square (12)",
        "All 6 files are as they were written. To verify that it works: graftwork verify",
    ):
        assert fact in said, fact


def test_inspect_needs_neither_the_base_nor_the_plugins(copy: Path) -> None:
    content = json.loads((copy / manifest.FILE).read_text(encoding="utf-8"))
    del content["seal"]
    content["plan"]["model_spec"]["peft"].update(name="acme", plugin="acme", distribution="acme-graft", version="3")
    content["plan"]["model_spec"]["model"]["weights"].update(path="/nowhere", relative="nowhere")
    (copy / manifest.FILE).write_text(json.dumps(content | {"seal": manifest.seal(content)}), encoding="utf-8")
    assert "at /nowhere" in fine("inspect", copy)
    said = error("verify", copy)
    assert "name their folder with --base-weights DIR" in said


def test_inspect_as_json_is_the_manifest(trained: Run) -> None:
    content = json.loads(fine("inspect", trained.checkpoint, "--json"))
    assert content["step"] == 4
    assert content["plan"]["model_spec"]["peft"]["name"] == "lora"
    assert content["tensors"].keys() == load_file(trained.checkpoint / TENSORS).keys()


def test_inspect_says_what_is_not_intact(copy: Path) -> None:
    damage(copy / GOLDEN_INPUTS)
    said = error("inspect", copy)
    assert f"Not intact: '{copy / GOLDEN_INPUTS}' was changed after it was written" in said


def test_what_is_no_checkpoint_is_refused_by_every_command(tmp_path: Path) -> None:
    nowhere, out = tmp_path / "nowhere", tmp_path / "out"
    assert error("inspect", nowhere) == f"Error: there is no folder '{nowhere}'; correct the path\n"
    for command in (
        ("verify", nowhere),
        ("merge", nowhere, out),
        ("export", nowhere, out, "--to", "peft"),
    ):
        said = error(*command)
        assert said == f"Error: there is no folder '{nowhere}'; name a checkpoint or the folder of a run\n"
    assert not out.exists()


# verify ---------------------------------------------------------------------------------------------------------------


def test_verify_rebuilds_a_checkpoint_from_another_working_directory(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    said = fine("verify", Path("..") / "copy")
    assert said.startswith("../copy: reopens as saved.\n")
    assert "all 6 are as they were written" in said
    assert "56 of 56 expected ones were loaded, none is left over" in said
    assert "differ by 0 from those recorded" in said
    assert "has an effect: it moves the logits by up to " in said


def test_verify_as_json_gives_the_facts(trained: Run) -> None:
    facts = json.loads(fine("verify", trained.out, "--json"))
    assert facts["checkpoint"] == str(trained.checkpoint)
    assert (facts["error"], facts["comparable"]) == (0.0, True)
    assert facts["distance"] == facts["recorded_distance"] > 0.0
    assert len(facts["sha256"]) == 64


def test_verify_refuses_what_was_changed(copy: Path) -> None:
    damage(copy / TENSORS)
    assert error("verify", copy) == (
        f"Error: '{copy / TENSORS}' was changed after it was written; restore the checkpoint from a copy\n"
    )


def test_verify_takes_the_places_of_base_weights(copy: Path, base: Path, tmp_path: Path) -> None:
    assert ": reopens as saved." in fine("verify", copy, "--base-weights", base)
    (tmp_path / "other").mkdir()
    said = error("verify", copy, "--base-weights", tmp_path / "other")
    assert f"'{tmp_path / 'other'}' does not hold the base weights that the checkpoint was trained on" in said
    assert "the model has no part 'eye'; its parts are low, high" in error("verify", copy, "--part", f"eye={base}")
    assert "--part takes NAME=DIR" in error("verify", copy, "--part", "low", status=2)


def test_verify_says_what_to_install(copy: Path) -> None:
    said = error("--disable", "lora", "verify", copy)
    assert (
        "this needs 'lora' (peft) of plugin 'dictionary', which is not installed or does not work: pip install" in said
    )


def test_a_fresh_process_verifies_a_checkpoint_or_says_why_not(copy: Path) -> None:
    with FreshProcess(Session().catalog) as fresh:
        facts = fresh.verify(copy)
    assert facts["error"] <= facts["tolerance"]  # rounding depends on the number of threads
    damage(copy / TENSORS)
    with FreshProcess(Session().catalog) as fresh, pytest.raises(CheckpointError) as caught:
        fresh.start(manifest.read(copy).plan)
        fresh.verify(copy)
    assert caught.value.sentence == (
        f"'{copy}' could not be verified in a fresh process: '{copy / TENSORS}' was changed after it was written; restore "
        "the checkpoint from a copy"
    )


def test_a_fresh_process_can_be_started_before_the_checkpoint_is_there(copy: Path, tmp_path: Path) -> None:
    plan, later = manifest.read(copy).plan, tmp_path / "later"
    with FreshProcess(Session().catalog) as fresh:
        listen = fresh.starting(plan, lambda event: None)
        facts: dict[str, Any] = {"loss": 1.0, "learning_rate": 0.1, "gradient_norm": 1.0, "images": 1, "tokens": 9}
        listen(StepTaken(tmp_path, 1, 1000, seconds=9.0, **facts))
        assert not fresh.process
        listen(StepTaken(tmp_path, 999, 1000, seconds=9.0, **facts))
        first = fresh.process
        listen(StepTaken(tmp_path, 1000, 1000, seconds=9.0, **facts))
        copy.rename(later)
        assert fresh.verify(later)["verified"] == "reopens as saved"
        assert first and fresh.process is first


def test_one_that_ended_before_it_was_asked_is_started_again(copy: Path) -> None:
    with FreshProcess(Session().catalog) as fresh:
        fresh.start(manifest.read(copy).plan)
        assert fresh.process
        fresh.process.kill()
        fresh.process.wait()
        assert fresh.verify(copy)["verified"] == "reopens as saved"


STARTS = """
import sys, time
from pathlib import Path
from graftwork.checkpoint import manifest
from graftwork.cli import Session
from graftwork.jobs.verify import FreshProcess

fresh = FreshProcess(Session().catalog)
fresh.start(manifest.read(Path(sys.argv[1])).plan)
print(fresh.process.pid, flush=True)
time.sleep(600)
"""


NAMES = """
import json, os, subprocess, sys

goes_on = "from graftwork.jobs.verify import awaited; import os, time; print(awaited(None), os.getpid(), flush=True); time.sleep(600)"
fresh = subprocess.Popen([sys.executable, "-c", goes_on], stdin=subprocess.PIPE, text=True)
print(json.dumps([os.getpid(), None]), json.dumps("folder"), sep="\\n", file=fresh.stdin, flush=True)
fresh.wait()
"""


@pytest.mark.parametrize("program", [STARTS, NAMES], ids=["waiting", "verifying"])
def test_a_fresh_process_ends_with_the_one_that_started_it_however_that_ends(
    program: str, copy: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    starter = subprocess.Popen(
        [sys.executable, "-c", program, str(copy)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert starter.stdout
    fresh = psutil.Process(int(starter.stdout.readline().split()[-1]))
    starter.kill()
    starter.wait()
    starter.stdout.close()
    fresh.wait(timeout=120)


# merge and export -----------------------------------------------------------------------------------------------------


def test_merge_writes_a_base_and_says_what_it_counted(trained: Run, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    said = fine("merge", trained.out, out)
    assert said.startswith(f"{out} holds the merged model, in fp32.\n")
    certificate = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
    assert (
        f"{certificate['tensors']}: 28 changed, {certificate['unchanged']} as in the base, 0 that the base lacks"
        in said
    )
    assert f'use it as a base with weights = "{out}"' in said
    assert error("merge", trained.out, out) == f"Error: '{out}' exists already; name a new folder\n"


def test_merge_stores_in_the_precision_that_is_asked_for(trained: Run, tmp_path: Path) -> None:
    assert "in bf16." in fine("merge", trained.out, tmp_path / "merged", "--precision", "bf16")
    assert "Invalid value for '--precision'" in error(
        "merge", trained.out, tmp_path / "other", "--precision", "int4", status=2
    )


def test_export_writes_what_peft_reads(trained: Run, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    said = fine("export", trained.out, out, "--to", "peft")
    first, read_back = said.splitlines()
    assert first == f"{out} holds the checkpoint as 'peft': adapter_config.json, adapter_model.safetensors"
    assert re.fullmatch(r"  read back by peft [\d.]+: logits differ by .*; the adapter moves them by \d.*", read_back)
    assert error("export", trained.out, out, "--to", "peft") == f"Error: '{out}' exists already; name a new folder\n"


def test_export_names_the_formats_that_there_are(trained: Run, tmp_path: Path) -> None:
    said = error("export", trained.out, tmp_path / "out", "--to", "gguf")
    assert said == "Error: this checkpoint has no format 'gguf'; merge it, or export it to mgm, peft\n"
    assert "Missing option '--to'" in error("export", trained.out, tmp_path / "out", status=2)
