"""Data: images and files read safely, and the pipeline from data sources to the batch of any step."""

from graftwork.data.datafiles import (
    find_image,
    is_file,
    make_records,
    member,
    missing_files,
    path_below,
    read_json,
    read_json_lines,
    read_text,
    required,
)
from graftwork.data.images import MAX_PIXELS, image_digest, image_size, load_image

__all__ = [
    "MAX_PIXELS",
    "find_image",
    "image_digest",
    "image_size",
    "is_file",
    "load_image",
    "make_records",
    "member",
    "missing_files",
    "path_below",
    "read_json",
    "read_json_lines",
    "read_text",
    "required",
]
