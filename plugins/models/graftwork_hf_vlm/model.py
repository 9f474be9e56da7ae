"""transformers' models as Graftwork calls one, and the map of where what is in them."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModelForImageTextToText, DynamicCache
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from graftwork.attention import packing
from graftwork.contracts import Batch, BuildContext, Structure
from graftwork.errors import WeightsError
from graftwork.weights import DerivedTensor, LazyTensor
from graftwork_hf_vlm import HfVlm, image_token_id, known_to, model_class, own_attention, parts_of

COUNTS = "image_tokens"
"""Among the pixels: how many tokens each image takes. It is the processor's, and transformers' models do not know it."""
POSITIONS = "position_ids"
"""The token field with a model's three positions of each token, where it has three."""
UNUSED = ("last_hidden_state", "hidden_states", "attentions")
"""What transformers returns of images besides that no language model is given."""
SAME = "same for all images"
CONNECTOR = re.compile(r"(^|\.)\w*(merger|projector|connector|aligner|resampler|embed_vision)\w*")
ATTENTION, MLP = re.compile(r"attn|attention"), re.compile(r"mlp|feed_forward|ffn|experts|moe")


class VisionLanguage:
    """What the engine calls (see `graftwork.contracts.VisionLanguageModel`), mixed into the class of transformers' model, so that all
    of its tensors keep their names."""

    config: Any
    base_model: Any
    base_model_prefix: str

    def encode_images(self, pixels: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The features of each image, as `mm_encoder_outputs` takes them."""
        seen = self.base_model.get_image_features(**without_counts(pixels), return_dict=True)
        counts = pixels[COUNTS].tolist()
        fields = {name: apart(value, counts) for name, value in seen.items() if name not in UNUSED}
        return [{name: each[place] for name, each in fields.items()} for place in range(len(counts))]

    def forward(self, batch: Batch, features: Sequence[Any] | None = None, cache: Any = None) -> Tensor:
        """The final hidden states `[rows, tokens, width]`."""
        begins = cache is None or not cache.get_seq_length()
        known = known_to(self.base_model)
        told = {name: value for name, value in batch.token_fields.items() if begins and name in known}
        told[POSITIONS] = self.positions(batch, cache, begins)
        if batch.positions is not None and features is None and batch.pixels:
            features = self.encode_images(batch.pixels)  # apart, as no record is packed in the image encoder
        seen: dict[str, Any] = without_counts(batch.pixels)
        if features:
            fields = {name: together([image[name] for image in features]) for name in features[0]}
            seen = {"mm_encoder_outputs": {"image": Known(**fields)}}
        with packing(batch):
            hidden: Tensor = self.base_model(
                input_ids=batch.input_ids.masked_fill(batch.image_token_mask, image_token_id(self.config) or 0),
                attention_mask=batch.attention_mask,
                past_key_values=cache,
                use_cache=cache is not None,
                **told,
                **seen,
            ).last_hidden_state
        return hidden

    def positions(self, batch: Batch, cache: Any, begins: bool) -> Tensor:
        """`[rows, tokens]`; of a model with several positions for each token `[positions, rows, tokens]`."""
        mask = batch.attention_mask
        plain = batch.positions
        if plain is None:
            plain = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -batch.input_ids.shape[1] :]
        if not hasattr(self.base_model, "get_rope_index"):
            return plain
        rope = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
        several = plain.expand(len(rope.get("mrope_section") or "thw"), -1, -1)
        if not begins:
            several = several + cache.moved
        elif POSITIONS in batch.token_fields:
            several = batch.token_fields[POSITIONS].transpose(0, 1)
        if cache is not None and begins:
            # An image takes fewer positions than tokens: text goes on by so much less.
            cache.moved = (several.amax((0, 2)) + 1 - mask.sum(-1))[:, None]
        return several

    def logits(self, hidden: Tensor) -> Tensor:
        """The vocabulary's scores `[..., vocabulary]`, by transformers' own forward: models scale, divide or cap them each in their way."""
        classes = type(self).__mro__
        kind: Any = classes[classes.index(VisionLanguage) + 1]
        head, rows = kind.__new__(kind), hidden.reshape(1, -1, hidden.shape[-1])
        modules = {**self.__dict__["_modules"], self.base_model_prefix: KnownHidden(last_hidden_state=rows)}
        head.__dict__ = {**self.__dict__, "_modules": modules}
        found: Tensor = head.forward(inputs_embeds=rows, use_cache=False).logits
        return found.view(*hidden.shape[:-1], -1)

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        return DynamicCache(config=self.config.get_text_config())


class Known:
    """What a module of transformers' returns, where it is known before; what is not given is None."""

    def __init__(self, **given: Any) -> None:
        self.__dict__ |= given

    def __getattr__(self, name: str) -> Any:
        return None


class KnownHidden(Known):
    """Stands where the model below the head is, and answers with final hidden states that are known: the module and what it returns."""

    def __call__(self, *given: Any, **named: Any) -> KnownHidden:
        return self

    def __getitem__(self, place: int) -> Any:
        return self.last_hidden_state


def without_counts(pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers' model takes of the images."""
    return {name: value for name, value in pixels.items() if name != COUNTS}


def apart(value: Any, counts: Sequence[int]) -> list[Any]:
    """For each image, of as many tokens as `counts` says, what is its own of a value that transformers gives of all; under `SAME` what is
    the same for all of them."""
    one_each = isinstance(value, list | tuple) and all(isinstance(each, Tensor) for each in value)
    whole = torch.cat(list(value)) if one_each and {each.shape[-1] for each in value} == {value[0].shape[-1]} else value
    if isinstance(whole, Tensor) and whole.dim() > 1 and whole.shape[:-1].numel() == sum(counts):
        rows: Any = whole.flatten(0, -2)
        each = rows.split(list(counts))
        return [[one] if one_each else one.unflatten(0, (-1, *whole.shape[1:-1])) for one in each]
    if isinstance(value, list | tuple):
        parts = [apart(each, counts) for each in value]
        return [[part[place] for part in parts] for place in range(len(counts))]
    return [{SAME: value}] * len(counts)


def together(parts: Sequence[Any]) -> Any:
    """What `apart` took apart."""
    first = parts[0]
    if isinstance(first, dict):
        return first[SAME]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    return [together(each) for each in zip(*parts, strict=True)]


def build(config: Any, bound: Collection[str], context: BuildContext) -> Structure:
    """The built model and its map; the sites in `bound` compute attention by Graftwork's kernels, the others as transformers does."""
    own, chosen = own_attention(config), {}
    for name, part in parts_of(config).items():
        key = next((key for key in config.sub_configs if getattr(config, key, None) is part), "")
        chosen[key] = context.attn_implementation if name in bound else own
    try:
        model = AutoModelForImageTextToText.from_config(
            config, attn_implementation={"": own, **chosen}, dtype=torch.float32
        )
    except ImportError as error:
        why = str(error).strip().splitlines()[0].partition(". ")[0]
        raise WeightsError(
            f"transformers cannot build a '{config.model_type}' model here ({why}); install that, or name a model of another family"
        ) from None
    kind = type(model)
    model.__class__ = type(kind.__name__, (VisionLanguage, kind), {"__module__": kind.__module__})
    encoder = model.get_encoder("image")
    if "vision" in bound and any("cu_seqlens" in known_to(module) for module in encoder.modules()):
        encoder.config._attn_implementation = context.windowed_attn_implementation or context.attn_implementation
    model.tie_weights()
    tied = dict(model.all_tied_weights_keys)
    language, vision = path_of(model, model.get_decoder()), path_of(model, encoder)
    roles = roles_of(model, language, vision, tied)
    blocks = {"language": language, "vision": vision}
    layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    return Structure(
        model,
        roles,
        blocks={row: tuple(n for n in layers if n.startswith(f"{root}.")) for row, root in blocks.items()},
        attention_modules={site: (root,) for site, root in blocks.items() if site in bound},
        image_encoder=(*roles.get("vision", ()), *roles.get("connector", ())),
        tied_weights=tied,
    )


def without_layers(config: Any) -> Any:
    """A model with its configuration and nothing else, which computes positions."""
    kind: Any = MODEL_MAPPING.get(type(config), None) or model_class(config)
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.config = config
    return made


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The name of a module in the model."""
    return next((name for name, each in model.named_modules() if each is module), "")


def roles_of(model: Any, language: str, vision: str, tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Role to modules, by where transformers says that its parts are, and by what is called what within them."""
    embeddings = path_of(model, model.get_input_embeddings())
    head = path_of(model, model.get_output_embeddings())
    roles: dict[str, list[str]] = {role: [] for role in HfVlm.roles}

    def role_of(name: str) -> str:
        if name in (embeddings, head):
            return "language.embeddings" if name == embeddings else "language.head"
        if name.startswith(f"{language}."):
            part = re.sub(r"^(\w+\.)?layers\.\d+\.", "", name.removeprefix(f"{language}.")).split(".")[0]
            kind = "norms" if "norm" in part else "attention" if ATTENTION.search(part) else ""
            return f"language.{kind or ('mlp' if MLP.search(part) else 'norms')}"
        return "vision" if name.startswith(f"{vision}.") and not CONNECTOR.search(name) else "connector"

    for name, module in model.named_modules():
        if not module._parameters or (name == head and f"{head}.weight" in tied):
            continue
        # A module with others below it stands for them too, and they may play other roles.
        named = [f"{name}.{each}" for each in module._parameters] if module._modules else [name]
        roles[role_of(name)] += named
    return {role: tuple(names) for role, names in roles.items() if names}


def renamed(weights: Mapping[str, LazyTensor], model: Any) -> dict[str, LazyTensor]:
    """Published tensors under the names of the built model; those that are joined, split or turned there are so when they are read."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, found = model.state_dict(keep_vars=True), dict[str, LazyTensor]()
    pieces: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(weights, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:  # it is stored as it is built
            new, pattern = name, None
        if pattern is None:
            found[new] = weights[name]
        else:
            pieces.setdefault(new, []).append((name, pattern))
    model._weight_conversions = [rule for rule in rules if rule.was_used()]  # `save_pretrained` undoes them
    for new, sources in pieces.items():
        converter = next(rule for rule in converters if sources[0][1] in rule.source_patterns)
        tensors = tuple(weights[name] for name, _ in sources)
        first = converter.target_patterns[0]
        for target in converter.target_patterns:
            name = new.replace(first, target, 1)
            found[name] = DerivedTensor(tensors, partial(converted, converter, sources, new, name, model))
    return found


def converted(
    converter: Any, sources: Sequence[tuple[str, str]], first: str, name: str, model: Any, *values: Tensor
) -> Tensor:
    """The tensor `name` that transformers' converter makes of the values of `sources`, their names with the patterns that found them."""
    converter = deepcopy(converter)
    for (source, pattern), value in zip(sources, values, strict=True):
        converter.add_tensor(first, source, pattern, value)
    made = converter.convert(first, model=model, config=model.config)[name]
    tensor: Tensor = made[0] if isinstance(made, list) else made
    return tensor


def save(model: Any, folder: Path) -> None:
    """Write configuration and tensors under published names, without transformers' progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # accelerate imports DeepSpeed for it, where that is installed, which then writes its messages to stdout for good.
        with redirect_stdout(sys.__stderr__):
            model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
