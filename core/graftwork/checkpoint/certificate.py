"""What shows that merged or exported weights are the checkpoint: tensors counted, and logits compared with the adapter's effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from graftwork.checkpoint import verification
from graftwork.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MEDIAN_KEPT = 0.5
"""The share of its change that at least half of the changed tensors must keep when they are rounded."""


@dataclass(frozen=True)
class Certificate:
    """What shows that merged weights are the checkpoint: its tensors, and equal logits.

    How much of an adapter survives is measured twice. Weights that are stored in few bits swallow small changes: a base in bf16
    has 8 bits, and an adapter that moves a weight by less than 1/512 of it leaves it as it was. `kept` is what is left of the
    adapter's effect on logits: the projection of (merged - base) on (adapter - base) over all logits of the golden inputs; 0.34 is
    an adapter that does a third of what it did. Logits see the largest effect, and a connector trained along can hide that the
    adapter is gone, so `weights_kept` is the same projection of every changed tensor, (rounded(W + D) - rounded(W)) on D, and of
    those the median. Noise that rounding adds is not in these shares, and is in `error`, which must be far below the effect.
    """

    checkpoint: str
    """The checkpoint's sha256."""
    precision: str
    """What the merged weights are stored in."""
    tensors: int
    """In the merged model; as many as in the unmerged one without what the method added."""
    changed: int
    """How many of them differ from the base."""
    new: int
    """How many of them the base lacks."""
    unchanged: int
    error: float
    """The largest difference between a logit of the merged and of the unmerged model on the golden inputs, both in fp32."""
    tolerance: float
    """At most this: what rounding may do, and no more than a twentieth of `distance`."""
    distance: float
    """The largest difference that the adapter makes to a logit; 0 where there is none to switch off."""
    kept: float | None
    """The share of the adapter's effect on logits that the merged model has; None where there is none to compare with."""
    weights_kept: float | None
    """The share of its change that the median changed tensor has; None where the base has none of them."""
    weakest: str
    """The changed tensor that kept the smallest share of its change."""
    rounded_in_training: list[str] = field(default_factory=list)
    """The memory strategies that had rounded the base on which the adapter was trained, such as nf4."""
    from_rounded: float | None = None
    """The largest difference between a logit of the merged model and of the adapter on the base as they rounded it, both in fp32; None
    where none did, or where one does not work here."""
    base_from_rounded: float | None = None
    """The same of both bases without the adapter: how much of it is theirs."""
    carried: list[str] = field(default_factory=list)
    """Files of the base's folder that were copied as they are."""
    not_carried: list[str] = field(default_factory=list)
    """Files there, other than weights, that have no counterpart in the merged folder."""
    notes: list[str] = field(default_factory=list)
    """What the tool that the format is of will make of it."""

    @property
    def share(self) -> str:
        """What is kept of the adapter, as the object of a sentence; empty where there is nothing to compare with."""
        parts = []
        if self.kept is not None:
            parts.append(f"{percent(self.kept)} of what the adapter does to logits")
        if self.weights_kept is not None:
            parts.append(f"{percent(self.weights_kept)} of the median tensor's change")
        return " and ".join(parts)

    @property
    def rounded(self) -> str:
        """How far the merged model is from the adapter on the base that it was trained on, a clause; empty where that was the whole one."""
        by = " and ".join(self.rounded_in_training)
        if not by or self.from_rounded is None:
            return (
                f"{by} rounded the base in training, and cannot here, so what that changes was not measured"
                if by
                else ""
            )
        return (
            f"{by} rounded the base in training: on that one logits differ by {self.from_rounded:.3g} with the adapter, and by "
            f"{self.base_from_rounded:.3g} without it"
        )


@dataclass(frozen=True)
class ReadBack:
    """What another tool made of an exported adapter."""

    reader: str
    """The tool and its version; empty where it cannot be asked."""
    error: float
    """The largest difference between its logits and the checkpoint's on the golden inputs, both in fp32."""
    tolerance: float
    distance: float
    """The largest difference that the adapter makes to a logit."""
    notes: list[str] = field(default_factory=list)


def kept_by_logits(adapter: Tensor, base: Tensor, merged: Tensor) -> float | None:
    """The projection of what the merged model does on what the adapter does; None where it does nothing."""
    effect = (adapter - base).double()
    if not effect.any():
        return None
    return float(((merged - base).double() * effect).sum() / effect.square().sum())


def kept_by_weight(base: Tensor, merged: Tensor, rounded: Tensor) -> float:
    """The share of a tensor's change from `base` to `merged` that is left in `rounded`, which has the dtype that is stored."""
    import torch

    change, left = merged - base, rounded.float() - base.to(rounded.dtype).float()
    return float((left * change).sum(dtype=torch.float64) / change.square().sum(dtype=torch.float64))


def kept_by_weights(shares: Mapping[str, float]) -> tuple[float | None, str]:
    """The median of the tensors' shares, and the tensor with the smallest."""
    return (median(shares.values()), min(shares, key=shares.__getitem__)) if shares else (None, "")


def check(certificate: Certificate, largest: float) -> None:
    """CheckpointError for a merge that is another model than the checkpoint; `largest` is the largest logit."""
    stored, error, distance = certificate.precision, certificate.error, certificate.distance
    rounding = verification.rounding(stored, largest)
    if not error <= rounding:
        raise CheckpointError(
            f"merging failed: the merged model's logits differ by {error:.3g}, at most {rounding:.3g} is rounding; nothing was "
            "written"
        )
    weights_lost = certificate.weights_kept is not None and certificate.weights_kept < MEDIAN_KEPT
    if stored != "fp32" and (error > certificate.tolerance or weights_lost):
        raise CheckpointError(
            f"stored in {stored}, the merged model keeps {certificate.share}: its logits differ by {error:.3g} where the adapter moves "
            f"them by {distance:.3g}; at most {verification.SHARE:.0%} of that, and {1 - MEDIAN_KEPT:.0%} of the median tensor's change, may be lost; nothing "
            "was written: store it with --precision fp32"
        )
    if error > certificate.tolerance:
        raise CheckpointError(
            f"it cannot be told whether the merged model is the checkpoint: its logits differ by {error:.3g}, which may be rounding, "
            f"and the adapter moves them by {distance:.3g} at most; nothing was written: train it longer, or use the base itself"
        )


def percent(share: float) -> str:
    """A share as people read it, rounded down so that 100% is all of it."""
    return f"{min(max(int(share * 1000 + 0.01), 0), 1000) / 10:g}%"
