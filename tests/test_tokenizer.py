"""Tokenizers and streamed text. Run: python -m pytest tests/test_tokenizer.py"""

import json

import pytest

from nanomla.errors import UserError
from nanomla.text import StreamDecoder
from nanomla.tokenizer import Tokenizer, check_spec, end_of_text, read_hf, start_of_text

WORDS = ["to be or not to be, that is the question", "héllo wörld 🙂"]
TEXT = "to be, 🙂 wörld\n日本 <|end|>x"


def byte_level(vocab_size=280):
    """A byte-level BPE, as Llama 3, Qwen2 and DeepSeek-V3 have; "<|end|>" is its token 0."""
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = HF(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=letters,
            show_progress=False,
        ),
    )
    return made


def sentencepiece():
    """A BPE on characters with bytes for unknown ones, as Llama 2 has; "<s>" starts a text."""
    from tokenizers import Tokenizer as HF

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "b", "e", "t", "o", "be", "▁be", "▁t", "▁to", "ö"]
    merges = [["b", "e"], ["▁", "be"], ["▁", "t"], ["▁t", "o"]]
    content = {
        "version": "1.0",
        "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0,
                       "direction": "Right"},
        "added_tokens": [
            {"id": i, "content": pieces[i], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for i in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True,
                  "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges},
    }
    return HF.from_str(json.dumps(content))


@pytest.mark.parametrize("kind", ["byte", "tiktoken", "byte level", "sentencepiece", "char"])
def test_a_text_decodes_alike_wherever_it_is_cut(kind):
    """Characters whose tokens come before and behind the cut too."""
    tokenizer = Tokenizer({
        "byte": lambda: {"kind": "byte"},
        "tiktoken": lambda: {"kind": "tiktoken", "name": "gpt2"},
        "byte level": lambda: {"kind": "hf", "json": byte_level().to_str()},
        "sentencepiece": lambda: {"kind": "hf", "json": sentencepiece().to_str()},
        "char": lambda: {"kind": "char", "chars": "".join(sorted(set(TEXT)))},
    }[kind]())
    ids = tokenizer.encode(TEXT)
    for cut in range(len(ids) + 1):
        before = b"".join(tokenizer.token_bytes(i) for i in ids[:cut]).decode("utf-8", "ignore")
        decoder = StreamDecoder(tokenizer, ids[:cut])
        rest = "".join(decoder.push(i) for i in ids[cut:]) + decoder.finish()
        assert before + rest == tokenizer.decode(ids)


def test_char_tokenizer():
    """Text goes round; a character outside the vocabulary is named."""
    tokenizer = Tokenizer({"kind": "char", "chars": "\n abé"})
    assert tokenizer.decode(tokenizer.encode("a béa\n")) == "a béa\n" and tokenizer.vocab_size == 5
    with pytest.raises(UserError, match="'ß'"):
        tokenizer.encode("aß")


def test_byte_tokenizer_streams_complete_characters():
    """A character of several bytes appears when its last byte does; other bytes become a mark."""
    tokenizer = Tokenizer({"kind": "byte"})
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(b) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert decoder.push(0xE2) == "" and decoder.finish() == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("aé€")) == "aé€"


def test_byte_level_tokenizer_json():
    """Ids and text are those of the tokenizers library; characters of several tokens are whole."""
    theirs = byte_level()
    ours = Tokenizer({"kind": "hf", "json": theirs.to_str(), "end": 0})
    ids = ours.encode(TEXT)
    assert ids == theirs.encode(TEXT).ids and 0 in ids and ours.vocab_size == 280
    assert ours.decode(ids) == TEXT == theirs.decode(ids, skip_special_tokens=False)
    decoder = StreamDecoder(ours)
    pieces = [decoder.push(i) for i in ids] + [decoder.finish()]
    assert "".join(pieces) == TEXT and "" in pieces and not any("\ufffd" in p for p in pieces)
    assert decoder.push(ours.encode("日")[0]) == "" and decoder.finish() == "\ufffd"


def test_sentencepiece_tokenizer_json():
    """
    A text starts with <s>, its spaces are ▁, unknown characters are bytes; what truncation the file
    asks for is not done. A continuation keeps its leading space.
    """
    theirs = sentencepiece()
    ours = Tokenizer({"kind": "hf", "json": theirs.to_str()})
    ids = ours.encode("to be töö 日")
    theirs.no_truncation()
    assert ids == theirs.encode("to be töö 日").ids and ids[0] == 1 and len(ids) > 3
    assert ours.decode(ids) == "<s> to be töö 日" == "<s> " + theirs.decode(ids)
    decoder = StreamDecoder(ours)
    pieces = [decoder.push(i) for i in ids[1:]]
    assert pieces == [" to", " be", " t", "ö", "ö", " ", "", "", "日"]


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({"eos_token_id": 0, "bos_token_id": 3}, {"end": 0, "bos": 3}),
        ({"eos_token_id": [5, 0], "bos_token_id": None}, {"end": 5}),
        ({"eos_token_id": 280, "bos_token_id": -1}, {}),
    ],
)
def test_where_a_text_begins_and_ends(tmp_path, settings, ids):
    """The ids in config.json, if the tokenizer has them."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    spec = read_hf(tmp_path / "tokenizer.json", settings)
    assert spec == {"kind": "hf", "json": spec["json"], **ids}
    assert start_of_text(spec) == ids.get("bos") and end_of_text(spec) == ids.get("end")


def bpe(vocab='{"a": 0}', **fields):
    """The text of a tokenizer.json with this vocabulary."""
    rest = json.dumps({"decoder": {"type": "ByteLevel"}, **fields})[1:]
    return f'{{"model": {{"type": "BPE", "vocab": {vocab}, "merges": []}}, {rest}'


def hf(text):
    """A spec with the text of a tokenizer.json."""
    return {"kind": "hf", "json": text}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (None, "unknown tokenizer None; known kinds: char, byte"),
        ({"kind": "char", "chars": "aba"}, "chars='aba' does not work: chars must be a text that"),
        ({"kind": "tiktoken", "name": "p50k"}, "name must be an encoding, one of gpt2, cl100k"),
        ({"kind": "hf"}, "json must be the text of a tokenizer.json"),
        (hf("[]"), "tokenizer.json: cannot be read"),
        (hf(bpe('{"a": "b"}')), "tokenizer.json: not a tokenizer of Hugging Face"),
        (hf(bpe(normalizer={"type": "Magic"})), "tokenizer.json cannot be read"),
        (hf(bpe(decoder=None)), "the decoder None, which is not supported, only ByteLevel"),
    ],
)
def test_a_strange_spec_is_one_line(spec, words):
    """The line names the file or checkpoint that it was in."""
    with pytest.raises(UserError) as caught:
        Tokenizer(spec, "runs/ckpt.pt")
    line = str(caught.value)
    assert line.startswith("runs/ckpt.pt: ") and words in line, line
    assert "\n" not in line and len(line) < 350


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ({"kind": "char", "chars": "abc\udcff\ud83d"}, 5),
        ({"kind": "byte"}, 256),
        ({"kind": "tiktoken", "name": "gpt2"}, 50257),
        (hf(byte_level().to_str()), 280),
    ],
    ids=["char", "byte", "gpt2", "hf"],
)
def test_ids_and_texts_that_do_not_fit(spec, size):
    """
    A model may have more ids than its tokenizer, as a padded vocabulary does, but not fewer. Half a
    surrogate pair is the same line in every kind.
    """
    check_spec(spec, "x", size)
    check_spec(spec, "x", size + 40)
    with pytest.raises(UserError, match=f"x: .* ids up to {size - 1}, .* vocab_size={size - 1};"):
        check_spec(spec, "x", size - 1)
    tokenizer = Tokenizer(spec)
    assert tokenizer.vocab_size == size and tokenizer.encode("a")
    assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(size) == b""
    with pytest.raises(UserError, match=r"not UTF-8: it has '\\udcff' at character 1"):
        tokenizer.encode("a\udcff")
    text_end = {"gpt2": 50256}.get(spec.get("name"))
    assert start_of_text(spec) == end_of_text(spec) == text_end


def test_ids_of_added_tokens_count():
    """Their names in a prompt would be ids that the model does not have."""
    made = byte_level()
    made.add_tokens(["<pad>"])
    spec = hf(made.to_str())
    check_spec(spec, "x", 281)
    assert Tokenizer(spec).encode("<pad>") == [280]
    with pytest.raises(UserError, match="x: the tokenizer has ids up to 280"):
        check_spec(spec, "x", 280)
