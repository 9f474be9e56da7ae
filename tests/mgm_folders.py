"""The small MGM folders in `tests/golden`, and models built from them without the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_runs import COMPONENTS

from graftwork.checkpoint.store import open_checkpoint
from graftwork.contracts import (
    BuildContext,
    DictLookup,
    Image,
    NoSettings,
    Record,
    Structure,
    TowerOutput,
    Turn,
    VisionTower,
)
from graftwork.foreign.diagnosis import diagnose
from graftwork.foreign.importing import import_folder
from graftwork.weights import LazyTensor, open_weights
from graftwork_convnext import OpenClipConvNext
from graftwork_hf_vision.clip import Clip, ClipSettings
from graftwork_mgm import TOWERS, MgmGemma, MgmSettings
from graftwork_mgm.processor import MgmProcessor

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts import Assembly

LOOKUP = DictLookup(*COMPONENTS)
GOLDEN = Path(__file__).parent / "golden"
TOWER_FOLDERS = {"low": GOLDEN / "clip", "high": GOLDEN / "convnext"}
QUESTION = Record("q", (Turn("user", "<image>\nWhat shape?"),), (Image(GOLDEN / "images" / "0001.png"),))


@dataclass
class Small:
    """A small MGM and what it was built from."""

    architecture: MgmGemma
    towers: Mapping[str, VisionTower[Any]]
    tower_configs: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    outputs: Mapping[str, TowerOutput]
    structure: Structure
    processor: MgmProcessor

    @property
    def model(self) -> Any:
        """The built model."""
        return self.structure.model

    def load(self, tensors: Mapping[str, LazyTensor]) -> None:
        """Fill tensors by their names in the model, in fp32."""
        state: dict[str, Tensor] = self.model.state_dict()
        self.model.load_state_dict(state | {name: tensor().float() for name, tensor in tensors.items()})


def config_folder(folder: Path, source: str = "full", **changes: Any) -> Path:
    """A folder with the config.json of a small one, changed; None removes a key."""
    config = json.loads((GOLDEN / source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def small(folder: Path, *, high: bool = True, tokenizer: Path | None = None, **settings: Any) -> Small:
    """A randomly initialised MGM of the sizes that `folder` and the small towers' folders say, in evaluation mode."""
    architecture = MgmGemma(MgmSettings(**settings))
    towers: dict[str, VisionTower[Any]] = {"low": Clip(ClipSettings())}
    if high:
        towers["high"] = OpenClipConvNext(NoSettings())
    tower_configs = {part: tower.configuration(TOWER_FOLDERS[part]) for part, tower in towers.items()}
    config = architecture.configuration(folder)
    outputs = architecture.describe_towers(config, {part: (towers[part], tower_configs[part]) for part in towers})
    modules = {part: tower.build(tower_configs[part], BuildContext()) for part, tower in towers.items()}
    structure = architecture.build(config, modules, outputs, BuildContext())
    structure.model.eval()
    processor = architecture.processor(config, tokenizer or folder, outputs)
    assert isinstance(processor, MgmProcessor)
    return Small(architecture, towers, tower_configs, config, outputs, structure, processor)


def tower_tensors(towers: Mapping[str, VisionTower[Any]]) -> dict[str, LazyTensor]:
    """The tensors of the small towers' own folders under the model's names."""
    return {
        f"{TOWERS[part]}.{translated}": tensor
        for part, tower in towers.items()
        for name, tensor in open_weights(TOWER_FOLDERS[part]).items()
        if (translated := tower.module_name(name))
    }


def published() -> Small:
    """The whole published folder, as upstream loads it: the high tower is taken from that tower's own folder."""
    model = small(GOLDEN / "full")
    model.load(model.architecture.tensors(open_weights(GOLDEN / "full"), model.towers))
    model.load({name: t for name, t in tower_tensors(model.towers).items() if name.startswith(TOWERS["high"])})
    return model


def base_with_trained_connector() -> Small:
    """A published LoRA run with its adapter left out: plain language model, towers, and what was trained whole."""
    model = small(GOLDEN / "lora", tokenizer=GOLDEN / "base")
    model.load(model.architecture.tensors(open_weights(GOLDEN / "base"), model.towers))
    model.load(tower_tensors(model.towers))
    whole = torch_load(GOLDEN / "lora" / "non_lora_trainables.bin")
    model.load({name.removeprefix("base_model.model."): tensor for name, tensor in whole.items()})
    return model


def with_lora() -> Small:
    """A published LoRA run, its adapter folded in by hand: alpha / r is 32 / 16."""
    model = base_with_trained_connector()
    adapter = {
        n.removeprefix("base_model.model."): t() for n, t in torch_load(GOLDEN / "lora" / "adapter_model.bin").items()
    }
    state = model.model.state_dict()
    for name in [name for name in adapter if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        state[f"{layer}.weight"] += 2.0 * adapter[f"{layer}.lora_B.weight"].float() @ adapter[name].float()
    return model


def imported(source: str, out: Path) -> Assembly:
    """A published folder, saved as a checkpoint in `out`, and opened from there."""
    found = diagnose(GOLDEN / source, LOOKUP, base=GOLDEN / "base", parts=TOWER_FOLDERS)
    import_folder(found, LOOKUP, out, kernels=["sdpa"])
    return open_checkpoint(out, LOOKUP, device="cpu").assembly


def torch_load(file: Path) -> dict[str, LazyTensor]:
    """A pickle of tensors."""
    import torch

    loaded = torch.load(file, weights_only=True)
    return {name: lambda tensor=tensor: tensor for name, tensor in loaded.items()}
