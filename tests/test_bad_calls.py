"""
Calls that cannot work, one of each kind: one line on stderr, the right exit status, and nothing is
written.
Run: python -m pytest tests/test_bad_calls.py
"""

import shutil
import time

import pytest

from tests.conftest import QUICK, fails_with_one_line, run

HUGE, NUL = "9" * 400, "a\0b"
NOT_WHOLE = ("x", "1.5", "nan", "inf", "True", "[1]", "1e400", "-1", "")  # for a whole number
NOT_REAL = ("x", "nan", "inf", "-1", "None", "1e400", "True")  # for a finite number from 0

# Each script's settings with values that they cannot have; the name must stand in the line.
VALUES = {
    "train.py": {
        "seed": (*NOT_WHOLE, HUGE),
        "max_iters": ("-1",),
        "n_layer": ("0",),
        "n_head": ("0", "5", "1000000000000"),
        "vocab_size": ("0", "x"),
        "learning_rate": NOT_REAL,
        "min_lr": ("-1", "nan"),
        "dropout": ("1", "-0.1", "nan"),
        "wsd_decay": ("0", "2"),
        "optimizer": ("sgd", "", "None", "0"),
        "dtype": ("int8", "64"),
        "compile": ("1", "yes", "None"),
        "svd_rank": ("0", "x"),
        "mla_latent_dim": ("0", "x", "()", "1,x"),
    },
    "sample.py": {
        "temperature": ("-1", "nan"),
        "top_k": ("-1", "1.5"),
        "top_p": ("0", "1.1"),
        "num_samples": ("0", "1000000000"),
        "seed": ("-1", HUGE, str(2**63)),
        "cache_dtype": ("int4", "None"),
        "use_cache": ("maybe",),
    },
    "tools.bench": {"rounds": ("0", "x")},
    "tools.export": {"format": ("onnx",)},
    "tools.convert": {"cache": ("0x", "x"), "heal_iters": ("-1",)},
}
FRONT = {
    "tools.bench": ["svd"],
    "tools.convert": ["--to={tmp}/new", "--init_from={tmp}/run", "--data={data}"],
}

# (script, arguments, exit status, words of the line)
CALLS = [
    ("train.py", ["--lr=1"], 2, "did you mean learning_rate"),
    ("train.py", ["--lr", "1"], 2, "did you mean learning_rate"),
    ("train.py", ["--steps=9"], 2, "did you mean max_iters"),
    ("train.py", ["--ctx=9"], 2, "did you mean block_size"),
    ("train.py", ["--n_layers=9"], 2, "did you mean n_layer"),
    ("train.py", ["--always_save_checkpoint=True"], 2, "leave it out"),
    ("sample.py", ["--prompt=x"], 2, "did you mean start"),
    ("sample.py", ["--tokens=9"], 2, "did you mean max_new_tokens"),
    ("sample.py", ["--temp=1"], 2, "did you mean temperature"),
    ("train.py", ["--learning_rate"], 2, "needs a value"),
    ("train.py", ["--learning_rate", "--n_layer=2"], 2, "needs a value"),
    ("train.py", ["-n_layer=2"], 2, "--key=value"),
    ("train.py", ["--"], 2, "--key=value"),
    ("train.py", ["no_such.py"], 2, "no_such.py: cannot read"),
    ("train.py", ["{tmp}"], 2, "Is a directory"),
    ("train.py", [NUL], 2, r"a\x00b"),
    ("train.py", ["x" * 5000], 2, "File name too long"),
    ("train.py", ["{tmp}/broken.py"], 2, "broken.py:1: not a Python config file"),
    ("train.py", ["{tmp}/raises.py"], 2, "raises.py: fails as Python (ZeroDivisionError"),
    ("train.py", ["{tmp}/exits.py"], 2, "exits.py: fails as Python (SystemExit"),
    ("train.py", ["{tmp}/unknown.py"], 2, "unknown setting n_leyer"),
    ("train.py", ["--dataset=nowhere"], 1, "nowhere is not prepared"),
    ("train.py", ["--dataset={tmp}"], 1, "is not prepared"),
    ("train.py", ["--out_dir={tmp}/file/o"], 1, "cannot be written (Not a directory)"),
    ("train.py", ["--out_dir={tmp}/" + "x" * 300], 1, "File name too long"),
    ("train.py", ["--init_from=resume"], 1, "no checkpoint in"),
    ("train.py", ["--init_from={tmp}/nothing"], 1, "no such file or folder"),
    ("train.py", ["--init_from={tmp}/file"], 1, "or not a checkpoint"),
    ("train.py", ["--init_from={tmp}/run", "--use_mla=True"], 1, "tools.convert"),
    ("train.py", ["--distill={tmp}/nothing"], 1, "no such file or folder"),
    ("train.py", ["--device=tpu"], 2, "not on this machine"),
    ("train.py", ["--device=cuda:99"], 2, "not on this machine"),
    ("train.py", ["--block_size=100000"], 1, "too few for block_size"),
    ("train.py", ["--n_layer=100000", "--n_embd=2048"], 1, "are free"),
    ("train.py", ["--n_embd=1000000", "--n_head=4"], 1, "are free"),
    ("train.py", ["--batch_size=1000000000"], 1, "are free"),
    ("train.py", ["--use_mla=True", "--mla_latent_dim=99"], 2, "mla_latent_dim"),
    ("train.py", ["--use_mla", "--mla_rope_dim=2"], 2, "pos_emb"),
    ("train.py", ["--use_latent_tokens=True"], 2, "n_latent_tokens"),
    ("sample.py", ["--out_dir={tmp}/nothing"], 1, "no checkpoint in"),
    ("sample.py", ["--ckpt={tmp}/nothing"], 1, "no checkpoint at"),
    ("sample.py", ["--ckpt={tmp}"], 1, "folder"),
    ("sample.py", ["--ckpt={tmp}/file"], 1, "or not a checkpoint"),
    ("sample.py", ["--out_dir={tmp}/run", "--start="], 2, "the prompt is empty"),
    ("sample.py", ["--out_dir={tmp}/run", "--start=§"], 1, "not in this model's vocabulary"),
    ("sample.py", ["--out_dir={tmp}/run", "--start=\udcff"], 1, "UTF-8"),
    ("sample.py", ["--out_dir={tmp}/run", "--start=FILE:{tmp}"], 1, "Is a directory"),
    ("sample.py", ["--out_dir={tmp}/run", "--start=FILE:{tmp}/no"], 1, "No such file"),
    ("sample.py", ["--out_dir={tmp}/run", "--start=FILE:{tmp}/bytes"], 1, "cannot be read"),
    ("sample.py", ["--out_dir={tmp}/run", "--start=" + "to be " * 99], 1, "shorten it"),
    ("sample.py", ["--ckpt=a", "--init_from=b"], 2, "give one of them"),
    ("sample.py", ["--interactive", "--json"], 2, "one prompt at a time"),
    ("sample.py", ["--stop="], 2, "must be some text"),
    ("sample.py", ["--svd_rank=4"], 2, "add --use_svd=True"),
    ("tools.bench", [], 2, "say one of"),
    ("tools.bench", ["decode", "train"], 2, "say one of"),
    ("tools.bench", ["--report", "--n_head=7"], 2, "n_head=7 does not work"),
    ("tools.bench", ["--report", "--init_from={tmp}/file"], 1, "or not a checkpoint"),
    ("tools.bench", ["--report", "--init_from={tmp}/run", "--n_layer=1"], 2, "leave out one"),
    ("tools.bench", ["--report", "--json={tmp}/no/x"], 1, "cannot be written"),
    ("tools.export", ["--out_dir={tmp}/run"], 2, "--to=FOLDER"),
    ("tools.export", ["--out_dir={tmp}/run", "--to={tmp}/file"], 1, "is a file"),
    ("tools.export", ["--out_dir={tmp}/run", "--to={tmp}"], 1, "other files"),
    ("tools.export", ["--out_dir={tmp}/run", "--to={tmp}/e", "--format=llama"], 1, "does not fit"),
    ("tools.convert", ["--init_from={tmp}/no", "--data={data}", "--to={tmp}/n"], 1, "no such file"),
    ("tools.compare", ["--variants=NOPE"], 2, "NOPE"),
    ("tools.compare", ["{tmp}/nothing"], 1, "no checkpoint at"),
]
for script, settings in VALUES.items():
    for name, texts in settings.items():
        for text in texts:
            CALLS.append((script, [*FRONT.get(script, []), f"--{name}={text}"], 2, f"{name}"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, dataset):
    """A folder with a run, and files that are none."""
    tmp = tmp_path_factory.mktemp("bad")
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp}/run", "--max_iters=10"]
    assert run("train.py", *args).returncode == 0
    (tmp / "file").write_text("no checkpoint")
    (tmp / "bytes").write_bytes(b"\xff\xfe\xff")
    for name, text in {
        "broken": "n_layer = = 2", "raises": "n_layer = 1 / 0", "exits": "raise SystemExit(3)",
        "unknown": "n_leyer = 3",
    }.items():  # fmt: skip
        (tmp / f"{name}.py").write_text(text)
    return tmp


def test_bad_calls(place, dataset, tmp_path):
    """All of them, one after the other, within a minute."""
    began, before = time.process_time(), sorted(p.name for p in place.iterdir())
    wrong = []
    for script, arguments, status, words in CALLS:
        args = [a.replace("{tmp}", str(place)).replace("{data}", str(dataset)) for a in arguments]
        if script == "train.py":
            given = [] if any("out_dir" in a for a in args) else [f"--out_dir={tmp_path}/o"]
            args = [*QUICK, f"--dataset={dataset}", "--max_iters=1", *given, *args]
        try:
            fails_with_one_line(run(script, *args), status, words)
        except AssertionError as error:
            wrong.append((script, arguments, str(error)[:300]))
    assert not wrong, "\n".join(map(str, wrong))
    assert time.process_time() - began < 60
    assert sorted(p.name for p in place.iterdir()) == before
    shutil.rmtree(tmp_path / "o", ignore_errors=True)  # a folder that was locked may be there
