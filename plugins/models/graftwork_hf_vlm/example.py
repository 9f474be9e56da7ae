"""A tiny vision-language model's folder, for `graftwork check`: configurations, and a tokenizer of bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlavaConfig, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
LANGUAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"image_size": 28, "patch_size": 14, "projection_dim": 32}


def tokenizer(special: tuple[str, ...], **named: Any) -> PreTrainedTokenizerFast:
    """A token for each byte after the special ones; what begins a text is put there where it has a name."""
    return byte_tokenizer({token: number for number, token in enumerate(special)}, named.get("bos_token"), **named)


def byte_tokenizer(special: Mapping[str, int], first: str | None, **named: Any) -> PreTrainedTokenizerFast:
    """The special tokens with their ids, and a token for each byte with the lowest ids that are left; `first` begins each text."""
    taken, letters = {*special.values()}, sorted(pre_tokenizers.ByteLevel.alphabet())
    free = [number for number in range(len(special) + len(letters)) if number not in taken]
    made = Tokenizer(models.BPE(vocab={**special, **dict(zip(letters, free, strict=False))}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    if first:
        made.post_processor = processors.TemplateProcessing(f"{first} $A", special_tokens=[(first, special[first])])
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def write(folder: Path) -> None:
    """Write what `hf-vlm` reads of a LLaVA without weights."""
    words = tokenizer(
        SPECIAL,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>"},
    )
    words.save_pretrained(folder)
    config = LlavaConfig(
        text_config={**LANGUAGE, "model_type": "llama", "vocab_size": len(words), "num_key_value_heads": 1},
        vision_config={**LANGUAGE, **VISION, "model_type": "clip_vision_model"},
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    config.save_pretrained(folder)
    files = {
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
