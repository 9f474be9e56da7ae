"""Images as MGM's towers see them: made square and scaled on the host, in 8 bits; normalised and cut into views where the model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from PIL import Image as PILImage
from torch import Tensor

from graftwork.contracts import Image, PixelSettings, TowerOutput
from graftwork.data import MAX_PIXELS, load_image
from graftwork.errors import DataError


@dataclass(frozen=True)
class Images:
    """How an image becomes pixels, and how many tokens it takes."""

    low: TowerOutput
    high: TowerOutput | None
    aspect_ratio: str
    """`pad` to a square of the mean colour, or cut the middle `square` out."""
    grid: int
    """The low tower sees `grid` x `grid` tiles of the image."""
    overview: bool
    """Whether it sees the whole image as well, before the tiles."""

    @classmethod
    def of(cls, config: Mapping[str, Any], outputs: Mapping[str, TowerOutput]) -> Images:
        """Those of a model, from its configuration and what its towers compute."""
        how = (config["aspect_ratio"], config["image_grid"], config["image_global"])
        return cls(outputs["low"], outputs.get("high"), *how)

    @property
    def tokens(self) -> int:
        """Tokens for each image."""
        rows, columns = self.low.grids[0]
        return rows * columns * self.views

    @property
    def views(self) -> int:
        """How often the low tower looks at an image."""
        return self.grid**2 + self.overview

    @property
    def finest(self) -> tuple[str, PixelSettings, int]:
        """The part whose pixels all others are made of, how they are normalised, and the side of the image that it is made of."""
        if self.high:
            return "high", self.high.pixels, self.high.pixels.size
        return "low", self.low.pixels, self.low.pixels.size * self.grid

    def pixels(self, image: Image) -> dict[str, Tensor]:
        """The image as the finest part sees all of it, made square and scaled: `[1, 3, side, side]`, uint8."""
        part, settings, side = self.finest
        return {part: self.square(load_image(image), settings, side)}

    def square(self, image: PILImage.Image, settings: PixelSettings, size: int) -> Tensor:
        """An RGB image as `[1, 3, size, size]`, uint8: made square and scaled."""
        long, short = max(image.size), min(image.size)
        pad = self.aspect_ratio == "pad"
        if (long * long if pad else size * size * long // short) > 4 * MAX_PIXELS:
            raise DataError(
                f"an image of {image.width} x {image.height} pixels is too narrow to be made square; cut it"
            )
        if pad:
            square = PILImage.new("RGB", (long, long), tuple(int(255 * mean) for mean in settings.mean))
            square.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
            image, short = square, long
        filtering = PILImage.Resampling(settings.resample)
        scaled = image.resize((size * image.width // short, size * image.height // short), filtering)
        left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
        array = numpy.asarray(scaled.crop((left, top, left + size, top + size)))
        return torch.from_numpy(numpy.ascontiguousarray(numpy.moveaxis(array, 2, 0))).unsqueeze(0)

    def parts(self, pixels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """For each part what it sees, normalised, from `pixels` of several images: `high` `[images, 3, size, size]`, and `low`
        `[images * views, 3, size, size]`, of each image the whole if wanted, then the tiles row by row.

        The low image is interpolated from the normalised high one, as the published models were trained; towers that were trained with
        other means and deviations than one another get each its own. Pixels that are no 8 bits are what the parts see already: golden
        inputs of earlier checkpoints hold them so.
        """
        part, settings, _ = self.finest
        if pixels[part].dtype != torch.uint8:
            return pixels
        fine = normalised(pixels[part], settings)
        side = self.low.pixels.size
        mosaic = self.as_low(resized(fine, side * self.grid))
        views = mosaic.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        if self.overview:
            views = torch.cat([resized(mosaic, side).unsqueeze(1), views], dim=1)
        low = views.flatten(0, 1).contiguous()
        return {"low": low, "high": fine} if self.high else {"low": low}

    def as_low(self, fine: Tensor) -> Tensor:
        """Pixels that are normalised for the finest part, as the low one wants them."""
        low, (_, settings, _) = self.low.pixels, self.finest
        if (low.mean, low.std) == (settings.mean, settings.std):
            return fine
        ways = zip(fine.unbind(1), settings.std, settings.mean, low.mean, low.std, strict=True)
        return torch.stack([(each * std + mean - wanted) / width for each, std, mean, wanted, width in ways], 1)


def normalised(pixels: Tensor, settings: PixelSettings) -> Tensor:
    """Pixels `[images, 3, …]` from 8 bits to fp32; channel by channel, so that no numbers have to be sent to the device."""
    fine = pixels.to(torch.float32).div_(255)
    for channel, mean, std in zip(fine.unbind(1), settings.mean, settings.std, strict=True):
        channel.sub_(mean).div_(std)
    return fine


def resized(pixels: Tensor, size: int) -> Tensor:
    """`[images, 3, size, size]`, bilinear and without antialiasing."""
    return torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
