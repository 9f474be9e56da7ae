"""Adapters that peft itself makes and opens, by which `import` is measured.

As a program: `python tests/peft_adapters.py FOLDER` makes and imports those that FOLDER does not hold yet, and prints the table.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
import transformers
from tiny_runs import COMPONENTS, CONFIGS, plan_of
from torch import Tensor, nn

from graftwork.build import compose
from graftwork.checkpoint.store import open_checkpoint
from graftwork.contracts import IGNORED, Assembly, Batch, DictLookup, Encoded, collate
from graftwork.errors import GraftworkError
from graftwork.foreign.diagnosis import diagnose
from graftwork.foreign.importing import import_folder, records
from graftwork_mgm import MgmLlama
from graftwork_mgm.backbones import GEMMA, LLAMA, Backbone
from graftwork_mgm.example import write as write_example

ROOT = Path(__file__).parents[1]
LOOKUP = DictLookup(*COMPONENTS, MgmLlama)
TOLERANCE = 1e-4
"""How far logits of the import may be from those of peft."""
EFFECT = 0.05
"""How far an adapter moves the logits at least: what is lost of it is seen."""
TABLE = "adapters of peft, imported"
"""The property of a test's report that holds the table."""


@dataclass(frozen=True)
class Base:
    """A random MGM with both parts, of two layers."""

    name: str
    backbone: Backbone
    causal: str
    """transformers' class of the language model with its head."""
    tied: bool


BASES = {
    "tied": Base("mgm-gemma", GEMMA, "GemmaForCausalLM", True),
    "untied": Base("mgm-llama", LLAMA, "LlamaForCausalLM", False),
}
LAYERS = r"model\.layers\.\d+\."
ATTENTION = rf"{LAYERS}self_attn\.[qv]_proj"
LANGUAGE = rf"{LAYERS}(self_attn|mlp)\.\w+_proj"
SUFFIXES = ["q_proj", "v_proj"]
TOWERS = r".*vision_tower.*"
CONNECTOR = r".*mm_projector\.[02]"
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, the towers too": {"target_modules": SUFFIXES},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA, rsLoRA, a regex": {"use_dora": True, "use_rslora": True, "target_modules": LANGUAGE},
    "bias of all": {"bias": "all"},
    "bias of the adapted": {"bias": "lora_only", "target_modules": rf"{CONNECTOR}|{LANGUAGE}"},
    "biases of its own": {"lora_bias": True, "target_modules": rf"{CONNECTOR}|{LAYERS}mlp\.up_proj"},
    "the head apart": {"modules_to_save": ["lm_head"]},
    "the embeddings apart": {"modules_to_save": ["embed_tokens"]},
    "head and embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "the connector whole": {"modules_to_save": ["mm_projector"]},
    "DoRA, the connector whole": {"use_dora": True, "modules_to_save": ["mm_projector"]},
    "the norms whole": {"modules_to_save": ["input_layernorm", "norm"]},
    "alpha by layer": {"alpha_pattern": {"v_proj": 32}},
    "rank by layer": {"rank_pattern": {"layers.0.self_attn.q_proj": 6, "v_proj": 2}},
    "rank and alpha by layer, rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {"mlp": 2, r".*\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"up_proj": 24},
        "target_modules": LANGUAGE,
    },
    "rows of the embeddings": {"trainable_token_indices": [7, 8]},
    "rows of embeddings and head": {"trainable_token_indices": {"embed_tokens": [7, 8], "lm_head": [7, 8]}},
    "one layer": {"target_modules": SUFFIXES, "layers_to_transform": [1], "exclude_modules": TOWERS},
    "one layer, DoRA, rank by layer": {
        "use_dora": True,
        "target_modules": SUFFIXES,
        "layers_to_transform": 1,
        "exclude_modules": TOWERS,
        "rank_pattern": {"v_proj": 6},
        "bias": "all",
    },
    "all but some": {"target_modules": LANGUAGE, "exclude_modules": ["gate_proj", "o_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "all linear but the towers": {"target_modules": "all-linear", "exclude_modules": TOWERS},
    "parameters": {"target_parameters": ["mlp.down_proj.weight"]},
    "connector and mining": {"target_modules": rf"{CONNECTOR}|.*vlm_uni_\w+_projector\.1"},
    "the embeddings": {"target_modules": rf"{ATTENTION}|.*embed_tokens"},
    "the head": {"target_modules": rf"{ATTENTION}|lm_head"},
    "KaSA": {"kasa_config": "KasaConfig"},
    "PiSSA": {"init_lora_weights": "pissa"},
}
"""What each adapter sets in peft's LoraConfig, beside rank 4, alpha 8 and two of the attention's layers."""
ONLY: dict[str, tuple[str, ...]] = {"rows of embeddings and head": ("untied",)}


@dataclass(frozen=True)
class Outcome:
    """What came of one adapter."""

    adapter: str
    base: str
    distance: float
    """How far peft's logits are from the base's."""
    error: float
    """How far the import's are from peft's; not a number where there is none."""
    refused: str
    crashed: bool = False
    """Whether an exception ended the import that no sentence explains."""

    @property
    def ended(self) -> str:
        """In a word."""
        if self.refused:
            return "crashed" if self.crashed else "refused"
        return "equal" if self.error <= TOLERANCE else "wrong"


def build_base(base: Base, folder: Path) -> Path:
    """Write a random model into a new folder."""
    (configs := folder.parent / f"{folder.name}-config").mkdir()
    folder.mkdir()
    write_example(base.backbone, configs)
    model = {"use": base.name, "config": str(configs), "image_size_aux": 64, "aspect_ratio": "square"}
    parts = {
        "low": {"use": "clip", "config": str(CONFIGS / "low")},
        "high": {"use": "openclip-convnext", "config": str(CONFIGS / "high")},
    }
    assembly = compose.build(
        plan_of(None, folder, {"peft": None, "model": model | {"parts": parts}}, LOOKUP), LOOKUP, device="cpu"
    )
    generator = torch.Generator().manual_seed(11)
    for name, parameter in assembly.model.named_parameters():
        # transformers' own beginning gives logits of nearly nothing; biases of zero would hide that one is lost.
        spread = 0.25 if name.startswith(("model.layers", "model.embed", "lm_head")) and parameter.dim() > 1 else 0.05
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    assembly.architecture.write(assembly, folder)
    return folder


def assemble(base: Base, folder: Path) -> Assembly:
    """The model in a base's folder, for evaluation."""
    model = {"use": base.name, "weights": str(folder)}
    parts = {
        "low": {"use": "clip", "config": str(folder / "low")},
        "high": {"use": "openclip-convnext", "config": str(folder / "high")},
    }
    plan = plan_of(None, folder, {"peft": None, "model": model | {"parts": parts}}, LOOKUP)
    assembly = compose.build(plan, LOOKUP, device="cpu")
    assembly.model.eval()
    return assembly


def causal(base: Base, assembly: Assembly) -> Any:
    """transformers' model with a head around the built one's modules, as upstream's class is: what peft is used on."""
    with torch.device("meta"):
        whole = getattr(transformers, base.causal)(assembly.model.model.config)
    whole.model = assembly.model.model
    if base.tied:
        whole.lm_head.weight = whole.model.embed_tokens.weight
    else:
        whole.lm_head = assembly.model.lm_head
    return whole.eval()


def inputs(assembly: Assembly) -> Batch:
    """Conversations about images and without, and every token of the small vocabulary."""
    ids = [*range(3, 180)]
    encoded = [assembly.processor.encode(record) for record in records()]
    encoded.append(Encoded(ids, [False] * len(ids), [IGNORED] * len(ids), {}))
    return collate(encoded, pad_id=assembly.processor.pad_id)


def logits(assembly: Assembly, head: nn.Module | None, batch: Batch) -> Tensor:
    """The logits of every token, by the model's own head or by another."""
    with torch.no_grad():
        hidden = assembly.model(batch)
        found: Tensor = head(hidden) if head is not None else assembly.model.logits(hidden)
        return found[batch.attention_mask.bool()]


def make(adapter: str, base: Base, folder: Path, out: Path) -> None:
    """Let peft put an adapter onto the model in `folder`, move all that it trains, and save it in `out`."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    settings |= ADAPTERS[adapter]
    if "kasa_config" in settings:
        settings["kasa_config"] = peft.KasaConfig()
    torch.manual_seed(13)
    with quiet(), torch.no_grad():
        wrapped = peft.get_peft_model(causal(base, assemble(base, folder)), peft.LoraConfig(**settings))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.15 * torch.randn(parameter.shape)
        wrapped.save_pretrained(out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1))


def by_peft(base: Base, folder: Path, adapter: Path) -> tuple[Tensor, float]:
    """The logits of the model in `folder` with an adapter's folder as peft opens it, and how far they are from the base's."""
    assembly = assemble(base, folder)
    whole, batch = causal(base, assembly), inputs(assembly)
    plain = logits(assembly, whole.lm_head, batch)
    peft.PeftModel.from_pretrained(whole, adapter)
    with_adapter = logits(assembly, whole.lm_head, batch)
    return with_adapter, float((with_adapter - plain).abs().max())


def by_import(folder: Path, adapter: Path, out: Path) -> Tensor:
    """The logits of the checkpoint that `import` makes of an adapter's folder; GraftworkError where it makes none."""
    parts = {part: folder / part for part in ("low", "high")}
    import_folder(diagnose(adapter, LOOKUP, base=folder, parts=parts), LOOKUP, out, kernels=["sdpa"])
    assembly = open_checkpoint(out, LOOKUP, device="cpu", precision="fp32").assembly
    return logits(assembly, None, inputs(assembly))


def measure(adapter: str, base: str, folder: Path, work: Path) -> Outcome:
    """Make an adapter on the base in `folder`, import it, and compare; `work` is an empty folder."""
    make(adapter, BASES[base], folder, work / "adapter")
    with quiet():
        wanted, distance = by_peft(BASES[base], folder, work / "adapter")
        try:
            found = by_import(folder, work / "adapter", work / "checkpoint")
        except Exception as error:
            crashed = not isinstance(error, GraftworkError)
            said = str(error).replace(f"{work}/", "").replace(str(folder), "BASE")
            return Outcome(adapter, base, distance, float("nan"), said, crashed)
    return Outcome(adapter, base, distance, float((found - wanted).abs().max()), "")


def quiet() -> Any:
    """What peft says of its own settings is not the matter here."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return warnings.catch_warnings(action="ignore")


def cases() -> Iterator[tuple[str, str]]:
    """Every adapter, on each base that has what it adapts."""
    for base in BASES:
        yield from ((adapter, base) for adapter in ADAPTERS if base in ONLY.get(adapter, BASES))


def campaign(folder: Path) -> list[Outcome]:
    """Every adapter; those that `folder` holds, of this state of the code, are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    state, found = digest(), []
    for base, made in BASES.items():
        if not (folder / base / "model.safetensors").exists():
            with TemporaryDirectory(dir=folder) as unfinished:
                build_base(made, Path(unfinished) / "base").rename(folder / base)
    for adapter, base in cases():
        file = folder / f"{base} {adapter}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if known.get("state") != state:
            with TemporaryDirectory(dir=folder) as work:
                known = {"state": state, **vars(measure(adapter, base, folder / base, Path(work)))}
            file.write_text(json.dumps(known), encoding="utf-8")
        found.append(Outcome(**{key: value for key, value in known.items() if key != "state"}))
    return found


def digest() -> str:
    """What identifies the code that makes and imports adapters."""
    files = [Path(__file__), *sorted((ROOT / "core").rglob("*.py")), *sorted((ROOT / "plugins").rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def table(found: list[Outcome]) -> list[str]:
    """Lines of Markdown: each adapter on each base, and what came of it."""
    lines = [
        "| adapter | base | it moves the logits by | import | largest difference to peft, or the refusal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in found:
        outcome = f"**{one.ended}**" if one.ended in ("wrong", "crashed") else one.ended
        said = one.refused.replace("|", r"\|") or f"{one.error:.2g}"
        lines.append(f"| {one.adapter} | {one.base} | {one.distance:.2g} | {outcome} | {said} |")
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = campaign(Path(sys.argv[1]))
    sys.stdout.write("\n".join(table(results)) + "\n")
    counts = Counter(one.ended for one in results)
    sys.stdout.write(f"\n{len(results)} adapters: {', '.join(f'{count} {ended}' for ended, count in counts.items())}\n")
