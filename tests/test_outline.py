"""What a plan comes to before any weight is read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_runs import COMPONENTS, CONFIGS, LORA, plan_of

from graftwork.build import compose
from graftwork.build.outline import KernelRow, Outline, RoleRow, outline
from graftwork.config.machine import Machine
from graftwork.contracts import AttentionCase, DictLookup, NoSettings, Support, unsupported
from graftwork_mgm import MgmGemma
from graftwork_torch_attention import Eager

CPU = Machine()
H, KV, FFN, VOCABULARY, LAYERS, LOW = 128, 32, 320, 448, 4, 64
"""The tiny model's sizes: width, width of the keys, of the feed-forward layers, tokens, layers, width of the low tower."""
FINE = 24 + 32 + 48 + 64
ATTENTION, MLP = 2 * H * H + 2 * H * KV, 3 * H * FFN
CONNECTOR = LOW * H + H + H * H + H
MINING = (2 * LOW + LOW * LOW + LOW) + 2 * (2 * FINE + FINE * LOW + LOW)


class Narrow(Eager):
    """A kernel for small heads only"""

    name: ClassVar[str] = "narrow"
    Settings = NoSettings

    def supports(self, case: AttentionCase) -> Support:
        if case.dtype != "float32":
            return unsupported(f"it computes in float32, not in {case.dtype}")
        return Support(True) if case.site.head_dim <= 32 else unsupported(f"head_dim is {case.site.head_dim}")


class Tiny(Narrow):
    """A kernel for even smaller heads"""

    name: ClassVar[str] = "tiny"

    def supports(self, case: AttentionCase) -> Support:
        return Support(True) if case.site.head_dim <= 16 else unsupported(f"head_dim is {case.site.head_dim}, not 16")


class Wide(Narrow):
    """A kernel for large heads only"""

    name: ClassVar[str] = "wide"

    def supports(self, case: AttentionCase) -> Support:
        return Support(True) if case.site.head_dim >= 64 else unsupported(f"head_dim is {case.site.head_dim}")


def rows(found: Outline) -> dict[str, RoleRow]:
    return {row.role: row for row in found.roles}


def outlined(base: Path | None, tmp_path: Path, changes: dict[str, Any]) -> Outline:
    return outline(plan_of(base, tmp_path, changes), DictLookup(*COMPONENTS), CPU)


def test_the_counts_of_a_small_model_are_those_of_pen_and_paper(base: Path, tmp_path: Path) -> None:
    found = outlined(base, tmp_path, {"peft": LORA | {"also_train": ["connector"]}})
    low_rank = LAYERS * 4 * (2 * 2 * H + 2 * (H + KV)), LAYERS * 4 * 3 * (H + FFN)
    table = rows(found)
    assert table["language.attention"] == RoleRow(
        "language.attention", 4 * LAYERS, LAYERS * ATTENTION, 4 * LAYERS, low_rank[0], False
    )
    assert table["language.mlp"] == RoleRow("language.mlp", 3 * LAYERS, LAYERS * MLP, 3 * LAYERS, low_rank[1], False)
    assert table["language.norms"] == RoleRow("language.norms", 2 * LAYERS + 1, (2 * LAYERS + 1) * H, 0, 0, False)
    assert table["language.embeddings"] == RoleRow("language.embeddings", 1, VOCABULARY * H, 0, 0, False)
    assert table["connector"] == RoleRow("connector", 2, CONNECTOR, 2, CONNECTOR, False)
    assert table["mining"] == RoleRow("mining", 6, MINING, 0, 0, False)
    assert found.trained == sum(low_rank) + CONNECTOR
    assert found.total == sum(row.parameters for row in found.roles) + sum(low_rank)
    assert found.share == found.trained / found.total


def test_the_outline_and_the_built_model_agree(base: Path, tmp_path: Path) -> None:
    from graftwork.build import compose

    for peft in (LORA, {"use": "ia3", "on": ["language"]}, {"use": "full", "on": ["vision.low"]}):
        plan = plan_of(base, tmp_path, {"peft": peft})
        assembly = compose.build(plan, DictLookup(*COMPONENTS), device="cpu")
        found = outline(plan, DictLookup(*COMPONENTS), CPU)
        assert {"total": found.total, "trained": found.trained} == assembly.adaptation.counts


def test_roles_that_the_base_lacks_are_marked(base: Path, tmp_path: Path) -> None:
    found = rows(outlined(None, tmp_path, {"peft": {"use": "full", "on": ["language", "connector"]}}))
    assert {role for role, row in found.items() if row.newly_initialised} == {"connector", "mining"}
    assert not any(row.newly_initialised for row in rows(outlined(base, tmp_path, {})).values())


def test_every_site_has_its_kernel_and_the_reasons_against_the_others(base: Path, tmp_path: Path) -> None:
    lookup = DictLookup(*COMPONENTS, Narrow, Tiny, Wide)
    attention = {"prefer": ["wide", "tiny", "narrow", "sdpa"], "sites": {"vision.low": ["wide"]}}
    plan = plan_of(base, tmp_path, {"attention": attention}, lookup)
    assert {row.site: row for row in outline(plan, lookup, CPU).kernels} == {
        "language": KernelRow("language", "narrow", (("wide", "head_dim is 32"), ("tiny", "head_dim is 32, not 16"))),
        "vision.low": KernelRow("vision.low", "none", (("wide", "head_dim is 16"),)),
    }


class OwnAttention(MgmGemma):
    """A model whose language model keeps transformers' attention"""

    name: ClassVar[str] = "own-attention"

    def sites(self, config: Any, towers: Any) -> Any:
        language, *others = super().sites(config, towers)
        return [replace(language, own="transformers' eager", why_own="its masks are its own"), *others]

    def build(self, config: Any, towers: Any, outputs: Any, context: Any) -> Any:
        return super().build(config, towers, outputs, replace(context, attn_implementation="eager"))


def test_attention_that_is_the_models_own_is_told_and_gets_no_kernel(base: Path, tmp_path: Path) -> None:
    lookup = DictLookup(*COMPONENTS, OwnAttention, Tiny)
    plan = plan_of(base, tmp_path, {"model.use": "own-attention", "attention.sites": {"language": ["tiny"]}}, lookup)
    assert outline(plan, lookup, CPU).kernels[0] == KernelRow(
        "language", "transformers' eager (the model's own)", (("kernels", "its masks are its own"),)
    )
    assembly = compose.build(plan, lookup, device="cpu")
    assert "language" not in assembly.bindings
    assert assembly.kernel_usage()["language"] == {"own": "transformers' eager", "fallbacks": ["its masks are its own"]}


def test_kernels_are_chosen_for_the_machine_and_the_precision(base: Path, tmp_path: Path) -> None:
    lookup = DictLookup(*COMPONENTS, Narrow)
    changes = {"attention.prefer": ["narrow", "sdpa"], "train.precision": "bf16"}
    plan = plan_of(base, tmp_path, changes, lookup)
    gpu = Machine(devices=("GPU",), capability=(9, 0), cuda=True)
    for machine in (CPU, gpu):
        language = outline(plan, lookup, machine).kernels[0]
        assert language == KernelRow("language", "sdpa", (("narrow", "it computes in float32, not in bfloat16"),))


def test_planning_leaves_the_random_numbers_alone(base: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    outlined(base, tmp_path, {})
    assert torch.get_rng_state().equal(before)


# The model as it is published -----------------------------------------------------------------------------------------

GEMMA_2B = {
    "model_type": "gemma",
    "vocab_size": 256_000,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
CONVNEXT_L = {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "patch_size": 4, "image_size": 320}


@pytest.fixture
def published(tmp_path: Path) -> dict[str, Any]:
    """Changes of a run file to MGM-2B's sizes, with configurations alone."""
    for name, config in (("language", GEMMA_2B), ("low", CLIP_L_336), ("high", CONVNEXT_L)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CONFIGS / "language" / name, tmp_path / "language" / name)
    return {
        "model.config": "language",
        "model.image_size_aux": 768,
        "model.parts.low.config": "low",
        "model.parts.high.config": "high",
        "train.precision": "bf16",
    }


def test_mgm_2b_has_126_adapted_layers_and_19_611_648_numbers_in_them_at_rank_16(
    tmp_path: Path, published: dict[str, Any]
) -> None:
    peft = {"use": "lora", "on": ["language.attention", "language.mlp"], "rank": 16}
    found = outlined(None, tmp_path, published | {"peft": peft})
    table = rows(found)
    assert table["language.attention"].adapted + table["language.mlp"].adapted == 126
    assert found.trained == 19_611_648
    language = sum(row.parameters for role, row in table.items() if role.startswith("language."))
    assert language == 2_506_172_416  # as Gemma-2B is published
    assert found.total == sum(row.parameters for row in table.values()) + 19_611_648


def test_mgm_2b_has_13_259_008_numbers_in_connector_and_mining(tmp_path: Path, published: dict[str, Any]) -> None:
    found = outlined(None, tmp_path, published | {"peft": {"also_train": ["connector", "mining"]}})
    table = rows(found)
    assert (table["connector"].trained, table["mining"].trained) == (6_295_552, 6_963_456)
    assert found.trained == 13_259_008
