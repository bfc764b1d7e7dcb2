"""Whether a device has room, asked before a model, a batch or a cache is made."""

import psutil
import torch

from nanomla.errors import UserError


def free_memory(device: str | torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that cannot be found out."""
    device = torch.device(device)
    if device.type == "cuda":  # what torch holds but does not use is free, too
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu":
        return psutil.virtual_memory().available
    return None


def require_memory(nbytes: int, what: str, device: str | torch.device, remedy: str) -> None:
    """Raise UserError if a device has less memory free than that."""
    free = free_memory(device)
    if free is not None and nbytes > free:
        needs = f"{what} needs {in_units(nbytes)}, {in_units(free)} are free"
        raise UserError(f"{needs}; {remedy}")


def in_units(nbytes: int) -> str:
    """Bytes for people to read: 4.0 TB."""
    for power, unit in enumerate(("bytes", "kB", "MB", "GB", "TB", "PB", "EB")):
        if nbytes < 1000 ** (power + 1):
            digits = min(power, 1)
            return f"{nbytes / 1000**power:.{digits}f} {unit}"
    return "over 1,000 EB"
