"""The hub: what is read is fetched, nothing else, at the revision that was named, and every refusal says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN, Hub
from safetensors.torch import save

from graftwork import hub, weights
from graftwork.errors import WeightsError

SAFE = save({"a": torch.ones(2)})
OTHER = save({"b": torch.zeros(3)})
CONFIG = b'{"model_type": "tiny"}'


@pytest.fixture
def located(tmp_path: Path) -> Callable[..., Path]:
    """The folder that a hub id names."""
    return lambda given, **options: hub.locate(given, tmp_path, where="model.weights", **options)


@pytest.fixture
def refusal(tmp_path: Path, located: Callable[..., Path]) -> Callable[..., str]:
    """The one sentence that a hub id is refused with, after the path that was tried."""

    def refused(given: str, **options: bool) -> str:
        with pytest.raises(WeightsError) as caught:
            located(given, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"model.weights: there is no folder '{tmp_path / given}', and ")

    return refused


def pickled(tmp_path: Path, **tensors: torch.Tensor) -> bytes:
    torch.save(tensors, tmp_path / "pickled")
    return (tmp_path / "pickled").read_bytes()


def index(**names: str) -> bytes:
    return json.dumps({"weight_map": names}).encode()


# Paths and ids --------------------------------------------------------------------------------------------------------


def test_a_path_is_relative_to_the_folder_of_who_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.locate("base", tmp_path / "here", where="model.weights") == tmp_path / "here" / "base"
    assert hub.locate(str(tmp_path / "here"), tmp_path, where="model.weights") == tmp_path / "here"


@pytest.mark.parametrize("name", ["owner/name", "owner/name@v1"])
def test_a_folder_wins_over_a_hub_id_of_the_same_name(tmp_path: Path, located: Callable[..., Path], name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    assert located(name) == tmp_path / name


@pytest.mark.parametrize(
    "given", ["model_zoo/gemma/2b", "bsae", "owner/name@", "owner/name@a b", "@v1", "owner/name@../.."]
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_without_asking_the_hub(
    hub_server: Hub, refusal: Callable[..., str], given: str
) -> None:
    assert refusal(given) == f"'{given}' is no hub id (owner/name or owner/name@revision); correct the path"
    assert not hub_server.calls


def test_a_file_where_a_folder_is_wanted_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    assert "'model.bin' is a file" in refusal("model.bin")


# What is fetched ------------------------------------------------------------------------------------------------------

COPIES = {
    "README.md": b"",
    "tf_model.h5": b"",
    "flax_model.msgpack": b"",
    "model.onnx": b"",
    "gemma.gguf": b"",
    "original/consolidated.00.pth": b"",
    "original/params.json": b"{}",
    "onnx/config.json": b"{}",
    "modeling_own.py": b"raise SystemExit",
}
TOKENIZER = {name: name.encode() for name in ("tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja")}


@pytest.mark.parametrize(
    ("files", "read"),
    [
        (
            {
                "model.safetensors": SAFE,
                "pytorch_model.bin": b"",
                "pytorch_model.bin.index.json": index(a="x.bin"),
                "x.bin": b"",
            },
            ["model.safetensors"],
        ),
        (
            {
                "model.safetensors.index.json": index(a="1.safetensors", b="2.safetensors"),
                "1.safetensors": SAFE,
                "2.safetensors": OTHER,
                "consolidated.safetensors": SAFE,
                "pytorch_model.bin": b"",
            },
            ["1.safetensors", "2.safetensors", "model.safetensors.index.json"],
        ),
        ({"open_clip_model.safetensors": SAFE, "open_clip_pytorch_model.bin": b""}, ["open_clip_model.safetensors"]),
    ],
    ids=["safetensors beside pickles", "the shards of an index", "open_clip"],
)
def test_only_the_files_that_are_read_are_fetched(
    hub_server: Hub, located: Callable[..., Path], files: dict[str, bytes], read: list[str]
) -> None:
    hub_server.push("owner/name", {"config.json": CONFIG, **TOKENIZER, **COPIES, **files})
    folder = located("owner/name")
    wanted = sorted(["config.json", *TOKENIZER, *read])
    assert sorted(hub_server.asked) == [f"owner/name/{name}" for name in wanted]
    assert sorted(path.name for path in folder.iterdir()) == wanted
    assert weights.open_weights(folder)["a"]().tolist() == [1.0, 1.0]


def test_pickles_are_fetched_where_there_are_no_safetensors_and_hold_nothing_but_tensors(
    hub_server: Hub, located: Callable[..., Path], tmp_path: Path
) -> None:
    clip = pickled(tmp_path, a=torch.ones(2))
    hub_server.push(
        "openai/clip", {"config.json": CONFIG, "pytorch_model.bin": clip, "tf_model.h5": b"", "training_args.bin": b""}
    )
    shards = {"pytorch_model-1.bin": clip, "pytorch_model-2.bin": pickled(tmp_path, b=torch.ones(1))}
    named = index(a="pytorch_model-1.bin", b="pytorch_model-2.bin")
    hub_server.push("lmsys/vicuna", {"config.json": CONFIG, "pytorch_model.bin.index.json": named, **shards})
    assert set(weights.open_weights(located("openai/clip"))) == {"a"}
    assert set(weights.open_weights(located("lmsys/vicuna"))) == {"a", "b"}
    assert not any("training_args" in name or "tf_model" in name for name in hub_server.asked)
    torch.save({"a": Path}, tmp_path / "evil")
    hub_server.push("owner/evil", {"config.json": CONFIG, "pytorch_model.bin": (tmp_path / "evil").read_bytes()})
    with pytest.raises(WeightsError, match="holds more than tensors"):
        weights.open_weights(located("owner/evil"))


def test_a_configuration_is_fetched_without_weights(hub_server: Hub, located: Callable[..., Path]) -> None:
    hub_server.push(
        "owner/name", {"config.json": CONFIG, "model.safetensors": SAFE, "model.safetensors.index.json": index(a="x")}
    )
    assert weights.read_json(located("owner/name", tensors=False) / "config.json") == {"model_type": "tiny"}
    assert hub_server.asked == ["owner/name/config.json"]


def test_a_repository_without_weights_that_are_read_is_refused_before_anything_is_fetched(
    hub_server: Hub, refusal: Callable[..., str]
) -> None:
    hub_server.push("owner/name", {"config.json": CONFIG, "name.Q4_0.gguf": b""})
    assert refusal("owner/name") == (
        "the hub's 'owner/name' holds no weights that are read here (*.safetensors or *.bin), only config.json, name.Q4_0.gguf; "
        "name another repository"
    )
    assert not hub_server.asked


# Revisions ------------------------------------------------------------------------------------------------------------


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub_server: Hub, located: Callable[..., Path]) -> None:
    first = hub_server.push("owner/name", {"config.json": CONFIG, "model.safetensors": SAFE}, "v1", "refs/pr/3")
    second = hub_server.push("owner/name", {"config.json": CONFIG, "model.safetensors": OTHER})
    for revision, commit in {"v1": first, "refs/pr/3": first, first: first, "main": second, second: second}.items():
        folder = located(f"owner/name@{revision}")
        assert hub.commit_of(folder) == commit
        assert hub.id_of(folder) == f"owner/name@{commit}"
        assert set(weights.open_weights(folder)) == ({"a"} if commit == first else {"b"})
    assert hub.commit_of(located("owner/name")) == second
    assert hub.commit_of(Path("/models/gemma")) == hub.id_of(Path("/models/gemma")) == ""


def test_what_a_branch_is_now_is_asked_for(hub_server: Hub, located: Callable[..., Path]) -> None:
    first = hub_server.push("owner/name", {"config.json": CONFIG, "model.safetensors": SAFE})
    assert hub.commit_of(located("owner/name")) == first
    second = hub_server.push("owner/name", {"config.json": CONFIG, "model.safetensors": OTHER})
    assert hub.commit_of(located("owner/name", fetch=False)) == first
    assert hub.commit_of(located("owner/name")) == second
    assert hub_server.asked.count("owner/name/config.json") == 1  # it did not change


def test_a_missing_revision_is_named(hub_server: Hub, refusal: Callable[..., str]) -> None:
    hub_server.push("owner/name", {"config.json": CONFIG, "model.safetensors": SAFE})
    said = refusal("owner/name@v9")
    assert said.startswith(
        "the hub's 'owner/name' has no revision 'v9'; choose a branch, tag or commit on http://127.0.0.1:"
    )
    assert said.endswith("/owner/name")


# The cache ------------------------------------------------------------------------------------------------------------

SHARDED = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": index(a="1.safetensors", b="2.safetensors"),
    "1.safetensors": SAFE,
    "2.safetensors": OTHER,
}


def cached_by_others(commit: str, folder: Path, *names: str) -> Path:
    """A snapshot as a library leaves it that fetched single files, and so no list of them all."""
    repository = folder / "hf" / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in names:
        (snapshot / name).write_bytes(SHARDED[name])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return snapshot


@pytest.mark.parametrize("lacking", ["2.safetensors", "model.safetensors.index.json", "tokenizer.json", "config.json"])
def test_what_a_cache_lacks_is_fetched_and_nothing_else(
    hub_server: Hub, located: Callable[..., Path], tmp_path: Path, lacking: str
) -> None:
    snapshot = cached_by_others(hub_server.push("owner/name", SHARDED), tmp_path, *(SHARDED.keys() - {lacking}))
    assert located("owner/name") == snapshot
    assert hub_server.asked == [f"owner/name/{lacking}"]
    assert set(weights.open_weights(snapshot)) == {"a", "b"}
    hub_server.calls = 0
    located("owner/name")
    assert hub_server.calls == 1  # what it is now; all of it is here


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no hub", "nothing is fetched"])
def test_what_a_cache_lacks_is_named_file_by_file_where_nothing_can_be_fetched(
    hub_server: Hub, refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    cached_by_others("0" * 40, tmp_path, "tokenizer.json", "model.safetensors.index.json", "1.safetensors")
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if how == "no hub":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = refusal("owner/name", fetch=how != "nothing is fetched")
    assert said.startswith("the hub id 'owner/name' could not be fetched: ")
    assert said.endswith(
        ", and the local cache lacks 2.safetensors, config.json; correct the path, or fetch what is missing first"
    )
    reasons = {
        "no hub": "the hub at http://127.0.0.1:9 does not answer (ConnectError",
        "HF_HUB_OFFLINE": f"{how} is set",
    }
    assert reasons.get(how, "nothing is fetched here") in said
    assert not hub_server.calls
    other = refusal("owner/other", fetch=how != "nothing is fetched")
    assert ", and the local cache holds nothing of it; " in other


def test_a_list_of_the_cache_names_what_was_never_fetched(
    hub_server: Hub, located: Callable[..., Path], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.push("owner/name", SHARDED)
    located("owner/name", tensors=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert located("owner/name", tensors=False)
    assert "lacks 1.safetensors, 2.safetensors, model.safetensors.index.json;" in refusal("owner/name")


def test_a_link_to_nothing_is_not_taken_for_a_file(
    hub_server: Hub, located: Callable[..., Path], refusal: Callable[..., str], tmp_path: Path
) -> None:
    hub_server.push("owner/name", SHARDED)
    snapshot = located("owner/name")
    (snapshot / "1.safetensors").resolve().unlink()
    assert "lacks 1.safetensors;" in refusal("owner/name", fetch=False)
    assert located("owner/name") == snapshot
    assert set(weights.open_weights(snapshot)) == {"a", "b"}


def test_a_whole_cache_serves_where_the_hub_does_not(
    hub_server: Hub, located: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub_server.push("owner/name", SHARDED, "v1")
    folder = located("owner/name@v1")
    hub_server.repositories.clear()
    assert located("owner/name@v1") == folder
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert located(f"owner/name@{first}") == folder


# Who may read it ------------------------------------------------------------------------------------------------------


def test_a_gated_repository_is_named_as_gated_with_the_page_to_ask_on(
    hub_server: Hub, located: Callable[..., Path], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.push("google/gemma", SHARDED, gated=True)
    said = refusal("google/gemma")
    assert said.startswith("'google/gemma' is gated on the hub: ask for access on http://127.0.0.1:")
    assert said.endswith("/google/gemma, and set HF_TOKEN to a token of your account")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert refusal("google/gemma").endswith("/google/gemma, and the account of the token that is set has none")
    hub_server.allowed.add(TOKEN)
    assert set(weights.open_weights(located("google/gemma"))) == {"a", "b"}


def test_a_private_repository_and_a_missing_one_look_alike_and_a_token_opens_one(
    hub_server: Hub, located: Callable[..., Path], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.push("owner/private", SHARDED, private=True)
    for name in ("owner/private", "owner/missing"):
        said = refusal(name)
        assert said.startswith("the hub at http://127.0.0.1:")
        assert said.endswith(
            f" has no repository '{name}', or it is a private one that is read with a token only (HF_TOKEN); correct the name"
        )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "that the token which is set may not read; correct the name" in refusal("owner/private")
    hub_server.allowed.add(TOKEN)
    assert located("owner/private")
    assert TOKEN in hub_server.tokens
