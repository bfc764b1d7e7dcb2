"""Tokenizers and streamed text. Run: python -m pytest tests/test_tokenizer.py"""

import json

import pytest
import torch

from nanomla.errors import UserError
from nanomla.text import StreamDecoder
from nanomla.tokenizer import (
    Tokenizer,
    check_spec,
    end_of_text,
    read_hf,
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
    )  # fmt: skip
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
    }  # fmt: skip
    return HF.from_str(json.dumps(content))


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
    assert ours.token_bytes(-1) == ours.token_bytes(280) == b""
    assert end_of_text(ours.spec) == 0 and end_of_text({"kind": "char", "chars": "a"}) is None
    assert end_of_text({"kind": "tiktoken", "name": "gpt2"}) == 50256 and end_of_text(None) is None


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
    ("settings", "found"),
    [
        ({}, {}),
        ({"eos_token_id": 0, "bos_token_id": 3}, {"end": 0, "bos": 3}),
        ({"eos_token_id": [5, 0], "bos_token_id": None}, {"end": 5}),
        ({"eos_token_id": 280, "bos_token_id": -1}, {}),
        ({"eos_token_id": [], "bos_token_id": "0"}, {}),
    ],
)
def test_where_a_text_begins_and_ends(tmp_path, settings, found):
    """The ids in config.json, if the tokenizer has them."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    spec = read_hf(tmp_path / "tokenizer.json", settings)
    assert spec == {"kind": "hf", "json": spec["json"], **found}
    assert start_of_text(spec) == found.get("bos") and end_of_text(spec) == found.get("end")
    assert start_of_text({"kind": "tiktoken", "name": "gpt2"}) == 50256


def bpe(vocab='{"a": 0}', **fields):
    """The text of a tokenizer.json with this vocabulary."""
    rest = json.dumps({"decoder": {"type": "ByteLevel"}, **fields})[1:]
    return f'{{"model": {{"type": "BPE", "vocab": {vocab}, "merges": []}}, {rest}'


FILE = "tokenizer.json cannot be read"
NOT_HF = "tokenizer.json: not a tokenizer of Hugging Face"
STRANGE = [  # a spec, and what the error says of it
    (None, "unknown tokenizer None; known kinds: char, byte"),
    ("byte", "unknown tokenizer 'byte'"),
    ([], "unknown tokenizer []"),
    ({}, "unknown tokenizer {}"),
    (10**5000, "unknown tokenizer of type int"),
    (float("nan"), "unknown tokenizer nan"),
    ({"kind": None}, "unknown tokenizer"),
    ({"kind": "runes"}, "unknown tokenizer {'kind': 'runes'}"),
    ({"kind": "a\n" * 10_000}, "unknown tokenizer"),
    ({"kind": ["char"] * 10_000}, "unknown tokenizer"),
    ({"kind": {"kind": "char"}}, "unknown tokenizer"),
    ({"kind": torch.ones(9, 9)}, "unknown tokenizer"),
    ({"kind": json.loads("[" * 900 + "]" * 900)}, "unknown tokenizer"),
    ({"kind": b"byte"}, "unknown tokenizer"),
    ({"kind": "char"}, "chars must be a text that has every character once, not None"),
    ({"kind": "char", "chars": ["a", "b"]}, "chars must be a text"),
    ({"kind": "char", "chars": {"a": 0}}, "chars must be a text"),
    ({"kind": "char", "chars": b"ab"}, "chars must be a text"),
    ({"kind": "char", "chars": 10**5000}, "chars must be a text"),
    ({"kind": "char", "chars": ""}, "chars must be a text"),
    ({"kind": "char", "chars": "aba"}, "chars must be a text"),
    ({"kind": "char", "chars": "ab" * 10_000_000}, "chars must be a text"),
    ({"kind": "char", "chars": "ab", "ids": {"a": 0}}, "there is no field 'ids'"),
    ({"kind": "byte", "chars": "ab"}, "there is no field 'chars'"),
    ({"kind": "byte", None: 5}, "there is no field None"),
    ({"kind": "tiktoken"}, "name must be an encoding, one of gpt2, cl100k_base"),
    ({"kind": "tiktoken", "name": ["gpt2"]}, "not ['gpt2']"),
    ({"kind": "tiktoken", "name": {"gpt2"}}, "not {'gpt2'}"),
    ({"kind": "tiktoken", "name": "p50k\n"}, "not 'p50k\\n'"),
    ({"kind": "tiktoken", "name": "../../gpt2"}, "name must be an encoding"),
    ({"kind": "hf"}, "json must be the text of a tokenizer.json"),
    ({"kind": "hf", "json": 7}, "json must be"),
    ({"kind": "hf", "json": {"model": {}}}, "json must be"),
    ({"kind": "hf", "json": b"{}"}, "json must be"),
    ({"kind": "hf", "json": bpe(), "end": "0"}, "end must be the id of a token, not '0'"),
    ({"kind": "hf", "json": bpe(), "bos": -1}, "bos must be the id of a token"),
    ({"kind": "hf", "json": bpe(), "bos": 0.0}, "bos must be the id of a token"),
    ({"kind": "hf", "json": bpe(), "end": True}, "end must be the id of a token"),
    ({"kind": "hf", "json": bpe(), "end": [0]}, "end must be the id of a token"),
    ({"kind": "hf", "json": bpe(), "end": 10**5000}, "end must be the id of a token"),
    ({"kind": "hf", "json": bpe(), "bos": 1}, "bos is none of its 1 ids"),
]
STRANGE_FILES = [  # the content of a tokenizer.json
    ("", "tokenizer.json: cannot be read"),
    ("null", "no JSON object"),
    ("[]", "no JSON object"),
    ("[" * 100_000, "nested too deeply"),
    ('{"model": 1' + "0" * 5000 + "}", "tokenizer.json: cannot be read"),
    ("{}", NOT_HF),
    ('{"model": []}', NOT_HF),
    ('{"model": {"type": "Magic"}}', NOT_HF),
    ('{"model": {"type": "BPE"}}', NOT_HF),
    (bpe("5"), NOT_HF),
    (bpe("{}"), "its ids are not whole numbers"),
    (bpe('{"a": -1}'), "its ids are not whole numbers"),
    (bpe('{"a": 99999999999999999999}'), "its ids are not whole numbers"),
    (bpe('{"a": 0, "b": "1"}'), "its ids are not whole numbers"),
    (bpe('{"a": 0, "b": 1.0}'), "its ids are not whole numbers"),
    (bpe('{"a": 0, "b": true}'), "its ids are not whole numbers"),
    (bpe('{"a": 0, "b": [1]}'), "its ids are not whole numbers"),
    (bpe('{"a": 0, "b": NaN}'), "its ids are not whole numbers"),
    (bpe(added_tokens=7), NOT_HF),
    (bpe(added_tokens=[7]), NOT_HF),
    (bpe(added_tokens=[{"content": "x"}]), NOT_HF),
    (bpe(added_tokens=[{"id": None}]), "its ids are not whole numbers"),
    (bpe(added_tokens=[{"id": 1}]), FILE),
    (bpe('{"\\ud800": 0}'), FILE),
    (bpe(decoder={"type": "Sequence"}), FILE),
    (bpe(decoder=[]), FILE),
    (bpe(normalizer={"type": "Magic"}), FILE),
    (bpe(normalizer={"type": "Precompiled", "precompiled_charsmap": [1]}), FILE),  # a panic
    (bpe(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}), FILE),
    (bpe('{"a": 0}', model={"type": "BPE", "vocab": ["a"], "merges": []}), FILE),
]


@pytest.mark.parametrize(("spec", "words"), STRANGE, ids=range(len(STRANGE)))
def test_a_strange_spec_is_one_line(spec, words):
    """It is refused before anything is built from it, with the file or checkpoint it was in."""
    for make in (Tokenizer, lambda *args: check_spec(*args, 99)):
        with pytest.raises(UserError) as caught:
            make(spec, "runs/ckpt.pt")
        line = str(caught.value)
        assert line.startswith("runs/ckpt.pt: ") and words in line
        assert "\n" not in line and len(line) < 250


@pytest.mark.parametrize(("text", "words"), STRANGE_FILES, ids=range(len(STRANGE_FILES)))
def test_a_strange_tokenizer_json_is_one_line(tmp_path, text, words):
    """In a checkpoint and as a file, which the error names."""
    (tmp_path / "tokenizer.json").write_text(text)
    for make in (
        lambda: Tokenizer({"kind": "hf", "json": text}, str(tmp_path)),
        lambda: Tokenizer(read_hf(tmp_path / "tokenizer.json", {}), str(tmp_path)),
    ):
        with pytest.raises(UserError) as caught:
            make()
        line = str(caught.value)
        assert line.startswith(str(tmp_path)) and words in line, line
        assert "\n" not in line and len(line) < 400


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "char", "chars": "a\udcff\ud83d"},
        {"kind": "byte"},
        {"kind": "tiktoken", "name": "gpt2"},
        {"kind": "hf", "json": byte_level().to_str()},
    ],
    ids=lambda spec: spec["kind"],
)
def test_a_text_that_is_no_text(spec):
    """Half a surrogate pair is the same line in every kind."""
    tokenizer = Tokenizer(spec)
    assert tokenizer.encode("a")
    for text, bad in (("a\udcff", r"\\udcff"), ("a\ud83d", r"\\ud83d")):
        with pytest.raises(UserError, match=f"not UTF-8: it has '{bad}' at character 1"):
            tokenizer.encode(text)


def test_what_the_library_cannot_encode_is_one_line():
    """A vocabulary of words without a word for unknown ones, and a panic."""
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    made = {"model": words, "decoder": {"type": "Fuse"}}
    tokenizer = Tokenizer({"kind": "hf", "json": json.dumps(made)})
    assert tokenizer.encode("a") == [0]
    with pytest.raises(UserError, match="tokenizer.json cannot encode this text .*UNK"):
        tokenizer.encode("b")


def test_ids_beyond_the_models_count_with_added_tokens():
    """Their names in a prompt would be ids that the model does not have."""
    made = byte_level()
    made.add_tokens(["<pad>"])
    spec = {"kind": "hf", "json": made.to_str()}
    check_spec(spec, "x", 281)
    assert Tokenizer(spec).encode("<pad>") == [280]
    with pytest.raises(UserError, match="x: the tokenizer has ids up to 280"):
        check_spec(spec, "x", 280)


def test_json_that_is_too_large_or_too_deep_is_one_line(tmp_path, monkeypatch):
    """Nothing of a file is read that is larger than any tokenizer's."""
    monkeypatch.setattr("nanomla.tokenizer.LARGEST_JSON", 200_000)
    for text, words in (("[" * 150_000, "nested too deeply"), ("[" * 200_001, "larger than")):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            read_hf(tmp_path / "tokenizer.json", {})
        assert str(caught.value).startswith(f"{tmp_path}/tokenizer.json: cannot be read")
    with pytest.raises(UserError, match="json must be the text of"):
        Tokenizer({"kind": "hf", "json": " " * 200_001})


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ({"kind": "char", "chars": "abc"}, 3),
        ({"kind": "byte"}, 256),
        ({"kind": "tiktoken", "name": "gpt2"}, 50257),
        ({"kind": "tiktoken", "name": "cl100k_base"}, 100277),
        ({"kind": "hf", "json": byte_level().to_str()}, 280),
    ],
)
def test_a_model_knows_all_ids_of_its_tokenizer(spec, size):
    """It may know more, as a padded vocabulary does; and the size is that of the tokenizer."""
    check_spec(spec, "x", size)
    check_spec(spec, "x", size + 40)
    with pytest.raises(UserError, match=f"ids up to {size - 1}, .* vocab_size={size - 1};"):
        check_spec(spec, "x", size - 1)
    assert Tokenizer(spec).vocab_size == size


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_a_decoder_whose_tokens_have_no_bytes_is_refused(decoder):
    """Without bytes of every token there is no stream of text."""
    content = {**json.loads(byte_level().to_str()), "decoder": decoder}
    with pytest.raises(UserError, match="the decoder .* is not supported, only ByteLevel"):
        Tokenizer({"kind": "hf", "json": json.dumps(content)})
