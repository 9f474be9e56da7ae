"""Which of Data-Juicer's operators may run, what each needs, and why others may not."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """What an operator needs, and what it is given."""

    images: bool = False
    """Whether it reads images."""
    marks: bool = False
    """Whether its text has to say where the images are."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Modules that it imports beside Data-Juicer's, with the packages that hold them."""
    folder: str = ""
    """The parameter that names the folder of its model or its words; empty where it has none."""
    holds: str = ""
    """What must lie in that folder, as a pattern."""
    refused: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Parameters with a value that it must not have, and why."""
    captions: bool = False
    """Whether it makes new records."""
    duplicates: bool = False
    """Whether it looks at the texts of all records at once."""


FETCHED = "Data-Juicer would fetch a tokenizer"
WORDS = {"tokenization": (True, FETCHED)}
HASHES = {"tokenization": ("sentencepiece", FETCHED)}
FACES = {"cv2": "opencv-contrib-python"}


def _model(folder: str, *, marks: bool = False, **others: Any) -> Allowed:
    return Allowed(images=True, marks=marks, folder=folder, holds="config.json", **others)


ALLOWED: Mapping[str, Allowed] = {
    # Texts
    **dict.fromkeys(
        (
            *("text_length_filter", "character_repetition_filter", "special_characters_filter"),
            *("average_line_length_filter", "maximum_line_length_filter"),
            *("clean_copyright_mapper", "clean_email_mapper", "clean_ip_mapper", "clean_links_mapper"),
            *("pii_redaction_mapper", "punctuation_normalization_mapper", "remove_long_words_mapper"),
            *("remove_non_chinese_character_mapper", "remove_repeat_sentences_mapper", "remove_specific_chars_mapper"),
            *("replace_content_mapper", "whitespace_normalization_mapper"),
        ),
        Allowed(),
    ),
    **dict.fromkeys(
        (
            *("alphanumeric_filter", "words_num_filter", "word_repetition_filter"),
            "remove_words_with_incorrect_substrings_mapper",
        ),
        Allowed(refused=WORDS),
    ),
    "chinese_convert_mapper": Allowed(packages={"opencc": "opencc"}),
    "clean_html_mapper": Allowed(packages={"selectolax": "selectolax"}),
    "fix_unicode_mapper": Allowed(packages={"ftfy": "ftfy"}),
    "flagged_words_filter": Allowed(folder="flagged_words_dir", holds="*flagged_words*.json", refused=WORDS),
    "stopwords_filter": Allowed(folder="stopwords_dir", holds="*stopwords*.json", refused=WORDS),
    "token_num_filter": Allowed(folder="hf_tokenizer", holds="tokenizer_config.json"),
    "document_deduplicator": Allowed(duplicates=True),
    "document_minhash_deduplicator": Allowed(duplicates=True, refused=HASHES),
    "document_simhash_deduplicator": Allowed(duplicates=True, packages={"simhash": "simhash-pybind"}, refused=HASHES),
    # Images
    **dict.fromkeys(("image_aspect_ratio_filter", "image_shape_filter", "image_size_filter"), Allowed(images=True)),
    **dict.fromkeys(
        ("image_face_count_filter", "image_face_ratio_filter", "image_subplot_filter"),
        Allowed(images=True, packages=FACES),
    ),
    "image_aesthetics_filter": _model(
        "hf_scorer_model", packages={"aesthetics_predictor": "--no-deps simple-aesthetics-predictor"}
    ),
    "image_nsfw_filter": _model("hf_nsfw_model"),
    "image_watermark_filter": _model("hf_watermark_model"),
    # Images with their texts
    "image_text_matching_filter": _model("hf_blip", marks=True),
    "image_text_similarity_filter": _model("hf_clip", marks=True),
    "image_captioning_mapper": _model(
        "hf_img2seq",
        captions=True,
        refused={"keep_candidate_mode": ("similar_one_simhash", "it compares captions with questions and answers")},
    ),
}

OF_IMAGES = "it changes or makes images, and Graftwork takes texts alone from Data-Juicer"
SERVICE = "it asks a language model, mostly by the network, and passes over what fails"
REFUSED: Mapping[str, str] = {
    "image_deduplicator": "it keeps one record of each image; use 'near-duplicate-images' or 'deduplicate-images'",
    "ray_*_deduplicator*": "its result depends on the engine; use 'duplicate-questions' or 'near-duplicate-images'",
    "document_line_deduplicator": "it takes single lines out of conversations; use 'duplicate-questions'",
    "document_minhash_deduplicator_with_uid": "it wants a field that records do not have",
    "video_*": "it is about videos",
    "audio_*": "it is about sound",
    **dict.fromkeys(("image_blur_mapper", "image_face_blur_mapper", "image_remove_background_mapper"), OF_IMAGES),
    **dict.fromkeys(("image_diffusion_mapper", "image_segment_mapper", "sdxl_prompt2prompt_mapper"), OF_IMAGES),
    **dict.fromkeys(("image_mmpose_mapper", "image_sam_3d_body_mapper", "vggt_mapper"), "it starts other programs"),
    **dict.fromkeys(("python_file_mapper", "python_lambda_mapper"), "it runs any code"),
    "*download_file_mapper": "it reaches the network",
    "s3_*": "it reaches the network",
    "*annotation_mapper": "it reaches the network",
    "*_field_*": "records go to Data-Juicer as text and images alone, without other fields",
    "suffix_filter": "records go to Data-Juicer as text and images alone, without other fields",
    **dict.fromkeys(("language_id_score_filter", "perplexity_filter"), "it fetches its model and takes no folder"),
    "phrase_grounding_recall_filter": "it fetches data of NLTK and takes no folder for them",
    "image_pair_similarity_filter": "it wants exactly two images a record",
    "*_selector": "it chooses among records without saying why; use 'sample'",
    "random_selector": "it chooses among records without saying why; use 'sample'",
    "llm_*": SERVICE,
    "mllm_*": SERVICE,
    **dict.fromkeys(("*_query_mapper", "*_qa_mapper", "*_response_mapper", "extract_*", "dialog_*"), SERVICE),
}
"""Names, or patterns of names, of operators that may not run, and why."""


def why_refused(name: str) -> str:
    """Why an operator that is not in the list may not run, as a clause; empty where nothing is known of it."""
    return next((why for pattern, why in REFUSED.items() if fnmatch.fnmatchcase(name, pattern)), "")
