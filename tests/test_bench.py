"""bench.py counts and times. Run: python -m pytest tests/test_bench.py"""

import json

import pytest
import torch

import bench
from model import GPT
from tests.conftest import TINY_MLA, fails_with_one_line, run, tiny_config


def test_report_counts_a_config(tmp_path):
    """Parameters, cache bytes and FLOPs of a config beside MHA's, as the formulas say, in the table and in JSON."""
    done = run("bench.py", "config/train_mla.py", "--report", "--vocab_size=65", "--context=64", f"--json={tmp_path}/r.json")
    assert done.returncode == 0, done.stderr
    rows = {r[""]: r for r in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert rows["cache bytes per token, float32"]["this config"] == f"{2 * 32 * 4}"
    assert rows["cache bytes per token, float32"]["MHA"] == f"{2 * 256 * 4:,}"
    assert rows["cache bytes per token, bfloat16"]["MHA / this"] == "8.00"
    attention = 128 * 128 * 2 + 128 * 32 + 16 + 16 * (4 * 16) + 16 * 128  # q and c_proj, latent, norm, expansions
    assert rows["parameters: attention"]["this config"] == f"{2 * attention:,}"
    assert rows["of these, making keys and values"]["MHA"] == f"{2 * 2 * 128 * 128:,}"
    assert "| cache bytes per token, float32 " in done.stdout


def test_flops_by_hand():
    """Two per weight of every matrix, and two per key, head and number in scores and average."""
    model = GPT(tiny_config(**{**TINY_MLA, "bias": False}))
    matrices = 24 * 24 * 2 + 24 * 9 + 7 * 16 + 7 * 24 + 2 * 24 * 96
    assert model.flops_per_token(10) == 2 * (23 * 24 + 2 * matrices) + 2 * 2 * 4 * 10 * (6 + 6)
    assert model.flops_per_token(10, absorbed=True) == 2 * (23 * 24 + 2 * matrices) + 2 * 2 * 4 * 10 * (2 * 7 + 2)


def test_alternation_and_roofline():
    """Every function runs once a round, slow ones in 3 rounds only; the roofline is the larger of its two limits."""
    calls = []
    took = bench.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 5, "cpu", few=("b",))
    assert "".join(calls) == "ab" * 4 + "a" * 2 and set(took) == {"a", "b"}
    limits = bench.Limits(10.0, {torch.float32: 100.0})
    assert limits.seconds(50, 100, torch.float32) == 5 and limits.seconds(1, 1000, torch.float32) == 10


def test_bad_input_is_one_line():
    """No command, two of them, a file that cannot be written."""
    assert fails_with_one_line(run("bench.py"), 2, "decode, train, svd")
    assert fails_with_one_line(run("bench.py", "decode", "train"), 2, "one of")
    assert fails_with_one_line(run("bench.py", "config/train_mla.py", "--report", "--json=/no/where"), 1, "--json=/no/where")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["decode", "train", "svd"])
def test_commands_run(command, tmp_path):
    """Each prints its tables, transformers beside it, and writes them as JSON."""
    done = run("bench.py", command, "--vs-hf", "--rounds=1", f"--json={tmp_path}/b.json", fresh=True, timeout=500)
    assert done.returncode == 0, done.stderr
    tables = {row["table"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    assert len(tables) == {"decode": 5, "train": 3, "svd": 1}[command] and all(t in done.stdout for t in tables)
