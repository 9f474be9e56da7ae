"""Families that combine grids, tiles, convolutions and states in other ways: tiny configurations of each."""

from __future__ import annotations

from dataclasses import replace

from vlm_folders import LANGUAGE, VISION
from vlm_grids import GLM, LINEAR, MISTRAL, QWEN3, ROPE, SIXTEEN, TEXT, THREE, tokens
from vlm_tiles import IDEFICS3, INTERN, LLAVA

SMALL = {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, "patch_size": 16}
MINICPM = replace(
    INTERN,
    special=(
        *(
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<image>",
            "</image>",
            "<slice>",
            "</slice>",
            "<image_id>",
            "</image_id>",
        ),
        "<|image_pad|>",
        "<|video_pad|>",
    ),
    named={
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    },
    template=INTERN.template.replace("<IMG_CONTEXT>", "<|image_pad|>"),
    config="MiniCPMV4_6Config",
    table=lambda id: {
        "text_config": {**TEXT, **LINEAR, "model_type": "qwen3_5_text"},
        "vision_config": {
            **VISION,
            "num_hidden_layers": 3,
            "image_size": 64,
            "patch_size": 8,
            "insert_layer_id": 1,
        },
        "insert_layer_id": 1,
        "image_size": 64,
        "image_token_id": id("<|image_pad|>"),
        "video_token_id": id("<|video_pad|>"),
    },
    processor="MiniCPMV4_6Processor",
    processing={},
    images="MiniCPMV4_6ImageProcessor",
    resizing={"scale_resolution": 64, "patch_size": 8, "max_slice_nums": 4},
)
NEWER = {
    "cohere_compass": replace(
        QWEN3,
        special=tuple(
            token.replace("<|vision", "<|VISION")
            .replace("_pad|>", "_PAD|>")
            .replace("_start|>", "_START|>")
            .replace("_end|>", "_END|>")
            .replace("image_", "IMAGE_")
            .replace("video_", "VIDEO_")
            if "vision" in token or "pad" in token
            else token
            for token in QWEN3.special
        ),
        template=QWEN3.template.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>"
        ),
        config="CohereCompassConfig",
        table=lambda id: {
            "text_config": {
                **THREE,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                "sliding_window": 16,
                "logit_scale": 0.25,
                "pad_token_id": 0,
                "rope_parameters": {"sliding_attention": {**ROPE, "mrope_interleaved": True}, "full_attention": None},
            },
            "vision_config": {**SIXTEEN, "depth": 3, "deepstack_visual_indexes": [0, 1]},
            "image_token_id": id("<|IMAGE_PAD|>"),
            "video_token_id": id("<|VIDEO_PAD|>"),
            "vision_start_token_id": id("<|VISION_START|>"),
            "vision_end_token_id": id("<|VISION_END|>"),
        },
        processor="CohereCompassProcessor",
        images="CohereCompassImageProcessor",
        resizing=SMALL,
    ),
    "cosmos3_edge": replace(
        QWEN3,
        config="Cosmos3EdgeConfig",
        table=lambda id: {
            "text_config": {**TEXT, "head_dim": 16},
            "vision_config": {**VISION, "patch_size": 16, "num_patches": 64},
            "projector_hidden_size": 64,
            **tokens(id),
        },
        processor="Cosmos3EdgeProcessor",
        images="Cosmos3EdgeImageProcessor",
        resizing=SMALL,
    ),
    "lfm3_vl": replace(
        QWEN3,
        config="Lfm3VlConfig",
        table=lambda id: {
            "text_config": {
                **LANGUAGE,
                "model_type": "lfm3",
                "vocab_size": 320,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "layer_types": ["conv", "full_attention"],
            },
            "vision_config": {
                **VISION,
                "num_hidden_layers": 3,
                "num_key_value_heads": 1,
                "layer_types": ["conv", "full_attention", "conv"],
            },
            "projector_hidden_size": 64,
            **tokens(id),
        },
        processor="Lfm3VlProcessor",
        images="Qwen2VLImageProcessor",
    ),
    "glmga": replace(GLM, config="GlmgaConfig", processor="Glm46VProcessor", images="GlmgaImageProcessor"),
    "hunyuan_vl": replace(
        QWEN3,
        special=("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<image>"),
        named={"image_token": "<image>", "image_start_token": "<img>", "image_end_token": "</img>"},
        ends=("<|im_end|>",),
        template=QWEN3.template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<img><image></img>"),
        config="HunYuanVLConfig",
        table=lambda id: {
            "text_config": {
                **LANGUAGE,
                "vocab_size": 320,
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "xdrope",
                    "factor": 1.0,
                    "rope_theta": 10000.0,
                    "xdrope_section": [2, 2, 2, 2],
                    "alpha": 1000.0,
                },
            },
            "vision_config": {
                **VISION,
                "out_hidden_size": 64,
                "text_hidden_size": 64,
                "img_max_token_num": 64,
                "max_image_size": 128,
                "min_image_size": 64,
            },
            "image_token_id": id("<image>"),
            "im_start_id": id("<img>"),
            "im_end_id": id("</img>"),
            "im_newline_id": id("<image>"),
        },
        processor="HunYuanVLProcessor",
        images="HunYuanVLImageProcessor",
        resizing=SMALL,
    ),
    "granite_docling": replace(
        IDEFICS3,
        named={"image_token": "<image>"},
        config="GraniteDoclingConfig",
        table=lambda id: {
            "text_config": {
                **LANGUAGE,
                "num_hidden_layers": 3,
                "vocab_size": 320,
                "logits_scaling": 2.0,
                "pad_token_id": 0,
            },
            "vision_config": {
                **VISION,
                "num_hidden_layers": 3,
                "image_size": 64,
                "patch_size": 8,
                "out_hidden_size": 64,
                "deepstack_visual_indexes": [0, 1],
            },
            "image_token_id": id("<image>"),
            "pad_token_id": 0,
        },
        processor="GraniteDoclingProcessor",
        images="GraniteDoclingImageProcessor",
        resizing={"size": {"height": 64, "width": 64}, "max_patches": 4},
    ),
    "minicpmv4_6": MINICPM,
    "minicpmv4_7": replace(
        MINICPM,
        config="MiniCPMV4_7Config",
        table=lambda id: {
            **MINICPM.table(id),
            "image_start_id": id("<image>"),
            "image_end_id": id("</image>"),
            "slice_start_id": id("<slice>"),
            "slice_end_id": id("</slice>"),
            "newline_id": id("Ċ"),
        },
        processor="MiniCPMV4_7Processor",
    ),
    "mistral_large4": replace(
        MISTRAL,
        config="MistralLarge4Config",
        table=lambda id: {
            **MISTRAL.table(id),
            "text_config": {
                **LANGUAGE,
                "model_type": "mistral_large4_text",
                "vocab_size": 320,
                "num_key_value_heads": 4,
                "index_topk": 1024,
                "index_head_dim": 16,
                "index_n_heads": 2,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "kv_lora_rank": 16,
                "q_lora_rank": 16,
                "v_head_dim": 16,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 16,
            },
        },
    ),
    "video_llava": replace(
        LLAVA,
        special=(*LLAVA.special, "<video>"),
        named={**LLAVA.named, "video_token": "<video>"},
        config="VideoLlavaConfig",
        table=lambda id: {**LLAVA.table(id), "video_token_index": id("<video>")},
        processor="VideoLlavaProcessor",
        images="VideoLlavaImageProcessor",
    ),
}
QWEN4 = replace(
    QWEN3,
    config="Qwen4ExpConfig",
    table=lambda id: {
        "text_config": {
            **TEXT,
            **LINEAR,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "hc_count": 2,
            "hc_lowrank": 8,
            "eos_token_id": 2,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 1024,
            "indexer_compress_ratio": 16,
        },
        "vision_config": SIXTEEN,
        **tokens(id),
    },
)
"""Of which a step takes too long to be rehearsed: its layers choose what they see token by token."""
