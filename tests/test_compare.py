"""The comparison of attention variants. Run: python -m pytest tests/test_compare.py"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from model import GPT, GPTConfig
from nanomla import checkpoint
from nanomla.dataset import locked
from nanomla.errors import UsageError
from nanomla.settings import configure
from tests.conftest import QUICK, ROOT, fails_with_one_line, run
from tools import report
from tools.compare import CompareConfig, Jobs, read_variants

SHORT = [*QUICK, "--n_layer=1", "--max_iters=20", "--eval_tokens=600", "--decode_context=32"]
TWO = "MHA; mla6: use_mla=True mla_latent_dim=6"


def compare(dataset, folder, *args):
    return run("tools.compare", *SHORT, f"--dataset={dataset}", f"--out_dir={folder}", *args)


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory, dataset):
    """A comparison of two variants at two rates with two seeds, one variant of which fails."""
    folder = tmp_path_factory.mktemp("compare")
    variants = f"--variants={TWO}; wrong: dataset={folder}/nowhere"
    args = [variants, "--lr_factors=0.01,1", "--seeds=2"]
    out = compare(dataset, folder, *args)
    assert out.returncode == 0, out.stderr
    return folder, args, out


def test_every_run_is_made_and_reported(done):
    """Two rates, the better of them with two seeds, the same with equal parameters."""
    folder, _, out = done
    rows = results(folder)
    good = [r for r in rows if "val_loss" in r]
    kinds = {(r["variant"], r["equal"], r["lr_factor"], r["seed"]) for r in good}
    expected = {(v, "tokens", f, 1337) for v in ("MHA", "mla6") for f in (0.01, 1.0)}
    expected |= {
        (v, e, 1.0, s)
        for v in ("MHA", "mla6")
        for e in ("tokens", "parameters")
        for s in (1337, 1338)
    }
    assert kinds == expected
    best = {(r["variant"], r["lr_factor"]) for r in good if r["best_rate"]}
    assert best == {("MHA", 1.0), ("mla6", 1.0)}  # a hundredth of the rate learns nothing
    text = (folder / "report.md").read_text()
    assert "## Equal parameters" in text and "## Learning rates" in text and "MHA" in text
    assert all((folder / f"loss_{name}.png").read_bytes()[:4] == b"\x89PNG" for name in PICTURES)
    assert "left, about 0:0" in out.stdout and "the last of these" in out.stdout


PICTURES = ("cache", "seconds")


def test_figures_are_those_of_the_runs(done):
    """Parameters, cache and loss in the report are those of the runs' checkpoints and logs."""
    folder, _, _ = done
    for row in results(folder):
        if "val_loss" not in row:
            continue
        ckpt = checkpoint.load(ROOT / row["folder"] / "ckpt.pt")
        model, _ = checkpoint.build(ckpt)
        assert row["parameters"] == model.get_num_params() and row["tokens"] == 20 * 4 * 16
        assert row["cache_bytes"] == model.make_cache(1, 16).bytes_per_token
        assert row["curve"][-1][0] == 20 and row["curve"][-1][2] < 4
        assert row["val_loss"] == pytest.approx(row["curve"][-1][2], abs=0.1)
        width = row["model"]["mlp_hidden"] or 4 * row["model"]["n_embd"]
        assert (width > 64) == (row["variant"] == "mla6" and row["equal"] == "parameters")
    sizes = {r["parameters"] for r in results(folder) if r.get("equal") == "parameters"}
    assert max(sizes) / min(sizes) < 1.01


def test_a_failing_variant_stops_no_other(done):
    """It is in the report with its reason."""
    folder, _, out = done
    failed = [r for r in results(folder) if "error" in r]
    assert {r["variant"] for r in failed} == {"wrong"} and len(failed) == 2
    assert all("nowhere is not prepared" in r["error"] for r in failed)
    assert "## Failed" in (folder / "report.md").read_text()
    assert "wrong, rate x 1, seed 1337: failed: " in out.stdout


def test_the_same_command_repeats_no_run(done, dataset):
    """The second call changes no run's folder and gives the same figures."""
    folder, args, _ = done
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/ckpt.pt")}
    losses = [r.get("val_loss") for r in results(folder)]
    variants = f"--variants={TWO}"
    again = compare(dataset, folder, variants, *args[1:])
    assert again.returncode == 0, again.stderr
    assert "4 of 4 runs are done already" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/ckpt.pt")} == before
    assert [r["val_loss"] for r in results(folder)] == [loss for loss in losses if loss]


def test_finished_runs_are_compared(done):
    """The folders of runs give the same table, with the losses that the comparison found."""
    folder, _, _ = done
    rows = [r for r in results(folder) if "val_loss" in r][:2]
    flags = ["--eval_tokens=600", "--decode_context=0", f"--out_dir={folder}/finished"]
    out = run("tools.compare", *(r["folder"] for r in rows), *flags)
    assert out.returncode == 0, out.stderr
    again = results(folder / "finished")
    assert [r["val_loss"] for r in again] == pytest.approx([r["val_loss"] for r in rows])
    assert (folder / "finished" / "loss_cache.png").exists()
    both = run("tools.compare", rows[0]["folder"], "config/train_mla.py")
    assert fails_with_one_line(both, 2, "not both")
    assert fails_with_one_line(run("tools.compare", "no/such"), 1, "no/such")


def test_a_killed_comparison_goes_on(tmp_path, dataset):
    """SIGTERM stops the runs at a checkpoint and leaves no process; the next call finishes."""
    args = [*SHORT, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--variants=MHA"]
    args += ["--lr_factors=1", "--seeds=1", "--equal_parameters=False", "--max_iters=3000"]
    args += ["--eval_interval=1500", "--decode_context=0"]
    command = [sys.executable, "-m", "tools.compare", *args]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/ckpt.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode and "the same command goes on" in out
    (ckpt,) = tmp_path.glob("runs/*/ckpt.pt")
    stopped = checkpoint.load(ckpt).iter_num
    assert 0 < stopped < 3000
    again = run("tools.compare", *args)
    assert again.returncode == 0, again.stderr
    output = (ckpt.parent / "output.txt").read_text()
    assert f"iterations {stopped} to 3000" in output
    seconds = [p[1] for p in results(tmp_path)[0]["curve"]]
    assert seconds == sorted(seconds) and len(seconds) >= 3


def test_variants_are_read():
    """Names in any spelling; own settings; commas in brackets; clear errors."""
    base = GPTConfig(n_head=4, n_embd=128, bias=False)
    text = "mha, MLA-Decoupled; a: n_kv_head=2\nb: use_mla=True mla_latent_dim=(8,6), MQA"
    found = read_variants(text, base)
    assert list(found) == ["MHA", "MLA decoupled", "a", "b", "MQA"]
    assert found["b"] == {"use_mla": "True", "mla_latent_dim": "(8,6)"}
    changed = read_variants("mla decoupled: mla_latent_dim=4", base)["mla decoupled"]
    assert changed["mla_latent_dim"] == "4" and changed["use_mla"] is True  # not MHA
    for text, words in (
        ("MHA, MHB", "unknown 'MHB'"),
        ("a: n_kv_head", "write key=value"),
        ("MHA; mha", "MHA is there twice"),
        (" , ", "is empty"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            read_variants(text, base)


def test_default_variants_work_at_any_width(dataset):
    """Each builds, MLA's caches are 8x smaller than MHA's, and equal parameters are within 1%."""
    for nh, C in ((4, 128), (6, 384), (12, 768), (3, 96)):
        flags = [f"--n_head={nh}", f"--n_embd={C}", f"--dataset={dataset}", "--pos_emb=rope"]
        flags += ["--block_size=16", "--n_layer=2"]
        cfg, origins = configure(CompareConfig, flags)
        jobs = Jobs(cfg, origins)
        assert len(jobs.variants) == 7
        for name, config in jobs.configs.items():
            model = GPT(config)
            if name.startswith("MLA"):
                assert model.get_cache_size_ratio() == 1 / 8
            job = jobs.make(name, "parameters", 1.0, 1)
            width = [f.partition("=")[2] for f in job.flags if f.startswith("--mlp_hidden=")]
            if width:
                config.mlp_hidden = int(width[0])
            assert abs(GPT(config).get_num_params() / jobs.parameters["MHA"] - 1) < 0.01


def test_learning_rates_are_scaled_together(dataset):
    """All rates of the recipe by one factor; other settings of the recipe reach every run."""
    rates = ["--learning_rate=0.006", "--muon_learning_rate=0.02", "--min_lr=0.001"]
    recipe = [f"--dataset={dataset}", "--block_size=16", *rates, "--beta2=0.98"]
    cfg, origins = configure(CompareConfig, recipe)
    flags = Jobs(cfg, origins).make("MHA", "tokens", 0.5, 7).flags
    scaled = {"--learning_rate=0.003", "--muon_learning_rate=0.01", "--min_lr=0.0005"}
    assert {*scaled, "--beta2=0.98", "--seed=7"} <= {*flags}


def test_the_order_of_flags_makes_no_other_run(dataset):
    """The same settings in another order, or another measurement, find the same folder."""
    common = [f"--dataset={dataset}", "--block_size=16"]
    folders = set()
    for flags in (
        ["--beta1=0.8", "--beta2=0.9"],
        ["--beta2=0.9", "--beta1=0.8", "--eval_tokens=99"],
        ["--beta2=0.9", "--beta1=0.8", "--init_from=scratch"],
    ):
        cfg, origins = configure(CompareConfig, [*common, *flags])
        folders.add(Jobs(cfg, origins).make("MHA", "tokens", 1.0, 1).folder)
    assert len(folders) == 1
    cfg, origins = configure(CompareConfig, [*common, "--seeds=0,5"])
    assert cfg.all_seeds == (0, 5)


def test_a_checkpoint_that_was_not_written_is_no_result(tmp_path, dataset, monkeypatch):
    """With a full disk train.py goes on, and the loss of an earlier checkpoint is not reported."""
    from nanomla.errors import UserError

    save = checkpoint.save

    def full(out_dir, state, best=False):
        if state.iter_num == 20:
            raise UserError("No space left on device")
        save(out_dir, state, best)

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr("tools.compare._end_with_parent", lambda: None)
    flags = [*QUICK, "--n_layer=1", "--max_iters=20", f"--dataset={dataset}"]
    job = {"flags": flags, "change": None, "eval_tokens": 600}
    (tmp_path / "job.json").write_text(json.dumps(job))
    out = run("tools.compare", "--run", str(tmp_path))
    assert fails_with_one_line(out, 1, "iteration 20, could not be written")
    assert not (tmp_path / "result.json").exists()


def test_a_changed_model_is_measured_with_its_change(done, dataset, tmp_path):
    """A finished run of a comparison is built as it was trained."""
    variant = "--variants=a: change=rotated_keys use_mla=True pos_emb=rope mla_latent_dim=6"
    args = [f"{variant} mla_rope_dim=0", "--lr_factors=1", "--seeds=1", "--decode_context=0"]
    assert compare(dataset, tmp_path, *args, "--equal_parameters=False").returncode == 0
    (row,) = results(tmp_path)
    out = run("tools.compare", row["folder"], "--eval_tokens=600", f"--out_dir={tmp_path}/f")
    assert out.returncode == 0, out.stderr
    assert results(tmp_path / "f")[0]["val_loss"] == pytest.approx(row["val_loss"], abs=1e-6)


def test_pareto_front():
    """What no other point beats in both; equal caches leave the better one."""
    points = [(256, 1.70), (64, 1.72), (32, 1.74), (32, 1.71), (16, 1.80), (128, 1.75)]
    assert report.pareto(points) == [(16, 1.80), (32, 1.71), (256, 1.70)]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--variants=MHB"], ["unknown 'MHB'"]),
        (["--variants=a: n_kv_head=3"], ["variant a", "n_kv_head=3", "divisor"]),
        (["--variants=a: n_kv_heads=2"], ["variant a", "did you mean n_kv_head"]),
        (["--lr_factors=0"], ["lr_factors", "above 0"]),
        (["--lr_factors=a"], ["lr_factors"]),
        (["--seeds=0"], ["seeds"]),
        (["--init_from=resume"], ["init_from does not work here"]),
        (["--measure=nothing"], ["measure='nothing'"]),
        (["--variants=a: change=none"], ["change is one of"]),
        (["--learning_rates=1"], ["did you mean learning_rate?"]),
        (["--seeds=-1"], ["seeds=-1", "at least 1"]),
        (["--decode_context=4"], ["decode_context=4", "at least 16, or 0"]),
        (["--decode_context=0", "--measure=costs"], ["decode_context=0", "at least 16"]),
        (["--variants=a: seed=3"], ["seed cannot differ"]),
        (["--variants=a: init-from=gpt2"], ["init_from cannot differ"]),
        (["--variants=a: mla_latent_dim=4"], ["mla_latent_dim has no effect"]),
    ],
)
def test_wrong_calls(tmp_path, dataset, args, words):
    """Each gets one line, before anything is trained."""
    out = compare(dataset, tmp_path / "o", *args)
    assert fails_with_one_line(out, 2, *words)
    assert not (tmp_path / "o").exists()


def test_no_dataset_and_no_room(tmp_path, dataset):
    """One line each."""
    out = compare("no-such-dataset", tmp_path / "o")
    assert fails_with_one_line(out, 1, "no-such-dataset is not prepared")
    (tmp_path / "file").write_text("")
    out = compare(dataset, tmp_path / "file", "--variants=MHA")
    assert fails_with_one_line(out, 1, "cannot be written")


def test_two_comparisons_cannot_share_a_folder(tmp_path, dataset):
    """The second one gets one line, and the first goes on."""
    (tmp_path / "runs").mkdir()
    with locked(tmp_path / "runs", "training in it") as certain:
        out = compare(dataset, tmp_path, "--variants=MHA")
        assert not certain or fails_with_one_line(out, 1, "another run is training in it")


def test_runs_end_with_the_process_that_started_them(tmp_path, dataset):
    """A comparison that is killed without notice leaves no run behind."""
    args = [*SHORT, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--variants=MHA"]
    args += ["--lr_factors=1", "--max_iters=100000", "--eval_interval=100000"]
    command = [sys.executable, "-m", "tools.compare", *args]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/log.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while not list(tmp_path.glob("runs/*/ckpt.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)  # the run has been told, saves and ends
    (output,) = tmp_path.glob("runs/*/output.txt")
    while "stopped before iteration" not in output.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "go on with --init_from=resume" in output.read_text()
    assert os.path.exists(next(tmp_path.glob("runs/*/ckpt.pt")))
