"""The Hugging Face hub: a repository of it as a folder of the local cache, of which only what is read is fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from graftwork import weights
from graftwork.errors import WeightsError
from graftwork.weights import absolute

ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./+-]*))?")
"""A repository, and one of its branches, tags or commits."""
SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})")
"""How the path of a commit's folder in the cache ends."""
DESCRIBING = ("*.json", "*.jinja", "*.model", "vocab*.txt", "merges.txt")
"""What is read besides tensors: configurations and tokenizers."""
YES = ("1", "ON", "YES", "TRUE")
OF_OTHERS = ("*.index.json", "tf_*", "flax_*", "onnx*")


def locate(given: str, folder: Path, *, where: str, fetch: bool = True, tensors: bool = True) -> Path:
    """The folder that `given` names: a path relative to `folder`, an absolute one, or a hub id, `owner/name[@revision]`.

    A path always wins over a hub id. With `fetch` the hub is asked, and what the local cache lacks is fetched; where the hub
    does not answer, and without `fetch`, the cache must hold everything. Without `tensors` configurations and tokenizers are
    enough. Raises WeightsError with the path that was tried, and the reason of the hub.
    """
    if not given:
        raise WeightsError(f"{where}: is empty; name a folder or a hub id")
    path = absolute(Path(given), folder)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise WeightsError(f"{where}: '{given}' is a file ('{path}'); name the folder that holds it")
    if not ID.fullmatch(given):
        raise WeightsError(
            f"{where}: there is no folder '{path}', and '{given}' is no hub id (owner/name or owner/name@revision); "
            "correct the path"
        )
    try:
        return snapshot(given, fetch=fetch, tensors=tensors)
    except WeightsError as error:
        raise WeightsError(f"{where}: there is no folder '{path}', and {error.sentence}", error.details) from None


def snapshot(given: str, *, fetch: bool = True, tensors: bool = True) -> Path:
    """The folder in the cache of what a hub id names, as `locate` finds it; WeightsError with the hub's reason, a clause."""
    found = ID.fullmatch(given)
    if not found:
        raise WeightsError(f"'{given}' is no hub id (owner/name or owner/name@revision)")
    return _Repository(found["name"], found["revision"], tensors).folder(fetch)


def with_revision(given: str, revision: str | None) -> str:
    """A hub id with the revision that something else names for it; anything but a bare hub id stays as it is."""
    found = ID.fullmatch(given)
    return f"{given}@{revision}" if revision and found and not found["revision"] else given


def commit_of(folder: Path) -> str:
    """The commit whose snapshot in a cache of the hub a folder is; empty for any other folder."""
    return found["commit"] if (found := SNAPSHOT.search(folder.as_posix())) else ""


def id_of(folder: Path) -> str:
    """The hub id, with its commit, of a snapshot; empty for any other folder."""
    found = SNAPSHOT.search(folder.as_posix())
    return f"{found['owner']}/{found['name']}@{found['commit']}" if found else ""


def other_revision(folder: Path, given: str) -> str:
    """Why a snapshot is not at the revision that a hub id names, as far as the cache knows; empty where it may be."""
    found, commit = ID.fullmatch(given), commit_of(folder)
    if not commit or not found or not (revision := found["revision"]):
        return ""
    ref = folder.parents[1] / "refs" / revision
    named = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    if named == commit or not re.fullmatch("[0-9a-f]{40}", named):
        return ""
    return f"it is commit {commit} of the hub's, and '{revision}' is commit {named}"


class _Repository:
    """A model's repository at a revision, and which of its files are wanted."""

    def __init__(self, name: str, revision: str | None, tensors: bool) -> None:
        from huggingface_hub import constants

        self.name, self.revision, self.tensors = name, revision, tensors
        # huggingface_hub reads both once, when it is imported.
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.is_offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in YES

    @property
    def id(self) -> str:
        """As a run file writes it."""
        return with_revision(self.name, self.revision)

    @property
    def page(self) -> str:
        """Where a person reads about it."""
        return f"{self.endpoint}/{self.name}"

    def folder(self, fetch: bool) -> Path:
        """The snapshot in the cache with every file that is wanted; WeightsError with the reason where there is none."""
        refused, reason = "", "nothing is fetched here ('graftwork train' and 'hf download' do so)"
        if self.is_offline:
            reason = "HF_HUB_OFFLINE is set"
        elif fetch:
            try:
                return self.fetched()
            except WeightsError:
                raise
            except Exception as error:  # of huggingface_hub, of the network library that it uses, of the disk
                reason, refused = self.unreachable(error), self.refused(error)
        cached = self.cached()
        lacking = self.lacking(cached) if cached else ()
        if cached and not lacking:
            return cached
        if refused:
            raise WeightsError(refused)
        held = f"lacks {', '.join(lacking)}" if cached else "holds nothing of it"
        raise WeightsError(
            f"the hub id '{self.id}' could not be fetched: {reason}, and the local cache {held}; correct the path, or fetch "
            "what is missing first"
        )

    def fetched(self) -> Path:
        """The snapshot after asking the hub what the revision is now, and fetching what the cache lacks of it."""
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download

        info = HfApi(endpoint=self.endpoint).model_info(self.name, revision=self.revision)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        chosen = self.wanted(
            names, lambda file: Path(hf_hub_download(self.name, file, revision=info.sha, endpoint=self.endpoint))
        )
        if self.tensors and not any(fnmatchcase(name, form) for name in chosen for form in weights.FORMS):
            raise WeightsError(
                f"the hub's '{self.id}' holds no weights that are read here (*.safetensors or *.bin), only "
                f"{', '.join(names) or 'nothing'}; name another repository"
            )
        if (cached := self.cached()) and cached.name == info.sha and not self.lacking(cached, names):
            return cached
        patterns = [*map(escape, chosen)]
        folder = Path(
            snapshot_download(self.name, revision=self.revision, endpoint=self.endpoint, allow_patterns=patterns)
        )
        if lacking := self.lacking(folder, names):
            raise WeightsError(
                f"the hub's '{self.id}' lacks {', '.join(lacking)}; name another revision, or fetch it again"
            )
        return folder

    def wanted(self, names: Collection[str], place: Callable[[str], Path]) -> list[str]:
        """Which of the repository's files are read; `place` says where an index is, to read it."""
        tensors, index = weights.tensor_names([n for n in names if "/" not in n], place) if self.tensors else ([], "")
        describing = [
            name
            for name in names
            if "/" not in name
            and any(fnmatchcase(name, form) for form in DESCRIBING)
            and not any(fnmatchcase(name, form) for form in OF_OTHERS)
        ]
        return [*describing, *([index] if index else []), *tensors]

    def cached(self) -> Path | None:
        """The snapshot of the revision that the cache knows, whole or not."""
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.name, revision=self.revision, local_files_only=True, allow_patterns=[]))
        except Exception:  # there is none, or its records are damaged
            return None

    def lacking(self, snapshot: Path, names: Collection[str] = ()) -> list[str]:
        """The files that are wanted and not in a snapshot, of the `names` in the repository, or of those that the cache knows."""
        names = names or _names_in(self.name, snapshot)
        unread = {index for index in weights.INDEXES if index in names and not (snapshot / index).is_file()}
        chosen = self.wanted([name for name in names if name not in unread], snapshot.joinpath)
        forms = {Path(name).suffix for name in chosen}
        chosen += [index for index in unread if Path(index.removesuffix(".index.json")).suffix in forms]
        if not any(name.endswith("config.json") for name in chosen):
            chosen.append("config.json")
        if self.tensors and not any(fnmatchcase(name, form) for name in chosen for form in weights.FORMS):
            chosen.append("model.safetensors or pytorch_model.bin")
        return sorted(name for name in chosen if not (snapshot / name).is_file())

    def refused(self, error: Exception) -> str:
        """The hub's answer, as a clause, where it answered that it does not give what was asked for; else empty."""
        from huggingface_hub import errors, get_token

        token = get_token()
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if isinstance(error, errors.GatedRepoError):
            given = (
                "the account of the token that is set has none" if token else "set HF_TOKEN to a token of your account"
            )
            return f"'{self.name}' is gated on the hub: ask for access on {self.page}, and {given}"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"the hub's '{self.name}' has no revision '{self.revision}'; choose a branch, tag or commit on {self.page}"
        if isinstance(error, errors.RepositoryNotFoundError):
            given = "that the token which is set may not read" if token else "that is read with a token only (HF_TOKEN)"
            return f"the hub at {self.endpoint} has no repository '{self.name}', or it is a private one {given}; correct the name"
        if status in (401, 403):
            return f"the hub at {self.endpoint} refuses the token that is set ({status}); renew it (HF_TOKEN, 'hf auth login')"
        return ""

    def unreachable(self, error: Exception) -> str:
        """Why the hub could not be asked, as a clause."""
        from huggingface_hub import errors

        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        message = str(cause).strip().split("\n")[0]
        return f"the hub at {self.endpoint} does not answer ({type(cause).__name__}: {message})"


def _names_in(name: str, snapshot: Path) -> list[str]:
    """The files of a commit as far as the cache knows them: the list that it keeps, else those that were fetched."""
    try:
        from huggingface_hub import get_cached_repo_tree  # not in its first versions

        return [file.path for file in get_cached_repo_tree(name, revision=snapshot.name)]
    except Exception:
        return [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if not file.is_dir()]
