"""
Compare attention: train every variant with one recipe, at several learning rates and seeds.

    python -m tools.compare config/compare_shakespeare.py
    python -m tools.compare config/compare_shakespeare.py --variants="MHA, MQA" --seeds=1
    python -m tools.compare config/mine.py --variants="MHA; mla32: use_mla=True mla_latent_dim=32"
    python -m tools.compare out-a out-b     the same table and curves of finished runs

Every setting of train.py is one here too and holds for all variants. Each run is a process of its
own that runs train.py's loop, in a folder below out_dir. The same command goes on where it was
interrupted, and repeats no finished run. It writes report.md, results.jsonl, loss_cache.png and
loss_seconds.png into out_dir.

A config file with a title is a comparison of its own, so that several can be given at once:
config/claims_*.py regenerates the figures of docs/claims.md.
"""

import dataclasses
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

import train
from model import GPT, GPTConfig
from nanomla import checkpoint, costs, runlog
from nanomla.checks import Count, Natural, Positive, Several, check
from nanomla.dataset import Dataset, locked
from nanomla.distributed import print0, resolve_device, resolve_dtype
from nanomla.errors import UsageError, UserError, run_script
from nanomla.settings import configure, flat, run_config_file
from nanomla.start import padded_vocab, without_effect
from tools import experiments
from tools.bench.timing import machine
from tools.report import draw, report_text
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
NOT_HERE = {"init_from": "scratch", "eval_only": False}
RATES = ("learning_rate", "muon_learning_rate", "min_lr")  # what lr_factors multiply
ORDINARY = {"use_mla": False, "use_svd": False, "use_latent_tokens": False, "n_kv_head": None}


def known_variants(base: GPTConfig) -> dict[str, dict[str, Any]]:
    """The variants that have a name, with settings for this width; MLA's caches are 8x smaller."""
    C, nh, hs = base.n_embd, base.n_head, base.hs
    eighth, r = max(C // 8 * 2, 4), max(min(C // 8, hs // 2) // 2 * 2, 2)
    kv_heads = next(n for n in range(max(nh // 2, 1), 0, -1) if nh % n == 0)
    latent = ORDINARY | {"use_mla": True, "pos_emb": "rope"}
    decoupled = latent | {"mla_rope": "decoupled", "mla_latent_dim": eighth - r, "mla_rope_dim": r}
    turning = {"mla_rope": "latent", "mla_latent_dim": eighth, "mla_rope_dim": None}
    slots = {"use_latent_tokens": True, "n_latent_tokens": 16, "pos_emb": "learned"}
    return {
        "MHA": ORDINARY,
        "GQA": ORDINARY | {"n_kv_head": kv_heads},
        "MQA": ORDINARY | {"n_kv_head": 1},
        "MLA decoupled": decoupled,
        "MLA rotary latent": latent | turning,
        "MLA+SVD": decoupled | {"use_svd": True, "svd_rank": max(hs // 2, 1)},
        "latent tokens": ORDINARY | slots,
    }


@dataclass
class CompareConfig:
    """What to compare, and the recipe."""

    headings: ClassVar[dict[str, str]] = {"title": "comparison"}

    train: TrainConfig = field(default_factory=TrainConfig)
    title: Annotated[
        str | None, "The title of the report, and the name of its folder below out_dir."
    ] = None
    variants: Annotated[
        str,
        'The variants to compare: names, or "NAME: key=value key=value", with commas, semicolons '
        "or lines between them.",
    ] = ", ".join(known_variants(GPTConfig()))
    lr_factors: Annotated[
        Positive | Several[Positive],
        "The factors of the recipe's learning rates. Each is tried with one seed.",
    ] = (0.6, 1.0, 1.6)
    seeds: Annotated[
        int | Several[int],
        "The seeds at each variant's best rate: how many, or which ones, as in 5,6 for two and 5, "
        "for one.",
    ] = 3
    equal_parameters: Annotated[
        bool,
        "Each variant is also trained with as many parameters as the first, by the width of its "
        "MLP.",
    ] = True
    out_dir: Annotated[str, "The folder of the report and of the runs."] = "out-compare"
    jobs: Annotated[
        Count | None,
        "The number of runs side by side. None stands for the number of a CPU's cores, at most 4.",
    ] = None
    eval_tokens: Annotated[Count, "About how many validation tokens the final loss is of."] = 2**17
    decode_context: Annotated[
        Natural, "The number of tokens of context to time decoding at. 0 times none."
    ] = 8192
    measure: Annotated[
        str, f"What else is measured, with spaces between: {' '.join(experiments.MEASURES)}."
    ] = ""
    cache_budget: Annotated[
        Positive, "The size of all caches together with measure=decoding, in MB."
    ] = 256.0

    def __post_init__(self) -> None:
        check(self)
        self.lr_factors = _several(self.lr_factors)
        if min(_several(self.seeds)) < isinstance(self.seeds, int):
            raise ValueError(f"seeds={self.seeds!r} does not work: at least 1, or seeds from 0 on")
        timed = {"costs", "decoding"} & {*self.measure.split()}
        if self.decode_context < 16 and (self.decode_context or timed):
            works = "at least 16" + ", or 0" * (not timed)
            raise ValueError(f"decode_context={self.decode_context} does not work: {works}")
        unknown = [name for name in self.measure.split() if name not in experiments.MEASURES]
        if unknown:
            works = " ".join(experiments.MEASURES)
            raise ValueError(f"measure={unknown[0]!r} does not work: any of {works}")

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds at the best rate; the first one is that of the search for it."""
        first = self.train.seed
        return self.seeds if isinstance(self.seeds, tuple) else (*range(first, first + self.seeds),)


def _several(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--run"]:
        return run_job(Path(argv[1]))
    files = [a for a in argv if not a.startswith("-")]
    flags = [a for a in argv if a.startswith("-")]
    folders = [a for a in files if not a.endswith(".py")]
    if folders:
        if len(folders) < len(files):
            raise UsageError("give config files or the folders of finished runs, not both")
        cfg, origins = configure(CompareConfig, flags, train.HINTS)
        if "out_dir" not in origins:
            cfg.out_dir += "-finished"
        return report_finished(cfg, [Path(name) for name in folders])
    titled = [f for f in files if run_config_file(f).get("title")]
    parts = [[f for f in files if f == name or f not in titled] for name in titled or [None]]
    configs = [configure(CompareConfig, [*own, *flags], train.HINTS) for own in parts]
    if len({_slug(cfg.title or "") for cfg, _ in configs}) < len(configs):
        raise UsageError("several config files have the same title")
    failed = []
    for cfg, origins in configs:
        if len(configs) > 1:
            print0("", f"=== {cfg.title}")
        failed += compare(cfg, origins)
    if failed:
        raise UserError(failed[0])


# ---- what to train
@dataclass(frozen=True)
class Job:
    """One run."""

    variant: str
    equal: str  # "tokens" or "parameters": what it has in common with the first variant's
    lr_factor: float
    seed: int
    flags: tuple[str, ...]  # train.py's, all but out_dir
    change: str | None  # to the model, by tools/experiments.py
    eval_tokens: int
    folder: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """What its process measured; None until it has ended."""
        found = read_json(self.folder / "result.json")
        return found if found.get("eval_tokens") == self.eval_tokens else None

    def __str__(self) -> str:
        equal = ", equal parameters" * (self.equal == "parameters")
        return f"{self.variant}{equal}, rate x {self.lr_factor:g}, seed {self.seed}"


def read_variants(text: str, base: GPTConfig) -> dict[str, dict[str, Any]]:
    """
    The settings of every variant by name. Raises UsageError for a name or text without meaning.

    "MHA; mla32: use_mla=True mla_latent_dim=32": a name that is known, and one with its settings.
    """
    known = {_plain(name): name for name in known_variants(base)}
    variants: dict[str, dict[str, Any]] = {}
    for part in re.split(r"[;\n]|,(?![^(]*\))", text):
        name, colon, settings = (s.strip() for s in part.partition(":"))
        if not name:
            continue
        if colon:
            pairs = [pair.removeprefix("--").partition("=") for pair in settings.split()]
            if not all(value for _, _, value in pairs):
                raise UsageError(f"--variants: {name}: write key=value key=value, not {settings!r}")
            value = {key.replace("-", "_"): value for key, _, value in pairs}
            if own := sorted({*value} & {"seed", "out_dir", *NOT_HERE}):
                raise UsageError(f"--variants: {name}: {own[0]} cannot differ between variants")
            if _plain(name) in known:
                value = known_variants(base)[known[_plain(name)]] | value
            if value.get("change", "") not in ("", *experiments.CHANGES):
                works = ", ".join(experiments.CHANGES)
                raise UsageError(f"--variants: {name}: change is one of {works}")
        elif _plain(name) in known:
            name = known[_plain(name)]
            value = known_variants(base)[name]
        else:
            names = ", ".join(known.values())
            raise UsageError(f'--variants: unknown {name!r}; write "{name}: key=value", or {names}')
        if name in variants:
            raise UsageError(f"--variants: {name} is there twice")
        variants[name] = value
    if not variants:
        raise UsageError("--variants is empty")
    return variants


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


class Jobs:
    """Makes the runs of a comparison from the settings that were given."""

    def __init__(self, cfg: CompareConfig, origins: dict[str, str]) -> None:
        values, own = flat(cfg.train), {f.name for f in dataclasses.fields(cfg)}
        self.cfg, self.recipe = cfg, {k: values[k] for k in origins if k not in own}
        for name, usual in NOT_HERE.items():
            if self.recipe.pop(name, usual) != usual:
                raise UsageError(f"{name} does not work here: all runs start from scratch")
        self.folder = Path(cfg.out_dir) / "runs"
        self.variants = read_variants(cfg.variants, cfg.train.model)
        data = Dataset(cfg.train.dataset, cfg.train.model.block_size)
        self.vocab_size = cfg.train.vocab_size or padded_vocab(data)
        self.trains = {name: self.train_config(name) for name in self.variants}
        self.configs = {
            name: dataclasses.replace(own.model, vocab_size=self.vocab_size)
            for name, own in self.trains.items()
        }
        self.parameters = {name: self.parameters_of(name) for name in self.variants}

    def settings(self, variant: str) -> dict[str, Any]:
        """train.py's settings of a variant."""
        values = self.recipe | self.variants[variant]
        return {k: v for k, v in values.items() if k != "change"}

    def change(self, variant: str) -> str | None:
        """The change to its model (tools/experiments.py), if there is one."""
        return self.variants[variant].get("change")

    def parameters_of(self, variant: str, **changes: Any) -> int:
        """How many its model has, with changes to its config."""
        config = dataclasses.replace(self.configs[variant], **changes)
        with torch.device("meta"), experiments.changed(self.change(variant)):
            return GPT(config).get_num_params()

    def train_config(self, variant: str) -> TrainConfig:
        """Its whole settings. Raises UsageError for some that do not work or do nothing."""
        try:
            cfg, _ = configure(TrainConfig, as_flags(self.settings(variant)))
        except UsageError as error:
            raise UsageError(f"variant {variant}: {error}") from None
        idle = {*without_effect(cfg.model)} & {*self.variants[variant]}
        if idle and self.variants[variant] not in known_variants(self.cfg.train.model).values():
            raise UsageError(f"variant {variant}: {min(idle)} has no effect in this model")
        return cfg

    def make(self, variant: str, equal: str, lr_factor: float, seed: int) -> Job:
        """One run; with equal parameters its MLP's width makes it as large as the first variant."""
        settings = self.settings(variant) | {"seed": seed}
        for name in RATES:
            if (highest := getattr(self.trains[variant], name)) is not None:
                settings[name] = highest * lr_factor
        width = self.equal_width(variant)
        if equal == "parameters" and width != self.configs[variant].hidden:
            settings["mlp_hidden"] = width
        flags, change = tuple(sorted(as_flags(settings))), self.change(variant)
        key = hashlib.sha256(json.dumps([flags, change]).encode()).hexdigest()[:8]
        folder = self.folder / f"{_slug(variant)}-x{lr_factor:g}-{seed}-{key}"
        eval_tokens = self.cfg.eval_tokens
        return Job(variant, equal, lr_factor, seed, flags, change, eval_tokens, folder)

    def equal_width(self, variant: str) -> int:
        """The MLP's width with which a variant has the parameters of the first."""
        config, first = self.configs[variant], next(iter(self.variants))
        wider = self.parameters_of(variant, mlp_hidden=config.hidden + 1)
        per_unit = wider - self.parameters[variant]
        missing = self.parameters[first] - self.parameters[variant]
        return max(config.hidden + round(missing / per_unit), 1)


def as_flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "variant"


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; {} if it is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# ---- one run, in a process of its own
def run_job(folder: Path) -> None:
    """Train and measure what job.json in this folder says."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    resume = ["--init_from=resume"] if (folder / checkpoint.LATEST).exists() else []
    with experiments.changed(job["change"]):
        train.main([*job["flags"], f"--out_dir={folder}", *resume])
        result = measure(folder, job["eval_tokens"])
    wanted = configure(TrainConfig, job["flags"])[0].max_iters
    if result["iterations"] < wanted:
        raise UserError(f"the last checkpoint, of iteration {wanted}, could not be written")
    tmp = folder / ".result.json.tmp"
    tmp.write_text(json.dumps(result), encoding="utf-8")
    os.replace(tmp, folder / "result.json")


def _end_with_parent() -> None:
    """Stop this run, as a signal would, when the process that started it is gone."""
    os.read(0, 1)  # returns at the end of stdin, which is a pipe from that process
    os.kill(os.getpid(), signal.SIGTERM)


@torch.no_grad()
def measure(folder: Path, eval_tokens: int) -> dict[str, Any]:
    """
    What a finished run shows: its final loss over the validation split, costs and learning curve.

    Raises UserError for a folder without a run, or whose dataset is not there.
    """
    ckpt = checkpoint.load(folder / checkpoint.LATEST)
    model, _ = checkpoint.build(ckpt)
    config, settings = model.config, ckpt.config
    data = Dataset(settings["dataset"], config.block_size)
    device = resolve_device(settings.get("device", "auto"))
    kind = device.partition(":")[0]
    dtype = resolve_dtype(settings.get("dtype", "auto"), kind, config.n_embd)
    model.to(device).eval()
    losses = []
    batches = data.spread("val", eval_tokens, max(1, min(64, 16384 // config.block_size)))
    for x, y in batches:
        with torch.autocast(kind, getattr(torch, dtype), enabled=dtype != "float32"):
            losses.append(model(x.to(device), y.to(device))[1].item())
    entries = runlog.read_log(folder / "log.jsonl")
    curve, before, last = [], 0.0, 0.0
    for e in (e for e in entries if "val_loss" in e and "seconds" in e):
        before += last if e["seconds"] < last else 0.0  # a resumed run's clock starts anew
        last = e["seconds"]
        curve.append((e["iter"], before + last, e["val_loss"]))
    per_iter = settings.get("batch_size", 1) * settings.get("gradient_accumulation_steps", 1)
    tokens = per_iter * config.block_size
    ms = [e["ms"] for e in entries if "ms" in e]
    return {
        "eval_tokens": eval_tokens,
        "val_loss": sum(losses) / len(losses),
        "iterations": ckpt.iter_num,
        "tokens": tokens * ckpt.iter_num,
        "parameters": model.get_num_params(),
        "attention_parameters": sum(
            p.numel() for b in model.transformer.h for p in b.attn.parameters()
        ),
        "cached_numbers": costs.cached_numbers(model),
        "cache_bytes": cache_bytes(model),
        "training_flops": 3 * costs.flops_per_token(model, config.block_size) * tokens,
        "ms": statistics.median(ms) if ms else None,
        "curve": curve,
        "dataset": settings["dataset"],
        "model": dataclasses.asdict(config),
    }


def cache_bytes(model: GPT) -> float:
    """Bytes per token of a full context, in all layers; a constant state is shared out over it."""
    T = model.config.block_size
    return model.make_cache(1, T).nbytes_at(T) / T


# ---- all runs
def compare(cfg: CompareConfig, origins: dict[str, str]) -> list[str]:
    """Train what is not trained yet, and report; returns an error if no run has succeeded."""
    if cfg.title:
        cfg.out_dir = str(Path(cfg.out_dir) / _slug(cfg.title))
    jobs, rows = Jobs(cfg, origins), []
    make_folder(jobs.folder)
    if cfg.train.max_iters:  # else only what cfg.measure names
        with locked(jobs.folder, "training in it"):
            rows = train_all(cfg, jobs)
        if all("error" in row for row in rows):
            return [f"every run failed; the first: {rows[0]['error']}"]
    plain = {name: config for name, config in jobs.configs.items() if not jobs.change(name)}
    size = Pool(cfg).size
    beside = f"; {size} runs side by side" if rows and size > 1 else ""
    write_report(cfg, rows, plain, beside)
    return []


def train_all(cfg: CompareConfig, jobs: Jobs) -> list[dict[str, Any]]:
    """The lines of results.jsonl: every rate with one seed, then the best with all seeds."""
    pool, first, seeds = Pool(cfg), cfg.all_seeds[0], cfg.all_seeds
    search = [jobs.make(v, "tokens", f, first) for v in jobs.variants for f in cfg.lr_factors]
    later = (len(seeds) - 1 + len(seeds) * cfg.equal_parameters) * len(jobs.variants)
    pool.run(search, later)
    best = {v: _best(job for job in search if job.variant == v) for v in jobs.variants}
    repeats = [
        jobs.make(name, equal, job.lr_factor, seed)
        for equal in ("tokens", "parameters")[: 1 + cfg.equal_parameters]
        for name, job in best.items()
        if job
        for seed in seeds
    ]
    pool.run(repeats)
    return [as_row(job, best, pool.errors) for job in dict.fromkeys([*search, *repeats])]


def make_folder(folder: Path) -> None:
    """Create it, and those above it. Raises UserError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})") from None


def _best(jobs: Iterable[Job]) -> Job | None:
    done = [job for job in jobs if job.result]
    return min(done, key=lambda job: job.result["val_loss"], default=None)


def as_row(job: Job, best: dict[str, Job | None], errors: dict[Path, str]) -> dict[str, Any]:
    """A line of results.jsonl."""
    chosen = best.get(job.variant)
    row = {"variant": job.variant, "equal": job.equal, "lr_factor": job.lr_factor}
    row |= {"seed": job.seed, "best_rate": bool(chosen) and job.lr_factor == chosen.lr_factor}
    row |= {"folder": str(job.folder), "flags": list(job.flags), "change": job.change}
    return row | (job.result or {"error": errors.get(job.folder, "unknown")})


class Pool:
    """Runs jobs side by side, each in a process, and prints a line as each of them ends."""

    def __init__(self, cfg: CompareConfig) -> None:
        self.cfg, self.errors, self.seconds = cfg, {}, []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cpu = resolve_device(cfg.train.device) == "cpu"
        self.size = cfg.jobs or (min(cores, 4) if cpu else 1)
        threads = str(max(cores // self.size, 1))
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.environ = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}

    def run(self, jobs: list[Job], later: int = 0) -> None:
        """Run all that have no result yet. later: how many more there will be, for the estimate."""
        jobs = list({job.folder: job for job in jobs}.values())  # some are the same run
        waiting = [job for job in jobs if job.result is None]
        if len(waiting) < len(jobs):
            print0(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done already")
        running: dict[Job, tuple[subprocess.Popen, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.size:
                    job = waiting.pop(0)
                    running[job] = self.start(job), time.perf_counter()
                time.sleep(0.05)
                for job, (process, began) in list(running.items()):
                    if process.poll() is not None:
                        del running[job]
                        self.ended(job, process.returncode, time.perf_counter() - began)
                        self.print_progress(job, len(waiting) + len(running) + later)
        finally:
            for process, _ in running.values():
                process.terminate()  # train.py saves its checkpoint, which takes a moment
            for process, _ in running.values():
                process.wait()
            if running:
                print0("stopped; the same command goes on from here")

    def start(self, job: Job) -> subprocess.Popen:
        content = {"flags": job.flags, "change": job.change}
        content |= {"eval_tokens": self.cfg.eval_tokens}
        make_folder(job.folder)
        (job.folder / "job.json").write_text(json.dumps(content), encoding="utf-8")
        command = [sys.executable, "-m", "tools.compare", "--run", str(job.folder)]
        with open(job.folder / "output.txt", "wb") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environ,
                start_new_session=True,  # Ctrl-C reaches this process, which ends the others
            )

    def ended(self, job: Job, status: int, seconds: float) -> None:
        self.seconds.append(seconds)
        if status or job.result is None:
            text = (job.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
            last = (text.strip().splitlines() or [f"exit status {status}"])[-1]
            self.errors[job.folder] = re.sub("^[a-z_.]+: error: ", "", last)

    def print_progress(self, job: Job, left: int) -> None:
        result = job.result
        what = f"loss {result['val_loss']:.4f}" if result else f"failed: {self.errors[job.folder]}"
        eta = statistics.median(self.seconds) * left / self.size
        rest = f"{left} left, about {runlog.clock(eta)}" if left else "the last of these"
        print0(f"{job}: {what} ({self.seconds[-1]:.0f} s; {rest})")


# ---- the report
def write_report(
    cfg: CompareConfig, rows: list[dict[str, Any]], configs: dict[str, GPTConfig], beside: str = ""
) -> None:
    """Measure what does not need training, write the report with its pictures, and print it."""
    folder, device = Path(cfg.out_dir), resolve_device(cfg.train.device)
    rates, extra = {}, []
    shapes = {r["variant"]: (r["model"], r.get("change")) for r in rows if "model" in r}
    if cfg.decode_context and shapes:
        rates = experiments.decode_rates(shapes, cfg.decode_context, device)
    for name in cfg.measure.split():
        extra += experiments.MEASURES[name](cfg, device, configs, rows)
    where = f"{machine(device)}, torch {torch.__version__}{beside}"
    text = report_text(cfg, rows, rates, where, extra)
    print0("", *text.splitlines(), "")
    make_folder(folder)
    try:
        if rows:
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / "results.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "report.md").write_text(text + "\n", encoding="utf-8")
        draw(rows, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})") from None
    print0(f"in {folder}")


def report_finished(cfg: CompareConfig, folders: list[Path]) -> None:
    """The report of runs that train.py made."""
    rows, configs = [], {}
    for folder in folders:
        change = read_json(folder / "job.json").get("change")  # of a run of a comparison
        with experiments.changed(change):
            result = measure(folder, cfg.eval_tokens)
        row = {"variant": str(folder), "equal": "tokens", "lr_factor": 1.0, "seed": 0}
        row |= {"best_rate": True, "folder": str(folder), "flags": [], "change": change}
        rows.append(row | result)
        if not change:
            configs[str(folder)] = GPTConfig(**result["model"])
    write_report(cfg, rows, configs)


if __name__ == "__main__":
    run_script(main)
