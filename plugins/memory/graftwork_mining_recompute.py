"""The memory strategy `mining-recompute`: what joins the towers' maps is computed twice, from the maps as they came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from graftwork import GraftworkError, hookimpl, setting
from graftwork.contracts import MemoryStrategy

if TYPE_CHECKING:
    from torch import nn

    from graftwork.contracts import Assembly

ROW = "mining"


@dataclass(frozen=True)
class MiningRecomputeSettings:
    """How many images are joined at a time."""

    pictures: int = setting(1, "Images whose enlarged maps are in memory at the same time", minimum=1)


class MiningRecompute(MemoryStrategy[MiningRecomputeSettings]):
    """Keeps the towers' own maps and joins them again for the gradients, image by image

    Joining enlarges every map to the finest one and normalises all of it: far more values than the maps have. It works on
    the blocks that a model lists under `mining`, whose inputs and outputs count images in their first dimension.
    """

    name = "mining-recompute"
    Settings = MiningRecomputeSettings

    def prepare(self, assembly: Assembly) -> None:
        """Wrap the `forward` of what joins the maps; GraftworkError where a model does not say what does."""
        blocks = assembly.structure.blocks
        if ROW not in blocks:
            raise GraftworkError(
                f"'{self.name}' works on blocks of '{ROW}', and this model has {', '.join(map(repr, blocks)) or 'none'}; "
                "leave it out"
            )
        for name in blocks[ROW]:
            block = assembly.structure.model.get_submodule(name)
            # A partial of a bound method is copied with its module; a closure would keep the original's.
            block.forward = partial(_forward, block, block.forward, self.settings.pictures)


def _forward(block: nn.Module, forward: Callable[..., Any], size: int, *maps: Any) -> Any:
    """The block's own forward for some images at a time, checkpointed where gradients will be asked for."""
    import torch
    from torch.utils.checkpoint import checkpoint

    compute = forward
    if block.training and torch.is_grad_enabled():
        compute = partial(checkpoint, forward, use_reentrant=False)
    return torch.cat([compute(*part) for part in _parts(maps, size)])


def _parts(maps: Any, size: int) -> Iterator[Any]:
    """A tuple or list of tensors, or of such lists, `size` images at a time, as views."""
    import torch

    return zip(*(torch.split(m, size) if isinstance(m, torch.Tensor) else _parts(m, size) for m in maps), strict=True)


@hookimpl
def memory_strategies() -> list[type[MemoryStrategy[Any]]]:
    """The strategy of this plugin."""
    return [MiningRecompute]
