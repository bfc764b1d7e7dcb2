"""What is read from and written to the disk. Run: python -m pytest tests/test_files.py"""

import errno
import itertools
import json
import os
import shutil
import socket
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from model import GPT
from nanomla import checkpoint, conversion, files, formats
from nanomla.dataset import Dataset, Meta, write_dataset
from nanomla.distributed import World
from nanomla.errors import UserError
from nanomla.files import json_text, put_back, read_json, replacing, write_text
from nanomla.formats.folder import write_folder
from nanomla.runfolder import RunFolder, move_earlier_run
from nanomla.runlog import RunLog, read_log
from nanomla.settings import run_config_file
from sample import read_prompt
from tests.conftest import save_model, tiny_config
from tools import report

READERS = {
    "JSON": read_json,
    "checkpoint": checkpoint.load,
    "weights": lambda path: formats.folder.read_tensors(path.parent),
    "model": formats.open_weights,
    "config file": lambda path: run_config_file(str(path)),
    "prompt": lambda path: read_prompt(f"FILE:{path}"),
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"), (b"[1]", "no JSON object"), (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "larger than"),
    ],
)
def test_bad_json_is_one_line(tmp_path, monkeypatch, content, words):
    """Damaged, too large, missing: a UserError with the file's name."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    monkeypatch.setattr(files, "LARGEST_JSON", 1000)
    with pytest.raises(UserError, match=f"a.json: cannot be read .*{words}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(UserError, match=r"no b.json in this folder"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
@pytest.mark.parametrize("reader", READERS)
def test_only_what_has_an_end_is_read(tmp_path, kind, reader):
    """Elsewhere reading would go on for ever. A pipe may be what a person named as text."""
    path = tmp_path / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    if kind == "pipe" and reader in ("config file", "prompt"):
        writer = threading.Thread(target=path.write_text, args=("seed = 5",))
        writer.start()
        assert READERS[reader](path) in ({"seed": 5}, "seed = 5")
        writer.join()
    else:
        with pytest.raises(UserError, match=r"model.safetensors\b.*not a regular file") as caught:
            READERS[reader](path)
        assert "\n" not in str(caught.value)


def test_numbers_that_json_does_not_have_are_null():
    """NaN and the infinities, wherever they are; no other value changes."""
    value = {"a": [1.5, float("nan"), {"b": -float("inf")}], "c": "NaN", "d": 2**70, "e": 1e308}
    none = {**value, "a": [1.5, None, {"b": None}]}
    assert json.loads(json_text(value)) == none
    assert json_text(none, indent=1) == json.dumps(none, indent=1)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    """What fails half-way leaves the old content and nothing beside it."""
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as unfinished:
        unfinished.write_text("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    write_text(path, "a name that is no UTF-8: \udcff")
    assert path.read_text(encoding="utf-8") == r"a name that is no UTF-8: \udcff"


def test_files_of_others_beside_an_export_stay(tmp_path):
    """Only names that no person gives are taken for leftovers."""
    for name in (".e.2024.old", ".e.old", ".e.1.tmp"):
        (tmp_path / name).mkdir()
    before = sorted(os.listdir(tmp_path))
    export(tmp_path, 0)
    export(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == [*before, "e"]


def test_an_export_behind_a_link_is_put_back(tmp_path):
    """After a kill between the two renames, opening the link finds the earlier export."""
    export(tmp_path, 0)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "e").symlink_to(tmp_path / "e")
    (tmp_path / "e").rename(tmp_path / ".e.nanomla-999999999.old")
    assert weights(tmp_path / "links" / "e") is not None
    assert sorted(os.listdir(tmp_path)) == ["e", "links"]


def test_a_link_to_itself_is_one_line(tmp_path):
    """As what is to be read, and as the folder to write; it stays what it is."""
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(UserError, match="loop: no such file or folder"):
        formats.open_weights(loop)
    formats.folder.check_target(loop)
    settings, tensors = formats.write(MODELS[0], "gpt2")
    with pytest.raises(UserError, match="nothing exported to .*loop"):
        write_folder(loop, tensors, {"config.json": formats.folder.as_json(settings)})
    assert loop.is_symlink() and os.listdir(tmp_path) == ["loop"]


# ---- Whatever interrupts a write, and when


def text(folder, number):
    write_text(folder / "a.txt", f"text {number}\n" * 9)


def picture(folder, number):
    axes = report.new_axes("x")
    axes.plot([0, number], label="line")
    report.save(axes, folder / "a.png")


def run_files(folder, number):
    """Both checkpoints of a run, and what it does at its start."""
    folder.mkdir(exist_ok=True)
    with World("cpu", "gloo") as world, RunFolder(folder, True, world).training():
        save_model(folder, MODELS[number], best=True, iter_num=number)


def log(folder, number):
    """The log of a run that is resumed, of which what is not done again is kept."""
    if number == 0:
        text = "".join(f'{{"iter": {it}}}\n' for it in range(9))
        write_text(folder / "log.jsonl", text)
    else:
        RunLog(folder, resume_at=5).close(at_once=True)


def dataset(folder, number):
    write_dataset(folder, {"train": [IDS + number], "val": [IDS + number]}, Meta(20 + number))


def export(folder, number):
    settings, tensors = formats.write(MODELS[number], "gpt2")
    write_folder(folder / "e", tensors, {"config.json": formats.folder.as_json(settings)})


def converted(folder, number):
    """A run's folder that takes the place of an empty one."""
    new = folder / "new"
    put_back(new)  # as tools.convert does at its start
    if number == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
    elif not new.exists() or not any(new.iterdir()):  # else it is there, which tools.convert sees
        source = SimpleNamespace(cfg=SimpleNamespace(data="text"), tokenizer=None)
        conversion.write_run(new, source, MODELS[1], 1.5, {"a.txt": "text"})


def filled(folder, number):
    """An export into an empty folder, which is the same folder afterwards."""
    here = folder / "here"
    if number == 0:
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
    else:
        formats.folder.check_target(here)
        was_empty = not any(here.iterdir())
        inode = here.stat().st_ino
        settings, tensors = formats.write(MODELS[1], "gpt2")
        write_folder(here, tensors, {"config.json": formats.folder.as_json(settings)})
        assert here.stat().st_ino == inode or not was_empty


def weights(path):
    """The first number of the weights that one of our readers finds."""
    try:
        return formats.open_weights(path).model["transformer.wte.weight"][0, 0].item()
    except UserError:
        return None


def read_dataset(folder):
    data = Dataset(str(folder), 4)
    return data.vocab_size, *(int(data.splits[split][0]) for split in ("train", "val"))


MODELS = [GPT(tiny_config(n_layer=1)) for _ in range(2)]
IDS = np.arange(9)
WRITES = {  # how it is written, and read
    "text": (text, lambda folder: (folder / "a.txt").read_text()),
    "picture": (picture, lambda folder: (folder / "a.png").read_bytes()),
    "checkpoint": (run_files, lambda folder: weights(folder / "ckpt.pt")),
    "best checkpoint": (run_files, lambda folder: weights(folder / "best.pt")),
    "log": (log, lambda folder: len(read_log(folder / "log.jsonl"))),
    "dataset": (dataset, read_dataset),
    "export": (export, lambda folder: weights(folder / "e")),
    "filled folder": (filled, lambda folder: weights(folder / "here")),
    "conversion": (converted, lambda folder: weights(folder / "new")),
}


def kill():
    """End as after kill -9: nothing is cleaned up."""
    os._exit(9)


def interrupt():
    raise KeyboardInterrupt


def fill_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(write, folder, fault):
    """
    Call `write` in a process in which there is a fault before its first call of the system that
    has to do with files in a folder, then before its second, and so on. Yields after each.
    """
    for number in itertools.count():
        process = os.fork()
        if process == 0:
            with_a_fault(write, folder, fault, number)
        _, status = os.waitpid(process, 0)
        if status == 0:  # it went through before it came to that call
            assert number > 3
            return
        yield number


def with_a_fault(write, folder, fault, number):
    """Call `write` with a fault before its call number so, and end the process: 0 without one."""
    calls = itertools.count()

    def watch(event, arguments):
        concerns = str(folder) in repr(arguments) or event in ("os.remove", "os.rmdir")
        kind = event.partition(".")[0]
        if kind in ("os", "open", "shutil") and concerns and next(calls) == number:
            fault()

    def watched_fsync(file):
        watch("os.fsync", folder)
        fsync(file)

    sys.addaudithook(watch)
    fsync = os.fsync
    os.fsync = watched_fsync
    try:
        write()
    finally:
        os._exit(next(calls) > number)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


KINDS_OF_WRITES = [
    pytest.param(kind, marks=pytest.mark.slow)  # their packages take seconds in every process
    if kind in ("picture", "conversion")
    else kind
    for kind in WRITES
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("fault", [kill, interrupt, fill_disk])
@pytest.mark.parametrize("kind", KINDS_OF_WRITES)
def test_a_write_is_whole_or_not_at_all(tmp_path, kind, fault):
    """
    Whatever happens at any call of the system, the old or the new content is there for readers;
    the next write leaves what an undisturbed one does, and nothing beside it.
    """
    write, read = WRITES[kind]
    contents = []
    for number in (0, 1):
        write(tmp_path, number)
        contents.append(read(tmp_path))
    assert contents[0] != contents[1]
    undisturbed = names(tmp_path)
    write(tmp_path, 0)
    for number in interrupted(lambda: write(tmp_path, 1), tmp_path, fault):
        assert read(tmp_path) in contents, number
        write(tmp_path, 1)
        assert read(tmp_path) == contents[1] and names(tmp_path) == undisturbed, number
        write(tmp_path, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("fault", [kill, interrupt, fill_disk])
def test_an_earlier_run_is_moved_as_one(tmp_path, fault):
    """A new run that is interrupted while it moves an earlier one's files goes on with that."""
    earlier = ["best.pt", "ckpt.pt", "log.jsonl", "loss.png"]

    def write():
        for name in earlier:
            (tmp_path / name).touch()

    for number in (1, 2):
        old = tmp_path / f"old-{number}"
        write()
        for _ in interrupted(lambda: move_earlier_run(tmp_path), tmp_path, fault):
            move_earlier_run(tmp_path)
            assert sorted(os.listdir(old)) == earlier
            shutil.rmtree(old)
            write()
        assert sorted(os.listdir(old)) == earlier
