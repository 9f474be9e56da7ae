"""MGM's modules: two vision towers, patch-info mining, connector and language model (Li et al. 2024, arXiv:2403.18814)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from graftwork.attention import packing
from graftwork.contracts import Batch, Structure, TowerOutput
from graftwork_mgm import TOWERS
from graftwork_mgm.backbones import Backbone
from graftwork_mgm.pixels import Images

KEY_BIASES = ("model.vlm_uni_aux_projector.0.bias", "model.vlm_uni_aux_projector.1.bias")
"""What they add to the scores of a window is the same for all its pixels, and the softmax ignores it."""


class VisionLanguage(nn.Module):
    """A language model that reads images (see `graftwork.model.VisionLanguageModel`).

    Everything with weights sits inside the language model, under the names of published weights.
    """

    def __init__(self, language: Any, parts: Sequence[str], images: Images) -> None:
        """`language` is transformers' model without a head, with towers, connector and mining's projections inside."""
        super().__init__()
        self.model = language
        self.mining = Mining(language, images.grid, images.overview)
        self.parts, self.images, self.views = tuple(parts), images, images.views
        self.scale = getattr(language.embed_tokens, "scalar_embed_scale", 1.0)
        """Gemma scales what enters it, images too; where transformers does so in the embedding, images miss it. Asked for now: what
        a PEFT library puts around an embedding does not say."""

    def tower(self, part: str) -> nn.Module:
        """The tower of a part."""
        return self.get_submodule(TOWERS[part])

    def maps(self, pixels: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Every part's maps for all views of the images; autograd keeps nothing of a tower that is not trained."""
        if not pixels:
            return {}
        seen = dict(self.images.parts(pixels))
        return {part: self.tower(part)(seen.pop(part)) for part in self.parts}

    def encode_images(self, pixels: Mapping[str, Tensor]) -> list[dict[str, list[Tensor]]]:
        """For each image every part's maps of its views."""
        maps = self.maps(pixels)
        images = len(maps["low"][0]) // self.views
        of = {part: [torch.unflatten(each, 0, (images, -1)) for each in maps[part]] for part in maps}
        return [{part: [each[image] for each in of[part]] for part in of} for image in range(images)]

    def train(self, mode: bool = True) -> VisionLanguage:
        """Towers that are not trained stay in evaluation mode: their stochastic depth is for their own training."""
        super().train(mode)
        for part in self.parts:
            tower = self.tower(part)
            tower.train(mode and trained(tower))
        return self

    def forward(self, batch: Batch, features: Sequence[Any] | None = None, cache: Any = None) -> Tensor:
        """The final hidden states `[rows, tokens, width]`."""
        embedded = self.model.embed_tokens(batch.input_ids)
        if maps := self.maps(batch.pixels) if features is None else joined(features):
            tokens = (self.image_tokens(maps) * self.scale).to(embedded.dtype)
            embedded = embedded.masked_scatter(batch.image_token_mask.unsqueeze(-1), tokens)
        positions = batch.positions
        if positions is None:
            positions = (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        with packing(batch):
            output = self.model(
                inputs_embeds=embedded,
                attention_mask=batch.attention_mask,
                position_ids=positions[:, -embedded.shape[1] :],
                past_key_values=cache,
                use_cache=cache is not None,
            )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The vocabulary's scores `[..., vocabulary]`."""
        head = getattr(self, "lm_head", None)
        # The head is called, and not its weight taken: what a PEFT method puts around it is to count.
        return head(hidden) if head is not None else functional.linear(hidden, self.model.embed_tokens.weight)

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        return transformers.DynamicCache(config=self.model.config)

    def image_tokens(self, maps: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """`[images, tokens, width of the language model]` from the towers' maps."""
        (low,) = maps["low"]
        low = torch.unflatten(low, 0, (-1, self.views))
        tokens = self.mining(low, maps["high"]) if "high" in maps else low.flatten(3).transpose(2, 3)
        projected: Tensor = self.model.mm_projector(tokens.flatten(1, 2))
        return projected


def joined(images: Sequence[Mapping[str, Sequence[Tensor]]]) -> dict[str, list[Tensor]]:
    """The maps of all images, from those of each."""
    return {
        part: [torch.cat([image[part][level] for image in images]) for level in range(len(images[0][part]))]
        for part in (images[0] if images else ())
    }


CHANNELS = 256
"""How many channels of a map are enlarged at a time."""


def pyramid(maps: Sequence[Tensor]) -> Tensor:
    """All maps at the finest one's resolution, joined along the width."""
    size = list(maps[0].shape[-2:])
    if any(each.requires_grad for each in maps):
        return torch.cat([maps[0], *(scaled(coarse, size) for coarse in maps[1:])], dim=1)
    # Some channels at a time, so that little is in memory twice.
    dtype, widths = reduce(torch.promote_types, (each.dtype for each in maps)), [each.shape[1] for each in maps]
    joined = maps[0].new_empty((len(maps[0]), sum(widths), *size), dtype=dtype)
    for into, each in zip(torch.split(joined, widths, 1), maps, strict=True):
        parts = (torch.split(tensor, CHANNELS, 1) for tensor in (into, each))
        for place, channels in zip(*parts, strict=True):
            place.copy_(channels if each is maps[0] else scaled(channels, size))
    return joined


def scaled(maps: Tensor, size: list[int]) -> Tensor:
    """`[…, *size]`, bilinearly and in fp32 whatever the maps' dtype."""
    return functional.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False).to(maps.dtype)


def cut(maps: Tensor, rows: int, columns: int) -> Tensor:
    """`[images * rows * columns, pixels, width]`: windows and the pixels in them row by row."""
    windows = torch.unflatten(torch.unflatten(maps, 2, (rows, -1)), 4, (columns, -1))
    images, width, row, y, column, x = range(6)
    return windows.permute(images, row, column, y, x, width).flatten(3, 4).flatten(0, 2)


AT_ONCE = 48
"""How many windows of mining are in memory at a time, unless a row of patches has more."""


class Mining(nn.Module):
    """Patch-info mining: every low patch attends to the high pixels that it covers.

    Without upstream's replacement of NaN among the scores: a NaN is to be noticed.
    """

    def __init__(self, language: nn.Module, grid: int, overview: bool) -> None:
        super().__init__()
        self.grid, self.overview = grid, overview
        self.owner = (language,)
        """Whose the projections are, under published names; in a tuple, so that it is no child of this module."""

    def forward(self, low: Tensor, high: Sequence[Tensor]) -> Tensor:
        """`[images, views, patches, width]` from the low map `[images, views, width, rows, columns]` and the high ones.

        Only what is given and what is returned is large by itself; what lies between is several times larger.
        """
        rows, columns = low.shape[-2:]
        tokens, whole = low.flatten(3).transpose(2, 3), self.tiles(pyramid(high))
        query, key, value = (getattr(self.owner[0], f"vlm_uni_{name}_projector") for name in ("query", "aux", "val"))
        queries = torch.unflatten(query(tokens).flatten(0, 1), 1, (rows, columns))
        plain, side = all(map(is_plain, (*key, *value))), whole.shape[-2] // rows
        # Windows are copies of pixels, and normalised in fp32: few of them are in memory at a time.
        band = max(1, AT_ONCE // (len(queries) * columns)) if plain else rows
        mined = []
        for begin in range(0, rows, band):
            asked = queries[:, begin : begin + band]
            sought, pixels = asked.flatten(0, 2), whole[:, :, begin * side : (begin + band) * side]
            if plain:
                width, eps = key[0].normalized_shape, key[0].eps
                seen = functional.layer_norm(cut(pixels, asked.shape[1], columns), width, eps=eps).to(queries.dtype)
                found = folded(sought, seen, key, value)
            else:
                windows = cut(pixels, rows, columns)
                found = pooled(sought, key(windows), value(windows), sought.shape[-1])
            mined.append(torch.unflatten(found, 0, (len(asked), -1)))
        return tokens + torch.cat(mined, 1).view_as(tokens)

    def tiles(self, whole: Tensor) -> Tensor:
        """`[images * views, width, …]`: of every map the view of the whole, if wanted, then its tiles row by row."""
        if self.grid == 1:
            return whole
        size = [side // self.grid for side in whole.shape[-2:]]
        # `[images, tiles, pixels, width]`
        views = torch.unflatten(cut(whole, self.grid, self.grid), 0, (-1, self.grid**2))
        views = torch.unflatten(views.transpose(2, 3), 3, size)
        if self.overview:
            views = torch.cat([scaled(whole, size).unsqueeze(1), views], dim=1)
        return views.flatten(0, 1)


def folded(queries: Tensor, pixels: Tensor, key: Any, value: Any) -> Tensor:
    """The same as `pooled` with `key(windows)` and `value(windows)`, of whose normalised `pixels` none is projected.

    A window has one query, so the key's projection is applied to it instead, and the value's to the mean of the pixels. What biases add to
    the scores is the same for all pixels of a window, and the softmax ignores it.
    """
    (key_norm, key_linear), (value_norm, value_linear) = key, value
    sought = (queries @ key_linear.weight) * key_norm.weight
    mean = pooled(sought, pixels, pixels, queries.shape[-1])
    mined: Tensor = value_linear(mean * value_norm.weight + value_norm.bias)
    return mined


def pooled(queries: Tensor, keys: Tensor, values: Tensor, width: int) -> Tensor:
    """Attention of one query to each window: `[windows, wide]` from such queries and `[windows, pixels, wide]`; `width` is that of the scores."""
    scores = (keys @ queries.unsqueeze(2)).squeeze(2).float() * width**-0.5
    mean: Tensor = scores.softmax(-1).to(values.dtype).unsqueeze(1) @ values
    return mean.squeeze(1)


def is_plain(module: nn.Module) -> bool:
    """Whether a projection's module computes what its weights say and nothing else: no method adapts it, and no engine acts when it is called."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in (nn.LayerNorm, nn.Linear) and not hooked


def trained(module: nn.Module) -> bool:
    """Whether any parameter requires gradients."""
    return any(parameter.requires_grad for parameter in module.parameters())


def structure(
    backbone: Backbone,
    config: Mapping[str, Any],
    towers: Mapping[str, nn.Module],
    outputs: Mapping[str, TowerOutput],
    attn_implementation: str,
) -> Structure:
    """The built model and its map."""
    language = language_model(backbone, config["language"], attn_implementation)
    model = VisionLanguage(language, tuple(towers), Images.of(config, outputs))
    for part, tower in towers.items():
        owner, _, name = TOWERS[part].rpartition(".")
        model.get_submodule(owner).add_module(name, tower)
    width = outputs["low"].widths[0]
    language.add_module("mm_projector", connector(config["projector_type"], width, language.config.hidden_size))
    if "high" in towers:
        fine = sum(outputs["high"].widths)
        for name, taken in (("query", width), ("aux", fine), ("val", fine)):
            language.add_module(
                f"vlm_uni_{name}_projector", nn.Sequential(nn.LayerNorm(taken), nn.Linear(taken, width))
            )
    # Checkpoints of before there were others than Gemma do not say that it is tied.
    tied = config["language"].get("tie_word_embeddings", True)
    if not tied:
        model.add_module("lm_head", nn.Linear(language.config.hidden_size, language.config.vocab_size, bias=False))
    layers = tuple(f"model.layers.{i}" for i in range(len(language.layers)))
    vision = {f"vision.{part}": TOWERS[part] for part in towers}
    return Structure(
        model,
        roles=roles(model, layers) | {name: (tower,) for name, tower in vision.items()},
        blocks={
            "language": layers,
            **({"mining": ("mining",)} if "high" in towers else {}),
            **{name: repeated(model, tower) for name, tower in vision.items()},
        },
        attention_modules={
            "language": layers,
            **{name: (tower,) for name, tower in vision.items()},
        },
        image_encoder=tuple(TOWERS[part] for part in towers),
        tied_weights={
            **({"lm_head.weight": "model.embed_tokens.weight"} if tied else {}),
            # Old folders hold the rotary frequencies, which are computed, once for each layer.
            **{f"{layer}.self_attn.rotary_emb.inv_freq": "model.rotary_emb.inv_freq" for layer in layers},
        },
        untied={"lm_head.weight": "model.embed_tokens.weight"} if config.get("base_is_tied") else {},
        without_effect=KEY_BIASES if "high" in towers else (),
    )


def language_model(backbone: Backbone, config: Mapping[str, Any], attn_implementation: str) -> Any:
    """transformers' model without a head, in fp32 and with its own random initialisation."""
    # A copy, because transformers writes into what it is given.
    own = copy.deepcopy({key: config[key] for key in config if key != "hidden_act"})
    settings = getattr(transformers, backbone.config)(**own)
    # Set afterwards: transformers 5 takes Gemma's "gelu" for the tanh approximation, and MGM was trained with the exact one.
    settings.hidden_act = config.get("hidden_act", settings.hidden_act)
    return getattr(transformers, backbone.model)._from_config(settings, attn_implementation=attn_implementation)


def connector(kind: str, width: int, hidden: int) -> nn.Module:
    """The connector `kind` from the low tower's width to the language model's."""
    if kind == "identity":
        return nn.Identity()
    layers: list[nn.Module] = [nn.Linear(width, hidden)]
    if kind == "linear":
        return layers[0]
    for _ in range(int(kind.removeprefix("mlp").removesuffix("x_gelu")) - 1):
        layers += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers)


def roles(model: VisionLanguage, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Role to the names of its modules, without the towers."""
    norms = [f"{layer}.{name}" for layer in layers for name in ("input_layernorm", "post_attention_layernorm")]
    found = {
        "language.attention": tuple(f"{layer}.self_attn" for layer in layers),
        "language.mlp": tuple(f"{layer}.mlp" for layer in layers),
        "language.norms": (*norms, "model.norm"),
        "language.embeddings": ("model.embed_tokens",),
        "connector": ("model.mm_projector",),
    }
    if hasattr(model, "lm_head"):
        found["language.head"] = ("lm_head",)
    if "high" in model.parts:
        found["mining"] = tuple(f"model.vlm_uni_{name}_projector" for name in ("query", "aux", "val"))
    return found


def repeated(model: nn.Module, tower: str) -> tuple[str, ...]:
    """The repeated blocks of a tower: the members of its innermost lists of modules, for a stage would be half a tower."""
    lists = [
        name
        for name, module in model.get_submodule(tower).named_modules(prefix=tower)
        if isinstance(module, nn.ModuleList)
    ]
    innermost = [name for name in lists if not any(other.startswith(f"{name}.") for other in lists)]
    return tuple(f"{name}.{i}" for name in innermost for i in range(len(list(model.get_submodule(name).children()))))
