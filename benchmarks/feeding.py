"""What an image costs the processes that prepare records, and the run that takes them: processor milliseconds.

    python benchmarks/feeding.py [--images 400] [--rounds 5]

JPEGs of 1,024 x 768 pixels, prepared for MGM-2B by one worker as in a training run, four to a parcel, and collated eight at a time.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from commands import children
from inputs import mgm_images

from graftwork.contracts import Encoded, collate
from graftwork.train.feeding import Feed
from graftwork.train.preparing import parcels

BATCH = 8


class Images:
    """In the place of a run's feed: every record is one image and a token."""

    def __init__(self, folder: Path) -> None:
        self.images, self.jpeg = mgm_images(folder)

    def indices(self, batch: int) -> Sequence[int]:
        """The records of a batch."""
        return range(BATCH * batch, BATCH * (batch + 1))

    def made(self, index: int) -> Encoded:
        """A record, encoded."""
        return Encoded([5], [True], [5], self.images.pixels(self.jpeg))


def measured(feed: Any, count: int) -> tuple[float, float]:
    """The milliseconds that an image costs a worker, and the run."""
    before, begun, held = children(), time.process_time(), list[Encoded]()
    prepared = parcels(cast(Feed, feed), 0, 1)
    taken = 0
    while taken < count:
        held += [each for _, each in next(prepared).opened() if isinstance(each, Encoded)]
        if len(held) == BATCH:
            collate(held, pad_id=0)
            taken, held = taken + BATCH, []
    own = time.process_time() - begun
    del prepared
    gc.collect()
    # What it had prepared ahead is not counted, though it costs as much: the worker's figure is an upper bound.
    return 1e3 * (children() - before) / taken, 1e3 * own / taken


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        feed = Images(Path(folder))
        rounds = [measured(feed, options.images) for _ in range(options.rounds)]
    for name, costs in zip(("a worker", "the run"), zip(*rounds, strict=True), strict=True):
        median = statistics.median(costs)
        print(
            f"{name}: {median:.2f} ms an image ({min(costs):.2f} to {max(costs):.2f}), {1e3 / median:.0f} images/s on a core"
        )


if __name__ == "__main__":
    main()
