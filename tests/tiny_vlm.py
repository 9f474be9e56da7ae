"""A vision-language model of a few hundred numbers, its processor, and an evaluator, for tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftwork.contracts import (
    IGNORED,
    BadRecord,
    Batch,
    Choice,
    Encoded,
    Evaluator,
    Image,
    ModelArchitecture,
    ModelSpec,
    Plan,
    Record,
    Score,
    Turn,
    setting,
)
from graftwork.errors import DataError
from graftwork_mgm import MgmGemma, MgmSettings

LETTERS = "abcdefghijklmnopqrstuvwxyz "
PAD, STOP, FIRST_LETTER = 0, 1, 2
WIDTH, IMAGE_TOKENS = 16, 2


class CharProcessor:
    """A letter is a token, an image two; the image's file name gives its pixels."""

    pad_id = PAD
    stop_ids = frozenset({STOP})
    vocabulary = FIRST_LETTER + len(LETTERS)

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, record: Record) -> Encoded:
        self.encoded.append(record.id)
        if "unreadable" in record.question:
            raise DataError(f"the image of '{record.id}' cannot be read; fetch it again")
        seen = [PAD] * (IMAGE_TOKENS * len(record.images))
        ids = [*seen, *(FIRST_LETTER + LETTERS.index(letter) for letter in record.question.removeprefix("<image>"))]
        positions = [place < len(seen) for place in range(len(ids))]
        pixels = [torch.full((3, 2, 2), (sum(map(ord, str(image))) % 97) / 97) for image in record.images]
        return Encoded(ids, positions, [IGNORED] * len(ids), {"eye": torch.stack(pixels)} if pixels else {})

    def length(self, record: Record) -> int:
        return len(self.encode(record).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[token - FIRST_LETTER] for token in ids if token >= FIRST_LETTER).strip()

    def save(self, folder: Path) -> None: ...


class TinyVlm(nn.Module):
    """One layer of causal attention over letters and image features, with an adapter added to its output."""

    def __init__(self, memory: int | None = None) -> None:
        super().__init__()
        self.letters = nn.Embedding(CharProcessor.vocabulary, WIDTH)
        self.places = nn.Embedding(512, WIDTH)
        self.eye = nn.Linear(12, IMAGE_TOKENS * WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CharProcessor.vocabulary)
        self.adapter_is_on = True
        self.memory = memory
        self.seen = 0
        self.rows: list[int] = []

    def encode_images(self, pixels: Mapping[str, Tensor]) -> Sequence[Tensor]:
        self.seen += len(pixels["eye"])
        return list(self.eye(pixels["eye"].flatten(1)).unflatten(1, (IMAGE_TOKENS, WIDTH)))

    def forward(self, batch: Batch, features: Sequence[Any] | None = None, cache: Any = None) -> Tensor:
        if self.memory and len(batch.input_ids) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.rows.append(len(batch.input_ids))
        new = batch.input_ids.shape[1]
        embedded = self.letters(batch.input_ids)
        if batch.pixels:
            seen = torch.cat([*(features or self.encode_images(batch.pixels))])
            embedded[batch.image_token_mask] = seen.to(embedded.dtype)
        position = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        q, k, v = self.mix(self.dropout(embedded + self.places(position))).chunk(3, dim=-1)
        if cache is not None:
            k, v = torch.cat([*cache.get("k", []), k], dim=1), torch.cat([*cache.get("v", []), v], dim=1)
            cache.update(k=[k], v=[v])
        keys = torch.arange(k.shape[1])
        causal = keys[None, :] <= keys[-new:, None]
        visible = causal[None] & batch.attention_mask[:, None, :]
        weights = (q @ k.mT).masked_fill(~visible, -1e9).softmax(-1)
        hidden = embedded + weights @ v
        return hidden + self.adapter(hidden) if self.adapter_is_on else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def new_cache(self) -> Any:
        return {}


@dataclass
class TinyAssembly:
    """What the engine asks of an assembly."""

    model: TinyVlm = field(default_factory=TinyVlm)
    processor: CharProcessor = field(default_factory=CharProcessor)
    architecture: ModelArchitecture[Any] = field(default_factory=lambda: MgmGemma(MgmSettings()))
    """Any one, to say how many tokens the model reads."""
    precision: str = "fp32"
    changes_image_features: bool = False
    context: int = 512
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def plan(self) -> Plan:
        config = {"text_config": {"max_position_embeddings": self.context}}
        return Plan(ModelSpec(Choice("model", "tiny", "tiny", "tiny", "0", config=config)))

    def autocast(self) -> Any:
        return nullcontext()

    def kernel_usage(self) -> dict[str, Any]:
        return {"language": {"plain": len(self.model.rows)}}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.model.adapter_is_on = False
        try:
            yield
        finally:
            self.model.adapter_is_on = True


def tiny_assembly(seed: int = 3, memory: int | None = None, **changes: Any) -> TinyAssembly:
    """An assembly whose weights depend on the seed; `memory` is the largest batch that does not run out of memory."""
    torch.manual_seed(seed)
    return TinyAssembly(TinyVlm(memory), **changes)


def question(name: str, text: str, *, image: str = "", group: str = "", reference: str = "yes") -> Record:
    images = (Image(Path(image)),) if image else ()
    return Record(name, (Turn("user", "<image>" * bool(image) + text),), images, group, (reference,), f"quiz:{name}")


@dataclass(frozen=True)
class QuizSettings:
    hard: bool = setting(False, "Whether only exact answers count")


class Quiz(Evaluator[QuizSettings]):
    """Questions given as a list; an answer is right if it begins as the reference does"""

    name: ClassVar[str] = "quiz"
    Settings: ClassVar[type] = QuizSettings
    max_new_tokens: ClassVar[int] = 4

    def __init__(self, *questions: Record | BadRecord, hard: bool = False) -> None:
        super().__init__(QuizSettings(hard))
        self.questions = questions

    def records(self) -> Sequence[Record | BadRecord]:
        return self.questions

    def score(self, record: Record, answer: str) -> Score:
        return Score(float(answer[:1] == record.reference[0][:1]), record.group)
