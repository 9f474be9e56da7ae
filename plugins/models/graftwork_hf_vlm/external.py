"""Folders that other code wrote about a vision-language model of transformers: what is in them, and how transformers opens them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

from graftwork.contracts import Adapter, Batch, ExternalFolder, ImportPlan, Reference
from graftwork.errors import WeightsError
from graftwork_hf_vlm import image_token_id, known_to
from graftwork_hf_vlm.model import POSITIONS, without_counts

if TYPE_CHECKING:
    from graftwork_hf_vlm import HfVlm

SIZES = ("model_type", "hidden_size", "embed_dim", "intermediate_size", "num_hidden_layers", "depth", "vocab_size")
"""What says of a part of a configuration that weights fit it."""
PROCESSOR = {"tokenizer.json", "preprocessor_config.json"}


def read(model: HfVlm, folder: ExternalFolder, adapter: Adapter | None) -> ImportPlan | None:
    """What is in a folder with the configuration of such a model, which is a whole one or has an adapter's beside it."""
    config = folder.json("config.json")
    kind = config.get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or "vision_config" not in config:
        return None
    refused, shards = "", list[Path]()
    own: Mapping[str, Any] = {}
    try:
        shards = [] if adapter else folder.shards()
        own = model.configuration(folder.path)
    except WeightsError as error:
        refused = error.sentence
    if not shards and not adapter:
        refused = (
            refused
            or "it holds no weights at all, neither a model's nor an adapter's; copy them from where it was trained"
        )

    def configure(base: Path | None) -> Mapping[str, Any]:
        if base is not None and (odd := [*differing(own, model.configuration(base))]):
            raise WeightsError(f"its {odd[0]}")
        return own

    whole = {name: tensor for file in shards for name, tensor in folder.tensors(file.name).items()}
    return ImportPlan(
        description=f"a whole '{kind}' model of transformers, in {len(shards)} file{'s' * (len(shards) != 1)}"
        if shards
        else f"an adapter on a '{kind}' model of transformers",
        configure=configure,
        base=str(config.get("_name_or_path") or ""),
        tensors=whole or (adapter.others if adapter else {}),
        is_full_model=bool(shards),
        vocabulary=(own.get("text_config") or {}).get("vocab_size") or 0,
        has_processor=folder.files.issuperset(PROCESSOR) and not adapter,
        refused=refused,
    )


def differing(own: Mapping[str, Any], theirs: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """The sizes in which a configuration is not that of the base, a clause each."""
    for key, value in own.items():
        other = theirs.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from differing(value, other, f"{place}{key}.")
        elif key in SIZES and value != other:
            yield f"{place}{key} is {other}, and the folder was trained with {value}"


def opened_by_transformers(folder: Path) -> Reference:
    """The model in a folder as transformers opens it in fp32; WeightsError says why it cannot."""
    name, shown = f"transformers {transformers.__version__}", logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a library raises for a folder that it cannot open
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise WeightsError(f"{name} cannot open '{folder}' ({said[:200]})") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(f"{name} misses '{missing[0]}' in '{folder}'")
    model.eval()
    known = known_to(model.base_model)

    def logits(batch: Batch) -> Any:
        told = {key: value for key, value in batch.token_fields.items() if key in known and key != POSITIONS}
        return model(
            input_ids=batch.input_ids.masked_fill(batch.image_token_mask, image_token_id(model.config) or 0),
            attention_mask=batch.attention_mask.long(),
            **told,
            **without_counts(batch.pixels),
        ).logits

    return around(model, model.config, logits, name)


def around(model: nn.Module, config: Any, logits: Callable[[Batch], Tensor], *readers: str) -> Reference:
    """What an import is compared with: tokens that stand for images, videos or sound are no text."""
    media = (f"{medium}_token_{key}" for medium in ("image", "video", "audio") for key in ("id", "index"))
    reserved = (getattr(config, name, None) for name in media)
    return Reference(model, logits, readers, reserved=tuple(token for token in reserved if token is not None))
