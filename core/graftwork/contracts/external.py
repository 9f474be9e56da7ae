"""Folders that Graftwork did not write: reading them, and what methods and models say about what is in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graftwork import weights
from graftwork.errors import WeightsError
from graftwork.weights import LazyTensor, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.contracts.batch import Batch

HISTORY = "trainer_state.json"
"""Where transformers' Trainer keeps the losses of a run."""


class ExternalFolder:
    """A folder of which nothing is believed: what it says is read, and never run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read: dict[str, dict[str, StoredTensor]] = {}
        """The files that were asked for their tensors, and these: what has to be accounted for."""

    @cached_property
    def files(self) -> frozenset[str]:
        """The names of its files, without those in folders below."""
        return frozenset(file.name for file in self.path.iterdir() if file.is_file())

    @property
    def unread(self) -> list[str]:
        """Its files that hold tensors, by their names, and that nobody asked for; without what Trainer saves to resume from."""
        of_run = {*weights.NO_WEIGHTS, "scheduler.pt", "scaler.pt"}
        rest = (name for name in self.files - self.read.keys() - of_run if not name.startswith("rng_state"))
        return sorted(name for name in rest if any(fnmatchcase(name, form) for form in weights.FORMS))

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object in it; empty where there is no such file, WeightsError where it is no JSON object."""
        return weights.read_json(self.path / name) if name in self.files else {}

    def tensors(self, name: str) -> dict[str, StoredTensor]:
        """The tensors of one of its files; of a pickle only if it holds nothing else."""
        if name not in self.read:
            self.read[name] = weights.open_file(self.path / name)
        return self.read[name]

    def shards(self) -> list[Path]:
        """The files of a whole model in it, as transformers names them; WeightsError where an index names a missing one."""
        return [file for file in weights.tensor_files(self.path) if file.name.startswith(("model", "pytorch_model"))]

    @cached_property
    def history(self) -> tuple[int, list[float]]:
        """The steps that were taken and the losses that were logged, by transformers' Trainer; 0 and none without a log."""
        saves = [path for path in self.path.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
        newest = max(saves, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
        for folder in (self, *([ExternalFolder(newest)] if newest else [])):
            state = folder.json(HISTORY)
            lines = state.get("log_history")
            found = (
                [line["loss"] for line in lines if isinstance(line, dict) and "loss" in line]
                if isinstance(lines, list)
                else []
            )
            if losses := [float(loss) for loss in found if isinstance(loss, int | float)]:
                return int(state.get("global_step") or len(losses)), losses
        return 0, []


@dataclass(frozen=True)
class Rows:
    """Other values for some rows of a tensor."""

    indices: tuple[int, ...]
    values: LazyTensor

    def put_into(self, tensor: LazyTensor) -> LazyTensor:
        """The tensor with these rows."""
        import torch

        def make(values: Any, whole: Any) -> Any:
            if len(values) != len(self.indices) or max(self.indices) >= len(whole) or min(self.indices) < 0:
                raise WeightsError(
                    f"{len(values)} rows of an embedding were trained, and trainable_token_indices names {len(self.indices)} of "
                    f"{len(whole):,}, up to {max(self.indices)}; restore adapter_config.json from where it was trained"
                )
            dtype = torch.promote_types(whole.dtype, values.dtype)  # no row that was not trained may be rounded
            return whole.to(dtype).index_copy(0, torch.tensor(self.indices), values.to(dtype))

        return weights.DerivedTensor((self.values, tensor), make)


@dataclass(frozen=True)
class Adapter:
    """An adapter in a foreign folder, as the PEFT method that can use it reads it."""

    description: str
    """What it is, as a noun phrase."""
    settings: Callable[[Mapping[str, nn.Module]], dict[str, Any]]
    """The method's settings, given the modules, by name, that `inject` is offered in the chosen roles; on the meta device."""
    tensors: Mapping[str, LazyTensor]
    """Its own tensors, by the names that the method gives them in the model."""
    modules: frozenset[str]
    """The modules that it adapts."""
    others: Mapping[str, LazyTensor] = field(default_factory=dict)
    """What was saved with it and is not the method's own, by the names that the base's weights have for it."""
    rows: Mapping[str, Rows] = field(default_factory=dict)
    """Rows of tensors that were trained, by the names of the whole tensors in the base's weights."""
    apart: frozenset[str] = frozenset()
    """Those of `others` that were trained as copies: what is tied to them in the base did not follow."""
    base: str = ""
    """The path or hub id that it names as its base."""
    revision: str = ""
    """The branch, tag or commit of that hub id that it names."""
    inconsistent: tuple[str, ...] = ()
    refused: str = ""
    """Why it cannot be used, and what would help: a sentence; empty when it can."""
    renamed: Callable[[Callable[[str], str]], Adapter] | None = None
    """The same adapter with its modules under other names, given what says the new name of one; None where names are the model's own."""


@dataclass(frozen=True)
class RequiredTower:
    """A vision tower that a foreign folder was trained with."""

    recorded: str
    """The path or hub id that it names."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The tower component's settings."""
    width: int | None = None
    """How wide the tower's maps are, all together; None where the folder does not say."""
    held: bool = False
    """Whether the foreign folder holds the tower's tensors as well."""
    source: Literal["its folder", "here", "trained here"] = "its folder"
    """Whose tensors the model used: those in the tower's own folder, those that the foreign folder holds, or the latter,
    because they were trained. Where the one has none, the other has to do."""

    def of_base(self, folder: Path) -> RequiredTower:
        """The same of an adapter whose base the foreign folder is: what the adapter itself holds of the tower was trained."""
        own = folder / self.recorded  # A folder that was written whole has its towers below it.
        return replace(
            self,
            recorded=str(own) if self.recorded and own.is_dir() else self.recorded,
            source="trained here" if self.source == "its folder" else "here",
        )


@dataclass(frozen=True)
class ImportPlan:
    """What an architecture makes of a foreign folder."""

    description: str
    """What it is, as a noun phrase."""
    configure: Callable[[Path | None], Mapping[str, Any]]
    """The model's configuration, given the base's folder; raises WeightsError when that base does not fit."""
    base: str = ""
    """The path or hub id of what it was trained from."""
    parts: Mapping[str, RequiredTower] = field(default_factory=dict)
    tensors: Mapping[str, LazyTensor] = field(default_factory=dict)
    """What it holds besides an adapter's own tensors, by names in the built model."""
    is_full_model: bool = False
    """Whether that is all of the model, so that it needs no base."""
    vocabulary: int = 0
    has_processor: bool = False
    facts: Sequence[tuple[str, str]] = ()
    """What else to know of it: a label and a phrase each."""
    missing: tuple[str, ...] = ()
    inconsistent: tuple[str, ...] = ()
    refused: str = ""
    """Why nothing can be made of it, and what would help: a sentence; empty when something can."""
    refused_on_plain: str = ""
    """The same, where its base is a plain language model."""


@dataclass(frozen=True)
class Reference:
    """A model as other code opens it, with which an import is compared."""

    module: nn.Module
    """The model with its head, its tensors under published names, as the libraries of PEFT methods take one."""
    logits: Callable[[Batch], Tensor]
    """The logits `[rows, tokens, vocabulary]` of a batch, on the CPU and in fp32."""
    readers: tuple[str, ...] = ()
    """The libraries that opened it, each with its version; none where it is the assembled model."""
    reads_images: bool = True
    tokens: tuple[int, ...] = ()
    """Token ids that what it is compared on must hold, because it treats them in a way of their own."""
    reserved: tuple[int, ...] = ()
    """Token ids that it cannot be asked about as text, because they stand for images or the like."""
    missing: tuple[str, ...] = ()
    """What it should have read and did not find, by the library's names."""
    unexpected: tuple[str, ...] = ()
    """What it found and did not read, by the names in the file."""


def broken(tensors: Mapping[str, LazyTensor]) -> str:
    """What makes tensors useless, as a sentence: they are empty or not finite; empty when nothing does."""
    import torch

    values = {name: read().detach() for name, read in tensors.items()}
    if hollow := [name for name, value in values.items() if not value.numel()]:
        return (
            f"{len(hollow)} of its {len(values)} tensors are empty, such as '{hollow[0]}': they were saved under ZeRO-3 without "
            "being gathered, and their values are lost; train again"
        )
    if wild := [
        name for name, value in values.items() if value.is_floating_point() and not torch.isfinite(value).all()
    ]:
        return (
            f"{len(wild)} of its {len(values)} tensors hold numbers that are not finite, such as '{wild[0]}': the run overflowed; "
            "train again in bf16"
        )
    return ""
