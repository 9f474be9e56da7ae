"""A tiny language model's folder, for tests: a configuration, and a tokenizer of bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graftwork_mgm.backbones import TEMPLATES, Backbone


def write(backbone: Backbone, folder: Path) -> None:
    """Write config.json and the tokenizer's files, with the special tokens of all prompts."""
    written = "".join(template.user for template in TEMPLATES.values())
    special = ["<pad>", "<eos>", "<bos>", *dict.fromkeys(re.findall(r"<\S+?>", written))]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "additional_special_tokens": special[3:]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = {
        "model_type": backbone.model_types[0],
        "vocab_size": len(letters),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "image_size_aux": 64,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
