"""The language models that MGM is built on, and their prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Template:
    """How a conversation is written."""

    name: str
    user: str
    """A user's turn, with `{}` for its text, up to where the answer begins."""
    answer: str
    """An answer, with `{}` for its text, up to the token that ends it."""
    end: str | None = None
    """The token that ends an answer; by default the tokenizer's end-of-sequence token."""
    between: str = ""
    """What stands between the end of an answer and the next turn."""
    system: str = ""
    """What stands before the first turn of a conversation without a system turn."""
    system_turn: str | None = None
    """A system turn, with `{}` for its text; None where the template has no place for one."""
    begins: bool = True
    """Whether the beginning-of-sequence token stands first always, or only where the tokenizer puts it there itself."""


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="gemma",
            user="<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
            answer="{}<end_of_turn>\n",
        ),
        Template(
            name="vicuna",
            system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. ",
            system_turn="{} ",
            user="USER: {} ASSISTANT:",
            answer=" {}",
        ),
        Template(
            name="chatml",
            system_turn="<|im_start|>system\n{}<|im_end|>\n",
            user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
            answer="{}",
            end="<|im_end|>",
            between="\n",
            begins=False,
        ),
    )
}


@dataclass(frozen=True)
class Backbone:
    """A family of language models in transformers."""

    model: str
    """The class without a head."""
    causal: str
    """The class with one."""
    config: str
    tokenizer: str
    """The class that reads a folder with a sentencepiece model only."""
    model_types: tuple[str, str]
    """In a config.json: the plain language model's, and MGM's."""
    architecture: str
    """MGM's class, as published folders name it."""
    tied: bool
    """Whether the head is the embeddings where a configuration does not say."""
    template: str
    """The template that its published models were trained with."""
    folder_name: str
    """What upstream's loader wants in the name of a folder to take it for this family."""

    def defaults(self) -> dict[str, Any]:
        """The settings that transformers declares for this family, with their defaults."""
        import transformers

        declared: dict[str, Any] = getattr(transformers, self.config)().to_dict()
        return declared


GEMMA = Backbone(
    model="GemmaModel",
    causal="GemmaForCausalLM",
    config="GemmaConfig",
    tokenizer="GemmaTokenizer",
    model_types=("gemma", "mgm_gemma"),
    architecture="MGMGemmaForCausalLM",
    tied=True,
    template="gemma",
    folder_name="'mgm' and '2b' in it, and not '8x7b'",
)
LLAMA = Backbone(
    model="LlamaModel",
    causal="LlamaForCausalLM",
    config="LlamaConfig",
    tokenizer="LlamaTokenizer",
    model_types=("llama", "mgm"),
    architecture="MGMLlamaForCausalLM",
    tied=False,
    template="vicuna",
    folder_name="'mgm' in it, and neither '2b' nor '8x7b'",
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
OF_MGM = frozenset(
    {
        *("mm_vision_tower", "mm_vision_tower_aux", "mm_hidden_size", "mm_hidden_size_aux", "mm_vision_select_layer"),
        *("mm_vision_select_feature", "mm_use_im_start_end", "optimize_vision_tower", "optimize_vision_tower_aux"),
        *("image_size_aux", "mm_projector_type", "image_aspect_ratio", "image_grid", "image_global"),
        *("conversation_template", "tie_word_embeddings", "unfreeze_mm_vision_tower"),
    }
)
"""What a published folder's config.json says besides, and is followed."""
WITHOUT_EFFECT = frozenset(
    {
        # Of the training that wrote a folder, and of the paths that it had.
        *("freeze_mm_mlp_adapter", "tune_mm_mlp_adapter", "mm_projector_lr", "pretrain_mm_mlp_adapter", "drop_path"),
        *("vision_tower", "vision_tower_aux", "model_path", "tokenizer_padding_side"),
        *("tokenizer_model_max_length", "mm_use_im_patch_token"),
        # Read by nothing that makes an MGM: kept from LLaVA, or said twice.
        *("mm_patch_merge_type", "mm_vision_tower_lr"),
        *("use_mm_proj", "image_grid_pinpoints", "image_processor", "max_sequence_length"),
        *("is_llama_config", "pretraining_tp", "cls_token_id"),
    }
)
"""Keys that change nothing of what a trained model computes."""
