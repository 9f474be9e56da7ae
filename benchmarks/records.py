"""What it takes to get from a data file of many records to the first batch: time of the processors, and memory, for each record.

    python benchmarks/records.py [--records 665000] [--other-tree FOLDER]

A file of LLaVA's JSON is made with conversations of one to five turns about some hundred small images. Each measurement is a process
of its own, on a tiny MGM-Gemma: the first reads and measures, the second finds what the first has kept. With `--other-tree`, another
version of the project is measured on the same file in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "in",
    "to",
    "image",
    "shows",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "what",
    "is",
    "colour",
    "shape",
    "there",
    "near",
    "left",
    "right",
    "large",
    "small",
    "person",
    "dog",
    "table",
    "street",
    "window",
    "holding",
    "standing",
    "which",
    "how",
    "many",
    "describe",
    "briefly",
    "answer",
    "question",
    "background",
    "light",
]


def make_data(folder: Path, records: int) -> Path:
    """A data file with so many records, and its images."""
    from PIL import Image

    draw = random.Random(7)
    for number in range(300):
        colour = tuple(draw.randrange(256) for _ in range(3))
        Image.new("RGB", (40, 40), colour).save(folder / f"{number}.png")
    file = folder / "data.json"
    with file.open("w") as stream:
        stream.write("[")
        for number in range(records):
            turns = []
            for turn in range(draw.choice((1, 1, 1, 2, 3, 5))):
                question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(4, most))) for most in (14, 60))
                turns.append({"from": "human", "value": f"<image>\n{question}?" if not turn else f"{question}?"})
                turns.append({"from": "gpt", "value": f"{answer}."})
            content = {"id": str(number), "image": f"{draw.randrange(300)}.png", "conversations": turns}
            stream.write(f"{',' if number else ''}\n{json.dumps(content)}")
        stream.write("\n]\n")
    return file


def resident() -> int:
    """The bytes that this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(file: Path) -> dict[str, Any]:
    """Load the data for a tiny MGM-Gemma, and encode its first batch."""
    from graftwork.build import compose
    from graftwork.config import runfile
    from graftwork.config.resolve import resolve
    from graftwork.data.training_data import load_training_data
    from graftwork.train.feeding import Feed
    from graftwork_registry import Catalog

    catalog = Catalog.discover()
    run = runfile.load(
        Path(__file__).parents[1] / "examples" / "demo-base" / "demo.toml",
        {
            "data.source": [{"use": "llava-json", "path": str(file)}],
            "data.operator": [],
            "evaluate": {},
            "train.max_length": 512,
        },
    )
    plan = resolve(run, catalog)
    processor = compose.build_shape(plan, catalog).processor
    before, begun, used = resident(), time.perf_counter(), time.process_time()
    data = load_training_data(plan, catalog, processor)
    feed = Feed(plan.run_context, processor, data)
    feed.encode(feed.sampler.batch(0))
    return {
        "records": data.read,
        "seconds": time.perf_counter() - begun,
        "cpu": time.process_time() - used,
        "grown": resident() - before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }


def measured(file: Path, tree: Path | None, cache: Path) -> dict[str, Any]:
    """What `measure` gives in a process of its own, of this version or of that in another tree."""
    environment = {**os.environ, "GRAFTWORK_CACHE": str(cache)}
    if tree:
        roots = [tree / "core", tree / "registry", *sorted((tree / "plugins").iterdir())]
        environment["PYTHONPATH"] = os.pathsep.join(map(str, roots))
    command = [sys.executable, __file__, "--measure", str(file)]
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--other-tree", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = make_data(Path(folder), options.records)
        print(f"{options.records:,} records, {file.stat().st_size / options.records:.0f} bytes each", flush=True)
        runs = [("first time", None), ("again", None)]
        if options.other_tree:
            runs.insert(0, (str(options.other_tree), options.other_tree.resolve()))
        print(
            "| run | wall s | CPU ms a record | memory kept, bytes a record | at the peak |\n| --- | --- | --- | --- | --- |"
        )
        for name, tree in runs:
            found = measured(file, tree, Path(folder) / "cache")
            count = found["records"]
            print(
                f"| {name} | {found['seconds']:.1f} | {found['cpu'] / count * 1e3:.3f} | {found['grown'] / count:.0f} "
                f"| {found['peak'] / count:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
