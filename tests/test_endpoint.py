"""A server as a writer: what is sent to it, what is kept, and that nothing is asked twice."""

from __future__ import annotations

import base64
import random
import time
from dataclasses import MISSING, fields
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from chat_server import (
    HALF,
    HTML,
    Act,
    Body,
    ChatServer,
    ask,
    asked,
    completion,
    echo,
    failure,
    fault,
    prompt,
    source_of,
    writer_of,
)
from PIL import Image as PILImage

from graftwork.config.runfile import TableReader
from graftwork.config.tables import EndpointTable
from graftwork.config.writers import is_loopback, read_writer
from graftwork.contracts import Image, Record, Turn
from graftwork.data import load_image
from graftwork.errors import DataError
from graftwork.writers import attempts
from graftwork.writers.endpoint import EndpointSource
from graftwork.writers.replies import REPLIES, key_of, total_usage

pytest.importorskip("openai")
KEY = "GRAFTWORK_TEST_KEY"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attempts, "FIRST_WAIT", 0.01)


def test_images_arrive_byte_for_byte_where_they_stand(tmp_path: Path) -> None:
    files = []
    for number, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF")):
        files.append(tmp_path / f"{number}.any")
        PILImage.new("RGB", (8, 6), (40 * number, 200, 10)).save(files[-1], kind)
    archive = tmp_path / "archive"
    archive.write_bytes(b"before" + files[1].read_bytes() + b"after")
    images = [Image(files[0]), Image(data=files[2].read_bytes()), Image(files[3])]
    images.insert(1, Image(archive, span=(6, files[1].stat().st_size)))
    turns = (
        Turn("system", "Be brief."),
        Turn("user", "<image>\nWhat is this, beside <image>?"),
        Turn("assistant", "A green one."),
        Turn("user", "And these? <image><image>"),
    )
    with ChatServer() as server, source_of(server.url) as source:
        ask(source, Record("1", turns, tuple(images)))
        (body,) = server.bodies
    system, first, answer, second = body["messages"]
    assert (system, answer) == (
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "A green one."},
    )
    assert [part["type"] for part in first["content"]] == ["image_url", "text", "image_url", "text"]
    assert [part["text"] for part in first["content"][1::2]] == ["What is this, beside", "?"]
    assert [part["type"] for part in second["content"]] == ["text", "image_url", "image_url"]
    sent = [part["image_url"]["url"] for part in first["content"] + second["content"] if part["type"] == "image_url"]
    assert [url.partition(",")[0] for url in sent] == [
        f"data:image/{kind};base64" for kind in ("png", "jpeg", "webp", "gif")
    ]
    assert [base64.b64decode(url.partition(",")[2]) for url in sent] == [file.read_bytes() for file in files]


def unusual() -> dict[str, bytes]:
    """Images of which readers see different things."""
    grey = PILImage.new("RGB", (8, 6), (10, 20, 30))
    turned = grey.getexif()
    turned[0x0112] = 6
    deep = PILImage.new("I;16", (8, 6), 40_000)
    made: dict[str, tuple[PILImage.Image, str, dict[str, Any]]] = {
        "transparent": (PILImage.new("RGBA", (8, 6), (200, 0, 0, 40)), "PNG", {}),
        "16 bits": (deep, "PNG", {}),
        "CMYK": (PILImage.new("CMYK", (8, 6), (0, 200, 50, 10)), "JPEG", {}),
        "turned": (grey, "JPEG", {"exif": turned}),
        "animated": (grey, "GIF", {"save_all": True, "append_images": [PILImage.new("RGB", (8, 6), "red")]}),
        "BMP": (grey, "BMP", {}),
        "TIFF": (grey, "TIFF", {}),
    }
    encoded = {}
    for name, (image, kind, settings) in made.items():
        stream = BytesIO()
        image.save(stream, kind, **settings)
        encoded[name] = stream.getvalue()
    return encoded


@pytest.mark.parametrize("name", unusual())
def test_an_image_that_readers_see_differently_is_sent_as_training_sees_it(name: str) -> None:
    image = Image(data=unusual()[name])
    with ChatServer() as server, source_of(server.url) as source:
        ask(source, prompt("What?", image))
        url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    arrived = load_image(Image(data=base64.b64decode(url.partition(",")[2])))
    assert arrived.tobytes() == load_image(image).tobytes()


def test_an_image_that_is_broken_is_a_fault_of_its_record_alone(tmp_path: Path) -> None:
    gone = tmp_path / "gone.png"
    PILImage.new("RGB", (8, 6)).save(gone)
    with ChatServer() as server, source_of(server.url, give_up_after=1) as source:
        with pytest.raises(DataError, match="is not an image in one of the formats"):
            source.request(prompt("What?", Image(data=b"no image")), 20)
        with pytest.raises(DataError, match="2 '<image>' and 1 images; give it as many of both"):
            source.request(prompt("<image>What?", Image(gone)), 20)
        requests = [(each, source.request(each, 20)) for each in (prompt("What?", Image(gone)), prompt("Hello"))]
        gone.unlink()
        found = list[tuple[int, Any]]()
        source.ask(requests, found.extend)
        (_, broken), (_, good) = sorted(found, key=lambda each: each[0])
        assert broken == {"fault": f"the image '{gone}' does not exist"} and source.read(good).text == "re: Hello"
        assert len(server.bodies) == 1


def test_an_image_that_was_replaced_meanwhile_gets_no_reply_under_its_former_hash(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    PILImage.new("RGB", (8, 6), "red").save(file)
    with ChatServer() as server, source_of(server.url) as source, writer_of(source, tmp_path / "stage") as writer:
        source.request(prompt("Colour?", Image(file)), 20)
        PILImage.new("RGB", (8, 6), "blue").save(file)
        ((_, reply),) = writer.answer([prompt("Colour?", Image(file))], max_new_tokens=20)
        assert reply.fault == f"'{file}' was replaced while this command ran; run it again" and not server.bodies
    with ChatServer() as server, source_of(server.url) as source, writer_of(source, tmp_path / "again") as writer:
        ((_, reply),) = writer.answer([prompt("Colour?", Image(file))], max_new_tokens=20)
        assert reply.text == "re:  Colour?"


AMBIENT = {
    "OPENAI_API_KEY": "sk-ambient",
    "OPENAI_ADMIN_KEY": "sk-ambient-admin",
    "OPENAI_ORG_ID": "ambient-organization",
    "OPENAI_PROJECT_ID": "ambient-project",
    "OPENAI_BASE_URL": "http://127.0.0.1:9/ambient",
    "OPENAI_CUSTOM_HEADERS": "X-Secret: ambient\nAuthorization: Bearer ambient",
    **dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), "http://ambient:ambient@127.0.0.1:9"),
}


@pytest.mark.parametrize("key", ["", "sk-of-the-table"])
def test_no_key_is_sent_but_that_of_the_table(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**AMBIENT, KEY: key}.items():
        monkeypatch.setenv(name, value)
    with ChatServer() as server, source_of(server.url, key_from=KEY if key else None) as source:
        (raw,) = ask(source, prompt("Hello"))
        (headers,) = server.headers
        identity = source.identity
    assert headers.get("authorization") == (f"Bearer {key}" if key else None)
    assert "ambient" not in f"{headers}{server.bodies}".lower() and server.paths == ["/v1/chat/completions"]
    assert headers.keys() <= attempts.HEADERS | {"authorization"}
    assert not key or key not in f"{identity}{raw}{source.request(prompt('Hello'), 20)}"


def test_a_key_is_hidden_where_a_server_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sk-secret")
    said = list[str]()
    with pytest.raises(DataError) as caught:
        fault(failure(401, "no such key: sk-secret"), key_from=KEY, say=said.append)
    assert "answered 401 (no such key: [key])" in caught.value.sentence
    assert f"; check the key in the environment variable '{KEY}', which 'key_from' names" in caught.value.sentence
    for act in (
        failure(500, "sk-secret?"),
        Act(content=b'{"error": "sk-\\u0073ecret"}'),
        failure(500, " " * 195 + "sk-secret"),
    ):
        found = fault(act, key_from=KEY, say=said.append)
        assert "sk-s" not in f"{found}{said}" and "[key]" in found and said


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (None, "', which is not set; put the endpoint's key there"),
        (" ", "', which is not set; put the endpoint's key there"),
        ("a\nb", "' holds characters that no key has; set it anew"),
        ("schlüssel", "' holds characters that no key has; set it anew"),
    ],
)
def test_a_missing_key_is_said_before_anything_is_asked(
    key: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key is not None:
        monkeypatch.setenv(KEY, key)
    with pytest.raises(DataError, match=f"environment variable '{KEY}{why}$"):
        EndpointSource(EndpointTable("http://127.0.0.1:9/v1", "small", key_from=KEY), 0)


def test_a_missing_package_is_said_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"which is missing: pip install 'graftwork\[endpoint\]'$"):
        EndpointSource(EndpointTable("http://127.0.0.1:9/v1", "small"), 0)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://me:secret@host/v1", "'url' holds a password, which would be written down"),
        ("me:secret@host/v1", "'url' holds a password, which would be written down"),
        (
            "https://host/v1?api_key=secret",
            "'url' goes on with '?' or '#', which would be written down; leave that out",
        ),
        ("https://host/v1#secret", "'url' goes on with '?' or '#', which would be written down; leave that out"),
        ("http://[::1/v1", "'url' is 'http://[::1/v1'; give an address such as http://127.0.0.1:8000/v1"),
        ("http://host:99999/v1", "'url' is 'http://host:99999/v1'; give an address such as"),
        ("host/v1", "'url' is 'host/v1'; give an address such as"),
    ],
)
def test_an_address_that_is_none_or_holds_a_secret_is_said_without_it(url: str, why: str, tmp_path: Path) -> None:
    reader = TableReader(tmp_path)
    assert read_writer(reader, {"endpoint": {"url": url, "model": "small"}}, "writer", 0) is None
    (problem,) = reader.problems
    assert problem.startswith(f"writer.endpoint: {why}") and "secret" not in problem


@pytest.mark.parametrize(
    ("host", "found"),
    [
        *((host, True) for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.9.9.9:80", "[::1]:8000")),
        ("[::ffff:127.0.0.1]", True),
        *((host, False) for host in ("127.evil.com", "127.0.0.1.evil.com", "localhost.evil.com", "10.0.0.1", "[::2]")),
    ],
)
def test_which_endpoints_are_on_this_machine(host: str, found: bool) -> None:
    assert is_loopback(f"http://{host}/v1") == found


def test_what_a_request_holds() -> None:
    extra = {"guided_choice": ["yes", "no"]}
    with ChatServer() as server:
        with source_of(server.url, temperature=0.5, top_p=0.9, seed=7, extra=extra) as source:
            ask(source, prompt("Hello"))
        with source_of(server.url, limit_field="max_completion_tokens") as source:
            ask(source, prompt("Hello"))
    messages = [{"role": "user", "content": "Hello"}]
    assert server.bodies == [
        {
            "model": "small",
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 7,
            "max_tokens": 20,
            "messages": messages,
            **extra,
        },
        {"model": "small", "temperature": 0, "top_p": 1, "seed": 0, "max_completion_tokens": 20, "messages": messages},
    ]
    with pytest.raises(DataError, match="'extra' of an endpoint names 'stream', which is set without it"):
        EndpointSource(EndpointTable("http://127.0.0.1:9/v1", "small", extra={"stream": True}), 0)
    for name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(DataError, match=f"'extra' of an endpoint names '{name}', .*; name it in 'limit_field'$"):
            EndpointSource(EndpointTable("http://127.0.0.1:9/v1", "small", extra={name: 9}), 0)
    with pytest.raises(DataError, match=r"'extra' of an endpoint cannot be sent: .*; give it text, numbers and lists$"):
        EndpointSource(EndpointTable("http://127.0.0.1:9/v1", "small", extra={"since": date(2026, 1, 1)}), 0)


def test_another_model_seed_or_temperature_is_another_request() -> None:
    url, request = "http://127.0.0.1:9/v1", {"turns": []}
    others = [{}, {"model": "other"}, {"seed": 1}, {"temperature": 0.1}, {"top_p": 0.5}, {"extra": {"min_p": 1}}]
    others.append({"limit_field": "max_completion_tokens"})
    keys = set()
    for each in others:
        with source_of(url, **each) as source:
            keys.add(key_of(source, request))
    assert len(keys) == len(others)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_hundred_requests_of_which_a_fifth_fails(seed: int, tmp_path: Path) -> None:
    draws = random.Random(seed)
    transient = [failure(500), failure(429), HTML, Act(), Act(content=HALF), Act(how="close")]
    lasting = [failure(503), completion(None), completion("", "content_filter"), Act(content=b"{}"), completion(" ")]
    numbers = draws.sample(range(200), 40)
    plan = {f"Q{number}": draws.choice(transient if place % 2 else lasting) for place, number in enumerate(numbers)}
    answered: list[str] = []

    def act(body: Body, attempt: int) -> Act:
        name = asked(body)
        if name in plan and (plan[name] in lasting or attempt == 1):
            return plan[name]
        answered.append(name)
        time.sleep(0.001)
        return echo(body, attempt)

    prompts = [prompt(f"Q{number}", id=f"{number}") for number in range(200)]
    failing = {name for name, planned in plan.items() if planned in lasting}
    with ChatServer(act) as server, source_of(server.url, concurrency=8) as source:
        with writer_of(source, tmp_path / "first") as writer:
            found = list(writer.answer(prompts, max_new_tokens=20))
        assert [given.id for given, _ in found] == [f"{number}" for number in range(200)]
        for given, reply in found:
            name = given.question
            assert bool(reply.fault) == (name in failing) and reply.text == ("" if name in failing else f"re: {name}")
        assert sorted(answered) == sorted(name for name in map(asked_of, prompts) if name not in failing)
        assert 2 <= server.most_under_way <= 8
        assert source.spent().requests == 200 and source.spent().retries == len(server.bodies) - 200
        usage = total_usage(tmp_path / "first" / REPLIES)["writer"]
        assert (usage["replies"], usage["faults"]) == (200, len(failing))

        before = len(server.bodies)
        with writer_of(source, tmp_path / "again") as writer:
            again = list(writer.answer(prompts, max_new_tokens=20))
        assert [reply for _, reply in again] == [reply for _, reply in found]
        unanswered = {name for name in failing if plan[name].status == 503 or plan[name].content == b"{}"}
        assert {asked(body) for body in server.bodies[before:]} == unanswered


def asked_of(record: Record) -> str:
    return record.question


def test_a_second_time_nothing_is_asked_and_the_same_is_asked_once(tmp_path: Path) -> None:
    prompts = [prompt("one", id="1"), prompt("two", id="2"), prompt("one", id="3")] * 5
    with ChatServer() as server, source_of(server.url, concurrency=2) as source:
        with writer_of(source, tmp_path / "a") as writer:
            replies = [reply.text for _, reply in writer.answer(prompts, max_new_tokens=20)]
        assert replies == ["re: one", "re: two", "re: one"] * 5 and len(server.bodies) == 2
        first = (tmp_path / "a" / REPLIES).read_bytes()
        with source_of(server.url) as other, writer_of(other, tmp_path / "b") as writer:
            assert [reply.text for _, reply in writer.answer(prompts, max_new_tokens=20)] == replies
            assert other.spent().requests == 0
        assert len(server.bodies) == 2 and (tmp_path / "b" / REPLIES).read_bytes() == first


def test_the_documents_name_every_key_with_its_default() -> None:
    page = (Path(__file__).parent.parent / "docs" / "synthesis.md").read_text(encoding="utf-8")
    for field in fields(EndpointTable):
        default = field.default_factory() if field.default is MISSING else field.default
        shown = f" `{default}` " if default not in ("", None) else " "
        assert f"\n| `{field.name}` |{shown}|" in page, field.name
