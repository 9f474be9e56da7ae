"""The same models as transformers has them: what an import is compared with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from graftwork.contracts import Assembly, Batch, Reference
from graftwork.errors import WeightsError
from graftwork.weights import read_json
from graftwork_mgm.backbones import Backbone


def around(backbone: Backbone, assembly: Assembly) -> Reference:
    """transformers' model with a head around the assembled one's modules, as upstream's class is: PEFT libraries know where its
    embeddings and its head are, and that they are one tensor where they are."""
    built = assembly.model
    with torch.device("meta"):
        whole = getattr(transformers, backbone.causal)(built.model.config)
    whole.model = built.model
    if hasattr(built, "lm_head"):
        whole.lm_head = built.lm_head
    else:
        whole.lm_head.weight = built.model.embed_tokens.weight
    whole.eval()
    return Reference(whole, lambda batch: whole.lm_head(built(batch)))


@contextmanager
def silent() -> Iterator[None]:
    """While entered, transformers draws no progress, and does not say that a folder of MGM is one."""
    log = logging.getLogger("transformers")
    level, drawn = log.level, transformers_logging.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(level)
        if drawn:
            transformers_logging.enable_progress_bar()


def opened_by_transformers(backbone: Backbone, folder: Path) -> Reference:
    """The language model of a folder as transformers opens it in fp32; WeightsError says why it cannot."""
    name = f"transformers {transformers.__version__}"
    kind = getattr(transformers, backbone.causal)
    try:
        with silent():
            config = kind.config_class.from_pretrained(folder)
            # As the folder says: transformers 5 takes Gemma's "gelu" for the tanh approximation.
            config.hidden_act = read_json(folder / "config.json").get("hidden_act", config.hidden_act)
            model, info = kind.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # whatever a library raises for a folder that it cannot open
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise WeightsError(f"{name} cannot open '{folder}' ({said[:200]})") from error
    if missing := sorted(info["missing_keys"]):
        raise WeightsError(f"{name} misses '{missing[0]}' in '{folder}'")
    model.eval()

    def logits(batch: Batch) -> Any:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits

    return Reference(model, logits, (name,), reads_images=False)
