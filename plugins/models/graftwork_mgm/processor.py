"""MGM's prompt, labels, tokens and pixels: the only way from a record to tensors and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy
import torch

from graftwork.contracts import IGNORED, Encoded, Record, Turn, refuse_unknown_settings
from graftwork.errors import DataError, WeightsError
from graftwork.weights import read_json, refuse_pointer
from graftwork_mgm.backbones import Template
from graftwork_mgm.pixels import Images

PLACE = "<image>"
IMAGE = -200
"""Stands for a whole image among token ids, until it is spread over its tokens."""


TOKENIZER_SETTINGS = frozenset(
    {
        # Followed by transformers' classes.
        *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"),
        *("clean_up_tokenization_spaces", "spaces_between_special_tokens", "split_special_tokens", "add_prefix_space"),
        *("legacy", "sp_model_kwargs", "do_lower_case", "errors"),
        # Of batches and whole conversations, which are made here without them.
        *(
            "add_bos_token",
            "add_eos_token",
            "model_max_length",
            "max_length",
            "padding_side",
            "truncation_side",
            "stride",
        ),
        *("pad_to_multiple_of", "pad_token_type_id", "truncation_strategy", "model_input_names", "chat_template"),
        *("use_default_system_prompt", "return_token_type_ids"),
        # Of where it came from.
        *(
            "tokenizer_class",
            "tokenizer_file",
            "name_or_path",
            "special_tokens_map_file",
            "processor_class",
            "auto_map",
        ),
        *("use_fast", "vocab_file", "merges_file", "device_map"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
        *("backend", "is_local", "from_slow", "local_files_only", "trust_remote_code", "vocab_size"),
    }
)
"""Settings of a tokenizer that are followed, or change nothing of how text is written here."""


class MgmProcessor:
    """Records to tokens, labels and pixels, and ids to text (see `graftwork.model.Processor`)."""

    def __init__(self, tokenizer: Any, template: Template, images: Images, vocabulary: int) -> None:
        self.tokenizer, self.template, self.images, self.vocabulary = tokenizer, template, images, vocabulary
        if tokenizer.eos_token_id is None or (template.begins and tokenizer.bos_token_id is None):
            raise WeightsError(
                "the tokenizer names no bos_token or no eos_token; use the one that belongs to the model"
            )
        self.end = template.end or tokenizer.eos_token
        if len(end := self._ids([self.end])[0]) != 1:
            raise WeightsError(
                f"the template ends answers with '{self.end}', and the tokenizer has no such token; choose the model's template"
            )
        if tokenizer.vocab_size > vocabulary:
            raise WeightsError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocabulary}; use the model's own"
            )
        begins = template.begins or tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.start = [tokenizer.bos_token_id] if begins else []
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.stop_ids = frozenset({*end, tokenizer.eos_token_id})
        written = template.user + template.answer
        special = (token for token in tokenizer.all_special_tokens if token in written)
        self.controls = [tokenizer.eos_token, self.end, *special]

    def encode(self, record: Record) -> Encoded:
        """The tokens, labels and pixels of a record (see `graftwork.model.Processor`)."""
        ids, places, labels = self._tokens(record)
        seen = [self.images.pixels(image) for image in record.images]
        pixels = {part: torch.cat([image[part] for image in seen]) for part in (seen[0] if seen else ())}
        return Encoded(ids, places, labels, pixels)

    def length(self, record: Record) -> int:
        """How many tokens `encode` makes."""
        (length,) = self.lengths([record])
        if isinstance(length, DataError):
            raise length
        return length

    def lengths(self, records: Sequence[Record]) -> list[int | DataError]:
        """The length of each record, or why it does not fit the template; all their texts are tokenised together."""
        parts, counts, found = list[str](), list[int](), list[int | DataError]()
        for record in records:
            try:
                turns = [(text, known) for _, text, known, _ in self._turns(record)]
            except DataError as error:
                found.append(error)
                counts.append(0)
                continue
            pieces = [piece for text, _ in turns for piece in text.split(PLACE)]
            images = len(pieces) - len(turns)
            found.append(len(self.start) + images * self.images.tokens - sum(known for _, known in turns))
            parts += pieces
            counts.append(len(pieces))
        sizes = iter(self._sizes(parts))
        return [
            length if isinstance(length, DataError) else length + sum(islice(sizes, count))
            for length, count in zip(found, counts, strict=True)
        ]

    def _sizes(self, texts: list[str]) -> Iterable[int]:
        """How many tokens each text has, without special tokens around it."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return map(len, self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        # transformers would make a list of all the ids. Its call sets what its own tokenizer does with long texts: nothing.
        self.tokenizer(texts[:1], add_special_tokens=False, verbose=False)
        return map(len, self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens and surrounding space."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files; everything else is in the model's configuration."""
        self.tokenizer.save_pretrained(folder)

    def _tokens(self, record: Record) -> tuple[Any, Any, Any]:
        """Token ids, image positions and labels, every image spread over its tokens."""
        ids, labels = list(self.start), [IGNORED] * len(self.start)
        turns = [*self._turns(record)]
        found = iter(self._ids([text for asked, answered, _, _ in turns for text in (asked, answered)]))
        for (_, _, known, trained), asked, answered in zip(turns, found, found, strict=True):
            # Tokenised together, as the published models were trained: a tokenizer may join characters across the seam.
            turn = answered[known:]
            prompt = len(asked) - known if trained else len(turn)
            ids += turn
            labels += [IGNORED] * prompt + turn[prompt:]
        if record.turns[-1].role == "user":
            labels = [IGNORED] * len(ids)
        times = [self.images.tokens if token == IMAGE else 1 for token in ids]
        tokens, wanted = (numpy.repeat(numpy.array(each), times) for each in (ids, labels))
        seen = tokens == IMAGE
        return numpy.where(seen, self.pad_id, tokens), seen, numpy.where(seen, IGNORED, wanted)

    def _turns(self, record: Record) -> Iterator[tuple[str, str, int, bool]]:
        """For each question and its answer: the text up to the answer, the text with it, how many tokens before both are not
        theirs, and whether the answer carries loss."""
        template = self.template
        system, texts, trained = self._system(record), self._texts(record), _trained(record)
        for number, (user, answer) in enumerate(zip_longest(texts[::2], texts[1::2])):
            # A later turn is tokenised behind the end of the answer before, and that token dropped: some tokenizers
            # put a space before the first word of a text, but not before one that follows a token.
            before, known = (self.end + template.between, 1) if number else (system, 0)
            asked = before + template.user.replace("{}", user)
            if answer is None:
                yield asked, asked, known, False
            else:
                yield asked, asked + template.answer.replace("{}", answer) + self.end, known, trained[number]

    def _system(self, record: Record) -> str:
        """What stands before the first turn: the record's own system turn as the template writes one, else the template's own."""
        system, _ = _split(record)
        if not system:
            return self.template.system
        if self.template.system_turn is None:
            raise DataError(
                f"record '{record.id}' has a system turn, and the template '{self.template.name}' has no place for one; move its "
                "text into the first question"
            )
        if PLACE in system[0].text:
            raise DataError(f"record '{record.id}' has '{PLACE}' in its system turn; move it into a question")
        return self.template.system_turn.replace("{}", system[0].text)

    def _texts(self, record: Record) -> list[str]:
        """The texts of the turns from the user's first one, users and answers alternating, images put in front."""
        system, turns = _split(record)
        if not turns or any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
            raise DataError(
                f"in record '{record.id}' user and assistant do not take turns; correct the record or leave it out"
            )
        if control := next((c for c in self.controls for turn in (*system, *turns) if c in turn.text), None):
            raise DataError(f"record '{record.id}' has '{control}' in its text, which would end a turn; remove it")
        # Where a turn shows one image in several places, one is meant; else it shows as many.
        places = [turn.text.count(PLACE) for turn in turns]
        if sum(places) != len(record.images):
            places = [min(1, count) for count in places]
        texts = [_images_first(turn.text, count) for turn, count in zip(turns, places, strict=True)]
        if (found := sum(places)) != len(record.images):
            raise DataError(
                f"record '{record.id}' has {len(record.images)} images and {found} turns with '{PLACE}'; make them agree"
            )
        return texts

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, whose images are one `IMAGE` each; what is around one is tokenised by itself."""
        parts = [text.split(PLACE) for text in texts]
        every = [part for each in parts for part in each]
        found = iter(self.tokenizer(every, add_special_tokens=False, verbose=False)["input_ids"])
        return [
            [token for number in range(len(each)) for token in (*[IMAGE] * (number > 0), *next(found))]
            for each in parts
        ]


def _images_first(text: str, count: int) -> str:
    """A turn's text with its `count` images in front, as the published models were trained."""
    return (f"{PLACE}\n" * count + text.replace(PLACE, "").strip()).strip() if count else text


def _trained(record: Record) -> list[bool]:
    """Whether each answer carries loss."""
    return [turn.trained is not False for turn in _split(record)[1] if turn.role == "assistant"]


def _split(record: Record) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """A record's system turn, if it has one, and its turns from the user's first one."""
    system = record.turns[:1] if record.turns and record.turns[0].role == "system" else ()
    turns = record.turns[len(system) :]
    return system, turns[1:] if turns and turns[0].role == "assistant" else turns


def load_tokenizer(folder: Path, slow: str) -> Any:
    """The tokenizer in a folder: its tokenizer.json as it is, else its sentencepiece model read by the class `slow`."""
    import transformers

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise WeightsError(f"'{folder}' holds no tokenizer.json or tokenizer.model; copy the model's tokenizer there")
    for name in ("tokenizer.json", "tokenizer.model"):
        refuse_pointer(folder / name)
    if (file := folder / "tokenizer_config.json").is_file():
        settings = {key: value for key, value in read_json(file).items() if not key.endswith("_token")}
        refuse_unknown_settings(file, settings, TOKENIZER_SETTINGS, "the tokenizer")
    # Named by hand: AutoTokenizer would ask the model's class, which transformers does not know, for its own.
    name = "PreTrainedTokenizerFast" if (folder / "tokenizer.json").is_file() else slow
    return getattr(transformers, name).from_pretrained(folder, local_files_only=True)
