"""The two ways of applying operators to many rows: processes of this machine, and Ray. Both give the same bytes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from . import guard
from .judging import Judge

T = TypeVar("T")
CHUNK = 256
"""Rows that are judged together: few enough for a short tail, many enough that their transport costs nothing."""
IMAGES_TRIED = 32
"""How many images the nodes of a cluster must be able to open before the work begins."""
Work = Callable[[Iterable[str]], Iterator[str]]
Begin = Callable[[Sequence[Mapping[str, Any]]], Any]


class CannotRun(Exception):
    """Why a task cannot be done, as a sentence."""


def chunks_of(file: IO[str]) -> Iterator[str]:
    """The lines of a file, so many at a time."""
    while lines := list(islice(file, CHUNK)):
        yield "".join(lines)


def in_order(
    chunks: Iterable[str], submit: Callable[[str], T], result: Callable[[T], str], ahead: int
) -> Iterator[str]:
    """The results of chunks in their order, while at most `ahead` of them are under way."""
    waiting: deque[T] = deque()
    for chunk in chunks:
        waiting.append(submit(chunk))
        if len(waiting) >= ahead:
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())


# Processes of this machine ----------------------------------------------------------------------------------------------

_judge: Judge | None = None


def _begin(steps: Sequence[Mapping[str, Any]], seed: int, ranks: Any) -> None:
    global _judge
    _judge = Judge(steps, seed, ranks.get())


def _apply(chunk: str) -> str:
    assert _judge is not None
    return _judge(chunk)


@contextmanager
def local(task: Mapping[str, Any]) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], Any]]:
    """A function that gives, for some steps, a context in which chunks are judged by forked processes."""
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("fork")  # what is imported once is shared by all of them

    @contextmanager
    def begin(steps: Sequence[Mapping[str, Any]]) -> Iterator[Work]:
        count, ranks = task["workers"], context.SimpleQueue()
        for rank in range(count):
            ranks.put(rank)

        def result(future: Future[str]) -> str:
            try:
                return future.result()
            except BrokenProcessPool:
                raise CannotRun(
                    "a process of Data-Juicer was killed, by the system if memory ran out; set 'workers' to fewer"
                ) from None

        with ProcessPoolExecutor(count, context, _begin, (steps, task["seed"], ranks)) as pool:
            yield lambda chunks: in_order(chunks, lambda chunk: pool.submit(_apply, chunk), result, 2 * count)

    guard.install()
    yield begin


# Ray --------------------------------------------------------------------------------------------------------------------

OBJECT_STORE = 100 << 20
"""Bytes of the object store of a Ray that is started here: chunks of rows are small."""


@contextmanager
def on_ray(task: Mapping[str, Any]) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], Any]]:
    """The same with the actors of a Ray cluster: the one at `address`, or one on loopback that lives as long as this."""
    guard.GUARD.hosts = None
    try:
        import ray
    except ImportError:
        raise CannotRun("Ray is not installed there: pip install 'graftwork[data-juicer]'") from None

    address = task["address"]
    environment: dict[str, Any] = {"env_vars": task["guard"], "worker_process_setup_hook": guard_ray_worker}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address:
        environment["py_modules"] = [str(Path(__file__).parent)]
        options |= {"address": address}
    else:
        environment["env_vars"] |= {"PYTHONPATH": os.environ["PYTHONPATH"]}
        options |= {"num_cpus": task["workers"], "include_dashboard": False, "object_store_memory": OBJECT_STORE}
        options |= {"_node_ip_address": "127.0.0.1", "_temp_dir": task["ray_folder"]}
    try:
        ray.init(runtime_env=environment, **options)
    except Exception as error:
        where = f"the Ray at '{address}' cannot be reached" if address else "Ray cannot be started"
        raise CannotRun(f"{where} ({' '.join(str(error).split())[:200]})") from None
    try:
        guard.install((*guard.LOOPBACK, *(node["NodeManagerAddress"] for node in ray.nodes())))
        _open_images(ray, task)
        yield lambda steps: _actors(ray, task, steps)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        raise cause from None
    except ray.exceptions.RayError as error:
        what = f"a process of Ray ended ({' '.join(str(error).split())[:160]})"
        raise CannotRun(f"{what}, by the system if memory ran out; set 'workers' to fewer") from None
    finally:
        guard.GUARD.hosts = None
        ray.shutdown()


def guard_ray_worker() -> None:
    """What every process of Ray that runs operators does first."""
    import ray

    guard.install((*guard.LOOPBACK, *(node["NodeManagerAddress"] for node in ray.nodes())))


@contextmanager
def _actors(ray: Any, task: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Iterator[Work]:
    with_gpus = any(step["model"] for step in steps) and ray.cluster_resources().get("GPU", 0) > 0
    actor = ray.remote(num_cpus=1, num_gpus=1 if with_gpus else 0)(Judge)
    actors = [actor.remote(steps, task["seed"]) for _ in range(task["workers"])]
    turns = iter(range(1 << 62))

    def submit(chunk: str) -> Any:
        return actors[next(turns) % len(actors)].__call__.remote(chunk)

    yield lambda chunks: in_order(chunks, submit, ray.get, 2 * len(actors))
    for each in actors:
        ray.kill(each)


def _open_images(ray: Any, task: Mapping[str, Any]) -> None:
    """CannotRun where a node of the cluster does not see the first images."""
    paths = task["first_images"]
    if not (task["address"] and paths):
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for node in ray.nodes():
        if not node["Alive"]:
            continue
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        unseen = ray.get(ray.remote(unreadable).options(scheduling_strategy=there).remote(paths))
        if unseen:
            raise CannotRun(
                f"the node {node['NodeManagerAddress']} of Ray does not see '{unseen[0]}'; put the images, and TMPDIR, where "
                "every node has them under the same path"
            )


def unreadable(paths: Sequence[str]) -> list[str]:
    """Those of the files that cannot be opened here."""
    found = []
    for path in paths:
        try:
            with Path(path).open("rb") as file:
                file.read(1)
        except OSError:
            found.append(path)
    return found
