"""A routed model as it would be without its routing, whichever kind of routed model it is."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from chiaroscuro.model.full_attention import full_attention
from chiaroscuro.retrofitting.routed_model import RoutedModel


@contextmanager
def without_routing(model: Any) -> Iterator[None]:
    """Inside the block all tokens look far and all are kept.

    Args:
        model: a CHIAR-Former, for which this is `full_attention`, or a retrofitted model.

    """
    with ExitStack() as stack:
        if isinstance(model, RoutedModel):
            for reach in model.reaches.values():
                stack.enter_context(reach.as_whole(look=True, kept=True))
        else:
            stack.enter_context(full_attention(model))
        yield
