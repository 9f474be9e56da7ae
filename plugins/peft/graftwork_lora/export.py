"""Adapters as plain peft opens them, with the modules that were trained besides."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from graftwork.contracts import named_tensors, within
from graftwork.errors import AdapterError
from graftwork_lora import ADAPTER, START, Lora, is_layer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.contracts import Assembly


def write(method: Lora, assembly: Assembly, folder: Path) -> list[str]:
    """Write a folder that plain peft loads onto the same base: adapter_config.json and adapter_model.safetensors. Returns what peft
    will make of it; AdapterError says what a peft folder could not hold."""
    model = assembly.model
    layers = {name: layer for name, layer in model.named_modules() if is_layer(layer)}
    config = method.config(list(layers))
    tensors = principal(config, layers) if method.settings.init == "pissa" else own(model)
    besides = {name: tensor for name, tensor in assembly.state_to_save().items() if "lora_" not in name}
    if besides:
        config.modules_to_save = whole_modules(model, besides)
        # What is tied to a copy follows it only if the settings say so, and peft wants to read it all the same.
        tied = {name: besides[to].clone() for name, to in assembly.structure.tied_weights.items() if to in besides}
        config.ensure_weight_tying = bool(tied)
        besides |= tied
    if weights := assembly.plan.model_spec.model.weights:
        name, _, _ = weights.given.partition("@")
        config.base_model_name_or_path = name if weights.commit else weights.path
        config.revision = weights.commit or None
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(
        {f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in (tensors | besides).items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return [*notes(assembly, layers)]


def own(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors, by peft's names."""
    found: dict[str, Tensor] = get_peft_model_state_dict(
        model,
        state_dict={name: tensor for name, tensor in named_tensors(model).items() if "lora_" in name},
        adapter_name=ADAPTER,
        save_embedding_layers=False,  # peft would ask the hub for the base, to compare vocabularies
    )
    return found


def principal(config: Any, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """PiSSA's difference of two products of rank r as one product of rank 2r, and the settings changed so."""
    tensors = {}
    for name, layer in layers.items():
        a = [layer.lora_A[adapter].weight for adapter in (ADAPTER, START)]
        b = [layer.lora_B[adapter].weight for adapter in (ADAPTER, START)]
        tensors[f"{name}.lora_A.weight"] = torch.cat(a, dim=0)
        tensors[f"{name}.lora_B.weight"] = torch.cat(b, dim=1)
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    return tensors


def whole_modules(model: nn.Module, besides: Collection[str]) -> list[str]:
    """The modules that hold these tensors and nothing else, which peft keeps as copies; AdapterError where there is none for some."""
    owner_of = {name: name.rpartition(".")[0] for name in besides}
    owners, held = sorted({*owner_of.values()}), named_tensors(model)
    unfit = {o for o in owners if o.endswith(".base_layer") or any(within(n, [o]) and n not in besides for n in held)}
    if lost := [name for name in besides if owner_of[name] in unfit]:
        raise AdapterError(
            f"a peft folder holds an adapter, and copies of whole modules without one; {len(lost)} of the {len(besides)} tensors that "
            "this checkpoint holds besides its adapter are no such modules, and would be lost: merge it instead",
            lost[:5],
        )
    return [owner for owner in owners if not within(owner, [other for other in owners if other != owner])]


def notes(assembly: Assembly, layers: Collection[str]) -> Iterator[str]:
    """Of which layers another program's model has other names: a vision tower of Graftwork's is published under others."""
    if vision := [name for name in layers if within(name, assembly.tower_modules)]:
        yield (
            f"{len(vision)} of its {len(layers)} layers lie in vision towers, under their names in Graftwork's model: peft finds them "
            "there, and not in another program's"
        )
