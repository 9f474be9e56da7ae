"""The memory strategy `adam8bit`: AdamW whose two moments are kept in 8 bits (arXiv:2110.02861), by bitsandbytes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwork import Requires, hookimpl, setting
from graftwork.contracts import Approximation, MemoryStrategy

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from graftwork.contracts import Assembly, TrainSettings


BLOCK = 256
"""Values that share a scale."""


@dataclass(frozen=True)
class Adam8bitSettings:
    """Which moments stay in fp32."""

    least: int = setting(4096, "Parameters with fewer elements keep their moments in fp32", minimum=1)


class Adam8bit(MemoryStrategy[Adam8bitSettings]):
    """AdamW with moments of about 2 bytes for each trained parameter instead of 8

    It helps where much is trained: an adapter's moments are small beside everything else.
    """

    name = "adam8bit"
    requires = Requires(packages=("bitsandbytes>=0.50",))
    approximates = Approximation("the optimizer's moments are kept in 8 bits", tolerance=0.1, outputs=False)
    Settings = Adam8bitSettings

    def footprint(self, alone: Mapping[str, int], processes: int, assembly: Assembly) -> Mapping[str, int]:
        """The moments in 8 bits, each block with two scales; bitsandbytes' code does not run on tensors without content."""
        sizes = [parameter.numel() for parameter in assembly.trained().values()]
        moments = sum(2 * n + 8 * -(-n // BLOCK) if n >= self.settings.least else 8 * n for n in sizes)
        return {**alone, "optimizer state": moments}

    def optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> Optimizer:
        # At import it warns that an optional package is missing, which is not needed.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        from bitsandbytes.optim import AdamW8bit

        optimizer: Optimizer = AdamW8bit(
            groups,
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            min_8bit_size=self.settings.least,
        )
        return optimizer


@hookimpl
def memory_strategies() -> list[type[MemoryStrategy[Any]]]:
    """The strategy of this plugin."""
    return [Adam8bit]
