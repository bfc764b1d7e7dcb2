"""What several test files need: a tiny prepared dataset, and scripts run as a user runs them."""

import contextlib
import dataclasses
import importlib
import io
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from nanomla import checkpoint
from nanomla.dataset import Meta, write_dataset
from nanomla.errors import run_script
from nanomla.kernels import dequantise, reference
from nanomla.kernels.reference import by_group, by_head
from nanomla.prepare import encode_chars

# Processes that the tests start would inherit an ignored SIGINT or SIGHUP, as a shell gives to
# `... &` and nohup to all.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # not on Windows
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if not torch.cuda.is_available():  # before anything imports Triton, which then interprets its code
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # tiny matrices gain nothing from more, and a busy machine loses much

ROOT = Path(__file__).resolve().parents[1]

# Unequal sizes, so that a mix-up cannot cancel: nh 4, hs 6, L 7, r 2.
TINY = {"block_size": 16, "vocab_size": 23, "n_layer": 2, "n_head": 4, "n_embd": 24}
TINY_MLA = {**TINY, "use_mla": True, "mla_latent_dim": 7, "pos_emb": "rope", "mla_rope_dim": 2}

KINDS = {  # every attention, in every form of what it caches
    "MHA": {},
    "GQA, rotary": {"pos_emb": "rope", "n_kv_head": 2, "head_dim": 8},
    "MHA + SVD": {"use_svd": True, "svd_rank": 3},
    "MQA + SVD": {"n_kv_head": 1, "use_svd": True, "svd_rank": 5},
    "MLA": TINY_MLA,
    "MLA, no positions": {**TINY_MLA, "mla_rope_dim": 0},
    "MLA, groups": {**TINY_MLA, "mla_groups": 2, "mla_latent_dim": 5},
    "split latents": {**TINY_MLA, "mla_split": True},
    "split latents, groups": {**TINY_MLA, "mla_split": True, "mla_groups": 2, "mla_latent_dim": 5},
    "split latents + SVD": {
        **TINY_MLA, "mla_split": True, "mla_groups": 2, "mla_latent_dim": 5, "mla_rope_dim": 0,
        "use_svd": True, "svd_rank": 3,
    },
    "MLA + SVD, by layer": {**TINY_MLA, "mla_latent_dim": (5, 8), "use_svd": True, "svd_rank": 2},
    "rotary latent": {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8, "mla_rope_dim": None},
    "rotary latent, groups": {**TINY_MLA, "mla_rope": "latent", "mla_groups": 2},
    "GQA, gate and norms": {
        "pos_emb": "rope", "n_kv_head": 2, "attn_gate": True, "qk_norm": True,
    },
    "MLA, gate and norms": {**TINY_MLA, "attn_gate": True, "qk_norm": True},
    "rotary latent + SVD, gate and norms": {
        **TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8, "mla_rope_dim": 4,
        "attn_gate": True, "qk_norm": True, "use_svd": True, "svd_rank": 3,
    },
    "MLA, layers share a cache": {**TINY_MLA, "mla_share_cache": 2},
    "rotary latent, layers share a cache": {
        **TINY_MLA, "mla_rope": "latent", "mla_groups": 2, "mla_share_cache": 3,
    },
    "latent tokens": {"use_latent_tokens": True, "n_latent_tokens": 5},
}
GROWING = [kind for kind in KINDS if kind != "latent tokens"]  # their caches, with every token


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder with a char dataset of 6,000 tokens with some structure to learn."""
    folder = tmp_path_factory.mktemp("dataset")
    draw = random.Random(1)
    words = ["to be", "or not", "that is", "the question", "whether", "'tis nobler", "in the mind"]
    text = "".join(draw.choice(words) + draw.choice([" ", "\n", ", "]) for _ in range(800))[:6000]
    chars = "".join(sorted(set(text)))
    ids = encode_chars(text, chars)
    meta = Meta(len(chars), {"kind": "char", "chars": chars}, source="test", sha256="")
    meta.split_bytes = {"train": 5400, "val": 600}
    write_dataset(folder, {"train": [ids[:5400]], "val": [ids[5400:]]}, meta)
    return folder


def tiny_config(**changes) -> GPTConfig:
    return GPTConfig(**{**TINY, **changes})


def randomise(model, std=0.3):
    """Weights large enough that every path matters to the output."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


def make(kind: str | dict, **changes) -> GPT:
    """A tiny model of a kind, or with these settings, whose weights are large."""
    settings = KINDS[kind] if isinstance(kind, str) else kind
    return randomise(GPT(tiny_config(**{**settings, **changes})))


def all_logits(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Logits of every position of idx (B, T), without dropout: (B, T, V)."""
    with torch.no_grad():
        return model.eval()(idx, all_logits=True)[0]


def save_model(folder: Path, model: GPT, best: bool = False, **fields) -> None:
    """Write a run's checkpoint of a model; fields are those of Checkpoint."""
    args = dataclasses.asdict(model.config)
    checkpoint.save(folder, checkpoint.Checkpoint(model.state_dict(), args, **fields), best)


@contextlib.contextmanager
def torch_threads(n: int):
    """Run with n of torch's threads, by which the fast paths cut their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reference_attend(q, k, v=None, *, scale, beside=None, lengths=None) -> torch.Tensor:
    """What nanomla.kernels.attend should give for these arguments, by the reference in float64."""
    k, v, beside = (None if t is None else dequantise(t, torch.float64) for t in (k, v, beside))
    grouped = by_group(q.double(), k.size(1))
    out = reference.attend(grouped, k, v, q.size(2), scale, beside, lengths)
    return by_head(out, q.size(2))


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that any operation makes, views aside."""

    def __init__(self, floats_only: bool = False) -> None:
        super().__init__()
        self.numbers = 0
        self.floats_only = floats_only

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and (t.is_floating_point() or not self.floats_only):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.itemsize)
        return out


def run(
    script: str, *args: str, fresh: bool = False, timeout: float = 120
) -> subprocess.CompletedProcess:
    """
    A script as a user starts it: "train.py", "tools.bench" (with python -m) or a path.
    fresh: in a process of its own, which takes seconds longer.
    """
    argv = [script, *map(str, args)]
    if fresh or "/" in script:
        command = [sys.executable, *argv]
        if not script.endswith(".py"):
            command.insert(1, "-m")
        return subprocess.run(
            command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=timeout
        )
    module = importlib.import_module(script.removesuffix(".py"))
    if not hasattr(module, "main"):  # a package
        module = importlib.import_module(f"{script}.__main__")
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    arguments = sys.argv
    sys.argv = argv
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(module.main)
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = arguments
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


# A run that takes a second or two.
QUICK = [
    "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
    "--gradient_accumulation_steps=1", "--eval_interval=10", "--eval_iters=2", "--warmup_iters=2",
    "--learning_rate=1e-2", "--device=cpu",
]


def fails_with_one_line(done: subprocess.CompletedProcess, status: int, *words: str) -> bool:
    """Exit status and a single line on stderr that holds the words."""
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("warning:")]
    assert done.returncode == status, (done.returncode, done.stderr)
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), (words, lines[0])
    return True
