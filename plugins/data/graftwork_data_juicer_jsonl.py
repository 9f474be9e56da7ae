"""A data source: Data-Juicer's multimodal samples, whose turns and images are marked within one text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from graftwork.contracts import BadRecord, DataSource, Record, Turn, hookimpl, setting
from graftwork.data import (
    OWN,
    PLACE,
    ImageFiles,
    ImageFolder,
    conversation,
    files_at,
    first_object,
    first_records,
    images_of,
    make_records,
    missing_files,
    own_part,
    plain_text,
    read_json_lines,
    refuse_moving,
    type_name,
    write_json_lines,
)
from graftwork.errors import DataError

IMAGE, EOC = "<__dj__image>", "<|__dj__eoc|>"
OTHERS = {"<__dj__video>": "videos are", "<__dj__audio>": "sound is"}
ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "robot": "assistant",
    "assistant": "assistant",
}
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
"""What LLaVA calls the roles, whose names Data-Juicer's converter keeps."""
TOOLS = ("tool", "function", "observation")
QUESTION = "question"
REST, LAYOUT = "data-juicer", "layout"
"""Where in a record's `meta` the rest of a sample is kept, and in that, how its text differs from what our writer makes of it."""


@dataclass(frozen=True)
class DataJuicerSettings:
    """Where the samples and their images are, and how the text is marked."""

    path: Path | None = setting(None, "The file of one sample a line, or a folder of such files that end in .jsonl")
    image_folder: Path | None = setting(None, "What image paths are relative to; by default the folder of each file")
    image_token: str = setting(IMAGE, "What stands in the text for an image, beside <image>")
    eoc_token: str = setting(EOC, "What ends a chunk of the text")
    question: str | None = setting(
        None, "What is asked where the text is a caption, without roles; by default it is refused"
    )
    limit: int | None = setting(None, "Read only so many records, from the first", minimum=1)
    group: str = setting("", "The group under which these records are counted")


class DataJuicerJsonl(DataSource[DataJuicerSettings]):
    """Data-Juicer's samples: a text with tokens for images and tags for roles, one sample a line"""

    name = "data-juicer-jsonl"
    Settings = DataJuicerSettings

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By its first line: one text, and no turns."""
        first = first_object(path)
        return isinstance(first.get("text"), str) and not first.keys() & {"messages", "conversations"}

    def validate(self, plan: object) -> Iterable[str]:
        yield from missing_files(self.settings, "path")
        for name in ("image_token", "eoc_token"):
            if not getattr(self.settings, name):
                yield f"'{name}' is empty; name the token, or leave it out"

    def records(self) -> Iterator[Record | BadRecord]:
        """The records of each file in turn."""
        return first_records((item for file in self.files() for item in self._of(file)), self.settings.limit)

    def files(self) -> Sequence[Path]:
        """The file, or those of the folder."""
        return files_at(self.settings, ".jsonl")

    @classmethod
    def write(cls, records: Iterable[Record], folder: Path) -> Path:
        """Samples as Data-Juicer's converter writes them, or as they were read."""
        name_of = ImageFiles(folder).name_of
        samples = (sample_of(record, list(map(name_of, record.images))) for record in records)
        return write_json_lines(folder / "records.jsonl", samples)

    def _of(self, file: Path) -> Iterator[Record | BadRecord]:
        folder = ImageFolder(self.settings.image_folder or file.parent)
        layout = Layout(self.settings.image_token, self.settings.eoc_token, self.settings.question)

        def make(where: str, content: Mapping[str, Any]) -> Record:
            return layout.record(content, folder, where, self.settings.group)

        return make_records(read_json_lines(file), make)


@hookimpl
def data_sources() -> list[type[DataSource[Any]]]:
    return [DataJuicerJsonl]


class Layout:
    """How turns and images are marked in a text."""

    def __init__(self, image_token: str, eoc_token: str, question: str | None = None) -> None:
        self.image, self.eoc, self.question = image_token, eoc_token, question
        eoc, roles = re.escape(eoc_token), "|".join((*ROLES, *TOOLS))
        # What our own writer puts there is matched whole and no more, so that the space around turns stays theirs.
        self._tag = re.compile(rf"(?:\A\s*|(?: ?{eoc}\s*)|\n)\[\[({roles})\]\]: ?")
        self._end = re.compile(rf"(?: ?{eoc}\s*)?\Z")
        images = rf"(?:{re.escape(image_token)}|{re.escape(PLACE)})"
        self._caption = re.compile(rf"((?:\s*{images})*\s*)(.*?)((?:\s*{images})*\s*(?:{eoc}\s*)?)", re.DOTALL)

    def record(self, content: Mapping[str, Any], folder: ImageFolder, where: str, group: str) -> Record:
        """The record of a sample; DataError says why there is none."""
        refuse_moving(content)
        text = content.get("text")
        if not isinstance(text, str):
            raise DataError(f"'text' is {type_name(text)}, not a text")
        for token, what in OTHERS.items():
            if token in text:
                raise DataError(f"the text has '{token}', and {what} not read; leave such records out")
        if self.image != PLACE and self.image in text and PLACE in text:
            raise DataError(f"the text has both '{self.image}' and '{PLACE}'; keep one of them")
        known = {name: content[name] for name in ("id", "weight", OWN) if name in content}
        own = dict(known[OWN]) if isinstance(known.get(OWN), Mapping) else {}
        question = own.pop(QUESTION, self.question)
        if own != known.get(OWN, own):
            known[OWN] = own
        text = plain_text("'text'", text)
        is_caption = isinstance(question, str) and not self._tag.match(text)
        turns, between = self.caption(text, question) if is_caption else self.split(text)
        rest = {name: value for name, value in content.items() if name not in known and name not in ("text", "images")}
        between = [part.replace(self.eoc, EOC) for part in between]  # Other settings than `path` are not written.
        if is_caption:
            rest[LAYOUT] = {QUESTION: turns[0].text, "between": between}
        elif between != _between(turns) or PLACE in text:
            rest[LAYOUT] = {"between": between, "image": PLACE if PLACE in text else IMAGE}
        images = images_of({"images": content.get("images")}, folder)
        record = conversation(known, turns, images, where=where, group=group, lenient=False)
        return replace(record, meta={**record.meta, REST: rest}) if rest else record

    def split(self, text: str) -> tuple[list[Turn], list[str]]:
        """The turns of a text, and what stands before, between and behind them; DataError when it is no conversation."""
        tags = list(self._tag.finditer(text))
        if not tags or tags[0].start():
            raise DataError(
                "the text does not begin with a role, such as '[[human]]: ', and so is no conversation; if it is a caption, set "
                "'question' to what it answers"
            )
        end = self._end.search(text, tags[-1].end())
        last = end.start() if end else len(text)
        turns = list[Turn]()
        for tag, stop in zip(tags, [*(following.start() for following in tags[1:]), last], strict=True):
            if (role := ROLES.get(tag[1])) is None:
                raise DataError(
                    f"a turn is from '{tag[1]}', and calls of tools are not learned here; leave such records out"
                )
            said = text[tag.end() : stop]
            if not said.strip():
                raise DataError(f"turn {len(turns) + 1} has no text")
            if self.eoc in said:
                raise DataError(
                    f"'{self.eoc}' stands within turn {len(turns) + 1}, where no turn of a known role follows"
                )
            turns.append(Turn(role, said.replace(self.image, PLACE)))
        return turns, [*(tag[0] for tag in tags), text[last:]]

    def caption(self, text: str, question: str) -> tuple[list[Turn], list[str]]:
        """The turns of a text that is a caption, and what stands before and behind it; DataError when it is more than one."""
        found = self._caption.fullmatch(text)
        before, said, behind = found.groups() if found else ("", "", "")
        if not said or self.eoc in said or self.image in said or PLACE in said:
            raise DataError("the text is neither a conversation with roles nor one caption of its images")
        between = [part.replace(self.image, IMAGE).replace(PLACE, IMAGE) for part in (before, behind)]
        images = sum(part.count(IMAGE) for part in between)
        return [Turn("user", f"{PLACE}\n" * images + question), Turn("assistant", said)], between


def sample_of(record: Record, images: Sequence[str]) -> dict[str, Any]:
    """The sample of a record, as Data-Juicer's converter writes it, or as the record's own was; DataError when it cannot be told
    apart from another."""
    own = own_part(record)
    rest = dict(own.pop(REST)) if isinstance(own.get(REST), Mapping) else {}
    layout = rest.pop(LAYOUT, {})
    if (text := _captioned(record.turns, layout)) is not None:
        own[QUESTION] = record.turns[0].text.replace(f"{PLACE}\n", "")
        return _sample(record, text, images, rest, own)
    text = _joined(record.turns, layout.get("between", ()), layout.get("image", IMAGE))
    if text is None and (text := _joined(record.turns, _between(record.turns), IMAGE)) is None:
        raise DataError(
            f"record '{record.id}' has a turn that holds a role's tag or a token of Data-Juicer, and could not be told from two; "
            "change it, or choose another format"
        )
    return _sample(record, text, images, rest, own)


def _sample(
    record: Record, text: str, images: Sequence[str], rest: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    sample = {"id": record.id, "text": text, "images": list(images)}
    return sample | {name: value for name, value in rest.items() if name not in sample} | ({OWN: own} if own else {})


def _captioned(turns: Sequence[Turn], layout: Mapping[str, Any]) -> str | None:
    """The text of turns that were a caption; None where they are something else by now."""
    if len(turns) != 2 or turns[0].text != layout.get(QUESTION):
        return None
    before, behind = layout["between"]
    text = f"{before}{turns[1].text}{behind}"
    try:
        read, _ = Layout(IMAGE, EOC).caption(text, turns[0].text.replace(f"{PLACE}\n", ""))
    except DataError:
        return None
    return text if [turn.text for turn in read] == [turn.text for turn in turns] else None


def _joined(turns: Sequence[Turn], between: Sequence[str], image: str) -> str | None:
    """The text of turns with what stands between them; None where they would not be read from it again."""
    if len(between) != len(turns) + 1:  # They are others by now.
        return None
    said = [turn.text.replace(PLACE, image) for turn in turns]
    text = "".join(part for pair in zip(between, said, strict=False) for part in pair) + between[-1]
    try:
        read, _ = Layout(IMAGE, EOC).split(text)
    except DataError:
        return None
    same = [(turn.role, turn.text) for turn in read] == [(turn.role, turn.text) for turn in turns]
    return text if same else None


def _between(turns: Sequence[Turn]) -> list[str]:
    """What Data-Juicer's converter of LLaVA's format puts before, between and behind turns."""
    tags = [f"[[{NAMES[turn.role]}]]: " for turn in turns]
    return [*("\n" * (place > 0) + tag for place, tag in enumerate(tags)), f" {EOC}"]
