"""
Several processes under torchrun, on the CPU.
Run: python -m pytest tests/test_distributed.py -m "slow or not slow"
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanomla import checkpoint
from nanomla.distributed import resolve_dtype
from tests.conftest import QUICK, ROOT, TINY_MLA, make, run, save_model
from tests.test_train import entries

# 4 micro-steps an iteration, so 2 for each of two processes; 3 evaluation batches, so that one rank
# has one less.
LONG = [
    "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
    "--gradient_accumulation_steps=4", "--eval_interval=20", "--eval_iters=3", "--warmup_iters=2",
    "--learning_rate=1e-2", "--lr_decay_iters=50", "--device=cpu", "--dtype=float32",
    "--dropout=0.1", "--use_mla=True", "--pos_emb=rope",
]


def torchrun_command(*args, script="train.py"):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*torchrun, script, *map(str, args)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*args, script="train.py", timeout=180):
    command = torchrun_command(*args, script=script)
    options = {"capture_output": True, "text": True, "timeout": timeout}
    return subprocess.run(command, cwd=ROOT, env=environment(), check=False, **options)


def losses(folder):
    """Every loss in a run's log, by iteration and kind."""
    found = {}
    for e in entries(folder):
        for key in ("loss", "train_loss", "val_loss", "predict_loss"):
            if key in e:
                assert (e["iter"], key) not in found, "an iteration is in the log twice"
                found[e["iter"], key] = e[key]
    return found


def largest_difference(a, b):
    assert a.keys() == b.keys() and len(a) > 50
    return max(abs(a[k] - b[k]) for k in a)


def test_automatic_precision():
    """bfloat16 on a CPU only where it has the arithmetic and the model is wide enough to gain."""
    assert resolve_dtype("auto", "cpu", 128) == "float32"
    assert resolve_dtype("auto", "mps", 999) == "float32"
    assert resolve_dtype("bfloat16", "cpu", 16) == "bfloat16"


def test_two_processes_equal_one(tmp_path, dataset):
    """
    4 micro-steps in one process and 2 in each of two: the same losses to 1e-5 over 50 iterations,
    with dropout.
    """
    args = [*LONG, f"--dataset={dataset}", "--max_iters=50"]
    assert run("train.py", *args, f"--out_dir={tmp_path}/one").returncode == 0
    done = torchrun(*args, f"--out_dir={tmp_path}/two")
    assert done.returncode == 0, done.stderr
    assert "2 processes, 256 tokens per iteration (4 x 4 x 16)" in done.stdout
    assert done.stdout.count("iter 7:") == 1 and "Warning" not in done.stderr
    assert largest_difference(losses(tmp_path / "one"), losses(tmp_path / "two")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["--parallel=fsdp", "--sample_interval=1"],
        ["--parallel=fsdp", "--mla_share_latent=True", "--n_layer=3", "--grad_checkpoint"],
        ["--parallel=fsdp", "--optimizer=muon"],
        ["--parallel=fsdp", "--n_predict=1", "--grad_checkpoint"],
        ["--parallel=ddp", "--n_predict=1", "--optimizer=muon"],
    ],
    ids="-".join,
)
def test_every_kind_of_two_processes_equals_one(tmp_path, dataset, settings):
    """
    As above for FSDP, a latent that blocks share, and Muon; FSDP's checkpoint has the same full
    tensors as that of one process.
    """
    args = [*LONG, f"--dataset={dataset}", "--max_iters=50", *settings]
    assert run("train.py", *args, f"--out_dir={tmp_path}/one").returncode == 0
    done = torchrun(*args, f"--out_dir={tmp_path}/two")
    assert done.returncode == 0, done.stderr
    assert largest_difference(losses(tmp_path / "one"), losses(tmp_path / "two")) < 1e-5
    a, b = (checkpoint.load(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    shapes = [{k: v.shape for k, v in c.model.items()} for c in (a, b)]
    assert shapes[0] == shapes[1] and all(type(v) is torch.Tensor for v in b.model.values())
    flat = [torch.utils._pytree.tree_flatten(c.optimizer)[0] for c in (a, b)]
    assert [getattr(v, "shape", v) for v in flat[0]] == [getattr(v, "shape", v) for v in flat[1]]
    if "--sample_interval=1" in settings:
        assert done.stdout.count("sample: ") == 4


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_experts_loads_are_those_of_all_processes(tmp_path, dataset, parallel):
    """
    The same losses, biases and shares as in one process. The first weights are large, as otherwise
    some scores are so close that rounding chooses the expert.
    """
    save_model(tmp_path, make({**TINY_MLA, "moe_experts": 6, "moe_dense_layers": 0}))
    args = [*LONG, f"--dataset={dataset}", f"--init_from={tmp_path}/ckpt.pt", "--max_iters=5"]
    args += ["--optimizer=muon", "--moe_balance_step=0.01", f"--parallel={parallel}"]
    assert run("train.py", *args, f"--out_dir={tmp_path}/one").returncode == 0
    done = torchrun(*args, f"--out_dir={tmp_path}/two")
    assert done.returncode == 0, done.stderr
    for a, b in zip(entries(tmp_path / "one"), entries(tmp_path / "two"), strict=True):
        for key in ("loss", "val_loss", "expert_share_min", "expert_share_max"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5), (a, b)
    one, two = (checkpoint.load(tmp_path / name / "ckpt.pt").model for name in ("one", "two"))
    before = checkpoint.load(tmp_path / "ckpt.pt").model
    for name in one:
        if name.endswith("router_bias"):
            assert torch.equal(one[name], two[name]) and not torch.equal(one[name], before[name])


@pytest.mark.slow
def test_a_resume_may_change_the_number_of_processes(tmp_path, dataset):
    """
    1 process, then 2 with DDP, 2 with FSDP and 1 again: the losses of an uninterrupted run;
    sample.py reads each checkpoint.
    """
    args = [*LONG, f"--dataset={dataset}"]
    assert run("train.py", *args, f"--out_dir={tmp_path}/full", "--max_iters=50").returncode == 0
    parts = [*args, f"--out_dir={tmp_path}/parts"]
    assert run("train.py", *parts, "--max_iters=20").returncode == 0
    for more in (["--max_iters=30"], ["--max_iters=40", "--parallel=fsdp"]):
        done = torchrun(*parts, *more, "--init_from=resume")
        assert done.returncode == 0, done.stderr
        flags = ["--start=to", "--max_new_tokens=5", "--device=cpu"]
        sample = run("sample.py", f"--ckpt={tmp_path}/parts/ckpt.pt", *flags)
        assert sample.returncode == 0 and sample.stdout.startswith("to"), sample.stderr
    assert run("train.py", *parts, "--max_iters=50", "--init_from=resume").returncode == 0
    full, parts = losses(tmp_path / "full"), losses(tmp_path / "parts")
    # the parts were also evaluated where they ended, except where the next one began again
    assert largest_difference(full, {k: parts[k] for k in full}) < 1e-5


@pytest.mark.slow
def test_an_error_of_all_ranks_is_reported_once(tmp_path, dataset):
    """One line by rank 0, with its exit status, not one by every rank."""
    base = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    done = torchrun(*base, "--batch_size=3", "--gradient_accumulation_steps=3", timeout=60)
    errors = [line for line in done.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert len(errors) == 1 and "the 9 sequences of an iteration" in errors[0], done.stderr
    assert "exitcode: 2)" in done.stderr and not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_rank_that_fails_ends_all(tmp_path, dataset):
    """Within a minute, with its own error shown and what was saved before in place."""
    script = tmp_path / "failing.py"
    script.write_text(
        "import os\n"
        "import train\n"
        "from nanomla.dataset import Dataset\n"
        "from nanomla.errors import UserError, run_script\n"
        "batch = Dataset.batch\n"
        "def failing(self, seed, iteration, rows):\n"
        "    if iteration == 15 and os.environ['RANK'] == '1':\n"
        "        raise UserError('the disk of this rank is gone')\n"
        "    return batch(self, seed, iteration, rows)\n"
        "Dataset.batch = failing\n"
        "run_script(train.main)\n"
    )
    began = time.monotonic()
    args = [*QUICK, "--gradient_accumulation_steps=2", f"--dataset={dataset}"]
    args += [f"--out_dir={tmp_path}/o", "--max_iters=1000"]
    done = torchrun(*args, script=script, timeout=90)
    assert time.monotonic() - began < 60
    assert done.returncode and "the disk of this rank is gone" in done.stderr, done.stderr
    assert checkpoint.load(tmp_path / "o" / "ckpt.pt").iter_num == 10


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", "rank 1", "torchrun, killed"])
def test_a_signal_stops_all_ranks_at_the_same_iteration(tmp_path, dataset, whom):
    """
    SIGTERM to torchrun, which passes it on, or to one rank, and the end of a torchrun that is
    killed: a checkpoint, and a resume that goes on from it.
    """
    args = [*QUICK, "--gradient_accumulation_steps=2", f"--dataset={dataset}"]
    args += [f"--out_dir={tmp_path}/o"]
    command = torchrun_command(*args, "--max_iters=100000")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes)
    try:
        while "iter 25:" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        if whom == "rank 1":
            os.kill(process_of_rank(process.pid, 1), signal.SIGTERM)
        elif whom == "torchrun":
            process.terminate()
        else:
            process.kill()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    stopped = checkpoint.load(tmp_path / "o" / "ckpt.pt").iter_num
    line = f"stopped before iteration {stopped}; go on with --init_from=resume"
    assert line in out and stopped > 25, (out, err)
    if whom == "rank 1":
        assert f"exitcode: {128 + signal.SIGTERM})" in err, err
    done = run("train.py", *args, f"--max_iters={stopped + 5}", "--init_from=resume")
    assert done.returncode == 0 and f"iterations {stopped} to" in done.stdout, done.stderr


def process_of_rank(agent: int, rank: int) -> int:
    """The process that torchrun (agent) started as a rank."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("finding the process of a rank needs /proc")
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank} below {agent}")


@pytest.mark.slow
def test_float16_skips_alike_on_all_ranks(tmp_path, dataset):
    """
    A loss scale that overflows, in one shard or in all, is halved by every rank until it fits, as
    in one process.
    """
    args = [*LONG, f"--dataset={dataset}", "--dtype=float16", "--eval_interval=10"]
    scales = []
    for name in ("one", "two"):
        here = [*args, f"--out_dir={tmp_path}/{name}"]
        assert run("train.py", *here, "--max_iters=10").returncode == 0
        stored = torch.load(tmp_path / name / "ckpt.pt", weights_only=True)
        stored["scaler"]["scale"] = 2.0**30
        torch.save(stored, tmp_path / name / "ckpt.pt")
        here += ["--max_iters=60", "--init_from=resume", "--parallel=fsdp"]
        done = run("train.py", *here) if name == "one" else torchrun(*here)
        assert done.returncode == 0 and " skipped" in done.stdout, done.stderr
        scales.append(checkpoint.load(tmp_path / name / "ckpt.pt").scaler["scale"])
    # One process divides each loss by 4 micro-steps, two divide it by 2 and then average: half the
    # scale fits.
    assert scales[0] < 2.0**30 and scales[1] in (scales[0], scales[0] / 2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two[60, "val_loss"] == pytest.approx(one[60, "val_loss"], rel=0.02)
