"""What the engine calls on a built model and on its processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from graftwork.contracts.batch import Batch, Encoded, collate
from graftwork.contracts.packing import packed
from graftwork.contracts.records import Record

if TYPE_CHECKING:
    from torch import Tensor


class VisionLanguageModel(Protocol):
    """What the engine calls on a built model, which is a `torch.nn.Module`."""

    def encode_images(self, pixels: Mapping[str, Tensor]) -> Sequence[Any]:
        """The features of a batch's images: an entry for each image, in order, so that some can be chosen or repeated. What an
        entry is made of is the model's own business: a tensor, or lists and tables of tensors."""
        ...

    def __call__(self, batch: Batch, features: Sequence[Any] | None = None, cache: Any = None) -> Tensor:
        """The final hidden states `[rows, tokens, width]`.

        `features`, an entry for each image of the batch, saves calling `encode_images` again. With a `cache` (see `new_cache`) `batch.input_ids` holds the new tokens
        only and `batch.attention_mask` covers the cached ones as well: `[rows, cached + new]`.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """The vocabulary's scores for hidden states `[..., width]`: `[..., vocabulary]`."""
        ...

    def new_cache(self) -> Any:
        """An empty cache of keys and values for generation."""
        ...


class Processor(Protocol):
    """The only way from records to tensors and back.

    A processor may have `resized(record)`: for each image its size in pixels, width and height, and the size in which the model gets
    the whole of it, neither cropped nor padded; CoordinatesRefused where there is no such size. Boxes and points in pixels need it.
    A processor may have `save_beside_adapter(folder)`, which writes into the folder of an exported adapter what of it is not as the
    base's folder has it, and returns a sentence about that; empty for nothing.
    A processor may also have `complete(batch)`, which returns a collated batch with what of it is computed on the host and from
    whole rows, such as positions: in `forward` it would make the host wait for the device at each step.

    With a true `trains_last_answer_only` a run gives it a sample for each answer, which is the last of its sample: for a template that
    writes answers otherwise once others follow, such as one that leaves out what a model thought before.
    """

    pad_id: int
    stop_ids: frozenset[int]
    vocabulary: int

    def encode(self, record: Record) -> Encoded:
        """The record's tokens and pixels. A last user turn makes a prompt for generation; otherwise every assistant
        turn is labelled but those with `trained=False`, and no other. Raises DataError for a record that does not fit the template, such as one with a system
        turn where that has no place for one, or an image that cannot be read."""
        ...

    def length(self, record: Record) -> int:
        """How many tokens `encode` would make, without opening the images.

        A processor may also have `lengths(records)`, which gives, faster for many, the length of each or the DataError that
        `length` would raise.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens and surrounding space."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything that `ModelArchitecture.processor` needs into an empty folder, as files that are no pickles."""
        ...


def batch_of(
    processor: Processor, examples: Sequence[Encoded], *, side: str = "right", rows: Sequence[int] = ()
) -> Batch:
    """`collate`, and what the processor has to `complete` in the batch; with `rows` then so many records in each row (see `packed`)."""
    batch = completed(processor, collate(examples, pad_id=processor.pad_id, side=side))
    return packed(batch, rows, processor.pad_id) if rows else batch


def completed(processor: Processor, batch: Batch) -> Batch:
    """The batch as `Processor.complete` returns it; the batch itself where a processor has no such method."""
    complete: Callable[[Batch], Batch] | None = getattr(processor, "complete", None)
    return complete(batch) if complete else batch
