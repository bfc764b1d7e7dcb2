"""What is read from disk. Run: python -m pytest tests/test_files.py"""

import os

import pytest

from nanomla.errors import UserError
from nanomla.files import read_json


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"), (b"[1]", "no JSON object"), (b"null", "no JSON object"),
        (b'{"a": "\xff"}', "utf-8"), (b'{"a": ' + b"[" * 10**5, "nested too deeply"),
        (b'{"a": ' * 10**5, "nested too deeply"), (b'{"a": ' + b"1" * 9999 + b"}", "digits"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "larger than 0 MB"), (b"\x80\x04}", "utf-8"),
    ],
)  # fmt: skip
def test_bad_json_is_one_line(tmp_path, content, words):
    """Empty, damaged, too deep, too large: a UserError with the file's name."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    limit = 1000 if words.startswith("larger") else 10**6
    with pytest.raises(UserError, match=f"a.json: cannot be read .*{words}") as caught:
        read_json(path, limit)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_is_no_file_is_one_line(tmp_path):
    """A folder, a pipe, a name below a file, one that is too long, none; a file is read."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(str(tmp_path / "a.json")) == {"a": 1}
    for name, words in (
        ("folder", "it is a folder"), ("pipe", "it is no file"), ("a.json/b", "Not a directory"),
        ("x" * 999, "too long"), ("b.json", "no b.json in this folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            read_json(tmp_path / name)
        assert "\n" not in str(caught.value)
