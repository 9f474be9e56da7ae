"""What parts of the work are measured on: records, images, and pieces of models, which `parts.py` and `references.py` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Timed = Callable[[], Any]
"""What is timed; it returns tensors, numbers or lists of them, which both versions should have alike, or what makes them, which is not timed."""


def conversations(folder: Path) -> list[Any]:
    """256 records of one to four questions about an image; the folder becomes a LLaVA's with a tokenizer of 4,000 words."""
    import random
    from io import BytesIO

    from PIL import Image as PILImage
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    from graftwork.contracts import Image, Record, Turn
    from graftwork_hf_vlm import example

    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(5000)]

    def text(most: int) -> str:
        return " ".join(words[int(len(words) * draw.random() ** 3)] for _ in range(draw.randint(5, most)))

    def record(number: int) -> Record:
        file = BytesIO()
        PILImage.new("L", (600 + number % 5, 400)).save(file, "PNG")
        said = [text(most) for _ in range(draw.randint(1, 4)) for most in (30, 80)]
        turns = [Turn("assistant" if place % 2 else "user", each) for place, each in enumerate(said)]
        turns[0] = Turn("user", f"<image>\n{turns[0].text}")
        return Record(str(number), tuple(turns), (Image(data=file.getvalue()),))

    example.write(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=[*example.SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text(200) for _ in range(500)), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return [record(number) for number in range(256)]


def mgm_images(folder: Path) -> tuple[Any, Any]:
    """MGM-2B's way with images, of 768 and 336 pixels, and a JPEG of 1,024 x 768."""
    import numpy
    from PIL import Image as PILImage

    from graftwork.contracts import Image, PixelSettings, TowerOutput
    from graftwork_mgm.processor import Images

    noise = numpy.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=numpy.uint8)
    PILImage.fromarray(noise).resize((1024, 768), PILImage.Resampling.BICUBIC).save(folder / "image.jpg")
    low, high = (
        TowerOutput((8,), ((side, side),), PixelSettings(size, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)))
        for side, size in ((24, 336), (24, 768))
    )
    return Images(low, high, "pad", 1, False), Image(folder / "image.jpg")


def qwen_encoder(attention: str) -> tuple[Any, Timed]:
    """Four layers of Qwen2.5-VL's image encoder, a quarter as wide, with an implementation of attention; and a pass over an image of 1,008 x 756
    pixels with its gradients."""
    import torch
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    torch.manual_seed(0)
    widths = {"hidden_size": 320, "intermediate_size": 855, "num_heads": 4}
    config = qwen.Qwen2_5_VLVisionConfig(depth=4, fullatt_block_indexes=[3], out_hidden_size=512, **widths)
    encoder = qwen.Qwen2_5_VisionTransformerPretrainedModel(config)
    config._attn_implementation = attention
    grid, pixels = torch.tensor([[1, 54, 72]]), torch.randn(54 * 72, 3 * 2 * 14 * 14)

    def timed() -> Any:
        encoder.zero_grad()
        (found := encoder(pixels, grid_thw=grid).pooler_output).square().mean().backward()
        return [found, encoder.blocks[0].attn.qkv.weight.grad]

    return encoder, timed


def lora_blocks(adapt: Callable[[Any, list[str]], Any]) -> Timed:
    """Three blocks of seven linear layers as wide as SmolLM2-135M's that are adapted, and a pass over 512 tokens in bf16 with its gradients."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    sizes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    blocks = nn.ModuleList(nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes) for _ in range(3))
    blocks.to(torch.bfloat16).requires_grad_(False)
    adapt(blocks, [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear)])
    trained = [parameter for parameter in blocks.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = torch.randn(parameter.shape) * 0.02
    tokens = torch.randn(512, 576).bfloat16()

    def timed() -> Any:
        blocks.zero_grad()
        hidden = tokens
        with torch.autocast("cpu", torch.bfloat16):
            for q, k, v, o, gate, up, down in blocks:  # type: ignore[misc]
                hidden = hidden + o(q(hidden)) + (k(hidden) + v(hidden)).sum(-1, keepdim=True)
                hidden = hidden + down(gate(hidden) * up(hidden))
        hidden.float().square().mean().backward()
        return [hidden.float(), *(each.grad for each in trained)]

    return timed
