"""
What attention keeps of the tokens that it has seen.

A layer's cache is made, written and read by its attention. A GPT's Cache is the list of them, and
their one position: the caller owns it, and model(idx, cache=cache) goes on from what it holds.

Letters: B sequences, T new tokens, S tokens in all.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanomla.checks import require
from nanomla.kernels import Quantized, quantise

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """The name that a flag has for it: float32."""
    return str(dtype).removeprefix("torch.")


class Buffer:
    """
    Numbers of every token, (B, heads, max_len, width), in a floating dtype or as 8-bit integers
    with one float16 scale per token and head.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensors = [torch.zeros(shape, dtype=dtype, device=device)]
        if dtype == torch.int8:
            self.tensors.append(torch.zeros(*shape[:3], 1, dtype=torch.float16, device=device))

    def write(self, new: Tensor, at: slice | Tensor) -> None:
        """Put new (B, heads, T, width) at these positions, a slice or (B, T)."""
        if len(self.tensors) == 1:
            put(self.tensors[0], new, at)
            return
        for tensor, part in zip(self.tensors, quantise(new), strict=True):
            put(tensor, part, at)

    def read(self, end: int) -> Tensor | Quantized:
        """The first `end` tokens, uncopied."""
        if len(self.tensors) == 1:
            return self.tensors[0][:, :, :end]
        values, scale = self.tensors
        return Quantized(values[:, :, :end], scale[:, :, :end])


def put(tensor: Tensor, new: Tensor, at: slice | Tensor) -> None:
    """Write new (B, heads, T, width) into tensor (B, heads, max_len, width)."""
    if isinstance(at, slice):
        tensor[:, :, at] = new
    else:
        sequence = torch.arange(len(at), device=at.device)[:, None]
        tensor[sequence, :, at] = new.transpose(1, 2).to(tensor.dtype)


class LayerCache:
    """
    One layer's past tokens, in one buffer or two, such as keys and values. It holds pos tokens of
    every sequence or, where their numbers differ, lengths (B,), whose largest is pos.

    sizes: (heads, width) of the one or two buffers. Raises ValueError for a dtype not in DTYPES.
    """

    DTYPES = (*FLOATS, torch.int8)
    grows = True  # with every token; else it is a state of constant size

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        names = ", ".join(dtype_name(allowed) for allowed in self.DTYPES)
        require(dtype in self.DTYPES, "dtype", dtype, f"one of {names}")
        self.batch_size = batch_size
        self.max_len = max_len
        self.dtype = dtype
        self.pos = 0
        self.lengths: Tensor | None = None
        self.real: Tensor | None = None  # see expect
        self.buffers = []
        for heads, width in sizes:
            self.buffers.append(Buffer((batch_size, heads, max_len, width), dtype, device))

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept, each (B, heads, max_len, width)."""
        return [tensor for buffer in self.buffers for tensor in buffer.tensors]

    def append(
        self, keys: Tensor, values: Tensor | None = None
    ) -> tuple[Tensor | Quantized, Tensor | Quantized | None]:
        """
        Write keys and, where there is a second buffer, values of T new tokens, (B, heads, T, width)
        each. Returns those of all S tokens, uncopied. advance(T) then counts the new ones as held.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("a cache is for inference; use torch.no_grad or inference_mode")
        T = keys.size(2)
        self.require_room(T)
        at = self.positions(T)
        self.buffers[0].write(keys, at)
        if values is not None:
            self.buffers[1].write(values, at)
            values = self.buffers[1].read(self.pos + T)
        return self.buffers[0].read(self.pos + T), values

    def require_room(self, T: int) -> None:
        """Raise ValueError if T more tokens cannot be written."""
        if self.pos + T > self.max_len:
            full = f"{self.pos} tokens held, {T} to add, max_len={self.max_len}"
            raise ValueError(f"the cache is full: {full}; truncate it, or make a longer one")

    def positions(self, T: int) -> slice | Tensor:
        """Those of T new tokens: the same for all sequences, or (B, T)."""
        if self.lengths is None:
            return slice(self.pos, self.pos + T)
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def expect(self, real: Tensor | None) -> None:
        """
        Of the next pass's tokens of sequence b, the first real[b] are real and the rest is padding;
        None: all are real. advance counts only real ones, and the next pass overwrites the others.
        """
        self.real = real
        if real is not None and self.lengths is None:
            self.lengths = torch.full_like(real, self.pos)

    def advance(self, T: int) -> None:
        """Count T more tokens as held, or the real ones among them."""
        room = self.max_len - self.pos
        require(0 <= T <= room, "T", T, f"from 0 to {room}")
        if self.real is not None:
            self.lengths = self.lengths + self.real
            self.pos = int(self.lengths.max())
            self.real = None
            return
        self.pos += T
        if self.lengths is not None:
            self.lengths = self.lengths + T

    def truncate(self, pos: int) -> None:
        """Forget all but the first pos tokens. Raises ValueError for more than are held."""
        require(0 <= pos <= self.pos, "pos", pos, f"from 0 to the {self.pos} tokens held")
        self.pos = int(pos)
        self.real = None
        if pos == 0:
            self.lengths = None
        elif self.lengths is not None:
            self.lengths = self.lengths.clamp(max=pos)

    def sequences(self, first: int, count: int) -> "LayerCache":
        """A cache of so many sequences from the first on, in the same memory, with its own pos."""
        view = copy.copy(self)
        view.batch_size = count
        if self.lengths is not None:
            view.lengths = self.lengths[first : first + count]
        view.buffers = []
        for buffer in self.buffers:
            part = copy.copy(buffer)
            part.tensors = [tensor[first : first + count] for tensor in buffer.tensors]
            view.buffers.append(part)
        return view

    def copy_from(self, one: "LayerCache") -> None:
        """Hold in every sequence what a cache of one sequence holds."""
        self.pos = one.pos
        for tensor, source in zip(self.tensors, one.tensors, strict=True):
            tensor[:, :, : one.pos] = source[:, :, : one.pos].clone()  # they may be the same

    def sizes(self) -> list[tuple[int, ...]]:
        """(heads, width) of what is kept of a token."""
        return [(tensor.size(1), tensor.size(3)) for tensor in self.tensors]

    def nbytes_at(self, n: int) -> int:
        """Bytes that n tokens of all sequences take."""
        return sum(tensor.nbytes // self.max_len * n for tensor in self.tensors)


class Cache:
    """
    What a GPT keeps of the tokens it has seen: a cache for every layer, all at one position. Only
    its methods change that.
    """

    def __init__(self, layers: Sequence[LayerCache], made_for: Any) -> None:
        self.layers = layers
        self.made_for = made_for  # the GPTConfig of the model that made it
        self.batch_size = layers[0].batch_size
        self.max_len = layers[0].max_len
        self.dtype = layers[0].dtype
        self.grows = layers[0].grows

    @property
    def pos(self) -> int:
        """How many tokens are held; of sequences of unequal lengths, by the longest."""
        return self.layers[0].pos

    @property
    def lengths(self) -> Tensor | None:
        """(B,) tokens held of every sequence, where they differ."""
        return self.layers[0].lengths

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept, layer after layer."""
        return [tensor for layer in self.layers for tensor in layer.tensors]

    @property
    def device(self) -> torch.device:
        """Where it is kept."""
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all layers and sequences, as allocated."""
        return self.nbytes_at(self.max_len)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token of one sequence takes in all layers; 0 for a state."""
        return (self.nbytes_at(1) - self.nbytes_at(0)) // self.batch_size

    def nbytes_at(self, n: int) -> int:
        """Bytes that n tokens take in all layers and sequences."""
        return sum(layer.nbytes_at(n) for layer in self.layers)

    def positions(self, T: int) -> slice | Tensor:
        """Those of T new tokens: the same for all sequences, or (B, T)."""
        return self.layers[0].positions(T)

    def expect(self, real: Tensor | None) -> None:
        """Of the next pass's tokens of sequence b only the first real[b] are real; None: all."""
        for layer in self.layers:
            layer.expect(real)

    def advance(self, T: int) -> None:
        """Count T more tokens as held, or the real ones, after every layer has written them."""
        for layer in self.layers:
            layer.advance(T)

    def truncate(self, pos: int) -> None:
        """Forget all but the first pos tokens; a state can only forget all."""
        for layer in self.layers:
            layer.truncate(pos)

    def rewind(self, pos: int) -> None:
        """Forget all but the first pos tokens, or all of them where that is impossible."""
        if pos < self.pos:
            if not self.grows:
                pos = 0
            self.truncate(pos)

    def sequences(self, first: int, count: int) -> "Cache":
        """A cache of so many sequences from the first on, in the same memory, with its own pos."""
        layers = [layer.sequences(first, count) for layer in self.layers]
        return Cache(layers, self.made_for)

    def set_lengths(self, lengths: Tensor, longest: int) -> None:
        """
        Let every sequence hold a number of tokens of its own, lengths (B,). longest is the largest
        of them: given as a number, it need not be read from the device.
        """
        for layer in self.layers:
            layer.lengths = lengths
            layer.pos = longest

    def row(self, i: int) -> "Cache":
        """A cache for sequence i that shares this one's memory; it has its own pos."""
        require(i in range(self.batch_size), "i", i, f"from 0 to {self.batch_size - 1}")
        return self.sequences(i, 1)

    def copy_from(self, one: "Cache") -> None:
        """Hold in every sequence what a cache of one sequence holds."""
        for layer, source in zip(self.layers, one.layers, strict=True):
            layer.copy_from(source)

    def broadcast_row(self, i: int) -> None:
        """Copy the tokens held in sequence i to all."""
        self.copy_from(self.row(i))

    def sizes(self) -> list[list[tuple[int, ...]]]:
        """The sizes of what every layer keeps."""
        return [layer.sizes() for layer in self.layers]

    def check(self, B: int, T: int, device: torch.device) -> None:
        """Raise ValueError if T tokens of B sequences cannot be written, before any are."""
        if self.device != device:
            raise ValueError(f"the cache is on {self.device}, the model on {device}")
        if self.batch_size != B:
            raise ValueError(f"the cache has {self.batch_size} rows, the input {B}; make another")
        self.layers[0].require_room(T)

