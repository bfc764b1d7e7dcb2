"""Exact against randomized factors of one matrix: time and error."""

import torch

from model import factorise
from tools.bench.timing import Rows, Timed, alternate, table


def measure(device: str) -> Rows:
    """One 1600 x 6400 matrix to rank 64: with a decaying spectrum, and as drawn at the start."""
    U = torch.linalg.qr(torch.randn(1600, 1600, device=device))[0]
    V = torch.linalg.qr(torch.randn(6400, 1600, device=device))[0]
    decaying = (U * 0.99 ** torch.arange(1600, device=device)) @ V.T
    matrices = {"decaying spectrum": decaying, "normal random": torch.randn_like(decaying) * 0.02}
    rows = []
    for kind, W in matrices.items():
        factors = {}

        def run(method: str, W: torch.Tensor = W, factors: dict = factors) -> None:
            factors[method] = factorise(W[None], 64, method)

        entries = [
            Timed("exact", lambda run=run: run("exact")),
            Timed("randomized", lambda run=run: run("randomized")),
        ]
        took = alternate(entries, 1, device)
        for method, (down, up, _) in factors.items():
            seconds = took[method].seconds
            error = float((W - up[0] @ down).norm() / W.norm())
            row = {"matrix": kind, "method": method, "seconds": f"{seconds:.2f}"}
            row["relative error"] = f"{error:.5f}"
            row["exact / this"] = f"{took['exact'].seconds / seconds:.1f}"
            rows.append(row)
    return table("1600 x 6400 to rank 64, computed in float64", rows)
