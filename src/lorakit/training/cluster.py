"""Runs as tasks on a cluster of Ray: each in a process of its own, with processors of its own."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from lorakit.errors import ConfigError, LorakitError, MissingExtraError, TrainingError
from lorakit.training.progress import progress_bar

T = TypeVar("T")

CONNECT_S = 10.0
"""Seconds within which a cluster has to accept a connection."""
AUTH_MODE = "RAY_AUTH_MODE"
"""Ray's variable. Without it Ray takes the token of this machine only to `auto`."""
STOP_S = 120.0
"""Seconds that tasks get, after Ctrl-C, to finish their steps and save a checkpoint."""


def check_cluster(address: str) -> None:
    """Make sure that Ray is installed, and that something answers at an address.

    Raises:
        MissingExtraError: it is not installed.
        ConfigError: nothing answers there.
    """
    try:
        import ray  # noqa: F401
    except ImportError:
        raise MissingExtraError("--ray", "ray") from None
    if address in ("local", "auto"):
        return
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+)\]?:(\d+)", address)
    if found is None:
        raise ConfigError(
            f"ray is local, which starts a cluster here, auto, or HOST:PORT; found {address!r}"
        )
    try:
        socket.create_connection((found[1], int(found[2])), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no cluster of Ray answers at {address}: {error}. `ray status` on its first machine "
            "says where it is; --ray local starts one here"
        ) from None


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be connected to a cluster inside a `with` block; a program that is already stays so.

    Raises:
        ConfigError: there is no such cluster.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        quiet["include_dashboard"] = False
    try:
        ray.init(address=address, **quiet)
    # Ray raises plain Exceptions too, such as for a machine that is too busy to start it.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(f"Ray does not connect to {address}: {reason}{_hint(address)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _hint(address: str) -> str:
    """What to do about a cluster that answers and lets nobody in, which Ray does not say."""
    if address in ("local", "auto") or os.environ.get(AUTH_MODE) is not None:
        return ""
    return f". If it asks for a token (~/.ray/auth_token), set {AUTH_MODE}=token"


def run_tasks(
    tasks: Mapping[str, Callable[[], T]], *, cpus: int, title: str, unit: str, show: bool
) -> Iterator[tuple[str, T | None, Exception | KeyboardInterrupt | None]]:
    """Run functions on the cluster that is connected, and yield what became of each as it ends.

    Every machine has the folder that this process works in, under the same path. A task gets a GPU
    where the cluster has any.

    Args:
        tasks: by name; each can be pickled.
        cpus: processors, and threads of torch, that each gets.
        title: what is done, for the progress.
        unit: what one task is.
        show: show the progress on stderr.

    Yields:
        The name, the result, and the error in its place.

    Raises:
        ConfigError: no machine has so many processors.
        KeyboardInterrupt: this process was interrupted; the tasks were asked to stop and have.
    """
    import ray

    most = max(
        (node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0
    )
    if cpus > most:
        raise ConfigError(
            f"each task asks for {cpus} processors, and no machine of the cluster has more than "
            f"{most:.0f}"
        )
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_work)
    names = {remote.remote(os.getcwd(), task): name for name, task in tasks.items()}
    bar = progress_bar(total=len(tasks), title=title, unit=unit, show=show)
    waiting = list(names)
    try:
        while waiting:
            (ended, *_), waiting = ray.wait(waiting)
            yield names[ended], *_outcome(ended)
            bar.update()
    except KeyboardInterrupt:
        for each in waiting:
            ray.cancel(each)
        if waiting:
            ray.wait(waiting, num_returns=len(waiting), timeout=STOP_S)
        raise
    finally:
        bar.close()


def _work(folder: str, task: Callable[[], T]) -> tuple[T | None, Any]:
    """A task's result or error, in the worker."""
    os.chdir(folder)
    try:
        return task(), None
    except (LorakitError, KeyboardInterrupt) as error:
        return None, error


def _outcome(reference: Any) -> tuple[Any, Any]:
    """The result and the error of a task that has ended, or with its process."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.TaskCancelledError as error:
        return None, KeyboardInterrupt(str(error))
    except ray.exceptions.RayTaskError as error:
        return None, error
    except ray.exceptions.RayError as error:
        reason = next(iter(str(error).splitlines()), "")
        return None, TrainingError(f"its process has ended: {reason}")
