"""transformers' image encoders as towers: what they compute is seen by running them on tensors without content."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, pytorch_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_torchdynamo_compiling

from graftwork.errors import WeightsError

RECORDED = "graftwork-hf-vision"
"""The implementation of attention that computes nothing and remembers how it was called."""
HEADS = ("num_attention_heads", "num_heads")
DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob")
PREFIXES = ("vision_tower.", "vision_model.")
"""How transformers' models of images and text call their image encoder."""


def remembers_nothing() -> bool:
    """Whether what is computed now has no content: then transformers must not keep it for later, as some encoders do with the places
    of patches."""
    return is_torchdynamo_compiling() or torch.get_default_device().type == "meta" or detect_fake_mode() is not None


pytorch_utils.is_torchdynamo_compiling = remembers_nothing  # asked by its cache before it keeps anything


class Tower(nn.Module):
    """An encoder's selected states as maps."""

    def __init__(self, config: Mapping[str, Any], attn_implementation: str) -> None:
        """`config` is what `HfVision.configuration` returned."""
        super().__init__()
        attention = config["attention"]
        own = attention is None or attention["own"]
        self.vision_model = encoder(config["encoder"], "" if own else attn_implementation)
        self.prefix, self.states = config["prefix"], config["states"]
        self.last = ""
        """The layer that gives the selected state, where those after it are not computed."""
        if config["layers"] and self.states and 0 < self.states[0] < config["count"]:
            self.last = f"{config['layers']}.{self.states[0] - 1}"
            layers: Any = self.vision_model.get_submodule(config["layers"])
            layers.__class__, layers.used = FirstLayers, self.states[0]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps `[images, width, rows, columns]`, finest first, from `[images, 3, size, size]`."""
        return [as_map(state, self.prefix) for state in self._states(pixels.to(self.vision_model.dtype))]

    def _states(self, pixels: Tensor) -> list[Tensor]:
        given = resizing(self.vision_model, pixels.shape[-1])
        if self.states is None:
            return [self.vision_model(pixels, **given).last_hidden_state]
        if not self.last:
            states = self.vision_model(pixels, output_hidden_states=True, **given).hidden_states
            return [states[index] for index in self.states]
        found: list[Any] = []
        layer = self.vision_model.get_submodule(self.last)
        hook = layer.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            self.vision_model(pixels, **given)
        finally:
            hook.remove()
        return [hidden(found[0])]


def hidden(output: Any) -> Tensor:
    """What a layer passes on, of what it returns."""
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


class FirstLayers(nn.ModuleList):
    """Layers of which only the first are computed. The others keep their names and their weights."""

    used: int | None = None

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(super().__iter__(), self.used)


def as_map(state: Tensor, prefix: int) -> Tensor:
    """`[images, width, rows, columns]` of a state that is one, or `[images, tokens, width]` whose first tokens are no patches."""
    if state.dim() == 4:
        return state
    side = isqrt(state.shape[1] - prefix)
    return torch.unflatten(state[:, -side * side :].transpose(1, 2), 2, (side, side))


def resizing(model: Any, size: int) -> dict[str, bool]:
    """What an encoder wants to be told where images are not of the size of its position embeddings."""
    trained = getattr(model.config, "image_size", size)
    other = size not in (trained if isinstance(trained, list | tuple) else (trained,))
    return (
        {"interpolate_pos_encoding": True} if other and "interpolate_pos_encoding" in parameters(model.forward) else {}
    )


def parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function."""
    return inspect.signature(function).parameters


def encoder(table: Mapping[str, Any], attn_implementation: str = "") -> Any:
    """transformers' model of a configuration without a pooling head where it can do without; by default with attention of its own."""
    config = AutoConfig.for_model(**json.loads(json.dumps(table)))
    if (kind := MODEL_MAPPING.get(type(config), None)) is None:
        raise WeightsError(
            f"transformers builds no encoder from the configuration of a '{config.model_type}'; name another folder"
        )
    return AutoModel.from_config(
        config,
        attn_implementation=attn_implementation or own_attention(kind),
        dtype=torch.float32,
        **({"add_pooling_layer": False} if "add_pooling_layer" in parameters(kind.__init__) else {}),
    )


def own_attention(kind: Any) -> str:
    """The implementation that transformers itself would choose among those without further packages."""
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


@contextmanager
def without_content(table: Mapping[str, Any], size: int) -> Iterator[Tensor]:
    """While entered, tensors have no content; yields two images. WeightsError where an encoder does not take it."""
    try:
        with torch.device("meta"), torch.no_grad():
            yield torch.empty(2, 3, size, size)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
        raise WeightsError(
            f"transformers' '{table.get('model_type')}' cannot encode a square image of {size} pixels ({reason}); name another encoder "
            "or another size"
        ) from None


@lru_cache(64)
def shapes_of_maps(config: str, size: int) -> tuple[tuple[int, int, int], ...]:
    """Width, rows and columns of each map of a tower, whose configuration is JSON here."""
    table = json.loads(config)
    with without_content(table["encoder"], size) as images:
        maps = Tower(table, "").eval()(images)
    return tuple((each.shape[1], each.shape[2], each.shape[3]) for each in maps)


def observed(table: Mapping[str, Any], size: int, layer: int | None) -> dict[str, Any]:
    """What an encoder of this configuration does with an image: `prefix`, the number of its tokens before those of patches; `states`,
    the hidden states that are selected, None for its output; `layers`, where its layers are, if each gives one of its `count` states;
    and its `attention`, None where there is none."""
    calls: list[tuple[Any, ...]] = []

    def remember(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any
    ) -> tuple[Tensor, None]:
        plain = mask is None and not module.is_causal and query.shape == key.shape == value.shape
        odd = [
            each
            for name, each in others.items()
            if isinstance(each, Tensor) or (name in ("sliding_window", "softcap") and each)
        ]
        calls.append((plain and not odd, query.shape[1], query.shape[3]))
        return torch.empty(*query.shape[:3], value.shape[3]).transpose(1, 2), None

    AttentionInterface.register(RECORDED, remember)
    AttentionMaskInterface.register(RECORDED, lambda *args, attention_mask=None, **others: attention_mask)
    kind: Any = MODEL_MAPPING.get(type(AutoConfig.for_model(**json.loads(json.dumps(table)))), None)
    with without_content(table, size) as images:
        model = encoder(table, RECORDED if getattr(kind, "_supports_attention_backend", False) else "").eval()
        grid, layers, outputs = first_grid(model), list_of_layers(model), list[Any]()
        for each in model.get_submodule(layers) if layers else ():
            each.register_forward_hook(lambda module, args, output: outputs.append(hidden(output)))
        states = list(model(images, output_hidden_states=True, **resizing(model, size)).hidden_states)
        if any(len(state) != len(images) for state in states):
            raise ValueError("it joins several images to one row")
    tokens = states[0].shape[1] if states[0].dim() == 3 else 0
    prefix = max(tokens - (grid[0] if grid else isqrt(tokens) ** 2), 0)
    # Nothing comes between a layer and the state that counts it, and what comes after the layers takes any of them.
    steps = len(outputs) == len(states) - 1 and all(a is b for a, b in zip(outputs[:-1], states[1:], strict=False))
    steps &= len({state.shape for state in states}) == 1
    return {
        "prefix": prefix,
        "states": selected(states, prefix, size, layer),
        "layers": layers if steps else "",
        "count": len(states) - 1,
        "attention": attention(table, calls, own_attention(kind)),
    }


def list_of_layers(model: nn.Module) -> str:
    """The name of the one list of an encoder's layers; empty where there are several lists, or none."""
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    return lists[0] if len(lists) == 1 else ""


def first_grid(model: nn.Module) -> list[int]:
    """A list that will hold, once the model runs, how many places the first convolution over an image makes of it."""
    found: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda layer, args, output: found.append(output.shape[-2] * output.shape[-1]))
    return found


def selected(states: list[Tensor], prefix: int, size: int, layer: int | None) -> list[int] | None:
    """The hidden states to take: the one of a layer, or of each resolution the last where there are several; None for the output."""
    if layer is not None:
        if not -len(states) <= layer < len(states):
            raise WeightsError(
                f"select_layer is {layer}, and the encoder has {len(states) - 1} layers; name one of them"
            )
        return [layer % len(states)]
    sides = [as_map(state, prefix).shape[-1] for state in states]
    # Some begin with the image itself.
    last = {side: index for index, side in enumerate(sides) if side < size}
    return [last[side] for side in sorted(last, reverse=True)] if len(last) > 1 else None


def attention(table: Mapping[str, Any], calls: list[tuple[Any, ...]], own: str) -> dict[str, Any] | None:
    """The encoder's attention: its heads, and whose it is and why where Graftwork's kernels do not compute it."""
    if not calls and not any(table.get(key) for key in HEADS):
        return None
    why = "" if calls else "it is computed where no other kernel can take its place"
    why = why or ("" if all(plain for plain, _, _ in calls) else "it has masks or keys of its own")
    why = why or ("" if len(set(calls)) == 1 else "its layers have heads of different sizes")
    _, heads, head_dim = calls[0] if calls else (False, 0, 0)
    dropout = next((value for key in DROPOUTS if (value := table.get(key))), 0.0)
    whose = f"transformers' {own}" if why else ""
    return {"heads": heads, "head_dim": head_dim, "dropout": dropout, "own": whose, "why": why}


class Names:
    """The names of an encoder's tensors, in files and as built."""

    def __init__(self, model: Any) -> None:
        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.prefixes = (*PREFIXES, f"{model.base_model_prefix}.")
        # Names alone: whoever holds the tensors keeps whole what a strategy shares out among processes.
        self.known = {*dict(model.named_buffers()), *model.state_dict()}
        self.children = {name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}

    def built(self, name: str) -> str | None:
        """The built encoder's name of a tensor in a file; None where it has none."""
        return next((found for found in self._renamed(name) if found in self.known), None)

    def are_beside(self, name: str) -> bool:
        """Whether a tensor in a file lies where the encoder has nothing at all."""
        return not any(found.split(".")[0] in self.children for found in self._renamed(name))

    def _renamed(self, name: str) -> Iterator[str]:
        """The name as transformers renames it, and without what larger models put before it."""
        bare = name
        for prefix in self.prefixes:
            bare = bare.removeprefix(prefix)
        for each in (name, bare):
            yield rename_source_key(each, self.renamings, [])[0]
