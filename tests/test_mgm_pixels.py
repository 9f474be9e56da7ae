"""MGM's images travel in 8 bits: what the model makes of them is what the host made of each, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy
import pytest
import torch
from PIL import Image as PILImage

from graftwork.contracts import Image, PixelSettings, TowerOutput
from graftwork_mgm.pixels import Images

CLIP = PixelSettings(56, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
LOW, HIGH = TowerOutput((8,), ((4, 4),), CLIP), TowerOutput((8,), ((8, 8),), replace(CLIP, size=200))
OTHER = replace(HIGH, pixels=replace(HIGH.pixels, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2)))


def image(number: int) -> Image:
    noise = numpy.random.default_rng(number).integers(0, 256, (90 + 10 * number, 120, 3), dtype=numpy.uint8)
    file = BytesIO()
    PILImage.fromarray(noise).save(file, "PNG")
    return Image(data=file.getvalue())


def on_the_host(images: Images, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """One image normalised in numpy and cut alone, as it was before images travelled in 8 bits."""

    def resized(given: torch.Tensor, size: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(given, size=(size, size), mode="bilinear", align_corners=False)

    low, high = images.low.pixels, (images.high or images.low).pixels
    array = pixels[0].numpy().astype(numpy.float32)
    array /= 255
    array -= numpy.array(high.mean, dtype=numpy.float32)[:, None, None]
    array /= numpy.array(high.std, dtype=numpy.float32)[:, None, None]
    fine = torch.from_numpy(array)[None]
    mosaic = resized(fine, low.size * images.grid)
    if (low.mean, low.std) != (high.mean, high.std):
        means, stds = (
            [torch.tensor(values)[:, None, None] for values in (a, b)]
            for a, b in ((low.mean, high.mean), (low.std, high.std))
        )
        mosaic = (mosaic * stds[1] + means[1] - means[0]) / stds[0]
    tiles = mosaic[0].unfold(1, low.size, low.size).unfold(2, low.size, low.size).flatten(1, 2).transpose(0, 1)
    seen = torch.cat([resized(mosaic, low.size), tiles]) if images.overview else tiles
    return {"low": seen} | ({"high": fine} if images.high else {})


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize(("grid", "overview"), [(1, False), (2, True), (2, False)])
@pytest.mark.parametrize(
    "high", [None, HIGH, OTHER], ids=["no high part", "high part", "high part with a mean of its own"]
)
def test_parts_see_what_the_host_made_of_each_image(high: Any, grid: int, overview: bool, aspect_ratio: str) -> None:
    images = Images(LOW, high, aspect_ratio, grid, overview)
    sent = [images.pixels(image(number)) for number in range(3)]
    assert {tensor.dtype for each in sent for tensor in each.values()} == {torch.uint8}
    (part,) = sent[0]
    joined = torch.cat([each[part] for each in sent])
    found, wanted = images.parts({part: joined}), [on_the_host(images, each[part]) for each in sent]
    assert found.keys() == wanted[0].keys()
    assert all(found[name].equal(torch.cat([each[name] for each in wanted])) for name in found)
    assert images.parts(found) is found  # as golden inputs of before hold them
