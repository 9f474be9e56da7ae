"""Data sets on disk: written whole, resumed to the same bytes, refused when edited, and the same in every format."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
from click.testing import CliRunner
from PIL import Image as PILImage

from graftwork.cli import main
from graftwork.contracts import BadRecord, Record, RunContext
from graftwork.contracts.plan import Choice
from graftwork.data.curated import read_data_set
from graftwork.data.digest import digest_of
from graftwork.errors import DataError
from graftwork.jobs.data_sets import DataSet, export_data, import_data, process_data
from graftwork.jobs.history import record_history
from graftwork.weights import sha256
from graftwork_registry import Catalog

COLOURS = ("red", "green", "blue", "black", "white", "teal")
WRITTEN = ("records.jsonl", "dropped.jsonl", "changed.jsonl")


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    """What is installed."""
    return Catalog.discover()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two data files with the same ids, of which some records are broken, long, cut off or without an image, and a data.toml."""
    (tmp_path / "pics").mkdir()
    for number, colour in enumerate(COLOURS):
        PILImage.new("RGB", (30 + number, 20), colour).save(tmp_path / "pics" / f"{colour}.png")
    (tmp_path / "pics" / "broken.png").write_bytes((tmp_path / "pics" / "red.png").read_bytes()[:40])
    told = [talk(str(number), f"pics/{colour}.png", colour) for number, colour in enumerate(COLOURS)]
    told += [
        talk("6", "pics/broken.png", "red"),
        talk("7", "pics/none.png", "red"),
        talk("8", None, "one two three four five"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(told))
    lines = [
        json.dumps(talk(str(number), f"pics/{colour}.png", f"it is {colour}")) for number, colour in enumerate(COLOURS)
    ]
    (tmp_path / "more.jsonl").write_text("\n".join([*lines, '{"id": "cut']))
    text = [
        '[[data.source]]\nuse = "llava-json"\npath = "data.json"',
        '[[data.source]]\nuse = "llava-json"\npath = "more.jsonl"',
    ]
    text += ['[[data.operator]]\nuse = "drop-broken-images"', '[[data.operator]]\nuse = "limit-length"\nmax_words = 6']
    (tmp_path / "data.toml").write_text("\n".join(text))
    return tmp_path


def talk(id: str, image: str | None, answer: str) -> dict[str, Any]:
    """A record of LLaVA's format."""
    asked = {"from": "human", "value": "<image>\nwhat colour?" if image else "what colour?"}
    return {"id": id, **({"image": image} if image else {}), "conversations": [asked, {"from": "gpt", "value": answer}]}


def rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the manifest, which tells times, and the report."""
    told = ("manifest.json", "report.json", "report.md", "report.html")
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in told)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_every_record_is_kept_or_dropped_with_its_reason(folder: Path, catalog: Catalog) -> None:
    made = process_data(folder / "data.toml", folder / "out", lookup=catalog)
    kept, dropped = rows(made.folder / "records.jsonl"), rows(made.folder / "dropped.jsonl")
    read = sum(stage["read"] for stage in made.stages[:2])
    assert (read, len(kept), len(dropped), made.records) == (16, 12, 4, 12)
    assert all(stage["read"] + stage["made"] == stage["kept"] + stage["dropped"] for stage in made.stages)
    assert [each["id"] for each in kept] == [*"012345", *(f"{number}#2" for number in range(6))]
    assert kept[0]["image"] == "red.png" and kept[0]["graftwork"]["from"].endswith("data.json:1 (record 1)")
    assert [(each["id"], each["stage"]) for each in dropped] == [
        ("7", "llava-json"),
        ("", "llava-json"),
        ("6", "drop-broken-images"),
        ("8", "limit-length"),
    ]
    assert dropped[-1]["why"] == "7 words, more than 6" and dropped[-1]["stats"] == {"words": 7}
    assert made.manifest["image_folder"] == {"path": str(folder / "pics"), "relative": "../pics"}
    assert [*made.manifest["source_files"][0]] == [str(folder / "data.json")]
    assert contents(folder / "out").keys() == set(WRITTEN)
    report = json.loads((folder / "out" / "report.json").read_text())
    assert (report["before"]["records"], report["facts"]["records"]) == (14, 12)
    assert "| records | 14 | 12 |" in (folder / "out" / "report.md").read_text()
    assert not [*folder.glob(".*")]


def test_a_data_set_is_read_as_it_was_written_wherever_it_lies(folder: Path, catalog: Catalog) -> None:
    process_data(folder / "data.toml", folder / "out", lookup=catalog)
    for place in ("out", "elsewhere/out"):
        if place != "out":
            (folder / "elsewhere").mkdir()
            (folder / "out").rename(folder / place)
            (folder / "pics").rename(folder / "elsewhere" / "pics")
        again = [*read_data_set(folder / place)]
        assert len(again) == 12 and all(isinstance(each, Record) for each in again)
    (folder / "elsewhere" / "pics" / "red.png").unlink()
    bad = [each for each in read_data_set(folder / place) if isinstance(each, BadRecord)]
    assert [each.id for each in bad] == ["0", "0#2"]
    assert bad[0].why == f"there is no image '{folder / place / '../pics/red.png'}'; put it back"


@pytest.mark.parametrize("name", [*WRITTEN, "manifest.json"])
def test_a_data_set_that_was_edited_is_refused(folder: Path, catalog: Catalog, name: str) -> None:
    process_data(folder / "data.toml", folder / "out", lookup=catalog)
    with (folder / "out" / name).open("a") as file:
        file.write("x")
    with pytest.raises(
        DataError, match="was changed since the data set was written" if name in WRITTEN else "is damaged"
    ):
        next(read_data_set(folder / "out"))


def test_copied_images_come_along(folder: Path, catalog: Catalog) -> None:
    made = process_data(folder / "data.toml", folder / "out", copy=True, lookup=catalog)
    names = {each["image"] for each in rows(made.folder / "records.jsonl")}
    assert len(names) == 6 and all((made.folder / name).is_file() for name in names)
    shutil.rmtree(folder / "pics")
    assert all(isinstance(each, Record) for each in read_data_set(made.folder))
    llava = {"data": {"source": [{"use": "llava-json", "path": str(made.folder / "records.jsonl")}]}}
    assert process_data(llava, folder / "again", lookup=catalog).records == 12


def test_a_limit_reads_so_many_records(folder: Path, catalog: Catalog) -> None:
    made = process_data(folder / "data.toml", folder / "out", limit=10, lookup=catalog)
    assert [stage["read"] for stage in made.stages[:2]] == [9, 1]


def test_what_is_there_is_not_written_over(folder: Path, catalog: Catalog) -> None:
    process_data(folder / "data.toml", folder / "out", lookup=catalog)
    before = contents(folder / "out")
    with pytest.raises(DataError, match="is there already; name another folder, or remove it"):
        process_data(folder / "data.toml", folder / "out", lookup=catalog)
    assert contents(folder / "out") == before


# Interrupted ----------------------------------------------------------------------------------------------------------------


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit status, and what it printed."""
    output, errors = process.communicate()
    return process.returncode, output, errors


def started(folder: Path, *options: str, limit: int | None = None, plugin: str = "") -> subprocess.Popen[str]:
    """The command, in a process that writes no file larger than the limit in bytes."""

    def prepare() -> None:
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = [*(["--plugin", plugin] if plugin else []), "data", "process", "data.toml", "-o", "out", *options]
    command = [sys.executable, "-m", "graftwork", *words]
    return subprocess.Popen(
        command, cwd=folder, preexec_fn=prepare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


WAITING = """
import time
from pathlib import Path
from graftwork import hookimpl
from graftwork.contracts import DataOperator, NoSettings

class Waiting(DataOperator[NoSettings]):
    \"\"\"Waits, behind the first record, for a file\"\"\"
    name = "waiting"

    def apply(self, records, *, seed, writer=None):
        for number, record in enumerate(records):
            while number == 1 and not Path("go").exists():
                Path("waits").touch()
                time.sleep(0.01)
            yield record

@hookimpl
def data_operators():
    return [Waiting]
"""


def waiting(folder: Path, *options: str) -> subprocess.Popen[str]:
    """The command, behind its first record of the last stage."""
    (folder / "waits").unlink(missing_ok=True)
    process, deadline = started(folder, *options, plugin="waiting.py"), time.monotonic() + 60
    while not (folder / "waits").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_a_killed_command_is_resumed_to_the_same_bytes(folder: Path, catalog: Catalog) -> None:
    whole = process_data(folder / "data.toml", folder / "whole", lookup=catalog)
    (folder / "waiting.py").write_text(WAITING)
    stages, rest = (folder / "data.toml").read_text().split("[[data.operator]]", 1)
    (folder / "data.toml").write_text(f'{stages}[[data.operator]]{rest}\n[[data.operator]]\nuse = "waiting"')
    stopped = waiting(folder)
    stopped.send_signal(signal.SIGINT)
    code, output, errors = ended(stopped)
    assert code == 130 and "what was done is kept in" in " ".join((output + errors).split())
    process = waiting(folder, "--resume")
    (code, _, errors), done = ended(started(folder, plugin="waiting.py")), folder / ".out.unfinished" / "stages"
    assert code == 1 and "another process writes into" in errors
    process.kill()
    process.communicate()
    before = {
        stage.name: (stage / "stage.json").stat().st_mtime_ns
        for stage in done.iterdir()
        if (stage / "stage.json").exists()
    }
    assert [*sorted(before)] == ["1-drop-broken-images", "2-limit-length", "sources"]
    (folder / "go").touch()
    code, _, errors = ended(started(folder, plugin="waiting.py"))
    assert code == 1 and "go on with --resume, or remove that folder" in errors
    text, red = (folder / "data.toml").read_text(), folder / "pics" / "red.png"
    (folder / "data.toml").write_text(text.replace("max_words = 6", "max_words = 9"))
    code, _, errors = ended(started(folder, "--resume", plugin="waiting.py"))
    assert code == 1 and "was begun with other settings or other files" in errors
    (folder / "data.toml").write_text(text)
    state = red.stat()
    os.utime(red, (1, 1))
    code, _, errors = ended(started(folder, "--resume", plugin="waiting.py"))
    assert code == 1 and "images have changed since" in errors
    os.utime(red, ns=(state.st_atime_ns, state.st_mtime_ns))
    code, _, errors = ended(started(folder, "--resume", plugin="waiting.py"))
    assert code == 0, errors
    assert contents(folder / "out") == contents(whole.folder)
    assert not done.exists()


def test_a_full_disk_is_one_sentence_and_nothing_is_left(folder: Path, catalog: Catalog) -> None:
    code, output, errors = ended(started(folder, limit=200))
    assert code == 1, output
    assert "could not be written" in errors or "cannot be written" in errors
    assert errors.count("\n") == 1 and not (folder / "out").exists()
    assert process_data(folder / "data.toml", folder / "out", lookup=catalog).records == 12


def test_a_failure_leaves_nothing_that_refuses_the_next_try(folder: Path, catalog: Catalog) -> None:
    text = (folder / "data.toml").read_text()
    (folder / "data.toml").write_text(f"{text}\nmin_words = 50\n".replace("max_words = 6", ""))
    with pytest.raises(DataError, match="no record is left"):
        process_data(folder / "data.toml", folder / "out", lookup=catalog)
    (folder / "data.toml").write_text(text)
    assert process_data(folder / "data.toml", folder / "out", lookup=catalog).records == 12


# Other formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["llava", "messages", "data-juicer", "webdataset"])
def test_an_export_that_is_imported_is_the_same_data_set(folder: Path, catalog: Catalog, format: str) -> None:
    made = process_data(folder / "data.toml", folder / "out", copy=True, lookup=catalog)
    written = export_data(made.folder, folder / "exported", format=format, lookup=catalog)
    again = import_data(written, folder / "imported", format=format, copy=True, lookup=catalog)
    first, second = contents(made.folder), contents(again.folder)
    assert second["records.jsonl"] == first["records.jsonl"]
    images = {name for name in first if name.startswith("images/")}
    assert images == {name for name in second if name.startswith("images/")} != set()
    twice = export_data(again.folder, folder / "twice", format=format, lookup=catalog)
    assert contents(folder / "twice") == contents(folder / "exported") and twice.name == written.name


def test_formats_that_are_not_there_or_cannot_be_written_are_refused(folder: Path, catalog: Catalog) -> None:
    made = process_data(folder / "data.toml", folder / "out", lookup=catalog)
    with pytest.raises(DataError, match="there is no data source 'lava'; known: curated, "):
        export_data(made.folder, folder / "x", format="lava", lookup=catalog)
    with pytest.raises(DataError, match="'easy-vqa' can be read, not written; choose another format"):
        export_data(made.folder, folder / "x", format="easy-vqa", lookup=catalog)
    with pytest.raises(DataError, match="there is no file or folder"):
        import_data(folder / "none.jsonl", folder / "x", format="messages", lookup=catalog)
    assert not (folder / "x").exists() and not [*folder.glob(".*")]


# Asked ------------------------------------------------------------------------------------------------------------------------


def test_the_commands_show_what_became_of_a_record(folder: Path) -> None:
    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["data", *words], env={"COLUMNS": "80"})
        return result.exit_code, result.output

    assert run("process", str(folder / "data.toml"), "-o", str(folder / "out"))[0] == 0
    code, told = run("show", str(folder / "out"))
    assert code == 0 and "drop-broken-images" in told and "12 records" in told
    code, told = run("show", str(folder / "out"), "8")
    assert code == 0 and "8: dropped" in told and "dropped by limit-length: 7 words, more than 6" in told
    code, told = run("show", str(folder / "out"), "2", "--json")
    found = json.loads(told)
    assert (found["kept"], found["record"]["conversations"][1]["value"]) == (True, "blue")
    code, told = run("show", str(folder / "out"), "nope")
    assert code == 1 and "knows no record 'nope'" in told
    assert run("export", str(folder / "out"), "--to", "llava", "-o", str(folder / "ex"))[0] == 0
    code, told = run("import", str(folder / "ex" / "records.jsonl"), "--from", "llava", "-o", str(folder / "im"))
    assert code == 0 and "12 records" in told


def test_a_history_follows_what_a_record_was_made_from(folder: Path, catalog: Catalog) -> None:
    made = process_data(folder / "data.toml", folder / "out", lookup=catalog)
    lines = rows(made.folder / "records.jsonl")
    lines[1]["graftwork"] |= {"made_by": "describe", "of": ["0", "8"]}
    (made.folder / "records.jsonl").write_text(
        "".join(json.dumps(each, separators=(",", ":")) + "\n" for each in lines)
    )
    manifest = json.loads((made.folder / "manifest.json").read_text())
    manifest["files"]["records.jsonl"]["sha256"] = (
        __import__("hashlib").sha256((made.folder / "records.jsonl").read_bytes()).hexdigest()
    )
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    found = record_history(made.folder, "1")
    assert (found["made_by"], [each["id"] for each in found["of"]]) == ("describe", ["0", "8"])
    assert [each["kept"] for each in found["of"]] == [True, False]


def test_a_run_records_the_data_set_that_it_read(folder: Path, catalog: Catalog) -> None:
    process_data(folder / "data.toml", folder / "out", lookup=catalog)
    choice = Choice("data_source", "curated", "p", "d", "0", {"path": str(folder / "out")})
    empty = numpy.zeros((0, 5), dtype=numpy.int64)
    digest = digest_of(
        [], empty, empty[:, 0], RunContext(sources=[choice]), by_content=True, sources=empty[:, 0], validation=empty
    )
    assert digest.files["data.source.0.path"]["sha256"] == sha256(folder / "out" / "manifest.json")


@pytest.mark.parametrize(
    "content", ["[]", "null", "{}", '{"format": 1, "files": {}}', '{"format": 1, "files": []', "x"]
)
def test_a_manifest_that_is_none_is_said_to_be_damaged(folder: Path, catalog: Catalog, content: str) -> None:
    made = process_data(folder / "data.toml", folder / "out", report=False, lookup=catalog)
    (made.folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json' is damaged; write the data set again$"):
        DataSet.open(made.folder)
    (made.folder / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match="is a data set of format 2, and this Graftwork reads 1; upgrade it"):
        DataSet.open(made.folder)


def test_a_copied_image_that_was_changed_costs_its_records(folder: Path, catalog: Catalog) -> None:
    made = process_data(folder / "data.toml", folder / "out", copy=True, report=False, lookup=catalog)
    (first, *_) = rows(made.folder / "records.jsonl")
    (made.folder / first["image"]).write_bytes((folder / "pics" / "teal.png").read_bytes())
    bad = [each for each in read_data_set(made.folder) if isinstance(each, BadRecord)]
    assert [each.id for each in bad] == ["0", "0#2"]
    assert "was changed since the data set was written" in bad[0].why


@pytest.mark.parametrize("out", ["data.toml", "nowhere-to", "/proc/x"])
def test_what_a_path_has_against_a_command_is_one_sentence(folder: Path, out: str) -> None:
    (folder / "nowhere-to").symlink_to("/nonexistent/x")
    for words in (["check", "data.json"], ["process", "data.toml"]):
        result = subprocess.run(
            [sys.executable, "-m", "graftwork", "data", *words, "-o", out], cwd=folder, capture_output=True, text=True
        )
        assert result.returncode == 1, result.stderr
        assert result.stderr.count("Error: ") == 1 and "Traceback" not in result.stderr
