"""`chiaroscuro chat`, on a small decoder."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from chiaroscuro import UserError
from chiaroscuro.analysis.chatting import Conversation
from decoders import build

Run = Callable[..., tuple[int, str, str]]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def talking() -> tuple[Any, Any]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = build(vocab_size=len(tokenizer), max_position_embeddings=128, eos_token_id=None, pad_token_id=None)
    return model, tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model, tokenizer = talking()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_is_said_is_remembered_and_shown_in_pieces() -> None:
    model, tokenizer = talking()
    conversation = Conversation(model, tokenizer, system="Be brief.", max_new_tokens=6, temperature=0)
    pieces: list[str] = []
    first = conversation.reply("Hello", pieces.append)
    assert "".join(pieces) == first and len(pieces) > 1
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"]
    prompt = f"<system>Be brief.;<user>Hello;<assistant>{first};<user>And?;<assistant>"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert conversation.reply("And?", pieces.append) == tokenizer.decode(expected, skip_special_tokens=True)
    conversation.clear()
    assert [m["role"] for m in conversation.messages] == ["system"]


def test_a_message_without_room_is_not_remembered() -> None:
    model, tokenizer = talking()
    conversation = Conversation(model, tokenizer, max_new_tokens=2)
    with pytest.raises(UserError, match=r"the conversation has .* tokens and the model reads 128: begin a new one"):
        conversation.reply("a" * 200, print)
    assert conversation.messages == []
    conversation.reply("a", lambda piece: None)
    assert len(conversation.messages) == 2


def test_a_conversation_from_a_pipe(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n/clear\nHello\n/exit\nnever read\n"))
    code, out, err = run("chat", checkpoint, "--max-new-tokens", 5, "--temperature", 0)
    assert code == 0, err
    replies = out.split("\n")
    assert len(replies) == 3 and replies[0] == replies[1] and replies[2] == ""  # a new conversation, the same words


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "1e-9"], "temperature 1e-09"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--top-k", "-3"], "top-k"),
        (["--kv-share", "0.5"], "--kv-share needs a CHIAR-Former or a retrofitted model"),
        (["--history", "512"], "--history needs a CHIAR-Former or a retrofitted model"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_a_mistake_is_one_line(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], complaint: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    code, _, err = run("chat", checkpoint, *more)
    assert code == 2 and err.count("\n") == 1 and complaint in err


def test_a_template_that_knows_no_system_s_role(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    (checkpoint / "chat_template.jinja").write_text(refusing)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    code, _, err = run("chat", checkpoint, "--system", "Be brief.")
    assert code == 2 and err == "error: the model's chat template refuses the conversation: no system role\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert run("chat", checkpoint, "--max-new-tokens", 2)[0] == 0
    for broken in ("{{ 1 / 0 }}", "{{ messages + 1 }}"):
        (checkpoint / "chat_template.jinja").write_text(broken)
        code, _, err = run("chat", checkpoint, "--system", "Be brief.")
        assert code == 2 and "chat template refuses the conversation: " in err and err.count("\n") == 1


def test_an_input_that_is_no_text(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"h\xff\xfei\n"), "utf-8"))
    code, _, err = run("chat", checkpoint)
    assert code == 2 and err.startswith("error: the standard input is not UTF-8") and err.count("\n") == 1


def test_a_model_that_was_never_taught_to_talk(run: Run, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    build(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code, _, err = run("chat", tmp_path / "model")
    assert code == 2 and "has no chat template" in err and err.count("\n") == 1


def test_broken_weights_are_told(checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = talking()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        Conversation(model, tokenizer).reply("Hello", print)
