"""The parts of `parts.py` as one would write them with PyTorch, transformers and safetensors alone: what `bench.py` compares with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from inputs import Timed, conversations, lora_blocks, qwen_encoder


def opening(folder: Path) -> Timed:
    """safetensors' `load_file`."""
    from safetensors.torch import load_file

    return lambda: [*load_file(folder / "model.safetensors").values()]


def hashing(folder: Path) -> Timed:
    """hashlib, each time."""
    from hashlib import file_digest

    def timed() -> Any:
        for _ in range(4):
            with (folder / "model.safetensors").open("rb") as file:
                found = file_digest(file, "sha256").hexdigest()
        return found

    return timed


def collation(folder: Path) -> Timed:
    """`pad_sequence` on tensors made of lists."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokens, seen = list(range(1024)), [*[False] * 100, *[True] * 576, *[False] * 348]
    labels = [*[-100] * 700, *range(324)]

    def timed() -> Any:
        for _ in range(20):
            ids, masks, wanted = (
                pad_sequence([torch.tensor(values[n:]) for n in range(8)], batch_first=True, padding_value=filler)
                for values, filler in ((tokens, 0), (seen, False), (labels, -100))
            )
            real = pad_sequence([torch.ones(1024 - n, dtype=torch.bool) for n in range(8)], batch_first=True)
        return [ids, real, masks, wanted]

    return timed


def image(folder: Path) -> Timed:
    """transformers' CLIPImageProcessor (Pillow) at both sizes, each from the file's pixels; it crops instead of padding."""
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    shared = {"image_mean": (0.48, 0.46, 0.41), "image_std": (0.27, 0.26, 0.28)}
    processors = [
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **shared)
        for side in (768, 336)
    ]

    def timed() -> Any:
        for _ in range(5):
            with Image.open(folder / "image.jpg") as opened:
                seen = opened.convert("RGB")
            made = [each(seen, return_tensors="pt")["pixel_values"] for each in processors]
        return made

    return timed


def mining(folder: Path) -> Timed:
    """As the paper writes it (arXiv:2403.18814): keys and values projected at every pixel, with PyTorch's attention."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)
    widths, low = (192, 384, 768, 1536), 1024
    query, key, value = (
        nn.Sequential(nn.LayerNorm(taken), nn.Linear(taken, low)) for taken in (low, sum(widths), sum(widths))
    )
    coarse = torch.randn(64, 1, low)
    fine = [torch.randn(1, width, 64 >> level, 64 >> level) for level, width in enumerate(widths)]

    def timed() -> Any:
        maps = [functional.interpolate(each, (64, 64), mode="bilinear", align_corners=False) for each in fine]
        joined = torch.cat(maps, 1).unfold(2, 8, 8).unfold(3, 8, 8)
        pixels = joined.permute(0, 2, 3, 4, 5, 1).reshape(64, 64, sum(widths))
        tokens = coarse + functional.scaled_dot_product_attention(query(coarse), key(pixels), value(pixels))
        tokens.square().mean().backward()
        return tokens

    return timed


def optimizer(folder: Path) -> Timed:
    """torch.optim.AdamW as it is by default."""
    import torch

    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(16, 576 if number % 3 else 1536)) for number in range(424)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    adam = torch.optim.AdamW(parameters)

    def timed() -> Any:
        adam.state.clear()
        for _ in range(10):
            adam.step()
        return parameters

    return timed


def lengths(folder: Path) -> Timed:
    """transformers' `apply_chat_template`, conversation by conversation, which leaves images out."""
    from transformers import AutoTokenizer

    records, words = conversations(folder), AutoTokenizer.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    said = [
        [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in record.turns]
        for record in records
    ]
    return lambda: [len(words.apply_chat_template(each, chat_template=template)["input_ids"]) for each in said]


def pixels(folder: Path) -> Timed:
    """`torch.cat` of normalised pixels in fp32."""
    import torch

    seen = [(torch.rand(1, 3, 768, 768), torch.rand(1, 3, 336, 336)) for _ in range(8)]
    return lambda: [torch.cat(each) for each in zip(*seen, strict=True)]


def windows(folder: Path) -> Timed:
    """transformers with `sdpa`, which calls attention for each window."""
    return qwen_encoder("sdpa")[1]


def lora(folder: Path) -> Timed:
    """peft's LoRA, with its matrices in fp32."""

    def adapt(blocks: Any, names: list[str]) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=names), blocks)
        for name, parameter in blocks.named_parameters():
            parameter.requires_grad_("lora_" in name)

    return lora_blocks(adapt)


REFERENCES: dict[str, Callable[[Path], Timed]] = {
    part.__name__: part
    for part in (opening, hashing, collation, lengths, image, pixels, mining, optimizer, windows, lora)
}
