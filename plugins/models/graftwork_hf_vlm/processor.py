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

import numpy
import torch
from PIL import Image as PILImage
from torch import Tensor

from graftwork.contracts import IGNORED, Batch, Encoded, Record, Turn
from graftwork.data import image_size, load_image
from graftwork.errors import DataError, WeightsError
from graftwork_hf_vlm import HfVlm, HfVlmSettings, image_token_id, resolution
from graftwork_hf_vlm.loading import SETTINGS, load_processor, settings_in
from graftwork_hf_vlm.model import COUNTS, POSITIONS, without_layers
from graftwork_hf_vlm.template import Span, Template, Written, check

FILES = (
    *SETTINGS,
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
)
"""What a processor is read from; copied as it is."""
SMALL = (64, 56, 96, 224, 336, 384, 448)
"""Sides in pixels of images, one of which any processor takes."""
SILENT = "does not say what text an image becomes"
TOLD = {"add_special_tokens": False, "return_offsets_mapping": True}
"""How a text is tokenised."""
KINDS = "mm_token_type_ids"
"""The token field that says which tokens are an image's, which some models find positions by."""


@dataclass(frozen=True)
class Spread:
    """A written conversation, every image spread over its tokens."""

    text: str
    before: str
    """The text in which each image is one token."""
    answers: tuple[Span, ...]
    """Where in the spread text the answers are that carry loss."""
    images: tuple[dict[str, Any], ...]
    """What each image became, and where, as transformers' processor says it."""


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
        # What stands for a whole image in the text; one processor names it otherwise than what it is spread over.
        self.place: str = getattr(self.hf, "image_placeholder_token", "") or getattr(self.hf, "image_token", "")
        if not self.place:
            raise self._unserved(SILENT)
        self.template = Template(tokenizer, self.hf.chat_template, self.stops, self.place)
        self.trains_last_answer_only = self.template.rewrites
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
                shown += self.template.render(Record("", turns), len(turns), prompt=False)
        meant = {token for token in special if token in known or token in shown}
        return frozenset({*meant, self.hf.image_token, self.place, *self.stops})

    def replacements_of(self, sizes: tuple[Span, ...]) -> list[str]:
        """What images of these sizes become in the text: transformers' processor says so of blank ones in a question, whose pixels do not
        matter, so they are computed in the cheapest way."""
        blank = [PILImage.new("RGB", size) for size in sizes]
        asked = self.template.render(Record("", (Turn("user", "<image>" * len(sizes) + "?"),)), 1, prompt=True)
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
        asked = self.template.render(Record("", (Turn("user", "<image>?"),)), 1, prompt=True)
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

    def written(self, record: Record) -> Written:
        """The conversation as text."""
        check(record, self.controls)
        return self.template.written(record)

    def spread(self, record: Record) -> Spread:
        """The conversation as the text that is tokenised; no image is decoded."""
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

        answers = tuple((place(begin), place(end)) for begin, end in written.answers)
        return Spread(text, written.text, answers, tuple(moved))

    def encode(self, record: Record) -> Encoded:
        """The tokens, labels and pixels of a record (see `graftwork.contracts.Processor`)."""
        spread = self.spread(record)
        images = [load_image(image) for image in record.images] or None
        try:
            made = self.hf(
                text=[spread.before], images=images, return_text_replacement_offsets=True, return_tensors="pt", **TOLD
            )
        except ValueError as error:
            if images:
                raise refused(record, error) from None
            made = {}  # Some read no text without an image; the tokens are all that there is of it.
        offsets, moved = made.pop("offset_mapping", None), made.pop("text_replacement_offsets", None)
        if offsets is None or (images and moved is None):
            # What transformers' processor does not say is found in the text, and the tokens tell whether that is the same.
            found = self.tokenizer([spread.text], return_tensors="pt", **TOLD)
            offsets = found["offset_mapping"]
            agree = torch.equal(made.setdefault("input_ids", found["input_ids"]), found["input_ids"])
        else:
            agree = not images or (*moved[0],) == spread.images
        if not agree:
            raise DataError(
                f"the images of record '{record.id}' become other tokens than those of their sizes; leave it out"
            )
        ids, offsets = made.pop("input_ids")[0].numpy(), offsets[0].numpy()
        made.pop("attention_mask", None)
        made = {name: value.movedim(self.joined_in.get(name, 0), 0) for name, value in made.items()}
        fields = {name: value[0].numpy() for name, value in made.items() if value.shape == (1, len(ids))}
        pixels: dict[str, Tensor] = {name: value for name, value in made.items() if name not in fields}
        seen = ids == self.image_id
        if record.images:
            counts = [(seen & overlapping(offsets, [image["new_span"]])).sum() for image in spread.images]
            pixels[COUNTS] = torch.tensor(numpy.array(counts))
        labels = numpy.where(overlapping(offsets, spread.answers) & ~seen, ids, IGNORED)
        return Encoded(numpy.where(seen, self.pad_id, ids), seen, labels, pixels, token_fields=fields)

    def length(self, record: Record) -> int:
        """How many tokens `encode` makes."""
        (length,) = self.lengths([record])
        if isinstance(length, DataError):
            raise length
        return length

    def lengths(self, records: Sequence[Record]) -> list[int | DataError]:
        """The length of each record, or why it does not fit; all their texts are tokenised together."""
        texts, found = list[str](), list[int | DataError]()
        for record in records:
            try:
                text = self.spread(record).text
            except DataError as error:
                found.append(error)
                continue
            short = self.repeated.sub(r"\1\1", text) if self.repeated else text
            found.append((len(text) - len(short)) // len(self.hf.image_token))
            texts.append(short)
        if not texts:
            return found
        # transformers would make a list of all the ids. Its call sets what its own tokenizer does with long texts: nothing.
        self.tokenizer(texts[:1], add_special_tokens=False, verbose=False)
        sizes = map(len, self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [each if isinstance(each, DataError) else each + next(sizes) for each in found]

    @cached_property
    def repeated(self) -> re.Pattern[str] | None:
        """Image tokens in a row, each of which is a token wherever it stands; None where that is not known."""
        added = self.tokenizer.added_tokens_decoder.values()
        known = any(each.content == self.hf.image_token and not each.single_word for each in added)
        return re.compile(f"({re.escape(self.hf.image_token)}){{3,}}") if known else None

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


def overlapping(tokens: Any, spans: Sequence[Span]) -> Any:
    """Whether each token, by its offsets `[tokens, 2]`, has a character in one of the spans."""
    begins, ends = tokens.T
    found = numpy.zeros(len(tokens), dtype=bool)
    for begin, end in spans:
        found |= (begins < end) & (ends > begin)
    return found
