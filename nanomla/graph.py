"""
A decoding step at fixed addresses, which a GPU can repeat by itself.

A step of a small model is some hundred kernels, which take a GPU less time than Python takes to
launch them. Captured in a CUDA graph they are launched at once. What a graph does is fixed, so all
that changes from step to step is kept in tensors: the token, how many tokens every row holds, and
the cache, all of which every step may look at.
"""

import torch
from torch import Tensor

from model import GPT, Cache
from nanomla.distributed import warn0
from nanomla.kernels import on_gpu

EAGER = 2  # steps before a graph is captured: the first compile kernels and reserve memory


class DecodingStep:
    """
    model(token, cache=cache) for one new token of every row, in evaluation mode and without
    gradients: token (B, 1) to logits (B, 1, V), which the next call may overwrite.

    capture: from the third call on, repeat a CUDA graph. The kernels and their order are the same
    without it, and so is every number.
    """

    def __init__(self, model: GPT, cache: Cache, capture: bool = True) -> None:
        self.model, self.cache, device = model, cache, cache.tensors[0].device
        self.token = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(cache.batch_size, dtype=torch.int64, device=device)
        self.device, self.capture, self.calls = device, capture and device.type == "cuda", 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    @staticmethod
    def helps(model: GPT, cache: Cache) -> bool:
        """Whether this is faster than the model alone: where a kernel reads no row in vain."""
        gpu, q = on_gpu(cache.tensors[0].device), model.lm_head.weight.new_empty(0)
        if gpu is None or cache.max_len == 1:
            return False
        scales = 2 if cache.dtype == torch.int8 else 1  # between the rows
        layers = [cache.of_layer(i)[::scales] for i in range(model.config.n_layer)]
        return not cache.grows or all(gpu.supports(q, *rows) for rows in layers)

    @torch.inference_mode()
    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        self.lengths.fill_(self.cache.pos)
        self.calls += 1
        if self.capture and self.graph is None and self.calls > EAGER:
            self._try_to_capture()
        if self.graph is None:
            self.logits = self._step()
        else:
            self.graph.replay()
        self.cache.advance(1)
        return self.logits

    def _step(self) -> Tensor:
        """The step itself, by a view of the cache that does not know how many tokens there are."""
        return self.model(self.token, cache=self.cache.rows(self.lengths))[0]

    def _try_to_capture(self) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                self.logits = self._step()
        except RuntimeError as error:
            self.capture = False
            warn0(f"decoding goes on without a CUDA graph: {str(error).splitlines()[0]}")
        else:
            self.graph = graph
