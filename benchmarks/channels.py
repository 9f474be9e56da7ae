"""Convolutional towers whose pixels' channels lie together in memory beside the order of planes: ratios of processor time.

    python benchmarks/channels.py [--rounds 5]

EfficientNet-Lite0 and a ConvNeXt of the size that is called tiny, random, on an image of 768 pixels and one thread; both orders in turn in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from graftwork.contracts import BuildContext
from graftwork_convnext import OpenClipConvNext
from graftwork_efficientnet import EfficientNetLite

SIDE = 768
TINY = {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3], "patch_size": 4, "image_size": SIDE}


def towers() -> dict[str, Any]:
    """The towers by name."""
    torch.manual_seed(0)
    lite = EfficientNetLite(EfficientNetLite.Settings())
    convnext = OpenClipConvNext(OpenClipConvNext.Settings())
    return {
        "EfficientNet-Lite0": lite.build({"image_size": SIDE}, BuildContext()),
        "ConvNeXt": convnext.build({**TINY, "drop_path_rate": 0.0, "norm_eps": 1e-6}, BuildContext()),
    }


def seconds(tower: Any, pixels: torch.Tensor, order: torch.memory_format, backward: bool) -> float:
    """CPU seconds of a pass over pixels in this order."""
    # The module itself would choose the order by whether it is in training; the layers below stay in evaluation.
    tower.training = order is torch.contiguous_format
    given = pixels.contiguous(memory_format=order)
    began = time.process_time()
    with torch.set_grad_enabled(backward):
        maps = tower(given)
        if backward:
            sum(each.float().square().mean() for each in maps).backward()
    return time.process_time() - began


def main() -> None:
    """Print a line for each tower, precision and pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for name, tower in towers().items():
        for dtype in (torch.float32, torch.bfloat16):
            tower.to(dtype).eval()
            pixels = torch.randn(1, 3, SIDE, SIDE, dtype=dtype)
            for backward in (False, True):
                tower.requires_grad_(backward)
                ratios = []
                for number in range(rounds + 1):
                    planes, together = (
                        seconds(tower, pixels, order, backward)
                        for order in (torch.contiguous_format, torch.channels_last)
                    )
                    ratios += [planes / together] * (number > 0)
                what = "with gradients" if backward else "frozen"
                print(
                    f"{name}, {str(dtype).removeprefix('torch.')}, {what}: channels together {statistics.median(ratios):.2f} times as fast "
                    f"({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
