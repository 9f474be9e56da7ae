"""Every kind of component, and what one is asked for and may rely on; the two kinds of data are in `contracts/data.py`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graftwork.contracts.anatomy import (
    AttentionCase,
    AttentionSite,
    BuildContext,
    Structure,
    TowerOutput,
    TowerSlot,
    positions_of,
)
from graftwork.contracts.component import Approximation, Component, S, Support
from graftwork.contracts.configuration import refuse_quantized
from graftwork.contracts.model import Processor
from graftwork.contracts.records import BadRecord, Record
from graftwork.contracts.score import Prediction, Score, plain_sum
from graftwork.errors import WeightsError
from graftwork.weights import LazyTensor, read_json

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from graftwork.contracts.assembly import Assembly
    from graftwork.contracts.external import Adapter, ExternalFolder, ImportPlan, Reference
    from graftwork.contracts.plan import TrainSettings
    from graftwork.contracts.stepper import Stepper

KINDS: Mapping[str, str] = {
    "model": "model_architectures",
    "vision_tower": "vision_towers",
    "peft": "peft_methods",
    "memory": "memory_strategies",
    "attention": "attention_kernels",
    "evaluator": "evaluators",
    "data_source": "data_sources",
    "data_operator": "data_operators",
}
"""Every kind, and the hook that registers it."""


class Weighted(Component[S]):
    """A component whose structure depends on a folder of weights (models and vision towers)."""

    def configuration(self, folder: Path | None) -> Mapping[str, Any]:
        """Everything that the structure depends on, as plain JSON; it becomes part of the plan and the checkpoint.

        `folder` holds weights or only configurations; None where the run names neither, and then settings must do.
        """
        if folder is None:
            raise WeightsError(
                f"'{self.name}' needs a folder of weights or of configurations: set 'weights' or 'config'"
            )
        config = read_json(folder / "config.json")
        refuse_quantized(folder / "config.json", config)
        return config

    def unused(self, name: str) -> str:
        """What a tensor of that name in a weights file belongs to, a noun phrase, where it is known to be no part of this component:
        `the text encoder of CLIP`. Empty for one that it uses, and for one that it does not know: these are refused."""
        return ""

    def example(self, folder: Path) -> None:
        """Write into an empty folder what `configuration`, and a model's `processor`, read, of a size that builds at once.

        `graftwork check` builds from it what cannot be built from settings alone; by default there is no example.
        """


class AttentionKernel(Component[S]):
    """An implementation of scaled dot-product attention."""

    kind: ClassVar[str] = "attention"
    preference: ClassVar[int] = 0
    """Where a run file names none, kernels are tried from the highest preference down."""
    computes: ClassVar[frozenset[str]] = frozenset()
    """Of `window`, `softcap`, `mask` and `segments` (see `AttentionSite`) those that it computes. It is never asked for the others, and
    gets those that a case has as further arguments of `forward`."""

    @abstractmethod
    def supports(self, case: AttentionCase) -> Support:
        """Whether this kernel computes this case; the reason when it does not. Imports no torch."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, padding: Tensor | None, causal: bool, scale: float, dropout: float
    ) -> Tensor:
        """softmax(q k^T * scale) v, of shape `[batch, heads, queries, head_dim]`.

        `q` is `[batch, heads, queries, head_dim]`; `k` and `v` are `[batch, kv_heads, keys, head_dim]`, where kv_heads
        divides heads. `padding` is `[batch, keys]`, bool, True at real keys, or None when every key is real. With
        `causal` the queries are the last positions of the keys, and each sees the keys up to its own. A query that sees
        no key at all, or that is padding itself, gets finite numbers, whatever they are. A kernel that `computes` more takes
        `window: int | None`, `softcap: float | None`, `mask` and `segments` as well, None by default. `mask` is bool, `[batch, 1, queries, keys]`, True
        where a query sees a key, beside what the others say. `segments`, `[batch, keys]`, numbers the records of each row, with 0 at padding; queries,
        as many as keys, see those of their own record.
        """


class VisionTower(Weighted[S]):
    """An image encoder: pixels to a pyramid of feature maps."""

    kind: ClassVar[str] = "vision_tower"

    @abstractmethod
    def describe(self, config: Mapping[str, Any], size: int | None = None) -> TowerOutput:
        """What the tower computes from square images of `size` pixels (by default those it was trained on).

        Raises WeightsError for a size that it cannot take.
        """

    def sites(self, config: Mapping[str, Any]) -> Sequence[AttentionSite]:
        """Where the tower computes attention; none for a convolutional one. The model renames them `vision.PART`."""
        return ()

    @abstractmethod
    def build(self, config: Mapping[str, Any], context: BuildContext) -> nn.Module:
        """The tower, whose forward takes pixels `[images, 3, size, size]` and returns a list of maps
        `[images, width, rows, columns]`, finest first. No weights are read here."""

    @abstractmethod
    def module_name(self, name: str) -> str | None:
        """The built module's name for a tensor of that name in a weights file; None for one that it does not use, of which
        `unused` says what it is."""

    def published_name(self, name: str) -> str:
        """The name that published weights give to the built module's tensor `name`; the inverse of `module_name`."""
        return name


class ModelArchitecture(Weighted[S]):
    """A vision-language model: how it is built from towers, which part plays which role, and its prompt."""

    kind: ClassVar[str] = "model"
    parts: ClassVar[Mapping[str, TowerSlot]] = {}
    roles: ClassVar[Mapping[str, str]] = {}
    """Every role, such as `language.attention`, with a line on what it is. `language` selects all `language.*`."""
    newly_initialised_roles: ClassVar[tuple[str, ...]] = ()
    """The roles that may be missing from the weights and then start untrained (a connector)."""
    overflows_in: ClassVar[tuple[str, ...]] = ()
    """Precisions, such as `fp16`, in which the published model is known to overflow."""

    def context_length(self, config: Mapping[str, Any]) -> int | None:
        """How many tokens the model reads at most, image tokens included; None where nothing limits them. By default what
        Hugging Face's configurations call `max_position_embeddings`."""
        return positions_of(config)

    def bars_packing(self, config: Mapping[str, Any]) -> str:
        """Why records cannot share a row (see `Batch.positions`), as a clause; empty where they can, which is tried before training."""
        return ""

    @abstractmethod
    def sites(self, config: Mapping[str, Any], towers: Mapping[str, TowerOutput]) -> Sequence[AttentionSite]:
        """Where the model itself, without its towers, computes attention."""

    @abstractmethod
    def describe_towers(
        self, config: Mapping[str, Any], towers: Mapping[str, tuple[VisionTower[Any], Mapping[str, Any]]]
    ) -> Mapping[str, TowerOutput]:
        """What each part's tower computes at the size at which this model uses it. Raises WeightsError for towers that
        do not fit together. `towers` maps each filled part to its component and its configuration."""

    @abstractmethod
    def build(
        self,
        config: Mapping[str, Any],
        towers: Mapping[str, nn.Module],
        outputs: Mapping[str, TowerOutput],
        context: BuildContext,
    ) -> Structure:
        """The model around its towers. No weights are read here; it may be called where parameters are on `meta`."""

    @abstractmethod
    def tensors(
        self,
        weights: Mapping[str, LazyTensor],
        towers: Mapping[str, VisionTower[Any]],
        model: nn.Module | None = None,
    ) -> Mapping[str, LazyTensor]:
        """The tensors of a weights folder under the built `model`'s names, towers included if the folder has them. There is no model
        yet where a folder of other code is only looked at.

        What the model has no place for keeps its name, and is refused or compared by it; only what `unused` knows may be left
        out. A tensor that is made of others is a `graftwork.weights.DerivedTensor`, so that these count as used."""

    def untied(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The configuration of the same model in which tied weights are tensors of their own, whose `Structure.untied` says what
        they were tied to; None where it has no such form."""
        return None

    def parts_with_own_weights(self, config: Mapping[str, Any]) -> Collection[str]:
        """The parts that take the weights that a run names for them even if the model's own folder holds such a part too."""
        return ()

    @abstractmethod
    def processor(
        self, config: Mapping[str, Any], folder: Path | None, outputs: Mapping[str, TowerOutput]
    ) -> Processor:
        """The processor, from a weights folder or from a folder that `Processor.save` wrote."""

    def stand_in(
        self,
        config: Mapping[str, Any],
        folder: Path,
        outputs: Mapping[str, TowerOutput],
        source: Path | None = None,
    ) -> Processor:
        """A processor for a model of which configurations alone are there (in `source`), with whatever tokenizer: what it makes of an
        image is to have its sizes. By default that of the example, written into an empty `folder`."""
        self.example(folder)
        return self.processor(config, folder, outputs)

    def import_from(
        self, folder: ExternalFolder, towers: Mapping[str, VisionTower[Any]], adapter: Adapter | None
    ) -> ImportPlan | None:
        """What this model makes of a folder that other code wrote; None where it is not of this model.

        `towers` are the default ones of each part, and `adapter` is what a PEFT method has read in the folder. Nothing is
        believed and nothing is run; raises WeightsError for files that cannot be read."""
        return None

    def reference(self, assembly: Assembly) -> Reference | None:
        """The assembled model as the libraries of PEFT methods take one, where that is not as it is."""
        return None

    def open_elsewhere(self, folder: Path) -> Reference | None:
        """The model in a folder as another library opens it, in fp32; None where there is none. WeightsError says why it cannot."""
        return None

    @abstractmethod
    def write(self, assembly: Assembly, folder: Path) -> None:
        """Write the whole model, towers included, into an empty folder that `weights = folder` reads back."""


class PeftMethod(Component[S]):
    """A way of training few parameters. It writes no save code and knows no model."""

    kind: ClassVar[str] = "peft"
    learning_settings: ClassVar[tuple[str, ...]] = ()
    """The settings that say how it learns alone, not what its tensors are or mean: they may be others in a run that begins with an
    earlier adapter."""

    @abstractmethod
    def inject(self, model: nn.Module, targets: Sequence[str], *, fresh: bool) -> None:
        """Change `model` in place so that what should be trained requires gradients; everything else is frozen already.

        `targets` are names of modules that hold parameters themselves (a Linear, a LayerNorm). With `fresh` false the
        values of everything new are loaded right after, so no expensive initialisation is needed, and parameters may
        live on `meta`. The base's own values may come later: leave what depends on them to `initialise_from_base`. Raises
        AdapterError when nothing among the targets can be adapted.
        """

    def initialise_from_base(self, module: nn.Module) -> None:
        """Set the initial values of what `inject` added in a module and that depends on the values of the base there.

        Called after an `inject` that was `fresh`, for the whole model, or for one part of it after another where a memory
        strategy shards the weights. By default nothing depends on them.
        """

    @abstractmethod
    def disable_adapter(self, model: nn.Module) -> AbstractContextManager[None]:
        """While entered, what `inject` added has no effect. Values of the base that were trained are core's business."""

    @abstractmethod
    def merge(self, model: nn.Module) -> None:
        """Fold what `inject` added into the base's own tensors, and restore the module structure of before `inject`."""

    def import_from(self, folder: ExternalFolder) -> Adapter | None:
        """The adapter of this method in a folder that other code wrote; None where there is none."""
        return None

    def open_elsewhere(self, reference: Reference, folder: Path, optional: Sequence[str]) -> Reference | None:
        """A model with the adapter in a folder, as the library that wrote it opens it, and not as `import_from` reads it; None where
        there is none. `optional` modules of which the folder holds nothing are none of it. AdapterError says why it cannot."""
        return None

    def param_groups(self, parameters: Mapping[str, nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
        """The optimizer's parameter groups for all trained parameters, by name.

        Core gives them the run's weight decay, unless a group has its own, and none for biases and normalisation layers.
        """
        return [{"params": list(parameters.values()), "lr": learning_rate}]


class MemoryStrategy(Component[S]):
    """A way of using less memory that does not change what is trained.

    Two strategies of a run cannot both have their own `optimizer`, `loss`, `stepper` or `full_params`: the plan is refused.
    """

    kind: ClassVar[str] = "memory"
    approximates: ClassVar[Approximation | None] = None
    """What it approximates; None for a strategy whose step equals a plain one."""

    def building(self) -> AbstractContextManager[None]:
        """Entered while the model is built and filled."""
        return nullcontext()

    def quantize(self, assembly: Assembly) -> None:
        """Store frozen weights smaller, after the PEFT method and before the model moves to `assembly.device`.

        Where a strategy shards the weights, it is called for one part of the model after another: what is still on `meta` has
        its turn later.
        """

    def sharder(self, assembly: Assembly) -> Callable[[nn.Module], None] | None:
        """What leaves of a module's weights this process's share, for a strategy that shards weights; None for any other.

        Where there is one, the model stays on `meta`, and core goes through its parts, each block and then what lies outside of
        them: it fills a part, moves it to `assembly.device` and hands it to the sharder before it fills the next. So a process
        never holds more than its share and one part. The model itself comes last; what is sharded already stays as it is.
        Collective.
        """
        return None

    def prepare(self, assembly: Assembly) -> None:
        """Change the assembled model in place, on its device and before the optimizer exists."""

    def note(self, assembly: Assembly) -> str:
        """What a person should know of it in this run, as a clause; empty when there is nothing to say."""
        return self.approximates.reason if self.approximates else ""

    def optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> Optimizer | None:
        """An optimizer that behaves as AdamW does, for parameter groups that have their learning rates and weight decays; None
        for AdamW."""
        return None

    def loss(self, assembly: Assembly) -> Callable[[Any, Tensor, Tensor], Tensor] | None:
        """What `Assembly.cross_entropy` is to be: another way to the same loss; None for the plain one."""
        return None

    def stepper(self, assembly: Assembly, settings: TrainSettings) -> Stepper | None:
        """Another way of taking a step, for an engine that computes gradients or updates itself; None for the plain one."""
        return None

    def footprint(self, alone: Mapping[str, int], processes: int, assembly: Assembly) -> Mapping[str, int]:
        """What each of `processes` processes keeps on its device, from what a process `alone` keeps, in bytes by category: `frozen
        weights`, `trained weights`, `gradients`, `optimizer state`, `activations` and `temporaries`.

        The assembled model has sizes and no values. Only for what tensors without content cannot show in one process: sharing
        among processes, main memory, and code that does not run on them. A strategy that has this method is left out of the
        rehearsal, and its arithmetic is applied to what the rehearsal finds.
        """
        return alone

    def full_params(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Entered while all values of these parameters are read or replaced, as for saving; every process enters it."""
        return nullcontext()


class Evaluator(Component[S]):
    """A benchmark: questions in a fixed order, and how answers are scored. The loop is core's."""

    kind: ClassVar[str] = "evaluator"
    metric: ClassVar[str] = "accuracy"
    max_new_tokens: ClassVar[int] = 16

    @abstractmethod
    def records(self) -> Iterable[Record | BadRecord]:
        """The questions, each with a unique id, in a fixed order; those that count only together with the same `unit`."""

    @abstractmethod
    def score(self, record: Record, answer: str) -> Score:
        """The score of one answer."""

    def best_score(self, record: Record) -> Score:
        """The score of the best of the record's references, of which it needs one."""
        return max((self.score(record, text) for text in record.reference), key=lambda score: score.value)

    def total(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """The final numbers, 0 to 1 unless the benchmark says otherwise: under `metric` overall, then one per group."""
        groups = sorted({score.group for score in scores if score.group})
        totals = {self.metric: plain_sum(score.value for score in scores) / len(scores)}
        for group in groups:
            values = [score.value for score in scores if score.group == group]
            totals[group] = plain_sum(values) / len(values)
        return totals

    def write(self, answered: Sequence[Prediction], folder: Path) -> None:
        """Write into `folder`, once all is answered, what the benchmark asks for besides, such as a file to submit.

        `answers.jsonl` and `scores.json` are core's; by default there is nothing else. Where it cannot be written, as without a
        package that nothing else needs, raise GraftworkError: the sentence is said, and the scores stand.
        """
