"""
Calls that cannot work, one of each kind and script: one line on stderr, the right exit status, and
nothing is written.
Run: python -m pytest tests/test_bad_calls.py
"""

import pytest

from tests.conftest import QUICK, fails_with_one_line, run

# (script, arguments, exit status, words of the line)
CALLS = [
    # values of another type or out of range, one per type
    ("train.py", ["--seed=x"], 2, "seed"),
    ("train.py", ["--n_head=5"], 2, "n_head=5"),
    ("train.py", ["--learning_rate=nan"], 2, "learning_rate"),
    ("train.py", ["--compile=yes"], 2, "True or False"),
    ("train.py", ["--mla_latent_dim=1,x"], 2, "or several, each a whole number"),
    ("sample.py", ["--top_p=0"], 2, "top_p"),
    ("tools.bench", ["svd", "--rounds=0"], 2, "rounds"),
    ("tools.convert", ["--to={tmp}/n", "--init_from={tmp}/run", "--data={data}", "--cache=0x"],
     2, "cache"),
    # flags and config files
    ("train.py", ["--lr", "1"], 2, "did you mean learning_rate"),
    ("train.py", ["--always_save_checkpoint=True"], 2, "leave it out"),
    ("train.py", ["--learning_rate", "--n_layer=2"], 2, "needs a value"),
    ("train.py", ["-n_layer=2"], 2, "--key=value"),
    ("train.py", ["no_such.py"], 2, "no_such.py: cannot read"),
    ("train.py", ["{tmp}/broken.py"], 2, "broken.py:1: not a Python config file"),
    ("train.py", ["{tmp}/raises.py"], 2, "raises.py: fails as Python (ZeroDivisionError"),
    ("train.py", ["{tmp}/unknown.py"], 2, "unknown setting n_leyer"),
    # what is named is not there, or is something else
    ("train.py", ["--dataset=nowhere"], 1, "nowhere is not prepared"),
    ("train.py", ["--out_dir={tmp}/file/o"], 1, "file/o: Not a directory"),
    ("train.py", ["--init_from=resume"], 1, "no checkpoint in"),
    ("train.py", ["--init_from={tmp}/file"], 1, "or not a checkpoint"),
    ("train.py", ["--init_from={tmp}/run", "--use_mla=True"], 1, "tools.convert"),
    ("train.py", ["--distill={tmp}/nothing"], 1, "no such file or folder"),
    ("train.py", ["--device=cuda:99"], 2, "not on this machine"),
    ("sample.py", ["--ckpt={tmp}/nothing"], 1, "no checkpoint at"),
    ("sample.py", ["--out_dir={tmp}/run", "--start=FILE:{tmp}/no"], 1, "No such file"),
    ("tools.bench", ["--report", "--init_from={tmp}/file"], 1, "or not a checkpoint"),
    ("tools.export", ["--out_dir={tmp}/run", "--to={tmp}"], 1, "other files"),
    ("tools.convert", ["--init_from={tmp}/no", "--data={data}", "--to={tmp}/n"], 1, "no such file"),
    ("tools.compare", ["{tmp}/nothing"], 1, "no checkpoint at"),
    # what does not go together or does not fit
    ("train.py", ["--block_size=100000"], 1, "too few for block_size"),
    ("train.py", ["--vocab_size=5"], 1, "only vocab_size=5"),
    ("train.py", ["--n_layer=100000", "--n_embd=2048"], 1, "are free"),
    ("train.py", ["--use_mla", "--mla_rope_dim=2"], 2, "pos_emb"),
    ("sample.py", ["--out_dir={tmp}/run", "--start="], 2, "the prompt is empty"),
    ("sample.py", ["--out_dir={tmp}/run", "--start=§"], 1, "not in this model's vocabulary"),
    ("sample.py", ["--ckpt=a", "--init_from=b"], 2, "give one of them"),
    ("sample.py", ["--svd_rank=2"], 2, "add --use_svd=True"),
    ("sample.py", ["--interactive", "--json"], 2, "one prompt at a time"),
    ("tools.bench", ["decode", "train"], 2, "say one of"),
    ("tools.export", ["--out_dir={tmp}/run"], 2, "--to=FOLDER"),
    ("tools.export", ["--out_dir={tmp}/run", "--to={tmp}/e", "--format=llama"], 1, "does not fit"),
    ("tools.compare", ["--variants=NOPE"], 2, "NOPE"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, dataset):
    """A folder with a run, and files that are none."""
    tmp = tmp_path_factory.mktemp("bad")
    args = [*QUICK, f"--dataset={dataset}", f"--out_dir={tmp}/run", "--max_iters=10"]
    assert run("train.py", *args).returncode == 0
    (tmp / "file").write_text("no checkpoint")
    (tmp / "broken.py").write_text("n_layer = = 2")
    (tmp / "raises.py").write_text("n_layer = 1 / 0")
    (tmp / "unknown.py").write_text("n_leyer = 3")
    return tmp


def test_bad_calls(place, dataset, tmp_path):
    """All of them, one after the other."""
    before = sorted(p.name for p in place.iterdir())
    wrong = []
    for script, arguments, status, words in CALLS:
        args = [a.replace("{tmp}", str(place)).replace("{data}", str(dataset)) for a in arguments]
        if script == "train.py":
            base = [*QUICK, f"--dataset={dataset}", "--max_iters=1", f"--out_dir={tmp_path}/o"]
            args = [*base, *args]
        try:
            fails_with_one_line(run(script, *args), status, words)
        except AssertionError as error:
            wrong.append((script, arguments, str(error)[:300]))
    assert not wrong, "\n".join(map(str, wrong))
    assert sorted(p.name for p in place.iterdir()) == before
    assert not (tmp_path / "o" / "ckpt.pt").exists()
