"""Records through a model's own chat template and transformers' processor: the only way from a record to tensors and back."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from PIL import Image as PILImage
from torch import Tensor

from graftwork.contracts import IGNORED, Batch, Encoded, Record, Turn
from graftwork.data import image_size, load_image
from graftwork.errors import DataError, WeightsError
from graftwork_hf_vlm import HfVlm, HfVlmSettings, image_token_id, resolution
from graftwork_hf_vlm.loading import SETTINGS, load_processor, settings_in
from graftwork_hf_vlm.model import COUNTS, POSITIONS, without_layers

PLACE = re.compile(r"[ \n]*<image>[ \n]*")
"""An image in a text. What space is around it is the template's business."""
FILES = (
    *SETTINGS,
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
)
"""What a processor is read from; copied as it is."""
SMALL = (64, 56, 96, 224, 336, 384, 448)
"""Sides in pixels of images, one of which any processor takes."""
SILENT = "does not say what text an image becomes"
KINDS = "mm_token_type_ids"
"""The token field that says which tokens are an image's, which some models find positions by."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Written:
    """A conversation as the template writes it."""

    text: str
    answers: tuple[Span, ...] = ()
    """Where in the text the answers are that carry loss, each with the token that ends it."""


@dataclass(frozen=True)
class Tokens:
    """A written conversation in tokens, every image spread over its own."""

    ids: list[int]
    offsets: list[Span]
    """Where each token is in the spread text."""
    answers: tuple[Span, ...]
    images: tuple[Span, ...]
    """Where in the spread text each image is."""


class HfProcessor:
    """Records to tokens, labels and pixels, and ids to text (see `graftwork.contracts.Processor`)."""

    def __init__(self, folder: Path, config: Any, settings: HfVlmSettings) -> None:
        self.folder, self.config = folder, config
        self.hf = load_processor(folder, config.model_type)
        self.changes = resolution.told(self.hf, settings, config)
        if self.changes:
            resolution.configure(self.hf, folder, self.changes, settings)
        self.tokenizer = tokenizer = self.hf.tokenizer
        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            raise WeightsError(
                f"the tokenizer in '{folder}' has no tokenizer.json, or names no eos_token; save it again with transformers"
            )
        self.vocabulary: int = config.get_text_config().vocab_size
        self.pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        said = settings_in(folder, "generation_config.json").get("eos_token_id")
        stops = {tokenizer.eos_token_id, *([said] if isinstance(said, int) else said or [])}
        self.stop_ids: frozenset[int] = frozenset(stops)
        self.stops: list[str] = tokenizer.convert_ids_to_tokens(sorted(stops))
        self.image_id = image_token_id(config)
        # A template that does not write the first token leaves it to the tokenizer, as LLaVA-1.5's does.
        whole, (plain, *_) = tokenizer("x")["input_ids"], tokenizer("x", add_special_tokens=False)["input_ids"]
        self.first = "".join(tokenizer.convert_ids_to_tokens(whole[: whole.index(plain)]))
        # What stands for a whole image in the text; one processor names it otherwise than what it is spread over.
        self.place: str = getattr(self.hf, "image_placeholder_token", "") or getattr(self.hf, "image_token", "")
        if not self.place:
            raise self._unserved(SILENT)
        self.trains_last_answer_only = self._rewrites()
        self.replacements = lru_cache(4096)(self.replacements_of)
        self.resized_to = lru_cache(4096)(partial(resolution.resized, self.hf))
        find = getattr(without_layers(config), "get_rope_index", None)
        self.three_positions = find, (inspect.signature(find).parameters if find else {})
        if KINDS in self.three_positions[1]:  # not every processor gives them unasked
            self.hf.return_mm_token_type_ids = True

    def _unserved(self, why: str) -> WeightsError:
        """The error for a processor that cannot be used."""
        return WeightsError(
            f"transformers' {type(self.hf).__name__} {why}, so '{HfVlm.name}' cannot train the model in '{self.folder}'; name a model of "
            "another family, or write a plugin for this one"
        )

    @cached_property
    def controls(self) -> frozenset[str]:
        """The tokens that make a conversation or an image what it is. Other special tokens, such as those round a box, are text."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {*self.tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        known = set(self.tokenizer.special_tokens_map.values())
        for name, value in (*vars(self.config.get_text_config()).items(), *vars(self.config).items()):
            if name.endswith(("token_id", "token_index")) and isinstance(value, int):
                known.add(self.tokenizer.convert_ids_to_tokens(value))
        shown = str(self.hf.chat_template) + "".join(self.replacements((self.small,)))
        for roles in (("system", "user", "assistant"), ("user", "assistant")):
            turns = tuple(Turn(role, "x") for role in roles)
            with suppress(DataError):
                shown += self.render(Record("", turns), len(turns), prompt=False)
        meant = {token for token in special if token in known or token in shown}
        return frozenset({*meant, self.hf.image_token, self.place, *self.stops})

    # Writing ------------------------------------------------------------------------------------------------------------

    def render(self, record: Record, count: int, prompt: bool) -> str:
        """The first `count` turns as the template writes them, and with `prompt` what asks for an answer."""
        messages = [message_of(turn) for turn in record.turns[:count]]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=self.hf.chat_template, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError) as error:
            raise DataError(
                f"record '{record.id}' does not fit the model's chat template ({error}); change its turns"
            ) from None
        return text if text.startswith(self.first) else self.first + text

    def _rewrites(self) -> bool:
        """Whether the template writes an answer otherwise once another follows it."""
        for thought in ("", "<think>\n1\n</think>\n\n"):
            said = [("user", "A?"), ("assistant", f"{thought}B"), ("user", "C?"), ("assistant", "D")]
            record = Record("", tuple(Turn(role, text) for role, text in said))  # type: ignore[arg-type]
            try:
                whole, first = (self.render(record, count, prompt=False) for count in (4, 2))
            except DataError:
                continue  # It takes no such conversation, and says so where a record is one.
            if not whole.startswith(first.rstrip()):
                return True
        return False

    def written(self, record: Record) -> Written:
        """The conversation as text. Turn by turn, so that no marker has to say where answers are."""
        self._check(record)
        asks = record.turns[-1].role == "user"
        whole = self.render(record, len(record.turns), prompt=asks)
        self._check_written(record, whole)
        text, done, answers = "", 0, list[Span]()
        for number, turn in enumerate(record.turns):
            if turn.role != "assistant":
                continue
            head = self.render(record, number, prompt=True)
            until = len(whole) if number + 1 == len(record.turns) else self._end(record, number + 1, whole)
            if not whole.startswith(head) or until < len(head):
                if turn.trained is False or asks:
                    continue
                raise DataError(
                    f"the chat template writes answers in the middle of record '{record.id}' otherwise than as answers; a record can "
                    "train the last one only: make one for each answer, as a run does"
                )
            at = len(head)
            for piece in filter(None, (piece.strip() for piece in PLACE.split(turn.text))):
                at = whole.index(piece, at) + len(piece)
            place, stop = min(
                ((found, stop) for stop in self.stops if (found := whole.find(stop, at, until)) >= 0), default=(-1, "")
            )
            begin = len(text) + len(head) - done
            if stop:
                text, done = text + whole[done : place + len(stop)], place + len(stop)
            else:  # the template never ends an answer
                text, done = text + whole[done:at] + str(self.tokenizer.eos_token), at
            if turn.trained is not False and not asks:
                answers.append((begin, len(text)))
        return Written(text + whole[done:], tuple(answers))

    def _end(self, record: Record, count: int, whole: str) -> int:
        """Where the first `count` turns end in the whole text; -1 where the template writes them otherwise there."""
        text = self.render(record, count, prompt=False)
        return len(text) if whole.startswith(text) else -1

    def _check(self, record: Record) -> None:
        """DataError for a record that no template can write."""
        roles = [turn.role for turn in record.turns]
        turns = roles[roles[:1] == ["system"] :]
        if not turns or any(role != ("user", "assistant")[n % 2] for n, role in enumerate(turns)):
            raise DataError(
                f"in record '{record.id}' user and assistant do not take turns; correct the record or leave it out"
            )
        if (found := sum(turn.text.count("<image>") for turn in record.turns)) != len(record.images):
            raise DataError(
                f"record '{record.id}' has {len(record.images)} images and '<image>' {found} times; make them agree"
            )
        for turn in record.turns:
            plain = turn.text.replace("<image>", "")
            if control := next((control for control in self.controls if control in plain), None):
                raise DataError(
                    f"record '{record.id}' has '{control}' in its text, which means something to the model; remove it"
                )

    def _check_written(self, record: Record, whole: str) -> None:
        """DataError where the template leaves out a turn or an image."""
        kept = [
            turn for turn in record.turns if not (self.trains_last_answer_only and turn.trained is False)
        ]  # what a model thought is left out of earlier answers
        lost = [piece for turn in kept for piece in PLACE.split(turn.text) if piece.strip() not in whole]
        if lost or whole.count(self.place) != len(record.images):
            what = f"'{lost[0][:40]}'" if lost else "an image"
            raise DataError(f"the model's chat template leaves out {what} of record '{record.id}'; change its turns")

    # Tokens -------------------------------------------------------------------------------------------------------------

    def replacements_of(self, sizes: tuple[Span, ...]) -> list[str]:
        """What images of these sizes become in the text: transformers' processor says so of blank ones in a question, whose pixels do not
        matter, so they are computed in the cheapest way."""
        blank = [PILImage.new("RGB", size) for size in sizes]
        asked = self.render(Record("", (Turn("user", "<image>" * len(sizes) + "?"),)), 1, prompt=True)
        cheap = {"resample": PILImage.Resampling.NEAREST, "do_rescale": False, "do_normalize": False}
        made = self.hf(text=[asked], images=blank, return_tensors="pt", return_text_replacement_offsets=True, **cheap)
        if "text_replacement_offsets" not in made:
            raise self._unserved(SILENT)
        return [each["replacement"] for each in made["text_replacement_offsets"][0]]

    @cached_property
    def small(self) -> Span:
        """Width and height of a small image that transformers' processor takes; some that do not resize take multiples of something."""
        for side in SMALL:
            with suppress(ValueError):
                self.replacements(((side, side),))
                return side, side
        raise self._unserved(f"takes no square image of {SMALL[0]} to {SMALL[-1]} pixels a side")

    @cached_property
    def joined_in(self) -> dict[str, int]:
        """The dimension in which transformers' processor joins what two records have of images, where that is not the first."""
        asked = self.render(Record("", (Turn("user", "<image>?"),)), 1, prompt=True)
        blank = PILImage.new("RGB", self.small)

        def made(count: int) -> Any:
            with suppress(ValueError):
                return self.hf(text=[asked] * count, images=[blank] * count, return_tensors="pt")
            return self.hf(text=[asked] * count, images=[[blank]] * count, return_tensors="pt")  # SmolVLM's

        one, two = made(1), made(2)
        grown = {
            name: [
                place for place, (few, more) in enumerate(zip(value.shape, two[name].shape, strict=True)) if few != more
            ]
            for name, value in one.items()
            if isinstance(value, Tensor)
        }
        return {name: places[0] for name, places in grown.items() if places and places[0]}

    def tokens(self, record: Record) -> tuple[Tokens, str]:
        """The record's tokens, and the text before images were spread; no image is decoded."""
        written = self.written(record)
        sizes = tuple(image_size(image) for image in record.images)
        moved: list[dict[str, Any]] = []
        text = written.text
        if sizes:
            try:
                becomes = self.replacements(sizes)
            except ValueError as error:
                raise refused(record, error) from None
            (text,), (moved,) = self.hf.get_text_with_replacements([text], becomes)

        def place(char: int) -> int:
            passed = [m for m in moved if m["span"][1] <= char]
            grown: int = sum(m["new_span"][1] - m["new_span"][0] - len(m["text"]) for m in passed)
            return char + grown

        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        answers = tuple((place(begin), place(end)) for begin, end in written.answers)
        images = tuple(tuple(m["new_span"]) for m in moved)
        return Tokens(found["input_ids"], found["offset_mapping"], answers, images), written.text

    def encode(self, record: Record) -> Encoded:
        """The tokens, labels and pixels of a record (see `graftwork.contracts.Processor`)."""
        tokens, text = self.tokens(record)
        images = [load_image(image) for image in record.images] or None
        try:
            made = self.hf(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        except ValueError as error:
            if images:
                raise refused(record, error) from None
            # Some read no text without an image; the tokens are all that there is of it.
            made = {"input_ids": torch.tensor([tokens.ids])}
        ids = tokens.ids
        if made.pop("input_ids")[0].tolist() != ids:
            raise DataError(
                f"the images of record '{record.id}' become other tokens than those of their sizes; leave it out"
            )
        made.pop("attention_mask", None)
        made = {name: value.movedim(self.joined_in.get(name, 0), 0) for name, value in made.items()}
        fields = {name: value[0].tolist() for name, value in made.items() if value.shape == (1, len(ids))}
        pixels: dict[str, Tensor] = {name: value for name, value in made.items() if name not in fields}
        seen = [token == self.image_id for token in ids]
        if record.images:
            pixels[COUNTS] = torch.tensor(
                [
                    sum(
                        is_image and overlaps(each, [span]) for is_image, each in zip(seen, tokens.offsets, strict=True)
                    )
                    for span in tokens.images
                ]
            )
        labels = [
            token if overlaps(each, tokens.answers) and not is_image else IGNORED
            for token, each, is_image in zip(ids, tokens.offsets, seen, strict=True)
        ]
        shown = [self.pad_id if is_image else token for token, is_image in zip(ids, seen, strict=True)]
        return Encoded(shown, seen, labels, pixels, token_fields=fields)

    def length(self, record: Record) -> int:
        """How many tokens `encode` makes."""
        return len(self.tokens(record)[0].ids)

    def resized(self, record: Record) -> list[tuple[Span, Span]]:
        """For each image its width and height, and those of the whole of it as the model gets it; CoordinatesRefused where it is cropped,
        padded or cut into tiles."""
        return [(size, self.resized_to(size)) for size in map(image_size, record.images)]

    def complete(self, batch: Batch) -> Batch:
        """The batch with its pixels as transformers' processor joins those of several records, and with the positions of each token, of
        models that have several."""
        find, known = self.three_positions
        if not batch.pixels:
            return batch
        batch = replace(
            batch, pixels={name: each.movedim(0, self.joined_in.get(name, 0)) for name, each in batch.pixels.items()}
        )
        if find is None:
            return batch
        seen, counts = batch.image_token_mask, batch.pixels[COUNTS]
        given = {"input_ids": batch.input_ids.masked_fill(seen, self.image_id or 0)}
        given |= {"attention_mask": batch.attention_mask, **batch.token_fields}
        images = torch.searchsorted(counts.cumsum(0), seen.sum(1).cumsum(0), right=True)
        pieces = ((seen[:, 1:] & ~seen[:, :-1]).sum(1) + seen[:, 0]).cumsum(0)
        # What a model finds positions by has an entry for each image, or for each piece of one.
        ends = {int(each[-1]): [0, *each.tolist()] for each in (pieces, images)}
        rows = []
        for row in range(len(seen)):  # each alone: one model numbers the images of a whole batch
            told = {name: value[row : row + 1] for name, value in given.items()}
            for name, value in batch.pixels.items():
                begin, end = ends.get(len(value), [0] * (row + 2))[row : row + 2]
                told |= {name: value[begin:end]} if begin < end else {}
            rows.append(find(**{name: value for name, value in told.items() if name in known})[0])
        positions = torch.cat(rows, 1)
        return replace(batch, token_fields={**batch.token_fields, POSITIONS: positions.transpose(0, 1)})

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without surrounding space and the special tokens that no text may hold."""
        left_out = set(self.tokenizer.convert_tokens_to_ids(list(self.controls)))
        text: str = self.tokenizer.decode([token for token in ids if token not in left_out])
        return text.strip()

    def save(self, folder: Path) -> None:
        """Copy the files that it was read from, with the sizes of images that the run sets."""
        for file in {file for pattern in FILES for file in self.folder.glob(pattern)}:
            shutil.copyfile(file, folder / file.name)
        if self.changes:
            resolution.write_told(self.folder, self.changes, folder)

    def save_beside_adapter(self, folder: Path) -> str:
        """Write the files that say the sizes of images where they are not those of the base's folder, and say so; else nothing."""
        if not self.changes:
            return ""
        names = resolution.write_told(self.folder, self.changes, folder)
        return f"the adapter was trained on images of other sizes than the base's folder says: use it with {' and '.join(names)} of this one"


def refused(record: Record, error: ValueError) -> DataError:
    """The error for a record whose images transformers' processor does not take."""
    return DataError(f"transformers' processor refuses record '{record.id}' ({str(error)[:160]}); leave it out")


def overlaps(token: Span, spans: Sequence[Span]) -> bool:
    """Whether a token has a character in one of the spans."""
    return any(token[0] < end and token[1] > begin for begin, end in spans)


def message_of(turn: Turn) -> dict[str, Any]:
    """A turn as chat templates take one."""
    content: list[dict[str, str]] = []
    for number, piece in enumerate(PLACE.split(turn.text)):
        content += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return {"role": turn.role, "content": content}
