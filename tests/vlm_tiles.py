"""Families whose images are squares, or tiles of one size: tiny configurations of each."""

from __future__ import annotations

from dataclasses import replace

from vlm_folders import CHATML, CLIP, ENDLESS, LANGUAGE, SIGLIP, SQUARE, TURNS, UTTERANCES, VISION, Family

LLAMA = {**LANGUAGE, "model_type": "llama", "vocab_size": 320}
QWEN2 = {**LANGUAGE, "model_type": "qwen2", "vocab_size": 320}
GRIDS = [[56, 112], [112, 56], [112, 112]]
PATCHES = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
LLAVA = Family(
    special=("<pad>", "<s>", "</s>", "<image>"),
    begins="<s>",
    ends=("</s>",),
    named={"image_token": "<image>"},
    labels=(
        (" yes</s>", " no thanks</s>"),
        (" Two shapes: 1, 2</s>",),
        (" Yes,\nyes.</s>",),
    ),
    template=ENDLESS,
    config="LlavaConfig",
    table=lambda id: {
        "text_config": LLAMA,
        "vision_config": CLIP,
        "image_token_index": id("<image>"),
        "image_seq_length": 16,
    },
    processor="LlavaProcessor",
    processing=PATCHES,
    images="CLIPImageProcessor",
    resizing={"size": {"shortest_edge": 56}, "crop_size": SQUARE},
)
LLAVA_NEXT = replace(
    LLAVA,
    config="LlavaNextConfig",
    table=lambda id: {**LLAVA.table(id), "image_grid_pinpoints": GRIDS},
    processor="LlavaNextProcessor",
    images="LlavaNextImageProcessor",
    resizing={**LLAVA.resizing, "image_grid_pinpoints": GRIDS},
)
INTERN = Family(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    ends=("<|im_end|>",),
    named={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    labels=(
        ("yes<|im_end|>", "no thanks<|im_end|>"),
        ("Two shapes: 1, 2<|im_end|>",),
        ("Yes,\nyes.<|im_end|>",),
    ),
    template=CHATML.replace("IMAGE", "<IMG_CONTEXT>"),
    config="InternVLConfig",
    table=lambda id: {
        "text_config": {**QWEN2, "tie_word_embeddings": True},
        "vision_config": {**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        "image_token_id": id("<IMG_CONTEXT>"),
        "image_seq_length": 4,
    },
    processor="InternVLProcessor",
    processing={"image_seq_length": 4},
    images="GotOcr2ImageProcessor",
    resizing={"size": SQUARE, "crop_to_patches": True, "max_patches": 4},
)
IDEFICS3 = Family(
    special=(
        *("<|end_of_text|>", "<|begin_of_text|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"),
        *("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))),
    ),
    begins="<|begin_of_text|>",
    ends=("<end_of_utterance>",),
    named={
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
    labels=(
        (" yes<end_of_utterance>", " no thanks<end_of_utterance>"),
        (" Two shapes: 1, 2<end_of_utterance>",),
        (" Yes,\nyes.<end_of_utterance>",),
    ),
    template=UTTERANCES,
    config="Idefics3Config",
    table=lambda id: {
        "text_config": {**LLAMA, "pad_token_id": 0},
        "vision_config": {**VISION, "image_size": 64, "patch_size": 8},
        "image_token_id": id("<image>"),
        "scale_factor": 4,
        "tie_word_embeddings": True,
    },
    processor="Idefics3Processor",
    processing={"image_seq_len": 4},
    images="Idefics3ImageProcessor",
    resizing={"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}, "do_image_splitting": True},
)
GEMMA3 = Family(
    special=(
        *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    ),
    begins="<bos>",
    ends=("<eos>", "<end_of_turn>"),
    named={
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    labels=(
        ("yes<end_of_turn>", "no thanks<end_of_turn>"),
        ("Two shapes: 1, 2<end_of_turn>",),
        ("Yes,\nyes.<end_of_turn>",),
    ),
    template=TURNS,
    config="Gemma3Config",
    table=lambda id: {
        "text_config": {
            **LANGUAGE,
            "vocab_size": 320,
            "head_dim": 16,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 16,
        },
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "boi_token_index": id("<start_of_image>"),
        "eoi_token_index": id("<end_of_image>"),
        "image_token_index": id("<image_soft_token>"),
    },
    processor="Gemma3Processor",
    processing={"image_seq_length": 4},
    images="Gemma3ImageProcessor",
    resizing={"size": SQUARE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
)
OVIS2 = Family(
    special=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>"),
        *("<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
    ),
    ends=("<|im_end|>",),
    named={"image_token": "<image>"},
    labels=(
        ("yes<|im_end|>", "no thanks<|im_end|>"),
        ("Two shapes: 1, 2<|im_end|>",),
        ("Yes,\nyes.<|im_end|>",),
    ),
    template=CHATML.replace("IMAGE", "<image>"),
    config="Ovis2Config",
    table=lambda id: {
        "text_config": QWEN2,
        "vision_config": {
            **VISION,
            "image_size": 56,
            "patch_size": 14,
            "vocab_size": 64,
            "hidden_stride": 2,
        },
        "image_token_id": id("<IMG_ATOM>"),
        "visual_indicator_token_ids": [
            id(token) for token in ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
        ],
        "hidden_size": 64,
        "vocab_size": 320,
    },
    processor="Ovis2Processor",
    processing={"image_seq_length": 4},
    images="Ovis2ImageProcessor",
    resizing={"size": SQUARE, "crop_to_patches": True, "max_patches": 4},
)
ARIA = Family(
    special=("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|img|>"),
    ends=("<|im_end|>",),
    named={"image_token": "<|img|>"},
    labels=(
        ("yes<|im_end|>", "no thanks<|im_end|>"),
        ("Two shapes: 1, 2<|im_end|>",),
        ("Yes,\nyes.<|im_end|>",),
    ),
    template=CHATML.replace("IMAGE", "<|img|>"),
    config="AriaConfig",
    table=lambda id: {
        "text_config": {
            **LANGUAGE,
            "model_type": "aria_text",
            "vocab_size": 320,
            "intermediate_size": 32,
            "moe_num_experts": 4,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
            "pad_token_id": 0,
        },
        "vision_config": {**VISION, "model_type": "idefics3_vision", "image_size": 980, "patch_size": 140},
        "projector_patch_to_query_dict": {49: 4},
        "image_token_index": id("<|img|>"),
    },
    processor="AriaProcessor",
    processing={"size_conversion": {980: 4}},
    images="AriaImageProcessor",
    resizing={},
)
TILES = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_next_video": replace(
        LLAVA_NEXT,
        special=(*LLAVA.special, "<video>"),
        named={**LLAVA.named, "video_token": "<video>"},
        config="LlavaNextVideoConfig",
        table=lambda id: {**LLAVA_NEXT.table(id), "video_token_index": id("<video>")},
        processor="LlavaNextVideoProcessor",
    ),
    "llava_onevision": replace(
        LLAVA_NEXT,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
        begins="",
        ends=("<|im_end|>",),
        labels=(
            ("yes<|im_end|>", "no thanks<|im_end|>"),
            ("Two shapes: 1, 2<|im_end|>",),
            ("Yes,\nyes.<|im_end|>",),
        ),
        template=CHATML.replace("IMAGE", "<image>"),
        config="LlavaOnevisionConfig",
        table=lambda id: {
            "text_config": QWEN2,
            "vision_config": SIGLIP,
            "image_token_index": id("<image>"),
            "video_token_index": id("<video>"),
            "image_grid_pinpoints": GRIDS,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        processor="LlavaOnevisionProcessor",
        processing={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        images="LlavaOnevisionImageProcessor",
        resizing={"size": SQUARE, "image_grid_pinpoints": GRIDS},
    ),
    "vipllava": replace(
        LLAVA, config="VipLlavaConfig", table=lambda id: {**LLAVA.table(id), "vision_feature_layer": [-2, -1, 1]}
    ),
    "granite4_vision": replace(
        LLAVA_NEXT,
        config="Granite4VisionConfig",
        table=lambda id: {
            **LLAVA_NEXT.table(id),
            "text_config": {**LANGUAGE, "vocab_size": 320, "num_hidden_layers": 3, "logits_scaling": 2.0},
            "vision_config": {**CLIP, "hidden_size": 64},
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0], [-2, 1]],
            "spatial_target_layers": [2],
        },
        processor="Granite4VisionProcessor",
        processing={**PATCHES, "downsample_rate": "1/2"},
    ),
    "internvl": INTERN,
    "qianfan_ocr": replace(
        INTERN,
        special=(*INTERN.special, "<image>"),
        template=CHATML.replace("IMAGE", "<image>"),
        config="QianfanOCRConfig",
        table=lambda id: {**INTERN.table(id), "text_config": {**LANGUAGE, "model_type": "qwen3", "vocab_size": 320}},
        processor="QianfanOCRProcessor",
    ),
    "got_ocr2": replace(
        INTERN,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"),
        named={},
        template=CHATML.replace("IMAGE", "<img><imgpad></img>"),
        config="GotOcr2Config",
        table=lambda id: {
            "text_config": {**QWEN2, "tie_word_embeddings": True},
            "vision_config": {
                **VISION,
                "image_size": 256,
                "patch_size": 4,
                "mlp_dim": 64,
                "output_channels": 16,
                "window_size": 4,
                "global_attn_indexes": [],
                "initializer_range": 0.02,  # by default next to nothing, and images would show nothing
            },
            "image_token_index": id("<imgpad>"),
            "image_seq_length": 4,
        },
        processor="GotOcr2Processor",
        processing={},
        resizing={"size": {"height": 256, "width": 256}},
    ),
    "aya_vision": replace(
        INTERN,
        special=(
            *("<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<image>"),
            *(
                "<|START_OF_IMG|>",
                "<|END_OF_IMG|>",
                "<|IMG_PATCH|>",
                "TILE_GLOBAL",
                *(f"TILE_{n}" for n in range(1, 5)),
            ),
        ),
        begins="<BOS_TOKEN>",
        ends=("<|END_OF_TURN_TOKEN|>",),
        named={},
        labels=(
            ("yes<|END_OF_TURN_TOKEN|>", "no thanks<|END_OF_TURN_TOKEN|>"),
            ("Two shapes: 1, 2<|END_OF_TURN_TOKEN|>",),
            ("Yes,\nyes.<|END_OF_TURN_TOKEN|>",),
        ),
        template=CHATML.replace("IMAGE", "<image>")
        .replace("<|im_start|>", "<|START_OF_TURN_TOKEN|>")
        .replace("<|im_end|>", "<|END_OF_TURN_TOKEN|>"),
        config="AyaVisionConfig",
        table=lambda id: {
            "text_config": {
                **LANGUAGE,
                "model_type": "cohere2",
                "vocab_size": 320,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": SIGLIP,
            "image_token_index": id("<|IMG_PATCH|>"),
        },
        processor="AyaVisionProcessor",
        processing={"patch_size": 14, "img_size": 56, "downsample_factor": 2},
    ),
    "idefics3": IDEFICS3,
    "smolvlm": replace(
        IDEFICS3,
        special=(*IDEFICS3.special, "<video>"),
        config="SmolVLMConfig",
        processor="SmolVLMProcessor",
        images="SmolVLMImageProcessor",
    ),
    "gemma3": GEMMA3,
    "ovis2": OVIS2,
    "aria": ARIA,
}
