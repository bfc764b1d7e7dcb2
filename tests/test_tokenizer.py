"""Tokenizers and streamed text. Run: python -m pytest tests/test_tokenizer.py"""

import json
import random

import pytest

from nanomla.errors import UserError
from nanomla.formats.folder import tokenizer_files
from nanomla.text import StreamDecoder
from nanomla.tokenizer import (
    Tokenizer,
    check_spec,
    end_of_text,
    ends_of_text,
    read_hf,
    same_ids,
    start_of_text,
)

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


def added(id, content, special=False):
    """An entry of a tokenizer.json's added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, **flags, "special": special}


def with_added(made, *contents, bytes_too=False):
    """A tokenizer with further tokens and, if asked, its bytes among the added ones, as llama's."""
    from tokenizers import Tokenizer as HF

    content = json.loads(made.to_str())
    content["truncation"] = None
    vocab = content["model"]["vocab"]
    if bytes_too:
        names = [name for name in vocab if name.startswith("<0x")]
        content["added_tokens"] += [added(vocab[name], name) for name in names]
    content["added_tokens"] += [added(len(vocab) + i, name) for i, name in enumerate(contents)]
    return HF.from_str(json.dumps(content))


def metaspace():
    """A Unigram model with ▁ for spaces and bytes for unknown characters, as T5 and Gemma have."""
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models, pre_tokenizers

    pieces = ["<unk>", *(f"<0x{b:02x}>" for b in range(256)), "▁", "▁to", "be", "o", "t", "ö", "▁▁"]
    made = HF(models.Unigram([(piece, -1.0) for piece in pieces], 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")]
    made.decoder = decoders.Sequence(steps)
    return made


@pytest.mark.parametrize(
    "theirs",
    [
        with_added(sentencepiece(), "<|im_end|>", "▁▁", "<0x4>", "日▁本", bytes_too=True),
        with_added(byte_level(), "<pad>", "日本", "  ", "<0x41>", "\n\n", "Ġ日"),
        with_added(metaspace(), "<|end|>", "▁▁▁", "a▁b"),
    ],
    ids=["sentencepiece", "byte level", "metaspace"],
)
def test_ids_decode_as_by_the_tokenizers_library(theirs):
    """
    Every id between two others, whose bytes are whole, and texts drawn from all of them; added
    tokens are bytes, spaces or names as they are there. Streamed or at once is the same.
    """
    ours = Tokenizer({"kind": "hf", "json": theirs.to_str()})
    special = {i for i, token in theirs.get_added_tokens_decoder().items() if token.special}
    [x] = [id for id in range(ours.vocab_size) if theirs.id_to_token(id) == "be"] or [40]
    draw = random.Random(0)
    texts = [[x, id, x] for id in range(ours.vocab_size)]
    for _ in range(300):
        ids = [x]
        for _ in range(draw.randint(1, 9)):
            character = [theirs.token_to_id(f"<0x{b:02X}>") for b in draw.choice("aé日🙂").encode()]
            if None in character or draw.random() < 0.7:
                character = [draw.randrange(ours.vocab_size)]
            ids += character
        texts.append([*ids, x])
    compared = 0
    for ids in texts:
        text = ours.decode(ids)
        decoder = StreamDecoder(ours)
        assert "".join(decoder.push(id) for id in ids) + decoder.finish() == text
        if "\ufffd" not in text and not special & {*ids}:  # of broken bytes the library marks more
            assert text == theirs.decode(ids, skip_special_tokens=False), ids
            compared += 1
    assert compared > ours.vocab_size / 2
    for id in special:
        assert ours.decode([id]) == theirs.id_to_token(id)


def test_a_word_that_was_added_is_its_letters():
    """The library takes é for a byte where a whole word was added; the text is what was meant."""
    theirs = with_added(byte_level(), "café")
    ours = Tokenizer({"kind": "hf", "json": theirs.to_str()})
    assert ours.decode(ours.encode("to café é")) == "to café é"
    assert theirs.decode(theirs.encode("café").ids) == "caf\ufffd"


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
    ("settings", "generation", "ids", "ends"),
    [
        ({"eos_token_id": 0, "bos_token_id": 3}, None, {"end": 0, "bos": 3}, (0,)),
        ({"eos_token_id": [5, 0], "bos_token_id": None}, None, {"end": [5, 0]}, (5, 0)),
        ({"eos_token_id": 5}, {"eos_token_id": [0, 5, 9]}, {"end": [5, 0, 9]}, (5, 0, 9)),
        ({}, {"eos_token_id": 7, "bos_token_id": 3}, {"end": 7, "bos": 3}, (7,)),
        ({"eos_token_id": [280, 2]}, {"eos_token_id": 2}, {"end": 2}, (2,)),
        ({"eos_token_id": 280, "bos_token_id": -1}, {"eos_token_id": [True, "5"]}, {}, ()),
    ],
)
def test_where_a_text_begins_and_ends(tmp_path, settings, generation, ids, ends):
    """All ids in config.json and generation_config.json, if the tokenizer has them."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    spec = read_hf(tmp_path / "tokenizer.json")
    assert spec == {"kind": "hf", "json": spec["json"], **ids}
    assert Tokenizer(spec) and ends_of_text(spec) == ends
    assert start_of_text(spec) == ids.get("bos") and end_of_text(spec) == next(iter(ends), None)
    assert same_ids(spec, {**spec, "end": 11}) and not same_ids(spec, {**spec, "json": "{}"})


def test_gpt2s_tokenizer_keeps_further_ends(tmp_path):
    """Settings' ends are the ends; a folder that names no other has the spec of data/."""
    gpt2 = {"kind": "tiktoken", "name": "gpt2"}
    for name, text in tokenizer_files(gpt2).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "config.json").write_text('{"eos_token_id": 50256}')
    assert read_hf(tmp_path / "tokenizer.json") == gpt2
    (tmp_path / "config.json").write_text("{}")
    assert read_hf(tmp_path / "tokenizer.json") == gpt2
    (tmp_path / "config.json").write_text('{"eos_token_id": 13}')
    assert ends_of_text(read_hf(tmp_path / "tokenizer.json")) == (13,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 50256}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [198, 50256]}')
    spec = read_hf(tmp_path / "tokenizer.json")
    assert spec == {**gpt2, "end": [50256, 198]} and ends_of_text(spec) == (50256, 198)


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
        ({"kind": "byte", "end": [0, -1]}, "end=[0, -1] does not work: end must be the id that"),
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
