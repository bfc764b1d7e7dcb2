"""The export command, and exports in use. Run: python -m pytest tests/test_export.py"""

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file

from model import GPT
from nanomla import checkpoint, formats
from nanomla.checkpoint import Checkpoint
from nanomla.errors import UserError
from nanomla.tokenizer import Tokenizer
from tests.conftest import (
    QUICK,
    TINY_MLA,
    all_logits,
    fails_with_one_line,
    randomise,
    run,
    save_model,
    tiny_config,
)
from tests.test_formats import (
    CHARS,
    DEEPSEEK_STYLE,
    LLAMA_STYLE,
    foreign,
    greedy,
    transformers_gpt2,
)
from tests.test_tokenizer import TEXT, byte_level
from tools.export import training_command


def save(folder, tokenizer=CHARS, **settings):
    """A checkpoint of random weights, as train.py writes it."""
    model = randomise(GPT(tiny_config(**settings)), 0.2)
    folder.mkdir(exist_ok=True)
    save_model(folder, model, tokenizer=tokenizer)
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
    reason = "as gpt2: learned positions, LayerNorm, GELU"
    assert done.returncode == 0 and reason in done.stdout and done.stderr == ""
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
    assert done.returncode == 0 and f"{tmp_path}/run/ckpt.pt as nanomla: gpt2 has no" in done.stdout
    assert "deepseek_v3 has no bias=True, norm='layernorm', mlp='gelu'" in done.stdout
    assert json.loads((tmp_path / "e" / "config.json").read_text())["model_type"] == "nanomla"
    assert json.loads((tmp_path / "e" / "nanomla_tokenizer.json").read_text()) == CHARS
    idx = torch.randint(23, (3, 16))
    assert torch.equal(all_logits(GPT.from_pretrained(tmp_path / "e"), idx), all_logits(model, idx))


STYLES = {"llama": {**LLAMA_STYLE, "n_kv_head": 2}, "deepseek_v3": DEEPSEEK_STYLE}


@pytest.mark.parametrize("kind", STYLES)
def test_a_model_in_llamas_or_deepseeks_style_is_exported_as_one(tmp_path, kind):
    """The format is found and named with its reason; transformers writes sample.py's text."""
    from transformers import AutoModelForCausalLM

    save(tmp_path / "run", **STYLES[kind])
    done = run("tools.export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e")
    assert done.returncode == 0 and done.stderr == ""
    assert f"as {kind}: " in done.stdout and "RMSNorm, SwiGLU" in done.stdout
    settings = json.loads((tmp_path / "e" / "config.json").read_text())
    assert settings["model_type"] == kind and settings["eos_token_id"] is None
    flags = ["--start=abc", "--max_new_tokens=12", "--temperature=0"]
    text = run("sample.py", f"--out_dir={tmp_path}/run", *flags).stdout
    assert text == run("sample.py", f"--init_from={tmp_path}/e", *flags).stdout
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "e")
    ids = greedy(other, torch.tensor([[0, 1, 2]]), 12)[0]
    assert "".join(CHARS["chars"][i] for i in ids) == text.removesuffix("\n")


@pytest.mark.parametrize("prompt", ["a b\n", "  e\u0301🙂 .", "\n"])
def test_a_pipeline_of_transformers_completes_a_prompt(tmp_path, prompt):
    """From the folder alone, and its greedy text is ours."""
    from transformers import pipeline

    spec = {"kind": "char", "chars": "\n .,'!abcdefghij🙂é\u0301\u200d日\t"}
    save(tmp_path / "run", tokenizer=spec)
    done = run("tools.export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e")
    assert done.returncode == 0 and done.stderr == ""
    flags = [f"--start={prompt}", "--max_new_tokens=9", "--temperature=0"]
    text = run("sample.py", f"--init_from={tmp_path}/e", *flags).stdout
    complete = pipeline("text-generation", str(tmp_path / "e"))
    answer = complete(prompt, max_new_tokens=9, do_sample=False)[0]["generated_text"]
    assert answer + "\n" == text and len(answer) == len(prompt) + 9
    assert formats.read_pretrained(tmp_path / "e").tokenizer == spec


def test_an_alphabet_that_is_no_text_is_exported_with_a_warning(tmp_path):
    """Half a surrogate pair: the folder has our own file alone, and opens here."""
    spec = {"kind": "char", "chars": CHARS["chars"][:-1] + "\udcff"}
    save(tmp_path / "run", tokenizer=spec)
    done = run("tools.export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert "warning: exported without tokenizer.json, for transformers: its char" in done.stderr
    assert not (tmp_path / "e" / "tokenizer.json").exists()
    assert formats.read_pretrained(tmp_path / "e").tokenizer == spec


def test_a_format_that_does_not_fit_is_refused(tmp_path):
    """--format names the settings in the way; our own format takes any model."""
    save(tmp_path / "run", **{**DEEPSEEK_STYLE, "mla_groups": 2, "tie_weights": False})
    args = [f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e"]
    done = run("tools.export", *args, "--format=deepseek_v3")
    assert fails_with_one_line(done, 1, "--format=deepseek_v3 does not fit", "has no mla_groups=2")
    done = run("tools.export", *args, "--format=llama")
    assert fails_with_one_line(done, 1, "llama has no use_mla=True")
    done = run("tools.export", *args, "--format=onnx")
    assert fails_with_one_line(done, 2, "--format=onnx")
    assert not (tmp_path / "e").exists()
    save(tmp_path / "run", **STYLES["llama"])
    done = run("tools.export", *args, "--format=nanomla")
    assert done.returncode == 0 and "as nanomla: as asked" in done.stdout
    done = run("tools.export", *args, "--format=llama")
    assert done.returncode == 0 and "as llama: rotary positions" in done.stdout


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_a_foreign_folder_is_sampled_fine_tuned_and_exported(tmp_path, dataset, kind):
    """
    A folder with a tokenizer.json: its text is sampled; a fine-tuned run opens in transformers
    again; the folder itself is exported with its tokenizer, which AutoTokenizer reads.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, folder = byte_level(), tmp_path / "hf"
    foreign(kind, vocab_size=288, max_position_embeddings=32).save_pretrained(folder)
    theirs.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"eos_token_id": [0, 5], "bos_token_id": 7 if kind == "llama" else None}
    (folder / "config.json").write_text(json.dumps(settings))
    flags = ["--start=to be", "--max_new_tokens=9", "--temperature=0"]
    sampled = run("sample.py", f"--init_from={folder}", *flags)
    assert sampled.returncode == 0 and sampled.stdout.startswith("to be")

    done = run("tools.export", f"--out_dir={folder}", f"--to={tmp_path}/e")
    assert done.returncode == 0 and f"as {kind}: " in done.stdout and done.stderr == ""
    files = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in (tmp_path / "e").iterdir()} == files | {"tokenizer_config.json"}
    text = (folder / "tokenizer.json").read_text()
    assert (tmp_path / "e" / "tokenizer.json").read_text() == text
    wrote = json.loads((tmp_path / "e" / "config.json").read_text())
    ends = ("bos_token_id", "eos_token_id")
    assert [wrote[name] for name in ends] == [settings["bos_token_id"], 0]
    about = json.loads((tmp_path / "e" / "tokenizer_config.json").read_text())
    assert about.get("bos_token") == (theirs.id_to_token(7) if kind == "llama" else None)
    opened = AutoTokenizer.from_pretrained(tmp_path / "e")
    assert opened(TEXT)["input_ids"] == theirs.encode(TEXT).ids and opened.eos_token == "<|end|>"
    assert run("sample.py", f"--init_from={tmp_path}/e", *flags).stdout == sampled.stdout

    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o", "--max_iters=2"]
    done = run("train.py", *args, f"--init_from={folder}")
    assert done.returncode == 0 and "another tokenizer" in done.stderr
    assert run("tools.export", f"--out_dir={tmp_path}/o", f"--to={tmp_path}/t").returncode == 0
    idx = torch.randint(288, (2, 16))
    want = all_logits(GPT.from_pretrained(tmp_path / "o"), idx)
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "t")(idx).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_foreign_folder_is_fine_tuned_on_text_in_its_own_ids(tmp_path):
    """The three commands of docs/export.md: no warning, and the same tokenizer throughout."""
    folder, text = tmp_path / "hf", tmp_path / "a.txt"
    foreign("deepseek_v3", vocab_size=288, max_position_embeddings=32).save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    text.write_text("to be or not to be, wörld\n" * 60)
    out = f"--out={tmp_path}/data"
    done = run("data/text/prepare.py", text, out, f"--tokenizer={folder}")
    assert done.returncode == 0, done.stderr
    args = [*QUICK, f"--dataset={tmp_path}/data", f"--out_dir={tmp_path}/o", "--max_iters=2"]
    done = run("train.py", *args, f"--init_from={folder}")
    assert done.returncode == 0 and "another tokenizer" not in done.stderr, done.stderr
    assert run("tools.export", f"--out_dir={tmp_path}/o", f"--to={tmp_path}/t").returncode == 0
    spec = formats.read_pretrained(folder).tokenizer
    assert formats.read_pretrained(tmp_path / "t").tokenizer == spec


def test_a_resumed_run_is_made_by_a_new_one():
    """--init_from=resume makes no model; weights that a run started from do."""
    start = {"n_layer": 3, "init_from": "resume"}
    command = training_command(Checkpoint({}, {}, config=start))
    assert command == "python train.py --n_layer=3"
    command = training_command(Checkpoint({}, {}, config={**start, "init_from": "folder"}))
    assert command.endswith(" --init_from=folder")


def test_a_tokenizer_json_stays_with_its_model(tmp_path):
    """In a checkpoint, in our own format, and in a folder that has it already."""
    spec = {"kind": "hf", "json": byte_level().to_str(), "end": 0}
    save(tmp_path / "run", tokenizer=spec, **{**TINY_MLA, "vocab_size": 288})
    flags = ["--start=to be", "--max_new_tokens=5", "--temperature=0"]
    text = run("sample.py", f"--out_dir={tmp_path}/run", *flags).stdout
    assert text.startswith("to be")
    assert run("tools.export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e").returncode == 0
    assert json.loads((tmp_path / "e" / "nanomla_tokenizer.json").read_text()) == spec
    assert run("sample.py", f"--init_from={tmp_path}/e", *flags).stdout == text
    save(tmp_path / "run", tokenizer=spec, **{**LLAMA_STYLE, "vocab_size": 288})
    assert run("tools.export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e").returncode == 0
    assert formats.read_pretrained(tmp_path / "e").tokenizer == spec


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", ["cannot be read"]),
        ("{}", ["not a tokenizer of Hugging Face", "KeyError"]),
        ('{"model": {"vocab": {"a": "b"}}}', ["not a tokenizer of Hugging Face"]),
        ('{"model": {"vocab": 5}}', ["not a tokenizer of Hugging Face"]),
        ('{"model": {"vocab": {"a": 23}}}', ["ids up to 23", "vocab_size=23"]),
        ('{"model": {"vocab": {"a": 1}}}', ["tokenizer.json cannot be read"]),
    ],
)
def test_bad_tokenizer_files_are_one_line(tmp_path, content, words):
    """Damaged, of another model, or nothing that the library opens."""
    foreign("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    done = run("sample.py", f"--init_from={tmp_path}", "--start=a")
    assert fails_with_one_line(done, 1, *words)


def test_gpt2s_tokenizer_is_known_by_its_merges(tmp_path):
    """Its tokenizer.json means the same ids as tiktoken's gpt2, which data/ is prepared with."""
    save(tmp_path / "run", tokenizer={"kind": "tiktoken", "name": "gpt2"}, vocab_size=50257)
    assert run("tools.export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e").returncode == 0
    (tmp_path / "e" / "nanomla_tokenizer.json").unlink()
    stored = formats.read_pretrained(tmp_path / "e")
    assert stored.tokenizer == {"kind": "tiktoken", "name": "gpt2"}


def test_transformers_reads_gpt2s_tokenizer_from_a_deepseek_export(tmp_path):
    """AutoTokenizer has tiktoken's ids, and the end of a text is that of the tokenizer."""
    from transformers import AutoTokenizer

    gpt2 = {"kind": "tiktoken", "name": "gpt2"}
    save(tmp_path / "run", tokenizer=gpt2, **{**DEEPSEEK_STYLE, "vocab_size": 50304})
    assert run("tools.export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e").returncode == 0
    opened = AutoTokenizer.from_pretrained(tmp_path / "e")
    text = "Hello wörld, 日本\n  x"
    assert opened(text)["input_ids"] == Tokenizer(gpt2).encode(text)
    assert opened.eos_token_id == 50256
    assert json.loads((tmp_path / "e" / "config.json").read_text())["eos_token_id"] == 50256


def test_every_export_has_a_model_card(tmp_path, dataset):
    """
    Metadata, settings, data, losses, costs and the two commands; run again, the first command makes
    the same weights.
    """
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/a", "--max_iters=10"]
    assert run("train.py", *args, "--pos_emb=rope", "--use_mla=True").returncode == 0
    export = [f"--out_dir={tmp_path}/a", f"--to={tmp_path}/e"]
    assert run("tools.export", *export).returncode == 0
    card = (tmp_path / "e" / "README.md").read_text()
    _, metadata, body = card.split("---\n", 2)
    lines = metadata.splitlines()
    assert lines[:3] == ["library_name: nanomla", "pipeline_tag: text-generation", "tags:"]
    stored = checkpoint.load(tmp_path / "a" / "best.pt")
    model = GPT.from_pretrained(tmp_path / "a")
    numbers = model.make_cache(1, 1).bytes_per_token // 4 // model.config.n_layer
    for words in (
        f"{sum(p.numel() for p in model.parameters()):,}",
        f"{numbers} numbers per token and layer",
        f"| data | {dataset} |",
        "| iterations | 10 |",
        f"{stored.best_val_loss:.4f} nats per token",
        "mla_latent_dim = 8",
        f"python -m tools.export {' '.join(export)}",
    ):
        assert words in body, words
    command = next(line for line in body.splitlines() if "train.py" in line).strip()
    script, *again = shlex.split(command)[1:]
    again = [flag for flag in again if not flag.startswith("--out_dir")]
    assert run(script, *again, f"--out_dir={tmp_path}/b").returncode == 0
    twin = checkpoint.load(tmp_path / "b" / "best.pt")
    assert all(torch.equal(t, twin.model[name]) for name, t in stored.model.items())


def test_gpt2s_tokenizer_is_written_for_transformers(tmp_path, monkeypatch):
    """GPT-2's BPE in tokenizer.json too; without its tables, a warning instead."""
    save(tmp_path / "run", tokenizer={"kind": "tiktoken", "name": "gpt2"}, vocab_size=50257)
    args = [f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e"]
    ours = {"README.md", "config.json", "model.safetensors", "nanomla_tokenizer.json"}
    done = run("tools.export", *args)
    assert done.returncode == 0 and done.stderr == ""
    theirs = {"tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in (tmp_path / "e").iterdir()} == ours | theirs
    settings = json.loads((tmp_path / "e" / "config.json").read_text())
    assert settings["bos_token_id"] == settings["eos_token_id"] == 50256

    def fail():
        raise UserError("no tables")

    monkeypatch.setattr("nanomla.formats.gpt2_tables", fail)
    done = run("tools.export", *args)
    assert done.returncode == 0
    assert done.stderr == "warning: exported without tokenizer.json, for transformers: no tables\n"
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
    for name in ("vocab.json", "merges.txt"):  # which earlier versions wrote
        (tmp_path / "e" / name).write_text("{}")
    first = weights.read_bytes()
    save(tmp_path / "run", **TINY_MLA)
    assert run("tools.export", *args).returncode == 0
    second = weights.read_bytes()
    assert len({path.stat().st_mode for path in (tmp_path / "e").iterdir()}) == 1
    assert not (tmp_path / "e" / "vocab.json").exists()
    assert first != second and sorted(p.name for p in tmp_path.iterdir()) == ["e", "run"]
    (tmp_path / "e" / "notes.md").write_text("mine")
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


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "char", "chars": CHARS["chars"] + "X"}, ["ids up to 23", "vocab_size=23"]),
        ({"kind": "byte"}, ["ids up to 255", "vocab_size=23"]),
        ({"kind": "char", "chars": 5}, ["chars must be a text"]),
        ({}, ["unknown tokenizer {}"]),
    ],
)
def test_a_tokenizer_that_is_not_the_models_is_one_line(tmp_path, spec, words):
    """Sampling and exporting name the checkpoint; a folder's names its file where that is wrong."""
    save(tmp_path / "run", tokenizer=spec)
    for done in (
        run("sample.py", f"--out_dir={tmp_path}/run", "--start=a"),
        run("tools.export", f"--out_dir={tmp_path}/run", f"--to={tmp_path}/e"),
    ):
        assert fails_with_one_line(done, 1, f"{tmp_path}/run/ckpt.pt: ", *words)
    foreign("llama").save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "nanomla_tokenizer.json").write_text(json.dumps(spec))
    done = run("sample.py", f"--init_from={tmp_path}/hf", "--start=a")
    assert fails_with_one_line(done, 1, f"{tmp_path}/hf", *words)


def test_names_that_are_nothing(tmp_path, dataset):
    """A name that is neither a file nor a folder, an empty folder, two sources at once."""
    base = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    done = run("train.py", *base, "--init_from=gpt3")
    assert fails_with_one_line(done, 1, "gpt3", "gpt2-xl")
    done = run("sample.py", f"--init_from={tmp_path}")
    assert fails_with_one_line(done, 1, "no checkpoint in", "nor config.json")
    done = run("sample.py", "--init_from=gpt2", "--ckpt=x.pt")
    assert fails_with_one_line(done, 2, "ckpt and init_from")
