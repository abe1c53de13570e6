"""A conversation with a language model, by its tokenizer's chat template."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from chiaroscuro.analysis.routing import refuse_broken_text
from chiaroscuro.analysis.sampling import how_to_sample, refuse_broken_logits, refuse_impossible
from chiaroscuro.errors import UserError, one_line
from chiaroscuro.model.loading import longest_sequence


class Conversation:
    """What was said so far, and what the model says next.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer, which has a chat template.
        system: what the model is told beforehand; nothing if it is empty.
        max_new_tokens: of a reply, at most.
        temperature: as of `continue_text`.
        top_k: likewise.
        seed: of the sampling of the first reply; each next one has the next seed.

    Raises:
        UserError: the tokenizer has no chat template, or one that knows no system's role; or an option is impossible.

    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str = "",
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_k: int = 50,
        seed: int = 0,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "this model's tokenizer has no chat template, so it was trained on plain text: chiaroscuro generate "
                "continues one"
            )
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.sampled = how_to_sample(temperature, top_k)
        refuse_impossible(max_new_tokens, seed)
        self.max_new_tokens = max_new_tokens
        self.system = system
        self.clear()
        if system:
            self._as_template([*self.messages, {"role": "user", "content": "Hello."}], tokenize=False)

    def _as_template(self, messages: list[dict[str, str]], **how: Any) -> Any:
        """The messages by the tokenizer's template, which may refuse a role or an order; or an error."""
        try:
            return self.tokenizer.apply_chat_template(messages, **how)
        except Exception as error:  # a template is a program, which fails as its author made it
            raise UserError(f"the model's chat template refuses the conversation: {one_line(error)}") from None

    def clear(self) -> None:
        """Forget what was said, but not what the model was told beforehand."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def reply(self, text: str, show: Callable[[str], None]) -> str:
        """What the model says to a text, shown in pieces as they come. It is remembered, as the text is.

        Raises:
            UserError: the text is empty or no Unicode, or there is no room for it. Nothing is remembered then.

        """
        refuse_broken_text(text)
        if not text:
            raise UserError("the text is empty: say something")
        messages = [*self.messages, {"role": "user", "content": text}]
        given: Any = self._as_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = given["input_ids"].to(self.model.device)
        longest, time = longest_sequence(self.model.config), ids.shape[1]
        if time >= longest:
            raise UserError(f"the conversation has {time} tokens and the model reads {longest}: begin a new one")
        set_seed(self.seed)
        generating: Any = self.model
        with torch.inference_mode():
            whole = generating.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(self.max_new_tokens, longest - time),
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=_Pieces(self.tokenizer, show),
                logits_processor=LogitsProcessorList([refuse_broken_logits]),
                **self.sampled,
            )
        said = str(self.tokenizer.decode(whole[0, time:], skip_special_tokens=True))
        self.messages = [*messages, {"role": "assistant", "content": said}]
        self.seed += 1
        return said


class _Pieces(TextStreamer):
    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)
