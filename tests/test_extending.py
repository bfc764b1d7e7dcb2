"""
The attention of docs/extending.md, added and removed.

Run: python -m pytest tests/test_extending.py
"""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import model as gpt
from model import ATTENTION, GPT
from nanomla import costs
from nanomla.batch import Batch
from nanomla.tokenizer import Tokenizer
from tests.conftest import QUICK, ROOT, randomise, tiny_config
from tools import serve

PAGE = (ROOT / "docs/extending.md").read_text()
CLASS, LINE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def window():
    """The class, in the table for one test."""
    scope = dict(vars(gpt))
    exec(CLASS, scope)  # noqa: S102  it is our own page
    kind = scope["SlidingWindow"]
    kind.WIDTH = 4
    ATTENTION["sliding_window"] = kind
    yield kind
    del ATTENTION["sliding_window"]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"pos_emb": "rope", "n_kv_head": 2}], ids=str)
def test_it_decodes_on_its_cache(window, settings):
    """Cached equals uncached; what is beyond the window changes nothing; int8 is near."""
    model = randomise(GPT(tiny_config(attention="sliding_window", n_layer=1, **settings)))
    idx = torch.randint(23, (2, 12))
    whole = model(idx, all_logits=True)[0]
    other = idx.clone()
    other[:, 0] = (other[:, 0] + 1) % 23
    changed = model(other, all_logits=True)[0]
    assert torch.equal(changed[:, 4:], whole[:, 4:]) and not torch.equal(changed[:, 3], whole[:, 3])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.int8, 0.3)):
        cache = model.make_cache(2, 12, dtype)
        for t in range(12):
            logits, _ = model(idx[:, t : t + 1], cache=cache)
            torch.testing.assert_close(logits[:, 0], whole[:, t], atol=tolerance, rtol=tolerance)
    uncached = model.generate(idx, 4, temperature=0, use_cache=False)
    assert torch.equal(model.generate(idx, 4, temperature=0), uncached)


@torch.no_grad()
def test_sequences_of_unequal_lengths(window):
    """In one batch every sequence is what it is alone."""
    model = randomise(GPT(tiny_config(attention="sliding_window")))
    cache = model.make_cache(2, 12)
    idx = torch.randint(23, (2, 12))
    for i, n in enumerate((3, 8)):
        model(idx[i : i + 1, :n], cache=cache.row(i))
    view = cache.sequences(0, 2)
    view.set_lengths(torch.tensor([3, 8]), 8)
    new = torch.stack([idx[0, 3:5], idx[1, 8:10]])
    logits, _ = model(new, cache=view, all_logits=True)
    for i, n in enumerate((3, 8)):
        want, _ = model(idx[i : i + 1, : n + 2], all_logits=True)
        torch.testing.assert_close(logits[i], want[0, n:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_it_is_counted_named_and_drawn(window):
    """Words, operations, parameters, the server's description and the picture."""
    config = tiny_config(attention="sliding_window")
    model = randomise(GPT(config))
    words = "a sliding window of 4, MHA, 4 heads of 6"
    assert model.transformer.h[0].attn.words == words
    assert costs.parameters(config) == costs.parameters(tiny_config())
    assert costs.flops_per_token(model, 4) == costs.flops_per_token(GPT(tiny_config()), 4)
    assert costs.flops_per_token(model, 16) == costs.flops_per_token(model, 4)
    tokenizer = Tokenizer({"kind": "char", "chars": "abcdefghijklmnopqrstuvw"})
    about = serve.describe(model, Batch(model, tokenizer, 2, None))
    assert about["attention_name"] == words and about["attention"] == "sliding_window"
    weights = model.attention_weights(torch.randint(23, (1, 9)), 1)
    assert torch.equal(weights > 0, (weights > 0).tril().triu(-3))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 9))


@pytest.mark.slow
def test_a_copy_of_the_project_with_it(tmp_path, dataset):
    """One class and one line in model.py: every command works with it."""
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns(".*", "out*", "__pycache__", "tests", "*.bin")
    shutil.copytree(ROOT, tree, ignore=skip)
    table = "ATTENTION: dict[str, type[Attention]] = {\n"
    source = (tree / "model.py").read_text()
    assert source.count(table) == 1
    before, after = source.split(table)
    (tree / "model.py").write_text(before + CLASS + "\n\n" + table + LINE + after)

    def run(*command: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=tree, capture_output=True, text=True,
            check=False, timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    shape = [f"--dataset={dataset}", "--attention=sliding_window", *QUICK]
    assert "iteration 4" in run("train.py", *shape, "--max_iters=4", "--out_dir=run")
    run("train.py", *shape, "--max_iters=6", "--out_dir=run", "--init_from=resume")
    draw = ["sample.py", "--max_new_tokens=30", "--temperature=0", "--start=to be"]
    text = run(*draw, "--out_dir=run")
    run(*draw, "--out_dir=run", "--cache_dtype=int8")
    run("-m", "tools.export", "--out_dir=run", "--to=exported")
    assert run(*draw, "--init_from=exported").splitlines()[0] == text.splitlines()[0]
    assert "gpt2" not in json.loads((tree / "exported/config.json").read_text())["model_type"]
    compared = run(
        "-m", "tools.compare", f"--dataset={dataset}", *QUICK, "--max_iters=4", "--seeds=1",
        "--variants=MHA; window: attention=sliding_window", "--out_dir=compared",
        "--lr_factors=1,", "--eval_tokens=64",
    )
    assert "window" in compared
