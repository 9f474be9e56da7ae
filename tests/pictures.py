"""Images as photographs are: smooth, of weak colours, and each another one."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from graftwork.contracts import Image, Record, Turn


def picture(seed: int, size: tuple[int, int] = (320, 256)) -> PILImage.Image:
    """A field of coarse noise, smoothly scaled up."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(20, 236, (6, 6, 1)) + draw.integers(-20, 21, (6, 6, 3))
    return PILImage.fromarray(coarse.astype(np.uint8)).resize(size, PILImage.Resampling.BICUBIC)


def encoded(made: PILImage.Image, kind: str = "PNG", **options: int) -> Image:
    """An image by its bytes."""
    buffer = BytesIO()
    made.save(buffer, kind, **options)
    return Image(data=buffer.getvalue())


def about(id: str, *images: Image, question: str = "What is it?", answer: str = "A field.", **fields: str) -> Record:
    """A record with one question."""
    text = "<image>\n" * bool(images) + question
    return Record(id, (Turn("user", text), Turn("assistant", answer)), images, **fields)  # type: ignore[arg-type]


def saved(made: PILImage.Image, path: Path) -> Image:
    """An image in a file."""
    made.save(path)
    return Image(path)
