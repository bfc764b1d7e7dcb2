"""
Weights in and out of safetensors, beside transformers.

Run: python -m pytest tests/test_formats.py
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Annotated

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from nanomla import bpe, checkpoint, formats
from nanomla.checkpoint import Checkpoint
from nanomla.settings import UserError
from tests.conftest import TINY, TINY_MLA, fails_with_one_line, randomise, run, tiny_config

CHARS = {"kind": "char", "chars": "abcdefghijklmnopqrstuvw"}  # 23, as TINY's vocabulary
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def all_logits(model, idx):
    with torch.no_grad():
        return model.eval()(idx, idx)[0]


def transformers_gpt2(**settings):
    """transformers' GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 23, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return randomise(GPT2LMHeadModel(GPT2Config(**shape, **ends, **settings)), 0.2)


@pytest.fixture
def gpt2(tmp_path):
    """A Hugging Face folder as transformers writes it, token ids, and its model's logits."""
    model = transformers_gpt2()
    model.save_pretrained(tmp_path / "hf")
    idx = torch.randint(23, (3, 16))
    with torch.no_grad():
        return tmp_path / "hf", idx, model(idx).logits


def write(folder, convert, model, spec=None):
    """Write a model in a format."""
    settings, tensors = convert(model)
    texts = {"config.json": formats.as_json(settings)}
    if spec:
        texts["nanomla_tokenizer.json"] = formats.as_json(spec)
    formats.write_folder(folder, tensors, texts)


# --------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu"])
def test_transformers_gpt2_opens_with_equal_logits(tmp_path, activation):
    """Both activations, at 1e-5 (the target is 1e-4); the wrong one would be seen."""
    model = transformers_gpt2(activation_function=activation)
    idx = torch.randint(23, (3, 16))
    model.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, {"dropout": 0.25})
    gelu, other = ("exact", "tanh") if activation == "gelu" else ("tanh", "exact")
    assert ours.config.dropout == 0.25 and ours.config.gelu == gelu
    with torch.no_grad():
        want = model(idx).logits
    torch.testing.assert_close(all_logits(ours, idx), want, **CLOSE)
    wrong = GPT(dataclasses.replace(ours.config, gelu=other))
    wrong.load_state_dict(ours.state_dict())
    assert (all_logits(wrong, idx) - want).abs().max() > 1e-4


def test_other_spellings_of_the_same_folder(gpt2):
    """
    Without the prefix, with old mask buffers, with lm_head, in half precision, in pieces: the same
    logits.
    """
    folder, idx, want = gpt2
    state = load_file(folder / "model.safetensors")
    bare = {k.removeprefix("transformer."): v for k, v in state.items()}
    mask = torch.ones(1, 1, 16, 16).tril().bool()
    masks = {"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}
    head = {"lm_head.weight": state["transformer.wte.weight"].clone()}
    for tensors in (bare, {**bare, **masks}, {**state, **head}):
        save_file(tensors, folder / "model.safetensors")
        torch.testing.assert_close(all_logits(GPT.from_pretrained(folder), idx), want, **CLOSE)
    save_file({k: v.half() for k, v in state.items()}, folder / "model.safetensors")
    model = GPT.from_pretrained(folder)
    assert model.lm_head.weight.dtype == torch.float32
    assert (all_logits(model, idx) - want).abs().max() < 0.05
    (folder / "model.safetensors").unlink()
    pieces = {f"piece-{i}.safetensors": dict(list(state.items())[i::2]) for i in range(2)}
    for name, tensors in pieces.items():
        save_file(tensors, folder / name)
    index = {"weight_map": {k: name for name, tensors in pieces.items() for k in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(all_logits(GPT.from_pretrained(folder), idx), want, **CLOSE)


def test_names_are_fetched_from_the_hub(gpt2, monkeypatch):
    """gpt2-medium fetches two files and no more; where that fails, one line names the remedy."""
    import huggingface_hub

    folder, idx, want = gpt2
    asked = []

    def fetch(repository, file):
        asked.append((repository, file))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    model = GPT.from_pretrained("gpt2-medium")
    torch.testing.assert_close(all_logits(model, idx), want, **CLOSE)
    files = ("config.json", "model.safetensors")
    assert asked == [("openai-community/gpt2-medium", file) for file in files]

    def fail(repository, file):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    done = run("sample.py", "--init_from=gpt2", "--start=a")
    words = ("gpt2 cannot be had", "no route", "openai-community/gpt2", "--init_from=FOLDER")
    assert fails_with_one_line(done, 1, *words)


def test_open_weights_finds_each_kind(tmp_path, gpt2):
    """
    A file, a run's folder with either preference, an export, a Hugging Face folder, and names that
    are nothing; `source` is what was read.
    """
    model = GPT(tiny_config())
    args = dataclasses.asdict(model.config)
    (tmp_path / "run").mkdir()
    for step, best in ((1, True), (2, False)):
        stored = Checkpoint(model.state_dict(), args, iter_num=step)
        checkpoint.save(tmp_path / "run", stored, best)
    write(tmp_path / "export", formats.as_nanomla, model)
    best, latest = tmp_path / "run" / "best.pt", tmp_path / "run" / "ckpt.pt"
    for name, prefer_best, source, step in (
        (best, False, best, 1),
        (tmp_path / "run", False, latest, 2),
        (tmp_path / "run", True, best, 1),
        (tmp_path / "export", False, tmp_path / "export", 0),
        (gpt2[0], True, gpt2[0], 0),
    ):
        found = formats.open_weights(str(name), prefer_best)
        assert (found.source, found.iter_num) == (str(source), step)
        assert checkpoint.build(found)[0].config.n_embd == 24
    with pytest.raises(UserError, match="gpt3: no such file or folder.*gpt2-xl"):
        formats.open_weights("gpt3")
    with pytest.raises(UserError, match="it holds neither ckpt.pt, best.pt nor config.json"):
        formats.open_weights(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize(
    "settings",
    [
        {},
        TINY_MLA,
        {**TINY_MLA, "mla_groups": 2, "mla_q_latent_dim": 5, "bias": False},
        {
            **TINY_MLA,
            "mla_share_latent": True,
            "use_svd": True,
            "svd_rank": 3,
            "mla_norm": "layernorm",
        },
        {"use_svd": True, "svd_rank": 3},
        {"pos_emb": "rope"},
    ],
)
def test_our_own_format_round_trips(tmp_path, settings):
    """Bit by bit, config and tokenizer too; tied and shared weights are stored once."""
    model = randomise(GPT(tiny_config(**settings)), 0.2)
    write(tmp_path / "e", formats.as_nanomla, model, CHARS)
    stored, twin = formats.read_pretrained(tmp_path / "e"), GPT.from_pretrained(tmp_path / "e")
    assert stored.tokenizer == CHARS and twin.config == model.config
    pairs = zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    count = sum(t.numel() for t in load_file(tmp_path / "e" / "model.safetensors").values())
    assert count == sum(p.numel() for p in model.parameters())


# For every field of GPTConfig a value that differs from TINY's and from the default.
FLIPPED = {
    "block_size": 17, "vocab_size": 29, "n_layer": 3, "n_head": 2, "n_embd": 32, "dropout": 0.25,
    "bias": False, "gelu": "tanh", "pos_emb": "rope", "rope_theta": 500.0, "use_mla": True,
    "mla_latent_dim": 5, "mla_groups": 2, "mla_rope_dim": 2, "mla_q_latent_dim": 5,
    "mla_norm": "layernorm", "mla_share_latent": True, "use_svd": True, "svd_rank": 3,
    "svd_method": "randomized",
}  # fmt: skip
WITHOUT_EFFECT = ("rope_theta", "mla_", "svd_")  # how their names begin, in a model that fits GPT-2


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(GPTConfig)])
def test_every_setting_survives_an_export_as_gpt2_or_forbids_it(tmp_path, name):
    """
    Flip one field of GPTConfig: either the model is no GPT-2, or the model that is read back
    computes the same and has the same value, unless the field has no effect.
    """
    config = tiny_config(**{name: FLIPPED[name]})
    forbidden = ("pos_emb", "use_mla", "use_svd")
    assert formats.fits_gpt2(config) == (name not in forbidden)
    if name in forbidden:
        return
    model = randomise(GPT(config), 0.2)
    write(tmp_path / "e", formats.as_gpt2, model)
    twin, idx = GPT.from_pretrained(tmp_path / "e"), torch.randint(23, (3, 16))
    torch.testing.assert_close(all_logits(twin, idx), all_logits(model, idx), **CLOSE)
    if name == "dropout":  # transformers' three dropouts may differ, so a reader takes none of them
        settings = json.loads((tmp_path / "e" / "config.json").read_text())
        assert {settings[f"{part}_pdrop"] for part in ("attn", "embd", "resid")} == {0.25}
    elif name != "bias" and not name.startswith(WITHOUT_EFFECT):
        assert getattr(twin.config, name) == FLIPPED[name]


def test_a_setting_that_is_new_forbids_gpt2():
    """A field that the list does not have: its default is GPT-2, any other value is not."""

    @dataclasses.dataclass
    class Grown(GPTConfig):
        norm: Annotated[str, "#model", "a setting of a later version"] = "layernorm"

    assert formats.fits_gpt2(Grown(**TINY))
    assert not formats.fits_gpt2(Grown(**TINY, norm="rmsnorm"))


def test_gpt2_tokenizer_files_are_openais():
    """merges.txt has the sha256 of OpenAI's; vocab.json has tiktoken's id for every token."""
    files = formats.gpt2_tokenizer()
    digest = hashlib.sha256(files["merges.txt"].encode()).hexdigest()
    assert digest == bpe.TABLES["gpt2"][bpe.MERGES]
    vocabulary = json.loads(files["vocab.json"])
    assert sorted(vocabulary.values()) == list(range(50257))
    assert vocabulary["Hello"] == 15496 and vocabulary["Ġworld"] == 995


def test_a_failed_write_leaves_the_earlier_export(tmp_path, monkeypatch):
    """An error in the middle: the old folder is whole, nothing is left beside it."""
    settings, tensors = formats.as_gpt2(GPT(tiny_config()))
    formats.write_folder(tmp_path / "e", tensors, {"config.json": "{}"})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="nothing exported.*disk full"):
        formats.write_folder(tmp_path / "e", tensors, {"config.json": formats.as_json(settings)})
    assert (tmp_path / "e" / "config.json").read_text() == "{}" and os.listdir(tmp_path) == ["e"]


# --------------------------------------------------------------------------------------------------
# Damaged and hostile folders


def change_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


def change_weights(folder, **changes):
    state = {**load_file(folder / "model.safetensors"), **changes}
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def config(text):
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / "config.json").write_bytes(content)


def settings(**changes):
    return lambda folder: change_config(folder, **changes)


def weight(name, tensor):
    return lambda folder: change_weights(folder, **{f"transformer.{name}": tensor})


def truncate(share):
    return lambda folder: cut(folder / "model.safetensors", share)


def weights_as(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


DAMAGES = [
    (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
    (config("{"), ["config.json", "cannot be read"]),
    (config("[]"), ["config.json", "no JSON object"]),
    (config("[" * 100_000), ["config.json", "cannot be read"]),
    (config(b"\xff\xfe"), ["config.json", "cannot be read"]),
    (weights_as("elsewhere"), ["no model.safetensors"]),
    (weights_as("pytorch_model.bin"), ["no model.safetensors", "is a pickle"]),
    (truncate(0.9), ["model.safetensors", "truncated"]),
    (truncate(0.001), ["model.safetensors", "truncated"]),
    (truncate(0), ["model.safetensors", "truncated"]),
    (settings(model_type="llama"), ["model_type 'llama'", "gpt2 and nanomla"]),
    (settings(model_type=None), ["model_type None"]),
    (settings(activation_function="relu"), ["activation_function='relu'", "gelu_new"]),
    (settings(activation_function=[]), ["config.json"]),
    (settings(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx=True"]),
    (settings(scale_attn_weights=False), ["scale_attn_weights=False"]),
    (settings(layer_norm_epsilon=1e-6), ["layer_norm_epsilon=1e-06"]),
    (settings(n_inner=48), ["n_inner=48"]),
    (settings(n_layer="2"), ["n_layer='2'", "a whole number of at least 1"]),
    (settings(n_embd=None), ["config.json"]),
    (settings(n_layer=3), ["missing", "h.2."]),
    (settings(n_layer=1), ["unknown", "h.1."]),
    (settings(n_positions=17), ["wpe.weight", "(16, 24)", "(17, 24)"]),
    (weight("wte.weight", None), ["2 missing", "lm_head.weight"]),
    (weight("h.1.ln_1.bias", None), ["1 missing", "h.1.ln_1.bias"]),
    (
        lambda folder: change_weights(folder, **{"lm_head.weight": torch.zeros(23, 24)}),
        ["lm_head and wte are different"],
    ),
    (weight("ln_f.bias", torch.zeros(24).char()), ["ln_f.bias", "quantised"]),
    (
        lambda folder: (folder / "nanomla_tokenizer.json").write_text("[1]"),
        ["nanomla_tokenizer.json"],
    ),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_bad_folders_are_one_line(gpt2, damage, words):
    """What can be wrong with a folder: one line that names it and the fault."""
    folder, _, _ = gpt2
    damage(folder)
    done = run("sample.py", f"--init_from={folder}", "--start=a")
    assert fails_with_one_line(done, 1, str(folder), *words)
