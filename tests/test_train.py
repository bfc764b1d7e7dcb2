"""The training loop, as a user runs it. Run: python -m pytest tests/test_train.py"""

import json

import numpy as np
import pytest
import torch

from model import GPT
from nanomla import checkpoint
from nanomla.dataset import Meta, write_dataset
from nanomla.evaluate import token_losses
from tests.conftest import QUICK, fails_with_one_line, run

MLA = ["--use_mla=True", "--pos_emb=rope"]


def weights(folder, name="ckpt.pt"):
    return checkpoint.load(folder / name).model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def iterations(folder):
    """The iterations of the log's step lines and of its evaluations, in order."""
    log = entries(folder)
    return [e["iter"] for e in log if "loss" in e], [e["iter"] for e in log if "val_loss" in e]


EXPERTS = ["--moe_experts=6", "--moe_balance_step=0.01"]


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer=adamw"], ["--optimizer=muon"], ["--optimizer=adamw", "--n_predict=1"],
        ["--optimizer=muon", *EXPERTS], ["--optimizer=muon", *EXPERTS, "--n_predict=1"],
    ],
    ids=" ".join,
)
def test_stopped_and_resumed_is_uninterrupted(tmp_path, dataset, more):
    """
    Weights, optimizer, best loss and log of a run in two parts are bit-identical to those of one in
    one part. The folder and a later end are enough to resume; what is given besides wins.
    """
    args = [*QUICK, *MLA, f"--dataset={dataset}", *more, "--dropout=0.1"]
    args += ["--log_interval=2", "--gradient_accumulation_steps=2", "--lr_decay_iters=25"]
    full = tmp_path / "full"
    parts = tmp_path / "parts"
    assert run("train.py", *args, f"--out_dir={full}", "--max_iters=25").returncode == 0
    assert run("train.py", *args, f"--out_dir={parts}", "--max_iters=13").returncode == 0
    resume = ["train.py", f"--out_dir={parts}", "--init_from=resume"]
    done = run(*resume, "--max_iters=25")
    assert done.returncode == 0 and not done.stderr, done.stderr
    a, b = checkpoint.load(full / "ckpt.pt"), checkpoint.load(parts / "ckpt.pt")
    assert same(a.model, b.model) and a.iter_num == b.iter_num == 25
    assert a.best_val_loss == b.best_val_loss and a.scaler == b.scaler
    leaves = [torch.utils._pytree.tree_flatten(c.optimizer)[0] for c in (a, b)]
    pairs = zip(*leaves, strict=True)
    assert all(torch.equal(p, q) if torch.is_tensor(p) else p == q for p, q in pairs)
    logs = [
        {(e["iter"], "loss" in e): e.get("loss", e.get("val_loss")) for e in entries(folder)}
        for folder in (full, parts)
    ]
    assert logs[0] == logs[1] and len(entries(parts)) == len(logs[1])  # no iteration twice
    done = run(*resume, "--max_iters=30", "--beta2=0.9")
    assert "another run than the one it continues: beta2 0.95, now 0.9\n" in done.stderr
    assert checkpoint.load(parts / "ckpt.pt").config["beta2"] == 0.9


def test_log_and_checkpoints_say_what_happened(tmp_path, dataset):
    """
    log.jsonl has every step and evaluation, best.pt the best weights, stdout the settings and where
    they came from. A checkpoint's settings are flat, as nanoGPT's.
    """
    args = ["config/train_mla.py", *QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    args += ["--max_iters=20", "--mla_latent_dim=4", "--mla_rope_dim=2", "--log_interval=5"]
    done = run("train.py", *args, "--sample_interval=1")
    assert done.returncode == 0, done.stderr
    for text in (
        "  command line: out_dir=",
        "mla_latent_dim=4, ",
        "  config/train_mla.py: pos_emb='rope', use_mla=True, mla_rope='latent'",
        "bits per byte",
        "tokens/s, ETA 0:00:0",
        "sample: ",
        "8x fewer than MHA",
        "done: best validation loss",
    ):
        assert text in done.stdout, (text, done.stdout)
    best = checkpoint.load(tmp_path / "o" / "best.pt")
    log = entries(tmp_path / "o")
    assert iterations(tmp_path / "o") == ([0, 5, 10, 15], [0, 10, 20])
    assert best.best_val_loss == min(e["val_loss"] for e in log if "val_loss" in e)
    assert best.tokenizer["kind"] == "char"
    assert best.config["n_layer"] == 2 and best.config["batch_size"] == 4
    assert best.config["vocab_size"] is None and "model" not in best.config
    assert (tmp_path / "o" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_new_run_moves_the_earlier_one_to_another_folder(tmp_path, dataset):
    """
    Nothing of a finished run is overwritten by the next one in its folder; --eval_only, and a
    resume at the end, leave its weights.
    """
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    assert run("train.py", *args, "--max_iters=10").returncode == 0
    first = (tmp_path / "o" / "ckpt.pt").read_bytes()
    done = run("train.py", *args, "--eval_only", "--init_from=resume")
    assert "val loss" in done.stdout and (tmp_path / "o" / "ckpt.pt").read_bytes() == first
    done = run("train.py", f"--out_dir={tmp_path}/o", "--init_from=resume")
    assert "nothing to do: iteration 10 of 10; raise --max_iters\n" in done.stdout, done.stderr
    assert (tmp_path / "o" / "ckpt.pt").read_bytes() == first
    assert run("train.py", *args, "--max_iters=10", "--seed=2").returncode == 0
    assert (tmp_path / "o" / "old-1" / "ckpt.pt").read_bytes() == first
    assert not same(weights(tmp_path / "o"), weights(tmp_path / "o" / "old-1"))


def test_an_evaluation_says_over_how_many_tokens(tmp_path, dataset):
    """Equal weights have another loss over other tokens, which batch_size decides."""
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    assert run("train.py", *args, "--max_iters=10").returncode == 0
    evaluated = []
    for size in (4, 8):
        again = ["--eval_only", "--init_from=resume", f"--batch_size={size}"]
        done = run("train.py", *args, *again)
        assert f"evaluation: {2 * size * 16} tokens of each split (2 x {size} x 16)" in done.stdout
        evaluated.append(done.stdout.partition("val loss ")[2].partition(",")[0])
    assert evaluated[0] != evaluated[1]


def test_a_dataset_without_meta_and_ids_beyond_the_vocabulary(tmp_path):
    """nanoGPT's folders say nothing of their ids: one line names the file, the id, the model's."""
    for split in ("train", "val"):
        np.full(100, 300, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    args = [*QUICK, f"--dataset={tmp_path}", f"--out_dir={tmp_path}/o", "--max_iters=1"]
    done = run("train.py", *args, "--vocab_size=300")
    words = ("train.bin holds token id 300", "vocab_size=300; it needs 301 or more")
    assert fails_with_one_line(done, 1, *words)
    assert run("train.py", *args, "--vocab_size=301").returncode == 0


def test_settings_without_effect_are_named(tmp_path, dataset):
    """One warning line, not an error, so that --use_mla=False turns any config back into MHA."""
    (tmp_path / "c.py").write_text("attention = 'mla'\npos_emb = 'rope'\nmla_latent_dim = 8\n")
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    done = run("train.py", tmp_path / "c.py", *args, "--use_mla=False", "--max_iters=10")
    assert done.returncode == 0, done.stderr
    assert "transformer.h.0.attn.c_attn.weight" in weights(tmp_path / "o")  # ordinary attention
    assert "warning: without effect in this model: mla_latent_dim=8\n" in done.stderr


def test_a_resumed_model_is_the_checkpoints(tmp_path, dataset):
    """
    Settings that ask for another shape, possible or not, are named in a line each, with where they
    are from and what the model has, and the run goes on without them. Dropout is no shape.
    """
    args = [*QUICK, "--use_svd=True", "--svd_rank=3", f"--dataset={dataset}", *MLA]
    args += [f"--out_dir={tmp_path}/o"]
    assert run("train.py", *args, "--max_iters=10").returncode == 0
    path = tmp_path / "o" / "ckpt.pt"
    before = checkpoint.load(path)
    (tmp_path / "c.py").write_text("n_layer = 5\n")
    resume = [*args, "--max_iters=12", "--init_from=resume", "--dropout=0.2"]
    other = [tmp_path / "c.py", "--mla_latent_dim=32", "--n_kv_head=5", "--use_svd=False"]
    done = run("train.py", *resume, *other)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "is not used" in line] == [
        f"warning: {setting} is not used: the model in {path} has {has}"
        for setting, has in (
            (f"n_layer=5 ({tmp_path}/c.py)", "n_layer=2"),
            ("n_kv_head=5 (--n_kv_head=5)", "n_kv_head=None"),
            ("mla_latent_dim=32 (--mla_latent_dim=32)", "mla_latent_dim=8"),
            ("use_svd=False (--use_svd=False)", "use_svd=True"),
        )
    ]
    assert "n_layer=2" in done.stdout and "n_layer=5" not in done.stdout
    assert "another run than the one it continues: dropout 0.0, now 0.2, lr" in done.stderr
    after = checkpoint.load(path)
    assert after.iter_num == 12 and after.config["vocab_size"] is None
    assert after.model_args == {**before.model_args, "dropout": 0.2}
    same_model = ["--mla_latent_dim=8,8", "--n_head=2", "--mla_rope_dim=None"]
    done = run("train.py", *args, *same_model, "--init_from=resume", "--optimizer=muon")
    assert fails_with_one_line(done, 1, "trained with adamw", "adamw + muon")
    assert "is not used" not in done.stderr


def test_dense_checkpoint_opened_with_svd(tmp_path, dataset):
    """A dense run goes on, or samples, with factorised values and says how much of them it kept."""
    folder = tmp_path / "o"
    args = [*QUICK, *MLA, f"--dataset={dataset}", f"--out_dir={folder}"]
    assert run("train.py", *args, "--max_iters=10").returncode == 0
    svd = ["--use_svd=True", "--svd_rank=2"]
    sample = ["sample.py", f"--out_dir={folder}", "--start=to", "--max_new_tokens=5"]
    done = run(*sample, *svd)
    assert done.returncode == 0 and "rank 2 of 8" in done.stderr
    assert "% of the squared singular values kept" in done.stderr
    done = run("train.py", *args, "--init_from=resume", *svd, "--max_iters=20")
    assert done.returncode == 0 and "values kept" in done.stderr
    assert any(k.endswith("v_up") for k in weights(folder))
    kept = run(*sample, "--use_svd=True")  # alone it keeps the rank
    assert kept.returncode == 0 and "factorised" not in kept.stderr
    done = run("sample.py", f"--ckpt={folder}/ckpt.pt", "--use_svd=True", "--svd_rank=4")
    assert fails_with_one_line(done, 1, "svd_rank=4", "holds rank 2")


def test_new_run_from_another_runs_weights(tmp_path, dataset):
    """--init_from=PATH starts at iteration 0 with those weights."""
    args = [*QUICK, f"--dataset={dataset}"]
    assert run("train.py", *args, f"--out_dir={tmp_path}/a", "--max_iters=10").returncode == 0
    resume = [f"--out_dir={tmp_path}/a", "--init_from=resume", "--eval_only"]
    lines = run("train.py", *args, *resume).stdout.splitlines()
    before = [line for line in lines if "val loss" in line]
    new = [f"--out_dir={tmp_path}/b", f"--init_from={tmp_path}/a", "--max_iters=0"]
    done = run("train.py", *args, *new)
    assert "iterations 0 to 0" in done.stdout, done.stderr
    assert before[-1].split(":")[1] in done.stdout


def test_a_wsd_run_is_made_longer(tmp_path, dataset):
    """
    A run that has not begun to decay goes on with the decay of a longer one, without a warning and
    to the same weights as the longer run in one part; after the decay it becomes another run.
    """
    args = [*QUICK, f"--dataset={dataset}", "--decay_shape=wsd", "--wsd_decay=0.5"]
    full, parts = f"--out_dir={tmp_path}/full", f"--out_dir={tmp_path}/parts"
    assert run("train.py", *args, full, "--max_iters=20").returncode == 0
    assert run("train.py", *args, parts, "--max_iters=10", "--lr_decay_iters=99").returncode == 0
    more = ["--lr_decay_iters=None", "--init_from=resume"]  # else it is the checkpoint's
    done = run("train.py", *args, parts, "--max_iters=20", *more)
    assert done.returncode == 0 and "another run" not in done.stderr
    assert same(weights(tmp_path / "full"), weights(tmp_path / "parts"))
    done = run("train.py", *args, parts, "--max_iters=40", "--init_from=resume", "--eval_only")
    assert "another run than the one it continues: lr_decay_iters 20, now 40\n" in done.stderr


def test_bfloat16_and_grad_checkpoint_train(tmp_path, dataset):
    """AMP on the CPU and recomputed activations reach about the same loss as plain float32."""
    losses = []
    args = [*QUICK, *MLA, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=30"]
    for extra in (["--dtype=float32"], ["--dtype=bfloat16"], ["--grad_checkpoint"]):
        done = run("train.py", *args, *extra)
        assert done.returncode == 0 and "Mismatch dtype" not in done.stderr
        losses.append(checkpoint.load(tmp_path / "o" / "ckpt.pt").best_val_loss)
    assert losses[0] == losses[2] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--moe_experts=6", "--grad_checkpoint"]], ids=" ".join)
def test_compiled_model_trains_and_samples_alike(tmp_path, dataset, more):
    """--compile reaches the loss of the plain run, and samples the plain text greedily."""
    losses, texts, best = [], [], tmp_path / "o" / "best.pt"
    for extra in ([], ["--compile"]):
        args = [*QUICK, *MLA, *extra, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
        done = run("train.py", *args, *more, "--max_iters=20", fresh=True, timeout=500)
        assert done.returncode == 0 and ("compiling" in done.stdout) == bool(extra), done.stderr
        losses.append(checkpoint.load(best).best_val_loss)
        args = [f"--ckpt={best}", "--start=to", "--max_new_tokens=20", "--temperature=0", *extra]
        texts.append(run("sample.py", *args, fresh=True, timeout=500).stdout)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and texts[0] == texts[1] != ""


def test_within_documents(tmp_path, dataset):
    """
    Another run, whose losses are those of documents alone: tools.evaluate measures the same where
    windows and documents agree. A dataset without ends, and a teacher, are refused.
    """
    tokenizer = {"kind": "byte", "end": 10}  # every line is a document
    ids = np.array(list(b"to be\nor not\nto be that is the\nquestion\n" * 20))
    splits = {"train": [ids], "val": [ids[:161]]}  # ten windows of 16 targets
    write_dataset(tmp_path / "d", splits, Meta(256, tokenizer))
    flags = [*QUICK, f"--dataset={tmp_path}/d", "--max_iters=10", "--eval_iters=5"]
    flags += ["--batch_size=2", "--optimizer=muon"]
    final = {}
    for name in ("False", "True"):
        out = f"--out_dir={tmp_path}/{name}"
        done = run("train.py", *flags, out, f"--within_documents={name}")
        assert done.returncode == 0, done.stderr
        final[name] = entries(tmp_path / name)[-1]["val_loss"]
    model = GPT.from_pretrained(str(tmp_path / "True")).eval()
    losses = []
    for begin in range(0, 160, 16):
        losses.append(token_losses(model, ids[begin : begin + 17], ends=(10,)))
    mean = torch.cat(losses).mean().item()
    assert abs(mean - final["True"]) < 1e-5 and abs(mean - final["False"]) > 1e-3
    for name in ("n_predict=1", "moe_experts=4"):
        more = [f"--out_dir={tmp_path}/n", "--within_documents=True", f"--{name}"]
        refused = run("train.py", *flags, *more)
        assert fails_with_one_line(refused, 1, "does not go with " + name.partition("=")[0])
    done = run("train.py", out, "--init_from=resume", "--max_iters=12", "--within_documents=False")
    assert done.returncode == 0 and "within_documents True, now False" in done.stderr
    done = run("train.py", *QUICK, f"--dataset={dataset}", "--within_documents=True")
    assert fails_with_one_line(done, 1, "no token that ends a document")
    done = run("train.py", *flags, "--within_documents=True", "--distill=out")
    assert fails_with_one_line(done, 2, "within_documents does not go with distill")
