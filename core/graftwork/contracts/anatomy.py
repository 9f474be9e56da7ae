"""What models and towers are made of, known without weights: sites of attention, maps, parts, roles and blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionSite:
    """A place in a model where attention is computed, known without weights."""

    name: str
    """`language`, `mining`, or `vision.PART`."""
    head_dim: int
    heads: int
    kv_heads: int
    causal: bool
    padding: bool
    """Whether some keys can be padding."""
    dropout: float = 0.0
    window: int | None = None
    """A sliding window: a query sees the keys that lie nearer to it than this, its own included; None where it sees all."""
    softcap: float | None = None
    """Scores are bent to `softcap * tanh(score / softcap)`; None where they are not."""
    mask: bool = False
    """Whether the model says itself which keys a query sees, with the tensors: where the tokens of an image see one another, where only
    some layers have a window."""
    segments: bool = False
    """Whether a row may hold several records, whose tokens see those of their own record alone (packing)."""
    own: str = ""
    """Where the model's own attention computes the site and no kernel is bound: whose it is, such as `transformers' sdpa`."""
    why_own: str = ""
    """Why no kernel is bound, as a clause."""


@dataclass(frozen=True)
class AttentionCase:
    """A site on a machine: what a kernel must be able to compute."""

    site: AttentionSite
    dtype: str
    """`float32`, `bfloat16` or `float16`."""
    device: str
    """`cpu` or `cuda`."""
    capability: tuple[int, int] | None = None
    """The CUDA compute capability of the device; None on a CPU."""
    backward: bool = True


@dataclass(frozen=True)
class PixelSettings:
    """How an image becomes a tensor: the side of the square in pixels, and the mean and deviation of each channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 3
    """The filter by which images are scaled, as Pillow numbers them; 3 is bicubic."""


@dataclass(frozen=True)
class TowerOutput:
    """What a tower computes, known without weights: a pyramid of feature maps, finest first."""

    widths: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of each map."""
    pixels: PixelSettings


@dataclass(frozen=True)
class TowerSlot:
    """A slot of a model for a vision tower."""

    summary: str
    default: str | None
    """The component to use when the run does not say; with None the slot then stays empty."""
    optional: bool = False
    """Whether a run may leave the slot empty although it has a default."""


@dataclass(frozen=True)
class BuildContext:
    """Where building happens: what a model or tower needs from its surroundings."""

    attn_implementation: str = "eager"
    """The name to give transformers' models, under which Graftwork's kernels are registered."""
    windowed_attn_implementation: str = ""
    """The name to give instead, once they are built, to image encoders of transformers whose attention takes `cu_seqlens`, so that all of their windows
    are computed together; empty where there is none."""


@dataclass(frozen=True)
class Structure:
    """A built model and a map of it."""

    model: nn.Module
    roles: Mapping[str, tuple[str, ...]]
    """Role to the names of its modules, each of which stands for everything below it, or of single parameters that lie in a module
    of no role."""
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`language`, `vision.PART`: the names of the repeated blocks, in order. `mining`: what joins the maps of several
    towers, a module whose forward takes tensors, or lists of them, and whose inputs and output all count images in their
    first dimension."""
    attention_modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Attention site, as `sites` names it (towers as `vision.PART`), to the modules at or below which it is computed;
    the empty name is the model itself. Where two overlap, the one that is listed later wins."""
    image_encoder: tuple[str, ...] = ("",)
    """The modules, or single parameters, that `encode_images` uses; the empty name, the whole model, is always right. Where nothing in them is
    trained, an image is encoded once for the base and the adapter."""
    tied_weights: Mapping[str, str] = field(default_factory=dict)
    """Names that weights may hold although the built model has no such tensor, to the tensor, or the computed buffer, that they
    must equal."""
    untied: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the built model that are tied in its base, to those whose values they have there."""
    without_effect: tuple[str, ...] = ()
    """Parameters on which no output depends, whatever they are, such as the bias of a key that a softmax ignores: nobody is warned that
    they do not learn."""


def positions_of(config: Mapping[str, Any]) -> int | None:
    """How many positions Hugging Face's configuration of a language model allows, rotary ones as far as they are stretched; None
    when it does not say. Of a model of several parts, the part that is called after text counts, and then any."""
    nested = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    tables = [
        config,
        *(nested[key] for key in sorted(nested, key=lambda key: "text" not in key and "language" not in key)),
    ]
    table = next((table for table in tables if table.get("max_position_embeddings")), None)
    if table is None:
        return None
    positions: int = table["max_position_embeddings"]
    rotary = table.get("rope_scaling") or table.get("rope_parameters") or {}
    stretched = rotary.get("factor", 1.0) * rotary.get("original_max_position_embeddings", positions)
    return max(positions, int(stretched))


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter (tied ones once) and every persistent buffer of a model, by name."""
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def earlier_names(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, str]:
    """The name now to the name `before`, for each tensor of the model that was there before under whatever name.

    A tensor is the same one if it is the same object: PEFT methods move modules, and leave the base's tensors alone.
    """
    known = {id(tensor): name for name, tensor in before.items()}
    return {name: known[id(tensor)] for name, tensor in named_tensors(model).items() if id(tensor) in known}


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether a name is one of `modules`, or lies in one; the empty name is the whole model."""
    return any(not module or name == module or name.startswith(f"{module}.") for module in modules)


def modules_of(roles: Mapping[str, tuple[str, ...]], wanted: Sequence[str]) -> list[str]:
    """What the wanted roles name, where `language` means every `language.*`."""
    return [
        module
        for role, modules in roles.items()
        if any(role == name or role.startswith(f"{name}.") for name in wanted)
        for module in modules
    ]
