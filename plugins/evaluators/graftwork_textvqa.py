"""TextVQA (Singh et al., Towards VQA Models That Can Read, CVPR 2019), asked and scored as LLaVA and MGM do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from graftwork.contracts import BadRecord, Evaluator, Record, Score, Turn, hookimpl, plain_sum, setting
from graftwork.data import find_image, make_records, member, missing_files, read_json, read_json_lines, required
from graftwork.errors import DataError

PEOPLE = 10
"""How many people answered each question."""
OCR = "Reference OCR token:"


@dataclass(frozen=True)
class TextVqaSettings:
    """Where the questions, the people's answers and the images are."""

    questions: Path | None = setting(None, "The questions, such as llava_textvqa_val_v051_ocr.jsonl")
    annotations: Path | None = setting(None, "The people's answers, such as TextVQA_0.5.1_val.json")
    images: Path | None = setting(None, "The folder of the images, such as train_images")
    with_ocr: bool = setting(True, "Show the model the words that an OCR system read, as the question file has them")


class TextVqa(Evaluator[TextVqaSettings]):
    """TextVQA's questions about text in images, scored against the answers of ten people"""

    name = "textvqa"
    Settings = TextVqaSettings
    max_new_tokens: ClassVar[int] = 128

    def validate(self, plan: object) -> Iterable[str]:
        return missing_files(self.settings, "questions", "annotations", "images")

    def records(self) -> Iterator[Record | BadRecord]:
        """The questions in the order of their file; DataError when a file as a whole cannot be read."""
        questions = required(self.settings, "questions")
        reading = _Reading(
            _annotations(required(self.settings, "annotations")),
            required(self.settings, "images"),
            self.settings.with_ocr,
        )
        yield from make_records(read_json_lines(questions), reading.record)

    def score(self, record: Record, answer: str) -> Score:
        """0, 0.3, 0.6, 0.9 or 1, as none, one, two, three, or four and more of the ten people gave this answer."""
        return Score(record.meta["scores"].get(normalise(answer), 0.0), record.group)


@hookimpl
def evaluators() -> list[type[Evaluator[Any]]]:
    return [TextVqa]


# The files ------------------------------------------------------------------------------------------------------------


def _annotations(path: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The entries by image and question in lower case; the last one counts where there are several."""
    content = read_json(path)
    entries = content.get("data") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise DataError(f"'{path}' has no list of objects under 'data'; is it TextVQA's annotation file?")
    return {(str(entry.get("image_id")), str(entry.get("question")).lower()): entry for entry in entries}


@dataclass
class _Reading:
    """What turns a line of the question file into a record."""

    annotations: Mapping[tuple[str, str], Mapping[str, Any]]
    images: Path
    with_ocr: bool
    asked: Counter[str] = field(default_factory=Counter)
    """How many questions were read about each image."""

    def record(self, where: str, content: Mapping[str, Any]) -> Record:
        about, text = member(content, "question_id", str), member(content, "text", str)
        question = find_question(text)
        entry = self.annotations.get((about, question))
        if entry is None:
            raise DataError(f"the annotations have no question '{question}' about the image '{about}'")
        people = member(entry, "answers", list)
        if len(people) != PEOPLE or not all(isinstance(answer, str) for answer in people):
            raise DataError(f"the annotations do not have {PEOPLE} answers to '{question}' about the image '{about}'")
        image = find_image(self.images, member(content, "image", str))
        self.asked[about] += 1
        if not self.with_ocr:
            text = "\n".join(line for line in text.split("\n") if not line.startswith(OCR))
        category = content.get("category")
        return Record(
            id=f"{about}/{self.asked[about]}",
            turns=(Turn("user", f"<image>\n{text}"),),
            images=(image,),
            group="" if category in (None, "default") else str(category),
            reference=tuple(people),
            where=where,
            meta={"scores": score_answers(people)},
        )


def find_question(prompt: str) -> str:
    """The question within a prompt, in lower case; DataError where upstream's script cannot tell it either."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if found := re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL):
            return found[1].lower()
    elif f"{OCR} " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(OCR) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise DataError("the question cannot be told from the rest of the prompt in 'text'")


# The score ------------------------------------------------------------------------------------------------------------


def score_answers(people: Iterable[str]) -> dict[str, float]:
    """The score of each normalised answer that somebody gave: everybody is left out once, and of the other nine three
    must agree. Each sum runs over the people in their order, so that it is upstream's to the last bit."""
    given = [normalise(answer) for answer in people]
    counts = Counter(given)
    return {
        answer: plain_sum(min(1.0, (count - (one == answer)) / 3) for one in given) / len(given)
        for answer, count in counts.items()
    }


def normalise(answer: str) -> str:
    """An answer as answers are compared: without case, punctuation and articles, with digits and contractions.

    This is the processing of the VQA challenge with TextVQA's additions, its peculiarities kept: a mark beside a space
    vanishes and one within a word becomes a space, and at most 32 full stops are removed.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in MARKS:
        plain = plain.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    plain = re.sub(r"\.(?!\d)", "", plain, count=32)
    words = [NUMBERS.get(word, word) for word in plain.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


MARKS = ';/[]"{}()=+\\_-><@`!'
ARTICLES = ("a", "an", "the")
NUMBERS = {
    word: str(n)
    for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
NUMBERS["none"] = "0"
_WHOLE = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    whole[:at] + whole[at + 1 :]: whole for whole in _WHOLE.split() for at, mark in enumerate(whole) if mark == "'"
}
"""What lacks one apostrophe to what it should be, for the words of the challenge's table."""
CONTRACTIONS["somebody'd"] = "somebodyd"  # as the table has it
