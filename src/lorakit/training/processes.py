"""The processes that train one adapter together, as torchrun starts them.

Each has the whole model and takes its share of the rows of every batch. What is trained is small,
so its gradients are summed after the backward pass, and nothing wraps the model: hooks on it, its
methods and its memory modes are as in one process. transformers and accelerate are not told of the
others, so that data order, steps and resuming are those of one process too.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorakit.config.seed import LARGEST
from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError, TrainingError
from lorakit.upstream.quiet_library import without_advice_on_processes
from lorakit.upstream.versions import installed_version

T = TypeVar("T")

SIZES_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""The variables by which MPI's launchers say how many processes they have started."""
HIDDEN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", *SIZES_OF_MPI)
"""The variables by which accelerate would find other processes, and wrap the model."""
OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""accelerate's variables for engines that divide the model, and the names of these."""
BORROWED = "borrowed"
"""Key of a batch whose only row is of another process's share: its loss counts for nothing."""
LIBRARIES = ("lorakit", "torch", "transformers")
"""What computes a run, whose versions must be the same on all machines."""
PIECE_BYTES = 32 * 2**20
"""Bytes of gradients that are summed at once, since they are copied for it."""
TELL_S = 5
"""Seconds in which the process that holds the common store must answer."""


def started_together() -> int:
    """How many processes a launcher says that it has started for this run."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def count() -> int:
    """How many processes train together; 1 outside of `together`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """The number of this process among those that train together, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and shows: number 0, or the only one."""
    return number() == 0


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that a launcher has started, for a block of work.

    Raises:
        ConfigError: they were started in a way in which they cannot train together.
        TrainingError: they do not find each other.
    """
    _check_launcher()
    if started_together() == 1 or count() > 1:
        yield
        return
    _take_one_gpu(int(os.environ.get("LOCAL_RANK") or 0))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as error:
        raise TrainingError(
            f"the {started_together()} processes of this run do not find each other: "
            f"{str(error).splitlines()[0]}; start them by torchrun (docs/scale.md)"
        ) from error
    hidden = {name: os.environ.pop(name) for name in HIDDEN if name in os.environ}
    try:
        with without_advice_on_processes():
            yield
    except BaseException:
        os.environ.update(hidden)
        # Before the others see that this one leaves, which is no reason that a user can mend.
        is_first_to_tell()
        raise
    finally:
        os.environ.update(hidden)
        dist.destroy_process_group()


def _check_launcher() -> None:
    """Refuse what would not train together as it was asked to.

    Those are processes of MPI, each of which would train alone, and the engines of accelerate that
    divide the model, which would not be used.

    Raises:
        ConfigError: one was asked for.
    """
    by_mpi = max(int(os.environ.get(name) or 1) for name in SIZES_OF_MPI)
    if by_mpi > 1 and "WORLD_SIZE" not in os.environ and count() == 1:
        raise ConfigError(
            f"MPI has started {by_mpi} processes, which do not find each other by it: start them "
            "by torchrun (docs/scale.md)"
        )
    if started_together() == 1:
        return
    asked = [
        engine
        for name, engine in OTHER_ENGINES.items()
        if os.environ.get(name, "false").lower() in ("true", "1", "yes")
    ]
    if asked:
        raise ConfigError(
            f"{' and '.join(asked)} was asked for, and lorakit divides a model by shard: base, a "
            "setting of its own: start it by torchrun, or by accelerate launch --multi_gpu"
        )


def _take_one_gpu(place: int) -> None:
    """Let this process see its own GPU alone, where there are some.

    Raises:
        ConfigError: there are fewer than processes on this machine.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Counting them does not start CUDA, after which the variable would have no effect.
    names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    if not torch.cuda.device_count():
        return
    if place >= len(names):
        raise ConfigError(
            f"this is process {place + 1} of its machine, which has {len(names)} GPUs: start one "
            "process for each"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = names[place]


def check_alone(what: str) -> None:
    """Refuse what only one process can do.

    Raises:
        ConfigError: several were started.
    """
    if started_together() > 1 or count() > 1:
        raise ConfigError(f"{what} runs in one process: start it without torchrun")


def check_settings(config: TrainConfig) -> None:
    """Make sure that all processes have the same settings and libraries, and share batches equally.

    Raises:
        ConfigError: they have not, with each difference; or they cannot.
    """
    # What follows a plus says what a library was built for, which may differ.
    versions = {
        f"the version of {name}": (installed_version(name) or "unknown").partition("+")[0]
        for name in LIBRARIES
    }
    check_same(_flat(config.model_dump(mode="json")) | versions)
    if config.batch_size % count():
        raise ConfigError(
            f"batch_size {config.batch_size} is the rows of all processes, and {count()} cannot "
            f"share them equally: give a multiple of {count()}"
        )


def check_same(values: Mapping[str, Any]) -> None:
    """Make sure that values are the same in all processes.

    Raises:
        ConfigError: they are not, with each difference.
    """
    first, *others = gathered(values)
    problems = [
        f"{name} is {other.get(name)!r} in process {index}, and {first.get(name)!r} in process 0"
        for index, other in enumerate(others, 1)
        for name in dict.fromkeys([*first, *other])
        if first.get(name) != other.get(name)
    ]
    if problems:
        raise ConfigError.listing(
            "the processes of a run differ: give each the same versions, settings, rows and base",
            problems,
        )


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inside = _flat(value, f"{before}{name}.") if isinstance(value, dict) and value else None
        flat |= {f"{before}{name}": value} if inside is None else inside
    return flat


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's share of some items: as many as the others have, or one less."""
    return items[number() :: count()]


class ShareOfBatch:
    """Makes the batch of this process's share of the rows, in the place of a collator."""

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """The batch; where the rows are fewer than the processes, of a row that does not count."""
        mine = share(examples)
        return self._collate(mine) if mine else {**self._collate(examples[:1]), BORROWED: True}


def total(values: Tensor) -> Tensor:
    """The sum of the processes' values, in each of them.

    Raises:
        TrainingError: another process has ended.
    """
    if count() == 1:
        return values
    summed = values.clone()
    with _explained():
        dist.all_reduce(summed)
    return summed


def gathered(value: T) -> list[T]:
    """The values of all processes, by their numbers.

    Raises:
        TrainingError: another process has ended.
    """
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with _explained():
        dist.all_gather_object(found, value)
    return found


def any_says(value: bool) -> bool:
    """Whether any process says so."""
    return value if count() == 1 else bool(total(torch.tensor(int(value))))


def as_in_first(work: Callable[[], T]) -> T:
    """What the first process finds, in each of them; the others do not look."""
    return gathered(work() if is_first() else None)[0]  # type: ignore[return-value]


def wait_for_all() -> None:
    """Wait until every process is here."""
    gathered(None)


def copy_from_first(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters the values that they have in the first process."""
    if count() > 1:
        with _explained(), torch.no_grad():
            for parameter in parameters:
                dist.broadcast(parameter.data, 0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of all processes; one that is missing in some counts as zero there.

    Raises:
        TrainingError: another process has ended.
    """
    parameters = list(parameters)
    if count() == 1 or not parameters:
        return
    made = total(torch.tensor([int(each.grad is not None) for each in parameters]))
    with torch.no_grad():
        for piece in _pieces([p for p, n in zip(parameters, made.tolist(), strict=True) if n]):
            zeros = (torch.zeros_like(each) if each.grad is None else each.grad for each in piece)
            summed = total(torch.cat([each.flatten() for each in zeros]))
            for each, part in zip(piece, summed.split([p.numel() for p in piece]), strict=True):
                each.grad = part.view_as(each).clone()


def _pieces(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one precision and place, in order, of `PIECE_BYTES` or one parameter each."""
    piece: list[nn.Parameter] = []
    size_bytes = 0
    for each in parameters:
        is_alike = piece and (each.dtype, each.device) == (piece[0].dtype, piece[0].device)
        size_bytes += each.nbytes
        if piece and (not is_alike or size_bytes > PIECE_BYTES):
            yield piece
            piece, size_bytes = [], each.nbytes
        piece.append(each)
    if piece:
        yield piece


def seed_step(seed: int, step: int, pass_number: int) -> None:
    """Draw the random numbers of a forward pass, for dropout, unlike those of other processes.

    They depend on nothing that came before, so that a resumed run draws the same.
    """
    text = f"{seed} {step} {pass_number} {number()}"
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % LARGEST)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    # gloo and NCCL raise their own kinds of it when a connection is closed.
    except RuntimeError as error:
        raise _other_has_ended() from error


@contextmanager
def explained_in_model() -> Iterator[None]:
    """Say plainly that another process has ended, where a model gathers its weights from all.

    Raises:
        TrainingError: it has.
    """
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not _is_of_connection(error):
            raise
        raise _other_has_ended() from error


def _is_of_connection(error: RuntimeError) -> bool:
    """Whether an error came from between the processes; gloo has no kind of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _other_has_ended() -> TrainingError:
    return TrainingError(
        f"one of the {count()} processes that train together has ended, so this one stops "
        "too: --resume goes on from the last checkpoint"
    )


_TOLD: list[bool] = []
"""Whether this process was the first to tell, as it was found the first time."""


def is_first_to_tell() -> bool:
    """Whether this process is the one that says what went wrong: the first that asks.

    An error mostly comes to all processes, and one message is enough. They count in the store by
    which they found each other, which torchrun holds; where it is gone, whoever was in the group
    speaks.
    """
    if started_together() == 1:
        return True
    if not _TOLD:
        _TOLD.append(_is_first_in_store())
    return _TOLD[0]


def _is_first_in_store() -> bool:
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Where nobody answers, the store would print its stack.
        with socket.create_connection(place, timeout=TELL_S):
            pass
        store = dist.TCPStore(  # type: ignore[attr-defined]
            *place,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=TELL_S),
        )
        told = store.add(f"lorakit/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1)
    except (KeyError, ValueError, OSError, RuntimeError):
        return dist.is_initialized() or os.environ.get("RANK", "0") == "0"
    return int(told) == 1
