"""Data: files and images read safely, conversations made of them, and the pipeline from data sources to the batch of any step."""

from graftwork.data.answering import pairs_of, plain, text_key
from graftwork.data.compact import HashTable, TextFile
from graftwork.data.conversations import PLACE, conversation, first_records, mark_of
from graftwork.data.curated import MANIFEST, is_data_set, read_data_set
from graftwork.data.datafiles import (
    files_at,
    find_image,
    is_file,
    make_records,
    member,
    missing_files,
    path_below,
    read_json,
    read_text,
    required,
    write_json_lines,
)
from graftwork.data.fingerprints import MAX_DIFFERENCE, MAX_DISTANCE, Fingerprint, Match, NearImages, look_at_images
from graftwork.data.imagefolders import NO_VIDEOS, ImageFiles, ImageFolder, encoded_bytes, extension_of
from graftwork.data.images import MAX_PIXELS, image_digest, image_size, load_image, read_bytes
from graftwork.data.jsonfiles import first_object, read_json_lines, read_json_list
from graftwork.data.leaks import LeakFinder
from graftwork.data.lines import LLAVA_ROLES, OWN, from_object, own_part, to_object
from graftwork.data.messages import images_of, read_example, read_messages, refuse_moving, to_messages
from graftwork.data.prompting import NO, YES, affirms, ask_about, fill, mistakes_in_words
from graftwork.data.store import RECORDS, hash64
from graftwork.data.texts import plain_text, type_name

__all__ = [
    "LLAVA_ROLES",
    "MANIFEST",
    "MAX_DIFFERENCE",
    "MAX_DISTANCE",
    "MAX_PIXELS",
    "NO",
    "NO_VIDEOS",
    "OWN",
    "PLACE",
    "RECORDS",
    "YES",
    "Fingerprint",
    "HashTable",
    "ImageFiles",
    "ImageFolder",
    "LeakFinder",
    "Match",
    "NearImages",
    "TextFile",
    "affirms",
    "ask_about",
    "conversation",
    "encoded_bytes",
    "extension_of",
    "files_at",
    "fill",
    "find_image",
    "first_object",
    "first_records",
    "from_object",
    "hash64",
    "image_digest",
    "image_size",
    "images_of",
    "is_data_set",
    "is_file",
    "load_image",
    "look_at_images",
    "make_records",
    "mark_of",
    "member",
    "missing_files",
    "mistakes_in_words",
    "own_part",
    "pairs_of",
    "path_below",
    "plain",
    "plain_text",
    "read_bytes",
    "read_data_set",
    "read_example",
    "read_json",
    "read_json_lines",
    "read_json_list",
    "read_messages",
    "read_text",
    "refuse_moving",
    "required",
    "text_key",
    "to_messages",
    "to_object",
    "type_name",
    "write_json_lines",
]
