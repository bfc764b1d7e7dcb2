"""What is read from and written to the disk. Run: python -m pytest tests/test_files.py"""

import json

import pytest

from nanomla import files
from nanomla.errors import UserError
from nanomla.files import json_text, read_json, replacing, write_text


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
