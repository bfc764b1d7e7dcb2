"""
Weights in and out of safetensors, beside transformers.

Run: python -m pytest tests/test_formats.py
"""

import dataclasses
import json
import os
import resource
from pathlib import Path
from typing import Annotated

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import ATTENTION, GPT, GPTConfig
from nanomla import checkpoint, formats
from nanomla.checkpoint import Checkpoint
from nanomla.errors import UserError
from nanomla.tokenizer import Tokenizer, end_of_text, read_hf, start_of_text
from tests.conftest import (
    TINY,
    TINY_MLA,
    all_logits,
    fails_with_one_line,
    randomise,
    run,
    tiny_config,
)
from tests.test_tokenizer import byte_level

CHARS = {"kind": "char", "chars": "abcdefghijklmnopqrstuvw"}  # 23, as TINY's vocabulary
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def transformers_gpt2(**settings):
    """transformers' GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 23, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return randomise(GPT2LMHeadModel(GPT2Config(**shape, **ends, **settings)), 0.2)


SHAPE = {
    "vocab_size": 23, "max_position_embeddings": 16, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
# nh 4, nkv 2, hs 10, and for MLA L 7, r 4, nope 5, hs 6: no two are equal.
HEADS = {"num_key_value_heads": 2, "head_dim": 10}
DENSE = {
    "num_key_value_heads": 4, "kv_lora_rank": 7, "q_lora_rank": None, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 5, "v_head_dim": 6, "first_k_dense_replace": 2,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", HEADS),
    "mistral": ("Mistral", {**HEADS, "sliding_window": None}),
    "qwen2": ("Qwen2", HEADS),
    "deepseek_v3": ("DeepseekV3", DENSE),
}


def foreign(kind, **settings):
    """A random model of transformers: every weight drawn, biases and norms too."""
    import transformers

    name, own = FAMILIES[kind]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **own, **settings})
    return randomise(getattr(transformers, f"{name}ForCausalLM")(config), 0.2)


def greedy(model, idx, n=6):
    """transformers' greedy continuation, on its cache."""
    mask = torch.ones_like(idx)  # otherwise it takes some token for padding
    return model.generate(idx, max_new_tokens=n, do_sample=False, attention_mask=mask)


def cached_logits(model, idx):
    """Logits of all positions from a cache: first 5 tokens at once, then one by one."""
    cache, rows = model.make_cache(len(idx), idx.size(1)), []
    with torch.no_grad():
        for piece in idx.split([5] + [1] * (idx.size(1) - 5), dim=1):
            rows.append(model(piece, cache=cache)[0])
    return torch.cat(rows, dim=1)  # of positions 4 to the end


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


IN = [
    ("llama", {}),
    ("llama", {"head_dim": None, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen2", {"head_dim": 6, "tie_word_embeddings": True}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"rope_interleave": False}),
    ("deepseek_v3", {"q_lora_rank": 9}),
    ("deepseek_v3", {"q_lora_rank": 9, "rope_interleave": False, "tie_word_embeddings": True}),
    ("deepseek_v3", {"attention_bias": True, "rope_parameters": {"rope_theta": 77.0}}),
    ("deepseek_v3", {"v_head_dim": 2, "qk_rope_head_dim": 8, "rms_norm_eps": 1e-2}),
]


@pytest.mark.parametrize(("kind", "settings"), IN)
def test_llama_and_deepseek_open_with_equal_logits(tmp_path, kind, settings):
    """
    The whole pass and decoding on our cache at 1e-5; the same greedy text; and out again, from any
    of the kinds: transformers loads what we write with the same logits.
    """
    model, idx = foreign(kind, **settings), torch.randint(23, (3, 16))
    model.save_pretrained(tmp_path / "hf")
    ours = GPT.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        want = model(idx).logits
    torch.testing.assert_close(all_logits(ours, idx), want, **CLOSE)
    torch.testing.assert_close(cached_logits(ours, idx), want[:, 4:], **CLOSE)
    assert torch.equal(ours.generate(idx[:, :7], 6, temperature=0), greedy(model, idx[:, :7]))
    assert ours.config.tie_weights == settings.get("tie_word_embeddings", False)
    if kind == "deepseek_v3" and "attention_bias" in settings:
        assert formats.in_the_way(ours.config, kind) == ["bias=True"]
        return
    kind = "deepseek_v3" if kind == "deepseek_v3" else "llama"
    assert formats.fitting_format(ours.config)[0] == kind
    write(tmp_path / "again", formats.FORMATS[kind].write, ours)
    torch.testing.assert_close(load_with_transformers(tmp_path / "again", idx), want, **CLOSE)


def load_with_transformers(folder, idx):
    """The logits of a folder's model, of which nothing is missing and nothing left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(idx).logits


def test_the_order_of_rotary_numbers_matters(tmp_path):
    """The same weights read as interleaved and as half-split are two different models."""
    foreign("deepseek_v3").save_pretrained(tmp_path)
    idx, logits = torch.randint(23, (3, 16)), []
    for interleaved in (True, False, None):  # None is false to transformers
        change_config(tmp_path, rope_interleave=interleaved)
        logits.append(all_logits(GPT.from_pretrained(tmp_path), idx))
    assert torch.equal(logits[1], logits[2]) and (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", FAMILIES)
def test_shards_bfloat16_and_older_spellings(tmp_path, kind):
    """
    bfloat16 in pieces: transformers' logits when both compute in float32. Then names without the
    prefix, an old rotary buffer and rope_theta where transformers 4 wrote it.
    """
    model, idx = foreign(kind).bfloat16(), torch.randint(23, (3, 16))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        want = model(idx).logits
    ours = GPT.from_pretrained(tmp_path)
    assert ours.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(all_logits(ours, idx), want, **CLOSE)
    state = {name.removeprefix("model."): t.contiguous() for name, t in model.state_dict().items()}
    state["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(state, tmp_path / "model.safetensors")
    change_config(tmp_path, rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    torch.testing.assert_close(all_logits(GPT.from_pretrained(tmp_path), idx), want, **CLOSE)
    change_config(tmp_path, rope_theta=77.0)
    assert GPT.from_pretrained(tmp_path).config.rope_theta == 77.0


# --------------------------------------------------------------------------------------------------
# Writing

LLAMA_STYLE = {
    "pos_emb": "rope", "norm": "rmsnorm", "mlp": "swiglu", "mlp_hidden": 40, "bias": False,
}  # fmt: skip
DEEPSEEK_STYLE = {**LLAMA_STYLE, "use_mla": True, "mla_latent_dim": 7, "mla_rope_dim": 2}
OUT = [
    ("llama", {}),
    ("llama", {"bias": True, "n_kv_head": 2, "head_dim": 10}),
    ("llama", {"n_kv_head": 1, "tie_weights": False, "rope_theta": 77.0, "norm_eps": 1e-3}),
    ("llama", {"mlp_hidden": None}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"mla_q_latent_dim": 5, "mla_nope_dim": 3, "head_dim": 8, "mla_rope_dim": 4}),
    ("deepseek_v3", {"tie_weights": False, "rope_theta": 77.0, "norm_eps": 1e-3}),
]


@pytest.mark.parametrize(("kind", "settings"), OUT)
def test_transformers_loads_llama_and_deepseek_exports(tmp_path, kind, settings):
    """
    Nothing missing or left over, equal logits, the same greedy text on either cache; and the model
    that is read back is the same bit by bit.
    """
    from transformers import AutoModelForCausalLM

    style = DEEPSEEK_STYLE if kind == "deepseek_v3" else LLAMA_STYLE
    model = randomise(GPT(tiny_config(**style | settings)), 0.2)
    assert formats.fitting_format(model.config)[0] == kind
    write(tmp_path / "e", formats.FORMATS[kind].write, model)
    idx = torch.randint(23, (3, 16))
    theirs = load_with_transformers(tmp_path / "e", idx)
    torch.testing.assert_close(theirs, all_logits(model, idx), **CLOSE)
    torch.testing.assert_close(theirs[:, 4:], cached_logits(model, idx), **CLOSE)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "e")
    new = model.generate(idx[:, :7], 9, temperature=0)
    assert torch.equal(new, greedy(other, idx[:, :7], 9))
    twin = GPT.from_pretrained(tmp_path / "e")
    pairs = zip(model.state_dict().items(), twin.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(t, u) for (a, t), (b, u) in pairs)
    untied = "lm_head.weight" in load_file(tmp_path / "e" / "model.safetensors")
    assert untied == (not model.config.tie_weights)


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
        {"tie_weights": False, "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 2, "head_dim": 10},
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


# For every field of GPTConfig a value that differs from the styles' and from the default, and what
# must be set with it.
FLIPPED = {
    "block_size": 17, "vocab_size": 29, "n_layer": 3, "n_head": 2, "n_embd": 32, "dropout": 0.25,
    "gelu": "tanh", "rope_theta": 500.0, "norm_eps": 1e-3, "mlp_hidden": 44, "tie_weights": False,
    "n_kv_head": 2, "head_dim": 10, "mla_latent_dim": 5, "mla_groups": 2, "mla_rope_dim": 4,
    "mla_nope_dim": 3, "mla_rope": "latent", "mla_q_latent_dim": 5, "mla_norm": "layernorm",
    "mla_share_latent": True, "use_latent_tokens": True, "n_latent_tokens": 3, "use_svd": True,
    "svd_rank": 3, "svd_method": "randomized",
}  # fmt: skip
OTHER = {
    "bias": (True, False), "pos_emb": ("learned", "rope"), "norm": ("layernorm", "rmsnorm"),
    "mlp": ("gelu", "swiglu"), "use_mla": (True, False),
}  # fmt: skip
LATENT_TOKENS = {"n_latent_tokens": 3, "use_mla": False, "pos_emb": "learned"}
WITH = {"use_latent_tokens": LATENT_TOKENS}
STYLES = {"gpt2": {}, "llama": LLAMA_STYLE, "deepseek_v3": DEEPSEEK_STYLE}
# A name of attention that flags can say becomes these flags; another has a test of its own.
NAMES = [f.name for f in dataclasses.fields(GPTConfig) if f.name != "attention"]


@pytest.mark.parametrize("kind", STYLES)
def test_an_attention_of_ones_own_forbids_other_formats(kind, monkeypatch):
    """Its name is in the way of every format but our own."""
    monkeypatch.setitem(ATTENTION, "mine", ATTENTION["mha"])
    settings = {**STYLES[kind], "attention": "mine", "use_mla": False}
    config = tiny_config(**settings)
    assert "attention='mine'" in formats.in_the_way(config, kind)
    assert formats.in_the_way(config, "nanomla") == []


def flipped(name, style):
    """A tiny config of a style with another value of this field."""
    config = tiny_config(**style)
    has = getattr(config, name)
    other = (0.5,) * max(config.rotary_dim // 2, 1) if name == "rope_freqs" else FLIPPED.get(name)
    value = next(v for v in OTHER.get(name, (other,)) if v != has)
    dropped = {"use_mla": ("mla_latent_dim", "mla_rope_dim"), "pos_emb": ("mla_rope_dim",)}
    kept = {k: v for k, v in style.items() if k not in dropped.get(name, ())}
    return tiny_config(**{**kept, **WITH.get(name, {}), name: value})


@pytest.mark.parametrize("kind", STYLES)
@pytest.mark.parametrize("name", NAMES)
def test_every_setting_survives_an_export_or_forbids_it(tmp_path, kind, name):
    """
    Flip one field of GPTConfig: either it is in the way of the format, or the model that is read
    back computes the same and has the same value, unless the field has no effect.
    """
    config = flipped(name, STYLES[kind])
    if formats.in_the_way(config, kind):
        assert any(setting.startswith(f"{name}=") for setting in formats.in_the_way(config, kind))
        return
    model = randomise(GPT(config), 0.2)
    write(tmp_path / "e", formats.FORMATS[kind].write, model)
    twin, idx = GPT.from_pretrained(tmp_path / "e"), torch.randint(23, (3, 16))
    torch.testing.assert_close(all_logits(twin, idx), all_logits(model, idx), **CLOSE)
    theirs = load_with_transformers(tmp_path / "e", idx)
    torch.testing.assert_close(theirs, all_logits(model, idx), **CLOSE)
    idle = {"gpt2": ("rope_", "mla_", "svd_", "n_latent"), "llama": ("gelu", "mla_", "svd_")}
    idle = (*idle.get(kind, ("gelu", "n_kv_head", "svd_")), "n_latent")
    if name == "dropout":  # transformers' three dropouts may differ, so a reader takes none of them
        settings = json.loads((tmp_path / "e" / "config.json").read_text())
        assert {v for k, v in settings.items() if k.endswith(("pdrop", "_dropout"))} == {0.25}
    elif not name.startswith(idle) and (kind, name) != ("gpt2", "bias"):
        assert getattr(twin.config, name) == getattr(config, name)


def test_what_is_in_the_way_of_each_format():
    """By name and value, for a model that none of them can hold; and the reason for the choice."""
    assert formats.in_the_way(tiny_config(**TINY_MLA), "gpt2") == ["pos_emb='rope'", "use_mla=True"]
    lacks = formats.in_the_way(tiny_config(**TINY_MLA), "deepseek_v3")
    assert lacks == ["bias=True", "norm='layernorm'", "mlp='gelu'"]
    kind, why = formats.fitting_format(tiny_config(**TINY_MLA))
    assert kind == "nanomla" and "deepseek_v3 has no bias=True, norm='layernorm'" in why
    kind, why = formats.fitting_format(tiny_config(**DEEPSEEK_STYLE))
    assert (kind, why) == ("deepseek_v3", "MLA with a decoupled rotary key, RMSNorm, SwiGLU")
    ragged = {**DEEPSEEK_STYLE, "mla_latent_dim": (7, 5)}
    assert formats.in_the_way(tiny_config(**ragged), "deepseek_v3") == ["mla_latent_dim=(7, 5)"]
    grouped = {**DEEPSEEK_STYLE, "mla_groups": 2}
    assert formats.in_the_way(tiny_config(**grouped), "deepseek_v3") == ["mla_groups=2"]


@pytest.mark.parametrize("kind", STYLES)
def test_an_attention_by_its_name_is_written(tmp_path, kind):
    """GPTConfig.attention may say what the flags say as well."""
    name = tiny_config(**STYLES[kind]).attention_name
    model = randomise(GPT(tiny_config(**STYLES[kind], attention=name)), 0.2)
    assert formats.in_the_way(model.config, kind) == []
    write(tmp_path / "e", formats.FORMATS[kind].write, model)
    twin, idx = GPT.from_pretrained(tmp_path / "e"), torch.randint(23, (3, 16))
    torch.testing.assert_close(all_logits(twin, idx), all_logits(model, idx), **CLOSE)


@pytest.mark.parametrize("kind", STYLES)
def test_a_setting_that_is_new_forbids_an_export(kind):
    """A field that the list does not have: its default is what the format has, no other value."""

    @dataclasses.dataclass
    class Grown(GPTConfig):
        sinks: Annotated[int, "#model", "a setting of a later version"] = 0

    style = {**TINY, **STYLES[kind]}
    assert formats.in_the_way(Grown(**style), kind) == []
    assert formats.in_the_way(Grown(**style, sinks=1), kind) == ["sinks=1"]


ALPHABET = "\n\t\r \0\x85\u2028\u200d.,'!abe\u0301é🙂日ßİ"  # also what others strip, join or fold
TEXTS = [
    *ALPHABET, "", "  a. b , a 'a  ! \n\n", "\r\n\n a e\u0301é\u0301🙂\u200d🙂 ",
    ALPHABET + ALPHABET[::-1],
]  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "char", "chars": ALPHABET},
        {"kind": "byte"},
        {"kind": "tiktoken", "name": "gpt2"},
        {"kind": "hf", "json": byte_level().to_str(), "end": 0, "bos": 7},
    ],
    ids=lambda spec: spec["kind"],
)
def test_transformers_reads_our_tokenizers(tmp_path, spec):
    """
    The same ids and text, nothing added, stripped or cleaned up. Without nanomla_tokenizer.json we
    read the same tokenizer.
    """
    from transformers import AutoTokenizer

    ours = Tokenizer(spec)
    for name, text in formats.tokenizer_files(spec).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    opened = AutoTokenizer.from_pretrained(tmp_path)
    again = read_hf(tmp_path / "tokenizer.json", {})
    for text in TEXTS:
        ids = ours.encode(text)
        assert opened(text)["input_ids"] == ids == Tokenizer(again).encode(text), repr(text)
        assert opened.decode(ids) == text == Tokenizer(again).decode(ids), repr(text)
    assert len(opened) == ours.vocab_size and opened.clean_up_tokenization_spaces is False
    assert (opened.bos_token_id, opened.eos_token_id) == (start_of_text(spec), end_of_text(spec))
    if spec["kind"] == "tiktoken":
        assert again == spec
    if spec["kind"] == "char":
        with pytest.raises(Exception, match="UNK"):
            opened("aZ")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "char", "chars": "a\udcffb"}, r"character '\\udcff' has no form in UTF-8"),
        ({"kind": "tiktoken", "name": "o200k_base"}, "no list of o200k_base's merges"),
    ],
)
def test_a_tokenizer_that_transformers_cannot_read(spec, words):
    """The error says why there is no file."""
    with pytest.raises(UserError, match=words):
        formats.tokenizer_files(spec)


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
    (settings(model_type="mamba"), ["model_type 'mamba'", "gpt2, llama, mistral, qwen2, deepseek"]),
    (settings(model_type=None), ["model_type None"]),
    (settings(model_type=["gpt2"]), ["model_type ['gpt2']"]),
    (settings(model_type="x" * 9999), ["model_type '" + "x" * 56 + "... cannot be read"]),
    (settings(activation_function="relu"), ["activation_function='relu'", "gelu_new"]),
    (settings(activation_function=[]), ["config.json"]),
    (settings(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx=True"]),
    (settings(scale_attn_weights=False), ["scale_attn_weights=False"]),
    (settings(layer_norm_epsilon="1e-6"), ["layer_norm_epsilon='1e-6'"]),
    (settings(n_inner=48), ["mlp.c_fc.weight", "(96, 24)", "(48, 24)"]),
    (settings(n_layer="2"), ["n_layer='2'", "a whole number of at least 1"]),
    (settings(n_layer=10**9), ["n_layer=1000000000", "2 layers"]),
    (settings(n_embd=None), ["config.json"]),
    (settings(n_layer=3), ["n_layer=3", "2 layers"]),
    (settings(n_layer=1), ["n_layer=1", "2 layers"]),
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


# --------------------------------------------------------------------------------------------------
# Hostile settings

WIDE = 10**12


def without(name):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        del content[name]
        (folder / "config.json").write_text(json.dumps(content))

    return change


def text(old, new):
    def change(folder):
        path = folder / "config.json"
        path.write_text(path.read_text().replace(old, new))

    return change


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 1.0}}
DEEP = json.loads("[" * 300 + "]" * 300)
BOTH = [  # a change to config.json, and what the error names
    (
        settings(num_hidden_layers=10**9, first_k_dense_replace=10**9),
        ["num_hidden_layers=1000000000", "2 layers"],
    ),
    (settings(num_hidden_layers=1, first_k_dense_replace=1), ["num_hidden_layers=1"]),
    (settings(num_hidden_layers="2"), ["num_hidden_layers='2'", "whole number"]),
    (settings(num_hidden_layers=0), ["num_hidden_layers=0"]),
    (settings(num_hidden_layers=-1), ["num_hidden_layers=-1"]),
    (settings(num_hidden_layers=True), ["num_hidden_layers=True"]),
    (settings(hidden_size=WIDE), ["hidden_size", "(23, 24)"]),
    (settings(hidden_size=24.5), ["hidden_size=24.5"]),
    (settings(hidden_size=None), ["hidden_size=None"]),
    (without("hidden_size"), ["hidden_size is missing"]),
    (without("vocab_size"), ["vocab_size is missing"]),
    (without("num_attention_heads"), ["num_attention_heads is missing"]),
    (without("intermediate_size"), ["intermediate_size is missing"]),
    (without("max_position_embeddings"), ["max_position_embeddings is missing"]),
    (settings(vocab_size=WIDE), ["vocab_size", "(23, 24)"]),
    (settings(vocab_size=10**30), ["vocab_size", "(23, 24)"]),
    (settings(intermediate_size=WIDE), ["mlp.c_", "(40, 24)"]),
    (settings(intermediate_size=10**30), ["sizes that no tensor can have"]),
    (settings(max_position_embeddings=WIDE), ["block_size=1000000000000", "rotary positions"]),
    (settings(num_attention_heads=10**15), ["1000000000000000"]),
    (settings(num_attention_heads=[4]), ["num_attention_heads=[4]"]),
    (settings(hidden_size={"a": DEEP}), ["hidden_size={", "..."]),
    (settings(hidden_act="gelu"), ["hidden_act='gelu'", "only 'silu'"]),
    (settings(hidden_act=None), ["hidden_act=None"]),
    (settings(rms_norm_eps="1e-6"), ["rms_norm_eps='1e-6'", "a number above 0"]),
    (settings(rms_norm_eps=0), ["rms_norm_eps=0"]),
    (text('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN'), ["rms_norm_eps=nan"]),
    (text('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1' + "0" * 400), ["config.json"]),
    (text('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1' + "0" * 9000), ["config.json"]),
    (settings(tie_word_embeddings="no"), ["tie_word_embeddings='no'", "true or false"]),
    (settings(tie_word_embeddings=True), ["lm_head and wte are different"]),
    (settings(attention_bias="yes"), ["attention_bias='yes'"]),
    (settings(rope_parameters=YARN), ["rope_parameters=", "yarn", "not scaled"]),
    (settings(rope_scaling={"type": "linear", "factor": 2.0}), ["rope_scaling=", "linear"]),
    (settings(rope_scaling=[1]), ["rope_scaling=[1]"]),
    (settings(rope_parameters=NESTED), ["rope_parameters=", "full_attention"]),
    (settings(rope_parameters={"rope_theta": "big"}), ["rope_theta='big'"]),
    (settings(rope_parameters={"partial_rotary_factor": 0.5}), ["partial_rotary_factor=0.5"]),
    (settings(rope_parameters=None, rope_theta=-1.0), ["rope_theta=-1.0"]),
    (settings(layer_types=["sliding_attention"] * 2), ["layer_types=", "full_attention"]),
    (settings(layer_types=7), ["layer_types=7"]),
    (settings(quantization_config={"quant_method": "fp8"}), ["quantization_config"]),
]
LLAMA_ONLY = [
    (settings(num_key_value_heads=10**9), ["n_kv_head=1000000000"]),
    (settings(num_key_value_heads=3), ["n_kv_head=3", "a divisor"]),
    (settings(num_key_value_heads=4), ["k_proj.weight", "(20, 24)", "40 rows"]),
    (settings(num_attention_heads=8), ["q_proj.weight", "(40, 24)", "80 rows"]),
    (settings(head_dim=WIDE), ["q_proj.weight", "(40, 24)"]),
    (settings(head_dim=None, num_attention_heads=5), ["num_attention_heads=5", "head_dim"]),
    (settings(head_dim=0), ["head_dim=0"]),
    (settings(attention_bias=True), ["missing", "c_attn.bias"]),
    (settings(mlp_bias=True), ["missing", "mlp.c_fc.bias"]),
]
DEEPSEEK_ONLY = [
    (settings(first_k_dense_replace=1), ["first_k_dense_replace=1", "experts are not supported"]),
    (settings(first_k_dense_replace="all"), ["first_k_dense_replace='all'"]),
    (settings(num_key_value_heads=2), ["num_key_value_heads=2", "only 4"]),
    (settings(kv_lora_rank=WIDE), ["mla_latent_dim=1000000000000"]),
    (settings(kv_lora_rank=6), ["kv_a_proj_with_mqa.weight", "(11, 24)", "10 rows"]),
    (without("kv_lora_rank"), ["kv_lora_rank is missing"]),
    (settings(qk_rope_head_dim=WIDE), ["has shape", "by the settings"]),
    (settings(qk_rope_head_dim=3), ["mla_rope_dim=3", "even"]),
    (settings(qk_rope_head_dim=0), ["qk_rope_head_dim=0"]),
    (settings(qk_nope_head_dim=WIDE), ["has shape", "by the settings"]),
    (settings(qk_nope_head_dim="5"), ["qk_nope_head_dim='5'"]),
    (settings(v_head_dim=WIDE), ["kv_b_proj.weight", "(44, 7)"]),
    (settings(v_head_dim=None), ["v_head_dim=None"]),
    (settings(q_lora_rank=9), ["missing"]),
    (without("q_lora_rank"), ["q_lora_rank is missing"]),
    (settings(q_lora_rank=9, attention_bias=True), ["attention_bias=True", "q_lora_rank"]),
    (settings(rope_interleave="yes"), ["rope_interleave='yes'"]),
]
HOSTILE = [("llama", *case) for case in BOTH + LLAMA_ONLY]
HOSTILE += [("deepseek_v3", *case) for case in BOTH + DEEPSEEK_ONLY]
HOSTILE += [
    ("mistral", settings(sliding_window=8), ["sliding_window=8", "only None"]),
    ("mistral", without("sliding_window"), ["sliding_window=4096"]),
    ("mistral", without("num_key_value_heads"), ["num_key_value_heads is missing"]),
    ("qwen2", settings(use_sliding_window=True), ["use_sliding_window=True", "only False"]),
    ("qwen2", settings(use_sliding_window="on"), ["use_sliding_window='on'"]),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of each family."""
    torch.manual_seed(0)
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in FAMILIES}
    for kind, folder in folders.items():
        foreign(kind).save_pretrained(folder)
    return folders


@pytest.mark.parametrize(("kind", "change", "words"), HOSTILE)
def test_hostile_settings_are_one_line_and_allocate_nothing(
    tmp_path, originals, kind, change, words
):
    """A config.json that its tensors do not bear out: one line, and no more memory than before."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((originals[kind] / name).read_bytes())
    change(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600 and line.startswith(str(tmp_path))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 10**9}, ["n_layer=1000000000", "2 layers"]),
        ({"block_size": WIDE}, ["block_size=1000000000000", "rotary positions"]),
        ({"head_dim": WIDE, "mla_rope_dim": WIDE // 2}, ["a rotary width of 500000000000"]),
        ({"vocab_size": 10**18, "n_embd": 10**18}, ["sizes that no tensor can have"]),
        ({"mla_latent_dim": [7]}, ["mla_latent_dim=[7]"]),
        ({"experts": 8}, ["settings this version does not know: experts"]),
    ],
)
def test_hostile_settings_of_our_own_format(tmp_path, changes, words):
    """The same for an export of ours."""
    write(tmp_path, formats.as_nanomla, GPT(tiny_config(**TINY_MLA)))
    change_config(tmp_path, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
