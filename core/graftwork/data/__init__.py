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
from graftwork.data.images import MAX_PIXELS, image_digest, image_size, load_image, read_bytes
from graftwork.data.lines import OWN, from_object, own_part, to_object

__all__ = [
    "MAX_PIXELS",
    "OWN",
    "find_image",
    "from_object",
    "image_digest",
    "image_size",
    "is_file",
    "load_image",
    "make_records",
    "member",
    "missing_files",
    "own_part",
    "path_below",
    "read_bytes",
    "read_json",
    "read_json_lines",
    "read_text",
    "required",
    "to_object",
]
