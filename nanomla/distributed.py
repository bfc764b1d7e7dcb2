"""
One process or several: ranks and their devices, signals, DDP or FSDP around a model, and the full
tensors of a sharded one for checkpoints. With one process nothing is exchanged.
"""

import contextlib
import ctypes
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

# Imported when there is a process group, its functions would have the group as a default value. The
# group, and threads of gloo, would then still be there when Python ends, which can abort.
import torch.distributed.nn
from torch import Tensor, nn
from tqdm import tqdm

from nanomla.errors import (
    SIGNALS,
    STDERR,
    STDOUT,
    UsageError,
    UserError,
    outliving,
    printable,
    say,
    silence,
)
from nanomla.signals import handled, raise_stopped

SIGNAL_OF_A_DEAD_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class World:
    """
    The processes of a run: this one has number `rank` of `size`, and `device`.

    device: auto, cpu, cuda, cuda:N or mps. backend: auto, nccl or gloo. The numbers come from
    torchrun's RANK, LOCAL_RANK and WORLD_SIZE; `is_main` is True on rank 0. As a context manager it
    joins the process group and leaves it.
    Raises UsageError for a device that does not work here.
    """

    def __init__(self, device: str, backend: str) -> None:
        self.rank = _rank()
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.is_main = self.rank == 0
        self.device = resolve_device(device)
        if self.device == "cuda" and "LOCAL_RANK" in os.environ:
            local_rank = int(os.environ["LOCAL_RANK"])
            if local_rank >= torch.cuda.device_count():
                gpus = f"this machine's number of GPUs, {torch.cuda.device_count()}"
                raise UsageError(f"--nproc_per_node is more than {gpus}")
            self.device = f"cuda:{local_rank}"
        self.device_type = self.device.partition(":")[0]
        if self.device == "mps" and self.size > 1:
            raise UsageError("several processes cannot share mps; use --device=cpu, or one process")
        self.backend = backend
        if backend == "auto":
            self.backend = "nccl" if self.device_type == "cuda" else "gloo"

    def __enter__(self) -> Self:
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)
        if self.size > 1:
            device = None
            if self.backend == "nccl" and ":" in self.device:
                # NCCL would otherwise guess the device at the first barrier.
                device = torch.device(self.device)
            if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
                # SIGTERM when torchrun is gone, which also kill -9 may have ended.
                ctypes.CDLL(None).prctl(SIGNAL_OF_A_DEAD_PARENT, signal.SIGTERM)
            try:
                dist.init_process_group(backend=self.backend, device_id=device)
            except (ValueError, RuntimeError) as error:  # a missing address, a port in use
                reason = str(error).partition("\n")[0]
                raise UserError(f"the {self.size} processes cannot be joined ({reason})") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error other ranks may wait in an exchange; closing the group would wait for them.
        if self.size > 1 and kind in (None, SystemExit):
            dist.destroy_process_group()

    def sum(self, *values: Tensor | float) -> list[float]:
        """Each value summed over all ranks, in one exchange."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.size > 1:
            total = total.to(self.device if self.backend == "nccl" else "cpu")
            dist.all_reduce(total)
        return total.tolist()

    def peak_memory(self) -> str:
        """The most GPU memory this rank has used, as ", 1.25 GiB of GPU memory"; "" on a CPU."""
        if self.device_type != "cuda":
            return ""
        return f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory"

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def print0(*lines: str) -> None:
    """Print lines on rank 0, above its progress bar, and flush them, if anybody can read them."""
    if _rank() != 0:
        return
    with outliving(sys.stdout):
        for line in lines:
            tqdm.write(printable(line), file=sys.stdout)
        sys.stdout.flush()


def warn0(line: str) -> None:
    """Print a warning on rank 0's stderr."""
    if _rank() == 0:
        say(f"warning: {line}", sys.stderr)


@contextlib.contextmanager
def report_errors_once() -> Iterator[None]:
    """
    Let rank 0 alone report a UserError that all ranks find, such as a mistyped flag.

    The other ranks wait for five seconds, in which rank 0 exits and torchrun ends them. If a rank
    still runs after that, the error is its own, and it raises it with its number in front.
    """
    try:
        yield
    except UserError as error:
        rank = _rank()
        if rank:
            time.sleep(5)
            raise type(error)(f"rank {rank}: {error}") from None
        raise


class StopSignals(contextlib.ExitStack):
    """
    A context in which a first SIGINT, SIGTERM or SIGHUP only sets `received`; a second one stops at
    once. Signals that the process was started to ignore, as nohup does, stay ignored.

    announce: print a line at the first one.
    """

    def __init__(self, announce: bool) -> None:
        super().__init__()
        self.received = 0  # the number of the signal
        self.announce = announce
        self.enter_context(handled(self._note, *SIGNALS))

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            raise_stopped(number)
        self.received = number
        if signal.Signals(number).name == "SIGHUP":
            # The terminal is gone; writing to it would be an error before the checkpoint is saved.
            silence(*(s for s in (STDOUT, STDERR) if stat.S_ISCHR(os.fstat(s).st_mode)))
        if self.announce:
            # The signal may have interrupted a print, which does not allow another one inside it.
            line = "stopping after this iteration; once more stops at once, without a checkpoint"
            with contextlib.suppress(OSError):
                os.write(STDERR, f"\n{line}\n".encode())


def resolve_device(device: str) -> str:
    """'auto' as cuda, mps or cpu. Raises UsageError for a device this machine does not have."""
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present.insert(0, "cuda")
    if device == "auto":
        return present[0]
    numbered = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device not in present + numbered:
        raise UsageError(f"--device={device}: not on this machine, which has {', '.join(present)}")
    return device


def resolve_dtype(dtype: str, device_type: str, n_embd: int) -> str:
    """
    'auto' as the dtype of matrix products that runs well on a device, for a model n_embd wide.

    On CUDA that is bfloat16, or float16 on GPUs without bfloat16. On a CPU with bfloat16
    instructions it is bfloat16 from a width of 256 on: on two cores of a Zen 4 it takes 0.65 of
    float32's time at width 384, and more than float32's time at width 128. Elsewhere it is float32.
    """
    if dtype != "auto":
        return dtype
    if device_type == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bfloat16"
        return "float16"
    if device_type == "cpu" and n_embd >= 256:
        instructions = torch.cpu.get_capabilities()
        if instructions.get("amx_bf16") or instructions.get("avx512_bf16"):
            return "bfloat16"
    return "float32"


def wrap(
    model: nn.Module, blocks: nn.ModuleList, world: World, mode: str, compiled: bool
) -> nn.Module:
    """
    Put a model on its device, ready to be trained on all ranks.

    mode: 'ddp' replicates the model on every rank, 'fsdp' shards its blocks and the rest over the
    ranks; one process needs neither. compiled: torch.compile the model too.
    """
    several = world.size > 1
    if several and mode == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(world.device_type, (world.size,))
        # Sharded block by block, so that the device never holds the full model. Blocks that share a
        # parameter (mla_share_latent) cannot be: it may belong to one sharded module only.
        if sum(len(list(b.parameters())) for b in blocks) == len(list(blocks.parameters())):
            for block in blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to(world.device)
    net = torch.compile(model) if compiled else model
    if several and mode == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        device_ids = [world.device] if world.device.startswith("cuda:") else None
        net = DistributedDataParallel(net, device_ids=device_ids, gradient_as_bucket_view=True)
        # The only buffers are the tables of the rotary positions, the same on every rank. They need
        # not be exchanged before every forward pass.
        net.broadcast_buffers = False
    return net


@contextlib.contextmanager
def gradient_sync(net: nn.Module, now: bool) -> Iterator[None]:
    """
    Exchange the gradients of the backward passes inside only if `now`.

    Gradients add up over the micro-steps of an iteration, so one exchange after the last is enough.
    """
    if hasattr(net, "set_requires_gradient_sync"):  # FSDP
        net.set_requires_gradient_sync(now)
        yield
    elif hasattr(net, "no_sync") and not now:  # DDP
        with net.no_sync():
            yield
    else:
        yield


def full(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded (FSDP), whole on every rank. All ranks must call it together."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    return tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that is the same on all ranks, sharded as `other` is, without an exchange."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def full_state_dict(state: Any, keep: bool = True) -> Any:
    """
    A state dict whose sharded tensors are gathered on the CPU. All ranks must call it together.

    keep=False takes part in the exchange and drops what it receives, for ranks that do not save.
    """
    if isinstance(state, dict):
        return {k: full_state_dict(v, keep) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [full_state_dict(v, keep) for v in state]
    if hasattr(state, "full_tensor"):
        whole = state.full_tensor()
        if keep:
            return whole.cpu()
        return None
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict of full tensors into an optimizer whose parameters may be sharded."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = {}
    for i, values in state["state"].items():
        states[i] = dict(values)
        for name, value in values.items():
            if torch.is_tensor(value) and value.shape == params[i].shape:
                states[i][name] = sharded_like(value.to(params[i].device), params[i])
    optimizer.load_state_dict({**state, "state": states})
