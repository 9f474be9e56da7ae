"""A checkpoint, and all that can be done with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import processes
from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import newest
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.records import Image, Record, Turn
from graftwork.errors import AdapterError, GraftworkError
from graftwork.evaluate.scores import ADAPTER, BASE
from graftwork.jobs.evaluate import (
    BATCH_SIZE,
    EvaluationRequest,
    compare_opened,
    evaluators_of,
    report_of,
    run_evaluators,
)
from graftwork.jobs.messages import Listener, Message, ignore
from graftwork.jobs.results import Compared, Scored
from graftwork.jobs.run import installed
from graftwork.jobs.verify import open_for
from graftwork.report import write_report

if TYPE_CHECKING:
    from graftwork.checkpoint.certificate import Certificate, ReadBack
    from graftwork.checkpoint.store import Opened

MAX_NEW_TOKENS = 64
Place = str | PathLike[str]


def open(  # it is meant to be called as `graftwork.open`
    folder: Place,
    *,
    base: Place | None = None,
    parts: Mapping[str, Place] | None = None,
    device: str | None = None,
    on_event: Listener = ignore,
    lookup: Lookup | None = None,
) -> Checkpoint:
    """The checkpoint `folder`, or the newest one in it.

    `base` and `parts` are where the base weights and those of parts are now, where they moved; `device` is what it runs on,
    by default cuda where there is one. Its weights are read when something needs them. Raises CheckpointError for what is
    no checkpoint.
    """
    found = newest(Path(folder))
    return Checkpoint(
        found,
        manifest.read(found),
        lookup or installed(),
        Path(base) if base else None,
        {part: Path(place) for part, place in (parts or {}).items()},
        device,
        on_event,
    )


@dataclass(frozen=True)
class Merged:
    """A whole model that was written, and what shows that it equals the checkpoint."""

    folder: Path
    certificate: Certificate
    file: Path
    """Where the certificate is."""


@dataclass(frozen=True)
class Exported:
    """What was written for other tools to read."""

    folder: Path
    certificate: Certificate | None
    """What shows that a whole model equals the checkpoint; None where only the adapter was written."""
    read_back: ReadBack | None
    """What the other tool made of the adapter; None where the whole model was written."""

    @property
    def notes(self) -> Sequence[str]:
        """What the other tool will make of it, a clause each."""
        shown = self.certificate or self.read_back
        return shown.notes if shown else ()


class Checkpoint:
    """A checkpoint that a run, or an import, has saved; made by `graftwork.open`."""

    def __init__(
        self,
        folder: Path,
        read: manifest.Manifest,
        lookup: Lookup,
        base: Path | None,
        parts: Mapping[str, Path],
        device: str | None,
        listen: Listener,
    ) -> None:
        self.folder, self.manifest, self.lookup = folder, read, lookup
        self._base, self._parts, self._device, self._listen = base, parts, device, listen
        self._opened: Opened | None = None

    def __repr__(self) -> str:
        spec = self.manifest.plan.model_spec
        method = spec.peft.name if spec.peft else "no PEFT method"
        return f"<Checkpoint {self.folder}: {method} on {spec.model.name}, step {self.manifest.step}>"

    @property
    def opened(self) -> Opened:
        """The checkpoint with its model, read and verified once."""
        if self._opened is None:
            self._opened = self._open(device=self._device)
        return self._opened

    def _open(self, **options: Any) -> Opened:
        where = {"base": self._base, "parts": self._parts}
        return open_for(self.folder, self.lookup, listen=self._listen, **where, **options)

    def ask(self, image: Place, question: str, *, variant: str = ADAPTER, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """The answer of the adapter, or of the base, to a question about an image file."""
        (answer,) = self.ask_variants(image, question, (variant,), max_new_tokens=max_new_tokens).values()
        return answer

    def ask_variants(
        self, image: Place, question: str, variants: Sequence[str] = (BASE, ADAPTER), *, max_new_tokens: int
    ) -> dict[str, str]:
        """The answer of each variant, by its name."""
        from graftwork.evaluate.generation import answer, encode_prompt

        if unknown := set(variants) - {BASE, ADAPTER}:
            raise GraftworkError(f"there is no variant '{min(unknown)}'; the variants are '{BASE}' and '{ADAPTER}'")
        assembly, answers = self.opened.assembly, {}
        record = Record("question", (Turn("user", f"<image>\n{question}"),), (Image(Path(image)),))
        prompt = [encode_prompt(assembly, record, max_new_tokens)]
        for variant in variants:
            with assembly.disable_adapter() if variant == BASE else nullcontext():
                given = answer(assembly, prompt, max_new_tokens=max_new_tokens)
            (answers[variant],), (ended,), (tokens,) = given.texts, given.ended, given.tokens
            if not ended:
                sentence = f"the {variant}'s answer did not end by itself, and was stopped at {tokens} token{'s' * (tokens != 1)}"
                self._listen(Message(f"{sentence}; allow more, unless the model's context ends there", "warning"))
        return answers

    def evaluate(
        self,
        evaluator: str,
        *,
        settings: Mapping[str, Any] | None = None,
        limit: int | None = None,
        batch_size: int = BATCH_SIZE,
        out: Place | None = None,
        take_over: bool = False,
    ) -> Scored:
        """The scores of one evaluator; the rest is as for `compare`."""
        where = Path(out) if out else None
        (scored,) = self.evaluate_all(
            EvaluationRequest((evaluator,), settings or {}, limit, batch_size, where, take_over)
        )
        return scored

    def evaluate_all(self, request: EvaluationRequest) -> Iterator[Scored]:
        """The scores of every evaluator that the request names, or of the run's. Collective."""
        for result, folder in self._answers((ADAPTER,), request):
            yield Scored(result, folder)

    def compare(
        self,
        evaluator: str,
        *,
        settings: Mapping[str, Any] | None = None,
        limit: int | None = None,
        batch_size: int = BATCH_SIZE,
        out: Place | None = None,
        take_over: bool = False,
    ) -> Compared:
        """Base and adapter on one evaluator's questions, in one pass.

        `settings` are the evaluator's, beside those that the run recorded; `limit` takes the first questions only; answers
        and the report go to `out`, by default to `evaluation` beside the checkpoint.
        """
        where = Path(out) if out else None
        (compared,) = self.compare_all(
            EvaluationRequest((evaluator,), settings or {}, limit, batch_size, where, take_over)
        )
        return compared

    def compare_all(self, request: EvaluationRequest) -> Iterator[Compared]:
        """Base and adapter on the questions of every evaluator that the request names, or of the run's. Collective."""
        for result, folder in self._answers((BASE, ADAPTER), request):
            comparison = compare_opened(self.opened, result)
            if processes.is_first():
                write_report(folder, report_of(self.opened, comparison))
            yield Compared(comparison, folder)

    def _answers(self, variants: Sequence[str], request: EvaluationRequest) -> Iterator[Any]:
        evaluators = evaluators_of(self.folder, self.manifest.plan, self.lookup, request)
        yield from run_evaluators(self.opened, self.lookup, evaluators, variants, request, self._listen)

    def verify(self, *, against: Place | None = None) -> Opened:
        """The checkpoint rebuilt from its files alone, as it was trained; CheckpointError unless it gives its logits, and AdapterError
        where its run has left something as it was that it was to train.

        `against` is the folder that it was imported from: then it must also give the logits that other code makes of that,
        such as peft, where that is installed and opens it.
        """
        if against is None:
            opened = self._open(as_trained=True)
            if (learned := opened.learned) and (faults := [*learned.faults()]):
                raise AdapterError(
                    f"'{opened.folder}' reopens as saved, but not all of it has learned; leave what cannot learn out of peft.on and "
                    "peft.also_train, or allow it with train.allow_unreached",
                    faults,
                )
            return opened
        from graftwork.foreign.comparing import compare

        opened = self._open(
            as_trained=True, device="cpu"
        )  # An import was saved there: its logits compare nowhere else.
        return replace(opened, verification=compare(opened, Path(against), self.lookup))

    def merge(self, out: Place, *, precision: str | None = None) -> Merged:
        """Fold the adapter into its base, write the whole model to the new folder `out`, and certify that it is equal.

        `precision` is what to store: `fp32`, `bf16` or `fp16`, by default that of the base weights.
        """
        from graftwork.checkpoint import merging

        merging.refuse_existing(Path(out))
        opened = self._open(device="cpu", precision="fp32")
        certificate = merging.merge(opened, Path(out), self.lookup, precision=precision)
        return Merged(Path(out), certificate, Path(out) / merging.CERTIFICATE)

    def export(self, out: Place, *, to: str, precision: str | None = None) -> Exported:
        """Write it to the new folder `out` in a format that other tools read: `peft` for the adapter, `mgm` for the model.

        A whole model is stored in fp32 by default, so that it can be imported again without loss.
        """
        from graftwork.checkpoint import merging
        from graftwork.checkpoint.certificate import ReadBack

        merging.refuse_existing(Path(out))
        opened = self._open(device="cpu", precision="fp32")
        shown = merging.export(opened, to, Path(out), self.lookup, precision=precision or "fp32")
        if isinstance(shown, ReadBack):
            return Exported(Path(out), None, shown)
        return Exported(Path(out), shown, None)
