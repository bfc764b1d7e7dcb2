"""
Checkpoints and datasets in nanoGPT's format, written here.

Run: python -m pytest tests/test_nanogpt.py
"""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch

import nanomla.dataset
import train
from nanomla import checkpoint, formats, optim, start
from nanomla.checkpoint import Checkpoint
from nanomla.errors import UserError
from nanomla.settings import configure
from tests.conftest import QUICK, ROOT, fails_with_one_line, run

CHARS = "\n abcdefghijklmnopqrstuvw"
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": len(CHARS)}
SHAPE["dropout"] = 0.0


def nanogpt_weights(bias):
    """Random weights by name, in the order in which nanoGPT's model registers them."""
    C = SHAPE["n_embd"]
    names = {"wte": (SHAPE["vocab_size"], C), "wpe": (SHAPE["block_size"], C)}
    layers = {
        "ln_1": (C,),
        "attn.c_attn": (3 * C, C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }
    for i in range(SHAPE["n_layer"]):
        names |= {f"h.{i}.{layer}": shape for layer, shape in layers.items()}
    names["ln_f"] = (C,)
    params = {}
    for name, shape in names.items():
        params[f"transformer.{name}.weight"] = torch.nn.Parameter(torch.randn(shape) * 0.1)
        if bias and name not in ("wte", "wpe"):
            bias_values = torch.randn(shape[0]) * 0.1
            params[f"transformer.{name}.bias"] = torch.nn.Parameter(bias_values)
    return params


def write_run(folder, dataset="letters", bias=False, prefix="_orig_mod."):
    """nanoGPT's out_dir after 7 iterations. Returns its weights and AdamW's state by name."""
    params = nanogpt_weights(bias)
    groups = [
        {"params": [p for p in params.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    for _ in range(7):
        for p in params.values():
            p.grad = torch.randn_like(p) * 1e-3
        optimizer.step()
    state = {prefix + k: p.data for k, p in params.items()}
    state[prefix + "lm_head.weight"] = params["transformer.wte.weight"].data
    saved = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": {**SHAPE, "bias": bias},
        "iter_num": 7,
        "best_val_loss": torch.tensor(3.125),
        "config": {"dataset": dataset, "out_dir": "out", "compile": True, "beta2": 0.99},
    }
    folder.mkdir(exist_ok=True)
    torch.save(saved, folder / "ckpt.pt")
    return {name: (p.data.clone(), optimizer.state[p]) for name, p in params.items()}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data/ folder with `letters`, as nanoGPT's shakespeare_char/prepare.py would write it."""
    folder = tmp_path / "data" / "letters"
    folder.mkdir(parents=True)
    text = "the bag led a fed cat\n" * 40
    stoi = {c: i for i, c in enumerate(CHARS)}
    ids = np.array([stoi[c] for c in text if c in stoi], dtype=np.uint16)
    ids[:700].tofile(folder / "train.bin")
    ids[700:].tofile(folder / "val.bin")
    with open(folder / "meta.pkl", "wb") as file:
        meta = {"vocab_size": len(CHARS), "itos": dict(enumerate(CHARS)), "stoi": stoi}
        pickle.dump(meta, file)
    for module in (checkpoint, nanomla.dataset):
        monkeypatch.setattr(module, "DATA_ROOT", tmp_path / "data")
    return tmp_path


def test_optimizer_state_reaches_its_own_parameters(root):
    """
    nanoGPT's AdamW state is by position: every weight gets its own moments back, by name. Positions
    in another order, as until 2023, are an error.
    """
    want = write_run(root / "out", bias=True)
    flags = ["--init_from=resume", "--dataset=letters", "--block_size=16", "--beta2=0.99"]
    cfg, _ = configure(train.TrainConfig, [f"--out_dir={root}/out", *flags])
    data = nanomla.dataset.Dataset("letters", 16)
    model, state = start.open_model(cfg, {}, data)
    optimizers = optim.make_optimizers(model, cfg, "cpu")
    optim.restore_optimizers(optimizers, state.optimizer, "ckpt.pt")
    assert state.iter_num == 7 and state.best_val_loss == 3.125
    named = dict(model.named_parameters())
    assert named.keys() == want.keys()
    for name, (weight, moments) in want.items():
        restored = optimizers["adamw"].state[named[name]]
        assert torch.equal(named[name], weight) and restored["step"] == 7
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(restored[moment], moments[moment])
    moved = state.optimizer["state"]
    state.optimizer["state"] = {i: moved[(i + 1) % len(moved)] for i in moved}
    with pytest.raises(UserError, match="ckpt.pt: its optimizer state does not .* of parameter 0"):
        optim.restore_optimizers(optimizers, state.optimizer, "ckpt.pt")


def test_a_run_is_resumed_and_sampled(root):
    """
    train.py goes on where nanoGPT stopped; sample.py spells with the dataset's meta.pkl, before and
    after.
    """
    write_run(root / "out")
    sample = [f"--out_dir={root}/out", "--start=the bag", "--max_new_tokens=5", "--temperature=0"]
    before = run("sample.py", *sample)
    assert before.returncode == 0 and before.stdout.startswith("the bag"), before.stderr
    resume = ["--dataset=letters", f"--out_dir={root}/out", "--init_from=resume", "--max_iters=40"]
    done = run("train.py", *QUICK, *resume)
    assert done.returncode == 0 and "iterations 7 to 40" in done.stdout, done.stderr
    stored = checkpoint.load(root / "out" / "ckpt.pt")
    assert stored.iter_num == 40 and stored.best_val_loss < 3.125
    assert stored.tokenizer == {"kind": "char", "chars": CHARS}
    after = run("sample.py", *sample)
    assert after.returncode == 0 and after.stdout != before.stdout


def test_weights_are_fine_tuned_and_exported(root):
    """
    A new run starts from nanoGPT's weights at iteration 0, here with factorised values;
    tools.export takes them too.
    """
    write_run(root / "out", bias=True, prefix="")
    tune = [*QUICK, "--dataset=letters", f"--init_from={root}/out", f"--out_dir={root}/new"]
    tune += ["--max_iters=3", "--use_svd=True", "--svd_rank=4", "--block_size=8"]
    done = run("train.py", *tune)
    assert done.returncode == 0 and "iterations 0 to 3" in done.stdout, done.stderr
    assert "rank 4 of 8" in done.stderr
    assert checkpoint.load(root / "new" / "ckpt.pt").model_args["block_size"] == 8
    assert run("tools.export", f"--out_dir={root}/out", f"--to={root}/hf").returncode == 0
    assert formats.read_pretrained(root / "hf").tokenizer["chars"] == CHARS


def test_what_its_tokens_mean_is_never_guessed(root):
    """
    Another dataset of the name or none is an error; GPT-2's size means GPT-2's BPE. --dataset takes
    a name below data/, a meta.json or a meta.pkl instead.
    """
    write_run(root / "out")
    letters = root / "data" / "letters"
    sample = ["sample.py", f"--out_dir={root}/out", "--start=the bag", "--max_new_tokens=5"]
    shutil.copytree(letters, root / "data" / "older")
    other = {"tokenizer": {"kind": "char", "chars": "ab"}, "tokens": {"train": 3, "val": 3}}
    (letters / "meta.json").write_text(json.dumps(other))
    assert fails_with_one_line(run(*sample), 1, "knows 25 characters", "letters has 2")
    spec = {"kind": "char", "chars": CHARS}
    (root / "any.json").write_text(json.dumps({"tokenizer": spec}))
    texts = set()
    for name in ("older", letters / "meta.pkl", root / "any.json"):
        done = run(*sample, f"--dataset={name}")
        assert done.returncode == 0, done.stderr
        texts.add(done.stdout)
    assert len(texts) == 1 and texts.pop().startswith("the bag")
    shutil.rmtree(letters)
    words = ("25 token ids", str(letters), "--dataset=NAME")
    assert fails_with_one_line(run(*sample), 1, *words)
    for vocab_size in (50257, 50304):
        stored = Checkpoint({}, {"vocab_size": vocab_size}, config={"dataset": "openwebtext"})
        assert checkpoint.tokenizer_spec(stored) == {"kind": "tiktoken", "name": "gpt2"}


def test_the_documented_meta_pkl_is_nanogpts(dataset, tmp_path):
    """The snippet of docs/nanogpt.md writes what nanoGPT's sample.py decodes with, and we read."""
    want = nanomla.dataset.read_meta(dataset)
    chars = want.tokenizer["chars"]
    shutil.copy(dataset / "meta.json", tmp_path)
    text = (ROOT / "docs" / "nanogpt.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code.replace("data/NAME", str(tmp_path)), {})  # noqa: S102  the documentation's own
    (tmp_path / "meta.json").unlink()
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    ids = [meta["stoi"][c] for c in "to be, or not"]
    assert "".join(meta["itos"][i] for i in ids) == "to be, or not"
    assert ids == [chars.index(c) for c in "to be, or not"]
    found = nanomla.dataset.read_meta(tmp_path)
    assert (found.tokenizer, found.vocab_size) == (want.tokenizer, want.vocab_size)


def test_a_resume_keeps_the_best_weights(root):
    """
    nanoGPT's ckpt.pt is its best: it becomes best.pt, which a worse run leaves alone. Losses over
    other validation windows do not compare: best.pt is then of the new ones.
    """
    write_run(root / "out")
    before = checkpoint.load(root / "out" / "ckpt.pt")
    stored = torch.load(root / "out" / "ckpt.pt", weights_only=True)
    stored["best_val_loss"] = torch.tensor(0.001)
    torch.save(stored, root / "out" / "ckpt.pt")
    done = run("train.py", *QUICK, f"--out_dir={root}/out", "--init_from=resume", "--max_iters=20")
    assert done.returncode == 0 and "best validation loss 0.0010" in done.stdout, done.stderr
    best = checkpoint.load(root / "out" / "best.pt")
    assert best.iter_num == 7
    assert all(torch.equal(best.model[name], tensor) for name, tensor in before.model.items())
    assert checkpoint.load(root / "out" / "ckpt.pt").iter_num == 20
    here = [f"--out_dir={root}/out", "--init_from=resume"]
    done = run("train.py", *here, "--max_iters=30", "--eval_iters=3")
    assert done.returncode == 0 and "the best loss, and best.pt, start anew" in done.stderr
    assert checkpoint.load(root / "out" / "best.pt").iter_num > 7
