"""Families whose images keep their shape, as a grid of patches: tiny configurations of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm_folders import CHATML, LANGUAGE, PARTS, TURNS, VISION, Family

ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
BLOCKS = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
TEXT = {**LANGUAGE, "vocab_size": 320, "rope_parameters": ROPE}
THREE = {**TEXT, "num_hidden_layers": 3}
"""What is added to the second layer reaches later tokens in the third."""
PIXELS = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25, "mrope_interleaved": True},
}
SIXTEEN = {**BLOCKS, "patch_size": 16, "num_position_embeddings": 64}


def tokens(id: Any) -> dict[str, Any]:
    """What a Qwen-like configuration calls its tokens."""
    return {
        "image_token_id": id("<|image_pad|>"),
        "video_token_id": id("<|video_pad|>"),
        "vision_start_token_id": id("<|vision_start|>"),
        "vision_end_token_id": id("<|vision_end|>"),
    }


QWEN2 = Family(
    special=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
        *("<|image_pad|>", "<|video_pad|>"),
    ),
    ends=("<|im_end|>", "<|endoftext|>"),
    labels=(
        ("yes<|im_end|>", "no thanks<|im_end|>"),
        ("Two shapes: 1, 2<|im_end|>",),
        ("Yes,\nyes.<|im_end|>",),
    ),
    template=CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    config="Qwen2VLConfig",
    table=lambda id: {
        "text_config": {**TEXT, "bos_token_id": None, "eos_token_id": id("<|im_end|>")},
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        "tie_word_embeddings": True,
        **tokens(id),
    },
    processor="Qwen2VLProcessor",
    images="Qwen2VLImageProcessor",
    resizing=PIXELS,
)
QWEN2_5 = replace(
    QWEN2,
    config="Qwen2_5_VLConfig",
    table=lambda id: {
        **QWEN2.table(id),
        "vision_config": {**BLOCKS, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
    },
    processor="Qwen2_5_VLProcessor",
)
QWEN3 = replace(
    QWEN2,
    config="Qwen3VLConfig",
    table=lambda id: {
        "text_config": {**THREE, "head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        "vision_config": {**SIXTEEN, "depth": 3, "deepstack_visual_indexes": [0, 1]},
        "tie_word_embeddings": True,
        **tokens(id),
    },
    processor="Qwen3VLProcessor",
    resizing={"min_pixels": 64 * 64, "max_pixels": 128 * 128, "patch_size": 16},
)
GLM = Family(
    special=(
        *("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|begin_of_image|>"),
        *("<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>"),
    ),
    ends=("<|endoftext|>", "<|user|>"),
    named={"image_token": "<|image|>", "video_token": "<|video|>"},
    labels=(
        ("yes<|endoftext|>", "no thanks<|endoftext|>"),
        ("Two shapes: 1, 2<|endoftext|>",),
        ("Yes,\nyes.<|endoftext|>",),
    ),
    template="[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n"
    + PARTS.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>")
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    config="Glm4vConfig",
    table=lambda id: {
        "text_config": {**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
        "vision_config": {**BLOCKS, "image_size": 112, "patch_size": 14},
        "image_token_id": id("<|image|>"),
        "video_token_id": id("<|video|>"),
        "image_start_token_id": id("<|begin_of_image|>"),
        "image_end_token_id": id("<|end_of_image|>"),
        "video_start_token_id": id("<|begin_of_video|>"),
        "video_end_token_id": id("<|end_of_video|>"),
    },
    processor="Glm4vProcessor",
    images="Glm4vImageProcessor",
    resizing={"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 48}},
)
MISTRAL = Family(
    special=("<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    begins="<s>",
    ends=("</s>",),
    named={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    labels=(
        ("yes</s>", "no thanks</s>"),
        ("Two shapes: 1, 2</s>",),
        ("Yes,\nyes.</s>",),
    ),
    template="{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    + PARTS
    + "</s>{% else %}[INST]"
    + PARTS.replace("IMAGE", "[IMG]")
    + "[/INST]{% endif %}{% endfor %}",
    config="Mistral3Config",
    table=lambda id: {
        "text_config": {**LANGUAGE, "model_type": "mistral", "vocab_size": 320, "head_dim": 16},
        "vision_config": {**VISION, "model_type": "pixtral", "image_size": 112, "patch_size": 14, "head_dim": 16},
        "image_token_index": id("[IMG]"),
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    },
    processor="PixtralProcessor",
    processing={"patch_size": 14, "spatial_merge_size": 2},
    images="PixtralImageProcessor",
    resizing={"size": {"longest_edge": 112}, "patch_size": 28},
)
ERNIE = Family(
    special=(
        *("<unk>", "<s>", "</s>", "<|end_of_sentence|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>"),
        *("<|VIDEO_START|>", "<|VIDEO_END|>", "<|VIDEO_PLACEHOLDER|>"),
    ),
    begins="",
    ends=("</s>",),
    named={
        "image_token": "<|IMAGE_PLACEHOLDER|>",
        "image_start_token": "<|IMAGE_START|>",
        "image_end_token": "<|IMAGE_END|>",
        "video_token": "<|VIDEO_PLACEHOLDER|>",
        "video_start_token": "<|VIDEO_START|>",
        "video_end_token": "<|VIDEO_END|>",
    },
    labels=(
        ("yes</s>", "no thanks</s>"),
        ("Two shapes: 1, 2</s>",),
        ("Yes,\nyes.</s>",),
    ),
    template="<s>{% for message in messages %}{{ message['role'] | capitalize }}: "
    + PARTS.replace("IMAGE", "Picture:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    + "{% if message['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    + "{% if add_generation_prompt %}Assistant: {% endif %}",
    config="Ernie4_5_VLMoeConfig",
    table=lambda id: {
        "text_config": {
            **TEXT,
            "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [32, 16],
            "moe_num_experts": 4,
            "moe_k": 2,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14},
        "image_token_id": id("<|IMAGE_PLACEHOLDER|>"),
        "image_start_token_id": id("<|IMAGE_START|>"),
        "image_end_token_id": id("<|IMAGE_END|>"),
        "video_token_id": id("<|VIDEO_PLACEHOLDER|>"),
        "video_start_token_id": id("<|VIDEO_START|>"),
        "video_end_token_id": id("<|VIDEO_END|>"),
    },
    processor="Ernie4_5_VLMoeProcessor",
    images="Ernie4_5_VLMoeImageProcessor",
    resizing={"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}},
)
GEMMA4 = Family(
    special=(
        *("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|image>", "<image|>", "<|image|>", "<|audio>"),
        *("<audio|>", "<|audio|>", "<|video|>"),
    ),
    begins="<bos>",
    ends=("<eos>", "<turn|>"),
    named={
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    },
    labels=(
        ("yes<turn|>", "no thanks<turn|>"),
        ("Two shapes: 1, 2<turn|>",),
        ("Yes,\nyes.<turn|>",),
    ),
    template=TURNS.replace("<start_of_turn>", "<|turn>")
    .replace("<end_of_turn>", "<turn|>")
    .replace("<start_of_image>", "<|image|>"),
    config="Gemma4Config",
    table=lambda id: {
        "text_config": {
            **LANGUAGE,
            "vocab_size": 320,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 8,
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "use_bidirectional_attention": "vision",
            "final_logit_softcapping": 30.0,
        },
        "vision_config": {
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "audio_config": None,
        "boi_token_id": id("<|image>"),
        "eoi_token_id": id("<image|>"),
        "image_token_id": id("<|image|>"),
        "video_token_id": id("<|video|>"),
        "audio_token_id": id("<|audio|>"),
        "boa_token_id": id("<|audio>"),
        "eoa_token_index": id("<audio|>"),
    },
    processor="Gemma4Processor",
    images="Gemma4ImageProcessor",
    resizing={"patch_size": 8, "pooling_kernel_size": 2, "max_soft_tokens": 70},
)
PADDLE = replace(
    QWEN2,
    special=("<unk>", "<s>", "</s>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|video|>"),
    ends=("</s>",),
    named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
    labels=(
        ("yes</s>", "no thanks</s>"),
        ("Two shapes: 1, 2</s>",),
        ("Yes,\nyes.</s>",),
    ),
    template=ERNIE.template.replace("Picture:", ""),
    config="PaddleOCRVLConfig",
    table=lambda id: {
        "text_config": {**TEXT, "head_dim": 16, "pad_token_id": 0},
        "vision_config": {**VISION, "image_size": 56, "patch_size": 14},
        "image_token_id": id("<|IMAGE_PLACEHOLDER|>"),
        "video_token_id": id("<|video|>"),
        "vision_start_token_id": id("<|IMAGE_START|>"),
        "vision_end_token_id": id("<|IMAGE_END|>"),
    },
    processor="PaddleOCRVLProcessor",
    images="PaddleOCRVLImageProcessor",
)
GRIDS = {
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2_5,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": replace(
        QWEN3,
        config="Qwen3VLMoeConfig",
        table=lambda id: {
            **QWEN3.table(id),
            "text_config": {**QWEN3.table(id)["text_config"], **EXPERTS},
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_5": replace(
        QWEN3,
        config="Qwen3_5Config",
        table=lambda id: {**QWEN3.table(id), "text_config": {**TEXT, **LINEAR}, "vision_config": SIXTEEN},
    ),
    "qwen3_5_moe": replace(
        QWEN3,
        config="Qwen3_5MoeConfig",
        table=lambda id: {
            **QWEN3.table(id),
            "text_config": {**TEXT, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
            "vision_config": SIXTEEN,
        },
    ),
    "exaone4_5": replace(
        QWEN2_5,
        config="Exaone4_5_Config",
        table=lambda id: {
            "text_config": {
                **LANGUAGE,
                "model_type": "exaone4",
                "vocab_size": 320,
                "sliding_window": 16,
                "sliding_window_pattern": 2,
            },
            "vision_config": {**QWEN2_5.table(id)["vision_config"], "num_key_value_heads": 1},
            "image_token_id": id("<|image_pad|>"),
            "video_token_id": id("<|video_pad|>"),
        },
        processor="Exaone4_5_Processor",
    ),
    "hyperclovax_vision_v2": replace(
        QWEN2_5,
        config="HyperCLOVAXVisionV2Config",
        table=lambda id: {
            "text_config": {**LANGUAGE, "vocab_size": 320, "logits_scaling": 2.0},
            "vision_config": QWEN2_5.table(id)["vision_config"],
            "image_token_id": id("<|image_pad|>"),
            "video_token_id": id("<|video_pad|>"),
        },
        processor="HyperCLOVAXVisionV2Processor",
    ),
    "video_llama_3": replace(
        QWEN2,
        config="VideoLlama3Config",
        table=lambda id: {
            "text_config": {**LANGUAGE, "vocab_size": 320, "model_type": "qwen2"},
            "vision_config": {**VISION, "patch_size": 14},
            "image_token_id": id("<|image_pad|>"),
            "video_token_id": id("<|video_pad|>"),
        },
        processor="VideoLlama3Processor",
        images="VideoLlama3ImageProcessor",
    ),
    "glm4v": GLM,
    "glm46v": replace(GLM, config="Glm46VConfig", processor="Glm46VProcessor", images="Glm46VImageProcessor"),
    "glm_ocr": replace(
        GLM,
        config="GlmOcrConfig",
        processor="Glm46VProcessor",
        images="Glm46VImageProcessor",
    ),
    "paddleocr_vl": PADDLE,
    "mistral3": MISTRAL,
    "lighton_ocr": replace(
        MISTRAL,
        special=(*MISTRAL.special, "<|im_start|>", "<|im_end|>"),
        begins="",
        ends=("<|im_end|>",),
        labels=(
            ("yes<|im_end|>", "no thanks<|im_end|>"),
            ("Two shapes: 1, 2<|im_end|>",),
            ("Yes,\nyes.<|im_end|>",),
        ),
        template=CHATML.replace("IMAGE", "[IMG]"),
        config="LightOnOcrConfig",
        table=lambda id: {
            **{key: value for key, value in MISTRAL.table(id).items() if "image_token" not in key},
            "text_config": {**LANGUAGE, "model_type": "qwen3", "vocab_size": 320, "head_dim": 16},
            "image_token_id": id("[IMG]"),
        },
        processor="LightOnOcrProcessor",
    ),
    "gemma4": GEMMA4,
}
