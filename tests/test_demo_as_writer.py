"""The tiny MGM-Gemma as a writer, which knows yes and no about colours and not about shapes: what makers make and verification keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_writer import ASK_BACK, COLOURS, demo_writer, labels, spoiled, unlabelled

from graftwork.contracts import Lookup, Record
from graftwork_makers import AskTemplates
from graftwork_makers.templates import AskTemplatesSettings, Template
from graftwork_registry import Catalog
from graftwork_round_trip import RoundTrip
from graftwork_round_trip.settings import RoundTripSettings


@pytest.fixture(scope="module")
def lookup() -> Lookup:
    """What is installed."""
    return Catalog.discover()


def test_the_demos_base_labels_colours_right(tmp_path: Path, lookup: Lookup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    known = {record.images[0]: record.turns[-1].text for record in labels(24) if record.group == "colour"}
    template = Template("what color is the shape?", "is there a {value} shape?", COLOURS)
    with demo_writer(tmp_path, lookup) as writer:
        given = unlabelled(labels(24))
        items = list(
            AskTemplates(AskTemplatesSettings(templates={"colour": template})).apply(given, seed=0, writer=writer)
        )
    found = {item.images[0]: item.turns[-1].text for item in items if isinstance(item, Record) and item.meta}
    assert len(known) > 15
    assert [image for image, colour in known.items() if found.get(image) != colour] == []


def test_the_demos_base_vouches_for_colours_and_not_for_shapes(
    tmp_path: Path, lookup: Lookup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    given, still_right = spoiled(labels(60), 0.3)
    used = RoundTrip(RoundTripSettings(questions=ASK_BACK))
    with demo_writer(tmp_path, lookup) as writer:
        items = list(used.apply(given, seed=5, writer=writer))
    found = {each.group: each for each in used.verdicts()}
    kept = {item.id for item in items if isinstance(item, Record)}
    colours = {record.id for record in given if record.group == "colour" and record.id in still_right}
    good = colours & kept
    assert len(good) >= 0.98 * len(kept) and len(good) >= 0.9 * len(colours) > 20
    assert found["colour"].control_affirmed <= 0.02 * found["colour"].control
    assert (found["shape"].kept, found["shape"].why) == (
        0,
        f"the writer affirmed none of {found['shape'].records} answers, so nothing shows that it can tell",
    )
