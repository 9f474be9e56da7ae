"""What every model's processor must do: count, label, decode, and come back from its own files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from graftwork.conformance.model import PICKLES, built
from graftwork.conformance.outcome import Check, Subject
from graftwork.conformance.specimens import records
from graftwork.contracts.batch import IGNORED, Encoded
from graftwork.contracts.model import Processor
from graftwork.contracts.records import Image, Record, Turn
from graftwork.data.measuring import lengths_of
from graftwork.errors import DataError


def processor_of(subject: Subject) -> Processor:
    """The processor of the built model."""
    return built(subject).assembly.processor


def differing(first: Encoded, second: Encoded) -> str:
    """What two encoded records differ in; empty when they are equal."""
    for name in ("input_ids", "image_token_mask", "labels"):
        if list(getattr(first, name)) != list(getattr(second, name)):
            return name
    if {name: list(field) for name, field in first.token_fields.items()} != {
        name: list(field) for name, field in second.token_fields.items()
    }:
        return "token_fields"
    same = first.pixels.keys() == second.pixels.keys()
    return "" if same and all(first.pixels[part].equal(second.pixels[part]) for part in first.pixels) else "pixels"


def tokens_labels_and_length_agree(subject: Subject) -> Iterator[str]:
    """One label and one image position for each token, `length` of them, and every id within the vocabulary."""
    processor = processor_of(subject)
    for record in records():
        encoded = processor.encode(record)
        counts = {name: len(getattr(encoded, name)) for name in ("input_ids", "image_token_mask", "labels")}
        counts |= {name: len(field) for name, field in encoded.token_fields.items()}
        counts["length"], counts["lengths"] = processor.length(record), _only(lengths_of(processor, [record]))
        if len(set(counts.values())) != 1:
            yield f"everything about a record must count its tokens, and for '{record.id}' there are {counts}; make them agree"
            return
        for token, label, place in zip(encoded.input_ids, encoded.labels, encoded.image_token_mask, strict=True):
            if not 0 <= token < processor.vocabulary:
                yield f"token ids must be below the vocabulary, {processor.vocabulary}, and '{record.id}' has {token}; fix 'encode'"
            if label not in (IGNORED, token):
                yield f"a label must be its own token or IGNORED, and '{record.id}' has {label} at {token}; labels are not shifted"
            if place and token != processor.pad_id:
                yield f"image positions must hold the padding id, {processor.pad_id}, and '{record.id}' has {token} at one; use pad_id"
        if any(encoded.image_token_mask) != bool(record.images) or bool(encoded.pixels) != bool(record.images):
            yield f"pixels and image positions must come with images, and for '{record.id}' they do not; fix 'encode'"


def _only(found: Sequence[Any]) -> Any:
    """The one item there should be."""
    return found[0] if len(found) == 1 else len(found)


def what_is_not_trained_has_no_label(subject: Subject) -> Iterator[str]:
    """An answer whose turn says `trained=False`; the other answers keep their labels, and the tokens stay."""
    processor = processor_of(subject)
    for record in records():
        answers = [place for place, turn in enumerate(record.turns) if turn.role == "assistant"]
        whole = processor.encode(record)
        alone = [processor.encode(replace(record, turns=_training_only(record, place))) for place in answers]
        for encoded in alone:
            if list(encoded.input_ids) != list(whole.input_ids):
                yield f"which answers are trained must not change the tokens, and for '{record.id}' it does; change labels only"
        labels = [{at for at, label in enumerate(each.labels) if label != IGNORED} for each in alone]
        if sum(map(len, labels)) != whole.num_label_tokens or set().union(*labels) != {
            at for at, label in enumerate(whole.labels) if label != IGNORED
        }:
            yield (
                f"each label must belong to one answer, and have none where its turn has trained=False; in '{record.id}' that "
                "is not so; label a turn only where 'trained' is not False"
            )


def _training_only(record: Record, place: int) -> tuple[Turn, ...]:
    return tuple(replace(turn, trained=number == place) for number, turn in enumerate(record.turns))


def pixels_are_what_the_parts_take(subject: Subject) -> Iterator[str]:
    """For each part `[images, 3, height, width]` in the size of its tower, or in 8 bits whole tiles of it, of which the model makes what
    the parts take; of a model without parts whatever it takes. Finite, and the same each time."""
    assembly = built(subject).assembly
    for record in records():
        encoded, again = assembly.processor.encode(record), assembly.processor.encode(record)
        if what := differing(encoded, again):
            yield f"a record must be encoded the same each time, and '{record.id}' differs in its {what}; draw nothing in 'encode'"
        for part, pixels in encoded.pixels.items():
            if not assembly.outputs and pixels.isfinite().all():
                continue
            if not assembly.outputs:
                yield f"pixels must be finite, and '{part}' is not; fix 'encode'"
                return
            if part not in assembly.outputs:
                yield f"pixels must be for the parts of the model, and '{part}' is none; use the names of 'parts'"
                return
            side = assembly.outputs[part].pixels.size
            if str(pixels.dtype) == "torch.uint8":
                side = max(1, pixels.shape[-1] // side) * side
            if tuple(pixels.shape[1:]) != (3, side, side) or not pixels.isfinite().all():
                yield f"pixels for '{part}' must be finite and [images, 3, {side}, {side}], and they are {tuple(pixels.shape)}; fix 'encode'"


def answers_are_labelled_and_nothing_else(subject: Subject) -> Iterator[str]:
    """The labels are the answers with a stop id after each; a prompt and an image have none."""
    processor = processor_of(subject)
    for record in records():
        encoded = processor.encode(record)
        answers: list[list[int]] = [[]]
        for label in map(int, encoded.labels):
            if label != IGNORED:
                answers[-1].append(label)
            elif answers[-1]:
                answers.append([])
        found = [answer for answer in answers if answer]
        expected = [turn.text for turn in record.turns if turn.role == "assistant"]
        decoded = [processor.decode([id for id in answer if id not in processor.stop_ids]) for answer in found]
        if decoded != expected:
            yield f"the labels must be the answers, {expected}, and those of '{record.id}' say {decoded}; label every assistant turn alone"
        elif not all(processor.stop_ids & set(answer) for answer in found):
            yield f"after an answer a stop id must be labelled, and in '{record.id}' none is; without one the model never ends"
        if any(label != IGNORED for label in processor.encode(record.without_answer()).labels):
            yield f"a prompt must have no labels, and that of '{record.id}' has some; label nothing where the user's turn is last"


def a_system_turn_is_used_or_refused(subject: Subject) -> Iterator[str]:
    """It changes the tokens and no label, or it is a DataError."""
    processor, record = processor_of(subject), records()[0]
    try:
        encoded = processor.encode(replace(record, turns=(Turn("system", "Be brief."), *record.turns)))
    except DataError:
        return
    plain = processor.encode(record)
    if [label for label in encoded.labels if label != IGNORED] != [label for label in plain.labels if label != IGNORED]:
        yield "a system turn must have no labels, and with one others are labelled; label every assistant turn alone"
    if list(encoded.input_ids) == list(plain.input_ids):
        yield "a system turn must not be lost, and with one the tokens are the same; use it, or raise DataError"


def a_prompt_is_how_training_begins(subject: Subject) -> Iterator[str]:
    """The tokens of a prompt are the first tokens of the same record with its answer, and there the labels begin."""
    processor = processor_of(subject)
    for record in records():
        whole, prompt = processor.encode(record), processor.encode(record.without_answer())
        n = len(prompt.input_ids)
        if list(whole.input_ids[:n]) != list(prompt.input_ids):
            yield f"a prompt must be the beginning of what is trained, and for '{record.id}' it is not; end it where the answer begins"
        elif n >= len(whole.labels) or whole.labels[n] == IGNORED:
            yield f"labels must begin where the prompt ends, and in '{record.id}' they do not at token {n}; move one of them"


def decoding_gives_the_text_alone(subject: Subject) -> Iterator[str]:
    """Without special tokens and surrounding space; nothing for no tokens."""
    processor = processor_of(subject)
    if (text := processor.decode([])) != "":
        yield f"no tokens must decode to no text, and they decode to {text!r}; fix 'decode'"
    labels = [label for label in map(int, processor.encode(records()[0]).labels) if label != IGNORED]
    answer = labels[: next((at for at, id in enumerate(labels) if id in processor.stop_ids), len(labels))]
    if processor.decode(answer) != "red":
        yield f"an answer must decode to its text, and 'red' becomes {processor.decode(answer)!r}; undo in 'decode' what 'encode' does"


def what_cannot_be_read_is_a_data_error(subject: Subject) -> Iterator[str]:
    """A file that is no image, and a text that has no place for its image."""
    processor, record = processor_of(subject), records()[0]
    broken = {
        "an image that is none": replace(record, images=(Image(data=b"no image"),)),
        "an image without '<image>'": replace(records()[1], images=record.images),
    }
    for what, each in broken.items():
        try:
            processor.encode(each)
        except DataError:
            continue
        yield f"'encode' must raise DataError for {what}, and it encodes it; say what is wrong with the record"


def it_comes_back_from_its_files(subject: Subject) -> Iterator[str]:
    """What `save` wrote makes an equal processor, and holds no pickle."""
    assembly = built(subject).assembly
    folder = subject.scratch / "processor"
    folder.mkdir()
    assembly.processor.save(folder)
    if pickled := [file.name for file in folder.rglob("*") if file.suffix in PICKLES]:
        yield f"'save' must write no pickle, and it wrote '{pickled[0]}'; use JSON"
    again = assembly.architecture.processor(assembly.plan.model_spec.model.config or {}, folder, assembly.outputs)
    for name in ("pad_id", "stop_ids", "vocabulary"):
        if getattr(again, name) != getattr(assembly.processor, name):
            yield f"a saved processor must come back the same, and its {name} differs; save all that it needs"
    for record in records():
        if what := differing(assembly.processor.encode(record), again.encode(record)):
            yield f"a saved processor must come back the same, and '{record.id}' differs in its {what}; save all that it needs"


CHECKS: tuple[Check, ...] = (
    tokens_labels_and_length_agree,
    what_is_not_trained_has_no_label,
    pixels_are_what_the_parts_take,
    answers_are_labelled_and_nothing_else,
    a_system_turn_is_used_or_refused,
    a_prompt_is_how_training_begins,
    decoding_gives_the_text_alone,
    what_cannot_be_read_is_a_data_error,
    it_comes_back_from_its_files,
)
