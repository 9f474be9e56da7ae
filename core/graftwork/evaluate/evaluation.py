"""Evaluation: questions asked once for every variant, scored, and written down so that an interruption costs nothing."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import processes
from graftwork.contracts.batch import Encoded
from graftwork.contracts.coordinates import in_view
from graftwork.contracts.kinds import Evaluator
from graftwork.contracts.model import batch_of
from graftwork.contracts.records import BadRecord, Record, RecordCounts, image_key, unit_key
from graftwork.contracts.score import Prediction, plain_sum
from graftwork.data.digest import image_hash, question_digest
from graftwork.errors import DataError, GraftworkError
from graftwork.evaluate import questions
from graftwork.evaluate.answers import ANSWERS, AnswerFile, BatchResult, describe_reuse, line_of, only, predictions
from graftwork.evaluate.generation import Answers, answer, answering, context_of, encode_prompt, room
from graftwork.evaluate.questions import by_image, read_questions
from graftwork.evaluate.scores import ADAPTER, BASE, Row, describe_majority, describe_maximum, format_score, tabulate
from graftwork.weights import sha256

if TYPE_CHECKING:
    from graftwork.contracts.assembly import Assembly

Prompt = tuple[Record, Encoded]


@dataclass(frozen=True)
class Result:
    """An evaluation that was carried out: every answer, and what shows that a model really gave it."""

    evaluator: Evaluator[Any]
    answered: tuple[Prediction, ...]
    """In the evaluator's order."""
    bad: tuple[BadRecord, ...]
    provenance: Mapping[str, Any]
    limit: int | None = None
    """The first so many whole questions were asked and no others; None where all were."""

    @property
    def counts(self) -> RecordCounts:
        """How many questions were read, answered and left out."""
        return RecordCounts(len(self.answered) + len(self.bad), len(self.answered), len(self.bad))

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table of scores, the metric first."""
        return tabulate(self.evaluator, self.answered)

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Variant to metric or group to number."""
        variants = self.answered[0].answers
        return {variant: {row.name: row.scores[variant].value for row in self.rows} for variant in variants}

    @property
    def mean_of_all(self) -> dict[str, float]:
        """By variant, the mean score of all questions, where those that could not be asked score zero."""
        count, variants = self.counts.read, self.answered[0].answers
        return {variant: plain_sum(one.scores[variant].value for one in self.answered) / count for variant in variants}

    def unanswered(self) -> str:
        """How many questions could not be asked, and the mean scores with them in the denominator; empty if all were."""
        if not self.bad:
            return ""
        means = " and ".join(
            f"{format_score(mean, 0 <= mean <= 1)} ({variant})" for variant, mean in self.mean_of_all.items()
        )
        return f"{self.could_not_be_asked()}; with zero for them the mean score is {means}."

    def could_not_be_asked(self) -> str:
        """How many of how many questions could not be asked."""
        return f"{self.counts.left_out:,} of {self.counts.read:,} questions could not be asked"

    def limited(self) -> str:
        """That only the first questions were asked; empty where all were."""
        if self.limit is None:
            return ""
        return f"By a limit, the scores are of the first {self.limit:,} whole questions alone ({self.counts.read:,} prompts)."

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the table must not miss, a sentence each."""
        majority = describe_majority(self.rows, {one.group for one in self.answered})
        return tuple(
            filter(None, [self.limited(), describe_maximum(self.rows), *majority, self.unanswered(), self.endless()])
        )

    @property
    def not_ended(self) -> dict[str, int]:
        """By variant, how many answers did not end by themselves."""
        variants = self.answered[0].answers
        return {variant: sum(not one.ended.get(variant, True) for one in self.answered) for variant in variants}

    def endless(self) -> str:
        """How many answers did not end by themselves; empty if all did."""
        if not any(self.not_ended.values()):
            return ""
        counts = " and ".join(f"{count:,} ({variant})" for variant, count in self.not_ended.items())
        return (
            f"Of {len(self.answered):,} answers {counts} did not end by themselves: they were stopped at "
            f"{self.evaluator.max_new_tokens:,} tokens, or where the model's context ends."
        )

    def to_json(self) -> dict[str, Any]:
        """What `scores.json` holds."""
        return {
            "evaluator": self.evaluator.name,
            "metric": self.evaluator.metric,
            "questions": self.counts.read,
            "answered": self.counts.used,
            "limit": self.limit,
            "mean_with_unanswered_as_zero": self.mean_of_all,
            "answers_not_ended": self.not_ended,
            "bad": [dataclasses.asdict(bad) for bad in self.bad],
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
        }


def evaluate(
    assembly: Assembly,
    evaluator: Evaluator[Any],
    *,
    variants: Sequence[str] = (ADAPTER,),
    out: Path,
    hashes: Mapping[str, str],
    batch_size: int = 16,
    limit: int | None = None,
    strict: bool = False,
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Result:
    """Ask the evaluator's questions, and write `answers.jsonl` and `scores.json` into `out`.

    `variants` are among `base` and `adapter`; both are asked in one pass, over one copy of the weights. `hashes` holds the
    hashes of the checkpoint and of its base weights: answers of another model are never mixed in. `limit` takes the first
    so many whole questions only. A question that cannot be asked is counted, or with `strict` ends the evaluation. `progress` gets how
    many questions of how many are done, `say` whatever a person should know. Raises DataError. Collective: several
    processes share the questions, and the first one writes.
    """
    view = partial(in_view, processor=assembly.processor)
    records, bad = read_questions(evaluator, limit=limit, strict=strict, view=view)
    malformed = len(bad)
    file = AnswerFile(out / ANSWERS)
    if processes.is_first():
        file.begin(_header(assembly, evaluator, variants, hashes), resume=resume, say=say)
    header, lines = processes.all_gather_object((file.header, file.lines))[0]
    asked = {record.id: record for record in records}
    digest = partial(question_digest, hash_of=image_hash())
    done = predictions(evaluator, asked, lines, digest)
    if lines and processes.is_first():
        say(describe_reuse(file.path, asked, lines, done))
    todo = questions.contiguous_slice(by_image([record for record in records if record.id not in done]))
    progress(len(done), len(records))
    batch_result, ran = BatchResult(), len(file.runs)
    chunks = _ask_all(
        assembly,
        evaluator,
        todo,
        header["variants"],
        batch_size,
        batch_result.bad,
        strict,
        batch_result.messages.append,
    )
    while True:
        # A batch of every process at a time, so that an interruption costs no more than that.
        for answered, size in islice(chunks, 1):
            batch_result.lines = [line_of(one, digest(one.record)) for one in answered]
            batch_result.run = _describe_run(assembly, size)
        gathered = processes.all_gather_object(batch_result)
        for each in gathered:
            for sentence in each.messages:
                say(sentence)
            bad += each.bad
        lines = [line for each in gathered for line in each.lines]
        if not lines:
            break
        if processes.is_first():
            if len(file.runs) == ran:
                file.runs.append(next(each.run for each in gathered if each.run))
                file.append([{"run": file.runs[-1]}])
            file.append(lines)
        done.update(predictions(evaluator, asked, lines))
        progress(len(done) + len(bad) - malformed, len(records))
        batch_result.clear()
    RecordCounts(len(records) + malformed, len(done), len(bad))  # every question that was read is answered or named
    if not done:
        raise DataError(
            f"none of the {len(records)} questions of '{evaluator.name}' could be asked; the first: {bad[0].where}: {bad[0].why}"
        )
    kept = tuple(only(done[record.id], variants) for record in records if record.id in done)
    limited = limit if len({unit_key(record) for record in records}) == limit else None
    result = Result(evaluator, kept, tuple(bad), _provenance(header, variants, kept, file), limited)
    if processes.is_first():
        _write(result, out, say)
    return result


def _write(result: Result, out: Path, say: Callable[[str], None]) -> None:
    text = json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n"
    (out / "scores.json").write_text(text, encoding="utf-8")
    try:
        result.evaluator.write(result.answered, out)
    except GraftworkError as error:
        say(f"{result.evaluator.name}: {error.sentence}")


def _provenance(
    header: Mapping[str, Any], variants: Sequence[str], kept: Sequence[Prediction], file: AnswerFile
) -> dict[str, Any]:
    """Whose answers these are, how many tokens and seconds they took, and where they are."""
    return {
        **header,
        "variants": list(variants),
        "tokens": {variant: sum(one.tokens[variant] for one in kept) for variant in variants},
        "seconds": round(sum(one.seconds for one in kept), 3),
        "answers": {"file": file.path.name, "sha256": sha256(file.path)},
        "runs": file.runs,
    }


def _ask_all(
    assembly: Assembly,
    evaluator: Evaluator[Any],
    records: Sequence[Record],
    variants: Sequence[str],
    batch_size: int,
    bad: list[BadRecord],
    strict: bool,
    say: Callable[[str], None],
) -> Iterator[tuple[list[Prediction], int]]:
    """Answer records batch by batch, each with the batch size; images are read while the model answers."""
    import torch

    max_new_tokens, warned = evaluator.max_new_tokens, False

    def encode(record: Record) -> Prompt | BadRecord:
        try:
            return record, encode_prompt(assembly, record, max_new_tokens)
        except DataError as error:
            if strict:
                raise
            return BadRecord(record.place, error.sentence)

    size, waiting = batch_size, list[Prompt]()
    changes_image_features = assembly.changes_image_features
    with ThreadPoolExecutor(1, "encoder") as pool:
        stream = _ahead(pool, encode, records, batch_size)
        while True:
            while len(waiting) < size and (encoded := next(stream, None)) is not None:
                if isinstance(encoded, BadRecord):
                    bad.append(encoded)
                    continue
                waiting.append(encoded)
                if not warned and (left := room(assembly, encoded[1], max_new_tokens)) < max_new_tokens:
                    warned = True
                    say(
                        f"the model reads {context_of(assembly)} tokens, which leaves {left} of {max_new_tokens} for the answer to "
                        f"'{encoded[0].id}'; longer answers are cut there"
                    )
            if not waiting:
                return
            chunk = waiting[:size]
            try:
                answered = _ask(assembly, evaluator, chunk, variants, changes_image_features)
            except torch.OutOfMemoryError:
                answered = []
            if answered:
                yield answered, size
                del waiting[:size]
                continue
            if len(chunk) == 1:
                raise GraftworkError(
                    "the device's memory does not hold even one question at a time; use a lower precision or a larger device"
                )
            size = len(chunk) // 2
            torch.cuda.empty_cache()
            say(f"{len(chunk)} questions at a time do not fit into the device's memory; going on with {size}")


def _ahead(
    pool: Executor, work: Callable[[Record], Prompt | BadRecord], records: Iterable[Record], depth: int
) -> Iterator[Prompt | BadRecord]:
    """The results of `work` in order, `depth` of them prepared in advance."""
    futures: deque[Future[Prompt | BadRecord]] = deque()
    for record in records:
        futures.append(pool.submit(work, record))
        if len(futures) > depth:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _ask(
    assembly: Assembly,
    evaluator: Evaluator[Any],
    prompts: Sequence[Prompt],
    variants: Sequence[str],
    changes_image_features: bool,
) -> list[Prediction]:
    started = time.perf_counter()
    encoded = [prompt for _, prompt in prompts]
    features = None if changes_image_features else image_features(assembly, prompts)
    answers: dict[str, Answers] = {}
    for variant in variants:
        with assembly.disable_adapter() if variant == BASE else nullcontext():
            current = image_features(assembly, prompts) if changes_image_features else features
            answers[variant] = answer(assembly, encoded, max_new_tokens=evaluator.max_new_tokens, features=current)
    seconds = (time.perf_counter() - started) / len(prompts)
    return [
        Prediction(
            record,
            {variant: answers[variant].texts[row] for variant in variants},
            {variant: evaluator.score(record, answers[variant].texts[row]) for variant in variants},
            {variant: answers[variant].tokens[row] for variant in variants},
            seconds,
            {variant: answers[variant].ended[row] for variant in variants},
        )
        for row, (record, _) in enumerate(prompts)
    ]


def image_features(assembly: Assembly, prompts: Sequence[Prompt]) -> Sequence[Any] | None:
    """The features of the images of all prompts, an entry for each in order; prompts about the same images share one encoding."""
    distinct: dict[str, Prompt] = {}
    for record, prompt in prompts:
        distinct.setdefault(image_key(record), (record, prompt))
    encoded = [prompt for _, prompt in distinct.values()]
    pixels = batch_of(assembly.processor, encoded).to(assembly.device).pixels
    if not pixels:
        return None
    with answering(assembly):
        features = iter(assembly.model.encode_images(pixels))
    of = {key: [next(features) for _ in record.images] for key, (record, _) in distinct.items()}
    return [feature for record, _ in prompts for feature in of[image_key(record)]]


def _header(
    assembly: Assembly, evaluator: Evaluator[Any], variants: Sequence[str], hashes: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "evaluator": evaluator.name,
        "settings": dataclasses.asdict(evaluator.settings),
        "max_new_tokens": evaluator.max_new_tokens,
        "precision": assembly.precision,
        **hashes,
        "variants": list(variants),
    }


def _describe_run(assembly: Assembly, batch_size: int) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name(assembly.device) if assembly.device.type == "cuda" else assembly.device.type
    return {
        "batch_size": batch_size,
        "device": device,
        "torch": str(torch.__version__),
        "attention": assembly.kernel_usage(),
    }
