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
config/claims_*.py regenerates figures of docs/claims.md.
"""

import dataclasses
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

import train
from model import GPT, GPTConfig
from nanomla import costs
from nanomla.checks import Count, Natural, Positive, Several, Text, check, fits, in_words, require
from nanomla.dataset import Dataset, locked
from nanomla.distributed import print0, resolve_device, warn0
from nanomla.errors import UsageError, UserError, run_script
from nanomla.files import json_text, write_text
from nanomla.settings import configure, flat, run_config_file
from nanomla.start import padded_vocab, without_effect
from tools.bench.timing import Rows, machine
from tools.report import draw, report_text
from tools.runs import Job, Pool, decode_rates, measure, run_job
from train import TrainConfig

NOT_HERE = {"init_from": "scratch", "eval_only": False}
RATES = ("learning_rate", "muon_learning_rate", "min_lr")  # what lr_factors multiply
ORDINARY = {"use_mla": False, "use_svd": False, "use_latent_tokens": False, "n_kv_head": None}
EXPERIMENTS = ", which is gone: experiments/ has a script for each, as docs/claims.md says"
HINTS = train.HINTS | dict.fromkeys(("measure", "cache_budget", "change"), EXPERIMENTS)

Settings = dict[str, Any]


def named_variants(base: GPTConfig) -> dict[str, Settings]:
    """The variants that have a name, with settings for this width; MLA's caches are 8x smaller."""
    nh = base.n_head
    hs = base.hs
    few_heads = next(n for n in range(max(nh // 2, 1), 0, -1) if nh % n == 0)
    eighth = max(base.n_embd // 8 * 2, 4)
    r = max(min(base.n_embd // 8, hs // 2) // 2 * 2, 2)
    latent = ORDINARY | {"use_mla": True, "pos_emb": "rope"}
    decoupled = latent | {"mla_rope": "decoupled", "mla_latent_dim": eighth - r, "mla_rope_dim": r}
    rotary = latent | {"mla_rope": "latent", "mla_latent_dim": eighth, "mla_rope_dim": None}
    slots = {"use_latent_tokens": True, "n_latent_tokens": 16, "pos_emb": "learned"}
    return {
        "MHA": ORDINARY,
        "GQA": ORDINARY | {"n_kv_head": few_heads},
        "MQA": ORDINARY | {"n_kv_head": 1},
        "MLA decoupled": decoupled,
        "MLA rotary latent": rotary,
        "MLA+SVD": decoupled | {"use_svd": True, "svd_rank": max(hs // 2, 1)},
        "latent tokens": ORDINARY | slots,
        "MLA split": decoupled | {"mla_split": True, "mla_latent_dim": (eighth - r) // 2},
        "MLA gated": decoupled | {"attn_gate": True},
        "MLA normed": decoupled | {"qk_norm": True},
        "MLA shared by 2": decoupled | {"mla_share_cache": 2, "mla_latent_dim": 2 * eighth - r},
    }


@dataclass
class CompareConfig:
    """What to compare, and the recipe."""

    headings: ClassVar[dict[str, str]] = {"title": "comparison"}

    train: TrainConfig = field(default_factory=TrainConfig)
    title: Annotated[
        Text | None, "The title of the report, and the name of its folder below out_dir."
    ] = None
    variants: Annotated[
        str,
        'The variants to compare: names, or "NAME: key=value key=value", with commas, semicolons '
        "or lines between them.",
    ] = "MHA, GQA, MQA, MLA decoupled, MLA rotary latent, MLA+SVD, latent tokens"
    lr_factors: Annotated[
        Positive | Several[Positive],
        "The factors of the recipe's learning rates. Each is tried with one seed.",
    ] = (0.6, 1.0, 1.6)
    seeds: Annotated[
        Count | Several[Natural],
        "The seeds at each variant's best rate: how many, or which ones, as in 5,6 for two and 5, "
        "for one.",
    ] = 3
    equal_parameters: Annotated[
        bool,
        "Each variant is also trained with as many parameters as the first, by the width of its "
        "MLP.",
    ] = True
    out_dir: Annotated[Text, "The folder of the report and of the runs."] = "out-compare"
    jobs: Annotated[
        Count | None,
        "The number of runs side by side. None stands for the number of a CPU's cores, at most 4.",
    ] = None
    eval_tokens: Annotated[Count, "About how many validation tokens the final loss is of."] = 2**17
    decode_context: Annotated[
        Natural, "The number of tokens of context to time decoding at. 0 times none."
    ] = 8192

    def __post_init__(self) -> None:
        check(self)
        enough = self.decode_context == 0 or self.decode_context >= 16
        require(enough, "decode_context", self.decode_context, "at least 16, or 0")
        if not isinstance(self.lr_factors, tuple):
            self.lr_factors = (self.lr_factors,)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds at the best rate; the first one is that of the search for it."""
        if isinstance(self.seeds, tuple):
            return self.seeds
        return tuple(range(self.train.seed, self.train.seed + self.seeds))


def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    if argv is None:
        argv = sys.argv[1:]
    if argv[:1] == ["--run"]:  # by Pool, of tools/runs.py
        run_job(Path(argv[1]))
        return
    flags = [argument for argument in argv if argument.startswith("-")]
    names = [argument for argument in argv if not argument.startswith("-")]
    for name in names:
        if not fits(name, Text):
            raise UsageError(f"{name!r}: an argument must be {in_words(Text)}")
    files = [name for name in names if name.endswith(".py")]
    if len(files) == len(names):
        compare_each(files, flags)
    elif files:
        raise UsageError("give config files or the folders of finished runs, not both")
    else:
        cfg, origins = configure(CompareConfig, flags, HINTS)
        if "out_dir" not in origins:
            cfg.out_dir += "-finished"
        report_finished(cfg, [Path(name) for name in names])


def compare_each(files: list[str], flags: list[str]) -> None:
    """A comparison for every config file with a title, which the files without one add to."""
    for name in files:
        if Path(name).is_fifo():
            raise UsageError(f"{name}: a config file is read twice here, so it can be no pipe")
    titles = {name: run_config_file(name).get("title") for name in files}
    titled = [name for name in files if titles[name]]
    folders = [slug(titles[name]) for name in titled]
    for name in titled:
        if folders.count(slug(titles[name])) > 1:
            raise UsageError(f"{name}: another file has the title {titles[name]!r}, too; change it")
    if len(titled) < 2:
        compare(*configure(CompareConfig, [*files, *flags], HINTS))
        return
    for title in titled:
        its_files = [name for name in files if name == title or name not in titled]
        cfg, origins = configure(CompareConfig, [*its_files, *flags], HINTS)
        print0("", f"=== {cfg.title}")
        compare(cfg, origins)


# ---- What to train
def read_variants(text: str, base: GPTConfig) -> dict[str, Settings]:
    """
    The settings of every variant by name. Raises UsageError for a name or text without meaning.

    "MHA; mla32: use_mla=True mla_latent_dim=32": a name that is known, and one with its settings.
    """
    named = named_variants(base)
    spellings = {plain(name): name for name in named}
    variants: dict[str, Settings] = {}
    for part in re.split(r"[;\n]|,(?![^(]*\))", text):  # at no comma in brackets
        name, colon, pairs = (piece.strip() for piece in part.partition(":"))
        if not name:
            continue
        full_name = spellings.get(plain(name))
        settings = named.get(full_name, {})
        if colon:
            settings = settings | read_pairs(name, pairs)
        elif full_name:
            name = full_name
        else:
            names = ", ".join(named)
            raise UsageError(f'--variants: unknown {name!r}; write "{name}: key=value", or {names}')
        if name in variants:
            raise UsageError(f"--variants: {name} is there twice")
        variants[name] = settings
    if not variants:
        raise UsageError("--variants is empty")
    return variants


def read_pairs(name: str, text: str) -> Settings:
    """The settings in "key=value key=value", their values as text."""
    settings = {}
    for pair in text.split():
        key, _, value = pair.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not value:
            raise UsageError(f"--variants: {name}: write key=value key=value, not {text!r}")
        if key in ("seed", "out_dir", *NOT_HERE):
            raise UsageError(f"--variants: {name}: {key} cannot differ between variants")
        settings[key] = value
    return settings


def plain(name: str) -> str:
    """A name in small letters and digits alone."""
    return re.sub("[^a-z0-9]", "", name.lower())


def slug(name: str) -> str:
    """A name as a part of a folder's."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "variant"


class Jobs:
    """Makes the runs of a comparison from the settings that were given."""

    def __init__(self, cfg: CompareConfig, origins: dict[str, str]) -> None:
        self.cfg = cfg
        values = flat(cfg.train)
        of_compare = {f.name for f in dataclasses.fields(cfg)}
        self.recipe = {name: values[name] for name in origins if name not in of_compare}
        for name, usual in NOT_HERE.items():
            if self.recipe.pop(name, usual) != usual:
                raise UsageError(f"{name} does not work here: all runs start from scratch")
        self.folder = Path(cfg.out_dir) / "runs"
        self.variants = read_variants(cfg.variants, cfg.train.model)
        self.first = next(iter(self.variants))  # what the others are compared with
        data = Dataset(cfg.train.dataset, cfg.train.model.block_size)
        vocab_size = cfg.train.vocab_size or padded_vocab(data)
        self.trains = {name: self._train_config(name) for name in self.variants}
        self.configs = {}
        for name, its_train in self.trains.items():
            self.configs[name] = dataclasses.replace(its_train.model, vocab_size=vocab_size)
        self.parameters = {name: parameters(config) for name, config in self.configs.items()}

    def _train_config(self, variant: str) -> TrainConfig:
        """Its whole settings. Raises UsageError for some that do not work or do nothing."""
        settings = self.variants[variant]
        try:
            cfg, _ = configure(TrainConfig, as_flags(self.recipe | settings), HINTS)
        except UsageError as error:
            raise UsageError(f"variant {variant}: {error}") from None
        idle = set(without_effect(cfg.model)) & set(settings)
        if idle and settings not in named_variants(self.cfg.train.model).values():
            raise UsageError(f"variant {variant}: {min(idle)} has no effect in this model")
        return cfg

    def make(self, variant: str, equal: str, lr_factor: float, seed: int) -> Job:
        """One run; with equal parameters its MLP's width makes it as large as the first variant."""
        settings = self.recipe | self.variants[variant] | {"seed": seed}
        for name in RATES:
            rate = getattr(self.trains[variant], name)
            if rate is not None:
                settings[name] = rate * lr_factor
        if equal == "parameters":
            width = self._equal_width(variant)
            if width != self.configs[variant].hidden:
                settings["mlp_hidden"] = width
        flags = tuple(sorted(as_flags(settings)))
        # earlier versions had a change to the model beside the flags, None for most
        key = hashlib.sha256(json.dumps([flags, None]).encode()).hexdigest()[:8]
        folder = self.folder / f"{slug(variant)}-x{lr_factor:g}-{seed}-{key}"
        return Job(variant, equal, lr_factor, seed, flags, self.cfg.eval_tokens, folder)

    def _equal_width(self, variant: str) -> int:
        """The MLP's width with which a variant has the parameters of the first."""
        config = self.configs[variant]
        wider = dataclasses.replace(config, mlp_hidden=2 * config.hidden)
        per_unit = (parameters(wider) - self.parameters[variant]) / config.hidden
        if per_unit == 0:  # every layer has experts, whose width is given
            raise UsageError(f"variant {variant}: mlp_hidden changes no parameter of this model")
        missing = self.parameters[self.first] - self.parameters[variant]
        return max(config.hidden + round(missing / per_unit), 1)


def parameters(config: GPTConfig) -> int:
    """Those of a model, without learned positions."""
    return costs.on_meta(config).get_num_params()


def as_flags(settings: Settings) -> list[str]:
    """Settings as arguments of train.py."""
    return [f"--{key}={value}" for key, value in settings.items()]


# ---- All runs
def compare(cfg: CompareConfig, origins: dict[str, str]) -> None:
    """Train what is not trained yet, and report. Raises UserError if every run fails."""
    if cfg.title:
        cfg.out_dir = str(Path(cfg.out_dir) / slug(cfg.title))
    jobs = Jobs(cfg, origins)
    jobs.folder.mkdir(parents=True, exist_ok=True)
    pool = Pool(cfg.jobs, cfg.train.device)
    with locked(jobs.folder, "training in it"):
        rows = train_all(cfg, jobs, pool)
    require_one(rows)
    beside = ""
    if pool.size > 1:
        beside = f"; {pool.size} runs side by side"
    write_report(cfg, rows, beside)


def train_all(cfg: CompareConfig, jobs: Jobs, pool: Pool) -> Rows:
    """The lines of results.jsonl: every rate with one seed, then the best with all seeds."""
    seeds = cfg.all_seeds
    kinds = ["tokens"]
    if cfg.equal_parameters:
        kinds.append("parameters")
    search = []
    for variant in jobs.variants:
        for lr_factor in cfg.lr_factors:
            search.append(jobs.make(variant, "tokens", lr_factor, seeds[0]))
    pool.run(search)

    best: dict[str, float] = {}  # the rate of every variant that has one
    for variant in jobs.variants:
        done = [job for job in search if job.variant == variant and job.result]
        if done:
            best[variant] = min(done, key=lambda job: job.result["val_loss"]).lr_factor
    repeats = []
    for equal in kinds:
        for variant, lr_factor in best.items():
            repeats += [jobs.make(variant, equal, lr_factor, seed) for seed in seeds]
    pool.run(repeats)

    rows = []
    for job in dict.fromkeys([*search, *repeats]):
        outcome = job.result or {"error": pool.errors.get(job.folder, "unknown")}
        is_best = job.lr_factor == best.get(job.variant)
        row = {"variant": job.variant, "equal": job.equal, "lr_factor": job.lr_factor}
        row |= {"seed": job.seed, "best_rate": is_best, "folder": str(job.folder)}
        rows.append(row | {"flags": list(job.flags)} | outcome)
    return rows


# ---- The report
def report_finished(cfg: CompareConfig, folders: list[Path]) -> None:
    """The report of runs that train.py made. Raises UserError if none of them can be measured."""
    rows = []
    for folder in folders:
        row = {"variant": str(folder), "equal": "tokens", "lr_factor": 1.0, "seed": 0}
        row |= {"best_rate": True, "folder": str(folder), "flags": []}
        try:
            rows.append(row | measure(folder, cfg.eval_tokens))
        except UserError as error:
            warn0(str(error))
            rows.append(row | {"error": str(error)})
    require_one(rows)
    write_report(cfg, rows)


def require_one(rows: Rows) -> None:
    """Raise UserError if all runs have failed."""
    if all("error" in row for row in rows):
        raise UserError(f"every run failed; the first: {rows[0]['error']}")


def write_report(cfg: CompareConfig, rows: Rows, beside: str = "") -> None:
    """Time decoding, write the report with its pictures, and print it."""
    device = resolve_device(cfg.train.device)
    rates = {}
    if cfg.decode_context:
        models = random_models(rows, cfg.decode_context, device)
        rates = decode_rates(models, cfg.decode_context, device)
    where = f"{machine(device)}, torch {torch.__version__}{beside}"
    text = report_text(cfg.title, rows, rates, cfg.decode_context, where)
    print0("", *text.splitlines(), "")
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json_text(row) + "\n" for row in rows]
    write_text(folder / "results.jsonl", "".join(lines))
    write_text(folder / "report.md", text + "\n")
    draw(rows, folder)
    print0(f"in {folder}")


def random_models(rows: Rows, context: int, device: str) -> dict[str, GPT]:
    """
    Models of the variants' shapes for a context, which may be longer than the trained one. The time
    of decoding does not depend on their weights.
    """
    models = {}
    for row in rows:
        if "model" in row and row["variant"] not in models:
            config = dataclasses.replace(GPTConfig(**row["model"]), block_size=context)
            models[row["variant"]] = GPT(config).to(device).eval()
    return models


if __name__ == "__main__":
    run_script(main)
