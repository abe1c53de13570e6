"""Options of a continuation that can't be."""

from typing import Any

import pytest

from chiaroscuro.analysis.chatting import Conversation
from chiaroscuro.analysis.sampling import continue_text
from chiaroscuro.errors import UserError


class Talker:
    """A tokenizer with a chat template, of which nothing more is asked."""

    chat_template = "{{ messages }}"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"top_k": -3}, "top_k -3: take a whole number"),
        ({"top_k": 2.5}, "top_k 2.5: take a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: take a whole number, 1 or more"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5"),
        ({"seed": -1}, "seed -1: take a whole number from 0"),
        ({"seed": 2**32}, "seed 4294967296: take a whole number from 0"),
        ({"temperature": -1}, "temperature -1"),
    ],
)
def test_impossible_options(options: dict[str, Any], complaint: str) -> None:
    nobody: Any = None
    with pytest.raises(UserError, match=complaint):
        continue_text(nobody, nobody, "Once", **options)
    talker: Any = Talker()
    with pytest.raises(UserError, match=complaint):
        Conversation(nobody, talker, **options)


def test_nothing_said_is_not_answered() -> None:
    nobody: Any = None
    talker: Any = Talker()
    conversation = Conversation(nobody, talker)
    with pytest.raises(UserError, match="the text is empty"):
        conversation.reply("", print)
    assert conversation.messages == []
