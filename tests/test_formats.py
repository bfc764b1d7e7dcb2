"""Weights in and out, beside transformers. Run: python -m pytest tests/test_formats.py"""

import dataclasses
import json
import os
import resource
import shutil
from typing import Annotated

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from nanomla import formats
from nanomla.errors import UserError
from nanomla.formats import folder as folders
from nanomla.tokenizer import Tokenizer, end_of_text, read_hf, start_of_text
from tests.conftest import (
    TINY,
    TINY_MLA,
    all_logits,
    fails_with_one_line,
    randomise,
    run,
    save_model,
    tiny_config,
)
from tests.test_tokenizer import byte_level

CHARS = {"kind": "char", "chars": "abcdefghijklmnopqrstuvw"}  # 23, as TINY's vocabulary
CLOSE = {"atol": 1e-5, "rtol": 1e-5}

ENDS = {"bos_token_id": None, "eos_token_id": None}
GPT2 = {"vocab_size": 23, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4}
SHAPE = {
    "vocab_size": 23, "max_position_embeddings": 16, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}
# nh 4, nkv 2, hs 10, and for MLA L 7, r 4, nope 5, hs 6: no two are equal.
HEADS = {**SHAPE, "num_key_value_heads": 2, "head_dim": 10}
DENSE = {
    **SHAPE, "num_key_value_heads": 4, "kv_lora_rank": 7, "q_lora_rank": None,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 5, "v_head_dim": 6, "first_k_dense_replace": 2,
}
EXPERTS = {
    "first_k_dense_replace": 1, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "n_shared_experts": 2, "moe_intermediate_size": 12, "n_group": 3, "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
FAMILIES = {  # transformers' classes of settings and of models
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "llama": ("LlamaConfig", "LlamaForCausalLM", HEADS),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**HEADS, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", HEADS),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", DENSE),
}


def foreign(kind, **settings):
    """A random model of transformers: every weight drawn, biases and norms too."""
    import transformers

    config, model, shape = FAMILIES[kind]
    config = getattr(transformers, config)(**{**ENDS, **shape, **settings})
    model = randomise(getattr(transformers, model)(config), 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    return model


def their_logits(model, idx):
    """The logits (B, T, V) of a model of transformers."""
    with torch.no_grad():
        return model.eval()(idx).logits


def load_with_transformers(folder):
    """A folder's model, of which nothing is missing and nothing left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def greedy(model, idx, n=6, mask=None):
    """transformers' greedy continuation, on its cache."""
    if mask is None:
        mask = torch.ones_like(idx)  # otherwise it takes some token for padding
    return model.generate(idx, max_new_tokens=n, do_sample=False, attention_mask=mask.long())


def cached_logits(model, idx):
    """Logits of positions 4 to the end from a cache: 5 tokens at once, then one by one."""
    cache = model.make_cache(len(idx), idx.size(1))
    logits = []
    with torch.no_grad():
        for piece in idx.split([5] + [1] * (idx.size(1) - 5), dim=1):
            logits.append(model(piece, cache=cache)[0])
    return torch.cat(logits, dim=1)


def write(folder, model, kind, spec=None):
    """Write a model in a format."""
    settings, tensors = formats.write(model, kind)
    texts = {"config.json": folders.as_json(settings)}
    if spec:
        texts["nanomla_tokenizer.json"] = folders.as_json(spec)
    folders.write_folder(folder, tensors, texts)


def same_weights(model, twin):
    """Whether two models have the same names and numbers."""
    pairs = zip(model.state_dict().items(), twin.state_dict().items(), strict=True)
    return all(a == b and torch.equal(t, u) for (a, t), (b, u) in pairs)


# ---- Reading


BY_ONE = {"factor": 1.0, "rope_theta": 77.0, "original_max_position_embeddings": 8}
IN = [
    ("gpt2", {}),
    ("gpt2", {"activation_function": "gelu_fast"}),
    ("gpt2", {"activation_function": "gelu", "n_inner": 31, "tie_word_embeddings": False}),
    ("llama", {}),
    ("llama", {"head_dim": None, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    ("llama", {"attention_bias": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 16, "hidden_act": "swish"}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    ("llama", {"rope_parameters": {**BY_ONE, "rope_type": "linear"}}),
    ("llama", {"rope_parameters": {**BY_ONE, "rope_type": "yarn", "mscale": 1.0}}),
    ("llama", {"rope_parameters": {**BY_ONE, "rope_type": "llama3", "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0}}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"q_lora_rank": 9, "rope_interleave": False, "tie_word_embeddings": True}),
    ("deepseek_v3", {"attention_bias": True, "rope_parameters": {"rope_theta": 77.0}}),
    ("deepseek_v3", {"v_head_dim": 2, "qk_rope_head_dim": 8, "rms_norm_eps": 1e-2}),
    ("deepseek_v3", EXPERTS),
    ("deepseek_v3", {**EXPERTS, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
                     "num_experts_per_tok": 5, "norm_topk_prob": False, "q_lora_rank": 9}),
]


@pytest.mark.parametrize(("kind", "settings"), IN)
def test_models_of_transformers_open_with_equal_logits(tmp_path, kind, settings):
    """The whole pass and decoding on our cache at 1e-5, and the same greedy text."""
    model = foreign(kind, **settings)
    idx = torch.randint(23, (3, 16))
    model.save_pretrained(tmp_path / "hf")
    ours = GPT.from_pretrained(tmp_path / "hf", {"dropout": 0.25}).eval()
    assert ours.config.dropout == 0.25
    want = their_logits(model, idx)
    torch.testing.assert_close(all_logits(ours, idx), want, **CLOSE)
    torch.testing.assert_close(cached_logits(ours, idx), want[:, 4:], **CLOSE)
    assert torch.equal(ours.generate(idx[:, :7], 6, temperature=0), greedy(model, idx[:, :7]))
    assert ours.config.tie_weights == settings.get("tie_word_embeddings", kind == "gpt2")
    if kind == "deepseek_v3" and "attention_bias" in settings:
        assert formats.in_the_way(ours.config, kind) == ["bias=True"]
        return
    kind = "llama" if kind in ("mistral", "qwen2") else kind
    assert formats.fitting_format(ours.config)[0] == kind


def test_experts_as_transformers_has_them_in_memory(tmp_path):
    """One tensor for the matrices of all experts is read as one for each."""
    model = foreign("deepseek_v3", **EXPERTS)
    model.save_pretrained(tmp_path)
    apart = GPT.from_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert state["model.layers.1.mlp.experts.gate_up_proj"].shape == (6, 24, 24)
    save_file(state, tmp_path / "model.safetensors")
    assert same_weights(apart, GPT.from_pretrained(tmp_path))


def test_two_places_for_the_rotary_base(tmp_path):
    """Where rope_scaling and rope_parameters differ, the base is what transformers takes."""
    foreign("llama").save_pretrained(tmp_path)
    default = {"rope_type": "default"}
    for scaling in ({**default, "rope_theta": 77.0}, default, {}, None):
        parameters = {**default, "rope_theta": 9.0}
        change_config(tmp_path, rope_theta=55.0, rope_scaling=scaling, rope_parameters=parameters)
        theirs = load_with_transformers(tmp_path)
        ours = GPT.from_pretrained(tmp_path)
        assert ours.config.rope_theta == theirs.config.rope_parameters["rope_theta"], scaling


def test_other_spellings_of_a_gpt2(tmp_path):
    """Without the prefix, with old mask buffers, with lm_head: the same logits."""
    model = foreign("gpt2")
    model.save_pretrained(tmp_path)
    idx = torch.randint(23, (3, 16))
    state = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    mask = torch.ones(1, 1, 16, 16).tril().bool()
    masks = {"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}
    head = {"lm_head.weight": state["transformer.wte.weight"].clone()}
    for tensors in ({**bare, **masks}, {**state, **head}):
        save_file(tensors, tmp_path / "model.safetensors")
        ours = GPT.from_pretrained(tmp_path)
        torch.testing.assert_close(all_logits(ours, idx), their_logits(model, idx), **CLOSE)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_head_of_its_own_is_kept_where_settings_tie_it(tmp_path, capsys, kind):
    """
    As in transformers: two tensors that differ stay two, and one line on stderr tells of it; a
    single one, under either name, is both.
    """
    foreign(kind, tie_word_embeddings=False).save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    theirs = load_with_transformers(tmp_path)
    idx = torch.randint(23, (3, 16))
    capsys.readouterr()
    ours = GPT.from_pretrained(tmp_path)
    line = f"{tmp_path}: lm_head and wte are stored and differ, so they are not tied, although"
    assert capsys.readouterr().err == f"{line} config.json ties them\n"
    assert not ours.config.tie_weights
    torch.testing.assert_close(all_logits(ours, idx), their_logits(theirs, idx), **CLOSE)
    if formats.fitting_format(ours.config)[0] != "nanomla":
        write(tmp_path / "out", ours, formats.fitting_format(ours.config)[0])
        again = load_with_transformers(tmp_path / "out")
        torch.testing.assert_close(their_logits(again, idx), their_logits(theirs, idx), **CLOSE)
    state = load_file(tmp_path / "model.safetensors")
    head = next(name for name in state if name.endswith("lm_head.weight"))
    wte = next(name for name in state if name.endswith(("wte.weight", "embed_tokens.weight")))
    equal = {**state, head: state[wte].clone()}
    alone = {name: tensor for name, tensor in state.items() if name != wte}
    for tensors in (equal, alone):
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        theirs = load_with_transformers(tmp_path)
        capsys.readouterr()
        ours = GPT.from_pretrained(tmp_path)
        assert ours.config.tie_weights and capsys.readouterr().err == ""
        torch.testing.assert_close(all_logits(ours, idx), their_logits(theirs, idx), **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_shards_bfloat16_and_older_spellings(tmp_path, kind):
    """
    bfloat16 in pieces; then names without the prefix, an old rotary buffer and rope_theta where
    transformers 4 wrote it.
    """
    model = foreign(kind).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    idx = torch.randint(23, (3, 16))
    ours = GPT.from_pretrained(tmp_path)
    torch.testing.assert_close(all_logits(ours, idx), their_logits(model, idx), **CLOSE)
    state = {name.removeprefix("model."): t.contiguous() for name, t in model.state_dict().items()}
    state["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(state, tmp_path / "model.safetensors")
    change_config(tmp_path, rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    assert same_weights(GPT.from_pretrained(tmp_path), ours)
    change_config(tmp_path, rope_theta=77.0)
    assert GPT.from_pretrained(tmp_path).config.rope_theta == 77.0


def test_names_are_fetched_from_the_hub_and_opened_from_its_cache(tmp_path, monkeypatch):
    """What is cached opens without a network; else one line says what to do."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = run("sample.py", "--init_from=gpt2-medium", "--start=a")
    words = ("gpt2-medium cannot be had", "openai-community/gpt2-medium", "--init_from=FOLDER")
    assert fails_with_one_line(done, 1, *words)

    model = foreign("gpt2")
    cached = tmp_path / "models--openai-community--gpt2-medium"
    model.save_pretrained(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    idx = torch.randint(23, (3, 16))
    ours = GPT.from_pretrained("gpt2-medium")
    torch.testing.assert_close(all_logits(ours, idx), their_logits(model, idx), **CLOSE)


def test_open_weights_finds_each_kind(tmp_path):
    """A file, a run's folder with either preference, an export, and names that are nothing."""
    model = GPT(tiny_config())
    folder = tmp_path / "run"
    folder.mkdir()
    for step, best in ((1, True), (2, False)):
        save_model(folder, model, best, iter_num=step)
    assert formats.open_weights(folder / "best.pt").iter_num == 1
    assert formats.open_weights(folder).iter_num == 2
    assert formats.open_weights(folder, prefer_best=True).source == str(folder / "best.pt")
    write(tmp_path / "export", model, "nanomla")
    assert formats.open_weights(tmp_path / "export").source == str(tmp_path / "export")
    with pytest.raises(UserError, match="gpt3: no such file or folder.*gpt2-xl"):
        formats.open_weights("gpt3")
    with pytest.raises(UserError, match="it holds neither ckpt.pt, best.pt nor config.json"):
        formats.open_weights(str(tmp_path))


# ---- Writing

LLAMA_STYLE = {
    "pos_emb": "rope", "norm": "rmsnorm", "mlp": "swiglu", "mlp_hidden": 40, "bias": False,
}
DEEPSEEK_STYLE = {**LLAMA_STYLE, "use_mla": True, "mla_latent_dim": 7, "mla_rope_dim": 2}
STYLES = {"gpt2": {}, "llama": LLAMA_STYLE, "deepseek_v3": DEEPSEEK_STYLE}
MORE = {"tie_weights": False, "norm_eps": 1e-3, "dropout": 0.25}
OUT = [
    ("gpt2", {}),
    ("gpt2", {**MORE, "gelu": "tanh", "bias": False, "mlp_hidden": 31}),
    ("llama", {}),
    ("llama", {"bias": True, "n_kv_head": 2, "head_dim": 10, "mlp_hidden": None}),
    ("llama", {**MORE, "n_kv_head": 1, "rope_theta": 77.0}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {**MORE, "rope_theta": 77.0, "mla_q_latent_dim": 5, "mla_nope_dim": 3,
                     "head_dim": 8, "mla_rope_dim": 4}),
    ("deepseek_v3", {"moe_experts": 6, "moe_hidden": 12}),
    ("deepseek_v3", {"moe_experts": 12, "moe_active": 4, "moe_shared": 3, "moe_hidden": 8,
                     "moe_groups": 4, "moe_active_groups": 2, "moe_norm": False, "moe_scale": 2.5,
                     "moe_dense_layers": 0}),
]


@pytest.mark.parametrize(("kind", "settings"), OUT)
def test_transformers_loads_exports(tmp_path, kind, settings):
    """
    Equal logits, the same greedy text on either cache, of prompts with padding too; and what is
    read back is the same.
    """
    model = randomise(GPT(tiny_config(**STYLES[kind] | settings)), 0.2)
    assert formats.fitting_format(model.config)[0] == kind
    write(tmp_path, model, kind)
    theirs = load_with_transformers(tmp_path)
    idx = torch.randint(23, (3, 16))
    want = their_logits(theirs, idx)
    torch.testing.assert_close(all_logits(model, idx), want, **CLOSE)
    torch.testing.assert_close(cached_logits(model, idx), want[:, 4:], **CLOSE)
    new = model.generate(idx[:, :7], 9, temperature=0)
    assert torch.equal(new, greedy(theirs, idx[:, :7], 9))
    mask = torch.arange(7) >= torch.tensor([[0], [4], [6]])  # padding on the left
    new = model.generate(idx[:, :7], 9, temperature=0, mask=mask)
    assert torch.equal(new, greedy(theirs, idx[:, :7], 9, mask))
    twin = GPT.from_pretrained(tmp_path)
    if kind == "gpt2" and not model.config.bias:  # GPT-2 always has some
        torch.testing.assert_close(all_logits(twin, idx), want, **CLOSE)
    else:
        assert same_weights(model, twin)


SHARED = {"mla_share_latent": True, "use_svd": True, "svd_rank": 3, "mla_norm": "layernorm"}


def test_our_own_format_round_trips(tmp_path):
    """Bit by bit, config and tokenizer too; tied and shared weights are stored once."""
    model = randomise(GPT(tiny_config(**TINY_MLA, **SHARED, moe_experts=5, moe_scale=2.5)), 0.2)
    write(tmp_path, model, "nanomla", CHARS)
    twin = GPT.from_pretrained(tmp_path)
    assert formats.read_pretrained(tmp_path).tokenizer == CHARS
    assert twin.config == model.config and same_weights(model, twin)
    count = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    assert count == sum(p.numel() for p in model.parameters())


FLIPPED = {  # for every field that a format may have, a value that differs from the styles'
    "block_size": 17, "vocab_size": 29, "n_layer": 3, "n_head": 2, "n_embd": 32, "dropout": 0.25,
    "gelu": "tanh", "rope_theta": 500.0, "norm_eps": 1e-3, "mlp_hidden": 44, "tie_weights": False,
    "n_kv_head": 2, "head_dim": 10, "mla_latent_dim": 5, "mla_groups": 2, "mla_rope_dim": 4,
    "mla_nope_dim": 3, "mla_rope": "latent", "mla_q_latent_dim": 5, "mla_norm": "layernorm",
    "mla_split": True, "mla_share_latent": True, "n_latent_tokens": 3, "svd_rank": 3,
    "svd_method": "randomized", "attn_gate": True, "qk_norm": True,
    "mla_share_cache": 2, "moe_experts": 4, "moe_active": 3, "moe_shared": 0, "moe_hidden": 8,
    "moe_groups": 2, "moe_active_groups": 1, "moe_norm": False, "moe_scale": 1.5,
    "moe_dense_layers": 0, "n_predict": 1,
}
STYLED = {"norm", "mlp", "pos_emb", "use_mla", "rope_freqs"}  # each a style of its own


@pytest.mark.parametrize("kind", STYLES)
def test_every_setting_survives_an_export_or_forbids_it(tmp_path, kind):
    """One field differs: it is in the way, or what is read back computes the same, as far."""
    assert formats.FORMATS[kind].fits.keys() <= {*FLIPPED, *STYLED, "bias"}
    idx = torch.randint(23, (3, 16))
    for name, value in {**FLIPPED, "bias": kind != "gpt2"}.items():
        config = tiny_config(**{**STYLES[kind], name: value})
        lacks = formats.in_the_way(config, kind)
        if lacks:
            assert lacks == [f"{name}={value!r}"]
            continue
        model = randomise(GPT(config), 0.2)
        write(tmp_path / name, model, kind)
        twin = GPT.from_pretrained(tmp_path / name)
        torch.testing.assert_close(all_logits(twin, idx), all_logits(model, idx), **CLOSE)
        assert twin.config.block_size == config.block_size


@pytest.mark.parametrize("kind", STYLES)
def test_a_setting_that_is_new_forbids_an_export(kind):
    """A field that no format lists: its default is what the format has."""

    @dataclasses.dataclass
    class Grown(GPTConfig):
        sinks: Annotated[int, "a setting of a later version"] = 0

    style = {**TINY, **STYLES[kind]}
    assert formats.in_the_way(Grown(**style), kind) == []
    assert formats.in_the_way(Grown(**style, sinks=1), kind) == ["sinks=1"]


def test_a_width_for_each_layer_forbids_an_export():
    """DeepSeek-V3 has one for all."""
    ragged = tiny_config(**{**DEEPSEEK_STYLE, "mla_latent_dim": (7, 5)})
    assert formats.in_the_way(ragged, "deepseek_v3") == ["mla_latent_dim=(7, 5)"]


ALPHABET = "\n\t\r \0\x85\u2028\u200d.,'!abe\u0301é🙂日ßİ"  # also what others strip, join or fold
TEXTS = [
    *ALPHABET, "", "  a. b , a 'a  ! \n\n", "\r\n\n a e\u0301é\u0301🙂\u200d🙂 ",
    ALPHABET + ALPHABET[::-1],
]
SPECS = [
    {"kind": "char", "chars": ALPHABET},
    {"kind": "byte"},
    {"kind": "tiktoken", "name": "gpt2"},
    {"kind": "hf", "json": byte_level().to_str(), "end": 0, "bos": 7},
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec["kind"])
def test_transformers_reads_our_tokenizers(tmp_path, spec):
    """The same ids and text, nothing added, stripped or cleaned up; and so do we."""
    from transformers import AutoTokenizer

    ours = Tokenizer(spec)
    for name, text in folders.tokenizer_files(spec).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    opened = AutoTokenizer.from_pretrained(tmp_path)
    twin = Tokenizer(read_hf(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = ours.encode(text)
        assert opened(text)["input_ids"] == ids == twin.encode(text), repr(text)
        assert opened.decode(ids) == text == twin.decode(ids), repr(text)
    assert len(opened) == ours.vocab_size and opened.clean_up_tokenization_spaces is False
    assert (opened.bos_token_id, opened.eos_token_id) == (start_of_text(spec), end_of_text(spec))
    if spec["kind"] == "char":
        with pytest.raises(Exception, match="UNK"):  # not in the alphabet
            opened("aZ")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_earlier_export(tmp_path, monkeypatch, step, error):
    """An error while writing, or between the two renames: the old folder is whole and alone."""
    settings, tensors = formats.write(GPT(tiny_config()), "gpt2")
    folders.write_folder(tmp_path / "e", tensors, {"config.json": "{}"})
    replace = os.replace

    def fail(*args):
        if step == "fsync" or args[1] == tmp_path / "e":
            raise error
        return replace(*args)

    monkeypatch.setattr(os, step, fail)
    with pytest.raises((UserError, KeyboardInterrupt)):
        folders.write_folder(tmp_path / "e", tensors, {"config.json": folders.as_json(settings)})
    assert (tmp_path / "e" / "config.json").read_text() == "{}" and os.listdir(tmp_path) == ["e"]


# ---- Damage: one of each kind

WIDE = 10**12
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
CONFIGS = [  # changes to a config.json (...: the setting is not there), and what the error names
    ("gpt2", {"model_type": "mamba"}, ["model_type 'mamba'", "gpt2, llama, mistral, qwen2"]),
    ("gpt2", {"activation_function": "relu"}, ["activation_function='relu'", "'gelu_new'"]),
    ("gpt2", {"n_layer": 3}, ["n_layer=3", "2 layers"]),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
    ("llama", {"hidden_size": ...}, ["hidden_size is missing"]),
    ("llama", {"intermediate_size": WIDE}, ["mlp.c_", "(40, 24)"]),
    ("llama", {"max_position_embeddings": WIDE}, [f"block_size={WIDE}", "rotary positions"]),
    ("llama", {"num_attention_heads": 8}, ["attn.c_attn.weight has shape (80, 24), expected (120"]),
    ("llama", {"rope_parameters": YARN}, ["rope_parameters=", "yarn", "not scaled"]),
    ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": ...}, ["=0.5", "1.0"]),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling=", "scaled"]),
    ("llama", {"rope_scaling": "linear"}, ["rope_scaling must be an object or null"]),
    ("llama", {"layer_types": ["chunked_attention"] * 2}, ["layer_types=['chunked_", "only full"]),
    ("mistral", {"sliding_window": 15}, ["=15 with max_position_embeddings=16", "lower max_pos"]),
    ("mistral", {"max_position_embeddings": 5000, "sliding_window": ...}, ["=4096 with max_pos"]),
    ("qwen2", {**SLIDING, "layer_types": ...}, ["sliding_window=3 with max_position_embeddings"]),
    ("qwen2", {**SLIDING, "layer_types": ["full_attention", "sliding_attention"]}, ["=3 with max"]),
    ("deepseek_v3", EXPERTS, ["missing (first transformer.h.1.mlp.experts.0.c_fc.weight)"]),
    ("deepseek_v3", {**EXPERTS, "n_routed_experts": 10**9}, ["moe_experts=1000000000", "4096"]),
    ("deepseek_v3", {**EXPERTS, "topk_group": 4}, ["moe_active_groups=4", "at most moe_groups=3"]),
    ("deepseek_v3", {**EXPERTS, "scoring_func": "softmax"}, ["scoring_func='softmax'", "sigmoid"]),
    ("deepseek_v3", {**EXPERTS, "attention_bias": True}, ["attention_bias=True", "only False"]),
    ("deepseek_v3", {**EXPERTS, "n_routed_experts": ...}, ["n_routed_experts is missing"]),
    ("deepseek_v3", {"kv_lora_rank": 6}, ["kv_latent_proj.weight has 11 rows", "have 10"]),
    ("deepseek_v3", {"q_lora_rank": 9, "attention_bias": True}, ["attention_bias=True"]),
    ("nanomla", {"n_layer": 10**9}, ["n_layer=1000000000", "2 layers"]),
    ("nanomla", {"experts": 8}, ["settings this version does not know: experts"]),
    ("nanomla", {"head_dim": WIDE, "mla_rope_dim": WIDE // 2}, ["sizes that no tensor can have"]),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of each kind of model, by kind."""
    torch.manual_seed(0)
    made = {}
    for kind in (*FAMILIES, "nanomla"):
        made[kind] = tmp_path_factory.mktemp("originals") / kind
        if kind == "nanomla":
            write(made[kind], GPT(tiny_config(**TINY_MLA)), kind)
        else:
            foreign(kind).save_pretrained(made[kind])
        assert GPT.from_pretrained(made[kind]).config.n_embd == 24
    return made


def change_config(folder, **changes):
    """Other values in a folder's config.json; ... takes a setting away."""
    settings = json.loads((folder / "config.json").read_text()) | changes
    settings = {name: value for name, value in settings.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(settings))


def error_of(folder):
    """The one line about a folder that cannot be read, which takes no more memory than before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600 and line.startswith(str(folder))
    return line


@pytest.mark.parametrize(("kind", "changes", "words"), CONFIGS)
def test_settings_that_do_not_work_are_one_line(tmp_path, originals, kind, changes, words):
    """The line names the setting or the tensor; no size of config.json is allocated."""
    shutil.copytree(originals[kind], tmp_path / "e")
    change_config(tmp_path / "e", **changes)
    line = error_of(tmp_path / "e")
    assert all(word in line for word in words), line


def test_damaged_weights_are_one_line(tmp_path, originals):
    """Truncated, a pickle, missing pieces, missing, other and quantised tensors."""
    weights = tmp_path / "model.safetensors"
    shutil.copy(originals["gpt2"] / "config.json", tmp_path)
    content = (originals["gpt2"] / "model.safetensors").read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "model.safetensors: truncated" in error_of(tmp_path)
    weights.write_bytes(content)
    state = load_file(weights)
    bias = "transformer.h.1.ln_1.bias"
    for changes, words in (
        ({bias: None}, f"1 missing (first {bias})"),
        ({bias: torch.zeros(24).char()}, f"{bias} is torch.int8; quantised weights"),
    ):
        changed = {name: t for name, t in {**state, **changes}.items() if t is not None}
        save_file(changed, weights)
        assert words in error_of(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    assert "no model.safetensors in this folder; pytorch_model.bin is a p" in error_of(tmp_path)
    index = {"weight_map": {"a": "piece-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no piece-1.safetensors" in error_of(tmp_path)
    for weight_map in (None, [1, 2], {}, {"a": 5}, {"a": ["x"]}):
        index = {"weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "model.safetensors.index.json: weight_map=" in error_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: cannot be read" in error_of(tmp_path)
