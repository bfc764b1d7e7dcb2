"""
One process or many: torchrun's environment, the device of a rank, DDP or FSDP around a model, and what a checkpoint
needs of them. With one process everything here is a plain pass-through.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configurator import UsageError, UserError


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
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                raise UsageError(f"--nproc_per_node is more than this machine's {gpus} GPU{'s' * (gpus > 1)}")
            self.device = f"cuda:{local}"
        if self.device == "mps" and self.size > 1:
            raise UsageError("several processes cannot share mps; use --device=cpu, or one process")
        on_cuda = self.device.startswith("cuda")
        self.backend = ("nccl" if on_cuda else "gloo") if backend == "auto" else backend
        if self.backend == "nccl" and not on_cuda and self.size > 1:
            raise UsageError(f"--backend=nccl exchanges between GPUs only, this run is on {self.device}; use --backend=gloo")

    def __enter__(self) -> Self:
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)
        if self.size > 1:
            known = self.backend == "nccl" and ":" in self.device
            device = torch.device(self.device) if known else None  # NCCL would have to guess it at the first barrier
            dist.init_process_group(backend=self.backend, device_id=device)
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


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """
    Let rank 0 alone say what all ranks find wrong, a mistyped flag for one: when it ends, torchrun ends the others,
    which wait here meanwhile. What only another rank found is said by that one, with its number.
    """
    try:
        yield
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(5)
            raise type(error)(f"rank {rank}: {error}") from None
        raise


def wrap(model: nn.Module, blocks: nn.ModuleList, world: World, mode: str, compiled: bool) -> nn.Module:
    """
    The model on its device, for training on all ranks: replicated with DDP, or its blocks and the rest sharded with
    FSDP; and torch.compiled, if asked for.
    """
    several = world.size > 1
    if several and mode == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(world.device.partition(":")[0], (world.size,))
        # Block by block from the CPU to the device, which never has to hold the whole model.
        if sum(len(list(b.parameters())) for b in blocks) == len(list(blocks.parameters())):
            for block in blocks:
                fully_shard(block, mesh=mesh)
        # else blocks share a parameter (mla_share_latent), which can have one owner only: all are gathered together
        fully_shard(model, mesh=mesh)
    model.to(world.device)
    net = torch.compile(model) if compiled else model
    if several and mode == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        net = DistributedDataParallel(
            net, device_ids=[world.device] if world.device.startswith("cuda:") else None, gradient_as_bucket_view=True
        )
        # The only buffers are tables of rotations, the same everywhere: no need to exchange them before every forward.
        net.broadcast_buffers = False
    return net


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


def whole(value: Any, keep: bool = True) -> Any:
    """
    A state dict whose sharded tensors are gathered, on the CPU; all ranks must call it together. keep=False: take part,
    and hold on to none of them.
    """
    if isinstance(value, dict):
        return {k: whole(v, keep) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(v, keep) for v in value]
    if hasattr(value, "full_tensor"):
        gathered = value.full_tensor()
        return gathered.cpu() if keep else None
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
