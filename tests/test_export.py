"""Weights in and out of safetensors, beside transformers. Run: python -m pytest tests/test_export.py"""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import export
from configurator import UserError
from model import GPT
from tests.conftest import QUICK, TINY_MLA, fails_with_one_line, randomise, run, tiny_config

CHARS = {"kind": "char", "chars": "abcdefghijklmnopqrstuvw"}  # 23, as TINY's vocabulary


def all_logits(model, idx):
    with torch.no_grad():
        return model(idx, idx)[0]


def theirs(**settings):
    """transformers' GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": None, "eos_token_id": None}
    return randomise(GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=16, n_embd=24, n_layer=2, n_head=4, **ends, **settings)), 0.2)


@pytest.fixture
def gpt2(tmp_path):
    """A Hugging Face folder as transformers writes it, and what its model says."""
    model = theirs()
    model.save_pretrained(tmp_path / "hf")
    idx = torch.randint(23, (3, 16))
    with torch.no_grad():
        return tmp_path / "hf", idx, model(idx).logits


def save(folder, tokenizer=CHARS, **settings):
    """A checkpoint of random weights, as train.py writes it."""
    model = randomise(GPT(tiny_config(**settings)), 0.2)
    folder.mkdir(exist_ok=True)
    checkpoint.save(folder, {"model": model.state_dict(), "model_args": model.config.__dict__, "tokenizer": tokenizer}, best=False)
    return model


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu"])
def test_transformers_gpt2_opens_with_equal_logits(tmp_path, activation):
    """Both activations, at 1e-5 (the target is 1e-4); the wrong one would be seen."""
    model, idx = theirs(activation_function=activation), torch.randint(23, (3, 16))
    model.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, {"dropout": 0.25}).eval()
    assert ours.config.dropout == 0.25 and ours.config.gelu == ("exact" if activation == "gelu" else "tanh")
    with torch.no_grad():
        want = model(idx).logits
    torch.testing.assert_close(all_logits(ours, idx), want, atol=1e-5, rtol=1e-5)
    for block in ours.transformer.h:
        block.mlp.approximate = "none" if activation != "gelu" else "tanh"
    assert (all_logits(ours, idx) - want).abs().max() > 1e-4


def test_other_spellings_of_the_same_folder(gpt2):
    """Without the prefix, with old mask buffers, with lm_head, in half precision, in pieces: the same logits."""
    folder, idx, want = gpt2
    state = load_file(folder / "model.safetensors")
    bare = {k.removeprefix("transformer."): v for k, v in state.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril().bool(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    for tensors in (bare, {**bare, **masks}, {**state, "lm_head.weight": state["transformer.wte.weight"].clone()}):
        save_file(tensors, folder / "model.safetensors")
        torch.testing.assert_close(all_logits(GPT.from_pretrained(folder).eval(), idx), want, atol=1e-5, rtol=1e-5)
    save_file({k: v.half() for k, v in state.items()}, folder / "model.safetensors")
    model = GPT.from_pretrained(folder).eval()
    assert model.lm_head.weight.dtype == torch.float32 and (all_logits(model, idx) - want).abs().max() < 0.05
    (folder / "model.safetensors").unlink()
    pieces = {f"piece-{i}.safetensors": dict(list(state.items())[i::2]) for i in range(2)}
    for name, tensors in pieces.items():
        save_file(tensors, folder / name)
    index = {"weight_map": {k: name for name, tensors in pieces.items() for k in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(all_logits(GPT.from_pretrained(folder).eval(), idx), want, atol=1e-5, rtol=1e-5)


def test_names_are_fetched_from_the_hub(gpt2, monkeypatch):
    """gpt2-medium fetches two files and no more; where that fails, one line says what to do instead."""
    import huggingface_hub

    folder, idx, want = gpt2
    asked = []

    def fetch(repository, file):
        asked.append((repository, file))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    torch.testing.assert_close(all_logits(GPT.from_pretrained("gpt2-medium").eval(), idx), want, atol=1e-5, rtol=1e-5)
    assert asked == [("openai-community/gpt2-medium", f) for f in ("config.json", "model.safetensors")]

    def fail(repository, file):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    done = run("sample.py", "--init_from=gpt2", "--start=a")
    assert fails_with_one_line(done, 1, "gpt2 cannot be had", "no route", "openai-community/gpt2", "--init_from=FOLDER")


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"gelu": "tanh", "dropout": 0.1}])
def test_mha_export_is_a_hugging_face_gpt2(tmp_path, settings):
    """transformers loads it without complaint, and we do again: equal logits both ways, tied weights stored once."""
    from transformers import GPT2LMHeadModel

    model, idx = save(tmp_path / "run", **settings).eval(), torch.randint(23, (3, 16))
    done = run("export.py", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/new/hf")
    assert done.returncode == 0 and "as gpt2" in done.stdout and done.stderr == ""
    other, info = GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "hf", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(idx).logits, all_logits(model, idx), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(all_logits(GPT.from_pretrained(tmp_path / "new" / "hf").eval(), idx), all_logits(model, idx))
    assert "lm_head.weight" not in load_file(tmp_path / "new" / "hf" / "model.safetensors")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["hf"]  # nothing is left beside it


@pytest.mark.parametrize(
    "settings",
    [
        TINY_MLA,
        {**TINY_MLA, "mla_groups": 2, "mla_q_latent_dim": 5, "bias": False},
        {**TINY_MLA, "mla_share_latent": True, "use_svd": True, "svd_rank": 3, "mla_norm": "layernorm"},
        {"use_svd": True, "svd_rank": 3},
        {"pos_emb": "rope"},
    ],
)
def test_every_other_model_round_trips(tmp_path, settings):
    """Bit by bit, its config and its tokenizer too; tied and shared weights are stored once."""
    model = save(tmp_path / "run", **settings)
    assert run("export.py", f"--ckpt={tmp_path}/run/ckpt.pt", f"--to={tmp_path}/e").returncode == 0
    held = checkpoint.read_pretrained(tmp_path / "e")
    twin = GPT.from_pretrained(tmp_path / "e")
    assert held["tokenizer"] == CHARS and twin.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert json.loads((tmp_path / "e" / "config.json").read_text())["model_type"] == "nanomla"
    assert sum(t.numel() for t in load_file(tmp_path / "e" / "model.safetensors").values()) == sum(p.numel() for p in model.parameters())


def test_exports_are_sampled_and_trained_on(tmp_path, dataset):
    """The checkpoint's text from its export; a fine-tuning run that starts where the first one ended, also factorised."""
    args = [*QUICK, f"--dataset={dataset}", "--use_mla=True"]
    assert run("train.py", *args, f"--out_dir={tmp_path}/a", "--max_iters=10").returncode == 0
    assert run("export.py", f"--out_dir={tmp_path}/a", f"--to={tmp_path}/e").returncode == 0
    flags = ["--start=to be", "--max_new_tokens=8", "--temperature=0"]
    texts = [run("sample.py", source, *flags).stdout for source in (f"--out_dir={tmp_path}/a", f"--init_from={tmp_path}/e", f"--init_from={tmp_path}/a")]
    assert texts[0] == texts[1] == texts[2] != ""
    tune = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/b", f"--init_from={tmp_path}/e", "--dropout=0.1"]
    first = run("train.py", *args, f"--out_dir={tmp_path}/a", "--eval_only", "--init_from=resume").stdout.splitlines()[-1]
    assert run("train.py", *tune, "--eval_only").stdout.splitlines()[-1].split(":")[1] == first.split(":")[1]
    done = run("train.py", *tune, "--max_iters=5", "--use_svd=True", "--svd_rank=2")
    assert done.returncode == 0 and "rank 2 of 8" in done.stderr
    args = checkpoint.load(tmp_path / "b" / "ckpt.pt")["model_args"]
    assert args["use_mla"] and args["use_svd"] and args["dropout"] == 0.1


def test_gpt2_is_fine_tuned(tmp_path, dataset, gpt2):
    """A Hugging Face folder with a cropped context; its vocabulary is not the dataset's size; sampling needs a tokenizer."""
    folder, _, _ = gpt2
    run_args = [*QUICK, f"--dataset={dataset}", f"--init_from={folder}", f"--out_dir={tmp_path}/o", "--block_size=12"]
    done = run("train.py", *run_args, "--max_iters=3", "--use_svd=True", "--svd_rank=3")
    assert done.returncode == 0 and "rank 3 of 6" in done.stderr, done.stderr
    args = checkpoint.load(tmp_path / "o" / "ckpt.pt")["model_args"]
    assert args["block_size"] == 12 and args["n_embd"] == 24 and args["gelu"] == "tanh" and args["svd_rank"] == 3
    done = run("sample.py", f"--init_from={folder}", "--start=a")
    assert fails_with_one_line(done, 1, "23 token ids", "nanomla_tokenizer.json")
    (folder / "nanomla_tokenizer.json").write_text(json.dumps(CHARS))
    assert run("sample.py", f"--init_from={folder}", "--start=a", "--max_new_tokens=3").stdout.startswith("a")


def test_gpt2_tokenizer_files_are_openais(tmp_path):
    """merges.txt is OpenAI's byte for byte (its sha256); vocab.json says for every id what tiktoken says."""
    from data import bpe

    files = export.gpt2_tokenizer()
    assert hashlib.sha256(files["merges.txt"].encode()).hexdigest() == bpe.TABLES["gpt2"][bpe.MERGES]
    vocabulary = json.loads(files["vocab.json"])
    assert sorted(vocabulary.values()) == list(range(50257)) and vocabulary["Hello"] == 15496 and vocabulary["Ġworld"] == 995


def test_only_an_export_is_replaced(tmp_path):
    """A folder with anything else in it is left alone; an earlier export gives way to the new one."""
    save(tmp_path / "run")
    args = [f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e"]
    assert run("export.py", *args).returncode == 0
    first = (tmp_path / "e" / "model.safetensors").read_bytes()
    save(tmp_path / "run", **TINY_MLA)
    assert run("export.py", *args).returncode == 0
    second = (tmp_path / "e" / "model.safetensors").read_bytes()
    assert len({path.stat().st_mode for path in (tmp_path / "e").iterdir()}) == 1
    assert first != second and sorted(p.name for p in tmp_path.iterdir()) == ["e", "run"]
    (tmp_path / "e" / "README.md").write_text("mine")
    assert fails_with_one_line(run("export.py", *args), 1, "holds other files")
    (tmp_path / "file").write_text("mine")
    for target, words in (("run", "holds other files"), ("file", "is a file")):
        assert fails_with_one_line(run("export.py", args[0], f"--to={tmp_path}/{target}"), 1, words)
    assert fails_with_one_line(run("export.py", args[0]), 2, "--to=FOLDER")
    assert fails_with_one_line(run("export.py", "--out_dir=nowhere", f"--to={tmp_path}/n"), 1, "no checkpoint in nowhere")
    assert (tmp_path / "e" / "model.safetensors").read_bytes() == second and (tmp_path / "file").read_text() == "mine"


def test_a_failed_write_leaves_the_earlier_export(tmp_path, monkeypatch):
    """An error in the middle: the old folder is whole, nothing is left beside it."""
    model = save(tmp_path / "run")
    settings, tensors = export.gpt2_export(model)
    export.write_folder(tmp_path / "e", tensors, {"config.json": "{}"})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="nothing exported.*disk full"):
        export.write_folder(tmp_path / "e", tensors, {"config.json": json.dumps(settings)})
    assert (tmp_path / "e" / "config.json").read_text() == "{}" and sorted(os.listdir(tmp_path)) == ["e", "run"]


def test_a_model_without_tokenizer_is_exported_with_a_warning(tmp_path):
    """The weights are worth having; sampling from them then says what is missing."""
    save(tmp_path / "run", tokenizer=None, **TINY_MLA)
    done = run("export.py", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e")
    assert done.returncode == 0 and "warning: exported without a tokenizer" in done.stderr
    assert fails_with_one_line(run("sample.py", f"--init_from={tmp_path}/e"), 1, "23 token ids")


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **changes}))


def change_weights(folder, **changes):
    state = {**load_file(folder / "model.safetensors"), **changes}
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), ["no config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "cannot be read"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json", "no JSON object"]),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ["config.json", "cannot be read"]),
        (lambda f: (f / "model.safetensors").unlink(), ["no model.safetensors"]),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["no model.safetensors", "is a pickle"]),
        (lambda f: cut(f / "model.safetensors", 0.9), ["model.safetensors", "truncated"]),
        (lambda f: cut(f / "model.safetensors", 0.001), ["model.safetensors", "truncated"]),
        (lambda f: cut(f / "model.safetensors", 0), ["model.safetensors", "truncated"]),
        (lambda f: change_config(f, model_type="llama"), ["model_type 'llama'", "gpt2 and nanomla"]),
        (lambda f: change_config(f, model_type=None), ["model_type None"]),
        (lambda f: change_config(f, activation_function="relu"), ["activation_function='relu'", "gelu_new"]),
        (lambda f: change_config(f, scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx=True"]),
        (lambda f: change_config(f, scale_attn_weights=False), ["scale_attn_weights=False"]),
        (lambda f: change_config(f, layer_norm_epsilon=1e-6), ["layer_norm_epsilon=1e-06"]),
        (lambda f: change_config(f, n_inner=48), ["n_inner=48"]),
        (lambda f: change_config(f, n_layer="2"), ["n_layer='2'", "type int"]),
        (lambda f: change_config(f, n_layer=3), ["missing", "h.2."]),
        (lambda f: change_config(f, n_layer=1), ["unknown", "h.1."]),
        (lambda f: change_config(f, n_positions=17), ["wpe.weight", "(16, 24)", "(17, 24)"]),
        (lambda f: change_weights(f, **{"transformer.wte.weight": None}), ["2 missing", "lm_head.weight"]),
        (lambda f: change_weights(f, **{"transformer.h.1.ln_1.bias": None}), ["1 missing", "h.1.ln_1.bias"]),
        (lambda f: change_weights(f, **{"lm_head.weight": torch.zeros(23, 24)}), ["lm_head and wte are different"]),
        (lambda f: change_weights(f, **{"transformer.ln_f.bias": torch.zeros(24).char()}), ["ln_f.bias", "quantised"]),
        (lambda f: (f / "nanomla_tokenizer.json").write_text("[1]"), ["nanomla_tokenizer.json"]),
    ],
)
def test_bad_folders_are_one_line(gpt2, damage, words):
    """What can be wrong with a folder: one line that names it, in train.py and sample.py alike."""
    folder, _, _ = gpt2
    damage(folder)
    assert fails_with_one_line(run("sample.py", f"--init_from={folder}", "--start=a"), 1, str(folder), *words)


def test_names_that_are_nothing(tmp_path, dataset):
    """A name that is neither a file nor a folder, an empty folder, two sources at once."""
    base = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    assert fails_with_one_line(run("train.py", *base, "--init_from=gpt3"), 1, "gpt3", "gpt2-xl")
    assert fails_with_one_line(run("sample.py", f"--init_from={tmp_path}"), 1, "no checkpoint in", "nor config.json")
    assert fails_with_one_line(run("sample.py", "--init_from=gpt2", "--ckpt=x.pt"), 2, "ckpt and init_from")
