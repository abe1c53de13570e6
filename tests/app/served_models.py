"""A retrofitted decoder to look into."""

from typing import Any

import torch

from byte_tokenizer import byte_tokenizer
from chiaroscuro import fit, retrofit
from chiaroscuro.app.served import Served
from decoders import build


def retrofitted(router: Any = "fitted") -> Served:
    tokenizer: Any = byte_tokenizer()
    model = build(
        vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    retrofit(model, window=8, sinks=1, attention_share=0.5, kv_share=0.25, router=router, kv_router="fitted")
    fit(model, [torch.randint(3, 200, (2, 128)) for _ in range(4)], look=0.5, kept=0.25, spread=False)
    return Served(model, tokenizer, "retrofitted")
