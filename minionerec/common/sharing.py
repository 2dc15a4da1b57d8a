"""One piece of work shared by several processes: parts of a batch, values gathered, gradients averaged.

For models that every process holds whole, as DDP does it. In one process every function here gives back what it was
given, so that the same lines serve one process and several. Each must be called by all processes together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from minionerec.common.processes import count_processes, get_rank, is_main_process, process_state

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def take_part(rows: Sequence[T]) -> Sequence[T]:
    """The rows of this process: parts follow each other in the order of ranks and differ by one row at most."""
    world, rank = count_processes(), get_rank()
    return rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]


def broadcast_value(value: T) -> T:
    """The main process's value, on every process."""
    if count_processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    process_state()
    return broadcast_object_list([value])[0]


def broadcast_tensor(values: torch.Tensor) -> torch.Tensor:
    """The main process's tensor, on every process; of one shape and type on all."""
    if count_processes() == 1:
        return values
    from accelerate.utils import broadcast

    return broadcast(values.contiguous())


def add_up(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, on every process."""
    if count_processes() == 1:
        return values
    from accelerate.utils import reduce

    return reduce(values, "sum")


def add_up_number(value: float) -> float:
    """The sum of a number over all processes, on every process."""
    if count_processes() == 1:
        return value
    import torch

    return float(add_up(torch.tensor(value, dtype=torch.float64, device=process_state().device)))


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows [n, ...] of all processes in the order of ranks, on every process; they may have different n."""
    if count_processes() == 1:
        return rows
    import torch
    from accelerate.utils import gather, pad_across_processes

    counts = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    parts = gather(pad_across_processes(rows)).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_on_main(values: list[T]) -> list[T]:
    """The values of all processes in the order of ranks on the main process, none on the others."""
    if count_processes() == 1:
        return values
    import torch

    process_state()
    parts: list[Any] | None = [None] * count_processes() if is_main_process() else None
    torch.distributed.gather_object(values, parts)
    return [value for part in parts or () for value in part]


def wrap_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model such that the gradients of its forward pass are the mean over all processes after `backward`."""
    if count_processes() == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    process_state()
    return DistributedDataParallel(model)


def separate_random_state(seed: int, epoch: int) -> None:
    """Give every process but the main one a random state of its own for an epoch, so that no two drop out alike.

    The main process keeps the state that it has. What the others draw depends on seed, epoch and rank alone, so that a
    training goes on from a checkpoint, which holds the main process's state, as if it had not been cut off.
    """
    if is_main_process():
        return
    import torch

    draws = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    torch.manual_seed(int(torch.randint(2**62, (get_rank() + 1,), generator=draws)[-1]))
