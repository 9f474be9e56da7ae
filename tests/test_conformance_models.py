"""The conformance kit on models: each broken promise is told in a sentence of its own, and what `new` writes passes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import broken_models as models
import pytest

from graftwork.conformance import CHECKS, examine
from graftwork.contracts import KINDS, ImportPlan
from graftwork.jobs.scaffold import render
from graftwork_registry import Catalog

LINES = '{"question": "Is it?", "answer": "yes"}\n{"question": "Is it not?", "answer": "no"}\n'
SETTINGS = {"data_source": {"path": "lines.jsonl"}, "evaluator": {"path": "lines.jsonl"}}

BROKEN = {
    "a claim on every folder": (
        models.importing(ImportPlan("a model", lambda base: {})),
        "an unknown folder is left alone",
        "'import_from' must return None for a folder",
    ),
    "a role less": (
        models.roles(lambda roles: {k: v for k, v in roles.items() if k != "language.head"}),
        "every parameter has one role",
        "'head.weight' is in no role",
    ),
    "a role twice": (
        models.roles(lambda roles: {**roles, "connector": ("connector", "head")}),
        "every parameter has one role",
        "'head.weight' is in 'connector' and 'language.head'",
    ),
    "an undeclared role": (
        models.roles(lambda roles: {**roles, "adapter": ("head",)}),
        "every parameter has one role",
        "'adapter' is not in 'roles'",
    ),
    "a site without modules": (models.HidesASite, "blocks and sites exist", "'language' has no modules"),
    "a site without attention": (models.InventsASite, "attention is where the sites say", "and nothing did"),
    "no optional part": (models.NeedsWhatItCallsOptional, "optional parts may be empty", "there is no 'connector'"),
    "values on meta": (models.ReadsWhileBuilding, "its shape is known without weights", "'connector.bias' has values"),
    "a score less": (
        models.computing(models.flat, "logits"),
        "hidden states and logits have their shapes",
        r"must be \(258,\) as the processor's vocabulary, and they are \(257,\)",
    ),
    "padding": (
        models.computing(models.ignores_padding),
        "padding and neighbours change nothing",
        "padding on the left and other rows must change nothing",
    ),
    "no cache": (models.computing(models.forgets_the_cache), "a cache changes nothing", "use the cached keys"),
    "no features": (models.computing(models.ignores_features), "features can be kept", "must stand for the pixels"),
    "places first": (
        models.computing(models.puts_images_last, "encode_images"),
        "features can be kept",
        "an entry for each image, and for 2 it returns 16",
    ),
    "the features of another image": (
        models.computing(models.shifts_features, "encode_images"),
        "features can be kept",
        "must be of its own image",
    ),
    "another encoder": (
        models.built_with(lambda structure: replace(structure, image_encoder=("connector",))),
        "images are encoded where the structure says",
        "name all that it runs",
    ),
    "blind": (models.computing(models.sees_nothing), "images are seen", "at its first token nothing changes"),
    "half a model": (models.WritesHalf, "what is written reads back", "the weights lack"),
    "rounded": (models.WritesRounded, "what is written reads back", "the logits are .* away"),
    "another setting": (models.ForgetsASetting, "what is written reads back", "must have the same configuration"),
    "a length": (
        models.processing(length=lambda processor, record: 1),
        "tokens labels and length agree",
        "'length': 1",
    ),
    "small pixels": (
        models.processing(encode=models.shrinks_pixels),
        "pixels are what the parts take",
        r"\[images, 3, 32, 32\], and they are \(1, 3, 16, 16\)",
    ),
    "too many labels": (
        models.processing(encode=models.labels_everything),
        "answers are labelled and nothing else",
        "label every assistant turn alone",
    ),
    "labels on what is not trained": (
        models.processing(encode=models.labels_what_is_not_trained),
        "what is not trained has no label",
        "label a turn only where 'trained' is not False",
    ),
    "no stop": (
        models.processing(encode=models.labels_no_stop),
        "answers are labelled and nothing else",
        "without one the model never ends",
    ),
    "a labelled system turn": (
        models.processing(encode=models.labels_the_system),
        "a system turn is used or refused",
        "a system turn must have no labels",
    ),
    "a lost system turn": (
        models.processing(encode=models.forgets_the_system),
        "a system turn is used or refused",
        "a system turn must not be lost",
    ),
    "another prompt": (
        models.processing(encode=models.prompts_otherwise),
        "a prompt is how training begins",
        "must be the beginning of what is trained",
    ),
    "another text": (
        models.processing(decode=lambda processor, ids: processor.decode(ids).upper()),
        "decoding gives the text alone",
        "'red' becomes 'RED'",
    ),
    "an image that is none": (
        models.processing(encode=models.swallows_broken_images),
        "what cannot be read is a data error",
        "must raise DataError for an image that is none",
    ),
    "a pickle": (
        models.processing(save=lambda processor, folder: (folder / "tokenizer.pkl").write_bytes(b"")),
        "it comes back from its files",
        "wrote 'tokenizer.pkl'; use JSON",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_told(name: str) -> None:
    component, check, sentence = BROKEN[name]
    outcome = {outcome.check: outcome for outcome in examine(component)}[check]
    assert outcome.state == "failed", outcome
    assert re.search(sentence, outcome.sentence), outcome.sentence


def test_a_model_without_parts_is_judged_in_full() -> None:
    outcomes = {outcome.check: outcome for outcome in examine(models.WithoutParts)}
    assert not [outcome for outcome in outcomes.values() if outcome.state == "failed"]
    skipped = {check for check, outcome in outcomes.items() if outcome.state == "skipped"}
    assert skipped == {"optional parts may be empty", "attention is where the sites say"}
    blind = {outcome.check: outcome for outcome in examine(models.WithoutPartsAndBlind)}["images are seen"]
    assert blind.state == "failed" and "at its first token nothing changes" in blind.sentence


def test_every_check_of_models_catches_something() -> None:
    caught = {check for _, check, _ in BROKEN.values()}
    assert not {check.__name__.replace("_", " ") for check in CHECKS["model"]} - caught


@pytest.mark.parametrize("kind", KINDS)
def test_what_new_writes_passes_and_nothing_is_skipped_without_need(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lines.jsonl").write_text(LINES)
    file, text = next(iter(render(kind, "acme").items()))
    Path(file).write_text(text)
    catalog = Catalog.discover(files=[tmp_path / file], disable=["*"])
    for row in catalog.components():
        outcomes: Any = list(examine(row.component, settings=SETTINGS.get(row.kind), unmet_requirement=row.reason))
        assert not [outcome for outcome in outcomes if outcome.state == "failed"]
        skipped = {outcome.sentence for outcome in outcomes if outcome.state == "skipped"}
        assert skipped <= {
            "it says that it computes no attention",
            "it says that it computes no attention, or all of it by itself",
            "it says that it makes nothing",
            "it says that it verifies nothing",
            "it needs all of its parts",
            "it says that it has no dropout",
            "it says that it can be read, not written",
            "it says that it asks for no evaluator",
        }
