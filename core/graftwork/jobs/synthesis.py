"""`graftwork data synthesize`: data sets with records that a writer made, each of them verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import weights
from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import newest
from graftwork.config.datafile import DataPlan, resolve_data
from graftwork.config.writers import WriterPlan
from graftwork.contracts.data import DataMaker, DataOperator, DataVerifier
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import ModelSpec
from graftwork.contracts.writer import Writer
from graftwork.data.pipeline import PipelineResult
from graftwork.data.store import REPLIES
from graftwork.errors import PlanRefused
from graftwork.jobs.data_sets import DataSet, Writing, make_data_set
from graftwork.jobs.messages import Listener, Message, WaitingForReplies, ignore
from graftwork.jobs.run import Run, installed
from graftwork.jobs.verify import open_for
from graftwork.writers.endpoint import EndpointSource, Spent
from graftwork.writers.local import ModelSource
from graftwork.writers.replies import RecordedWriter, ReplyCache, RequestKeys, Source, total_usage

if TYPE_CHECKING:
    from graftwork.contracts.assembly import Assembly

WRITER, VERIFIER = "writer", "verifier"
"""What the writers of a data set are called: for makers, and for what verifies."""


def synthesize_data(
    data: str | PathLike[str] | Mapping[str, Any],
    out: str | PathLike[str],
    *,
    limit: int | None = None,
    copy: bool = False,
    report: bool = True,
    resume: bool = False,
    on_event: Listener = ignore,
    lookup: Lookup | None = None,
) -> DataSet:
    """Like `process_data`, with operators that make records, and one that verifies them, by the writers that the file names.

    Every prompt and raw reply is kept in the data set. A reply that came is never asked for again: neither by `resume`, nor by another
    command that asks the same of the same writer. Raises what `process_data` raises; DataError also where a writer cannot go on.
    """
    lookup = lookup or installed()
    plan = resolve_data(data if isinstance(data, Mapping) else Path(data), lookup, synthesis=True)
    with ExitStack() as closed:
        writers = Writers(plan, lookup, on_event, closed)
        writing = Writing(writers.lend, writers.identities, writers.facts)
        try:
            return make_data_set(
                plan,
                Path(out),
                lookup,
                limit=limit,
                copy=copy,
                report=report,
                resume=resume,
                listen=on_event,
                writing=writing,
            )
        finally:  # What it cost counts most where it came to nothing.
            writers.tell()


class Writers:
    """The writers of a data plan, for as long as a data set is made."""

    def __init__(self, plan: DataPlan, lookup: Lookup, listen: Listener, closed: ExitStack) -> None:
        self.plan, self.listen = plan, listen
        opened: dict[int, Source] = {}
        self.sources: dict[str, Source] = {}
        for name, asked in ((WRITER, plan.writer), (VERIFIER, plan.verifying)):
            if asked is not None:  # One that does both is opened once.
                source = opened.get(id(asked)) or source_of(asked, lookup, listen)
                opened[id(asked)] = self.sources[name] = source
        self.cache = closed.enter_context(closing(ReplyCache()))
        self.endpoints = [source for source in opened.values() if isinstance(source, EndpointSource)]
        for endpoint in self.endpoints:
            closed.enter_context(closing(endpoint))
        self.replies = self.asked = 0

    @property
    def identities(self) -> dict[str, Any]:
        """What says who writes."""
        return {name: source.identity for name, source in self.sources.items()}

    @contextmanager
    def lend(self, operator: DataOperator[Any], folder: Path) -> Iterator[Writer | None]:
        """The writer of one stage, whose folder keeps the replies; None for an operator that asks none."""
        name = WRITER if isinstance(operator, DataMaker) else VERIFIER if isinstance(operator, DataVerifier) else None
        if name is None:
            yield None
            return
        before = self.replies

        def told(replies: int, asked: int) -> None:
            self.replies += replies
            self.asked += asked
            self.listen(WaitingForReplies(operator.name, self.replies - before))

        source = self.sources[name]
        same = name == VERIFIER and WRITER in self.sources and self.sources[WRITER].identity == source.identity
        asked = RequestKeys(folder.parent.glob(f"*/{REPLIES}") if same else (), WRITER)
        with closing(RecordedWriter(source, self.cache, folder, operator.name, name, told, asked)) as writer:
            yield writer

    def facts(self, result: PipelineResult, folder: Path) -> dict[str, Any]:
        """What a manifest says of writers and of verification."""
        file = folder / REPLIES
        used = total_usage(file) if file.exists() else {}
        whose = {name: {**identity, **used.get(name, {})} for name, identity in self.identities.items()}
        verifier = self.plan.operators[-1]
        verification = None
        if isinstance(verifier, DataVerifier):
            settings = self.plan.run_context.operators[-1].settings
            groups = list(result.stages[-1].verdicts)
            verification = {
                "use": verifier.name,
                "settings": settings,
                "by_itself": self.identities[VERIFIER] == self.identities.get(WRITER),
                "writer": whose[VERIFIER],
                "groups": groups,
            }
        return {"writer": whose.get(WRITER), "verification": verification}

    def tell(self) -> None:
        """How much was asked, and what it cost."""
        known = self.replies - self.asked
        self.listen(Message(f"replies: {self.replies:,}, of which {known:,} were known and not asked for again"))
        for endpoint in self.endpoints:
            self.listen(Message(_told(endpoint.spent())))


def _told(spent: Spent) -> str:
    """What was asked of an endpoint, and what it cost, as a sentence."""
    cost = "" if spent.cost is None else f"; by its price that costs {spent.cost:,.4f}"
    return (
        f"endpoint: {spent.requests:,} requests, {spent.retries:,} sent again, {spent.read:,} tokens read and {spent.written:,} "
        f"written{cost}"
    )


def source_of(plan: WriterPlan, lookup: Lookup, listen: Listener) -> Source:
    """What answers, by a writer's table; nothing is built, and nothing asked, before there is a prompt."""
    if plan.endpoint is not None:
        return EndpointSource(plan.endpoint, plan.seed, lambda sentence: listen(Message(sentence, "warning")))
    build, identity = (_checkpoint if plan.fields.checkpoint else _model)(plan, lookup, listen)
    identity = {**identity, "precision": plan.fields.precision}
    is_base = plan.fields.variant == "base" and plan.fields.checkpoint is not None
    return ModelSource(build, identity, base=is_base, batch_size=plan.fields.batch_size)


Opening = tuple[Callable[[], "Assembly"], dict[str, Any]]
"""What builds a model, and what says whose replies its are."""


def _checkpoint(plan: WriterPlan, lookup: Lookup, listen: Listener) -> Opening:
    assert plan.fields.checkpoint is not None
    folder = newest(plan.fields.checkpoint)
    read = manifest.read(folder)
    sha256 = weights.sha256(folder / manifest.FILE)
    identity = {"checkpoint": sha256, "variant": plan.fields.variant, "base": hashes_of(read.plan.model_spec)}

    def build() -> Assembly:
        assembly = open_for(folder, lookup, listen=listen, precision=plan.fields.precision).assembly
        if plan.fields.variant == "base" and not assembly.can_disable:
            raise PlanRefused(
                f"{plan.where}.variant: '{folder}' has no base, as all that it trained is new; leave it out"
            )
        return assembly

    return build, identity


def _model(plan: WriterPlan, lookup: Lookup, listen: Listener) -> Opening:
    from graftwork.build import compose

    assert plan.model is not None
    resolved = Run.read(plan.model).plan(lookup)
    spec = resolved.model_spec
    if spec.model.weights is None:
        raise PlanRefused(
            f"{plan.where}.model: names no weights, and a model of random weights writes nothing; name them"
        )
    identity = {"model": spec.model.name, "settings": spec.model.settings, "weights": hashes_of(spec)}
    return lambda: compose.build(resolved, lookup, precision=plan.fields.precision), identity


def hashes_of(spec: ModelSpec) -> dict[str, str]:
    """The hash of the base weights of a model and of each of its parts."""
    choices = {"model": spec.model, **spec.parts}
    return {
        name: choice.weights.sha256 or weights.fingerprint(Path(choice.weights.path))
        for name, choice in choices.items()
        if choice.weights
    }
