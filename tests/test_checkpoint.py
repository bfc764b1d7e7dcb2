"""Checkpoints survive or fail with one line. Run: python -m pytest tests/test_checkpoint.py"""

import dataclasses
import enum
import math
import os
import pickle
import random
import resource
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT
from nanomla import checkpoint
from nanomla.checkpoint import Checkpoint
from nanomla.errors import UserError
from tests.conftest import ROOT, TINY_MLA, save_model, tiny_config

SHARED = {**TINY_MLA, "mla_share_latent": True}


def save(folder, seed=0, **settings):
    """Save a new model, as the best if its seed is 0."""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**settings))
    save_model(folder, model, best=seed == 0, iter_num=seed, best_val_loss=1.5)
    return model


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("settings", [{}, TINY_MLA, SHARED, {"use_svd": True, "svd_rank": 3}])
def test_round_trip(tmp_path, settings):
    """What was saved comes back bit by bit, also under the names torch.compile and DDP give."""
    model = save(tmp_path, **settings)
    stored = checkpoint.load(tmp_path / "ckpt.pt")
    stored.model = {"_orig_mod.module." + k: v for k, v in stored.model.items()}
    twin, note = checkpoint.build(stored)
    assert note is None and twin.config == model.config and same_weights(model, twin)


def test_every_field_is_a_key_on_disk(tmp_path):
    """The file has nanoGPT's keys and ours, plain values only; each comes back as it was."""
    model = GPT(tiny_config())
    stored = Checkpoint(
        model.state_dict(),
        dataclasses.asdict(model.config),
        optimizer={"state": {}, "param_groups": []},
        scaler={"scale": 2.0},
        iter_num=7,
        best_val_loss=1.25,
        config={"dataset": "letters"},
        tokenizer={"kind": "char", "chars": "ab"},
        wandb_run_id="id",
        source="not written",
    )
    checkpoint.save(tmp_path, stored, best=False)
    keys = set(torch.load(tmp_path / "ckpt.pt", weights_only=True))
    nanogpt = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert keys == nanogpt | {"scaler", "tokenizer", "wandb_run_id", "format"}
    again = checkpoint.load(tmp_path / "ckpt.pt")
    assert again.source == str(tmp_path / "ckpt.pt")
    for field in dataclasses.fields(Checkpoint):
        if field.name not in ("model", "model_args", "source"):
            assert getattr(again, field.name) == getattr(stored, field.name), field.name


@pytest.mark.parametrize("settings", [{"pos_emb": "rope"}, SHARED])
def test_a_built_model_owns_plain_weights(tmp_path, settings):
    """
    Its weights share no memory with the file's or with one another, except where they are tied;
    they are contiguous, in the default dtype and trainable. No random numbers are drawn.
    """
    save(tmp_path, **settings)
    stored = checkpoint.load(tmp_path / "ckpt.pt")
    name = "transformer.h.0.mlp.c_fc.weight"
    stored.model[name] = stored.model[name].half().t().contiguous().t()
    random_state = torch.get_rng_state()
    model, _ = checkpoint.build(stored)
    assert torch.equal(torch.get_rng_state(), random_state)
    read = {t.untyped_storage().data_ptr() for t in stored.model.values()}
    parameters = list(model.parameters())
    own = {p.untyped_storage().data_ptr() for p in parameters}
    assert len(own) == len(parameters) and not own & read
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    assert all(p.requires_grad and p.device.type == "cpu" for p in parameters)
    assert all(b.device.type == "cpu" for b in model.buffers())
    assert model.transformer.wte.weight is model.lm_head.weight
    if "mla_share_latent" in settings:
        first, second = (block.attn.kv_latent_proj for block in model.transformer.h)
        assert first.weight is second.weight and first.bias is second.bias


def test_best_and_latest_are_kept_apart(tmp_path):
    """A later save without best leaves best.pt as it was; find prefers what it is told to."""
    save(tmp_path, seed=0)
    save(tmp_path, seed=1)
    assert checkpoint.load(checkpoint.find(tmp_path)).iter_num == 1
    assert checkpoint.load(checkpoint.find(tmp_path, prefer_best=True)).iter_num == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "ckpt.pt"]
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.find(tmp_path / "nowhere")


def test_a_kill_between_the_two_names_endangers_neither(tmp_path):
    """
    best.pt is linked first; if the run is killed there, the next save must not write into the file
    they share.
    """
    save(tmp_path, seed=0)
    os.link(tmp_path / "best.pt", tmp_path / f".ckpt.pt.{os.getpid()}.tmp")
    save(tmp_path, seed=1)
    assert checkpoint.load(tmp_path / "best.pt").iter_num == 0
    assert checkpoint.load(tmp_path / "ckpt.pt").iter_num == 1


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    """Under their old name, too; a folder and what has another name stay."""
    save(tmp_path)
    for name in (".ckpt.pt.tmp", ".ckpt.pt.17.tmp", ".best.pt.17.tmp", ".other.tmp"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".ckpt.pt.18.tmp").mkdir()
    checkpoint.remove_leftovers(tmp_path)
    names = [".ckpt.pt.18.tmp", ".other.tmp", "best.pt", "ckpt.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("place", ["ckpt.pt", "best.pt", f".ckpt.pt.{os.getpid()}.tmp"])
def test_where_nothing_can_be_written(tmp_path, place):
    """A folder under one of the names: one line, and what was there is as it was."""
    save(tmp_path, seed=0)
    if (tmp_path / place).exists():
        (tmp_path / place).unlink()
    (tmp_path / place).mkdir()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    stored = Checkpoint({"x": torch.zeros(3)}, {})
    with pytest.raises(UserError, match="no checkpoint written") as caught:
        checkpoint.save(tmp_path, stored, best=True)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_names_that_cannot_be(tmp_path):
    """Below a file, too long, with a NUL, in no folder: one line when written, read and found."""
    (tmp_path / "file").touch()
    stored = Checkpoint({"x": torch.zeros(3)}, {})
    for name in ("file/below", "x" * 300, "nowhere"):
        for act in (
            lambda folder: checkpoint.save(folder, stored, best=True),
            lambda folder: checkpoint.load(folder / "ckpt.pt"),
            checkpoint.find,
        ):
            with pytest.raises(UserError, match="no checkpoint|cannot be read") as caught:
                act(tmp_path / name)
            assert "\n" not in str(caught.value)


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C while the bytes are written: the old files, and no temporary one."""
    save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def interrupted(_, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


VARIANTS = [
    {"bias": False, "dropout": 0.1}, {"n_kv_head": 2, "pos_emb": "rope"}, TINY_MLA, SHARED,
    {"norm": "rmsnorm", "mlp": "swiglu"}, {"use_svd": True}, {"head_dim": 8, "gelu": "tanh"},
    {"use_mla": True}, {**TINY_MLA, "mla_latent_dim": [7, 5]}, {**TINY_MLA, "mla_rope_dim": None},
    {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8}, {**TINY_MLA, "mla_nope_dim": 5},
    {"use_latent_tokens": True, "n_latent_tokens": 3}, {"tie_weights": False},
    {"pos_emb": "rope", "rope_theta": 77.0}, {"pos_emb": "rope", "rope_freqs": (1.0, 0.5, 0.1)},
]  # fmt: skip


@pytest.mark.parametrize("settings", VARIANTS)
def test_defaults_are_left_out(tmp_path, settings):
    """On disk are nanoGPT's seven settings and what differs; the same GPTConfig comes back."""
    model = save(tmp_path, **settings)
    stored = checkpoint.load(tmp_path / "ckpt.pt")
    seven = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert seven <= set(stored.model_args)
    if set(settings) <= seven:
        assert set(stored.model_args) == seven
    twin, _ = checkpoint.build(stored)
    assert twin.config == model.config and same_weights(model, twin)


def test_unknown_settings_that_switch_nothing_on(tmp_path):
    """Of another version or a fork: neutral values are no error, others are named."""
    save(tmp_path)
    for value in (None, False, 0, 0.0, "", "none", [], ()):
        stored = checkpoint.load(tmp_path / "ckpt.pt")
        stored.model_args["experts"] = value
        checkpoint.build(stored)
    for value in (True, 1, 0.5, "all", [0], torch.zeros(1)):
        stored.model_args["experts"] = value
        with pytest.raises(UserError, match="does not know: experts"):
            checkpoint.build(stored)


class Kind(enum.StrEnum):
    ONE = "one"


class Whole(int):
    def __int__(self):
        return 0


def test_what_is_not_plain_is_written_plain(tmp_path):
    """numpy's values, enums, subclasses, paths: read with weights_only, of Python's own types."""
    odd = {
        "a": np.float32(0.5), "b": np.str_("text"), "c": Kind.ONE, "d": Path("x/y"),
        "e": OrderedDict(k=np.int64(7)), "f": defaultdict(list, k=[Whole(3)]), "g": np.arange(3),
        "h": (np.bool_(True), None), np.str_("i"): float("nan"), "j": torch.zeros(2),
    }  # fmt: skip
    plain = {
        "a": 0.5, "b": "text", "c": "one", "d": "x/y", "e": {"k": 7}, "f": {"k": [3]},
        "g": [0, 1, 2], "h": (True, None),
    }  # fmt: skip
    stored = Checkpoint({"x": torch.zeros(3)}, dict(odd), config=odd, tokenizer=odd, scaler=odd)
    stored.iter_num = np.int64(3)
    checkpoint.save(tmp_path, stored, best=False)
    again = checkpoint.load(tmp_path / "ckpt.pt")
    for found in (again.model_args, again.config, again.tokenizer, again.scaler):
        assert {key: found[key] for key in plain} == plain and math.isnan(found["i"])
        assert all(type(found[key]) is type(value) for key, value in plain.items())
        assert type(found["f"]["k"][0]) is int and torch.equal(found["j"], torch.zeros(2))
    for name in ("config", "tokenizer", "model_args"):
        broken = dataclasses.replace(stored, **{name: {"k": [{"l": object()}]}})
        with pytest.raises(UserError, match=rf"{name}\['k'\]\[0\]\['l'\]=<object"):
            checkpoint.save(tmp_path, broken, best=False)
    assert checkpoint.load(tmp_path / "ckpt.pt").iter_num == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["transformer.h.1.ln_2.bias", "transformer.wte.weight"])
def test_weights_that_are_not_finite_are_named(tmp_path, name, value):
    """One value of one tensor, also of one that is tied."""
    save(tmp_path)
    stored = checkpoint.load(tmp_path / "ckpt.pt")
    stored.model[name].view(-1)[-1] = value
    with pytest.raises(UserError, match=f"ckpt.pt: {name} holds .* not finite"):
        checkpoint.build(stored)


def test_damaged_files_are_one_clear_line(tmp_path):
    """Truncated at 20 lengths, random bytes, nothing, a folder: always a UserError naming it."""
    save(tmp_path)
    content, draw = (tmp_path / "ckpt.pt").read_bytes(), random.Random(1)
    bad = tmp_path / "bad.pt"
    lengths = [0, 1, len(content) - 1, *(draw.randrange(2, len(content) - 1) for _ in range(17))]
    for piece in [content[:n] for n in lengths] + [draw.randbytes(n) for n in (10, 5000)]:
        bad.write_bytes(piece)
        with pytest.raises(UserError, match="bad.pt") as caught:
            checkpoint.load(bad)
        assert "\n" not in str(caught.value)
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(UserError, match=path.name):
            checkpoint.load(path)


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    """Refused, in torch's format and as a plain pickle."""

    class Hostile:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    torch.save({"model": Hostile(), "model_args": {}}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Hostile()}))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_foreign_checkpoints_are_named(tmp_path):
    """Other keys, another model's weights or settings: what is missing, unknown or misshapen."""
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no model and no model_args"):
        checkpoint.load(tmp_path / "other.pt")
    torch.save({"model": {}, "model_args": {}, "format": 99}, tmp_path / "new.pt")
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(tmp_path / "new.pt")
    torch.save({"model": {}, "model_args": {}, "iter_num": "seven"}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="odd.pt: not a nanoMLA or nanoGPT checkpoint.*seven"):
        checkpoint.load(tmp_path / "odd.pt")
    save(tmp_path)
    for change, words in (
        ({"n_layer": 3}, "n_layer=3, but there are weights of 2 layers"),
        ({"n_layer": 1}, "n_layer=1, but"),
        ({"n_embd": 32}, "has shape"),
        ({"n_head": 5}, "n_head=5 does not work"),
        ({"n_layer": "2"}, "n_layer='2' does not work: .* a whole number of at least 1"),
        ({"n_heads": 4}, "does not know: n_heads"),
    ):
        stored = checkpoint.load(tmp_path / "ckpt.pt")
        stored.model_args |= change
        with pytest.raises(UserError, match=f"ckpt.pt: .*{words}"):
            checkpoint.build(stored)


def test_a_checkpoint_has_the_types_that_it_declares(tmp_path):
    """Every field with a value of another type: one line that names it."""
    good = {"model": {"a": torch.zeros(1)}, "model_args": {}}
    for wrong in (
        *({name: value} for name in good for value in ([], "x", None, 7)),
        *({name: 7} for name in ("optimizer", "scaler", "tokenizer", "wandb_run_id")),
        {"model": {"a": 1}}, {"model": {1: torch.zeros(1)}}, {"model_args": {1: 1}},
        {"config": "odd"}, {"config": [1]}, {"config": {1: 1}}, {"optimizer": [1]},
        {"iter_num": True}, {"iter_num": -1}, {"iter_num": 10**30}, {"iter_num": 1.5},
        {"best_val_loss": "low"}, {"best_val_loss": torch.zeros(2)},
        {"best_val_loss": torch.zeros((), device="meta")}, {"format": [1]},
    ):  # fmt: skip
        torch.save(good | wrong, tmp_path / "a.pt")
        with pytest.raises(UserError, match=f"a.pt: not a .*{next(iter(wrong))}") as caught:
            checkpoint.load(tmp_path / "a.pt")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    torch.save(good | {"iter_num": torch.tensor([7]), "best_val_loss": 2}, tmp_path / "a.pt")
    stored = checkpoint.load(tmp_path / "a.pt")
    assert (stored.iter_num, stored.best_val_loss) == (7, 2.0)
    assert (type(stored.iter_num), type(stored.best_val_loss)) == (int, float)


def test_flipped_bits_are_found(tmp_path):
    """One byte at each of 60 random places of the tensors; verify=False does not look."""
    save(tmp_path)
    path, draw = tmp_path / "ckpt.pt", random.Random(1)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    start, size = largest.header_offset + 200, largest.file_size - 200
    checkpoint.load(path)
    for place in [start + draw.randrange(size) for _ in range(60)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="ckpt.pt: .*damaged.*CRC") as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)
    assert checkpoint.load(path, verify=False).iter_num == 0


def test_archives_that_contradict_themselves_are_refused(tmp_path, monkeypatch):
    """Compressed or overlapping members and a large pickle, before torch reads a byte."""
    save(tmp_path)
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "z.pt", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # the last one of the list of members
    for offset in (20, 24):  # its size, as stored and unpacked
        content[entry + offset : entry + offset + 4] = (10**6).to_bytes(4, "little")
    (tmp_path / "large.pt").write_bytes(content)
    monkeypatch.setattr(torch, "load", None)
    for name, words in (("z.pt", "is compressed"), ("large.pt", "larger than its place")):
        with pytest.raises(UserError, match=words):
            checkpoint.load(tmp_path / name)
    monkeypatch.setattr(checkpoint, "LARGEST_PICKLE", 100)
    with pytest.raises(UserError, match="data.pkl is larger"):
        checkpoint.load(path)


def test_nanogpt_checkpoint_opens(tmp_path):
    """model_args of nanoGPT alone, its compile prefix, its old mask buffers, keys of a fork."""
    model = GPT(tiny_config())
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    state = {"_orig_mod." + k: v for k, v in model.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    saved = {
        "model": state,
        "optimizer": {},
        "model_args": {k: getattr(model.config, k) for k in names},
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.0),
        "config": {},
        "fork": [1],
    }
    torch.save(saved, tmp_path / "ckpt.pt")
    stored = checkpoint.load(tmp_path / "ckpt.pt")
    assert stored.iter_num == 7 and stored.tokenizer is None and stored.scaler is None
    assert type(stored.best_val_loss) is float and stored.best_val_loss == 2.0
    twin, _ = checkpoint.build(stored)
    idx = torch.arange(10)[None]
    assert torch.equal(model(idx, idx)[0], twin(idx, idx)[0])
    for name in ("iter_num", "best_val_loss", "config", "optimizer"):
        del saved[name]
    torch.save(saved, tmp_path / "ckpt.pt")
    stored = checkpoint.load(tmp_path / "ckpt.pt")
    assert (stored.iter_num, stored.best_val_loss, stored.config) == (0, math.inf, {})


def test_a_full_disk_loses_nothing(tmp_path):
    """
    A write cut off by a file-size limit is a UserError; both old files stay whole and nothing is
    left beside them.
    """
    save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    code = (
        "import sys, torch\n"
        "from nanomla import checkpoint\n"
        "from nanomla.errors import UserError\n"
        "stored = checkpoint.Checkpoint({'x': torch.zeros(200000)}, {})\n"
        "try:\n"
        "    checkpoint.save(sys.argv[1], stored, True)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-c", code, str(tmp_path)]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, check=False, preexec_fn=limit, **options)
    assert done.stdout.startswith("no checkpoint written") and done.returncode == 0, done.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_space_is_checked_first(tmp_path, monkeypatch):
    """Too little free space is an error before a byte is written."""
    save(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage())
    with pytest.raises(UserError, match="MB free"):
        save(tmp_path, seed=3)
    assert checkpoint.load(tmp_path / "ckpt.pt").iter_num == 0
