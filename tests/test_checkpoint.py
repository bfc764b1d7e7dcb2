"""Checkpoints survive, or say what is wrong with them. Run: python -m pytest tests/test_checkpoint.py"""

import os
import pickle
import random
import resource
import subprocess
import sys

import pytest
import torch

import checkpoint
from configurator import UserError
from model import GPT
from tests.conftest import ROOT, TINY_MLA, tiny_config


def make(tmp_path, seed=0, **settings):
    torch.manual_seed(seed)
    model = GPT(tiny_config(**settings))
    state = {"model": model.state_dict(), "model_args": model.config.__dict__, "iter_num": seed, "best_val_loss": 1.5}
    checkpoint.save(tmp_path, state, best=seed == 0)
    return model


@pytest.mark.parametrize("settings", [{}, TINY_MLA, {"use_svd": True, "svd_rank": 3}])
def test_round_trip(tmp_path, settings):
    """What was saved comes back bit by bit, also under the names torch.compile and DDP give."""
    model = make(tmp_path, **settings)
    held = checkpoint.load(tmp_path / "ckpt.pt")
    held["model"] = {"_orig_mod.module." + k: v for k, v in held["model"].items()}
    twin, note = checkpoint.build_model(held, "here")
    assert note is None and twin.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_best_and_latest_are_kept_apart(tmp_path):
    """A later save without best leaves best.pt as it was; find prefers what it is told to."""
    make(tmp_path, seed=0)
    make(tmp_path, seed=1)
    assert checkpoint.load(checkpoint.find(tmp_path))["iter_num"] == 1
    assert checkpoint.load(checkpoint.find(tmp_path, prefer_best=True))["iter_num"] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "ckpt.pt"]
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.find(tmp_path / "nowhere")


def test_a_kill_between_the_two_names_endangers_neither(tmp_path):
    """best.pt is linked first; if the run is killed there, the next save must not write into the file they share."""
    make(tmp_path, seed=0)
    os.link(tmp_path / "best.pt", tmp_path / ".ckpt.pt.tmp")
    make(tmp_path, seed=1)
    assert checkpoint.load(tmp_path / "best.pt")["iter_num"] == 0
    assert checkpoint.load(tmp_path / "ckpt.pt")["iter_num"] == 1


def test_damaged_files_are_one_clear_line(tmp_path):
    """Truncated at 20 lengths, random bytes, nothing, a folder: a UserError naming the file every time."""
    make(tmp_path)
    content, draw = (tmp_path / "ckpt.pt").read_bytes(), random.Random(1)
    bad = tmp_path / "bad.pt"
    lengths = [0, 1, len(content) - 1, *(draw.randrange(2, len(content) - 1) for _ in range(17))]
    for piece in [content[:n] for n in lengths] + [draw.randbytes(n) for n in (10, 5000)]:
        bad.write_bytes(piece)
        with pytest.raises(UserError, match="bad.pt") as caught:
            checkpoint.load(bad)
        assert "\n" not in str(caught.value)
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(UserError, match=path.name):
            checkpoint.load(path)


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    """Refused, in torch's format and as a plain pickle."""

    class Hostile:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    torch.save({"model": Hostile(), "model_args": {}}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Hostile()}))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_foreign_checkpoints_are_named(tmp_path):
    """Other keys, another model's weights or settings: what is missing, unknown or of another shape."""
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no model and no model_args"):
        checkpoint.load(tmp_path / "other.pt")
    torch.save({"model": {}, "model_args": {}, "format": 99}, tmp_path / "new.pt")
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(tmp_path / "new.pt")
    make(tmp_path)
    for change, words in (
        ({"n_layer": 3}, "missing"),
        ({"n_layer": 1}, "unknown"),
        ({"n_embd": 32}, "has shape"),
        ({"n_head": 5}, "n_head=5 does not work"),
        ({"n_heads": 4}, "does not know: n_heads"),
    ):
        held = checkpoint.load(tmp_path / "ckpt.pt")
        held["model_args"] = {**held["model_args"], **change}
        with pytest.raises(UserError, match=words):
            checkpoint.build_model(held, "here")


def test_nanogpt_checkpoint_opens(tmp_path):
    """model_args of nanoGPT alone, its compile prefix, its old mask buffers."""
    model = GPT(tiny_config())
    args = {k: getattr(model.config, k) for k in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")}
    state = {"_orig_mod." + k: v for k, v in model.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    saved = {"model": state, "optimizer": {}, "model_args": args, "iter_num": 7, "best_val_loss": torch.tensor(2.0), "config": {}}
    torch.save(saved, tmp_path / "ckpt.pt")
    twin, _ = checkpoint.build_model(checkpoint.load(tmp_path / "ckpt.pt"), "here")
    idx = torch.arange(10)[None]
    assert torch.equal(model(idx, idx)[0], twin(idx, idx)[0])


def test_a_full_disk_loses_nothing(tmp_path):
    """A write cut off by a file-size limit is a UserError; both old files stay whole and nothing is left beside them."""
    make(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code = (
        "import sys, torch, checkpoint\n"
        "from configurator import UserError\n"
        "try:\n"
        "    checkpoint.save(sys.argv[1], {'model': {'x': torch.zeros(200000)}, 'model_args': {}}, True)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, preexec_fn=limit, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("no checkpoint written") and done.returncode == 0, done.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_space_is_checked_first(tmp_path, monkeypatch):
    """Too little free space is said before a byte is written."""
    make(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="MB free"):
        make(tmp_path, seed=3)
    assert checkpoint.load(tmp_path / "ckpt.pt")["iter_num"] == 0
