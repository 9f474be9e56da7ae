"""Certificates and verifications measure against what an adapter does, or say that they cannot tell."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_runs import LORA, plan_of

from graftwork.checkpoint import verification
from graftwork.checkpoint.certificate import Certificate, kept_by_logits, kept_by_weight, percent
from graftwork.checkpoint.merging import merge
from graftwork.checkpoint.store import Opened, open_checkpoint, read_golden_inputs
from graftwork.cli import main
from graftwork.contracts import DictLookup
from graftwork.errors import CheckpointError
from graftwork.train.loop import train


@pytest.fixture(scope="module")
def half(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, stored in bf16."""
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("half") / "base"))
    (folder / "model.safetensors").unlink()
    stored = {n: t.bfloat16() for n, t in load_file(base / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors")
    return folder


def trained_on(base: Path, folder: Path, lookup: DictLookup, rate: float, **changes: Any) -> Path:
    """A LoRA run in bf16 whose learning rate says how much it does."""
    asked = {"train.learning_rate": rate, "train.precision": "bf16", **changes}
    return train(plan_of(base, folder, asked), lookup, folder / "out", device="cpu").checkpoint


@pytest.fixture(scope="module")
def faint(half: Path, lookup: DictLookup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that moves logits by 0.03, on the base in bf16."""
    return trained_on(half, tmp_path_factory.mktemp("faint"), lookup, 1e-4)


def opened(folder: Path, lookup: DictLookup) -> Opened:
    return open_checkpoint(folder, lookup, device="cpu", precision="fp32")


# Merging --------------------------------------------------------------------------------------------------------------


def test_a_merge_that_loses_half_of_an_adapter_is_refused_with_the_share_and_the_way_out(
    faint: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        merge(opened(faint, lookup), tmp_path / "merged", lookup)
    said = caught.value.sentence
    assert said.startswith("stored in bf16, the merged model keeps ")
    assert 30 < float(said.split("keeps ")[1].split("%")[0]) < 80
    assert " of the median tensor's change: its logits differ by " in said
    assert said.endswith("may be lost; nothing was written: store it with --precision fp32")
    assert list(tmp_path.iterdir()) == []
    certificate = merge(opened(faint, lookup), tmp_path / "merged", lookup, precision="fp32")
    assert certificate.share == "100% of what the adapter does to logits and 100% of the median tensor's change"
    assert certificate.error <= certificate.tolerance <= 0.05 * certificate.distance


def test_noise_that_rounding_the_base_adds_is_measured_against_the_adapter(
    base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    plan = plan_of(base, tmp_path, {"train.learning_rate": 1e-4})
    check = opened(train(plan, lookup, tmp_path / "out", device="cpu").checkpoint, lookup)
    with pytest.raises(
        CheckpointError, match=r"^stored in bf16, the merged model keeps 9\d(\.\d)?% of what the adapter does to"
    ):
        merge(check, tmp_path / "merged", lookup, precision="bf16")


def test_an_adapter_that_is_lost_beside_a_connector_that_is_kept_is_noticed(
    half: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    checkpoint = trained_on(half, tmp_path, lookup, 1e-4, peft={**LORA, "also_train": ["connector"]})
    with pytest.raises(CheckpointError) as caught:
        merge(opened(checkpoint, lookup), tmp_path / "merged", lookup)
    kept, median = (float(part.split("%")[0]) for part in caught.value.sentence.split("keeps ")[1].split(" and ")[:2])
    assert kept > 99 and median < 50


def test_a_certificate_says_what_is_kept(half: Path, lookup: DictLookup, tmp_path: Path) -> None:
    checkpoint = trained_on(half, tmp_path, lookup, 1e-2)
    done = CliRunner().invoke(main, ["merge", str(checkpoint), str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    lines = " ".join(done.output.split())
    assert "in bf16. tensors" in lines and " is allowed; the adapter moves them by " in lines
    assert "kept 99.9% of what the adapter does to logits and 100% of the median tensor's change" in lines


def test_where_nothing_can_be_switched_off_only_rounding_counts(base: Path, lookup: DictLookup, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(base, tmp_path / "plain"))
    (plain / "model.safetensors.index.json").unlink()
    stored = {n: t.clone() for n, t in load_file(base / "model.safetensors").items() if "mm_projector" not in n}
    (plain / "model.safetensors").unlink()
    save_file(stored, plain / "model.safetensors")
    plan = plan_of(plain, tmp_path, {"peft": {"use": "full", "on": ["connector"]}, "train.steps": 1})
    check = opened(train(plan, lookup, tmp_path / "out", device="cpu").checkpoint, lookup)
    certificate = merge(check, tmp_path / "merged", lookup)
    assert (certificate.kept, certificate.weights_kept, certificate.distance, certificate.share) == (
        None,
        None,
        0.0,
        "",
    )
    assert certificate.error <= certificate.tolerance == verification.rounding("fp32", check.manifest.golden.largest)


def test_fp32_is_not_named_as_the_way_out_of_fp32() -> None:
    from graftwork.checkpoint.certificate import check

    certificate = Certificate("", "fp32", 1, 1, 0, 0, 4e-5, 1e-6, 2e-5, 0.9, 1.0, "w")
    with pytest.raises(
        CheckpointError, match=r"^it cannot be told whether the merged model is .* train it longer, or use the base"
    ):
        check(certificate, largest=10.0)


def test_shares_are_projections() -> None:
    base, adapter = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    assert kept_by_logits(adapter, base, base + 0.34 * (adapter - base)) == pytest.approx(0.34)
    assert kept_by_logits(base, base, adapter) is None
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0]).bfloat16().float()
    merged = weight + torch.tensor([1e-3, 1e-3, 1e-3, 0.5])
    assert kept_by_weight(weight, merged, merged.bfloat16()) == pytest.approx(0.25 / (0.25 + 3e-6))
    assert kept_by_weight(weight[:3], merged[:3], merged[:3].bfloat16()) == 0.0
    assert [percent(share) for share in (0.3399, 0.9996, 1.002, -0.1)] == ["33.9%", "99.9%", "100%", "0%"]


# Verifying ------------------------------------------------------------------------------------------------------------


def moved(faint: Path, lookup: DictLookup, by: float) -> verification.Verification:
    """The verification of a checkpoint whose recorded logits are moved by as much."""
    check = open_checkpoint(faint, lookup, device="cpu", as_trained=True)
    golden = read_golden_inputs(check.folder, check.manifest)
    golden["logits"][0, 0] += by
    return verification.verify(check.assembly, golden, check.manifest.golden)


def test_a_verification_that_rounding_and_the_lost_adapter_explain_alike_does_not_call_it_verified(
    faint: Path, lookup: DictLookup
) -> None:
    facts = open_checkpoint(faint, lookup, device="cpu", as_trained=True).manifest.golden
    assert facts.distance < 0.5 * verification.rounding("bf16", facts.largest), "rounding would hide all of it"
    same = moved(faint, lookup, 0.0)
    assert (same.error, same.cannot_tell) == (0.0, "")
    assert same.tolerance == pytest.approx(0.05 * facts.distance)
    unsure = moved(faint, lookup, 0.6 * facts.distance)
    assert "this cannot tell whether it is the checkpoint" in unsure.cannot_tell
    assert "with --precision fp32" in unsure.cannot_tell
    with pytest.raises(CheckpointError, match="the rebuilt model is not the one that was saved"):
        moved(faint, lookup, 10 * facts.largest)


def test_every_command_says_that_it_cannot_tell(
    faint: Path, lookup: DictLookup, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = open_checkpoint(faint, lookup, device="cpu", as_trained=True)
    assert check.note == ""
    unsure = replace(check, verification=replace(check.verification, cannot_tell="the logits differ by 1"))
    assert unsure.note == "Not verified: the logits differ by 1."
    monkeypatch.setattr(verification, "_undecided", lambda facts, error: "the logits differ by 1")
    monkeypatch.setattr(verification, "tolerance", lambda *_: -1.0)
    done = CliRunner().invoke(main, ["verify", str(faint)])
    assert done.exit_code == 0, done.output
    assert f"{faint}: not verified." in done.output
    assert "  logits    differ by 1\n" in done.output
