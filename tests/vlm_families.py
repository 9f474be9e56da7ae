"""Folders as published ones of vision-language models look, with random weights of a few thousand numbers under published names."""

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
    begins: str = ""
    named: dict[str, str] = field(default_factory=dict)
    """The tokens that the processor asks its tokenizer for by name."""
    processing: dict[str, Any] = field(default_factory=dict)
    resizing: dict[str, Any] = field(default_factory=dict)


CLIP = {**VISION, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, "projection_dim": 32}
FAMILIES = {
    "llava": Family(
        special=("<pad>", "<s>", "</s>", "<image>"),
        begins="<s>",
        ends=("</s>",),
        named={"image_token": "<image>"},
        template=ENDLESS,
        config="LlavaConfig",
        table=lambda id: {
            "text_config": {**LANGUAGE, "model_type": "llama", "vocab_size": 320},
            "vision_config": CLIP,
            "image_token_index": id("<image>"),
            "image_seq_length": 16,
        },
        processor="LlavaProcessor",
        processing={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        images="CLIPImageProcessor",
        resizing={"size": {"shortest_edge": 56}, "crop_size": SQUARE},
    ),
    "llava_next": Family(
        special=("<pad>", "<s>", "</s>", "<image>"),
        begins="<s>",
        ends=("</s>",),
        named={"image_token": "<image>"},
        template=ENDLESS,
        config="LlavaNextConfig",
        table=lambda id: {
            "text_config": {**LANGUAGE, "model_type": "llama", "vocab_size": 320},
            "vision_config": CLIP,
            "image_token_index": id("<image>"),
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
        },
        processor="LlavaNextProcessor",
        processing={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        images="LlavaNextImageProcessor",
        resizing={
            "size": {"shortest_edge": 56},
            "crop_size": SQUARE,
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
        },
    ),
    "qwen2_5_vl": Family(
        special=(
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
            *("<|image_pad|>", "<|video_pad|>"),
        ),
        ends=("<|im_end|>", "<|endoftext|>"),
        template=CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
        config="Qwen2_5_VLConfig",
        table=lambda id: {
            "text_config": {
                **LANGUAGE,
                "vocab_size": 320,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
                "bos_token_id": None,
                "eos_token_id": id("<|im_end|>"),
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "patch_size": 14,
                "out_hidden_size": 64,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            "tie_word_embeddings": True,
            "image_token_id": id("<|image_pad|>"),
            "video_token_id": id("<|video_pad|>"),
            "vision_start_token_id": id("<|vision_start|>"),
            "vision_end_token_id": id("<|vision_end|>"),
        },
        processor="Qwen2_5_VLProcessor",
        images="Qwen2VLImageProcessor",
        resizing={"min_pixels": 56 * 56, "max_pixels": 112 * 112},
    ),
    "idefics3": Family(
        special=(
            *("<|end_of_text|>", "<|begin_of_text|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"),
            *("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))),
        ),
        begins="<|begin_of_text|>",
        ends=("<end_of_utterance>",),
        named={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        template=UTTERANCES,
        config="Idefics3Config",
        table=lambda id: {
            "text_config": {**LANGUAGE, "model_type": "llama", "vocab_size": 320, "pad_token_id": 0},
            "vision_config": {**VISION, "image_size": 64, "patch_size": 8},
            "image_token_id": id("<image>"),
            "scale_factor": 4,
            "tie_word_embeddings": True,
        },
        processor="Idefics3Processor",
        processing={"image_seq_len": 4},
        images="Idefics3ImageProcessor",
        resizing={
            "size": {"longest_edge": 128},
            "max_image_size": {"longest_edge": 64},
            "do_image_splitting": True,
        },
    ),
    "gemma3": Family(
        special=(
            *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
            *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        ),
        begins="<bos>",
        ends=("<eos>", "<end_of_turn>"),
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        template=TURNS,
        config="Gemma3Config",
        table=lambda id: {
            "text_config": {
                **LANGUAGE,
                "vocab_size": 320,
                "head_dim": 16,
                "sliding_window": 16,
                "sliding_window_pattern": 2,
                "query_pre_attn_scalar": 16,
            },
            "vision_config": {
                **VISION,
                "model_type": "siglip_vision_model",
                "image_size": 56,
                "patch_size": 14,
                "vision_use_head": False,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": id("<start_of_image>"),
            "eoi_token_index": id("<end_of_image>"),
            "image_token_index": id("<image_soft_token>"),
        },
        processor="Gemma3Processor",
        processing={"image_seq_length": 4},
        images="Gemma3ImageProcessor",
        resizing={"size": SQUARE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
}


def write(name: str, folder: Path) -> Path:
    """Write a family's folder, always with the same weights, by transformers' own `save_pretrained`."""
    import torch
    import transformers

    family = FAMILIES[name]
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
