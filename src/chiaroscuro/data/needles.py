"""Rows of text in which something far matters: a number in a haystack that is asked for, and a passage said twice.

Perplexity on prose hardly shows whether a model still finds what is far away. These rows do, for any tokenizer: scores
of routers are fitted on some of them, and a retrofitted model is judged by others.

    haystack, in noise    The grass is green. … The pass key of Ada is 40712. … What is the pass key of Ada? … is 40712
    haystack, in text     … the same, in a passage of a text
    copy                  a passage of a text, and a part of it once more

Source: the passkey of Mohtashami and Jaggi, arXiv 2305.16300; with several keys, RULER's multi-key needle, 2404.06654.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from chiaroscuro.errors import UserError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
INTRODUCTION = (
    "There is important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n"
)
NAMES = ("Ada", "Alan", "Grace", "Kurt", "Emmy", "Carl", "Sofia", "Paul", "Mary", "John", "Rosa", "Hans")
DIGITS = 5


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        input_ids: the tokens.
        answer: how many tokens at the end only what is far tells, an answer or what is said again; 0 for a plain text.

    """

    input_ids: Int[Tensor, " length"]
    answer: int


class Haystack:
    """Draws rows of needles and copies for one tokenizer.

    Args:
        tokenizer: of the model.
        text: tokens of a text, from which passages are taken; None for noise alone.

    """

    def __init__(self, tokenizer: Any, text: Int[Tensor, " tokens"] | None = None) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.noise = self._ids(NOISE)

    def needle(self, length: int, depth: float, seed: int | str, *, keys: int = 1, in_text: bool = False) -> Row:
        """A row with one number, or several under names of which one is asked for.

        Args:
            length: tokens of the row, the answer included.
            depth: where the needle that is asked for stands, as a part of the haystack before it, from 0 to 1.
            seed: of the numbers, and of where the other needles stand.
            keys: needles.
            in_text: hidden in a passage of the text, and not in noise.

        Raises:
            UserError: the row is too short for that, or there is too little text.

        """
        if not 1 <= keys <= len(NAMES):
            raise UserError(f"{keys} needles: must be from 1 to {len(NAMES)}")
        random = Random(seed)
        names = random.sample(NAMES, keys)
        numbers = random.sample(range(10 ** (DIGITS - 1), 10**DIGITS), keys)
        of = [f" of {name}" if keys > 1 else "" for name in names]
        needles = [
            self._ids(f" The pass key{who} is {number}. Remember it. {number} is the pass key{who}. ")
            for who, number in zip(of, numbers, strict=True)
        ]
        question = self._ids(f"\nWhat is the pass key{of[0]}? The pass key{of[0]} is")
        answer = self._ids(f" {numbers[0]}")
        if self.tokenizer.unk_token_id in answer:
            raise UserError("the tokenizer does not know digits, so no number can be asked for: use one of a text")
        introduction = [] if in_text else self._ids(INTRODUCTION)
        rest = length - len(introduction) - sum(map(len, needles)) - len(question) - len(answer)
        if rest < 1:
            raise UserError(f"{length} tokens are too few for {keys} needles and a question: take {length - rest + 1}")
        hay = self._passage(rest, random) if in_text else (self.noise * (rest // len(self.noise) + 1))[:rest]
        depths = [depth] + [random.random() for _ in range(keys - 1)]
        row = list(introduction)
        before = 0
        for place, needle in sorted((int(part * rest), needle) for part, needle in zip(depths, needles, strict=True)):
            row += hay[before:place] + needle
            before = place
        row += hay[before:] + question + answer
        return Row(torch.tensor(row), len(answer))

    def copy(self, length: int, seed: int | str) -> Row:
        """A passage of the text, and after it a quarter of its length once more, from a place that is drawn."""
        random = Random(seed)
        again = length // 4
        passage = self._passage(length - again, random)
        start = random.randrange(max(1, (len(passage) - again) * 3 // 4))
        return Row(torch.tensor(passage + passage[start : start + again]), again)

    def passage(self, length: int, seed: int | str) -> Row:
        """A passage of the text."""
        return Row(torch.tensor(self._passage(length, Random(seed))), 0)

    def row(self, number: int, length: int, seed: int = 0, kind: int | None = None) -> Row:
        """Row `number` of an endless mixture.

        Of eight rows three are passages, one is a copy, and four are needles: two in noise, one in a passage, and one
        in a passage among three others.

        Args:
            number: which row, from 0.
            length: its tokens.
            seed: another one draws other rows.
            kind: which of the eight; by default they take turns.

        """
        # Words, and not numbers: those are for whoever asks for a needle, such as the rows that models are judged by.
        own, kind = f"row {number} of {seed}", number % 8 if kind is None else kind
        depth = Random(f"depth {own}").random()  # a draw apart: the names are drawn with `own`, and are not to tell it
        if kind in (0, 3, 6):
            return self.passage(length, own)
        if kind == 7:
            return self.copy(length, own)
        return self.needle(length, depth, own, keys=4 if kind == 5 else 1, in_text=kind in (2, 5))

    def mixture(self, rows: int, length: int, seed: int = 0) -> list[Int[Tensor, "1 length"]]:
        """The first rows of the mixture, as batches of one."""
        return [self.row(number, length, seed).input_ids[None] for number in range(rows)]

    def _passage(self, length: int, random: Random) -> list[int]:
        if self.text is None or len(self.text) < length:
            have = 0 if self.text is None else len(self.text)
            raise UserError(f"{have} tokens of text, too few for a passage of {length}: give a longer text")
        start = random.randrange(len(self.text) - length + 1)
        return self.text[start : start + length].tolist()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
