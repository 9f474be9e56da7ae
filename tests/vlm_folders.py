"""A folder as published ones of a vision-language model look, with random weights of a few thousand numbers under published names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork_hf_vlm.example import tokenizer

LANGUAGE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CLIP = {**VISION, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, "projection_dim": 32}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, "vision_use_head": False}
SQUARE = {"height": 56, "width": 56}
PARTS = "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() }}: {% endif %}"
    + PARTS.replace("IMAGE", "<image>\n")
    + " {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""As LLaVA-1.5's: it writes neither the first token nor one that ends an answer."""
UTTERANCES = (
    "<|begin_of_text|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    + PARTS.replace("IMAGE", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    + PARTS.replace("IMAGE", "<start_of_image>").replace("part['text']", "part['text'] | trim")
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What distinguishes one family's folder from another's."""

    special: tuple[str, ...]
    """The special tokens; padding comes first."""
    ends: tuple[str, ...]
    """The tokens that end an answer, the tokenizer's own first."""
    template: str
    config: str
    table: Callable[[Callable[[str], int]], dict[str, Any]]
    """The configuration, given the id of a token."""
    processor: str
    images: str
    labels: tuple[tuple[str, ...], ...]
    """What is to be learned of each of `vlm_trial.READ`, as a person reads the template."""
    begins: str = ""
    named: dict[str, str] = field(default_factory=dict)
    """The tokens that the processor asks its tokenizer for by name."""
    processing: dict[str, Any] = field(default_factory=dict)
    resizing: dict[str, Any] = field(default_factory=dict)


def write_family(family: Family, folder: Path) -> Path:
    """Write a family's folder, always with the same weights, by transformers' own `save_pretrained`."""
    import torch
    import transformers

    words = tokenizer(
        family.special,
        pad_token=family.special[0],
        eos_token=family.ends[0],
        bos_token=family.begins or None,
        extra_special_tokens=family.named,
    )
    id: Callable[[str], int] = words.convert_tokens_to_ids
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, family.config)(**family.table(id))
        model = transformers.AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # Gemma 3's projector starts at zero, and would show nothing.
                    parameter.normal_(0, 0.05)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[id(end) for end in family.ends], pad_token_id=0
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    files = {
        "processor_config.json": {"processor_class": family.processor, **family.processing},
        "preprocessor_config.json": {"image_processor_type": family.images, **family.resizing},
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(family.template)
    return folder
