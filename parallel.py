"""
One process or many: torchrun's environment, the device of a rank, DDP or FSDP around a model, and what a checkpoint
needs of them. With one process everything here is a plain pass-through.
"""

import contextlib
import os
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configurator import UsageError


class World:
    """
    This process among all (rank of size). Reads torchrun's RANK, LOCAL_RANK and WORLD_SIZE; use as a context manager,
    which joins the process group and leaves it.
    """

    def __init__(self, device: str, backend: str) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.main = self.rank == 0
        self.device = resolve_device(device)
        if self.device == "cuda" and "LOCAL_RANK" in os.environ:
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.backend = ("nccl" if self.device.startswith("cuda") else "gloo") if backend == "auto" else backend

    def __enter__(self) -> Self:
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group(backend=self.backend)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.size > 1 and kind in (None, SystemExit):  # after an error the others may be waiting: just leave
            dist.destroy_process_group()

    def sum(self, *values: Tensor | float) -> list[float]:
        """Each value summed over all ranks, in one exchange."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.size > 1:
            total = total.to(self.device if self.backend == "nccl" else "cpu")
            dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def resolve_device(device: str) -> str:
    """'auto' as cuda, mps or cpu. Raises UsageError for a device this machine does not have."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name in has if has[name])
    kind, _, index = device.partition(":")
    if not has.get(kind) or (index and (not index.isdigit() or (kind == "cuda" and int(index) >= torch.cuda.device_count()))):
        here = ", ".join(name for name in has if has[name])
        raise UsageError(f"--device={device}: not on this machine, which has {here}")
    return device


def wrap(model: nn.Module, blocks: nn.ModuleList, world: World, mode: str) -> nn.Module:
    """The model for training on all ranks: replicated with DDP, or its blocks and the rest sharded with FSDP."""
    if world.size == 1:
        return model
    if mode == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in blocks:
            fully_shard(block)
        return fully_shard(model)
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, device_ids=[world.device] if world.device.startswith("cuda:") else None)


@contextlib.contextmanager
def gradient_sync(model: nn.Module, now: bool):
    """Exchange gradients in the backward passes inside only if `now`: once an iteration, after its last micro-step."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP
        model.set_requires_gradient_sync(now)
        yield
    elif hasattr(model, "no_sync") and not now:  # DDP
        with model.no_sync():
            yield
    else:
        yield


def whole(value: Any) -> Any:
    """A state dict whose sharded tensors are gathered, on the CPU; all ranks must call it together."""
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(v) for v in value]
    if hasattr(value, "full_tensor"):
        return value.full_tensor().cpu()
    return value


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """load_state_dict for a state whose tensors are whole while the parameters may be sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {**state, "state": dict(state["state"])}
    for i, held in state["state"].items():
        if isinstance(params[i], DTensor):
            mesh, placements = params[i].device_mesh, params[i].placements
            state["state"][i] = {
                k: distribute_tensor(v.to(params[i].device), mesh, placements) if v.shape == params[i].shape else v
                for k, v in held.items()
            }
    optimizer.load_state_dict(state)
