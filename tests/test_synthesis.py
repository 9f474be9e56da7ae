"""`graftwork data synthesize`, `show` and `card`: from images to verified records, and from a trained record back to its writer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from chat_server import Act, Body, ChatServer, asked, completion, failure
from click.testing import CliRunner
from PIL import Image as PILImage

from graftwork.cli import main
from graftwork.errors import DataError, GraftworkError, NothingLeft, PlanRefused, RunFileError, UnhealthyRun
from graftwork.jobs.data_card import data_card, write_data_card
from graftwork.jobs.data_check import check_data
from graftwork.jobs.data_sets import DataSet, process_data
from graftwork.jobs.history import record_history
from graftwork.jobs.messages import Message
from graftwork.jobs.run import Run
from graftwork.jobs.synthesis import synthesize_data
from graftwork.jobs.train import train
from graftwork_registry import Catalog

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "teal": (0, 128, 128)}
ASK = {"question": "what color is the shape?", "ask": "is there a {value} shape?", "values": [*COLOURS]}
TEMPLATES = {"use": "ask-templates", "templates": {"colour": ASK}}
VERIFY = {"use": "round-trip", "questions": {"colour": "is a {answer} shape present?"}}
MAKING = {"use": "answer-questions", "questions": {"colour": "what color is it?"}}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    """What is installed."""
    return Catalog.discover()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 30 images of easy-VQA, in a folder of their own."""
    folder = tmp_path_factory.mktemp("images")
    (easy,) = (find_spec("easy_vqa") or pytest.fail("easy-vqa")).submodule_search_locations or ()
    for number in range(30):
        shutil.copy(Path(easy) / "data" / "train" / "images" / f"{number}.png", folder)
    return folder


def demo_model() -> dict[str, Any]:
    """The table of the tiny MGM-Gemma, which knows yes and no about colours."""
    base = Path(__file__).parents[1] / "examples" / "demo-base" / "base"
    parts = {name: {"use": use, "config": str(base / name)} for name, use in PARTS.items()}
    return {"use": "mgm-gemma", "weights": str(base), "parts": parts}


PARTS = {"low": "clip", "high": "openclip-convnext"}


def tables(images: Path, *operators: dict[str, Any], **others: Any) -> dict[str, Any]:
    """The tables of a data file on a folder of images."""
    source = {"use": "images", "path": str(images), "license": "MIT"}
    return {"data": {"source": [source], "operator": list(operators)}, **others}


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory, catalog: Catalog) -> DataSet:
    """Colours of images by the tiny MGM-Gemma, verified by it in another phrasing."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFTWORK_CACHE", str(folder / "cache"))
        card = {"license": "mit", "not_for": ["Painting."]}
        given = tables(images, TEMPLATES, writer={"model": demo_model()}, verify=VERIFY, card=card)
        return synthesize_data(given, folder / "data", lookup=catalog)


def test_what_was_made_is_verified_and_all_of_it_is_accounted_for(made: DataSet) -> None:
    source, maker, verifier = made.stages
    assert (source["read"], maker["made"]) == (30, 30)
    assert maker["kept"] + maker["dropped"] == 60 and verifier["kept"] == made.records >= 15
    (group,) = made.manifest["verification"]["groups"]
    assert (group["group"], group["kept"], group["control_affirmed"]) == ("colour", made.records, 0)
    assert group["control"] >= 15 and not group["why"]
    assert made.manifest["verification"]["by_itself"] is True
    assert made.manifest["writer"]["replies"] == 30 * len(COLOURS) and made.manifest["writer"]["weights"]["model"]
    assert "replies.jsonl" in made.manifest["files"]
    DataSet.open(made.folder)


def first_id(made: DataSet) -> str:
    return str(json.loads((made.folder / "records.jsonl").read_text().splitlines()[0])["id"])


def test_a_record_leads_to_its_image_writer_prompts_replies_and_verification(made: DataSet, images: Path) -> None:
    id = first_id(made)
    found = record_history(made.folder, id)
    assert found["made_by"] == "ask-templates" and Path(found["images"][0]).samefile(images / id.split("/")[0])
    stages = [reply["stage"] for reply in found["replies"]]
    assert stages.count("ask-templates") == len(COLOURS) and stages.count("round-trip") >= 2
    answer = found["record"]["conversations"][-1]["value"]
    said = {reply["prompt"][-1][1]: reply["reply"]["text"] for reply in found["replies"]}
    assert said[f"<image>\nis there a {answer} shape?"] == said[f"<image>\nis a {answer} shape present?"] == "yes"
    assert set(found["writers"]) == {"writer", "verifier"} and found["verification"]["group"] == "colour"
    assert found["of"][0]["dropped"]["why"] == "its question has no answer"
    shown = CliRunner().invoke(main, ["data", "show", str(made.folder), id]).output
    assert "raw reply" in shown and "verified by round-trip, group 'colour'" in shown


def test_a_record_of_a_trained_checkpoint_leads_there_too(made: DataSet, tmp_path: Path, catalog: Catalog) -> None:
    run = Run(
        model=demo_model(),
        peft={"use": "lora", "on": ["language.mlp"]},
        data={"source": [{"use": "curated", "path": str(made.folder)}]},
        train={"steps": 2, "batch_size": 4, "precision": "fp32", "learning_rate": 1e-12},
        out=str(tmp_path / "out"),
    )
    with pytest.raises(UnhealthyRun):  # It cannot learn, so that nothing is verified and asked, which takes long.
        train(run, lookup=catalog)
    found = record_history(tmp_path / "out", first_id(made))
    assert found["data_set"] == str(made.folder) and found["replies"] and found["writers"]["writer"]["weights"]
    with pytest.raises(DataError, match="knows no record 'nobody'"):
        record_history(tmp_path / "out", "nobody")
    with pytest.raises(DataError, match="is neither a data set nor a checkpoint"):
        record_history(tmp_path, "1")


def test_the_card_says_what_it_is_and_overwrites_nothing(made: DataSet, tmp_path: Path) -> None:
    file = write_data_card(made.folder, tmp_path / "card.md")
    text = file.read_text()
    assert text.startswith('---\nlicense: "mit"\n') and "| colour |" in text
    for words in ("a model wrote", "Painting.", "it was searched for no test set", "is there a red shape?", "MIT"):
        assert words in text, words
    assert str(made.folder.parent.parent) not in text, "folders of this machine are nobody's business"
    assert data_card(made.folder).made_by == {"ask-templates": made.records}
    assert write_data_card(made.folder, file) == file
    file.write_text("Mine.")
    with pytest.raises(DataError, match="is there already, and says something else"):
        write_data_card(made.folder, file)
    assert file.read_text() == "Mine."


def test_a_processed_copy_leads_to_what_was_written_for_the_first_one(
    made: DataSet, tmp_path: Path, catalog: Catalog
) -> None:
    again = process_data(made.folder, tmp_path / "again", report=False, lookup=catalog)
    id = first_id(made)
    found = record_history(again.folder, id)
    assert found["data_set"] == str(again.folder) and len(found["replies"]) == len(
        record_history(made.folder, id)["replies"]
    )
    assert found["verification"]["group"] == "colour"
    assert found["of"][0]["dropped"]["why"] == "its question has no answer"
    card = data_card(again.folder)
    assert card.made_by == {"ask-templates": made.records} and card.written[0].writer and card.written[0].verification


def test_what_was_made_before_is_not_made_again(made: DataSet, images: Path, tmp_path: Path, catalog: Catalog) -> None:
    given = tables(images, TEMPLATES, writer={"model": demo_model()}, verify=VERIFY)
    given["data"]["source"].insert(0, {"use": "curated", "path": str(made.folder)})
    more = synthesize_data(given, tmp_path / "more", report=False, lookup=catalog)
    assert more.records == made.records and more.stages[2]["made"] == 30 - made.records


def test_asking_back_in_the_very_same_words_verifies_nothing(images: Path, tmp_path: Path, catalog: Catalog) -> None:
    same = {**VERIFY, "questions": {"colour": ASK["ask"].replace("{value}", "{answer}")}}
    given = tables(images, TEMPLATES, writer={"model": demo_model()}, verify=same)
    with pytest.raises(NothingLeft) as caught:
        synthesize_data(given, tmp_path / "out", limit=4, lookup=catalog)
    assert "in the very words in which it has answered, which verifies nothing" in str(caught.value)


def endpoint(server: ChatServer, **keys: Any) -> dict[str, Any]:
    return {"endpoint": {"url": server.url, "model": "small", "timeout": 20.0, "concurrency": 2, **keys}}


def looking(body: Body, attempt: int) -> Act:
    """A server that sees which of the colours an image is, by the first pixel."""
    from base64 import b64decode
    from io import BytesIO

    (url,) = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    pixel = PILImage.open(BytesIO(b64decode(url.split(",")[1]))).convert("RGB").getpixel((0, 0))
    (colour,) = [name for name, value in COLOURS.items() if value == pixel]
    if asked(body).strip().startswith("is a "):
        return completion("Yes." if f"a {colour} shape" in asked(body) else "No.")
    return completion(colour)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Thirty images of one colour each, all different."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for number in range(30):
        PILImage.new("RGB", (20 + number, 20), [*COLOURS.values()][number % 5]).save(folder / f"{number:02}.png")
    return folder


FILES = ("records.jsonl", "dropped.jsonl", "changed.jsonl", "replies.jsonl", "manifest.json")


def test_a_killed_command_is_resumed_to_the_same_bytes_and_pays_for_nothing_twice(plain: Path, tmp_path: Path) -> None:
    hold, holding = threading.Event(), threading.Event()

    def act(body: Body, attempt: int) -> Act:
        with server.lock:
            many = len(server.bodies) > 70 and not hold.is_set()
        if many:  # From here on nothing is answered, until the command was killed.
            holding.set()
            return Act(how="hang")
        return looking(body, attempt)

    with ChatServer(act) as server:
        lines = json.dumps(tables(plain, MAKING, writer=endpoint(server), verify=VERIFY))
        code = "import sys, json, graftwork; graftwork.synthesize_data(json.loads(sys.argv[1]), sys.argv[2], resume=len(sys.argv) > 3)"
        with subprocess.Popen([sys.executable, "-c", code, lines, str(tmp_path / "out")]) as process:
            assert holding.wait(60), process.poll()
            time.sleep(1)
            process.kill()
        answered = len(server.bodies) - 2
        hold.set()
        subprocess.run([sys.executable, "-c", code, lines, str(tmp_path / "out"), "resume"], check=True)
        bodies = [json.dumps(body) for body in server.bodies]
        assert not set(bodies[:70]) & set(bodies[answered:]), "what was answered was sent again"
        before = len(bodies)
        subprocess.run([sys.executable, "-c", code, lines, str(tmp_path / "whole")], check=True)
        assert len(server.bodies) == before
    assert [(tmp_path / "out" / name).read_bytes() for name in FILES] == [
        (tmp_path / "whole" / name).read_bytes() for name in FILES
    ]
    assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == 30


def test_what_it_cost_is_said(plain: Path, tmp_path: Path, catalog: Catalog) -> None:
    told: list[object] = []
    with ChatServer(looking) as server:
        given = tables(plain, MAKING, writer=endpoint(server, price=[2.0, 10.0]), verify=VERIFY)
        made = synthesize_data(given, tmp_path / "out", on_event=told.append, lookup=catalog)
    texts = [message.text for message in told if isinstance(message, Message)]
    assert "replies: 120, of which 0 were known and not asked for again" in texts
    assert (
        "endpoint: 120 requests, 0 sent again, 840 tokens read and 360 written; by its price that costs 0.0053" in texts
    )
    assert made.manifest["writer"]["tokens_read"] == 210 and made.records == 30


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("red", "no wrong answer could be asked about: all 30 that the writer affirmed say the same"),
        (
            "",
            "is given up, as 3 requests in a row failed (of the last: the writer answered with an empty text)",
        ),
    ],
)
def test_a_writer_that_always_says_the_same_or_nothing(
    answer: str, why: str, plain: Path, tmp_path: Path, catalog: Catalog
) -> None:
    def act(body: Body, attempt: int) -> Act:
        return completion("yes" if asked(body).strip().startswith("is a ") else answer)

    with ChatServer(act) as server:
        given = tables(plain, MAKING, writer=endpoint(server), verify=VERIFY)
        with pytest.raises(DataError) as caught:
            synthesize_data(given, tmp_path / "out", lookup=catalog)
    assert why in str(caught.value) and not (tmp_path / "out").exists()


def test_an_endpoint_that_fails_for_a_while_costs_no_answer_twice(
    plain: Path, tmp_path: Path, catalog: Catalog
) -> None:
    broken = [True]

    def act(body: Body, attempt: int) -> Act:
        with server.lock:
            return failure(500) if broken[0] and len(server.bodies) > 20 else looking(body, attempt)

    with ChatServer(act) as server:
        writer = endpoint(server, retries=0, give_up_after=4)
        given = tables(plain, MAKING, writer=writer, verify=VERIFY)
        with pytest.raises(DataError, match=r"is given up, as 4 requests in a row.*go on with --resume"):
            synthesize_data(given, tmp_path / "out", lookup=catalog)
        before, broken[0] = len(server.bodies), False
        made = synthesize_data(given, tmp_path / "out", resume=True, lookup=catalog)
        sent = [json.dumps(body) for body in server.bodies]
    assert made.records == 30 and not set(sent[:20]) & set(sent[before:])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"writer": None}, PlanRefused, "writer: is missing, and 'answer-questions' asks one; add the table [writer]"),
        ({"verify": None}, PlanRefused, "enters a data set unverified; add the table [verify]"),
        ({"verify": {"use": "sample"}}, PlanRefused, "verify.use: 'sample' is no operator that verifies"),
        ({"writer": {}}, RunFileError, "writer: names none of them; name one of checkpoint, model, endpoint"),
        (
            {"writer": {"checkpoint": "a", "endpoint": {"url": "http://x", "model": "y"}}},
            RunFileError,
            "writer: names checkpoint and endpoint; name one of",
        ),
        ({"writer": {"endpoint": {"url": "x", "model": "y"}}}, RunFileError, "'url' is 'x'; give an address such as"),
        ({"writer": {"endpoint": {"url": "http://x"}}}, RunFileError, "'model' is missing; name the model"),
        ({"writer": {"endpoint": {"url": "http://a:b@x", "model": "y"}}}, RunFileError, "'url' holds a password"),
        ({"writer": {"model": {"use": "mgm-gemma"}, "variant": "base"}}, RunFileError, "only a checkpoint has a base"),
        ({"writer": {"checkpoint": "nowhere"}}, GraftworkError, "there is no folder"),
        ({"operators": []}, PlanRefused, "add one, or set verify.given = true to verify what is given"),
        ({"operators": [{"use": "round-trip"}]}, PlanRefused, "'round-trip' verifies; name it in [verify]"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_asked(
    changes: dict[str, Any], error: type[GraftworkError], words: str, plain: Path, tmp_path: Path, catalog: Catalog
) -> None:
    unused = {"endpoint": {"url": "http://127.0.0.1:9", "model": "small"}}
    others = {"writer": unused, "verify": VERIFY, **changes}
    operators = others.pop("operators", [MAKING])
    given = tables(plain, *operators, **{name: value for name, value in others.items() if value is not None})
    with pytest.raises(error) as caught:
        synthesize_data(given, tmp_path / "out", lookup=catalog)
    assert words in str(caught.value) and not (tmp_path / "out").exists()


def test_makers_and_verifying_are_for_synthesis_alone(plain: Path, tmp_path: Path, catalog: Catalog) -> None:
    making = tables(plain, MAKING)
    for work in (
        lambda: process_data(making, tmp_path / "out", lookup=catalog),
        lambda: check_data(making, lookup=catalog),
    ):
        with pytest.raises(PlanRefused, match="cannot work") as caught:
            work()
        assert "'answer-questions' asks a writer; make a data set with graftwork data synthesize" in str(caught.value)
    with pytest.raises(PlanRefused) as caught:
        Run(model=demo_model(), data=making["data"]).plan(catalog)
    assert "'answer-questions' asks a writer" in str(caught.value)


def test_nothing_left_is_said_with_what_the_verifier_found(images: Path, tmp_path: Path, catalog: Catalog) -> None:
    template = {"question": "what shape is it?", "ask": "is there a {value}?", "values": ["circle", "triangle"]}
    making = {"use": "ask-templates", "templates": {"shape": template}}
    given = tables(images, making, writer={"model": demo_model()}, verify={"use": "round-trip"})
    with pytest.raises(NothingLeft, match="no record is left"):
        synthesize_data(given, tmp_path / "out", limit=3, lookup=catalog)
