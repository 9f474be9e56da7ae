"""Data: images and files read safely, and the pipeline from data sources to the batch of any step."""

from graftwork.data.answering import pairs_of, plain, text_key
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
from graftwork.data.fingerprints import MAX_DIFFERENCE, MAX_DISTANCE, Fingerprint, Match, NearImages, look_at_images
from graftwork.data.images import MAX_PIXELS, image_digest, image_size, load_image, read_bytes
from graftwork.data.leaks import LeakFinder
from graftwork.data.lines import OWN, from_object, own_part, to_object

__all__ = [
    "MAX_DIFFERENCE",
    "MAX_DISTANCE",
    "MAX_PIXELS",
    "OWN",
    "Fingerprint",
    "LeakFinder",
    "Match",
    "NearImages",
    "find_image",
    "from_object",
    "image_digest",
    "image_size",
    "is_file",
    "load_image",
    "look_at_images",
    "make_records",
    "member",
    "missing_files",
    "own_part",
    "pairs_of",
    "path_below",
    "plain",
    "read_bytes",
    "read_json",
    "read_json_lines",
    "read_text",
    "required",
    "text_key",
    "to_object",
]
