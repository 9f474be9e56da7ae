"""Folders that MGM's own training wrote: stage 1, LoRA, whole models, and copies of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graftwork.contracts import Adapter, ExternalFolder, ImportPlan, RequiredTower, VisionTower
from graftwork.errors import WeightsError
from graftwork.weights import LazyTensor, agreeing, tensor_files
from graftwork_mgm import KEYS, TOWERS, was_trained
from graftwork_mgm.backbones import REQUIRED

if TYPE_CHECKING:
    from graftwork_mgm import Mgm

LORA, STAGE_1 = "non_lora_trainables.bin", "mm_projector.bin"
"""Where upstream keeps what it trained besides an adapter, and what it trained in stage 1."""
LOST = "restore it from where it was trained: nothing else holds what the run learned there"
WIDTHS = {"low": "mm_hidden_size", "high": "mm_hidden_size_aux"}
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
ADDED_TOKENS = 3
"""How many tokens upstream can add to a vocabulary: one for patches, two around an image."""


@dataclass(frozen=True)
class Reading:
    """One folder, as a model of this family reads it."""

    model: Mgm
    folder: ExternalFolder
    towers: Mapping[str, VisionTower[Any]]
    adapter: Adapter | None

    def import_plan(self) -> ImportPlan | None:
        """What the folder is; None where it is not of this family."""
        plain, published = self.model.backbone.model_types
        kind = self.config.get("model_type")
        if kind == plain and not self.adapter and not self.mine:
            return self._plain() if self.folder.shards() else None
        if kind != published and not (self.mine and kind in (plain, None)):
            return None
        return ImportPlan(
            description=self._description(),
            configure=self._configure,
            base=str(self.config.get("_name_or_path") or ""),
            parts={part: self._part(part) for part in self._parts()},
            tensors=self.tensors,
            is_full_model=self.is_full_model,
            vocabulary=self.config.get("vocab_size") or 0,
            has_processor=not self.folder.files.isdisjoint(TOKENIZERS),
            facts=[*self._facts()],
            missing=(*self._missing(),),
            inconsistent=(*self._inconsistent(),),
            refused=self._refused(),
            refused_on_plain="" if self.connected else f"it lacks {LORA}, which holds the connector; {LOST}",
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return self.folder.json("config.json")

    @cached_property
    def shards(self) -> Sequence[Path]:
        """The files of a whole model in it; none where one is missing, which `_refused` says."""
        try:
            return self.folder.shards()
        except WeightsError:
            return []

    @cached_property
    def mine(self) -> str:
        """The file in which upstream keeps the connector outside whole models; empty where there is none."""
        return next((name for name in (LORA, STAGE_1) if name in self.folder.files), "")

    @cached_property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """What it holds besides an adapter's own tensors, by names in the built model."""
        whole = [] if self.adapter else [file.name for file in self.shards]
        sources: list[Mapping[str, LazyTensor]] = [self.adapter.others] if self.adapter else []
        sources += [self.folder.tensors(name) for name in whole or [self.mine] * bool(self.mine)]
        found: dict[str, LazyTensor] = {}
        for held in sources:
            for stored, tensor in held.items():
                name = unwrapped(stored)
                found[name] = agreeing(name, found[name], tensor) if name in found else tensor
        return self.model.tensors(found, self.towers)

    @cached_property
    def is_full_model(self) -> bool:
        """Whether it holds the language model as well."""
        return "model.embed_tokens.weight" in self.tensors and not self.adapter

    def has(self, part: str) -> bool:
        """Whether it holds tensors of this part."""
        return any(name.startswith(f"{TOWERS[part]}.") for name in self.tensors)

    @property
    def connected(self) -> bool:
        """Whether it holds a connector."""
        return any(name.startswith("model.mm_projector.") for name in self.tensors) or (
            self.config.get("mm_projector_type") == "identity"
        )

    def _parts(self) -> list[str]:
        return [
            p for p in TOWERS if p == "low" or self.config.get(KEYS[p]) or self.config.get(WIDTHS[p]) or self.has(p)
        ]

    def _part(self, part: str) -> RequiredTower:
        beside = self.adapter.others if self.adapter else ()
        trained = was_trained(self.config, part) or any(name.startswith(f"{TOWERS[part]}.") for name in beside)
        # Upstream's loader takes CLIP from a whole model's folder, and ConvNeXt from its own.
        source: Literal["its folder", "here", "trained here"] = "trained here" if trained else "its folder"
        if not trained and self.is_full_model and part == "low":
            source = "here"
        layer = self.config.get("mm_vision_select_layer")
        return RequiredTower(
            recorded=str(self.config.get(KEYS[part]) or ""),
            settings={"select_layer": layer} if part == "low" and layer is not None else {},
            width=self.config.get(WIDTHS[part]),
            held=self.has(part),
            source=source,
        )

    def _configure(self, base: Path | None) -> Mapping[str, Any]:
        """As this folder says, but for the size of the vocabulary where the language model's weights are the base's."""
        own = self.model.configuration(self.folder.path)
        if base is None or (self.is_full_model and not tensor_files(base)):
            return own
        theirs = self.model.configuration(base)
        for key in (*REQUIRED, "num_key_value_heads", "head_dim"):
            mine, other = own["language"][key], theirs["language"][key]
            added = key == "vocab_size" and not self.is_full_model and 0 <= mine - other <= ADDED_TOKENS
            if mine != other and not added:
                raise WeightsError(f"its {key} is {other}, and the folder was trained with {mine}")
        return {**own, "language": {**own["language"], "vocab_size": theirs["language"]["vocab_size"]}}

    def _plain(self) -> ImportPlan:
        """The folder of a plain language model."""
        return ImportPlan(
            description=f"a plain language model, of the kind that '{self.model.name}' is built on",
            configure=self.model.configuration,
            is_full_model=True,
            vocabulary=self.config.get("vocab_size") or 0,
            has_processor=not self.folder.files.isdisjoint(TOKENIZERS),
            refused="nothing was trained here that could be imported: train from it, with model.weights set to this folder",
        )

    def _description(self) -> str:
        name = self.model.backbone.architecture
        if self.is_full_model:
            return f"a whole MGM model ({name}), in {len(self.shards)} file{'s' * (len(self.shards) > 1)}"
        if self.adapter:
            return f"an adapter run of MGM ({name}): what was trained, without the language model"
        if self.mine == STAGE_1:
            return f"a stage-1 run of MGM ({name}): the connector, without the language model"
        return f"what is left of an MGM run ({name})"

    def _facts(self) -> Iterator[tuple[str, str]]:
        if self.adapter:
            yield "adapter", self.adapter.description
        learned = {unit for name in self.tensors if (unit := part_of(name))}
        if learned:
            held = ", ".join(sorted(learned))
            count = sum(read().numel() for read in self.tensors.values()) if not self.is_full_model else 0
            yield "holds besides" if self.adapter else "holds", held + (f" ({count:,} parameters)" if count else "")
        size, ratio = self.config.get("image_size_aux"), self.config.get("image_aspect_ratio")
        grid = self.config.get("image_grid", 1)
        images = [f"{size} pixels for the high part"] * bool(size) + [f"made square by '{ratio}'"] * bool(ratio)
        if images or grid > 1:
            yield "images", ", ".join([*images, *[f"{grid} x {grid} tiles"] * (grid > 1)])

    def _missing(self) -> Iterator[str]:
        files = self.folder.files
        if "config.json" not in files:
            yield "config.json: sizes, towers and how images are used"
        if not self.is_full_model and not self.mine and not self.connected:
            yield f"{LORA}: the connector and mining, which the run trained besides its adapter"
        if not self.is_full_model:
            yield "the language model's weights: they are its base's"
        if files.isdisjoint(TOKENIZERS):
            yield "the tokenizer: it is its base's"
        for part in self._parts():
            if not self.has(part):
                yield f"the {part} part's tower: it is in a folder of its own"

    def _inconsistent(self) -> Iterator[str]:
        config, name = self.config, self.model.backbone.architecture
        if config and (declared := config.get("architectures")) != [name]:
            yield (
                f"config.json says architectures {declared} and model_type '{config.get('model_type')}': by the former it would be "
                "opened without its vision towers; the latter counts"
            )
        if config and not config.get("mm_vision_tower"):
            yield (
                "config.json names no mm_vision_tower, so that upstream builds no tower ('NoneType' object has no attribute "
                "'is_loaded')"
            )
        if config and "mm_use_im_patch_token" not in config:
            yield (
                "config.json lacks mm_use_im_patch_token, which upstream takes for true and adds a token that was not trained; "
                "none is added here"
            )
        if {LORA, STAGE_1} <= self.folder.files:
            yield f"it has {STAGE_1} beside {LORA}; the latter was written when the run ended, and counts"
        if self.adapter and self.shards:
            yield "it has the weights of a whole model beside the adapter, which are not used; to import those, move the adapter away"
        elif self.adapter and not self.folder.files.isdisjoint(TOKENIZERS):
            yield "it has a tokenizer, like a whole model, but no weights of one: nothing was merged into it, files were copied"
        if (
            self.is_full_model
            and len(self.shards) == 1
            and not any(n.endswith(".index.json") for n in self.folder.files)
        ):
            yield "its weights are in one file without an index, which upstream's loader insists on; none is needed here"

    def _refused(self) -> str:
        if not self.config and self.mine:
            return f"without config.json its {self.mine} says neither sizes nor towers; {LOST}"
        try:
            self.model.configuration(self.folder.path)
            self.folder.shards()
        except WeightsError as error:
            return error.sentence
        if self.is_full_model and not self.connected:
            return "it is a whole language model, and holds no connector: its images cannot be read"
        if not self.is_full_model and not self.mine and not self.adapter and not self.connected:
            return f"it holds no weights at all, neither an adapter nor {LORA} nor {STAGE_1}; {LOST}"
        return ""


def unwrapped(name: str) -> str:
    """A tensor's name in the model, from one under peft's and DeepSpeed's wrappers."""
    name = name.removeprefix("module.")
    if name.startswith("base_model."):
        name = name.removeprefix("base_model.")
        name = name.removeprefix("model.") if name.startswith(("model.model.", "model.lm_head.")) else name
    if name.startswith(("mm_projector.", "vlm_uni_", "vision_tower")):
        name = f"model.{name}"
    return re.sub(r"\.modules_to_save(\.\w+)?\.(?=\w+$)", ".", name)


def part_of(name: str) -> str:
    """What a tensor belongs to, in a word or two."""
    if name.startswith("model.mm_projector."):
        return "connector"
    if name.startswith("model.vlm_uni_"):
        return "mining"
    for part, place in TOWERS.items():
        if name.startswith(f"{place}."):
            return f"{part} tower"
    return "language model"
