"""What a model eats: one record as token ids and pixels, and a padded batch of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

IGNORED = -100
"""The label of a position that carries no loss (the convention of PyTorch's cross entropy)."""


PerToken: TypeAlias = "Sequence[int] | NDArray[Any]"
"""A whole number, or a bool, for each token."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """One record as the model's processor sees it; every image is already spread over its tokens.

    What there is for each token may be given as any sequence, and is kept as an array: int64, and bool in `image_token_mask`.
    """

    input_ids: PerToken
    """The token ids; positions of image tokens hold the padding id."""
    image_token_mask: PerToken
    labels: PerToken
    """The ids to predict, `IGNORED` where there is no loss; as long as `input_ids`, not shifted."""
    pixels: Mapping[str, torch.Tensor]
    """What is seen of this record's images, by name: for each part `[images, 3, height, width]`, or more where a part sees an
    image in several views; for a model without parts whatever its images are made of. Best in 8 bits, for the model to normalise: a
    quarter of the bytes go to the device. Empty without images."""
    weight: float = 1.0
    """What the record's loss counts; set by the engine."""
    token_fields: Mapping[str, PerToken] = field(default_factory=dict)
    """What else the model is told of each token, such as `token_type_ids`: name to whole numbers, as many as `input_ids`. Padding
    and generated tokens have 0."""

    def __post_init__(self) -> None:
        """Make arrays, once: a batch then copies them, and nothing goes through them one by one."""
        held = {name: as_array(getattr(self, name)) for name in ("input_ids", "labels")}
        held["image_token_mask"] = as_array(self.image_token_mask, bool)
        told = {name: as_array(values) for name, values in self.token_fields.items()}
        for name, value in {**held, "token_fields": told}.items():
            object.__setattr__(self, name, value)

    @property
    def num_label_tokens(self) -> int:
        """How many positions carry a loss."""
        return int((as_array(self.labels) != IGNORED).sum())

    @property
    def loss_weight(self) -> float:
        """What its labels count in the mean of a step's loss, together."""
        return self.weight * self.num_label_tokens


def as_array(values: PerToken, dtype: Any = "int64") -> NDArray[Any]:
    """A number for each token, as an array; what is one already stays itself."""
    import numpy

    if isinstance(values, numpy.ndarray):
        return values.astype(dtype, copy=False)
    return numpy.fromiter(values, dtype, len(values))  # far quicker than giving it the list


@dataclass
class Batch:
    """Padded records. Rows are records, or with `positions` several of them; the images of all rows lie one after another, in order."""

    input_ids: torch.Tensor
    """`[rows, tokens]`, int64."""
    attention_mask: torch.Tensor
    """`[rows, tokens]`, bool, True at real tokens."""
    image_token_mask: torch.Tensor
    """`[rows, tokens]`, bool, True where an image token goes."""
    labels: torch.Tensor
    """`[rows, tokens]`, int64, `IGNORED` where there is no loss."""
    pixels: dict[str, torch.Tensor]
    """Those of all rows, joined in the first dimension; empty when no row has an image."""
    label_positions: torch.Tensor | None = None
    """`[labels]`, int64: the positions, counted through all rows, from which a labelled token is predicted. Made at
    collation, because finding them in `labels` makes the host wait for the device; None where they are to be found there."""
    weights: Sequence[tuple[float, int]] = ()
    """What the loss of each record counts, and how many labels it has, in order; empty where all count alike, as 1."""
    token_fields: dict[str, torch.Tensor] = field(default_factory=dict)
    """What else the model is told of each token: name to `[rows, tokens]`, or `[rows, …, tokens]` where `Processor.complete` made
    it, int64."""
    positions: torch.Tensor | None = None
    """`[rows, tokens]`, int64, where rows hold several records (packing): the place of each token in its own record, 0 at padding. No token
    may have anything of another record. None where each row is one record."""
    padding: str | None = None
    """Where `attention_mask` has padding: `right`, `left`, or empty where it has none. Known at collation, because finding it in the mask makes the
    host wait for the device; None where it is to be found there."""

    def to(self, device: Any) -> Batch:
        """The same batch on another device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in memory from which a CUDA device copies without the host waiting."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same batch with each of its tensors changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: change(each) for name, each in value.items()}
            return change(value) if hasattr(value, "device") else value

        return replace(self, **{each.name: changed(getattr(self, each.name)) for each in fields(self)})


def find_label_positions(labels: torch.Tensor) -> torch.Tensor:
    """`Batch.label_positions`, from the labels of a batch that was not collated."""
    places = (labels != IGNORED).nonzero()
    rows, columns = places[places[:, 1] > 0].unbind(1)
    return rows * labels.shape[1] + columns - 1


def collate(examples: Sequence[Encoded], *, pad_id: int, side: str = "right") -> Batch:
    """Pad `examples` to the longest, on the `side` "right" (training) or "left" (generation); see also `batch_of`.

    What is seen of images is joined in the first dimension. Where other dimensions differ, such as the tiles of an image or its sides, zeros are put
    at their ends, as transformers' processors do.
    """
    import numpy
    import torch

    lengths = [len(example.input_ids) for example in examples]
    longest, right = max(lengths), side == "right"

    def padded(rows: Iterable[PerToken], filler: int = 0, dtype: Any = "int64") -> NDArray[Any]:
        filled: NDArray[Any] = numpy.full((len(lengths), longest), filler, dtype=dtype)
        for place, row in zip(filled, rows, strict=True):
            end = len(row) if right else longest
            place[end - len(row) : end] = row
        return filled

    parts = dict.fromkeys(name for example in examples for name in example.pixels)
    told = dict.fromkeys(name for example in examples for name in example.token_fields)
    labels = padded((example.labels for example in examples), IGNORED)
    real = numpy.arange(longest) < numpy.array(lengths)[:, None]
    labelled = numpy.flatnonzero(labels != IGNORED)
    return Batch(
        torch.from_numpy(padded((example.input_ids for example in examples), pad_id)),
        torch.from_numpy(real if right else real[:, ::-1].copy()),
        torch.from_numpy(padded((example.image_token_mask for example in examples), dtype=bool)),
        torch.from_numpy(labels),
        {name: _joined([e.pixels[name] for e in examples if name in e.pixels]) for name in parts},
        torch.from_numpy(labelled[labelled % longest > 0] - 1),
        _weights(examples, labels) if any(example.weight != 1 for example in examples) else (),
        {name: torch.from_numpy(padded(e.token_fields.get(name, ()) for e in examples)) for name in told},
        padding=side if min(lengths) < longest else "",
    )


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after another in the first dimension, with zeros at the ends of the others where they differ."""
    import torch

    sizes = [max(sides) for sides in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        lacking = [size - side for size, side in zip(sizes, tensor.shape[1:], strict=True)]
        # Given from the last dimension to the first, each with what comes before and after it.
        ends = [number for count in reversed(lacking) for number in (0, count)]
        return torch.nn.functional.pad(tensor, ends) if any(ends) else tensor

    return torch.cat([filled(tensor) for tensor in tensors])


def _weights(examples: Sequence[Encoded], labels: NDArray[Any]) -> list[tuple[float, int]]:
    counts = (labels[:, 1:] != IGNORED).sum(1).tolist()
    return [(example.weight, count) for example, count in zip(examples, counts, strict=True)]
