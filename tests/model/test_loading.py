"""A checkpoint's tokenizer: what is wrong with it is said in one line that says what to do, or the whole reason."""

from pathlib import Path

import pytest
from small_models import build, shrunk

from chiaroscuro import UserError
from chiaroscuro.model.loading import load_checkpoint_tokenizer


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no tokenizer: copy tokenizer\.json and tokenizer_config\.json .* GPT-2's"),
        # Of this alone transformers makes a tokenizer without a word in it.
        ({"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'}, "has no tokenizer: copy"),
        ({"tokenizer.json": '{"version":'}, "has no tokenizer that can be read: JSONDecodeError: Expecting value"),
        (
            {"tokenizer.json": '{"version": "1.0", "added_tokens": [], "post_processor": 1, "model": {"type": "BPE"}}'},
            "has no tokenizer that can be read: Exception: ",
        ),
        (
            {"vocab.txt": "light"},
            r"can be read: ValueError: Couldn't instantiate .* one of: \(1\) .*\(3\) .*sentencepiece",
        ),
    ],
    ids=["none", "settings alone", "cut short", "of no model", "of no kind"],
)
def test_a_tokenizer_that_is_none(tmp_path: Path, files: dict[str, str], message: str) -> None:
    build(shrunk("small")).save_pretrained(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)
