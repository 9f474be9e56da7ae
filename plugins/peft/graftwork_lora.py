"""LoRA and its relatives, through the peft library."""

from __future__ import annotations

import logging
import re
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

    from graftwork.contracts import Adapter, Assembly, ExternalFolder
    from graftwork.weights import LazyTensor

ADAPTER = "default"
START = "start"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Where peft saves an adapter's tensors, the newer form first."""
OWN = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.\w+)?(\.weight)?")
"""A tensor of an adapter: the adapted module, and which of its matrices."""
UNREADABLE = (
    *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication", "target_parameters", "lora_bias"),
    *("use_qalora", "alora_invocation_tokens", "arrow_config"),
)
"""Settings of peft's that give an adapter's tensors another meaning, where they are not empty."""
MOVED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Beginnings of peft's `init_lora_weights` that change the base's own weights, which an adapter's folder does not hold."""


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
    plus_ratio: float = setting(1.0, "LoRA+: B learns this many times faster than A (arXiv:2402.12354)", minimum=0.0)

    def __post_init__(self) -> None:
        if self.use_dora and self.init == "pissa":
            raise ValueError("use_dora and init = 'pissa' cannot be combined; choose one")


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
                inject_adapter_in_model(self._config(linears), model, adapter_name=adapter, state_dict=None)
        for layer in _layers(model):
            if pissa:
                layer.set_adapter([ADAPTER, START])
                for matrices in (layer.lora_A, layer.lora_B):
                    matrices.float()  # what is trained will be, and the other must cancel it
            for name, parameter in layer.named_parameters():
                # peft unfreezes every active adapter; what PiSSA started from is to stay.
                parameter.requires_grad_(f".{ADAPTER}" in f".{name}" and "base_layer" not in name)

    def initialise_from_base(self, module: nn.Module) -> None:
        for layer in _layers(module):
            if self.settings.init == "pissa":
                _start_from_principal_components(layer, self.settings.rank)
            if self.settings.use_dora:
                _measure_magnitudes(layer)

    def _config(self, linears: Sequence[str]) -> Any:
        from peft import LoraConfig

        s = self.settings
        return LoraConfig(
            r=s.rank,
            lora_alpha=s.alpha,
            lora_dropout=s.dropout,
            use_rslora=s.use_rslora,
            use_dora=s.use_dora,
            target_modules=list(linears),
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
        for name, layer in [(n, m) for n, m in model.named_modules() if _is_layer(m)]:
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
        return {"peft": partial(_export, self)}

    def import_from(self, folder: ExternalFolder) -> Adapter | None:
        """The LoRA adapter that peft, or code that uses it, saved in a folder."""
        file = next((name for name in FILES if name in folder.files), None)
        config = folder.json("adapter_config.json")
        if config.get("peft_type", "LORA" if file else "") != "LORA":
            return None
        return _Reading(config, folder.tensors(file) if file else {}).adapter(both=folder.files.issuperset(FILES))


def ends_in(name: str, end: str) -> bool:
    """Whether a module's dotted name is `end`, or ends in it."""
    return name == end or name.endswith(f".{end}")


def _is_layer(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _layers(model: nn.Module) -> Iterable[Any]:
    return (module for module in model.modules() if _is_layer(module))


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


def _export(method: Lora, assembly: Assembly, folder: Path) -> None:
    """Write a folder that plain peft loads onto the same base: adapter_config.json and adapter_model.safetensors."""
    import torch
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    if others := [name for name in assembly.state_to_save() if "lora_" not in name]:
        raise AdapterError(
            f"a peft folder holds an adapter alone, and this checkpoint holds {len(others)} tensors besides it; merge it "
            "instead",
            others[:5],
        )
    model = assembly.model
    layers = {name: layer for name, layer in model.named_modules() if _is_layer(layer)}
    config = method._config(list(layers))
    if method.settings.init == "pissa":
        # The difference of two products of rank r is one product of rank 2r.
        tensors = {}
        for name, layer in layers.items():
            a = [layer.lora_A[adapter].weight for adapter in (ADAPTER, START)]
            b = [layer.lora_B[adapter].weight for adapter in (ADAPTER, START)]
            tensors[f"{name}.lora_A.weight"] = torch.cat(a, dim=0)
            tensors[f"{name}.lora_B.weight"] = torch.cat(b, dim=1)
        config.r *= 2
        config.lora_alpha *= 2**0.5 if method.settings.use_rslora else 2
    else:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tensors = get_peft_model_state_dict(
            model, state_dict={n: t for n, t in named.items() if "lora_" in n}, adapter_name=ADAPTER
        )
    weights = assembly.plan.model_spec.model.weights
    config.base_model_name_or_path = weights.path if weights else None
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(
        {f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


class _Reading:
    """An adapter as peft saves it."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> None:
        self.config = config
        self.own: dict[str, LazyTensor] = {}
        self.others: dict[str, LazyTensor] = {}
        self.layers: dict[str, dict[str, LazyTensor]] = {}
        for name, read in tensors.items():
            if found := OWN.fullmatch(name.removeprefix("module.").removeprefix("base_model.model.")):
                self.own[f"{found[1]}.{found[2]}.{ADAPTER}.weight"] = read
                self.layers.setdefault(found[1], {})[found[2]] = read
            else:
                self.others[name] = read

    def adapter(self, *, both: bool) -> Adapter:
        """What is in it, and what is wrong with it."""
        from graftwork.contracts import Adapter

        config, kinds = self.config, sorted({module.rpartition(".")[2] for module in self.layers})
        scaled = f"rank {config.get('r', 8)}, alpha {config.get('lora_alpha', 8):g}, dropout {config.get('lora_dropout', 0):g}"
        named = [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(key)]
        return Adapter(
            description=f"{' and '.join(named) or 'LoRA'} of {scaled}, on {len(self.layers)} linear layers ({', '.join(kinds)})",
            settings=self.settings,
            tensors=self.own,
            modules=frozenset(self.layers),
            others=self.others,
            base=config.get("base_model_name_or_path") or "",
            revision=config.get("revision") or "",
            inconsistent=("it has an adapter_model.bin as well, which peft does not read beside safetensors",) * both,
            refused=self.refusal(),
        )

    def settings(self, offered: Mapping[str, nn.Module]) -> dict[str, Any]:
        """This method's settings; the layers are named by how they end where that tells them apart, else in full."""
        targets = [name for name, module in offered.items() if module.get_parameter("weight").dim() == 2]
        config, ends = self.config, sorted({module.rpartition(".")[2] for module in self.layers})
        chosen = {name for name in targets if any(ends_in(name, end) for end in ends)}
        narrowed = (
            () if set(targets) == set(self.layers) else ends if chosen == set(self.layers) else sorted(self.layers)
        )
        return {
            "rank": config.get("r", 8),
            "alpha": float(config.get("lora_alpha", 8)),
            "dropout": float(config.get("lora_dropout", 0.0)),
            "use_rslora": bool(config.get("use_rslora")),
            "use_dora": bool(config.get("use_dora")),
            "target_modules": [*narrowed],
        }

    def refusal(self) -> str:
        """Why it cannot be used, and what would help; empty when it can."""
        from graftwork.contracts import broken

        config, count = self.config, len(self.own)
        if not config:
            return (
                "it has no adapter_config.json, which says how the adapter is scaled; copy it from where it was trained"
            )
        if not count:
            return "it holds no tensors of an adapter (adapter_model.safetensors or .bin); copy them from where it was trained"
        if odd := [key for key in UNREADABLE if config.get(key)]:
            return f"its adapter_config.json sets {', '.join(odd)}, which 'lora' does not have; merge it with peft, and train from that"
        if (start := str(config.get("init_lora_weights"))).startswith(MOVED_BASE):
            return f"it was started by '{start}', which changed the base's own weights, and it does not hold those; train again"
        if useless := broken(self.own):
            return useless
        needed = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if config.get("use_dora") else [])}
        if partial := [module for module, matrices in self.layers.items() if matrices.keys() != needed]:
            return f"{len(partial)} of its layers do not have {', '.join(sorted(needed))} alone, such as '{partial[0]}'; restore it"
        ranks = {matrices["lora_A"]().shape[0] for matrices in self.layers.values()}
        if ranks != {config.get("r", 8)}:
            return f"its matrices have rank {min(ranks)}, and adapter_config.json says {config.get('r', 8)}; restore it"
        changes = any(m["lora_A"]().any() and m["lora_B"]().any() for m in self.layers.values())
        if not changes and not config.get("use_dora"):
            return "its adapter is all zero, so it changes nothing: use its base, or train again"
        return ""


@hookimpl
def peft_methods() -> list[type[PeftMethod[Any]]]:
    return [Lora]
