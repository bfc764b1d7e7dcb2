"""
The commands and the Python of README and docs/ run as they are printed, made shorter by flags.
Run: python -m pytest tests/test_docs.py
"""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGES = ("README.md", *(f"docs/{n}.md" for n in (
    "attention", "data", "nanogpt", "evaluate", "export", "conversion", "distributed"
)))
SHORT = "--n_layer=2 --n_head=4 --n_embd=64 --batch_size=2 --eval_iters=1 --eval_interval=2"
SHORTER = {  # flags that follow what is printed
    "train.py": f"{SHORT} --block_size=64 --max_iters=2 --log_interval=1",
    "sample.py": "--max_new_tokens=4",
    "data/text/prepare.py": "--tokenizer=char",
    "-m tools.convert": "--calibration_tokens=512 --eval_tokens=512 --heal_iters=1",
}
NOT_HERE = {  # what a command must not have, and why it is not run
    r"^make": "the two commands themselves",
    r"^torchrun": "tests/test_distributed.py",
    r"tools\.serve": "tests/test_serve.py",
    r"tools\.(compare|bench)|\.\.\.": "minutes; tests of their own",
    r"init_from=gpt2|_gpt2|finetune_shakespeare|gpt2-latent": "needs the network",
    r"openwebtext|--tiny|data/shakespeare/|--data_files": "needs the network",
    r"sglang|vllm": "needs other engines",
    r"--sweep": "half a minute",
}
AS_NANOGPT = """
import os, torch
stored = torch.load("out/ckpt.pt", weights_only=True)
torch.save({k: v for k, v in stored.items() if k not in ("tokenizer", "format")}, "out/ckpt.pt")
os.remove("out/best.pt")
"""
RUN = """
import importlib.util, io, contextlib, json, sys, traceback
work = json.load(sys.stdin)
failed = []
loaded = {}
names = {}  # of a page's Python, block after block
for page, kind, what in work:
    out = io.StringIO()
    sys.stdin = io.StringIO("to be\\n/stats\\n")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if kind == "python":
                names.setdefault(page, {"train_ids": ids, "val_ids": ids})
                exec(compile(what, page, "exec"), names[page])
            else:
                script, *argv = what
                if script not in loaded:
                    spec = importlib.util.spec_from_file_location(f"script{len(loaded)}", script)
                    loaded[script] = importlib.util.module_from_spec(spec)
                    sys.modules[spec.name] = loaded[script]
                    spec.loader.exec_module(loaded[script])
                old, sys.argv = sys.argv, [script, *argv]
                loaded[script].main(argv)
                sys.argv = old
    except BaseException:
        failed.append([page, what, out.getvalue()[-500:], traceback.format_exc()[-1500:]])
json.dump(failed, sys.__stdout__)
"""


def printed(page):
    """(page, "command" or "python", what) of a page in its order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = r"```python\n(.*?)```|^    ((?:python|torchrun|make|vllm) (?:[^\n]*\\\n)*[^\n]*)$"
    for match in re.finditer(blocks, text, re.DOTALL | re.MULTILINE):
        code, command = match.groups()
        if code:
            yield page, "python", code
        else:
            yield page, "command", re.sub(r"\\\n *", " ", command)


def argv_of(command, folder):
    """A command's script and arguments, with what shortens it and files for its patterns."""
    words = shlex.split(command, comments=True)[1:]
    script = words.pop(0)
    path = script
    if script == "-m":
        module = words.pop(0)
        script = f"-m {module}"
        path = module.replace(".", "/") + ".py"
    more = SHORTER.get(script, "").split()
    if any(word.startswith("--init_from=") for word in words):  # the shape is that of the weights
        more = [word for word in more if not word.startswith(("--n_", "--block_size"))]
        more = [word.replace("max_iters=2", "max_iters=4") for word in more]
    expanded = []
    for word in words:
        files = []
        if "*" in word:
            files = sorted(str(file.relative_to(folder)) for file in folder.glob(word))
        expanded += files or [word]
    return [path, *expanded, *more]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tracked files, with a small text in the place of Shakespeare's works."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("the tracked files are found with git")
    folder = tmp_path_factory.mktemp("tree")
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    draw = random.Random(3)
    words = ["ROMEO:", "to be", "or not", "The answer is", "JULIET:", "that", "question"]
    text = "".join(draw.choice(words) + draw.choice(" \n,") for _ in range(4000))
    for place in ("data/shakespeare_char/input.txt", "my/a.txt", "my/b.txt"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(text)
    (folder / "prompts.txt").write_text("ROMEO:\nJULIET:\n")
    return folder


def test_what_is_printed_runs(tree):
    """In the order of the pages, in one process that starts in the root of a fresh copy."""
    pytest.importorskip("transformers")
    train = "python train.py config/train_mla.py"
    work = [("", "command", c) for c in (
        "python data/shakespeare_char/prepare.py",
        "python data/text/prepare.py my/*.txt --name=NAME",
        "python data/text/prepare.py my/*.txt --name=shakespeare_tiny",
        f"{train} --out_dir=out-demo",
        "python train.py --dataset=NAME --out_dir=out --gradient_accumulation_steps=1",
        "python -m tools.export --out_dir=out --to=FOLDER",
    )]
    work.append(("", "python", AS_NANOGPT))
    for page in PAGES:  # each as if it were read first
        fresh = "import shutil; shutil.rmtree('out-latent', ignore_errors=True)"
        work += [(page, "python", fresh), *printed(page)]
    assert len(work) > 40 and sum("import" in what for _, _, what in work) >= 4 + len(PAGES)
    chosen = []
    for page, kind, what in work:
        if kind == "python":
            chosen.append((page, kind, what))
        elif not any(re.search(pattern, what) for pattern in NOT_HERE if page):
            chosen.append((page, kind, argv_of(what, tree)))
    assert len(chosen) > 25
    code = f"import numpy as np\nids = np.arange(100)\n{RUN}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, input=json.dumps(chosen), text=True, check=False,
        capture_output=True, timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    failed = json.loads(done.stdout)
    assert not failed, "\n".join(str(part) for case in failed for part in case)


@pytest.mark.parametrize("page", ["README.md", "docs/nanogpt.md", "docs/conversion.md"])
def test_pages_say_that_a_config_file_is_a_program(page):
    """Whoever gets one from somebody else must know before it runs."""
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert re.search(r"config file.{,20} is a Python program|is a config file, a program", text)
