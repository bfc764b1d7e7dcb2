"""What claims need beyond the model. Run: python -m pytest tests/test_experiments.py"""

import torch

from model import ATTENTION, GPT, rotation_alone
from tests.conftest import TINY_MLA, randomise, tiny_config
from tools import experiments
from tools.compare import CompareConfig

UNROTATED = {**TINY_MLA, "mla_rope_dim": 0}


def changed_gpt(name, **config):
    with experiments.changed(name):
        return GPT(tiny_config(**config))


def test_a_change_ends_with_its_context():
    """Other models of the process stay as they are."""
    before = dict(ATTENTION)
    state = torch.get_rng_state()
    plain = GPT(tiny_config(**TINY_MLA))
    for name in experiments.CHANGES:
        changed_gpt(name, **TINY_MLA)
        assert before == ATTENTION
        torch.set_rng_state(state)
        again = GPT(tiny_config(**TINY_MLA)).state_dict()
        assert all(torch.equal(v, again[k]) for k, v in plain.state_dict().items()), name


def test_rotated_keys():
    """Causal; equal with a cache of the latent alone; scores depend on the distance."""
    model = randomise(changed_gpt("rotated_keys", **UNROTATED))
    idx = torch.randint(23, (2, 12))
    whole = model(idx, all_logits=True)[0]
    other = idx.clone()
    other[:, -1] = (other[:, -1] + 1) % 23
    assert torch.equal(model(other, all_logits=True)[0][:, :-1], whole[:, :-1])
    with torch.no_grad(), experiments.changed("rotated_keys"):
        cache = model.make_cache(2, 12)
        assert cache.bytes_per_token == 2 * 7 * 4  # layers x latent x float32
        steps = [model(idx[:, t : t + 1], cache=cache)[0] for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)
    plain = GPT(tiny_config(**UNROTATED)).eval()
    plain.load_state_dict(model.state_dict())
    assert (plain(idx, all_logits=True)[0] - whole).abs().max() > 0.01  # the rotation matters

    attn, x = model.transformer.h[0].attn, torch.randn(1, 8, 24)
    q, _ = attn._split_queries(x, None)
    turn = lambda start, t: experiments.gpt.apply_rope(
        t.transpose(1, 2), tuple(table[start : start + 8] for table in attn.tables)
    ).transpose(1, 2)
    k, _ = attn._keys_and_values(*attn._latents(x, None))
    scores = [turn(start, q) @ turn(start, k).mT for start in (0, 4)]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)


def test_normed_keys_and_values():
    """Content keys and values have a mean square of 1 before their weights; equal with a cache."""
    model = changed_gpt("normed_kv", **TINY_MLA).eval()
    attn = model.transformer.h[0].attn
    x = torch.randn(2, 5, 24)
    c, kr = attn._latents(x, rotation_alone(model.config, x, None))
    k, v = attn._keys_and_values(c, kr)
    for part in (k[..., : attn.nope], v):
        torch.testing.assert_close(part.square().mean(-1), torch.ones(2, 4, 5), atol=0.01, rtol=0)
    torch.testing.assert_close(k[..., attn.nope :], kr.expand(-1, 4, -1, -1))
    idx = torch.randint(23, (2, 12))
    whole = randomise(model)(idx, all_logits=True)[0]
    with torch.no_grad(), experiments.changed("normed_kv"):
        cache = model.make_cache(2, 12)
        steps = [model(idx[:, t : t + 1], cache=cache)[0] for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_xavier():
    """The blocks' matrices have a variance of 2 / (rows + columns); embeddings keep 0.02."""
    model = changed_gpt("xavier", n_embd=96, n_head=4, block_size=16)
    for name, p in model.transformer.h.named_parameters():
        if p.dim() == 2:
            expected = (2 / sum(p.shape)) ** 0.5
            assert abs(p.std().item() / expected - 1) < 0.1, name
    assert abs(model.transformer.wte.weight.std().item() / 0.02 - 1) < 0.1


def test_measures():
    """Costs are counted from the models; decoding gets the batches that the budget allows."""
    configs = {
        "MHA": tiny_config(),
        "MLA": tiny_config(**TINY_MLA),
        "slots": tiny_config(use_latent_tokens=True, n_latent_tokens=3),
    }
    cfg = CompareConfig(decode_context=16, cache_budget=0.05)
    text = experiments.measure_costs(cfg, "cpu", configs, [])
    rows = {cells[0]: cells[1:] for cells in map(split, text) if len(cells) > 3}
    attn = GPT(configs["MLA"]).transformer.h[0].attn
    n = sum(p.numel() for p in attn.parameters())
    assert rows["MLA"][0] == f"{n:,}" and rows["MLA"][2:4] == ["9", f"{48 / 9:.3g}x"]
    assert rows["MHA"][4] == f"{4 * 12 * 8:,}" and rows["slots"][4] == f"{4 * 4 * 3 * 6:,}"
    text = experiments.measure_decoding(cfg, "cpu", configs, [])
    rows = {cells[0]: cells[1:] for cells in map(split, text) if len(cells) > 3}
    budget = 0.05 * 2**20
    assert rows["MHA"][2] == str(int(budget // (2 * 48 * 16 * 4)))
    assert rows["MLA"][2] == str(int(budget // (2 * 9 * 16 * 4)))
    assert rows["slots"][2] == str(int(budget // (2 * 4 * 3 * 12 * 4)))


def split(line):
    return [cell.strip() for cell in line.strip("| ").split("|")]
