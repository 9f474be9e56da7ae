"""LoRA and its relatives, through the peft library."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graftwork import Requires, hookimpl, setting
from graftwork.contracts import PeftMethod
from graftwork.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

    from graftwork.contracts import Adapter, ExternalFolder, Reference

ADAPTER = "default"
START = "start"


@dataclass(frozen=True)
class LoraSettings:
    """How large the low-rank matrices are, how they start, and how they learn."""

    rank: int = setting(16, "The rank of the update", minimum=1)
    alpha: float = setting(32.0, "The update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))", minimum=0.0)
    dropout: float = setting(0.0, "Dropout on the adapter's input", minimum=0.0, maximum=0.99)
    use_rslora: bool = setting(False, "Rank-stabilised scaling (arXiv:2312.03732)")
    use_dora: bool = setting(False, "Weight-decomposed adaptation (arXiv:2402.09353)")
    init: Literal["default", "pissa"] = setting(
        "default", "'pissa' starts from the principal components (arXiv:2404.02948)"
    )
    target_modules: tuple[str, ...] = setting(
        (), "Of the roles' linear layers only those whose names end so, such as q_proj; by default all"
    )
    rank_pattern: dict[str, int] = setting(
        {}, "Other ranks for some layers, by how their names end or by a regular expression for it", minimum=1
    )
    alpha_pattern: dict[str, float] = setting({}, "Other alphas for some layers, named in the same way", minimum=0.0)
    plus_ratio: float = setting(1.0, "LoRA+: B learns this many times faster than A (arXiv:2402.12354)", minimum=0.0)

    def __post_init__(self) -> None:
        if self.use_dora and self.init == "pissa":
            raise ValueError("use_dora and init = 'pissa' cannot be combined; choose one")
        if self.init == "pissa" and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                "init = 'pissa' has one rank and one alpha for all layers; remove rank_pattern and alpha_pattern"
            )


class Lora(PeftMethod[LoraSettings]):
    """Low-rank adaptation (arXiv:2106.09685), with DoRA, rsLoRA, PiSSA and LoRA+ as settings.

    PiSSA is kept as a difference: next to the trained matrices lie the frozen ones it started from, with the opposite
    sign. So the base weights stay what they are, and a fresh adapter changes nothing.
    """

    name = "lora"
    requires = Requires(packages=("peft>=0.19",))
    Settings = LoraSettings
    learning_settings = ("dropout", "plus_ratio")

    def inject(self, model: nn.Module, targets: Sequence[str], *, fresh: bool) -> None:
        # peft imports bitsandbytes where it is installed, which warns that an optional package is missing.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        from peft import inject_adapter_in_model

        linears = [name for name in targets if type(model.get_submodule(name)).__name__ == "Linear"]
        if not linears:
            raise AdapterError("'lora' adapts linear layers, and the chosen roles have none; choose other roles")
        if ends := self.settings.target_modules:
            if unknown := [end for end in ends if not any(ends_in(name, end) for name in linears)]:
                raise AdapterError(
                    f"target_modules of 'lora' names '{unknown[0]}', and no linear layer of the chosen roles ends so; they end in "
                    f"{', '.join(sorted({name.rpartition('.')[2] for name in linears}))}"
                )
            linears = [name for name in linears if any(ends_in(name, end) for end in ends)]
        pissa = self.settings.init == "pissa"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # PiSSA means to have two adapters.
            for adapter in [ADAPTER, START] if pissa else [ADAPTER]:
                inject_adapter_in_model(self.config(linears), model, adapter_name=adapter, state_dict=None)
        for layer in _layers(model):
            if pissa:
                layer.set_adapter([ADAPTER, START])
                for matrices in (layer.lora_A, layer.lora_B):
                    matrices.float()  # what is trained will be, and the other must cancel it
            # Autocast casts what enters the matrices; DoRA takes its norms in the precision that its input has.
            layer.cast_input_dtype_enabled = self.settings.use_dora
            for name, parameter in layer.named_parameters():
                # peft unfreezes every active adapter; what PiSSA started from is to stay.
                parameter.requires_grad_(f".{ADAPTER}" in f".{name}" and "base_layer" not in name)

    def initialise_from_base(self, module: nn.Module) -> None:
        for layer in _layers(module):
            if self.settings.init == "pissa":
                _start_from_principal_components(layer, self.settings.rank)
            if self.settings.use_dora:
                _measure_magnitudes(layer)

    def config(self, linears: Sequence[str]) -> Any:
        """peft's configuration of an adapter on these layers."""
        from peft import LoraConfig

        s = self.settings
        return LoraConfig(
            r=s.rank,
            lora_alpha=s.alpha,
            lora_dropout=s.dropout,
            use_rslora=s.use_rslora,
            use_dora=s.use_dora,
            target_modules=list(linears),
            rank_pattern=dict(s.rank_pattern),
            alpha_pattern=dict(s.alpha_pattern),
        )

    @contextmanager
    def disable_adapter(self, model: nn.Module) -> Iterator[None]:
        layers = list(_layers(model))
        trained = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for layer in layers:
                layer.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)

    def merge(self, model: nn.Module) -> None:
        for name, layer in [(n, m) for n, m in model.named_modules() if is_layer(m)]:
            layer.merge(safe_merge=True)
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, layer.get_base_layer())

    def param_groups(self, parameters: Mapping[str, nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
        if self.settings.plus_ratio == 1.0:
            return super().param_groups(parameters, learning_rate)
        fast = [p for name, p in parameters.items() if ".lora_B." in name]
        slow = [p for name, p in parameters.items() if ".lora_B." not in name]
        return [{"params": slow, "lr": learning_rate}, {"params": fast, "lr": learning_rate * self.settings.plus_ratio}]

    def exports(self) -> Mapping[str, Any]:
        from graftwork_lora.export import write

        return {"peft": partial(write, self)}

    def import_from(self, folder: ExternalFolder) -> Adapter | None:
        """The LoRA adapter that peft, or code that uses it, saved in a folder."""
        from graftwork_lora.peft_folders import read

        return read(folder)

    def open_elsewhere(self, reference: Reference, folder: Path, optional: Sequence[str]) -> Reference | None:
        """The adapter as peft opens it."""
        from graftwork_lora.reference import opened_by_peft

        return opened_by_peft(reference, folder, optional)


def ends_in(name: str, end: str) -> bool:
    """Whether a module's dotted name is `end`, or ends in it."""
    return name == end or name.endswith(f".{end}")


def is_layer(module: nn.Module) -> bool:
    """Whether it is a layer that peft adapted."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _layers(model: nn.Module) -> Iterable[Any]:
    return (module for module in model.modules() if is_layer(module))


def _start_from_principal_components(layer: Any, rank: int) -> None:
    """Set both adapters of a layer from the SVD of its weight, so that they cancel."""
    import torch

    scale = layer.scaling[ADAPTER]
    u, s, vh = torch.linalg.svd(layer.get_base_layer().weight.detach().float(), full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    with torch.no_grad():
        for adapter, sign in ((ADAPTER, 1.0), (START, -1.0)):
            layer.lora_A[adapter].weight[: len(root)] = root[:, None] * vh[:rank]
            layer.lora_B[adapter].weight[:, : len(root)] = sign * u[:, :rank] * root


def _measure_magnitudes(layer: Any) -> None:
    """Set DoRA's magnitudes to the norms of the rows of a layer's weight, which the adapter does not change yet."""
    import torch

    weight, magnitudes = layer.get_base_layer().weight.detach(), layer.lora_magnitude_vector[ADAPTER]
    with torch.no_grad():
        magnitudes.weight.copy_(magnitudes.get_weight_norm(weight, weight.new_zeros(()), layer.scaling[ADAPTER]))


@hookimpl
def peft_methods() -> list[type[PeftMethod[Any]]]:
    return [Lora]
