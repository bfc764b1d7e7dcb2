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
        entries = [
            Timed("exact", lambda W=W: factorise(W[None], 64, "exact")),
            Timed("randomized", lambda W=W: factorise(W[None], 64, "randomized")),
        ]
        took = alternate(entries, 1, device)
        for entry in entries:
            down, up, _ = entry.run()
            error = float((W - up[0] @ down).norm() / W.norm())
            row = {"matrix": kind, "method": entry.name, "seconds": f"{entry.seconds:.2f}"}
            row["relative error"] = f"{error:.5f}"
            row["exact / this"] = f"{took['exact'].seconds / entry.seconds:.1f}"
            rows.append(row)
    return table("1600 x 6400 to rank 64, computed in float64", rows)
