"""
One process or several: ranks and their devices, signals, DDP or FSDP around a model, and the full
tensors of a sharded one for checkpoints. With one process nothing is exchanged.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from nanomla.errors import SIGNALS, UsageError, UserError, printable, say
from nanomla.signals import raise_stopped

TORCHRUN = os.getppid()  # under torchrun, which may be gone by the time a World is made


class World:
    """
    The processes of a run: this one has number `rank` of `size`, and `device`.

    device: auto, cpu, cuda, cuda:N or mps. backend: auto, nccl or gloo. The numbers come from
    torchrun's RANK, LOCAL_RANK and WORLD_SIZE; `is_main` is True on rank 0. As a context manager it
    joins the process group and leaves it.
    Raises UsageError for a device or backend that does not work here.
    """

    def __init__(self, device: str, backend: str) -> None:
        self.rank, self.size = _rank(), _number("WORLD_SIZE", 1, least=1)
        if self.rank >= self.size:
            raise UsageError(f"RANK={self.rank} in the environment is not below its WORLD_SIZE")
        self.is_main, self.left, self.watch = self.rank == 0, threading.Event(), None
        self.device = resolve_device(device)
        if self.device == "cuda" and "LOCAL_RANK" in os.environ:
            local, gpus = _number("LOCAL_RANK", 0), torch.cuda.device_count()
            if local >= gpus:
                there = f"this machine's {gpus} GPU{'s' * (gpus > 1)}"
                raise UsageError(f"--nproc_per_node is more than {there}")
            self.device = f"cuda:{local}"
        self.device_type = self.device.partition(":")[0]
        if self.device == "mps" and self.size > 1:
            raise UsageError("several processes cannot share mps; use --device=cpu, or one process")
        on_cuda = self.device_type == "cuda"
        self.backend = ("nccl" if on_cuda else "gloo") if backend == "auto" else backend
        if self.backend == "nccl" and not on_cuda and self.size > 1:
            raise UsageError(
                f"--backend=nccl exchanges between GPUs only, this run is on {self.device}; "
                "use --backend=gloo"
            )

    def __enter__(self) -> Self:
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)
        if self.size > 1:
            # NCCL is told the device, because it would otherwise guess one at the first barrier.
            known = self.backend == "nccl" and ":" in self.device
            device = torch.device(self.device) if known else None
            if "TORCHELASTIC_RUN_ID" in os.environ:
                how = {"args": [self.left], "daemon": True}
                self.watch = threading.Thread(target=_end_with_torchrun, **how)
                self.watch.start()
            try:
                dist.init_process_group(backend=self.backend, device_id=device)
            except (ValueError, RuntimeError) as error:  # a missing address, a port in use
                reason = str(error).partition("\n")[0]
                raise UserError(f"the {self.size} processes cannot be joined ({reason})") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.left.set()
        if self.watch is not None:
            self.watch.join(timeout=1)
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
    return _number("RANK", 0)


def _number(name: str, default: int, least: int = 0) -> int:
    """A number that torchrun puts into the environment. Raises UsageError for anything else."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise UsageError(f"{name}={text!r} in the environment must be a whole number from {least}")
    return int(text)


def _end_with_torchrun(left: threading.Event) -> None:
    """
    Stop this process when torchrun has been killed: by SIGTERM, and after 20 seconds at once. Ends
    when `left` is set, as a thread that still runs while Python ends can abort the process.
    """
    while os.getppid() == TORCHRUN:
        if left.wait(0.5):
            return
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
    os._exit(128 + signal.SIGTERM)


def print0(*lines: str) -> None:
    """Print lines on rank 0, above its progress bar, and flush them."""
    if _rank() == 0:
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


class StopSignals:
    """
    A context in which a first SIGINT, SIGTERM or SIGHUP only sets `received`; a second one stops at
    once. Signals that the process was started to ignore, as nohup does, stay ignored.

    announce: print a line at the first one.
    """

    def __init__(self, announce: bool) -> None:
        self.received = 0  # the number of the signal
        self.announce = announce

    def __enter__(self) -> Self:
        self.handlers = {}  # to be put back
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: Any) -> None:
        if self.received:
            raise_stopped(number)
        self.received = number
        if self.announce:
            # The signal may have interrupted a print, which does not allow another one inside it.
            line = "stopping after this iteration; once more stops at once, without a checkpoint"
            with contextlib.suppress(OSError):
                os.write(2, f"\n{line}\n".encode())

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def resolve_device(device: str) -> str:
    """'auto' as cuda, mps or cpu. Raises UsageError for a device this machine does not have."""
    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return next(name for name in has if has[name])
    kind, _, index = device.partition(":")
    known = bool(has.get(kind)) and (not index or index.isdigit())
    if known and index and kind == "cuda":
        known = int(index) < torch.cuda.device_count()
    if not known:
        here = ", ".join(name for name in has if has[name])
        raise UsageError(f"--device={device}: not on this machine, which has {here}")
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
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if device_type == "cpu" and n_embd >= 256:
        has = torch.cpu.get_capabilities()
        return "bfloat16" if has.get("amx_bf16") or has.get("avx512_bf16") else "float32"
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
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


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
        full = state.full_tensor()
        return full.cpu() if keep else None
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict of full tensors into an optimizer whose parameters may be sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {**state, "state": dict(state["state"])}
    for i, values in state["state"].items():
        p = params[i]
        if isinstance(p, DTensor):
            state["state"][i] = {
                name: distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
                if value.shape == p.shape
                else value
                for name, value in values.items()
            }
    optimizer.load_state_dict(state)
