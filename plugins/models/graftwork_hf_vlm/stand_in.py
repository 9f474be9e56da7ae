"""What stands in where a model's configurations are there and its tokenizer is not."""

from __future__ import annotations

import shutil
from pathlib import Path

from graftwork.errors import WeightsError
from graftwork_hf_vlm.example import byte_tokenizer
from graftwork_hf_vlm.loading import SETTINGS, default_of, settings_in, template_in

IMAGES, TOKENIZER = "preprocessor_config.json", "tokenizer_config.json"


def write(source: Path, folder: Path) -> None:
    """Write a processor's folder: what `source` holds, and instead of its tokenizer one of bytes, with the special tokens of `source`
    at their own ids, so that an image takes its own tokens. WeightsError where `source` holds too little for that."""
    settings = settings_in(source, TOKENIZER)
    special = {added["content"]: int(number) for number, added in settings.get("added_tokens_decoder", {}).items()}
    template = default_of(settings.get("chat_template"))
    there = {
        IMAGES: (source / IMAGES).is_file() or "image_processor" in settings_in(source, "processor_config.json"),
        f"{TOKENIZER} with its added_tokens_decoder": special,
        "the chat template": template or template_in(source),
    }
    if lacking := [name for name, found in there.items() if not found]:
        raise WeightsError(
            f"what an image takes is said by the files of a model's processor; put {', '.join(lacking)} beside the configuration"
        )
    for file in {file for pattern in SETTINGS for file in source.glob(pattern)}:
        shutil.copyfile(file, folder / file.name)
    named = {key: content(token) for key, token in settings.items() if key.endswith("_token") and content(token)}
    extra = settings.get("extra_special_tokens")
    words = byte_tokenizer(
        special,
        named.get("bos_token") if settings.get("add_bos_token") else None,
        **named,
        extra_special_tokens=extra if isinstance(extra, dict) else {},
        chat_template=template,
    )
    words.save_pretrained(folder)


def content(token: object) -> str:
    """A token's text, of what a tokenizer's settings say of it; empty for what is no token."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""
