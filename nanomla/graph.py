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

EAGER = 4  # steps before a graph is captured: the first compile kernels, and short texts need none


class DecodingStep:
    """
    model(token, cache=cache) for one new token of every row, in evaluation mode and without
    gradients: token (B, 1) to logits (B, 1, V), which the next call overwrites once captured.

    capture: after EAGER calls, repeat a CUDA graph, but not under autocast, which keeps converted
    weights elsewhere. The kernels and their order are the same without it, and so is every number.
    """

    def __init__(self, model: GPT, cache: Cache, capture: bool = True) -> None:
        self.model, self.cache, device = model, cache, cache.tensors[0].device
        self.token = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(cache.batch_size, dtype=torch.int64, device=device)
        plain = device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        self.device, self.capture, self.calls = device, capture and plain, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    @staticmethod
    def helps(model: GPT, cache: Cache) -> bool:
        """
        Whether this is faster than the model alone: where the kernel takes what the cache holds, as
        others read all max_len rows of it; and a state's is always.
        """
        gpu, dtype = on_gpu(cache.tensors[0].device), model.lm_head.weight.dtype
        if gpu is None or cache.max_len == 1:
            return False
        scales = 2 if cache.dtype == torch.int8 else 1  # between the rows
        q = torch.empty(0, dtype=torch.promote_types(dtype, cache.dtype))  # as attend computes
        layers = [cache.of_layer(i)[::scales] for i in range(model.config.n_layer)]
        return not cache.grows or all(gpu.supports(q, *rows) for rows in layers)

    @torch.inference_mode()
    def __call__(self, token: Tensor) -> Tensor:
        self.cache.check(self.model.config, token.size(0), 1, self.device)
        self.cache.truncate(self.cache.pos)  # a pass that was interrupted leaves nothing
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
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
            back = torch.cuda.stream(torch.cuda.current_stream(self.device))  # also if it fails
            how = {"stream": stream, "capture_error_mode": "thread_local"}
            with torch.cuda.device(self.device), back, torch.cuda.graph(graph, **how):
                self.logits = self._step()
        except RuntimeError as error:
            self.capture = False
            warn0(f"decoding goes on without a CUDA graph: {str(error).splitlines()[0]}")
        else:
            self.graph = graph
