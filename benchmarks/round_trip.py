"""What the round trip keeps of labels of which some are wrong, and what templates make of images without labels.

    PYTHONPATH=tests python benchmarks/round_trip.py [IMAGES] > benchmarks/round_trip.md

The writer is the tiny MGM-Gemma, without an adapter, or one whose replies are fixed; the images are easy-VQA's first ones, by default 1,000.
Needs `easy-vqa`; takes minutes on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from demo_writer import ASK_BACK, COLOURS, SHAPES, demo_writer, labels, spoiled, unlabelled
from fixed_writers import always, at_random, by_image, by_word

from graftwork.contracts import Record, VerifiedGroup, Writer
from graftwork.jobs.run import installed
from graftwork_makers import AskTemplates
from graftwork_makers.templates import AskTemplatesSettings, Template
from graftwork_round_trip import RoundTrip, RoundTripSettings

SEED = 5
FIXED: Mapping[str, Writer] = {
    "yes to everything": always("yes"),
    "no to everything": always("no"),
    "yes at random, half of the time": at_random(0.5),
    "yes at random, a tenth of the time": at_random(0.1),
    "yes to one word": by_word("red", "circle"),
    "yes to some words": by_word("red", "blue", "teal", "circle", "triangle"),
    "yes to half of the images": by_image(),
}
TITLE = """# The round trip

Made by `PYTHONPATH=tests python benchmarks/round_trip.py{given}`: easy-VQA's first {images:,} images, in {colours:,} of which a
question asks for the colour, and in {shapes:,} for the shape. The tiny MGM-Gemma knows whether there is a red shape, and says no to
whatever it is asked about circles.

## Verified

Answers are spoiled by another answer of their group. *Control* are wrong answers that were asked about, *right* the share of what is
kept that is right, and *found* the share of the right answers that is kept.

| writer | group | spoiled | answers | affirmed | control | affirmed | kept | right | found |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def verified(name: str, writer: Writer, records: list[Record], share: float) -> list[VerifiedGroup]:
    """Print what a writer keeps of records of which this share is spoiled; what it says of them."""
    given, right = spoiled(records, share)
    verifier = RoundTrip(RoundTripSettings(questions=ASK_BACK))
    kept = [item for item in verifier.apply(given, seed=SEED, writer=writer) if isinstance(item, Record)]
    for found in verifier.verdicts():
        own = [record for record in kept if record.group == found.group]
        good = sum(record.id in right for record in own)
        there = sum(record.id in right for record in given if record.group == found.group)
        shares = (f"{good / len(own):.1%}", f"{good / there:.1%}") if own else ("–", "–")
        numbers = (found.records, found.affirmed, found.control, found.control_affirmed, found.kept)
        print(
            f"| {name} | {found.group} | {share:.0%} | {' | '.join(f'{n:,}' for n in numbers)} | {' | '.join(shares)} |"
        )
    return list(verifier.verdicts())


def made(writer: Writer, records: list[Record]) -> None:
    """Print what templates make of images."""
    templates = {
        "colour": Template("what color is the shape?", "is there a {value} shape?", COLOURS),
        "shape": Template("what shape is in the image?", "does the image contain a {value}?", SHAPES),
    }
    maker = AskTemplates(AskTemplatesSettings(templates=templates))
    known = {(str(record.images[0]), record.group): record.turns[-1].text for record in records}
    items = [item for item in maker.apply(unlabelled(records), seed=SEED, writer=writer) if isinstance(item, Record)]
    for group in templates:
        own = [item for item in items if item.meta.get("made_by") and item.group == group]
        told = [item for item in own if (str(item.images[0]), group) in known]
        right = sum(item.turns[-1].text == known[str(item.images[0]), group] for item in told)
        there = sum(name == group for _, name in known)
        shares = (f"{len(told) / there:.1%}", f"{right / len(told):.1%}") if told else ("0.0%", "–")
        print(f"| {group} | {len(unlabelled(records)):,} | {len(own):,} | {there:,} | {' | '.join(shares)} |")


def main() -> None:
    """Measure, and print a page."""
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    records = labels(images)
    counts = {group: sum(record.group == group for record in records) for group in ("colour", "shape")}
    given = f" {images}" if len(sys.argv) > 1 else ""
    print(TITLE.format(given=given, images=images, colours=counts["colour"], shapes=counts["shape"]))
    whys: dict[str, str] = {}
    with TemporaryDirectory() as folder, demo_writer(Path(folder), installed()) as writer:
        for share in (0.0, 0.3, 0.6):
            for found in verified("the tiny MGM-Gemma", writer, records, share):
                whys.setdefault(f"the tiny MGM-Gemma, {found.group}", found.why)
        for name, fixed in FIXED.items():
            for found in verified(name, fixed, records, 0.3):
                whys[f"{name}, {found.group}"] = found.why
        print("\nWhy nothing was kept:\n")
        print("\n".join(f"- {name}: {why}." for name, why in whys.items() if why))
        print(
            "\n## Made by templates\n\nEvery colour and every shape is asked about; *right* is of those that easy-VQA has an answer to.\n"
        )
        print(
            "| group | images | made | with a known answer | of these made | right |\n| --- | --- | --- | --- | --- | --- |"
        )
        made(writer, records)


if __name__ == "__main__":
    main()
