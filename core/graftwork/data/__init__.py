"""Data: images and files read safely, and the way from data sources to the batch of any step."""

from graftwork.data.datafiles import (
    find_picture,
    lacking,
    make_records,
    member,
    read_json,
    read_json_lines,
    read_text,
    required,
)
from graftwork.data.images import MAX_PIXELS, digest, load, probe

__all__ = [
    "MAX_PIXELS",
    "digest",
    "find_picture",
    "lacking",
    "load",
    "make_records",
    "member",
    "probe",
    "read_json",
    "read_json_lines",
    "read_text",
    "required",
]
