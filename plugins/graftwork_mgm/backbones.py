"""The language models that MGM is built on, and their prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """How a conversation is written; the tokenizer's end-of-sequence token follows every answer."""

    user: str
    """A user's turn, with `{}` for its text, up to where the answer begins."""
    close: str
    """What stands between an answer and the end of the sequence."""


@dataclass(frozen=True)
class Backbone:
    """A family of language models in transformers."""

    model: str
    """The class without a head."""
    config: str
    tokenizer: str
    """The class that reads a folder with a sentencepiece model only."""
    model_types: tuple[str, str]
    """In a config.json: the plain language model's, and MGM's."""
    architecture: str
    """MGM's class, as published folders name it."""
    tied: bool
    """Whether the head is the embeddings."""
    template: Template


GEMMA = Backbone(
    model="GemmaModel",
    config="GemmaConfig",
    tokenizer="GemmaTokenizer",
    model_types=("gemma", "mgm_gemma"),
    architecture="MGMGemmaForCausalLM",
    tied=True,
    template=Template(
        user="<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        close="<end_of_turn>\n",
    ),
)

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""What of a language model's config.json says how it computes."""
