"""A batch without its padding, for kernels that take sequences of different lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwork.attention.definition import seeing_something

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a padded batch lie in it, and how long they are."""

    rows: Tensor
    """`[real queries]`: where the queries lie in the padded batch, with batch and positions in one dimension."""
    columns: Tensor
    """`[real keys]`: where the keys lie, likewise."""
    q_lengths: list[int]
    """How many queries each sequence has."""
    k_lengths: list[int]
    """How many keys each sequence has, at least one."""


@dataclass(frozen=True)
class Packed:
    """A batch without its padding: one sequence after another, for kernels that take sequences of different lengths."""

    q: Tensor
    """`[real queries, heads, head_dim]`."""
    k: Tensor
    """`[real keys, kv_heads, head_dim]`."""
    v: Tensor
    """As `k`."""
    sequences: Sequences
    batch: int
    """How many rows the padded batch has."""
    queries: int
    """How many queries each sequence of the padded batch has."""

    def unpack(self, output: Tensor) -> Tensor:
        """From `[real queries, heads, head_dim]` to `[batch, heads, queries, head_dim]`, with 0 at padding."""
        padded = output.new_zeros(self.batch * self.queries, *output.shape[1:])
        padded = padded.index_copy(0, self.sequences.rows, output)
        return padded.view(self.batch, self.queries, *output.shape[1:]).transpose(1, 2)


def pack(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, causal: bool, segments: Tensor | None = None
) -> Packed:
    """Take the padding out of a batch; shapes are those of `AttentionKernel.forward`, of which it has `padding` or `segments`. Each segment
    becomes a sequence of its own.

    Causal queries are the last positions of the keys, so that padding among them goes too, and the queries that stay are
    still the last of the keys that stay: a causal kernel must align its mask at the bottom right. Other queries all stay.
    """

    def lines(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.transpose(1, 2).flatten(0, 1)[index]

    found = sequences_of(padding, segments, q.shape[2], causal)
    packed = lines(q, found.rows), lines(k, found.columns), lines(v, found.columns)
    return Packed(*packed, found, len(q), q.shape[2])


KNOWN = "graftwork_sequences"
"""The attribute of a mask that holds its sequences."""


def sequences_of(padding: Tensor | None, segments: Tensor | None, queries: int, causal: bool) -> Sequences:
    """The sequences of a batch, found once for all layers of a forward pass, which share its mask: to find them the host waits for a
    device."""
    import torch

    packed = segments is not None
    mask = segments if segments is not None else padding
    assert mask is not None
    known: dict[Any, Sequences] = vars(mask).setdefault(KNOWN, {})
    version = 0 if mask.is_inference() else mask._version
    if (key := (packed, queries, causal, version)) in known:
        return known[key]
    seen = seeing_something(mask > 0)
    real = seen[:, -queries:] if causal else torch.ones_like(seen[:, :1]).expand(-1, queries)
    rows, columns = real.flatten().nonzero()[:, 0], seen.flatten().nonzero()[:, 0]
    q_lengths, k_lengths = real.sum(1), seen.sum(1)
    if packed:
        numbers = mask + torch.arange(len(mask), device=mask.device)[:, None] * (mask.shape[1] + 1)
        q_lengths = k_lengths = torch.unique_consecutive(numbers.flatten()[columns], return_counts=True)[1]
    known[key] = Sequences(rows, columns, q_lengths.tolist(), k_lengths.tolist())
    return known[key]
