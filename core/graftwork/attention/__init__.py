"""Attention: its definition, the kernels that compute it, and the bridge to transformers' models."""

from graftwork.attention.definition import (
    attend,
    one_query_attention,
    plain_attention,
    seeing_something,
    visible_keys,
)
from graftwork.attention.kernels import unmet_requirement
from graftwork.attention.packing import Packed, pack
from graftwork.attention.transformers import packing

__all__ = [
    "Packed",
    "attend",
    "one_query_attention",
    "pack",
    "packing",
    "plain_attention",
    "seeing_something",
    "unmet_requirement",
    "visible_keys",
]
