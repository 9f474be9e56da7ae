"""A batch without its padding, for kernels that take sequences of different lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A batch without its padding: one sequence after another, for kernels that take sequences of different lengths."""

    q: Tensor
    """`[real queries, heads, head_dim]`."""
    k: Tensor
    """`[real keys, kv_heads, head_dim]`."""
    v: Tensor
    """As `k`."""
    q_lengths: Tensor
    """`[batch]`: how many queries each sequence has."""
    k_lengths: Tensor
    """`[batch]`: how many keys each sequence has, at least one."""
    batch: int
    """How many rows the padded batch has."""
    rows: Tensor
    """`[real queries]`: where the queries lie in the padded batch, with batch and positions in one dimension."""
    queries: int
    """How many queries each sequence of the padded batch has."""

    def unpack(self, output: Tensor) -> Tensor:
        """From `[real queries, heads, head_dim]` to `[batch, heads, queries, head_dim]`, with 0 at padding."""
        padded = output.new_zeros(self.batch * self.queries, *output.shape[1:]).index_copy(0, self.rows, output)
        return padded.view(self.batch, self.queries, *output.shape[1:]).transpose(1, 2)


def pack(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, causal: bool, segments: Tensor | None = None
) -> Packed:
    """Take the padding out of a batch; shapes are those of `AttentionKernel.forward`, of which it has `padding` or `segments`. Each segment
    becomes a sequence of its own.

    Causal queries are the last positions of the keys, so that padding among them goes too, and the queries that stay are
    still the last of the keys that stay: a causal kernel must align its mask at the bottom right. Other queries all stay.
    """
    import torch

    queries = q.shape[2]
    if segments is not None:
        padding = segments > 0
    assert padding is not None
    padding = padding | ~padding.any(1, keepdim=True)  # a sequence without any key would have no defined result
    real = padding[:, -queries:] if causal else torch.ones_like(padding[:, :1]).expand(-1, queries)
    rows, columns = real.flatten().nonzero()[:, 0], padding.flatten().nonzero()[:, 0]

    def lines(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.transpose(1, 2).flatten(0, 1)[index]

    q_lengths, k_lengths = real.sum(1), padding.sum(1)
    if segments is not None:
        numbers = segments + torch.arange(len(segments), device=q.device)[:, None] * (segments.shape[1] + 1)
        q_lengths = k_lengths = torch.unique_consecutive(numbers.flatten()[columns], return_counts=True)[1]
    return Packed(lines(q, rows), lines(k, columns), lines(v, columns), q_lengths, k_lengths, len(q), rows, queries)
