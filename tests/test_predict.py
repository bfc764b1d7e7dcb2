"""
The block for the token after the next (n_predict), beside what it should compute.

Run: python -m pytest tests/test_predict.py
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GPT
from nanomla import checkpoint, costs, formats
from nanomla.checkpoint import Checkpoint
from tests.conftest import (
    KINDS,
    QUICK,
    TINY_MLA,
    all_logits,
    fails_with_one_line,
    make,
    run,
    tiny_config,
)
from tests.test_formats import CLOSE, DEEPSEEK_STYLE, same_weights, their_logits, write
from tests.test_train import entries


def head_input(model, idx):
    """What the head reads of idx (B, T)."""
    read = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(idx, all_logits=True)
    hook.remove()
    return read[0]


def written_out_loss(model, idx, targets):
    """Its mean loss on idx (B, T), one position after the other, each from what is before it."""
    predictor = model.predictor
    wte = model.transformer.wte.weight
    hidden = head_input(model, idx)
    losses = []
    for b in range(len(idx)):
        rows = []
        for i in range(idx.size(1) - 1):
            both = [predictor.enorm(wte[idx[b, i + 1]]), predictor.hnorm(hidden[b, i])]
            rows.append(predictor.eh_proj.weight @ torch.cat(both))
            seen = torch.stack(rows)[None]  # (1, i + 1, C)
            x = seen + predictor.h.attn(predictor.h.ln_1(seen))
            x = x + predictor.h.mlp(predictor.h.ln_2(x))
            logits = wte @ predictor.ln_f(x[0, -1])
            losses.append(logits.logsumexp(0) - logits[targets[b, i + 1]])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_papers(kind):
    """In float64 equal to a loop over tokens; the first loss is that of a model without it."""
    model = make(kind, n_predict=1).double()
    text = torch.randint(23, (2, 10))
    idx, targets = text[:, :-1], text[:, 1:]
    with torch.no_grad():
        _, losses = model(idx, targets, all_losses=True)
        _, loss = model(idx, targets)
        want = written_out_loss(model, idx, targets)
    torch.testing.assert_close(losses[1], want, atol=1e-9, rtol=1e-9)
    assert torch.equal(losses[0], loss)


def test_deepseeks_layout():
    """
    An export has the weights of one more layer under DeepSeek's names. transformers' MtpLayer takes
    them and gives the same output; what engines read besides is there; reading gives the model.
    """
    from transformers import DeepseekV3Config
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    model = make(DEEPSEEK_STYLE, n_predict=1, tie_weights=False)
    settings, tensors = formats.write(model, "deepseek_v3")
    assert settings["num_nextn_predict_layers"] == 1 and settings["first_k_dense_replace"] == 3
    state = {}
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        place = name.removeprefix("model.layers.2.").replace("shared_head.norm", "post_norm")
        if not place.startswith(("enorm", "hnorm", "eh_proj", "post_norm", "embed", "shared_head")):
            place = f"mtp_block.{place}"
        state[place] = tensors[name]
    assert torch.equal(state.pop("embed_tokens.weight"), tensors["model.embed_tokens.weight"])
    assert torch.equal(state.pop("shared_head.head.weight"), tensors["lm_head.weight"])
    config = DeepseekV3Config(**settings)
    config._attn_implementation = "eager"
    layer = MtpLayer(config, theirs.DeepseekV3DecoderLayer, theirs.DeepseekV3RMSNorm, 0)
    layer.load_state_dict(state)

    idx = torch.randint(23, (2, 9))
    T = idx.size(1) - 1
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    positions = torch.arange(T)[None]
    with torch.no_grad():
        hidden = head_input(model, idx)[:, :-1]
        embedded = model.transformer.wte(idx[:, 1:])
        rotation = theirs.DeepseekV3RotaryEmbedding(config)(hidden, positions)
        want = layer(embedded, hidden, rotation, mask, positions, None)
        got = model.predict(hidden, idx[:, 1:])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_folders_in_deepseeks_layout(tmp_path, capsys):
    """A folder gives the model again, and in transformers its main head; a predictor with experts,
    and those after the first, are left out with one line."""
    from transformers import AutoModelForCausalLM

    model = make(DEEPSEEK_STYLE, n_predict=1)
    write(tmp_path / "a", model, "deepseek_v3")
    again = GPT.from_pretrained(tmp_path / "a").eval()
    assert same_weights(model, again) and not capsys.readouterr().err
    idx = torch.randint(23, (2, 9))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(their_logits(other, idx), all_logits(model, idx), **CLOSE)

    tensors = load_file(tmp_path / "a" / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        tensors[name.replace(".2.", ".3.")] = tensors[name].clone()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    capsys.readouterr()
    assert GPT.from_pretrained(tmp_path / "a").config.n_predict == 1
    line = "left out: layer {}, which predicts a token after the next\n"
    assert capsys.readouterr().err == line.format("3")
    for name in [name for name in tensors if ".mlp.up_proj." in name and ".2." in name]:
        tensors[name.replace("up_proj", "experts.0.up_proj")] = tensors.pop(name)
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    without = GPT.from_pretrained(tmp_path / "a").eval()
    assert capsys.readouterr().err == line.format("2, 3")
    assert without.config.n_predict == 0
    assert torch.equal(all_logits(without, idx), all_logits(model, idx))


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_on_a_cache(kind):
    """The same output on a cache of its own as all at once."""
    model = make(kind, n_predict=1)
    idx = torch.randint(23, (2, 12))
    with torch.no_grad():
        hidden = head_input(model, idx)
        want = model.predict(hidden[:, :-1], idx[:, 1:])
        cache = model.predictor.h.attn.new_cache(2, 11)
        parts = []
        for begin, end in ((0, 4), (4, 5), (5, 11)):
            part = model.predict(hidden[:, begin:end], idx[:, begin + 1 : end + 1], cache)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_part_in_it(side):
    """Its loss on a padded batch is the mean over the tokens of every sequence alone."""
    model = make("MLA", n_predict=1)
    texts = [torch.randint(23, (1, n)) for n in (12, 7, 4)]
    idx = torch.randint(23, (3, 11))
    targets = torch.randint(23, (3, 11))
    mask = torch.zeros(3, 11, dtype=torch.bool)
    alone = []
    with torch.no_grad():
        for b, text in enumerate(texts):
            n = text.size(1) - 1
            at = slice(0, n) if side == "right" else slice(11 - n, 11)
            idx[b, at] = text[0, :-1]
            targets[b, at] = text[0, 1:]
            mask[b, at] = True
            loss = model(text[:, :-1], text[:, 1:], all_losses=True)[1][1]
            alone += [loss] * (n - 1)
        got = model(idx, targets, mask=mask, all_losses=True)[1][1]
    torch.testing.assert_close(got, sum(alone) / len(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["MHA", "MLA, layers share a cache"])
def test_what_a_seed_draws_stays(kind):
    """The other weights of a seed are those of a model without it, under the same names and first;
    the same seed draws the same predictor."""
    models = []
    for n in (0, 1, 1):
        torch.manual_seed(5)
        models.append(GPT(tiny_config(**KINDS[kind], n_predict=n)).state_dict())
    without, first, second = models
    assert list(first)[: len(without)] == list(without)
    assert all(torch.equal(first[name], without[name]) for name in without)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name.split(".")[0] for name in first.keys() - without.keys()} == {"predictor"}


def test_recomputed_activations_give_the_same_gradients():
    """grad_checkpoint changes no gradient of the two losses."""
    model = make("MLA", n_predict=1).train()
    idx = torch.randint(23, (2, 9))
    grads = []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        model(idx, idx, all_losses=True)[1].sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_it_costs():
    """The parameters of one more block, a projection and three norms; in training its operations
    and another head; none in decoding, and nothing in the cache."""
    plain = tiny_config(**TINY_MLA)
    config = tiny_config(**TINY_MLA, n_predict=1)
    models = [costs.on_meta(plain), costs.on_meta(config)]
    block = sum(p.numel() for p in models[0].transformer.h[1].parameters())
    C = config.n_embd
    more = block + 2 * C * C + 3 * 2 * C  # layer norms with biases
    assert costs.parameters(config) == costs.parameters(plain) + more
    assert costs.parameters(config) == models[1].get_num_params(non_embedding=False)
    flops = [costs.flops_per_token(model, 10, absorbed=True) for model in models]
    assert flops[0] == flops[1]
    flops = [costs.flops_per_token(model, 10) for model in models]
    deeper = costs.on_meta(tiny_config(**{**TINY_MLA, "n_layer": 3}))
    of_block = costs.flops_per_token(deeper, 10) - flops[0]
    assert flops[1] == flops[0] + of_block + 2 * (2 * C * C + C * config.vocab_size)
    caches = [GPT(shape).make_cache(1, 3) for shape in (plain, config)]
    assert caches[0].nbytes == caches[1].nbytes


@pytest.mark.parametrize("kind", ["MHA", "MLA"])
def test_factorised_values(kind):
    """Values that are factorised at full rank as a checkpoint is read leave both losses."""
    model = make(kind, n_predict=1)
    stored = Checkpoint(model.state_dict(), vars(model.config))
    other, _ = checkpoint.build(stored, use_svd=True, svd_rank=None)
    assert hasattr(other.predictor.h.attn, "v_up")
    idx = torch.randint(23, (2, 9))
    with torch.no_grad():
        want = model(idx, idx, all_losses=True)[1]
        got = other.eval()(idx, idx, all_losses=True)[1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_training_with_it(tmp_path, dataset):
    """Its loss falls and is logged and printed apart; its weight matters; the iteration's loss is
    the main head's, and the first one that of a model without it."""
    args = [*QUICK, f"--dataset={dataset}", "--use_mla=True", "--pos_emb=rope", "--max_iters=40"]
    logs = []
    for name, flags in (
        ("with", ["--n_predict=1"]),
        ("heavy", ["--n_predict=1", "--predict_weight=3"]),
        ("without", []),
    ):
        done = run("train.py", *args, *flags, f"--out_dir={tmp_path}/{name}")
        assert done.returncode == 0, done.stderr
        assert ("token after next" in done.stdout) == (name != "without")
        logs.append(entries(tmp_path / name))
    predicted = [[e["predict_loss"] for e in log if "predict_loss" in e] for log in logs]
    assert len(predicted[0]) == 5 and predicted[0][-1] < predicted[0][0] - 0.2
    assert predicted[1] != predicted[0] and predicted[2] == []
    first = [next(e["loss"] for e in log if "loss" in e) for log in logs]
    assert first[0] == first[1] == first[2]
    done = run("train.py", *args, "--n_predict=2", f"--out_dir={tmp_path}/two")
    assert fails_with_one_line(done, 2, "n_predict=2", "at most 1")
    done = run("train.py", *args, "--n_predict=1", "--block_size=1", f"--out_dir={tmp_path}/one")
    assert fails_with_one_line(done, 2, "block_size=1", "above n_predict=1")


def test_one_token_has_none_after_the_next():
    """One clear error; without the second loss it is a text like any other."""
    model = GPT(tiny_config(n_predict=1))
    idx = torch.zeros(2, 1, dtype=torch.int64)
    assert model(idx, idx)[1].isfinite()
    with pytest.raises(ValueError, match=r"idx.shape=\(2, 1\)"):
        model(idx, idx, all_losses=True)
