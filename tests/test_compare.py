"""
The comparison of attention variants.
Run: python -m pytest tests/test_compare.py -m "slow or not slow"
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

from model import GPTConfig
from nanomla import checkpoint
from nanomla.costs import on_meta
from nanomla.dataset import locked
from nanomla.errors import UsageError, UserError
from nanomla.files import read_record
from nanomla.settings import configure
from tests.conftest import QUICK, ROOT, fails_with_one_line, run
from tools import report, runs
from tools.compare import CompareConfig, Jobs, main, read_variants, train_all
from tools.runs import Job, Order

SHORT = [*QUICK, "--n_layer=1", "--max_iters=20", "--eval_tokens=600", "--decode_context=32"]
TWO = "MHA; mla6: use_mla=True mla_latent_dim=6"


def compare(dataset, folder, *args):
    return run("tools.compare", *SHORT, f"--dataset={dataset}", f"--out_dir={folder}", *args)


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def jobs_of(dataset, *flags):
    cfg, origins = configure(
        CompareConfig, [f"--dataset={dataset}", "--block_size=16", "--pos_emb=rope", *flags]
    )
    return Jobs(cfg, origins)


RESULT = {
    "eval_tokens": 600, "val_loss": 1.5, "iterations": 20, "tokens": 1280, "parameters": 100,
    "attention_parameters": 50, "cached_numbers": 16.0, "cache_bytes": 128.0,
    "training_flops": 10**6, "ms": 1.5, "curve": [[0, 0.5, 4.0], [20, 1.5, 1.5]],
    "dataset": "text", "model": {"n_layer": 2},
}


class FakePool:
    """A pool whose runs end at once; the lower their rate, the lower their loss."""

    def __init__(self):
        self.errors = {}

    def run(self, jobs, later=0):
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            result = RESULT | {"eval_tokens": job.eval_tokens, "val_loss": job.lr_factor}
            if "fails" not in job.variant:
                (job.folder / "result.json").write_text(json.dumps(result))


def test_which_runs_are_made(dataset, tmp_path):
    """Every rate with one seed; the best with all, and with equal parameters; failures in rows."""
    variants = f"--variants={TWO}; fails: n_kv_head=1"
    flags = [variants, "--lr_factors=0.5,1", "--seeds=7,8", f"--out_dir={tmp_path}", "--n_head=2"]
    jobs = jobs_of(dataset, *flags)
    rows = train_all(jobs.cfg, jobs, FakePool())
    good = {(r["variant"], r["equal"], r["lr_factor"], r["seed"]) for r in rows if "val_loss" in r}
    expected = {(v, "tokens", f, 7) for v in ("MHA", "mla6") for f in (0.5, 1.0)}
    for equal in ("tokens", "parameters"):
        expected |= {(v, equal, 0.5, s) for v in ("MHA", "mla6") for s in (7, 8)}
    assert good == expected
    assert all(row["best_rate"] == (row["lr_factor"] == 0.5) for row in rows if "val_loss" in row)
    failed = [row for row in rows if "error" in row]
    assert [row["variant"] for row in failed] == ["fails", "fails"]


@pytest.mark.slow
def test_a_comparison(dataset, tmp_path):
    """
    Figures are those of the runs' checkpoints and logs, a variant that fails stops no other, the
    same command repeats no run, and the folders of runs give the same table.
    """
    args = ["--lr_factors=1", "--seeds=1"]
    out = compare(dataset, tmp_path, f"--variants={TWO}; wrong: dataset={tmp_path}/nowhere", *args)
    assert out.returncode == 0, out.stderr
    assert "wrong, rate x 1, seed 1337: failed: " in out.stdout
    *good, failed = sorted(results(tmp_path), key=lambda row: "error" in row)
    assert "nowhere is not prepared" in failed["error"]
    assert "## Failed" in (tmp_path / "report.md").read_text()
    for row in good:
        model, _ = checkpoint.build(checkpoint.load(ROOT / row["folder"] / "ckpt.pt"))
        assert row["parameters"] == model.get_num_params() and row["tokens"] == 20 * 4 * 16
        assert row["cache_bytes"] == model.make_cache(1, 16).bytes_per_token
        assert row["curve"][-1][0] == 20 and row["curve"][-1][2] < 4
        assert row["val_loss"] == pytest.approx(row["curve"][-1][2], abs=0.1)
    sizes = [row["parameters"] for row in good if row["equal"] == "parameters"]
    assert len(sizes) == 2 and max(sizes) / min(sizes) < 1.01

    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/ckpt.pt")}
    again = compare(dataset, tmp_path, f"--variants={TWO}", *args)
    assert "2 of 2 runs are done already" in again.stdout, again.stderr
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/ckpt.pt")} == written
    assert results(tmp_path) == good

    folders = [row["folder"] for row in good[:2]]
    flags = ["--eval_tokens=600", "--decode_context=0", f"--out_dir={tmp_path}/finished"]
    assert run("tools.compare", *folders, *flags).returncode == 0
    losses = [row["val_loss"] for row in results(tmp_path / "finished")]
    assert losses == pytest.approx([row["val_loss"] for row in good[:2]])
    assert len(list(tmp_path.glob("**/loss_*.png"))) == 4


WRONG_LINES = [
    {"iter": 1, "ms": None}, {"iter": 1, "val_loss": None, "seconds": 1.0}, {"iter": "1"}, [1], 3,
    {"iter": 1, "val_loss": 1.5, "seconds": "2"}, {"iter": 1, "val_loss": 10**400}, {"iter": -1},
]
WRONG_SETTINGS = [
    {"dataset": None}, {"batch_size": "many"}, {"dtype": "int4"}, {"device": 3},
    {"gradient_accumulation_steps": torch.ones(3)},
]


def test_wrong_files_of_runs_are_named_and_the_others_compared(dataset, tmp_path):
    """Lines of a log that are no entries are left out; settings and results have their types."""
    args = [*QUICK, f"--dataset={dataset}", "--max_iters=10"]
    assert run("train.py", *args, f"--out_dir={tmp_path}/a").returncode == 0
    log = (tmp_path / "a" / "log.jsonl").read_text()
    lines = [json.dumps(line) for line in WRONG_LINES] + ["[" * 10**5, "1" * 5000]
    (tmp_path / "a" / "log.jsonl").write_text("\n".join(lines) + "\n" + log)
    content = torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)
    recorded = content["config"]
    wrong = [recorded | settings for settings in WRONG_SETTINGS]
    for i, config in enumerate([{}, *wrong]):
        (tmp_path / f"b{i}").mkdir()
        torch.save(content | {"config": config}, tmp_path / f"b{i}" / "ckpt.pt")
    folders = sorted(map(str, tmp_path.glob("b*")))
    flags = ["--eval_tokens=600", "--decode_context=0", f"--out_dir={tmp_path}/o"]
    done = run("tools.compare", *folders, f"{tmp_path}/a", *flags)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(folders)
    for folder, line in zip(folders, done.stderr.splitlines(), strict=True):
        assert line.startswith(f"warning: {folder}/ckpt.pt: ")
    *failed, row = results(tmp_path / "o")
    assert [point[0] for point in row["curve"]] == [0, 10] and row["ms"] > 0
    assert [row["variant"] for row in failed] == folders and all("error" in row for row in failed)
    done = run("train.py", f"--out_dir={folders[1]}", "--init_from=resume")
    words = [f"{folders[1]}/ckpt.pt: in the run's settings dataset must be", "not None"]
    assert fails_with_one_line(done, 1, *words)
    done = run("tools.compare", folders[0], *flags)
    assert fails_with_one_line(done, 1, "every run failed; the first: ", "which dataset")


@pytest.mark.parametrize(
    "content",
    [[], {}, RESULT | {"val_loss": None}, RESULT | {"curve": [[0, 1], [1, 2]]}, RESULT | {"new": 1}]
    + [RESULT | {"model": {"n_layer": "two"}}],
)
def test_a_wrong_result_is_made_again(dataset, tmp_path, content, capsys):
    """With a line that names its file; a wrong job.json is one line, too."""
    job = jobs_of(dataset, f"--out_dir={tmp_path}").make("MHA", "tokens", 1.0, 7)
    job.folder.mkdir(parents=True)
    job = dataclasses.replace(job, eval_tokens=600)
    (job.folder / "result.json").write_text(json.dumps(RESULT))
    assert job.result["curve"] == RESULT["curve"] and not capsys.readouterr().err
    (job.folder / "result.json").write_text(json.dumps(content))
    assert job.result is None
    assert capsys.readouterr().err.startswith(f"warning: {job.folder}/result.json: cannot be read")
    (job.folder / "job.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="job.json: cannot be read"):
        read_record(job.folder / "job.json", Order)


@pytest.mark.slow
def test_a_stopped_comparison_goes_on(tmp_path, dataset):
    """Its runs save and stop, and the next call goes on with them."""
    args = [*SHORT, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--variants=MHA"]
    args += ["--lr_factors=1", "--seeds=1", "--equal_parameters=False", "--max_iters=1600"]
    args += ["--eval_interval=800", "--decode_context=0"]
    command = [sys.executable, "-m", "tools.compare", *args]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/ckpt.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode and "the same command goes on" in out
    (ckpt,) = tmp_path.glob("runs/*/ckpt.pt")
    stopped = checkpoint.load(ckpt).iter_num
    assert 0 < stopped < 1600
    again = run("tools.compare", *args)
    assert again.returncode == 0, again.stderr
    assert f"iterations {stopped} to 1600" in (ckpt.parent / "output.txt").read_text()
    seconds = [point[1] for point in results(tmp_path)[0]["curve"]]
    assert seconds == sorted(seconds) and len(seconds) >= 3


def test_variants_are_read():
    """Names in any spelling; own settings; commas in brackets; clear errors."""
    base = GPTConfig(n_head=4, n_embd=128, bias=False)
    text = "mha, MLA-Decoupled; a: n_kv_head=2\nb: use_mla=True mla_latent_dim=(8,6), MQA"
    variants = read_variants(text, base)
    assert list(variants) == ["MHA", "MLA decoupled", "a", "b", "MQA"]
    assert variants["b"] == {"use_mla": "True", "mla_latent_dim": "(8,6)"}
    changed = read_variants("mla decoupled: mla_latent_dim=4", base)["mla decoupled"]
    assert changed["mla_latent_dim"] == "4" and changed["use_mla"] is True  # not MHA
    for text, words in (
        ("a: n_kv_head", "write key=value"), ("MHA; mha", "MHA is there twice"), (" , ", "empty"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            read_variants(text, base)


def test_default_variants(dataset):
    """MLA's caches are 8x smaller than MHA's, and equal parameters are within 1%."""
    jobs = jobs_of(dataset, "--n_head=3", "--n_embd=96", "--n_layer=2")
    assert len(jobs.variants) == 7
    for name, config in jobs.configs.items():
        if name.startswith("MLA"):
            assert on_meta(config).get_cache_size_ratio() == 1 / 8
        for flag in jobs.make(name, "parameters", 1.0, 1).flags:
            if flag.startswith("--mlp_hidden="):
                config.mlp_hidden = int(flag.partition("=")[2])
        assert abs(on_meta(config).get_num_params() / jobs.parameters["MHA"] - 1) < 0.01


def test_flags_of_a_run(dataset):
    """All rates by one factor; other settings reach every run; their order makes no other run."""
    rates = ["--learning_rate=0.006", "--muon_learning_rate=0.02", "--min_lr=0.001"]
    job = jobs_of(dataset, *rates, "--beta2=0.98").make("MHA", "tokens", 0.5, 7)
    scaled = {"--learning_rate=0.003", "--muon_learning_rate=0.01", "--min_lr=0.0005"}
    assert {*scaled, "--beta2=0.98", "--seed=7"} <= {*job.flags}
    other = jobs_of(dataset, "--beta2=0.98", *reversed(rates), "--eval_tokens=99")
    assert other.make("MHA", "tokens", 0.5, 7).folder == job.folder


def test_pareto_front():
    """What no other point beats in both; equal caches leave the better one."""
    points = [(256, 1.70), (64, 1.72), (32, 1.74), (32, 1.71), (16, 1.80), (128, 1.75)]
    assert report.pareto(points) == [(16, 1.80), (32, 1.71), (256, 1.70)]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--variants=MHB"], ["unknown 'MHB'"]),
        (["--variants=a: n_kv_head=3"], ["variant a", "n_kv_head=3", "divisor"]),
        (["--variants=a: mla_latent_dim=4"], ["mla_latent_dim has no effect"]),
        (["--init_from=resume"], ["init_from does not work here"]),
        (["config/claims_norm.py", "config/claims_norm.py"], ["the title 'Claims: norms"]),
    ],
)
def test_wrong_calls(tmp_path, dataset, args, words):
    """Each gets one line, before anything is trained."""
    out = compare(dataset, tmp_path / "o", *args)
    assert fails_with_one_line(out, 2, *words)
    assert not (tmp_path / "o").exists()


def test_one_comparison_at_a_time(tmp_path, dataset):
    """Another one in the same folder is refused."""
    (tmp_path / "runs").mkdir()
    with locked(tmp_path / "runs", "training in it") as certain:
        out = compare(dataset, tmp_path, "--variants=MHA")
        assert not certain or fails_with_one_line(out, 1, "another run is training in it")


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [
        ([-1, 0, 1], [x + 2.776445 * (2 / 3) ** 0.5 for x in (-1, 0, 1)], 0.05),  # t table, 4
        ([-1, 0, 1], [x + 4.604095 * (2 / 3) ** 0.5 for x in (-1, 0, 1)], 0.01),
        ([0, 2], [3, 3, 3], 1 - 2 / math.pi * math.atan(2)),  # 1 degree of freedom: Cauchy's
        ([1, 2, 3], [3, 2, 1], 1),
        ([1, 1], [1, 1], 1),
        ([1, 1], [2, 2], 0),
    ],
)
def test_p_values(a, b, p):
    """Welch's test, by tables of Student's distribution; of either order."""
    assert report.welch_p_value(a, b) == pytest.approx(p, abs=1e-6)
    assert report.welch_p_value(b, a) == pytest.approx(p, abs=1e-6)


def test_what_seeds_can_tell():
    """A p-value beside the change where both have several seeds, in words above 0.05."""
    runs = [{"val_loss": loss} for loss in (2.0, 2.01, 2.02)]
    near = report.loss_cells([{"val_loss": loss} for loss in (2.005, 2.01, 2.03)], runs)
    assert near["change"] == "+0.0050" and near["p"].endswith(", not distinguishable")
    far = report.loss_cells([{"val_loss": loss} for loss in (1.9, 1.91, 1.92)], runs)
    assert far["change"] == "-0.1000" and float(far["p"]) < 0.001
    assert report.loss_cells(runs, runs)["p"] == report.loss_cells(runs[:1], runs)["p"] == ""


def test_an_earlier_run_is_waited_for(tmp_path, monkeypatch, capsys):
    """What outlives a killed comparison keeps its folder for an iteration: one line, not longer."""
    job = Job("MHA", "tokens", 1.0, 1, (), 600, tmp_path)
    runs.wait_for_earlier(job)
    assert capsys.readouterr().out == ""
    lock = locked(tmp_path, "training in it")
    lock.__enter__()
    end = threading.Timer(0.5, lambda: lock.__exit__(None, None, None))
    end.start()
    runs.wait_for_earlier(job)
    end.join()
    assert re.fullmatch(".*another run is training in it; waiting .*\n", capsys.readouterr().out)
    monkeypatch.setattr(runs, "LONGEST_WAIT", 0.3)
    with locked(tmp_path, "training in it"):
        runs.wait_for_earlier(job)


def test_a_pipe_is_no_config_file_here(tmp_path):
    """It can be read only once."""
    os.mkfifo(tmp_path / "c.py")
    with pytest.raises(UsageError, match="c.py: .*can be no pipe"):
        main([str(tmp_path / "c.py")])
