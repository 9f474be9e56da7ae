"""From images without a word about them to verified training data, and to what it is worth.

    python examples/better-data/better_data.py [--images N] [--steps N] [--out FOLDER]

A weak model writes labels, another way of asking verifies them, and the same run is trained on verified labels, on all that was
written, and on what people said. What is in the folder already is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graftwork
from graftwork.jobs.messages import Message

HERE = Path(__file__).resolve().parent
FIRST = 250
"""How many images the writer learns from; the next ones are those without labels."""
FILES = {"clean": "images.toml", "verified": "synthesize.toml"}
"""Data set to the data file that it is made by."""


def main() -> None:
    """Everything, in order."""
    parser = argparse.ArgumentParser(description="Synthesize labels, verify them, and measure what they are worth.")
    parser.add_argument("--images", type=int, default=1500, help="how many images without labels")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of each run that is compared; by default those of the run file"
    )
    parser.add_argument(
        "--questions", type=int, help="how many of each group are asked; by default those of the run file"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE, help="where the folder `out` goes, with copies of the files")
    given = parser.parse_args()
    folder = copied(given.out)
    work = folder / "out"
    questions = list(images_of(given.images))
    if not work.exists():
        prepare(work, questions)
    if not (work / "first" / "report.html").exists():  # It is written last.
        run = graftwork.load_run(folder / "first.toml")
        graftwork.train(run, resume=(work / "first").exists(), on_event=tell)
    for name, make in (("clean", graftwork.process_data), ("verified", graftwork.synthesize_data)):
        if not (work / name).exists():
            begun = (work / f".{name}.unfinished").exists()
            make(folder / FILES[name], work / name, copy=name == "clean", resume=begun, on_event=tell)
    graftwork.write_data_card(work / "verified")
    unfiltered(work)
    overrides = {"train.steps": given.steps} if given.steps else {}
    if given.questions:
        overrides |= {"evaluate.easy-vqa.per_group": given.questions}
    worth = graftwork.value_data(
        graftwork.load_run(folder / "train.toml", overrides),
        [work / "unfiltered.jsonl", work / "human.jsonl"],
        work / "value",
        seeds=given.seeds,
        resume=(work / "value").exists(),
        on_event=tell,
    )
    print(labels(work))
    print(worth)


def copied(out: Path) -> Path:
    """The folder of the run and data files: this one, or one to which they were copied, with paths that still lead to the base."""
    if out.resolve() == HERE:
        return HERE
    out.mkdir(parents=True, exist_ok=True)
    base = (HERE / "../demo-base/base").resolve()
    for file in HERE.glob("*.toml"):
        text = file.read_text(encoding="utf-8").replace("../demo-base/base", str(base))
        (out / file.name).write_text(text, encoding="utf-8")
    return out


def tell(message: object) -> None:
    """Print what a job says."""
    if isinstance(message, Message):
        print(message.text, flush=True)


def images_of(count: int) -> Iterator[tuple[Path, str, str, str]]:
    """Image, group, question and answer of the open questions about the images that the writer has not learnt from."""
    from graftwork_easy_vqa import EasyVqaSource, EasyVqaSourceSettings

    source = EasyVqaSource(EasyVqaSourceSettings(kind="open", pictures=FIRST + count))
    for record in source.records():
        image = record.images[0].path
        assert image is not None
        if int(image.stem) >= FIRST:
            yield image, record.group, record.question.removeprefix("<image>\n"), record.turns[-1].text


def prepare(work: Path, questions: list[tuple[Path, str, str, str]]) -> None:
    """Copy the images, and write apart what people said of them."""
    new = work.with_name("out.unfinished")
    shutil.rmtree(new, ignore_errors=True)
    (new / "images").mkdir(parents=True)
    for image in {image for image, *_ in questions}:
        shutil.copy(image, new / "images" / image.name)
    rows = [
        line(f"{number}", image.name, group, asked, said)
        for number, (image, group, asked, said) in enumerate(questions)
    ]
    (new / "human.jsonl").write_text("".join(rows), encoding="utf-8")
    new.replace(work)


def line(id: str, image: str, group: str, question: str, answer: str) -> str:
    """A record of LLaVA's format."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    content: dict[str, Any] = {
        "id": id,
        "image": f"images/{image}",
        "conversations": turns,
        "graftwork": {"group": group},
    }
    return json.dumps(content) + "\n"


def written(work: Path) -> Iterator[tuple[str, str, str, str]]:
    """Image, group, question and answer of everything that the writer wrote, verified or not."""
    with (work / "verified" / "replies.jsonl").open(encoding="utf-8") as replies:
        for reply in map(json.loads, replies):
            if reply["writer"] == "writer" and "fault" not in reply:
                image, _, group = reply["id"].rpartition("/")
                yield image, group, reply["prompt"][-1][1].removeprefix("<image>\n"), reply["reply"]["text"]


def unfiltered(work: Path) -> None:
    """Write all that the writer wrote as data of its own."""
    rows = [line(f"{image}/{group}", image, group, asked, said) for image, group, asked, said in written(work)]
    (work / "unfiltered.jsonl").write_text("".join(rows), encoding="utf-8")


def labels(work: Path) -> str:
    """How many labels are right, of those that were written and those that were kept, where people said something of the image."""
    truth = {}
    for row in map(json.loads, (work / "human.jsonl").read_text(encoding="utf-8").splitlines()):
        truth[row["image"], row["graftwork"]["group"]] = row["conversations"][-1]["value"]
    kept = {row["id"] for row in map(json.loads, (work / "verified" / "records.jsonl").open(encoding="utf-8"))}
    counts: dict[tuple[str, str], list[bool]] = {}
    for image, group, _, answer in written(work):
        if (known := truth.get((f"images/{image}", group))) is not None:
            counts.setdefault((group, "written"), []).append(answer == known)
            if f"{image}/{group}" in kept:
                counts.setdefault((group, "kept"), []).append(answer == known)
    rows = [
        f"| {group} | {kind} | {len(each):,} | {sum(each) / len(each):.1%} |"
        for (group, kind), each in sorted(counts.items())
    ]
    return "\n".join(
        ["| group | labels | of images that people labelled | right |", "| --- | --- | --- | --- |", *rows]
    )


if __name__ == "__main__":
    main()
