"""The folder of a tiny Idefics3: configuration, tokenizer, chat template, image processor, and random weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    Idefics3Config,
    PreTrainedTokenizerFast,
)

SIDE, PATCH, SHUFFLE = 64, 8, 4
"""Pixels of an image's side and of a patch's, and how many patches' sides become the side of one image token."""
IMAGE_TOKENS = (SIDE // PATCH // SHUFFLE) ** 2
VOCABULARY = 384
RANGE = {"initializer_range": 0.05}
"""Models of this width begin better with larger numbers than transformers' usual 0.02."""
VISION = {**RANGE, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
LANGUAGE = {
    **RANGE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
PAD, BEGIN, END, AROUND, IMAGE, WHOLE = SPECIAL = (
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
)
TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def write(folder: Path, texts: Sequence[str]) -> None:
    """Write all of it, by transformers' own means; `texts` are what the tokenizer is made of."""
    words = tokenizer(texts)
    id = words.convert_tokens_to_ids
    config = Idefics3Config(
        text_config={
            **LANGUAGE,
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "pad_token_id": id(PAD),
            "bos_token_id": id(BEGIN),
            "eos_token_id": id(END),
            "tie_word_embeddings": True,
        },
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH},
        image_token_id=id(IMAGE),
        pad_token_id=id(PAD),
        scale_factor=SHUFFLE,
        tie_word_embeddings=True,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=id(END), pad_token_id=id(PAD), bos_token_id=id(BEGIN))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    side = {"longest_edge": SIDE}
    images = {"size": side, "max_image_size": side, "do_image_splitting": False}
    files = {
        "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": IMAGE_TOKENS},
        "preprocessor_config.json": {"image_processor_type": "Idefics3ImageProcessor", **images},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that it writes any text; the words of `texts` are one token each."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [*texts, "User: Assistant:"],
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[*SPECIAL], initial_alphabet=alphabet),
    )
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, SPECIAL.index(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={
            "image_token": IMAGE,
            "fake_image_token": AROUND,
            "global_image_token": WHOLE,
            "end_of_utterance_token": END,
        },
    )
