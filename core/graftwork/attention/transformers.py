"""The bridge from transformers' models to Graftwork's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from graftwork.attention.definition import attend
from graftwork.attention.windows import attend_within
from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.contracts.batch import Batch


ATTN_IMPLEMENTATION = "graftwork"
"""The `attn_implementation` under which transformers' models find Graftwork's kernels, once `register` was called."""
WINDOWED = f"{ATTN_IMPLEMENTATION}_flash"
"""The same for image encoders whose attention sees windows, or images, that lie one after another in a row: to an implementation with `flash`
in its name, and to no other, transformers says where they lie; it calls all others for each of them."""


COMPUTED: ContextVar[tuple[Batch | None, Tensor | None]] = ContextVar("computed", default=(None, None))
"""Within `packing`: the batch, which says where its mask has padding, and the number of each token's record in its row, int32
`[rows, tokens]`, 0 at padding; None where each row is one record."""


@contextmanager
def packing(batch: Batch) -> Iterator[None]:
    """Entered around the call of transformers' language model on a batch of Graftwork's: its kernels keep the records of a row apart, where
    there are several, and know without reading the mask where padding is, where the batch says so."""
    positions, segments = batch.positions, None
    if positions is not None:
        segments = ((positions == 0).cumsum(-1) * batch.attention_mask).int()
    token = COMPUTED.set((batch, segments))
    try:
        yield
    finally:
        COMPUTED.reset(token)


def register() -> None:
    """Make `ATTN_IMPLEMENTATION` and `WINDOWED` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in (ATTN_IMPLEMENTATION, WINDOWED):
        AttentionInterface.register(name, _transformers_attention)
        AttentionMaskInterface.register(name, _transformers_mask)


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls an attention function: the output is `[batch, queries, heads, head_dim]`."""
    import torch

    dims, dtype = (0, torch.bool) if attention_mask is None else (attention_mask.dim(), attention_mask.dtype)
    whole, two = dims == 4 and dtype == torch.bool, dims == 2
    packed = two and dtype == torch.int32  # what `packing` makes; transformers' own numbers are int64
    # A mask for each query and key has the window in it.
    unknown = [name for name in ("sliding_window", "s_aux", "position_bias") if others.get(name) is not None]
    unknown = [name for name in unknown if not (whole and name == "sliding_window")]
    if attention_mask is not None and not (whole or two):
        unknown.append(f"attention_mask of shape {tuple(attention_mask.shape)} in {attention_mask.dtype}")
    if unknown:
        raise _unsupported(", ".join(unknown))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {
        "causal": causal and not whole,
        "scale": scaling,
        "dropout": dropout,
        "softcap": others.get("softcap"),
    }
    if (boundaries := others.get("cu_seq_lens_q")) is not None and attention_mask is None:
        output = attend_within(module, query, key, value, boundaries, **options)
    else:
        padding, segments = (None, attention_mask) if packed else (attention_mask, None)
        masks: dict[str, Any] = {
            "padding": padding if two else None,
            "mask": attention_mask if whole else None,
            "segments": segments,
        }
        output = attend(module, query, key, value, **options, **masks)
    return output.transpose(1, 2).contiguous(), None


def _transformers_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    q_offset: Any = 0,
    kv_offset: int = 0,
    **others: Any,
) -> Tensor | None:
    """What transformers calls a mask function, called once in a forward pass: here the real keys, `[batch, keys]`, or, where a mask is
    neither causal nor full, which keys each query sees, `[batch, 1, queries, keys]`. Within `packing` the real keys have the numbers of their records.

    None where no real query can see padding. That is so without any padding, and where causal queries, as many as keys,
    are padded on the right: the padding lies in every real query's future.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    causal, (batch, segments) = mask_function is causal_mask_function, COMPUTED.get()
    if causal and segments is not None:
        return segments
    if not causal and mask_function is not bidirectional_mask_function:
        places = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
        others |= {**places, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        seen: Tensor = sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **others)
        return seen if segments is None else seen & (segments[:, None, :, None] == segments[:, None, None, :])
    if causal and q_offset + q_length != kv_offset + kv_length:
        raise _unsupported("a cache longer than what it holds (a static cache)")
    if attention_mask is None:
        return None
    padding = attention_mask[:, -kv_length:]
    told = batch.padding if batch is not None and batch.attention_mask is attention_mask else None
    return padding if _is_seen(padding, told, whole=causal and q_length == kv_length) else None


def _is_seen(padding: Tensor, told: str | None, *, whole: bool) -> bool:
    """Whether a real query could see padding, which is where the batch has `told` (`Batch.padding`); `whole` where causal queries are as many as
    the keys."""
    from torch._subclasses.fake_tensor import FakeTensor

    if told is not None:
        return told == "left" if whole else bool(told)
    if isinstance(padding, FakeTensor):  # it has no values: as in training, which pads on the right
        return not whole
    return bool((padding[:, 1:] > padding[:, :-1]).any() if whole else ~padding.all())


def _unsupported(what: str) -> GraftworkError:
    return GraftworkError(
        f"this model's attention uses {what}, which Graftwork's kernels do not know; "
        "build the model with one of transformers' own attention implementations"
    )
