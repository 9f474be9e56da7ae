"""Tiny models with random weights, saved in the layouts in which the models of Data-Juicer's operators are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZE = 16
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = {"size": {"height": SIZE, "width": SIZE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _byte_level(folder: Path, specials: dict[str, str], ends: str, name: str, size: int = 0) -> int:
    """Write a byte-level tokenizer of the kind that CLIP and OPT have; the size of its vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = list(dict.fromkeys([*specials.values(), *letters, *(letter + ends for letter in letters if ends)]))
    words += [f"word{number}" for number in range(len(words), size)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**specials, "tokenizer_class": name, "model_max_length": 77})
    )
    return len(words)


def tokenizer(folder: Path) -> Path:
    """As `EleutherAI/pythia-6.9b-deduped`, for token_num_filter, which reads nothing else of it."""
    specials = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    words = _byte_level(folder, specials, "", "GPT2Tokenizer")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": words}))
    return folder


def _preprocessor(folder: Path, kind: str, **others: Any) -> None:
    content = {"image_processor_type": kind, **IMAGES, **others}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def clip(folder: Path) -> Path:
    """As `openai/clip-vit-base-patch32`, for image_text_similarity_filter."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    specials = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    specials["pad_token"] = "<|endoftext|>"
    words = _byte_level(folder, specials, "</w>", "CLIPTokenizer")
    text = CLIPTextConfig(vocab_size=words, max_position_embeddings=77, eos_token_id=1, bos_token_id=0, **VISION)
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=8, **VISION)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    crop = {"crop_size": {"height": SIZE, "width": SIZE}, "size": {"shortest_edge": SIZE}}
    _preprocessor(folder, "CLIPImageProcessor", **crop)
    return folder


def _bert_words(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *"abcdefghijklmnopqrstuvwxyz?.,"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return len(words)


def blip(folder: Path) -> Path:
    """As `Salesforce/blip-itm-base-coco`, for image_text_matching_filter."""
    import torch
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipTextConfig, BlipVisionConfig

    torch.manual_seed(1)
    words = _bert_words(folder)
    text = BlipTextConfig(
        vocab_size=words,
        encoder_hidden_size=16,
        max_position_embeddings=64,
        bos_token_id=5,
        eos_token_id=3,
        pad_token_id=0,
        sep_token_id=3,
        **VISION,
    )
    vision = BlipVisionConfig(image_size=SIZE, patch_size=8, **VISION)
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    BlipForImageTextRetrieval(config).save_pretrained(folder)
    _preprocessor(folder, "BlipImageProcessor", processor_class="BlipProcessor")
    return folder


def vit(folder: Path) -> Path:
    """As `Falconsai/nsfw_image_detection` and `amrul-hzz/watermark_detector`, for the operators that read them."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(2)
    config = ViTConfig(image_size=SIZE, patch_size=8, num_labels=2, **VISION)
    ViTForImageClassification(config).save_pretrained(folder)
    _preprocessor(folder, "ViTImageProcessor")
    return folder


def aesthetics(folder: Path) -> Path:
    """As `shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE`, for image_aesthetics_filter."""
    import torch
    from aesthetics_predictor import AestheticsPredictorV2Linear
    from transformers import CLIPVisionConfig

    clip(folder)  # whose tokenizer and preprocessor it comes with
    torch.manual_seed(3)
    config = CLIPVisionConfig(image_size=SIZE, patch_size=8, projection_dim=8, **VISION)
    AestheticsPredictorV2Linear(config).save_pretrained(folder)
    return folder


def blip2(folder: Path) -> Path:
    """As `Salesforce/blip2-opt-2.7b`, for image_captioning_mapper."""
    import torch
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    torch.manual_seed(4)
    specials = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    image_token = _byte_level(folder, specials, "", "GPT2Tokenizer", size=50265)  # Data-Juicer knows no other number
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": image_token}))
    language = OPTConfig(
        vocab_size=50304,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(image_size=SIZE, patch_size=8, **VISION).to_dict(),
        qformer_config=Blip2QFormerConfig(encoder_hidden_size=16, **VISION).to_dict(),
        text_config=language.to_dict(),
        num_query_tokens=2,
        image_token_index=image_token,
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    _preprocessor(folder, "BlipImageProcessor", processor_class="Blip2Processor")
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Blip2Processor", "num_query_tokens": 2})
    )
    return folder
