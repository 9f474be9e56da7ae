"""Answers that were given before are reused for the same questions only: texts, references, and images by their content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_evaluation import QUESTIONS, lines, run
from tiny_vlm import Quiz, tiny_assembly

from graftwork.contracts import Image, Record, Turn


def asked_again(folder: Path, *records: Record) -> tuple[list[str], str]:
    """Which questions are asked of a model when an evaluation of these records goes on, and what is said."""
    assembly, told = tiny_assembly(), list[str]()
    result = run(folder, assembly, Quiz(*records), say=told.append)
    assert [one.record for one in result.answered] == [*records]
    return assembly.processor.encoded, told[0]


def drawn(colour: bytes, folder: Path | None = None) -> Image:
    """An image by its bytes, or in a file, always the same one."""
    if not folder:
        return Image(data=colour)
    (folder / "image.png").write_bytes(colour)
    return Image(folder / "image.png")


@pytest.mark.parametrize("in_file", [False, True], ids=["in a table", "in a file"])
def test_answers_about_images_that_were_replaced_are_not_taken_for_new_ones(tmp_path: Path, in_file: bool) -> None:
    folder = tmp_path if in_file else None
    told = (Turn("user", "<image>what is x"),)
    same = Record("same", told, (Image(data=b"grey"),), reference=("a",))
    run(tmp_path / "out", quiz=Quiz(same, Record("q", told, (drawn(b"red", folder),), reference=("a",))))
    replaced = Record("q", told, (drawn(b"blue", folder),), reference=("a",))
    asked, sentence = asked_again(tmp_path / "out", same, replaced)
    assert asked == ["q"]
    assert sentence.endswith(
        "holds 2 answers already; 1 of their questions have another text, image or reference now, and are asked again"
    )
    asked, sentence = asked_again(tmp_path / "out", same, replaced)
    assert asked == [] and sentence.endswith("holds 2 answers already; they are not asked for again")


def test_answers_after_another_conversation_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    def after(earlier: str) -> Record:
        return Record(
            "q", (Turn("user", earlier), Turn("assistant", "yes"), Turn("user", "what is x")), reference=("a",)
        )

    run(tmp_path, quiz=Quiz(after("is it a")))
    assert asked_again(tmp_path, after("is it b"))[0] == ["q"]


def test_answers_of_an_older_version_are_kept_and_it_is_said_that_images_cannot_be_compared(tmp_path: Path) -> None:
    run(tmp_path)
    older = [{key: value for key, value in line.items() if key != "asked"} for line in lines(tmp_path)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older))
    asked, sentence = asked_again(tmp_path, *QUESTIONS)
    assert asked == []
    assert sentence.endswith("(of 12 the images cannot be compared, as their Graftwork was older)")
