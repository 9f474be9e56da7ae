"""The model `hf-vlm`: any vision-language model that transformers builds, encodes images with and writes prompts for by means of its own."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graftwork.contracts import (
    Assembly,
    AttentionSite,
    BuildContext,
    ModelArchitecture,
    Processor,
    Structure,
    TowerOutput,
    VisionTower,
    hookimpl,
    setting,
)
from graftwork.errors import WeightsError
from graftwork.weights import LazyTensor

if TYPE_CHECKING:
    from torch import nn

    from graftwork.contracts import Adapter, ExternalFolder, ImportPlan, Reference

VOLATILE = frozenset(
    {
        *("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "auto_map"),
        *("_attn_implementation", "attn_implementation"),
    }
)
"""What a configuration says besides that nothing is built from; it may differ where the model is the same."""
PLAIN = frozenset({"full_attention", "sliding_attention", "chunked_attention", "linear_attention"})
"""Kinds of layers whose masks, if they have one, transformers makes by its means for all models."""
HEADS = ("num_attention_heads", "num_heads", "attention_heads")
WIDTHS = ("embed_dim", "hidden_size")


@dataclass(frozen=True)
class HfVlmSettings:
    """What the folder of a model does not say."""

    attention: Literal["auto", "own"] = setting(
        "auto", "Graftwork's kernels where they can (auto), or transformers' own attention everywhere"
    )
    min_pixels: int | None = setting(
        None, "The fewest pixels that an image is resized to; by default what the folder says", minimum=1
    )
    max_pixels: int | None = setting(
        None, "The most pixels that an image is resized to; by default what the folder says", minimum=1
    )
    max_tiles: int | None = setting(
        None,
        "The most tiles that an image is cut into, the whole of it not counted; by default what the folder says",
        minimum=1,
    )


class HfVlm(ModelArchitecture[HfVlmSettings]):
    """Any vision-language model of transformers, with its own chat template and processor"""

    name = "hf-vlm"
    Settings = HfVlmSettings
    roles: ClassVar[Mapping[str, str]] = {
        "language.attention": "attention of the language model's layers",
        "language.mlp": "feed-forward layers of the language model",
        "language.norms": "whatever else its layers hold, and its last normalisation",
        "language.embeddings": "token embeddings, and a head that is tied to them",
        "language.head": "from hidden states to tokens, where it is not the embeddings",
        "connector": "from vision to the language model's width",
        "vision": "the image encoder",
    }

    def configuration(self, folder: Path | None) -> Mapping[str, Any]:
        """All of the folder's configuration with transformers' defaults; WeightsError for a model that cannot be had so."""
        import transformers

        whole = super().configuration(folder)
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (ValueError, KeyError) as error:
            kind, own = whole.get("model_type"), " without code of its own, which is never run" * ("auto_map" in whole)
            raise WeightsError(
                f"transformers {transformers.__version__} cannot read the configuration of a '{kind}' model in '{folder}'{own} "
                f"({str(error).splitlines()[0].partition('. ')[0][:120]}); install a transformers that knows it, or name another folder"
            ) from None
        if why := lacking(config):
            raise WeightsError(
                f"'{folder}' holds a '{config.model_type}' model, {why}, so '{self.name}' cannot train it; name a model of another "
                "family, or write a plugin for this one"
            )
        if self.settings.max_tiles and (pinpoints := getattr(config, "image_grid_pinpoints", None)):
            from graftwork_hf_vlm.resolution import fitting

            config.image_grid_pinpoints = fitting(pinpoints, config.vision_config.image_size, self.settings.max_tiles)
        plain: Mapping[str, Any] = without_volatile(json.loads(config.to_json_string(use_diff=False)))
        return plain

    def example(self, folder: Path) -> None:
        """A LLaVA of two layers, and a tokenizer of bytes."""
        from graftwork_hf_vlm.example import write

        write(folder)

    def describe_towers(
        self, config: Mapping[str, Any], towers: Mapping[str, tuple[VisionTower[Any], Mapping[str, Any]]]
    ) -> Mapping[str, TowerOutput]:
        """None: the image encoder is the model's own."""
        return {}

    def sites(self, config: Mapping[str, Any], towers: Mapping[str, TowerOutput]) -> Sequence[AttentionSite]:
        """The language model's attention, and that of the image encoder where its heads are known."""
        built = config_from(config)
        return [self.site(name, part, built) for name, part in parts_of(built).items()]

    def bars_packing(self, config: Mapping[str, Any]) -> str:
        """Layers of other kinds than attention carry a state from token to token, and chunks of tokens are counted from a row's beginning."""
        kinds = getattr(config_from(config).get_text_config(), "layer_types", None) or []
        others = sorted({*kinds} - {"full_attention", "sliding_attention"})
        return (
            f"its layers of the kind {' and '.join(others)} would see one record's tokens from another"
            if others
            else ""
        )

    def site(self, name: str, part: Any, config: Any) -> AttentionSite:
        """One of both sites, which is transformers' own where Graftwork's kernels cannot compute it."""
        causal = name == "language"
        heads = next((value for key in HEADS if (value := getattr(part, key, None))), 0)
        width = next((value for key in WIDTHS if (value := getattr(part, key, None))), 0)
        why = "" if heads and width else "its configuration does not say how many heads it has"
        if not causal and makes_masks(part):
            why = "its images are one sequence, with a mask that it makes itself"
        if causal and (others := set(getattr(part, "layer_types", None) or ()) - PLAIN):
            named = ", ".join(sorted(kind for kind in others if kind.endswith("attention")))
            why = f"its layers choose what they see by means of their own ({named})" if named else why
        if self.settings.attention == "own":
            why = "the run file asks for it"
        return AttentionSite(
            name,
            head_dim=getattr(part, "head_dim", None) or (width // heads if heads else 0),
            heads=heads,
            kv_heads=getattr(part, "num_key_value_heads", None) or heads,
            causal=causal,
            padding=True,
            mask=causal and masks_of_its_own(part, config),
            dropout=getattr(part, "attention_dropout", None) or 0.0,
            softcap=getattr(part, "attn_logit_softcapping", None),
            own=f"transformers' {own_attention(config)}" if why else "",
            why_own=why,
        )

    def build(
        self,
        config: Mapping[str, Any],
        towers: Mapping[str, nn.Module],
        outputs: Mapping[str, TowerOutput],
        context: BuildContext,
    ) -> Structure:
        """transformers' model, under the names that transformers gives (see `graftwork_hf_vlm.model`)."""
        from graftwork_hf_vlm.model import build

        bound = {site.name for site in self.sites(config, {}) if not site.own}
        return build(config_from(config), bound, context)

    def tensors(
        self,
        weights: Mapping[str, LazyTensor],
        towers: Mapping[str, VisionTower[Any]],
        model: nn.Module | None = None,
    ) -> Mapping[str, LazyTensor]:
        """From published names to those of the built model, as transformers renames them."""
        from graftwork_hf_vlm.model import renamed

        return renamed(weights, model) if model is not None else weights

    def processor(
        self, config: Mapping[str, Any], folder: Path | None, outputs: Mapping[str, TowerOutput]
    ) -> Processor:
        """The processor, from the files of transformers' own in `folder`."""
        from graftwork_hf_vlm.processor import HfProcessor

        if folder is None:
            raise WeightsError(f"'{self.name}' needs a folder with a processor: set 'weights' or 'config'")
        return HfProcessor(folder, config_from(config), self.settings)

    def stand_in(
        self,
        config: Mapping[str, Any],
        folder: Path,
        outputs: Mapping[str, TowerOutput],
        source: Path | None = None,
    ) -> Processor:
        """The processor in `source`, with a tokenizer of bytes in place of its own (see `graftwork_hf_vlm.stand_in`)."""
        from graftwork_hf_vlm.stand_in import write

        write(source or folder, folder)
        return self.processor(config, folder, outputs)

    def import_from(
        self, folder: ExternalFolder, towers: Mapping[str, VisionTower[Any]], adapter: Adapter | None
    ) -> ImportPlan | None:
        """A whole model of transformers, or its configuration beside an adapter."""
        if "vision_config" not in folder.json("config.json"):
            return None  # before transformers is imported
        from graftwork_hf_vlm.external import read

        return read(self, folder, adapter)

    def reference(self, assembly: Assembly) -> Reference:
        """The assembled model as it is, which is of transformers' class."""
        from graftwork_hf_vlm.external import around

        model = assembly.model
        return around(model, model.config, lambda batch: model.logits(model(batch)))

    def open_elsewhere(self, folder: Path) -> Reference:
        """The model in a folder, by transformers."""
        from graftwork_hf_vlm.external import opened_by_transformers

        return opened_by_transformers(folder)

    def write(self, assembly: Assembly, folder: Path) -> None:
        """Write a folder as `save_pretrained` does, with the processor's and the configuration's files as they were."""
        from graftwork_hf_vlm.writing import write

        write(assembly, folder)


def without_volatile(value: Any) -> Any:
    """A configuration without what nothing is built from, at any depth."""
    if isinstance(value, dict):
        return {key: without_volatile(held) for key, held in value.items() if key not in VOLATILE}
    return [without_volatile(each) for each in value] if isinstance(value, list) else value


def config_from(table: Mapping[str, Any]) -> Any:
    """transformers' configuration, from what `HfVlm.configuration` returned."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**json.loads(json.dumps(table)))


def model_class(config: Any) -> Any:
    """transformers' class of a configuration; None where it has none for images and text."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)


def lacking(config: Any) -> str:
    """What a model of this configuration lacks of the means that all vision-language models of transformers 5 share, as a clause."""
    if (built := model_class(config)) is None:
        return "which is none that reads images and text"
    if not hasattr(built, "get_image_features") or "mm_encoder_outputs" not in known_to(built):
        return "which transformers gives no way to encode images apart"
    if getattr(config, "vision_config", None) is None or image_token_id(config) is None:
        return "whose configuration names no image encoder or no image token"
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        return "whose language model sees what comes after a token, and so the answer before it gives it"
    return ""


def known_to(model: Any) -> Mapping[str, Any]:
    """The parameters of a model's, or a class's, `forward`."""
    return inspect.signature(model.forward).parameters


def image_token_id(config: Any) -> int | None:
    """The token that stands for a piece of an image."""
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((value for value in found if value is not None), None)


def parts_of(config: Any) -> dict[str, Any]:
    """Site to the part of a configuration that describes it."""
    return {"language": config.get_text_config(), "vision": config.vision_config}


def masks_of_its_own(text: Any, config: Any) -> bool:
    """Whether the language model's masks are more than causal with padding: layers with a window, or images whose tokens see one another."""
    kinds = getattr(text, "layer_types", None) or []
    limited = any("sliding" in kind or "chunk" in kind for kind in kinds)
    together = getattr(text, "use_bidirectional_attention", None) or "token_type_ids" in known_to(model_class(config))
    return bool(limited or together or (not kinds and getattr(text, "sliding_window", None)))


def makes_masks(part: Any) -> bool:
    """Whether a model of this configuration makes masks for attention by code of its own, not by transformers' means for all models."""
    from transformers import MODEL_MAPPING

    home = inspect.getmodule(MODEL_MAPPING.get(type(part), None))
    made = inspect.getmembers(home, inspect.isfunction) if home else []
    return any("attention_mask" in name and home is inspect.getmodule(each) for name, each in made)


def own_attention(config: Any) -> str:
    """The implementation that transformers itself would choose among those without further packages."""
    return "sdpa" if getattr(model_class(config), "_supports_sdpa", False) else "eager"


@hookimpl
def model_architectures() -> list[type[ModelArchitecture[Any]]]:
    """The model of this plugin."""
    return [HfVlm]
