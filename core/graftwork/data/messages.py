"""Conversations as chat messages, in OpenAI's form and in ShareGPT's, with images in the text's places, in parts or beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from graftwork.contracts.records import Image, Record, Turn
from graftwork.data.conversations import PLACE, conversation, mark_of
from graftwork.data.imagefolders import NO_SOUND, NO_VIDEOS, ImageFolder
from graftwork.data.lines import OWN, own_part
from graftwork.data.texts import plain_text, type_name
from graftwork.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
TOOL_ROLES = (
    "tool",
    "function",
    "function_call",
    "function_response",
    "observation",
    "tool_call",
    "tool_response",
    "ipython",
)
CALLS = ("tool_calls", "function_call")
NO_TOOLS = "calls of tools are not learned here; leave such records out"
MOVING = ("video", "videos", "audio", "audios")


def read_messages(
    content: Mapping[str, Any], folder: ImageFolder, *, where: str, group: str = "", open_questions: bool = False
) -> Record:
    """The record of an object with `messages` or `conversations`, and images in them or as `image` or `images`.

    A turn has a `role` and a `content`, which is text or a list of parts, or it is `from` someone and has a `value`. DataError
    says why there is no record, which is also where it ends with a question, unless there may be `open_questions`.
    """
    refuse_moving(content)
    if content.get("tools"):
        raise DataError(f"the record has 'tools', and {NO_TOOLS}")
    names = [name for name in ("messages", "conversations") if content.get(name) is not None]
    if len(names) > 1:
        raise DataError("the record has both 'messages' and 'conversations'; keep one of them")
    messages = content[names[0]] if names else None
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"'{names[0] if names else 'messages'}' is missing or is not a list of turns")
    turns, images = list[Turn](), list[Image | None]()
    for place, message in enumerate(messages, start=1):
        turns.append(_turn(message, place, images, folder))
    if (system := content.get("system")) not in (None, ""):
        if not isinstance(system, str):
            raise DataError(f"'system' is {type_name(system)}, not a text")
        turns.insert(0, Turn("system", plain_text("'system'", system)))
    filled = _filled(images, images_of(content, folder))
    return conversation(content, turns, filled, where=where, group=group, open_questions=open_questions)


def read_example(content: Mapping[str, Any], folder: ImageFolder, *, where: str, group: str = "") -> Record:
    """The record of an object with messages, as `read_messages`, or with a `question` and its `answer` or `answers`.

    Where a question has no places for its images, they stand before it. Of several answers the one given most often, and of
    these the first, is learned, and all are accepted.
    """
    if any(content.get(name) is not None for name in ("messages", "conversations")):
        return read_messages(content, folder, where=where, group=group)
    refuse_moving(content)
    question, answers = content.get("question"), content.get("answers")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"'question' is {'empty' if isinstance(question, str) else type_name(question)}, not a text")
    accepted = _answers(answers if answers is not None else content.get("answer"))
    answer = accepted[0] if content.get("answer") is None else _answers(content["answer"])[0]
    images = images_of(content, folder)
    if PLACE not in question:
        question = f"{PLACE}\n" * len(images) + question
    turns = (
        Turn("user", plain_text("'question'", question)),
        Turn("assistant", plain_text("the answer", answer)),
    )
    record = conversation(content, turns, images, where=where, group=group)
    return replace(record, reference=accepted) if answers is not None and not record.reference else record


def _answers(given: Any) -> tuple[str, ...]:
    """The different answers, the most frequent first; DataError for none, or for other than text."""
    answers = given if isinstance(given, list | tuple) else [given]
    counts = Counter[str]()
    for answer in answers:
        text = answer.get("answer") if isinstance(answer, Mapping) else answer
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"an answer is {'empty' if isinstance(text, str) else type_name(text)}, not a text")
        counts[text] += 1
    if not counts:
        raise DataError("there is a question without an answer")
    return tuple(text for text, _ in counts.most_common())


def images_of(content: Mapping[str, Any], folder: ImageFolder) -> list[Image]:
    """The images of a record that has them as `image` or `images`, one or a list; DataError says why one cannot be had."""
    given = [content[name] for name in ("image", "images") if content.get(name) not in (None, [], ())]
    if len(given) > 1:
        raise DataError("the record has both 'image' and 'images'; keep one of them")
    if not given:
        return []
    return [folder.image(each) for each in (given[0] if isinstance(given[0], list | tuple) else [given[0]])]


def refuse_moving(content: Mapping[str, Any]) -> None:
    """DataError when a record has videos or sound."""
    for name in MOVING:
        if content.get(name):
            raise DataError(f"the record has '{name}', and {NO_VIDEOS if 'video' in name else NO_SOUND}")


def to_messages(record: Record, images: Sequence[Any]) -> dict[str, Any]:
    """The object that `read_messages` reads as the record, its images given in the form that its place has."""
    messages: list[dict[str, Any]] = []
    for turn in record.turns:
        messages.append({"role": turn.role, "content": turn.text})
        if turn.role == "assistant" and turn.trained is not None:
            messages[-1]["weight"] = int(turn.trained)
    content: dict[str, Any] = {"id": record.id, "messages": messages}
    if images:
        content["images"] = list(images)
    if own := own_part(record):
        content[OWN] = own
    return content


def _turn(message: Any, number: int, images: list[Image | None], folder: ImageFolder) -> Turn:
    """A turn, whose images are added to those of the turns before it; None for one that its record has elsewhere."""
    if not isinstance(message, Mapping):
        raise DataError(f"turn {number} is {type_name(message)}, not an object")
    name = message.get("role") if message.get("role") is not None else message.get("from")
    if isinstance(name, str) and name.lower() in TOOL_ROLES:
        raise DataError(f"turn {number} is from '{name}', and {NO_TOOLS}")
    if not isinstance(name, str) or (role := ROLES.get(name.lower())) is None:
        raise DataError(
            f"turn {number} is from {name!r}, neither 'user' or 'human', nor 'assistant' or 'gpt', nor 'system'"
        )
    for call in CALLS:
        if message.get(call):
            raise DataError(f"turn {number} has '{call}', and {NO_TOOLS}")
    key = "value" if "value" in message and message.get("content") is None else "content"
    given = message.get(key)
    if isinstance(given, str):
        text = given
        images += [None] * text.count(PLACE)
    elif isinstance(given, list | tuple):
        text = "\n".join(_part(part, number, images, folder) for part in given)
    elif given is None:
        text = ""
    else:
        raise DataError(f"'{key}' of turn {number} is {type_name(given)}, not a text or a list of parts")
    if not text.strip():
        raise DataError(f"turn {number} has no text in '{key}'")
    return Turn(role, plain_text(f"turn {number}", text), mark_of(message, role, number))


def _part(part: Any, number: int, images: list[Image | None], folder: ImageFolder) -> str:
    """The text of a part of a turn, in which a place stands for an image."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise DataError(f"a part of turn {number} is {type_name(part)}, not an object")
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text") or (kind is None and part.get("text") is not None):
        text = part.get("text")
        if not isinstance(text, str):
            raise DataError(f"'text' of a part of turn {number} is {type_name(text)}, not a text")
        images += [None] * text.count(PLACE)
        return text
    if kind not in ("image", "image_url", "input_image"):
        for medium, why in (("video", NO_VIDEOS), ("audio", NO_SOUND)):
            if isinstance(kind, str) and medium in kind:
                raise DataError(f"a part of turn {number} is of the type '{kind}', and {why}")
        what = f"'{kind}'" if isinstance(kind, str) else type_name(kind)
        raise DataError(
            f"a part of turn {number} is of the type {what}, and only 'text', 'image' and 'image_url' are read"
        )
    if part.get("bytes") is not None:
        images.append(folder.image({"bytes": part["bytes"]}))
        return PLACE
    named = [part[key] for key in ("image", "image_url", "path", "url") if part.get(key) is not None]
    if len(named) > 1:
        raise DataError(f"a part of turn {number} names more than one image")
    images.append(folder.image(named[0]) if named else None)
    return PLACE


def _filled(images: Sequence[Image | None], beside: Sequence[Image]) -> list[Image]:
    """The images in their order: those that came in the turns, and between them those that stand beside."""
    here = [image for image in images if image is not None]
    if not here:
        return list(beside)
    if len(images) - len(here) != len(beside):
        places = f"places without an image in the turns: {len(images) - len(here)}, images beside them: {len(beside)}"
        raise DataError(f"{places}; they must be equal")
    waiting = iter(beside)
    return [next(waiting) if image is None else image for image in images]
