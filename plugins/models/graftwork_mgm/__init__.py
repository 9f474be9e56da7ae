"""The models `mgm-gemma` and `mgm-llama`: MGM (Mini-Gemini, Li et al. 2024, arXiv:2403.18814) on two families."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graftwork.contracts import (
    OF_TRANSFORMERS,
    AttentionSite,
    BuildContext,
    ModelArchitecture,
    Processor,
    Structure,
    TowerOutput,
    TowerSlot,
    VisionTower,
    hookimpl,
    refuse_unknown_settings,
    setting,
)
from graftwork.errors import WeightsError
from graftwork.weights import LazyTensor
from graftwork_mgm.backbones import GEMMA, LLAMA, OF_MGM, OPTIONAL, REQUIRED, TEMPLATES, WITHOUT_EFFECT, Backbone

if TYPE_CHECKING:
    from torch import nn

    from graftwork.contracts import Adapter, Assembly, ExternalFolder, ImportPlan, Reference

TOWERS = {"low": "model.vision_tower", "high": "model.vision_tower_aux"}
"""Where each part's tower is, in the built model and in published weights."""
KEYS = {"low": "mm_vision_tower", "high": "mm_vision_tower_aux"}
"""Which key of an MGM folder's config.json names each part's tower."""
TRAINED = {"low": "optimize_vision_tower", "high": "optimize_vision_tower_aux"}
"""Which key says that a part's tower was trained, so that the folder's own weights of it count."""
NESTED = {"low": "vision_tower.", "high": ""}
"""What published names have between the tower's place and its own names."""


@dataclass(frozen=True)
class MgmSettings:
    """What the folder of a plain language model does not say. An MGM folder does, and its own values are the defaults."""

    image_size_aux: int | None = setting(
        None, "Side in pixels of the image for the high part; 768 by default", minimum=1
    )
    projector_type: str | None = setting(
        None, "The connector: mlp2x_gelu (default), another mlpNx_gelu, linear, identity"
    )
    aspect_ratio: Literal["pad", "square"] | None = setting(
        None, "Pad images to a square (default), or cut a square out of their middle"
    )
    image_grid: int | None = setting(None, "Tiles in each direction that the low part sees; 1 by default", minimum=1)
    image_global: bool | None = setting(None, "With tiles, the low part sees the whole as well; false by default")
    template: Literal["gemma", "vicuna", "chatml"] | None = setting(
        None, "How conversations are written; by default as in MGM's published models"
    )


PUBLISHED: Mapping[str, tuple[str, Any, Any]] = {
    "image_size_aux": ("image_size_aux", 768, 768),
    "projector_type": ("mm_projector_type", "mlp2x_gelu", "linear"),
    "aspect_ratio": ("image_aspect_ratio", "pad", "square"),
    "image_grid": ("image_grid", 1, 1),
    "image_global": ("image_global", False, False),
    "template": ("conversation_template", None, None),
}
"""Setting to its key in an MGM folder, and the defaults: of a plain folder, and of an MGM folder without the key."""


def selected_layer(tower: VisionTower[Any], config: Mapping[str, Any], otherwise: int | None = None) -> int | None:
    """The hidden state that a tower gives, by its configuration or else its settings; `otherwise` where it selects none."""
    layer: int | None = config.get("select_layer", getattr(tower.settings, "select_layer", otherwise))
    return layer


class Mgm(ModelArchitecture[MgmSettings]):
    """MGM on any backbone; a subclass names one."""

    backbone: ClassVar[Backbone]
    Settings = MgmSettings
    parts: ClassVar[Mapping[str, TowerSlot]] = {
        "low": TowerSlot("sees the image as the language model's tokens", "clip"),
        "high": TowerSlot(
            "sees it at a higher resolution, for the details that mining adds", "openclip-convnext", optional=True
        ),
    }
    newly_initialised_roles = ("connector", "mining")
    roles: ClassVar[Mapping[str, str]] = {
        "language.attention": "query, key, value and output projections of the language model",
        "language.mlp": "feed-forward layers of the language model",
        "language.norms": "normalisation layers of the language model",
        "language.embeddings": "token embeddings of the language model",
        "language.head": "from hidden states to tokens, where it is not the embeddings",
        "connector": "from vision to the language model's width",
        "mining": "query, key and value projections of patch-info mining; needs a high part",
        "vision.low": "the low part's tower",
        "vision.high": "the high part's tower",
    }

    def configuration(self, folder: Path | None) -> Mapping[str, Any]:
        """The language model's sizes, and how images are used, from a plain language model's folder or an MGM folder."""
        whole = super().configuration(folder)
        self._refuse(whole, folder)
        of_mgm = "mm_hidden_size" in whole
        chosen = asdict(self.settings)
        for name, (key, plain, silent) in PUBLISHED.items():
            if chosen[name] is None:
                chosen[name] = whole.get(key) or (silent if of_mgm else plain)
        chosen["image_global"] &= chosen["image_grid"] > 1
        chosen["template"] = chosen["template"] or self.backbone.template
        if not re.fullmatch(r"linear|identity|mlp[1-9]\d*x_gelu", chosen["projector_type"]):
            raise WeightsError(
                f"projector_type '{chosen['projector_type']}' is not known; use 'mlp2x_gelu' (or another number), 'linear' or "
                "'identity'"
            )
        if chosen["aspect_ratio"] not in ("pad", "square"):
            raise WeightsError(f"aspect_ratio '{chosen['aspect_ratio']}' is not known; use 'pad' or 'square'")
        if chosen["template"] not in TEMPLATES:
            raise WeightsError(f"template '{chosen['template']}' is not known; use {' or '.join(map(repr, TEMPLATES))}")
        language = {key: whole[key] for key in (*REQUIRED, *OPTIONAL) if whole.get(key) is not None}
        language |= self._declared(whole, folder)
        language.setdefault("num_key_value_heads", language["num_attention_heads"])
        language.setdefault("head_dim", language["hidden_size"] // language["num_attention_heads"])
        if rope := dict(language.pop("rope_parameters", {})):
            # As it was written before transformers 5, which published loaders of a written folder do not know.
            language["rope_theta"] = rope.pop("rope_theta", 10_000.0)
            if rope.get("rope_type", "default") != "default":
                language["rope_scaling"] = rope
        language["tie_word_embeddings"] = bool(whole.get("tie_word_embeddings", self.backbone.tied))
        return {
            "language": language,
            "select_layer": whole.get("mm_vision_select_layer"),
            **chosen,
            **_high_from(whole),
        }

    def example(self, folder: Path) -> None:
        """A plain language model of two layers, and a tokenizer of bytes."""
        from graftwork_mgm.example import write

        write(self.backbone, folder)

    def _refuse(self, whole: Mapping[str, Any], folder: Path | None) -> None:
        """WeightsError for a folder that is not this model, or uses what is not built here."""
        backbone = self.backbone
        if whole.get("model_type") not in backbone.model_types:
            raise WeightsError(
                f"'{folder}' holds a '{whole.get('model_type')}' model, and '{self.name}' reads "
                f"{' or '.join(map(repr, backbone.model_types))}; name another folder or another model"
            )
        if missing := [key for key in REQUIRED if key not in whole]:
            raise WeightsError(f"the config.json in '{folder}' lacks {', '.join(missing)}; fetch the folder again")
        for key, value in (
            ("mm_vision_select_feature", "patch"),
            ("mm_use_im_start_end", False),
        ):
            if whole.get(key, value) != value:
                raise WeightsError(
                    f"'{folder}' sets {key} to '{whole[key]}', and '{self.name}' has only '{value}'; name another folder"
                )

    def _declared(self, whole: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
        """What a configuration says besides that transformers' class knows what to do with; WeightsError for what nothing knows."""
        assert folder is not None  # or there were no configuration
        known = {*REQUIRED, *OPTIONAL, *OF_MGM, *WITHOUT_EFFECT, *OF_TRANSFORMERS}
        if whole.get("hidden_activation") == whole.get("hidden_act"):
            known.add("hidden_activation")  # later versions of Gemma say it twice
        others = {key: value for key, value in whole.items() if key not in known and value is not None}
        if not others:
            return {}
        declared = self.backbone.defaults()
        refuse_unknown_settings(folder / "config.json", whole, known | declared.keys(), self.name)
        return {key: value for key, value in others.items() if key in declared and value != declared[key]}

    def describe_towers(
        self, config: Mapping[str, Any], towers: Mapping[str, tuple[VisionTower[Any], Mapping[str, Any]]]
    ) -> Mapping[str, TowerOutput]:
        """The low tower at its own size, the high one at `image_size_aux`; WeightsError unless they fit together."""
        tower, tower_config = towers["low"]
        low = tower.describe(tower_config)
        if len(low.widths) != 1:
            raise WeightsError(
                f"part 'low' takes a tower with one map, and '{tower.name}' gives {len(low.widths)}; set its select_layer if it has one, "
                "or name another"
            )
        if (wanted := config["select_layer"]) not in (None, layer := selected_layer(tower, tower_config, wanted)):
            raise WeightsError(
                f"the model was trained with select_layer {wanted} of part 'low', and the run has {layer or 'none'}; set it to {wanted}"
            )
        hidden = config["language"]["hidden_size"]
        if config["projector_type"] == "identity" and low.widths[0] != hidden:
            raise WeightsError(
                f"projector_type 'identity' cannot join widths {low.widths[0]} and {hidden}; use 'mlp2x_gelu'"
            )
        if "high" not in towers:
            return {"low": low}
        tower, tower_config = towers["high"]
        high = tower.describe(tower_config, config["image_size_aux"])
        rows, fine = low.grids[0][0] * config["image_grid"], high.grids[0][0]
        if fine % rows:
            raise WeightsError(
                f"the high part's map has {fine} rows, which {rows} rows of patches do not divide; change image_size_aux"
            )
        return {"low": low, "high": high}

    def sites(self, config: Mapping[str, Any], towers: Mapping[str, TowerOutput]) -> Sequence[AttentionSite]:
        """Causal attention of the language model. Mining has one query a window and projects no key, so no kernel suits it."""
        language = config["language"]
        return [
            AttentionSite(
                "language",
                head_dim=language["head_dim"],
                heads=language["num_attention_heads"],
                kv_heads=language["num_key_value_heads"],
                causal=True,
                padding=True,
                dropout=language.get("attention_dropout", 0.0),
            )
        ]

    def build(
        self,
        config: Mapping[str, Any],
        towers: Mapping[str, nn.Module],
        outputs: Mapping[str, TowerOutput],
        context: BuildContext,
    ) -> Structure:
        """The model around its towers (see `graftwork_mgm.model`)."""
        from graftwork_mgm.model import structure

        return structure(self.backbone, config, towers, outputs, context.attn_implementation)

    def tensors(
        self,
        weights: Mapping[str, LazyTensor],
        towers: Mapping[str, VisionTower[Any]],
        model: nn.Module | None = None,
    ) -> Mapping[str, LazyTensor]:
        """From a plain language model's folder or an MGM folder."""
        found: dict[str, LazyTensor] = {}
        for name, tensor in weights.items():
            part = next((part for part in towers if name.startswith(f"{TOWERS[part]}.")), None)
            own = name.removeprefix(f"{TOWERS[part]}.").removeprefix(NESTED[part]) if part else name
            translated = towers[part].module_name(own) if part else None
            found[f"{TOWERS[part]}.{translated}" if part and translated else name] = tensor
        return found

    def parts_with_own_weights(self, config: Mapping[str, Any]) -> Collection[str]:
        """As upstream's loader does: CLIP is an MGM folder's, and the ConvNeXt its own folder's unless the MGM folder trained it."""
        return ("high",) if config.get("high_from") == "its folder" else ()

    def untied(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same with a head of its own, which its base has in the embeddings."""
        return {**config, "language": {**config["language"], "tie_word_embeddings": False}, "base_is_tied": True}

    def processor(
        self, config: Mapping[str, Any], folder: Path | None, outputs: Mapping[str, TowerOutput]
    ) -> Processor:
        """The processor, with the tokenizer in `folder`."""
        from graftwork_mgm.pixels import Images
        from graftwork_mgm.processor import MgmProcessor, load_tokenizer

        if folder is None:
            raise WeightsError(f"'{self.name}' needs a folder with a tokenizer: set 'weights' or 'config'")
        return MgmProcessor(
            load_tokenizer(folder, self.backbone.tokenizer),
            TEMPLATES[config.get("template", self.backbone.template)],
            Images.of(config, outputs),
            config["language"]["vocab_size"],
        )

    def exports(self) -> Mapping[str, Callable[[Any, Path], Sequence[str] | None]]:
        """`mgm`: a whole folder for upstream's loader."""
        from graftwork_mgm.export import write_for_upstream

        return {"mgm": partial(write_for_upstream, self.backbone)}

    def import_from(
        self, folder: ExternalFolder, towers: Mapping[str, VisionTower[Any]], adapter: Adapter | None
    ) -> ImportPlan | None:
        """What upstream's training left in a folder."""
        from graftwork_mgm.upstream_folders import Reading

        return Reading(self, folder, towers, adapter).import_plan()

    def reference(self, assembly: Assembly) -> Reference:
        """The assembled model within transformers' class of its language model."""
        from graftwork_mgm.reference import around

        return around(self.backbone, assembly)

    def open_elsewhere(self, folder: Path) -> Reference | None:
        """The language model in a folder, by transformers."""
        from graftwork_mgm.reference import opened_by_transformers

        return opened_by_transformers(self.backbone, folder)

    def write(self, assembly: Assembly, folder: Path) -> None:
        """Write an MGM folder, with each tower's configuration beside it in a folder of its part's name."""
        from graftwork_mgm.export import write

        write(self.backbone, assembly, folder)


def was_trained(whole: Mapping[str, Any], part: str) -> bool:
    """Whether an MGM folder's config.json says that a part's tower was trained, so that upstream takes it from the folder."""
    return bool(whole.get(TRAINED[part]) or (part == "low" and whole.get("unfreeze_mm_vision_tower")))


def _high_from(whole: Mapping[str, Any]) -> dict[str, str]:
    """Where upstream takes the weights of an MGM folder's high part from. Nothing where there is no such part, where the folder is
    Graftwork's, which names no other place, and in checkpoints of before this was asked."""
    place = whole.get(KEYS["high"])
    if place and was_trained(whole, "high"):
        return {"high_from": "here"}
    return {"high_from": "its folder"} if place and place != "high" else {}


class MgmGemma(Mgm):
    """MGM (Mini-Gemini) on Gemma: CLIP's tokens, enriched with details from a high-resolution tower"""

    name = "mgm-gemma"
    backbone = GEMMA
    overflows_in = ("fp16",)


class MgmLlama(Mgm):
    """MGM (Mini-Gemini) on Llama and its relatives, such as Vicuna: the same architecture"""

    name = "mgm-llama"
    backbone = LLAMA


@hookimpl
def model_architectures() -> list[type[ModelArchitecture[Any]]]:
    """The models of this plugin."""
    return [MgmGemma, MgmLlama]
