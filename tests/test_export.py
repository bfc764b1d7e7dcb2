"""The export command, and exports in use. Run: python -m pytest tests/test_export.py"""

import json
import shlex

import pytest
import torch

from model import GPT
from nanomla import checkpoint, formats
from nanomla.dataset import read_meta
from nanomla.errors import UserError
from nanomla.tokenizer import ends_of_text
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
    STYLES,
    foreign,
    greedy,
    load_with_transformers,
    their_logits,
)
from tests.test_tokenizer import TEXT, byte_level

GREEDY = ["--max_new_tokens=9", "--temperature=0"]


def save(folder, tokenizer=CHARS, **settings):
    """A checkpoint of random weights, as train.py writes it."""
    model = randomise(GPT(tiny_config(**settings)), 0.2)
    folder.mkdir(exist_ok=True)
    save_model(folder, model, tokenizer=tokenizer)
    return model


def export(source, target, *flags):
    """Run the command on a run's folder or a folder of weights."""
    return run("tools.export", f"--out_dir={source}", f"--to={target}", *flags)


def files(folder):
    """The names of a folder's files."""
    return {path.name for path in folder.iterdir()}


def sample(source, prompt, *flags):
    """The greedy text of sample.py."""
    return run("sample.py", f"--init_from={source}", f"--start={prompt}", *GREEDY, *flags).stdout


@pytest.mark.parametrize("kind", STYLES)
def test_a_model_in_another_style_is_exported_as_one(tmp_path, kind):
    """The format is found and named with its reason; transformers writes sample.py's text."""
    save(tmp_path / "run", **STYLES[kind])
    done = export(tmp_path / "run", tmp_path / "new" / "e")
    assert done.returncode == 0 and done.stderr == ""
    assert f"{tmp_path}/run/ckpt.pt as {kind}: {formats.FORMATS[kind].has}\n" in done.stdout
    assert files(tmp_path / "new") == {"e"}  # nothing is left over
    settings = json.loads((tmp_path / "new/e/config.json").read_text())
    assert settings["model_type"] == kind and settings["eos_token_id"] is None
    text = sample(tmp_path / "run", "abc")
    assert text == sample(tmp_path / "new/e", "abc") and len(text) == 13
    theirs = load_with_transformers(tmp_path / "new/e")
    ids = greedy(theirs, torch.tensor([[0, 1, 2]]), 9)[0]
    assert "".join(CHARS["chars"][i] for i in ids) == text.removesuffix("\n")


def test_a_format_that_does_not_fit_is_refused(tmp_path):
    """--format names the settings in the way; our own format takes any model."""
    save(tmp_path / "run", **{**DEEPSEEK_STYLE, "mla_groups": 2})
    done = export(tmp_path / "run", tmp_path / "e", "--format=deepseek_v3")
    assert fails_with_one_line(done, 1, "--format=deepseek_v3 does not fit", "has no mla_groups=2")
    assert not (tmp_path / "e").exists()
    done = run("tools.export", f"--ckpt={tmp_path}/run/ckpt.pt", f"--to={tmp_path}/e")
    assert done.returncode == 0 and f"{tmp_path}/run/ckpt.pt as nanomla: gpt2 has no" in done.stdout
    assert "; deepseek_v3 has no mla_groups=2\n" in done.stdout
    save(tmp_path / "run", **STYLES["llama"])
    done = export(tmp_path / "run", tmp_path / "e", "--format=nanomla")
    assert done.returncode == 0 and "as nanomla: as asked" in done.stdout


def test_only_an_export_is_replaced(tmp_path):
    """A folder with anything else in it is left alone; a new export replaces an earlier one."""
    save(tmp_path / "run")
    weights = tmp_path / "e" / "model.safetensors"
    assert export(tmp_path / "run", tmp_path / "e").returncode == 0
    first = weights.read_bytes()
    save(tmp_path / "run", **TINY_MLA)
    assert export(tmp_path / "run", tmp_path / "e").returncode == 0
    second = weights.read_bytes()
    assert len({path.stat().st_mode for path in (tmp_path / "e").iterdir()}) == 1
    assert first != second and files(tmp_path) == {"e", "run"}
    (tmp_path / "e" / "notes.md").write_text("mine")
    for target in ("e", "run"):
        done = export(tmp_path / "run", tmp_path / target)
        assert fails_with_one_line(done, 1, "holds other files")
    done = run("tools.export", f"--out_dir={tmp_path}/run")
    assert fails_with_one_line(done, 2, "--to=FOLDER")
    assert weights.read_bytes() == second


# ---- Tokenizers


def test_gpt2s_tokenizer_in_and_out(tmp_path, monkeypatch):
    """
    The end of a text is that of the tokenizer, and its tokenizer.json alone is read as tiktoken's
    gpt2 again. Without its tables, or without any tokenizer, a warning.
    """
    gpt2 = {"kind": "tiktoken", "name": "gpt2"}
    save(tmp_path / "run", tokenizer=gpt2, **{**DEEPSEEK_STYLE, "vocab_size": 50304})
    assert export(tmp_path / "run", tmp_path / "e").stderr == ""
    settings = json.loads((tmp_path / "e" / "config.json").read_text())
    assert settings["bos_token_id"] == settings["eos_token_id"] == 50256
    (tmp_path / "e" / "nanomla_tokenizer.json").unlink()
    assert formats.read_pretrained(tmp_path / "e").tokenizer == gpt2

    def fail():
        raise UserError("no tables")

    monkeypatch.setattr("nanomla.formats.folder.gpt2_tables", fail)
    done = export(tmp_path / "run", tmp_path / "e")
    assert done.returncode == 0
    assert done.stderr == "warning: exported without tokenizer.json, for transformers: no tables\n"
    ours = {"README.md", "config.json", "model.safetensors", "nanomla_tokenizer.json"}
    assert files(tmp_path / "e") == ours
    save(tmp_path / "run", tokenizer=None)
    done = export(tmp_path / "run", tmp_path / "e")
    assert "warning: exported without a tokenizer: " in done.stderr
    assert files(tmp_path / "e") == ours - {"nanomla_tokenizer.json"}


# ---- Models of others, fine-tuned


def test_a_foreign_folder_is_sampled_and_exported(tmp_path):
    """
    A folder with a tokenizer.json goes out with it, and AutoTokenizer reads it there; one with more
    ids than the model has is refused.
    """
    from transformers import AutoTokenizer

    theirs = byte_level()
    folder = tmp_path / "hf"
    foreign("llama", vocab_size=288).save_pretrained(folder)
    json_text = theirs.to_str(pretty=True).replace("\n", "\r\n")  # as Windows writes it
    (folder / "tokenizer.json").write_bytes(json_text.encode())
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"eos_token_id": [0, 5], "bos_token_id": 7}
    (folder / "config.json").write_text(json.dumps(settings))
    done = export(folder, tmp_path / "e")
    assert done.returncode == 0 and "as llama: " in done.stdout and done.stderr == ""
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert files(tmp_path / "e") == names | {"tokenizer_config.json"}
    assert (tmp_path / "e" / "tokenizer.json").read_bytes() == json_text.encode()
    wrote = json.loads((tmp_path / "e" / "config.json").read_text())
    assert (wrote["bos_token_id"], wrote["eos_token_id"]) == (7, [0, 5])
    opened = AutoTokenizer.from_pretrained(tmp_path / "e")
    assert opened(TEXT)["input_ids"] == theirs.encode(TEXT).ids
    assert opened.eos_token == "<|end|>" and opened.bos_token == theirs.id_to_token(7)
    text = sample(folder, "to be")
    assert text == sample(tmp_path / "e", "to be") and text.startswith("to be")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 288}}}')
    done = run("sample.py", f"--init_from={folder}", "--start=a")
    assert fails_with_one_line(done, 1, str(folder), "ids up to 288", "vocab_size=288")


def test_all_ends_go_out_and_transformers_stops_at_them(tmp_path):
    """
    Those of config.json and of generation_config.json; in our own format and through a dataset that
    is prepared with the folder's tokenizer too.
    """
    folder = tmp_path / "hf"
    foreign("llama", vocab_size=288).save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    idx = torch.tensor([[70, 71, 72]])
    made = greedy(load_with_transformers(folder), idx, 9)[0, 3:].tolist()
    count = max(i for i in range(9) if made[i] not in made[:i])
    assert count > 1
    settings = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 3}
    (folder / "config.json").write_text(json.dumps(settings))
    ends = {"eos_token_id": [279, made[count]]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    assert export(folder, tmp_path / "e").returncode == 0
    wrote = json.loads((tmp_path / "e" / "config.json").read_text())
    assert wrote["eos_token_id"] == [3, 279, made[count]]
    for exported in (folder, tmp_path / "e"):
        stopped = greedy(load_with_transformers(exported), idx, 9)[0, 3:].tolist()
        assert stopped == made[: count + 1]
        assert ends_of_text(formats.read_pretrained(exported).tokenizer) == (3, 279, made[count])
    assert export(tmp_path / "e", tmp_path / "ours", "--format=nanomla").returncode == 0
    spec = formats.read_pretrained(folder).tokenizer
    assert formats.read_pretrained(tmp_path / "ours").tokenizer == spec
    (tmp_path / "a.txt").write_text("to be or not to be, wörld\n" * 60)
    data = [tmp_path / "a.txt", f"--out={tmp_path}/data", f"--tokenizer={folder}"]
    assert run("data/text/prepare.py", *data).returncode == 0
    assert read_meta(tmp_path / "data").tokenizer == spec
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    meta["tokenizer"]["end"] = 3  # as an earlier version wrote it
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    done = export(folder, tmp_path / "e", f"--dataset={tmp_path}/data")
    assert done.returncode == 0 and formats.read_pretrained(tmp_path / "e").tokenizer == spec
    args = [*QUICK, f"--dataset={tmp_path}/data", f"--out_dir={tmp_path}/o", "--max_iters=1"]
    tuned = run("train.py", *args, f"--init_from={folder}")
    assert tuned.returncode == 0 and "another tokenizer" not in tuned.stderr, tuned.stderr


def test_a_foreign_folder_is_fine_tuned_on_text_in_its_own_ids(tmp_path):
    """
    The three commands of docs/export.md: no warning, the same tokenizer throughout, and a context
    that is cropped to QUICK's.
    """
    folder = tmp_path / "hf"
    foreign("gpt2", vocab_size=288, n_positions=32).save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("to be or not to be, wörld\n" * 60)
    data = [tmp_path / "a.txt", f"--out={tmp_path}/data", f"--tokenizer={folder}"]
    done = run("data/text/prepare.py", *data)
    assert done.returncode == 0, done.stderr
    args = [*QUICK, f"--dataset={tmp_path}/data", f"--out_dir={tmp_path}/o", "--max_iters=2"]
    done = run("train.py", *args, f"--init_from={folder}")
    assert done.returncode == 0 and "another tokenizer" not in done.stderr, done.stderr
    assert export(tmp_path / "o", tmp_path / "t").returncode == 0
    spec = formats.read_pretrained(folder).tokenizer
    assert GPT.from_pretrained(tmp_path / "o").config.block_size == 16
    assert formats.read_pretrained(tmp_path / "t").tokenizer == spec
    idx = torch.randint(288, (2, 16))
    want = all_logits(GPT.from_pretrained(tmp_path / "o"), idx)
    logits = their_logits(load_with_transformers(tmp_path / "t"), idx)
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


def test_a_run_is_exported_described_and_trained_on(tmp_path, dataset):
    """
    Its model card has the facts and the commands, the first of which makes the same weights again;
    a run that starts from the export starts where the first one ended.
    """
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/a", "--pos_emb=rope"]
    assert run("train.py", *args, "--use_mla=True", "--max_iters=10").returncode == 0
    assert export(tmp_path / "a", tmp_path / "e").returncode == 0
    card = (tmp_path / "e" / "README.md").read_text()
    _, metadata, body = card.split("---\n", 2)
    assert metadata.startswith("library_name: nanomla\npipeline_tag: text-generation\ntags:\n")
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
        f"python -m tools.export --out_dir={tmp_path}/a --to={tmp_path}/e",
    ):
        assert words in body, words
    command = next(line for line in body.splitlines() if "train.py" in line).strip()
    script, *again = shlex.split(command)[1:]
    again = [flag for flag in again if not flag.startswith("--out_dir")]
    assert run(script, *again, f"--out_dir={tmp_path}/b").returncode == 0
    twin = checkpoint.load(tmp_path / "b" / "best.pt")
    assert all(torch.equal(tensor, twin.model[name]) for name, tensor in stored.model.items())
    resumed = run("train.py", *args, "--eval_only", "--init_from=resume").stdout
    tune = [*QUICK, f"--dataset={dataset}", f"--init_from={tmp_path}/e", "--dropout=0.1"]
    tuned = run("train.py", *tune, f"--out_dir={tmp_path}/c", "--eval_only").stdout
    assert tuned.splitlines()[-1].split(":")[1] == resumed.splitlines()[-1].split(":")[1]
