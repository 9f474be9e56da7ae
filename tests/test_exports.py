"""Exports are accounted for: what upstream's loader, plain peft and plain transformers make of what was written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exports_table import rows
from foreign_folders import NAMES, change, edit, run_folder, zoo
from mgm_folders import GOLDEN, LOOKUP, QUESTION
from safetensors.torch import load_file
from tiny_runs import METHODS, NEVER_READ, plan_of
from upstream_reader import UpstreamError, read_by_upstream, state_by_upstream

from graftwork.build import compose
from graftwork.checkpoint.certificate import Certificate, ReadBack
from graftwork.checkpoint.merging import export, merge
from graftwork.checkpoint.store import Opened, open_checkpoint
from graftwork.contracts import Image, Plan, Record, Turn, collate
from graftwork.errors import CheckpointError
from graftwork.foreign.diagnosis import diagnose
from graftwork.foreign.importing import import_folder
from graftwork.train.loop import train
from graftwork_mgm import MgmGemma, MgmSettings
from graftwork_mgm.backbones import GEMMA
from graftwork_mgm.export import refuse_what_upstream_lacks, too_large


def tower_folders(folder: Path) -> dict[str, Path]:
    """The towers under names that upstream knows."""
    models = folder / "model_zoo"
    if not models.exists():
        zoo(folder, "clip", "convnext")
    return {"low": models / NAMES["clip"], "high": models / NAMES["convnext"]}


def tiny_plan(base: Path, towers: dict[str, Path], folder: Path, on: list[str], key: str = "weights") -> Plan:
    """Two steps on the small published weights, with the towers' folders as weights or as configurations alone."""
    parts = {
        "low": {"use": "clip", key: str(towers["low"])},
        "high": {"use": "openclip-convnext", key: str(towers["high"])},
    }
    lora = METHODS["lora"]
    changes = {
        "model": {"use": "mgm-gemma", "weights": str(base), "image_size_aux": 128, "parts": parts},
        "peft": {"use": "full", "on": on} if on else {**lora, "also_train": ["connector"]},
        "train.steps": 2,
        "train.batch_size": 2,
    }
    return plan_of(base, folder, changes, LOOKUP)


def opened(folder: Path, **options: Any) -> Opened:
    return open_checkpoint(folder, LOOKUP, device="cpu", precision="fp32", **options)


def logits(model: Any) -> torch.Tensor:
    """What a model says about an image."""
    batch = collate([model.processor.encode(QUESTION)], pad_id=0)
    model.model.eval()
    with torch.no_grad():
        return model.model.logits(model.model(batch))  # type: ignore[no-any-return]


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def imported_back(folder: Path, out: Path) -> torch.Tensor:
    """What `import` makes of an exported folder."""
    import_folder(diagnose(folder, LOOKUP), LOOKUP, out)
    return logits(opened(out).assembly)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("places")


@pytest.fixture(scope="module")
def towers(places: Path) -> dict[str, Path]:
    return tower_folders(places)


@pytest.fixture(scope="module")
def trained_high(places: Path, towers: dict[str, Path]) -> Path:
    """A stage 1 that trained the ConvNeXt too."""
    plan = tiny_plan(GOLDEN / "base", towers, places, ["vision.high", "connector", "mining"])
    return train(plan, LOOKUP, places / "high", device="cpu").checkpoint


@pytest.fixture(scope="module")
def stage_1(places: Path, trained_high: Path) -> Path:
    """It, merged."""
    merge(opened(trained_high), places / "stage-1", LOOKUP)
    return places / "stage-1"


@pytest.fixture(scope="module")
def stage_2(places: Path, stage_1: Path, towers: dict[str, Path]) -> Path:
    """LoRA on that, whose towers have no folders of their own with weights."""
    configs = {part: stage_1 / part for part in towers}
    return train(tiny_plan(stage_1, configs, places, [], "config"), LOOKUP, places / "two", device="cpu").checkpoint


# Upstream's reader ----------------------------------------------------------------------------------------------------


def test_the_reader_is_upstreams_by_its_own_numbers(places: Path, towers: dict[str, Path]) -> None:
    folder = run_folder(places, "full", name="MGM-2B", prefix=str(places / "model_zoo"))
    model = read_by_upstream(folder)
    with np.load(GOLDEN / "expected.npz") as expected, np.load(GOLDEN / "inputs.npz") as inputs:
        wanted, text, image = expected["full_fp32.logits.0"], str(inputs["question.0"]), str(inputs["image.0"])
        asked = Record("q", (Turn("user", f"<image>\n{text}"),), (Image(GOLDEN / "images" / image.rpartition("/")[2]),))
    with torch.no_grad():
        got = model.model.logits(model.model(collate([model.processor.encode(asked)], pad_id=0)))[0]
    assert float(np.abs(got.numpy() - wanted).max()) < 1e-4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_vision_tower_aux": None}, "'NoneType' object has no attribute 'is_loaded'"),
        ({"mm_vision_tower": "/nowhere/openai"}, "Not find vision tower"),
        ({"mm_use_im_patch_token": None}, "a token for patches"),
    ],
)
def test_the_reader_ends_where_upstream_does(places: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = run_folder(tmp_path, "full", name="MGM-2B", prefix=str(places / "model_zoo"), **changes)
    with pytest.raises(UpstreamError, match=said):
        state_by_upstream(folder)


# Whole models ---------------------------------------------------------------------------------------------------------


def test_a_trained_convnext_is_what_upstream_and_import_use(trained_high: Path, places: Path, tmp_path: Path) -> None:
    check = opened(trained_high)
    wanted = logits(check.assembly)
    certificate = export(check, "mgm", tmp_path / "MGM-2B", LOOKUP)
    assert isinstance(certificate, Certificate)
    assert any("optimize_vision_tower_aux" in line for line in certificate.notes)
    assert far(logits(read_by_upstream(tmp_path / "MGM-2B")), wanted) < 1e-4
    assert far(imported_back(tmp_path / "MGM-2B", tmp_path / "back"), wanted) < 1e-4
    edit(tmp_path / "MGM-2B" / "config.json", optimize_vision_tower_aux=False)
    assert far(logits(read_by_upstream(tmp_path / "MGM-2B")), wanted) > 1e-2, "the training would show"


def test_an_untrained_convnext_is_left_to_its_own_folder(places: Path, towers: dict[str, Path], tmp_path: Path) -> None:
    import_folder(diagnose(GOLDEN / "lora", LOOKUP, base=GOLDEN / "base", parts=towers), LOOKUP, tmp_path / "lora")
    check = opened(tmp_path / "lora")
    wanted = logits(check.assembly)
    certificate = export(check, "mgm", tmp_path / "MGM-2B", LOOKUP)
    assert isinstance(certificate, Certificate)
    assert not json.loads((tmp_path / "MGM-2B" / "config.json").read_text())["optimize_vision_tower_aux"]
    assert certificate.notes[0].endswith("which must have 'mgm' and '2b' in it, and not '8x7b'")
    assert f"the ConvNeXt's from '{towers['high']}'" in certificate.notes[1]
    assert far(logits(read_by_upstream(tmp_path / "MGM-2B")), wanted) < 1e-4


def test_stage_2_on_a_merged_stage_1_is_exported_with_its_towers_named(
    stage_2: Path, towers: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError, match=r"knows none with weights; name CLIP's own with --part low=DIR, or merge"
    ):
        export(opened(stage_2), "mgm", tmp_path / "MGM-2B", LOOKUP)
    check = opened(stage_2, parts=towers)
    wanted = logits(check.assembly)
    export(check, "mgm", tmp_path / "MGM-2B", LOOKUP)
    assert far(logits(read_by_upstream(tmp_path / "MGM-2B")), wanted) < 1e-4, "stage 1 trained the ConvNeXt"
    assert far(imported_back(tmp_path / "MGM-2B", tmp_path / "back"), wanted) < 1e-4


def test_a_merged_folder_says_that_its_convnext_was_trained(
    stage_1: Path, towers: dict[str, Path], tmp_path: Path
) -> None:
    assert json.loads((stage_1 / "config.json").read_text())["optimize_vision_tower_aux"]
    own = {part: stage_1 / part for part in towers}
    wanted = logits(compose.build(tiny_plan(stage_1, own, tmp_path, [], "config"), LOOKUP, device="cpu"))
    named = logits(compose.build(tiny_plan(stage_1, towers, tmp_path, []), LOOKUP, device="cpu"))
    assert far(named, wanted) == 0.0


def test_a_convnext_named_beside_a_whole_folder_is_the_one_that_is_used(places: Path, towers: dict[str, Path]) -> None:
    folder = run_folder(places, "full", name="MGM-2B-base", prefix=str(places / "model_zoo"))
    built = compose.build(tiny_plan(folder, towers, places, []), LOOKUP, device="cpu")
    with built.disable_adapter():
        assert far(logits(built), logits(read_by_upstream(folder))) < 1e-5
    spec = built.plan.model_spec
    recorded = {key: value for key, value in (spec.model.config or {}).items() if key != "high_from"}
    earlier = replace(spec, model=replace(spec.model, config=recorded))
    before = compose.build(replace(built.plan, model_spec=earlier), LOOKUP, device="cpu")
    assert far(logits(before), logits(built)) > 1e-3, "checkpoints of before stay what they were"


def test_a_model_without_a_high_part_is_refused(towers: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(
        GOLDEN / "base",
        tmp_path,
        {
            "model": {
                "use": "mgm-gemma",
                "weights": str(GOLDEN / "base"),
                "parts": {"low": {"use": "clip", "weights": str(towers["low"])}, "high": {"use": "none"}},
            },
            "peft": {"use": "full", "on": ["connector"]},
            "train.steps": 1,
        },
        LOOKUP,
    )
    checkpoint = train(plan, LOOKUP, tmp_path / "o", device="cpu").checkpoint
    with pytest.raises(CheckpointError) as caught:
        export(opened(checkpoint), "mgm", tmp_path / "MGM-2B", LOOKUP)
    assert caught.value.sentence == (
        "upstream's loader cannot open this model: it has no high part ('NoneType' object has no attribute 'is_loaded'). Merge it "
        "instead"
    )


@pytest.mark.parametrize(
    ("language", "towers", "reason"),
    [
        ({"head_dim": 32}, {}, "its heads are 128 wide together, and the model is 64"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {}, "its rope_scaling is 'llama3'"),
        ({"mlp_bias": True}, {}, "its feed-forward layers have biases"),
        ({}, {"high": "efficientnet-lite"}, "its high part is 'efficientnet-lite', and upstream has only ConvNeXt"),
    ],
)
def test_what_upstreams_code_does_not_build_is_refused(
    language: dict[str, Any], towers: dict[str, str], reason: str
) -> None:
    sizes = {"num_attention_heads": 4, "head_dim": 16, "hidden_size": 64, **language}
    model = SimpleNamespace(config={"language": sizes})
    named = {
        part: SimpleNamespace(name=name)
        for part, name in ({"low": "clip", "high": "openclip-convnext"} | towers).items()
    }
    plan = SimpleNamespace(model_spec=SimpleNamespace(model=model))
    assembly: Any = SimpleNamespace(plan=plan, towers=named, architecture=MgmGemma(MgmSettings()))
    with pytest.raises(CheckpointError) as caught:
        refuse_what_upstream_lacks(GEMMA, assembly)
    assert caught.value.sentence == f"upstream's loader cannot open this model: {reason}. Merge it instead"


def test_weights_that_fp16_does_not_hold_are_named() -> None:
    model = torch.nn.Linear(2, 2)
    assembly: Any = SimpleNamespace(model=model)
    assert list(too_large(assembly)) == []
    model.weight.data[0, 0] = -7e4
    assert list(too_large(assembly)) == ["it computes in fp16, in which the weights overflow: the largest is 7e+04"]


def test_what_upstream_would_not_find_in_a_towers_folder_is_refused(
    trained_high: Path, places: Path, tmp_path: Path
) -> None:
    parts = tower_folders(tmp_path)
    (parts["high"] / "open_clip_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"upstream reads open_clip_config.json of the high part's folder, and '.*' lacks it"
    ):
        export(opened(trained_high, parts=parts), "mgm", tmp_path / "MGM-2B", LOOKUP)
    assert not (tmp_path / "MGM-2B").exists()


def test_another_convnext_than_the_models_is_refused(stage_2: Path, tmp_path: Path) -> None:
    parts = tower_folders(tmp_path)

    def wider(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor]) if name.startswith("visual.trunk.stem.") else tensor

    change(parts["high"] / "open_clip_pytorch_model.bin", wider)
    with pytest.raises(
        CheckpointError, match="holds another ConvNeXt than the model's high part; name the right one with"
    ):
        export(opened(stage_2, parts=parts), "mgm", tmp_path / "MGM-2B", LOOKUP)


# Tokenizers and other files -------------------------------------------------------------------------------------------


def test_a_merged_folder_keeps_what_stays_true_of_its_base(towers: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    base = Path(shutil.copytree(GOLDEN / "base", tmp_path / "base"))
    generation = {"max_new_tokens": 77, "eos_token_id": [1, 5], "do_sample": False}
    (base / "generation_config.json").write_text(json.dumps(generation))
    (base / "NOTICE").write_text("ours")
    (base / "README.md").write_text("a card")
    checkpoint = train(
        tiny_plan(base, towers, tmp_path, ["connector"]), LOOKUP, tmp_path / "o", device="cpu"
    ).checkpoint
    certificate = merge(opened(checkpoint), tmp_path / "merged", LOOKUP)
    assert certificate.carried == ["NOTICE", "generation_config.json"]
    assert certificate.not_carried == ["README.md", "tokenizer.model"]
    assert GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == 77
    tokens = [
        AutoTokenizer.from_pretrained(folder)("Is it a circle?").input_ids for folder in (base, tmp_path / "merged")
    ]
    assert tokens[0] == tokens[1]


# Adapters -------------------------------------------------------------------------------------------------------------


def test_an_exported_adapter_is_read_back_by_peft_itself(trained: Any, lookup: Any, tmp_path: Path) -> None:
    check = open_checkpoint(trained.checkpoint, lookup, device="cpu", precision="fp32")
    read_back = export(check, "peft", tmp_path / "adapter", lookup)
    assert isinstance(read_back, ReadBack)
    assert read_back.reader.startswith("peft ")
    assert read_back.error <= read_back.tolerance < 0.05 * read_back.distance
    assert read_back.notes == []


def test_an_adapter_that_peft_would_read_otherwise_is_not_written(trained: Any, lookup: Any, tmp_path: Path) -> None:
    check = open_checkpoint(trained.checkpoint, lookup, device="cpu", precision="fp32")
    formats = dict(check.assembly.peft.exports())  # type: ignore[union-attr]

    def careless(assembly: Any, folder: Path) -> None:
        formats["peft"](assembly, folder)
        edit(folder / "adapter_config.json", lora_alpha=7.0)

    check.assembly.peft.exports = lambda: {"peft": careless}  # type: ignore[union-attr,method-assign,assignment]
    with pytest.raises(CheckpointError, match=r"exporting failed: with what was written peft .* gives other logits"):
        export(check, "peft", tmp_path / "adapter", lookup)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_in_a_vision_tower_says_where_peft_finds_it(base: Path, lookup: Any, tmp_path: Path) -> None:
    plan = plan_of(
        base,
        tmp_path,
        {"peft": {**METHODS["lora"], "on": ["vision.low"]}, "train.steps": 2, "train.allow_unreached": NEVER_READ[:1]},
    )
    checkpoint = train(plan, lookup, tmp_path / "o", device="cpu").checkpoint
    check = open_checkpoint(checkpoint, lookup, device="cpu", precision="fp32")
    read_back = export(check, "peft", tmp_path / "adapter", lookup)
    count = len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) // 2
    assert read_back.notes == [
        f"{count} of its {count} layers lie in vision towers, under their names in Graftwork's model: peft finds them there, and not "
        "in another program's"
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers 5 for it
def test_everybody_who_reads_a_format_computes_the_same(tmp_path: Path) -> None:
    measured = list(rows(tmp_path))
    assert len(measured) == 6
    assert {reader: error for _, reader, _, error, _ in measured if error > 1e-4} == {}
