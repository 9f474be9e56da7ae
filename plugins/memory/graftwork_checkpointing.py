"""The memory strategy `checkpointing`: activations are computed twice rather than kept (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from graftwork import GraftworkError, hookimpl, setting
from graftwork.contracts import MemoryStrategy

if TYPE_CHECKING:
    from torch import nn

    from graftwork.contracts import Assembly


@dataclass(frozen=True)
class CheckpointingSettings:
    """Which blocks keep only their input."""

    of: tuple[str, ...] = setting(
        ("language",), "The rows of blocks: 'language', or 'vision.PART' where a tower is trained"
    )


class Checkpointing(MemoryStrategy[CheckpointingSettings]):
    """Keeps only the input of every block and computes the rest again for the gradients"""

    name = "checkpointing"
    Settings = CheckpointingSettings

    def prepare(self, assembly: Assembly) -> None:
        """Wrap the blocks' `forward`; modules, names and hooks stay as they are.

        Raises GraftworkError for a row of blocks that the model does not have.
        """
        blocks = assembly.structure.blocks
        if unknown := [name for name in self.settings.of if name not in blocks]:
            raise GraftworkError(
                f"'checkpointing' is asked for the blocks of '{unknown[0]}', and this model has "
                f"{', '.join(map(repr, blocks)) or 'none'}; change its setting 'of'"
            )
        for row in self.settings.of:
            for name in blocks[row]:
                block = assembly.structure.model.get_submodule(name)
                # A partial of a bound method is copied with its module; a closure would keep the original's.
                block.forward = partial(_forward, block, block.forward)


def _forward(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The block's own forward, checkpointed where gradients will be asked for."""
    import torch
    from torch.utils.checkpoint import checkpoint

    given = (*args, *kwargs.values(), *block.parameters())
    wanted = any(isinstance(each, torch.Tensor) and each.requires_grad for each in given)
    if not (wanted and block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    if kwargs.get("past_key_values") is not None:
        raise GraftworkError(
            "a checkpointed block is asked to fill a cache of keys and values, which it would do twice; "
            "train without a cache, or switch the model to evaluation"
        )
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@hookimpl
def memory_strategies() -> list[type[MemoryStrategy[Any]]]:
    """The strategy of this plugin."""
    return [Checkpointing]
