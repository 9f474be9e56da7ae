"""Settings that other code wrote: which of them nobody here understands, so that none is lost in silence."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from graftwork.errors import WeightsError

OF_TRANSFORMERS = frozenset(
    {
        *(
            "architectures",
            "auto_map",
            "model_type",
            "name_or_path",
            "_name_or_path",
            "_model_name_or_path",
            "_commit_hash",
            "transformers_version",
        ),
        *("torch_dtype", "dtype", "use_bfloat16", "torchscript", "attn_implementation", "_attn_implementation"),
        *("_attn_implementation_autoset", "_flash_attn_2_enabled", "use_flash_attention_2", "gradient_checkpointing"),
        *("num_logits_to_keep", "model_max_length"),
        *("tf_legacy_loss", "tokenizer_class", "transformers.js_config", "unsloth_version", "unsloth_fixed"),
        *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "use_cache"),
        *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "prefix"),
        # How text was to be generated, which once stood in every model's configuration.
        *("bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample"),
        *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
        *(
            "forced_eos_token_id",
            "length_penalty",
            "max_length",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
        ),
        *("num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty"),
        *(
            "cls_token_id",
            "mask_token_id",
            "return_dict_in_generate",
            "sep_token_id",
            "unk_token_id",
            "suppress_tokens",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        ),
    }
)
"""Keys of transformers' configurations that say nothing of what a built model computes from its inputs."""


def unknown_settings(
    settings: Mapping[str, Any],
    understood: Container[str],
    defaults: Callable[[], Mapping[str, Any]] = dict,
) -> list[str]:
    """The keys that nothing here follows: not `understood`, not what their library takes by default, and with a value.

    `understood` are those that are followed or known to have no effect. `defaults` is asked only where that leaves some.
    """
    odd = {key: value for key, value in settings.items() if key not in understood and value is not None}
    known = defaults() if odd else {}
    return sorted(key for key, value in odd.items() if (known[key] != value if key in known else not is_empty(value)))


def is_empty(value: Any) -> bool:
    """Whether a setting's value is one that switches nothing on."""
    return value is None or value is False or (isinstance(value, str | list | Mapping) and not value)


def refuse_unknown_settings(
    file: Path,
    settings: Mapping[str, Any],
    understood: Container[str],
    reader: str,
    defaults: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """WeightsError that names the settings of a file which its reader does not follow, as `unknown_settings` finds them."""
    if odd := unknown_settings(settings, understood, defaults):
        named = ", ".join(f"{key} = {settings[key]!r}"[:80] for key in odd[:5])
        raise WeightsError(
            f"'{file}' sets {named}, which '{reader}' does not know and would ignore; name another folder, or remove what has no "
            "effect"
        )


def refuse_quantized(file: Path, settings: Mapping[str, Any]) -> None:
    """WeightsError where a model's configuration, or that of one of its parts, says that its weights are stored quantized."""
    if not isinstance(how := settings.get("quantization_config"), Mapping) or not how:
        for part in settings.values():
            if isinstance(part, Mapping):
                refuse_quantized(file, part)
        return
    method = how.get("quant_method") or "a method that it does not name"
    bits = next((f" in {n} bits" for n, key in ((4, "load_in_4bit"), (8, "load_in_8bit")) if how.get(key)), "")
    bits = bits or (f" in {how['bits']} bits" if how.get("bits") else "")
    raise WeightsError(
        f"'{file}' has a quantization_config: the weights beside it are quantized by {method}{bits}, and only whole ones can be "
        "read; name the folder that they were made from"
    )
