"""How fast answers are: by how many are asked at a time, and beside `generate` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from report import Report
from subject import DEVICE, LORA, Size, Subject, build, peak_gib, records, seconds

from graftwork.contracts import Assembly, Encoded, batch_of
from graftwork.evaluate.generation import Answers, answer, answering

NEW_TOKENS = 32


def ask(size: Size, subject: Subject, report: Report) -> Assembly:
    """Answers of `NEW_TOKENS` tokens by batch size and kernel; returns the model."""
    assembly = build(subject.plan(peft=LORA, attention={"prefer": ["sdpa"]}))
    sizes = (1, 4) if size.tiny else (1, 8, 64)
    for count in sizes:
        prompts = records(assembly, subject, count, prompts=True)
        report.take(f"{subject.name}, {count} at a time", lambda p=prompts: timed(assembly, p), needs=8)
    return assembly


def timed(assembly: Assembly, prompts: Sequence[Encoded]) -> dict[str, float | None]:
    """Seconds to the first token, milliseconds of each further one, and answers a second."""
    pixels = batch_of(assembly.processor, prompts).to(assembly.device).pixels
    with answering(assembly):
        looking = seconds(lambda: assembly.model.encode_images(pixels), times=2)
        features = assembly.model.encode_images(pixels)

    def answers(most: int) -> Answers:
        return answer(assembly, prompts, max_new_tokens=most, features=features)

    made = max(answers(NEW_TOKENS).tokens)
    first, whole = (seconds(lambda most=most: answers(most), times=2) for most in (1, NEW_TOKENS))
    return {
        "images, s": round(looking, 4),
        "first token, s": round(first, 4),
        "each further token, ms": round((whole - first) / (made - 1) * 1e3, 3) if made > 1 else None,
        "tokens of the longest": made,
        "answers/s": round(len(prompts) / (looking + whole), 3),
        "peak GiB": round(peak_gib(), 2),
    }


def answers(size: Size, report: Report) -> None:
    """MGM-2B, which transformers does not know."""
    ask(size, size.mgm, report)


def vlm_answers(size: Size, report: Report) -> None:
    """A vision-language model of Hugging Face, and its own `generate` on the same prompts."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    assembly = ask(size, size.vlm, report)
    config = AutoConfig.from_pretrained(size.vlm.model["config"])
    with torch.device(DEVICE):
        peer = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    image = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    for count in (1, 4) if size.tiny else (1, 8):
        prompts = records(assembly, size.vlm, count, prompts=True)

        def theirs(prompts: Sequence[Encoded] = prompts) -> dict[str, float]:
            batch = batch_of(assembly.processor, prompts, side="left").to(assembly.device)
            inputs: dict[str, Any] = {
                "input_ids": batch.input_ids.masked_fill(batch.image_token_mask, image),
                "attention_mask": batch.attention_mask.long(),
                **{name: value for name, value in batch.pixels.items() if name != "image_tokens"},
                **{name: value for name, value in batch.token_fields.items() if name != "position_ids"},
            }
            options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
            with torch.inference_mode():
                taken = seconds(lambda: peer.generate(**inputs, **options), times=2)
            return {"answers/s": round(len(prompts) / taken, 3)}

        report.take(f"{size.vlm.name}, {count} at a time: generate of transformers", theirs, needs=8)
