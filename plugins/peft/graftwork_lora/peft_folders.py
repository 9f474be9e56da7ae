"""Adapters as peft saves them: what was trained, by the names of the model that was adapted, and what is understood of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftwork.contracts import Adapter, ExternalFolder, Rows, broken, unknown_settings
from graftwork_lora import ADAPTER, ends_in

if TYPE_CHECKING:
    from torch import nn

    from graftwork.weights import LazyTensor

FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Where peft saves an adapter's tensors, the newer form first."""
CONFIG = "adapter_config.json"
OWN = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.\w+)?(\.weight)?")
"""A tensor of an adapter: the adapted module, and which of its matrices."""
ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(\.\w+)?")
"""The new values of some rows of a module's weight."""
WRAPPED = re.compile(r"\.(modules_to_save(\.[A-Za-z_]\w*(?=\.))?|base_layer)(?=\.)")
"""What peft puts between a module's name and those of its tensors."""
UNDERSTOOD = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "bias", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("base_model_name_or_path", "revision"),
    }
)
"""Settings of peft's that are read here. What the tensors' names say themselves, which modules are adapted, needs no reading."""
WITHOUT_EFFECT = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "inference_mode", "peft_version"),
        *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),  # how `init_lora_weights` is carried out
    }
)
"""Settings that change nothing of what a trained adapter computes."""
REASONS = {
    "target_parameters": "it adapts parameters of modules that are no linear layers",
    "lora_bias": "its updates have biases of their own",
}
"""What settings mean that 'lora' does not have."""
STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that matter only before the first step."""
MOVED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Beginnings of those that change the base's own weights, which an adapter's folder does not hold."""


def read(folder: ExternalFolder) -> Adapter | None:
    """The adapter in a folder; None where there is none of LoRA's."""
    file = next((name for name in FILES if name in folder.files), None)
    config = folder.json(CONFIG)
    if config.get("peft_type", "LORA" if file else "") != "LORA":
        return None
    tensors, both = folder.tensors(file) if file else {}, folder.files.issuperset(FILES)

    def adapter(name_of: Callable[[str], str]) -> Adapter:
        return replace(Reading(config, tensors, name_of).adapter(both=both), renamed=adapter)

    return adapter(str)


def plain(name: str) -> str:
    """A tensor's name in the model that was adapted, from the one that peft, or DeepSpeed around it, gives it."""
    return WRAPPED.sub("", name.removeprefix("module.").removeprefix("base_model.model."))


class Reading:
    """An adapter's settings and its tensors, by peft's names."""

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], name_of: Callable[[str], str]
    ) -> None:
        self.config, self.name_of = config, name_of
        self.own: dict[str, LazyTensor] = {}
        self.layers: dict[str, dict[str, LazyTensor]] = {}
        """The adapted modules, and the matrices of each."""
        self.rows: dict[str, Rows] = {}
        self.others: dict[str, LazyTensor] = {}
        for name, tensor in tensors.items():
            whole = plain(name)
            if found := OWN.fullmatch(whole):
                module = name_of(found[1])
                self.own[f"{module}.{found[2]}.{ADAPTER}.weight"] = tensor
                self.layers.setdefault(module, {})[found[2]] = tensor
            elif (found := ROWS.fullmatch(whole)) and (indices := self.indices(found[1])):
                self.rows[f"{found[1]}.weight"] = Rows(indices, tensor)
            else:
                self.others[whole if whole not in self.others else name] = tensor

    def number(self, key: str, default: int) -> Any:
        """A setting that is a number; peft's default where the file is silent or says null, and 0 where it says 0."""
        found = self.config.get(key)
        return default if found is None else found

    def indices(self, module: str) -> tuple[int, ...]:
        """Which rows of a module's weight were trained; none where the settings do not say."""
        given = self.config.get("trainable_token_indices") or ()
        if isinstance(given, Mapping):
            given = next((rows for end, rows in given.items() if ends_in(module, end)), ())
        return tuple(given)

    def adapter(self, *, both: bool) -> Adapter:
        """What is in it, and what is wrong with it."""
        config, kinds = self.config, sorted({module.rpartition(".")[2] for module in self.layers})
        scaled = f"rank {self.number('r', 8)}, alpha {self.number('lora_alpha', 8):g}, dropout {self.number('lora_dropout', 0):g}"
        named = [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(key)]
        varied = " and others" * bool(config.get("rank_pattern") or config.get("alpha_pattern"))
        return Adapter(
            description=f"{' and '.join(named) or 'LoRA'} of {scaled}{varied}, on {len(self.layers)} linear layers ({', '.join(kinds)})",
            settings=self.settings,
            tensors=self.own,
            modules=frozenset(self.layers),
            others=self.others,
            rows=self.rows,
            apart=frozenset(self.apart()),
            base=config.get("base_model_name_or_path") or "",
            revision=config.get("revision") or "",
            inconsistent=("it has an adapter_model.bin as well, which peft does not read beside safetensors",) * both,
            refused=self.refusal(),
        )

    def apart(self) -> Iterator[str]:
        """The tensors that were trained as copies of the model's own, so that nothing tied to these followed."""
        if not self.config.get("ensure_weight_tying"):
            for end in self.config.get("modules_to_save") or ():
                for module, _, leaf in (name.rpartition(".") for name in self.others if f".{end}." in f".{name}"):
                    yield f"{self.name_of(module)}.{leaf}"

    def settings(self, offered: Mapping[str, nn.Module]) -> dict[str, Any]:
        """This method's settings; the layers are named by how they end where that tells them apart, else in full."""
        targets = [name for name, module in offered.items() if type(module).__name__ == "Linear"]
        config, ends = self.config, sorted({module.rpartition(".")[2] for module in self.layers})
        chosen = {name for name in targets if any(ends_in(name, end) for end in ends)}
        narrowed = (
            () if set(targets) == set(self.layers) else ends if chosen == set(self.layers) else sorted(self.layers)
        )
        return {
            "rank": self.number("r", 8),
            "alpha": float(self.number("lora_alpha", 8)),
            "dropout": float(self.number("lora_dropout", 0)),
            "use_rslora": bool(config.get("use_rslora")),
            "use_dora": bool(config.get("use_dora")),
            "target_modules": [*narrowed],
            "rank_pattern": dict(config.get("rank_pattern") or {}),
            "alpha_pattern": {key: float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()},
        }

    def refusal(self) -> str:
        """Why it cannot be used, and what would help; empty when it can."""
        if not self.config:
            return (
                "it has no adapter_config.json, which says how the adapter is scaled; copy it from where it was trained"
            )
        if not self.own:
            return "it holds no tensors of an adapter (adapter_model.safetensors or .bin); copy them from where it was trained"
        return self.misunderstood() or broken(self.own) or self.incomplete()

    def misunderstood(self) -> str:
        """Which of its settings cannot be followed; empty where all can."""
        config = self.config
        if str(start := config.get("init_lora_weights", True)).startswith(MOVED_BASE):
            return f"it was started by '{start}', which changed the base's own weights, and it does not hold those; train again"
        if odd := unknown_settings(config, UNDERSTOOD | WITHOUT_EFFECT, defaults_of_peft):
            said = "; ".join(f"{key}: {REASONS[key]}" for key in odd if key in REASONS)
            return (
                f"its adapter_config.json sets {', '.join(odd)}, which 'lora' does not have{f' ({said})' if said else ''}; merge it with "
                "peft, and train from that"
            )
        if start not in STARTS:
            return f"its adapter_config.json sets init_lora_weights to '{start}', which 'lora' does not know; merge it with peft, and train from that"
        if (bias := config.get("bias", "none")) not in ("none", "all", "lora_only"):
            return f"its adapter_config.json sets bias to '{bias}', which 'lora' does not know; merge it with peft, and train from that"
        return ""

    def incomplete(self) -> str:
        """What its settings promise and its tensors lack; empty where they fit."""
        config = self.config
        needed = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if config.get("use_dora") else [])}
        if partial := [module for module, matrices in self.layers.items() if matrices.keys() != needed]:
            return f"{len(partial)} of its layers do not have {', '.join(sorted(needed))} alone, such as '{partial[0]}'; restore it"
        for module, matrices in self.layers.items():
            rank, said = matrices["lora_A"]().shape[0], self.rank(module)
            if rank != said:
                return f"its matrices have rank {rank}, and adapter_config.json says {said}; restore it"
        if config.get("trainable_token_indices") and not self.rows:
            return (
                "its adapter_config.json sets trainable_token_indices, and it holds no rows of embeddings; restore it"
            )
        if lost := [
            end for end in config.get("modules_to_save") or () if not any(f".{end}." in f".{n}" for n in self.others)
        ]:
            return f"its adapter_config.json sets modules_to_save to {', '.join(lost)}, and it holds no tensor of that; restore it"
        changes = any(m["lora_A"]().any() and m["lora_B"]().any() for m in self.layers.values())
        if not changes and not config.get("use_dora") and not self.others and not self.rows:
            return "its adapter is all zero, so it changes nothing: use its base, or train again"
        return ""

    def rank(self, module: str) -> int:
        """The rank that a layer has by the settings."""
        from peft.utils.other import get_pattern_key

        pattern = self.config.get("rank_pattern") or {}
        rank: int = pattern.get(get_pattern_key(pattern.keys(), module), self.number("r", 8))
        return rank


def defaults_of_peft() -> Mapping[str, Any]:
    """The settings of the installed peft's LoRA where a file is silent."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns of what is missing
    from peft import LoraConfig

    defaults: Mapping[str, Any] = LoraConfig().to_dict()
    return defaults
