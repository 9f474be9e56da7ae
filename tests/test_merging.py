"""Merged weights and foreign formats: another form of the same model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import LORA, METHODS, NEVER_READ, Run, logits_of, plan_of

from graftwork.build import compose
from graftwork.checkpoint.certificate import Certificate, ReadBack
from graftwork.checkpoint.merging import CERTIFICATE, export, merge
from graftwork.checkpoint.store import checkpoints, open_checkpoint
from graftwork.contracts import DTYPES, Assembly, Batch, DictLookup
from graftwork.errors import CheckpointError
from graftwork.train.loop import train

RunOf = Callable[[str], Run]


def opened(folder: Path, lookup: DictLookup) -> Any:
    return open_checkpoint(folder, lookup, device="cpu", precision="fp32")


def merged(folder: Path, out: Path, lookup: DictLookup, **options: Any) -> Certificate:
    return merge(opened(folder, lookup), out, lookup, **options)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=0)


# Merging --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_merged_weights_are_a_base_that_computes_what_the_checkpoint_did(
    run_of: RunOf, lookup: DictLookup, tmp_path: Path, method: str
) -> None:
    run, out = run_of(method), tmp_path / "merged"
    expected, off = logits_of(opened(run.checkpoint, lookup).assembly)
    certificate = merged(run.checkpoint, out, lookup)
    plan = plan_of(out, tmp_path, {"peft": None})
    close(logits_of(compose.build(plan, lookup, device="cpu"))[0], expected)
    assert (expected - off).abs().max() > 0.1
    assert certificate.error <= 1e-5 * float(expected.abs().max()) + 1e-5


def test_the_certificate_counts_every_tensor(trained: Run, base: Path, lookup: DictLookup, tmp_path: Path) -> None:
    check = opened(trained.checkpoint, lookup)
    certificate = merge(check, tmp_path / "merged", lookup)
    assert json.loads((tmp_path / "merged" / CERTIFICATE).read_text()) == certificate.__dict__
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if "_proj.weight" in name and name.startswith("model.layers.")}
    assert certificate.changed == len(changed) == 28
    assert certificate.unchanged == len(before) - 28
    assert (certificate.tensors, certificate.new, certificate.precision) == (len(before), 0, "fp32")
    assert certificate.checkpoint == check.sha256
    assert 0 < certificate.tolerance < 1e-3
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_what_the_base_lacked_is_in_the_merged_weights(base: Path, lookup: DictLookup, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(base, plain)
    (plain / "model.safetensors.index.json").unlink()
    (plain / "model.safetensors").unlink()
    stored = load_file(base / "model.safetensors")
    save_file({n: t for n, t in stored.items() if "mm_projector" not in n}, plain / "model.safetensors")
    plan = plan_of(plain, tmp_path, {"peft": LORA | {"also_train": ["connector", "mining"]}})
    outcome = train(plan, lookup, tmp_path / "out", device="cpu")
    expected, _ = logits_of(outcome.assembly)
    certificate = merged(outcome.checkpoint, tmp_path / "merged", lookup)
    # Two of mining's 12 have no effect, and so no gradient.
    assert (certificate.new, certificate.changed) == (4, 28 + 12 - 2)
    whole = compose.build(plan_of(tmp_path / "merged", tmp_path, {"peft": None}), lookup, device="cpu")
    assert whole.adaptation.newly_initialised == ()
    close(logits_of(whole)[0], expected)


def test_merged_weights_can_be_trained_and_merged_again(trained: Run, lookup: DictLookup, tmp_path: Path) -> None:
    merged(trained.checkpoint, tmp_path / "one", lookup)
    again = train(plan_of(tmp_path / "one", tmp_path), lookup, tmp_path / "out", device="cpu")
    merged(again.checkpoint, tmp_path / "two", lookup)
    third = compose.build(plan_of(tmp_path / "two", tmp_path, {"peft": None}), lookup, device="cpu")
    close(logits_of(third)[0], logits_of(again.assembly)[0])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_merged_weights_can_be_stored_in_less_precision(
    trained: Run, lookup: DictLookup, tmp_path: Path, precision: str
) -> None:
    certificate = merged(trained.checkpoint, tmp_path / "merged", lookup, precision=precision)
    stored = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {getattr(torch, DTYPES[precision])}
    assert certificate.precision == precision
    assert 0 < certificate.error <= certificate.tolerance


@pytest.mark.parametrize("method", ["dora", "pissa", "full"])
def test_a_base_stored_in_bf16_is_merged_into_one(base: Path, lookup: DictLookup, tmp_path: Path, method: str) -> None:
    half = tmp_path / "half"
    shutil.copytree(base, half)
    (half / "model.safetensors").unlink()
    save_file({n: t.bfloat16() for n, t in load_file(base / "model.safetensors").items()}, half / "model.safetensors")
    changes = {"peft": METHODS[method], "train.precision": "bf16"}
    outcome = train(plan_of(half, tmp_path, changes), lookup, tmp_path / "out", device="cpu")
    certificate = merged(outcome.checkpoint, tmp_path / "merged", lookup)
    assert certificate.precision == "bf16"
    assert certificate.changed == (12 if method == "full" else 28)
    assert certificate.unchanged == certificate.tensors - certificate.changed


@pytest.mark.parametrize("method", ["pissa", "ia3"])
def test_what_was_trained_in_bf16_on_a_base_in_fp32_is_merged_in_fp32(
    base: Path, lookup: DictLookup, tmp_path: Path, method: str
) -> None:
    changes = {"peft": METHODS[method], "train.precision": "bf16"}
    outcome = train(plan_of(base, tmp_path, changes), lookup, tmp_path / "out", device="cpu")
    certificate = merged(outcome.checkpoint, tmp_path / "merged", lookup)
    assert certificate.precision == "fp32"
    assert certificate.unchanged == certificate.tensors - 28


def test_a_model_trained_from_random_weights_is_merged(lookup: DictLookup, tmp_path: Path) -> None:
    plan = plan_of(
        None,
        tmp_path,
        {
            "peft": {"use": "full", "on": ["language", "connector", "mining", "vision"]},
            "train.allow_unreached": NEVER_READ,
        },
    )
    outcome = train(plan, lookup, tmp_path / "out", device="cpu")
    certificate = merged(outcome.checkpoint, tmp_path / "merged", lookup)
    assert (certificate.new, certificate.changed) == (certificate.tensors, 0)
    whole = compose.build(plan_of(tmp_path / "merged", tmp_path, {"peft": None}), lookup, device="cpu")
    close(logits_of(whole)[0], logits_of(outcome.assembly)[0])


def test_a_merge_that_changed_the_model_is_not_written(trained: Run, lookup: DictLookup, tmp_path: Path) -> None:
    check = opened(trained.checkpoint, lookup)
    peft = check.assembly.peft

    class Careless(type(peft)):  # type: ignore[misc]
        def merge(self, model: torch.nn.Module) -> None:
            super().merge(model)
            model.get_parameter("model.norm.weight").data += 0.1

    check.assembly.peft = Careless(peft.settings)
    with pytest.raises(
        CheckpointError, match=r"merging failed: the merged model's logits differ by .*; nothing was written"
    ):
        merge(check, tmp_path / "merged", lookup)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_reads_back_differently_is_noticed_even_where_no_logit_shows_it(
    trained: Run, lookup: DictLookup, tmp_path: Path
) -> None:
    check = opened(trained.checkpoint, lookup)
    write = check.assembly.architecture.write

    def careless(assembly: Assembly, folder: Path) -> None:
        write(assembly, folder)
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        unused = next(name for name in tensors if "encoder.layers.2.mlp.fc1.bias" in name)  # CLIP's last layer
        tensors[unused] += 1
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors")

    check.assembly.architecture.write = careless
    with pytest.raises(CheckpointError, match="merging failed: 1 tensors read back differently"):
        merge(check, tmp_path / "merged", lookup)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", ["file", "folder"])
def test_what_exists_is_not_overwritten(trained: Run, lookup: DictLookup, tmp_path: Path, existing: str) -> None:
    out = tmp_path / "out"
    if existing == "folder":
        out.mkdir()
    (out / "mine" if existing == "folder" else out).write_text("mine")
    for write in (merge, export):
        arguments = (opened(trained.checkpoint, lookup), *((out, lookup) if write is merge else ("peft", out, lookup)))
        with pytest.raises(CheckpointError) as caught:
            write(*arguments)  # type: ignore[operator]
        assert str(caught.value) == f"'{out}' exists already; name a new folder"
    (out / "mine" if existing == "folder" else out).read_text()


def test_an_empty_folder_can_be_filled(trained: Run, lookup: DictLookup, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    merged(trained.checkpoint, tmp_path / "merged", lookup)
    assert (tmp_path / "merged" / "config.json").is_file()


# Exporting ------------------------------------------------------------------------------------------------------------


def text_logits(model: Any) -> torch.Tensor:
    """What a whole model, or transformers' Gemma, says about a few tokens."""
    ids = torch.tensor([[2, 7, 90, 140, 33, 256, 9, 61]])
    with torch.inference_mode():
        if hasattr(model, "encode_images"):
            real = torch.ones_like(ids, dtype=torch.bool)
            return model.logits(model(Batch(ids, real, ~real, ids, {})))  # type: ignore[no-any-return]
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers 5 for it
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa", "lora-plus"])
def test_plain_peft_computes_the_same_with_an_exported_adapter(
    run_of: RunOf, base: Path, lookup: DictLookup, tmp_path: Path, method: str
) -> None:
    from peft import PeftModel
    from transformers import GemmaConfig, GemmaForCausalLM

    run = run_of(method)
    assembly = opened(run.checkpoint, lookup).assembly
    expected = text_logits(assembly.model)
    export(
        open_checkpoint(run.checkpoint, lookup, device="cpu", precision="fp32"), "peft", tmp_path / "adapter", lookup
    )
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]

    plain = compose.build(plan_of(base, tmp_path, {"peft": None}), lookup, device="cpu").model.eval()
    before = text_logits(plain)
    assert (before - expected).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    close(text_logits(loaded.base_model.model), expected)

    config = json.loads((base / "config.json").read_text())
    known = {key: config[key] for key in GemmaConfig().to_dict().keys() & config.keys() - {"model_type", "hidden_act"}}
    settings = GemmaConfig(**known)
    settings.hidden_act = config["hidden_act"]
    gemma = GemmaForCausalLM(settings).eval()
    stored = load_file(base / "model.safetensors")
    own = {name: stored[name] for name in gemma.state_dict() if name in stored}
    missing = gemma.load_state_dict(own, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    close(text_logits(gemma), before)
    close(text_logits(PeftModel.from_pretrained(gemma, tmp_path / "adapter")), expected)


def test_an_exported_adapter_names_its_base(trained: Run, base: Path, lookup: DictLookup, tmp_path: Path) -> None:
    export(opened(trained.checkpoint, lookup), "peft", tmp_path / "adapter", lookup)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8.0, True)


def test_an_exported_adapter_names_its_base_on_the_hub_at_its_commit(
    trained: Run, lookup: DictLookup, tmp_path: Path
) -> None:
    check = opened(trained.checkpoint, lookup)
    plan, spec = check.assembly.plan, check.assembly.plan.model_spec
    assert spec.model.weights
    snapshot = replace(spec.model.weights, given="acme/model@main", commit="a" * 40)
    check.assembly.plan = replace(plan, model_spec=replace(spec, model=replace(spec.model, weights=snapshot)))
    export(check, "peft", tmp_path / "adapter", lookup)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/model", "a" * 40)


def test_whole_modules_that_were_trained_beside_an_adapter_are_exported_with_it(
    base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    plan = plan_of(
        base, tmp_path, {"peft": LORA | {"also_train": ["connector", "language.embeddings"]}, "train.steps": 1}
    )
    checkpoint = train(plan, lookup, tmp_path / "out", device="cpu").checkpoint
    read_back = export(opened(checkpoint, lookup), "peft", tmp_path / "adapter", lookup)
    assert isinstance(read_back, ReadBack) and read_back.error <= read_back.tolerance
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    connector = ["model.mm_projector.0", "model.mm_projector.2"]
    assert (config["modules_to_save"], config["ensure_weight_tying"]) == (["model.embed_tokens", *connector], True)


def test_an_adapter_is_not_exported_without_what_peft_could_not_hold_beside_it(
    base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    both = LORA | {"on": ["language.attention", "connector"], "also_train": ["connector"]}
    checkpoint = train(
        plan_of(base, tmp_path, {"peft": both, "train.steps": 1}), lookup, tmp_path / "out", device="cpu"
    )
    with pytest.raises(CheckpointError) as caught:
        export(opened(checkpoint.checkpoint, lookup), "peft", tmp_path / "adapter", lookup)
    assert caught.value.sentence == (
        "a peft folder holds an adapter, and copies of whole modules without one; 4 of the 4 tensors that this checkpoint holds "
        "besides its adapter are no such modules, and would be lost: merge it instead"
    )
    assert not (tmp_path / "adapter").exists()


def test_an_unknown_format_is_refused_with_the_known_ones(run_of: RunOf, lookup: DictLookup, tmp_path: Path) -> None:
    check = opened(run_of("lora").checkpoint, lookup)
    with pytest.raises(CheckpointError) as caught:
        export(check, "gguf", tmp_path / "out", lookup)
    assert str(caught.value) == "this checkpoint has no format 'gguf'; merge it, or export it to mgm, peft"
    with pytest.raises(CheckpointError) as caught:
        export(opened(run_of("ia3").checkpoint, lookup), "peft", tmp_path / "out", lookup)
    assert str(caught.value) == "this checkpoint has no format 'peft'; merge it, or export it to mgm"
    assert list(tmp_path.iterdir()) == []


def test_what_fails_while_exporting_leaves_nothing(trained: Run, lookup: DictLookup, tmp_path: Path) -> None:
    check = opened(trained.checkpoint, lookup)

    def broken(assembly: Any, folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    check.assembly.peft.exports = lambda: {"broken": broken}
    with pytest.raises(CheckpointError, match="could not be saved: the disk is full"):
        export(check, "broken", tmp_path / "out", lookup)
    assert list(tmp_path.iterdir()) == []


def test_merging_leaves_the_checkpoint_as_it_was(trained: Run, lookup: DictLookup, tmp_path: Path) -> None:
    merged(trained.checkpoint, tmp_path / "merged", lookup)
    assert opened(trained.checkpoint, lookup).verification.error == 0.0
    assert len(checkpoints(trained.out)) == 1
