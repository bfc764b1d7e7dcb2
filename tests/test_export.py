"""The export command, and exports in use. Run: python -m pytest tests/test_export.py"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from model import GPT
from nanomla import checkpoint
from nanomla.checkpoint import Checkpoint
from nanomla.settings import UserError
from tests.conftest import QUICK, TINY_MLA, fails_with_one_line, randomise, run, tiny_config
from tests.test_formats import CHARS, all_logits, transformers_gpt2


def save(folder, tokenizer=CHARS, **settings):
    """A checkpoint of random weights, as train.py writes it."""
    model = randomise(GPT(tiny_config(**settings)), 0.2)
    folder.mkdir(exist_ok=True)
    args = dataclasses.asdict(model.config)
    checkpoint.save(folder, Checkpoint(model.state_dict(), args, tokenizer=tokenizer), best=False)
    return model


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"gelu": "tanh", "dropout": 0.1}])
def test_mha_export_is_a_hugging_face_gpt2(tmp_path, settings):
    """
    transformers loads it without complaint, and we do again: equal logits both ways, tied weights
    stored once.
    """
    from transformers import GPT2LMHeadModel

    model, idx = save(tmp_path / "run", **settings), torch.randint(23, (3, 16))
    folder = tmp_path / "new" / "hf"
    done = run("tools.export", f"--out_dir={tmp_path}/run", f"--to={folder}")
    assert done.returncode == 0 and "as gpt2" in done.stdout and done.stderr == ""
    other, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    want = all_logits(model, idx)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(idx).logits, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(all_logits(GPT.from_pretrained(folder), idx), want)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["hf"]  # nothing is left over


def test_any_other_model_is_exported_as_ours(tmp_path):
    """MLA, from a checkpoint file: our model_type, the tokenizer and the same weights."""
    model = save(tmp_path / "run", **TINY_MLA)
    done = run("tools.export", f"--ckpt={tmp_path}/run/ckpt.pt", f"--to={tmp_path}/e")
    assert done.returncode == 0 and f"{tmp_path}/run/ckpt.pt as nanomla" in done.stdout
    assert json.loads((tmp_path / "e" / "config.json").read_text())["model_type"] == "nanomla"
    assert json.loads((tmp_path / "e" / "nanomla_tokenizer.json").read_text()) == CHARS
    idx = torch.randint(23, (3, 16))
    assert torch.equal(all_logits(GPT.from_pretrained(tmp_path / "e"), idx), all_logits(model, idx))


def test_gpt2s_tokenizer_is_written_for_transformers(tmp_path, monkeypatch):
    """With GPT-2's BPE, vocab.json and merges.txt too; without its tables, a warning instead."""
    save(tmp_path / "run", tokenizer={"kind": "tiktoken", "name": "gpt2"}, vocab_size=50257)
    args = [f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e"]
    ours = {"config.json", "model.safetensors", "nanomla_tokenizer.json"}
    done = run("tools.export", *args)
    assert done.returncode == 0 and done.stderr == ""
    theirs = {"vocab.json", "merges.txt"}
    assert {p.name for p in (tmp_path / "e").iterdir()} == ours | theirs
    settings = json.loads((tmp_path / "e" / "config.json").read_text())
    assert settings["bos_token_id"] == settings["eos_token_id"] == 50256

    def fail(name):
        raise UserError("no tables")

    monkeypatch.setattr("nanomla.formats.load_encoding", fail)
    done = run("tools.export", *args)
    assert done.returncode == 0
    assert "warning: exported without vocab.json and merges.txt" in done.stderr
    assert {p.name for p in (tmp_path / "e").iterdir()} == ours


def test_exports_are_sampled_and_trained_on(tmp_path, dataset):
    """
    The checkpoint's text from its export; a fine-tuning run that starts where the first one ended,
    also factorised.
    """
    args = [*QUICK, f"--dataset={dataset}", "--use_mla=True"]
    assert run("train.py", *args, f"--out_dir={tmp_path}/a", "--max_iters=10").returncode == 0
    assert run("tools.export", f"--out_dir={tmp_path}/a", f"--to={tmp_path}/e").returncode == 0
    flags = ["--start=to be", "--max_new_tokens=8", "--temperature=0"]
    sources = (f"--out_dir={tmp_path}/a", f"--init_from={tmp_path}/e", f"--init_from={tmp_path}/a")
    texts = [run("sample.py", source, *flags).stdout for source in sources]
    assert texts[0] == texts[1] == texts[2] != ""
    tune = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/b", "--dropout=0.1"]
    tune.append(f"--init_from={tmp_path}/e")
    again = [*args, f"--out_dir={tmp_path}/a", "--eval_only", "--init_from=resume"]
    first = run("train.py", *again).stdout.splitlines()[-1]
    tuned = run("train.py", *tune, "--eval_only").stdout.splitlines()[-1]
    assert tuned.split(":")[1] == first.split(":")[1]
    done = run("train.py", *tune, "--max_iters=5", "--use_svd=True", "--svd_rank=2")
    assert done.returncode == 0 and "rank 2 of 8" in done.stderr
    stored = checkpoint.load(tmp_path / "b" / "ckpt.pt").model_args
    assert stored["use_mla"] and stored["use_svd"] and stored["dropout"] == 0.1


def test_gpt2_is_fine_tuned(tmp_path, dataset):
    """
    A Hugging Face folder with a cropped context; its vocabulary is not the dataset's size; sampling
    needs a tokenizer.
    """
    folder = tmp_path / "hf"
    transformers_gpt2().save_pretrained(folder)
    args = [*QUICK, f"--dataset={dataset}", f"--init_from={folder}", f"--out_dir={tmp_path}/o"]
    args += ["--block_size=12", "--max_iters=3", "--use_svd=True", "--svd_rank=3"]
    done = run("train.py", *args)
    assert done.returncode == 0 and "rank 3 of 6" in done.stderr, done.stderr
    stored = checkpoint.load(tmp_path / "o" / "ckpt.pt").model_args
    assert stored["block_size"] == 12 and stored["n_embd"] == 24
    assert stored["gelu"] == "tanh" and stored["svd_rank"] == 3
    done = run("sample.py", f"--init_from={folder}", "--start=a")
    assert fails_with_one_line(done, 1, "23 token ids", "nanomla_tokenizer.json")
    (folder / "nanomla_tokenizer.json").write_text(json.dumps(CHARS))
    done = run("sample.py", f"--init_from={folder}", "--start=a", "--max_new_tokens=3")
    assert done.stdout.startswith("a")


def test_only_an_export_is_replaced(tmp_path):
    """A folder with anything else in it is left alone; a new export replaces an earlier one."""
    save(tmp_path / "run")
    source, weights = f"--out_dir={tmp_path}/run", tmp_path / "e" / "model.safetensors"
    args = [source, f"--to={tmp_path}/e"]
    assert run("tools.export", *args).returncode == 0
    first = weights.read_bytes()
    save(tmp_path / "run", **TINY_MLA)
    assert run("tools.export", *args).returncode == 0
    second = weights.read_bytes()
    assert len({path.stat().st_mode for path in (tmp_path / "e").iterdir()}) == 1
    assert first != second and sorted(p.name for p in tmp_path.iterdir()) == ["e", "run"]
    (tmp_path / "e" / "README.md").write_text("mine")
    assert fails_with_one_line(run("tools.export", *args), 1, "holds other files")
    (tmp_path / "file").write_text("mine")
    for target, words in (("run", "holds other files"), ("file", "is a file")):
        done = run("tools.export", source, f"--to={tmp_path}/{target}")
        assert fails_with_one_line(done, 1, words)
    assert fails_with_one_line(run("tools.export", source), 2, "--to=FOLDER")
    done = run("tools.export", "--out_dir=nowhere", f"--to={tmp_path}/n")
    assert fails_with_one_line(done, 1, "no checkpoint in nowhere")
    assert weights.read_bytes() == second and (tmp_path / "file").read_text() == "mine"


def test_a_model_without_tokenizer_is_exported_with_a_warning(tmp_path):
    """The weights are worth having; sampling from them is an error that names what is missing."""
    save(tmp_path / "run", tokenizer=None, **TINY_MLA)
    done = run("tools.export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e")
    assert done.returncode == 0 and "warning: exported without a tokenizer" in done.stderr
    done = run("sample.py", f"--init_from={tmp_path}/e")
    assert fails_with_one_line(done, 1, "23 token ids")


def test_names_that_are_nothing(tmp_path, dataset):
    """A name that is neither a file nor a folder, an empty folder, two sources at once."""
    base = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    done = run("train.py", *base, "--init_from=gpt3")
    assert fails_with_one_line(done, 1, "gpt3", "gpt2-xl")
    done = run("sample.py", f"--init_from={tmp_path}")
    assert fails_with_one_line(done, 1, "no checkpoint in", "nor config.json")
    done = run("sample.py", "--init_from=gpt2", "--ckpt=x.pt")
    assert fails_with_one_line(done, 2, "ckpt and init_from")
