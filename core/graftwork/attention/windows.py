"""Sequences that lie one after another in a single row, as transformers' image encoders hand on their windows and images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwork.attention.definition import attend

if TYPE_CHECKING:
    from torch import Tensor, nn

KNOWN = "graftwork_windows"
"""The attribute of boundaries that holds their windows, so that they are read once for all layers."""


@dataclass(frozen=True)
class Windows:
    """Where the sequences of a row lie, in an order in which those of one length lie side by side: each such group is a batch without
    padding."""

    groups: list[tuple[int, int]]
    """How many sequences, and how long they are."""
    order: Tensor | None = None
    """`[positions]`: the row's positions in that order; None where it is theirs."""
    back: Tensor | None = None
    """`[positions]`: where in that order the row's positions are."""

    def apart(self, row: Tensor) -> list[Tensor]:
        """From `[1, heads, positions, head_dim]` to `[sequences, heads, length, head_dim]` for each group."""
        import torch

        lines = row[0].transpose(0, 1)
        lines = lines if self.order is None else lines[self.order]
        pieces = torch.split(lines, [count * length for count, length in self.groups])
        return [
            torch.unflatten(piece, 0, group).transpose(1, 2) for piece, group in zip(pieces, self.groups, strict=True)
        ]

    def together(self, groups: list[Tensor]) -> Tensor:
        """What `apart` took apart."""
        import torch

        pieces = [group.transpose(1, 2).flatten(0, 1) for group in groups]
        lines = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return (lines if self.back is None else lines[self.back]).transpose(0, 1)[None]


def attend_within(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, **options: Any) -> Tensor:
    """`attend` on a batch of one row, in which each sequence sees itself alone: a call for each length that there is.

    `boundaries` is `[sequences + 1]`: where each sequence begins, and where the last one ends.
    """
    windows = windows_between(boundaries)
    groups = zip(*(windows.apart(tensor) for tensor in (q, k, v)), strict=True)
    return windows.together([attend(module, *group, **options) for group in groups])


def windows_between(boundaries: Tensor) -> Windows:
    """The windows between boundaries (see `attend_within`), found when they are first asked for."""
    import numpy as np
    import torch

    known: Windows | None = getattr(boundaries, KNOWN, None)
    if known is None:
        lengths = np.diff(boundaries.tolist())
        groups = [(int((lengths == length).sum()), int(length)) for length in np.unique(lengths) if length]
        order = np.argsort(np.repeat(lengths, lengths), kind="stable")
        places = () if (order[1:] > order[:-1]).all() else (order, np.argsort(order))
        there = [torch.tensor(each).to(boundaries.device) for each in places]
        setattr(boundaries, KNOWN, known := Windows(groups, *there))
    return known
