"""What other code computes with what was exported: `python tests/exports_table.py` prints the table of docs/upstream-folders.md."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from foreign_folders import NAMES, zoo
from mgm_folders import GOLDEN, LOOKUP, QUESTION
from safetensors.torch import load_file
from tiny_runs import METHODS, plan_of
from upstream_reader import read_by_upstream

from graftwork.build import compose
from graftwork.checkpoint.certificate import ReadBack
from graftwork.checkpoint.merging import export, merge
from graftwork.checkpoint.store import Opened, open_checkpoint
from graftwork.contracts import Batch, collate
from graftwork.foreign.diagnosis import diagnose
from graftwork.foreign.importing import import_folder
from graftwork.train.loop import train

Row = tuple[str, str, str, float, float]
"""Format, reader, version, the largest difference of a logit, and how far the adapter moves one."""
ADAPTERS = ("lora", "dora", "rslora", "pissa", "lora-plus")


def opened(folder: Path) -> Opened:
    return open_checkpoint(folder, LOOKUP, device="cpu", precision="fp32")


def with_image(built: Any) -> torch.Tensor:
    """What a model says about an image."""
    built.model.eval()
    with torch.no_grad():
        return built.model.logits(built.model(collate([built.processor.encode(QUESTION)], pad_id=0)))  # type: ignore[no-any-return]


def on_text(model: Any) -> torch.Tensor:
    """What a built model, or transformers' own, says about a few tokens."""
    ids = torch.tensor([[2, 7, 90, 140, 33, 256, 9, 61]])
    real = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        if hasattr(model, "encode_images"):
            return model.logits(model(Batch(ids, real, ~real, ids, {})))  # type: ignore[no-any-return]
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


def gemma(base: Path) -> Any:
    """transformers' own GemmaForCausalLM with a base's weights."""
    config = json.loads((base / "config.json").read_text())
    known = transformers.GemmaConfig().to_dict().keys() & config.keys() - {"model_type", "hidden_act"}
    settings = transformers.GemmaConfig(**{key: config[key] for key in known})
    settings.hidden_act = config["hidden_act"]  # by keyword transformers 5 takes it for the approximation
    model = transformers.GemmaForCausalLM(settings).eval()
    stored = {n: tensor for file in base.glob("*.safetensors") for n, tensor in load_file(file).items()}
    model.load_state_dict({n: stored[n].float() for n in model.state_dict() if n in stored}, strict=False)
    return model


def rows(folder: Path) -> Iterator[Row]:
    """Every format with everybody who reads it, on the small published weights; `folder` is an empty one."""
    models = zoo(folder, "clip", "convnext")
    towers = {"low": models / NAMES["clip"], "high": models / NAMES["convnext"]}
    parts = {
        "low": {"use": "clip", "weights": str(towers["low"])},
        "high": {"use": "openclip-convnext", "weights": str(towers["high"])},
    }

    def checkpoint(name: str, base: Path, method: dict[str, Any]) -> Path:
        changes = {
            "model": {"use": "mgm-gemma", "weights": str(base), "image_size_aux": 128, "parts": parts},
            "peft": method,
            "train.batch_size": 2,
        }
        return train(plan_of(base, folder, changes, LOOKUP), LOOKUP, folder / name, device="cpu").checkpoint

    everything = {"use": "full", "on": ["connector", "mining", "vision.high"]}
    first = checkpoint("stage-1", GOLDEN / "base", everything)
    merge(opened(first), base := folder / "merged", LOOKUP)
    plain = compose.build(plan_of(base, folder, {"peft": None, **as_base(base, parts)}, LOOKUP), LOOKUP, device="cpu")
    wanted = with_image(opened(first).assembly)
    yield "merged", "`mgm-gemma`, as a base", "0.1.0", far(with_image(plain), wanted), 0.0
    tokens = [
        transformers.AutoTokenizer.from_pretrained(f)("Is it a circle?").input_ids for f in (GOLDEN / "base", base)
    ]
    yield (
        "merged",
        "`AutoTokenizer`, token ids",
        f"transformers {transformers.__version__}",
        float(tokens[0] != tokens[1]),
        0.0,
    )

    around, on_gemma = [], []
    for method in ADAPTERS:
        check = opened(checkpoint(method, base, METHODS[method]))
        read_back = export(check, "peft", folder / f"peft-{method}", LOOKUP)
        assert isinstance(read_back, ReadBack)
        around.append((read_back.error, read_back.distance))
        text = on_text(check.assembly.model)
        with check.assembly.disable_adapter():
            moved = far(text, on_text(check.assembly.model))
        loaded = peft.PeftModel.from_pretrained(gemma(base), folder / f"peft-{method}")
        on_gemma.append((far(on_text(loaded), text), moved))
    versions = f"peft {peft.__version__}"
    yield "peft", "`PeftModel` around the built module", versions, *worst(around)
    versions += f", transformers {transformers.__version__}"
    yield "peft", "`PeftModel` on `GemmaForCausalLM`, text", versions, *worst(on_gemma)

    by_upstream, by_import = [], []
    for name, source in (("full", everything), ("lora", {**METHODS["lora"], "also_train": ["connector"]})):
        check = opened(checkpoint(f"to-{name}", base if name == "lora" else GOLDEN / "base", source))
        wanted = with_image(check.assembly)
        with check.assembly.disable_adapter():
            moved = far(wanted, with_image(check.assembly))
        export(check, "mgm", out := folder / f"MGM-2B-{name}", LOOKUP)
        by_upstream.append((far(with_image(read_by_upstream(out)), wanted), moved))
        import_folder(diagnose(out, LOOKUP), LOOKUP, folder / f"back-{name}")
        by_import.append((far(with_image(opened(folder / f"back-{name}").assembly), wanted), moved))
    yield "mgm", "upstream's loader, as specified", "commit 769820cb, transformers 4.38.0", *worst(by_upstream)
    yield "mgm", "`graftwork import`", "0.1.0", *worst(by_import)


def as_base(base: Path, parts: dict[str, dict[str, str]]) -> dict[str, Any]:
    """A merged folder as the model of a run, with the towers that it holds."""
    own = {part: {"use": choice["use"], "config": str(base / part)} for part, choice in parts.items()}
    return {"model": {"use": "mgm-gemma", "weights": str(base), "parts": own}}


def worst(measured: list[tuple[float, float]]) -> tuple[float, float]:
    """The largest difference, and the smallest effect."""
    return max(error for error, _ in measured), min(moved for _, moved in measured)


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    sys.stdout.write("| format | read by | version | largest difference of a logit | the adapter moves them by |\n")
    sys.stdout.write("| --- | --- | --- | --- | --- |\n")
    with tempfile.TemporaryDirectory() as folder:
        for form, reader, version, error, moved in rows(Path(folder)):
            effect = f"{moved:.2g}" if moved else ""
            sys.stdout.write(f"| {form} | {reader} | {version} | {error:.1e} | {effect} |\n")


if __name__ == "__main__":
    main()
