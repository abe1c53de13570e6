"""What everything else relies on, checked of a model on random tokens: for operators and routers of one's own."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chiaroscuro.errors import UserError
from chiaroscuro.layers.operator import is_whole
from chiaroscuro.model.cache import CACHE, ChiarCache
from chiaroscuro.model.calibration import calibrate
from chiaroscuro.model.modeling import ChiarPreTrainedModel

TOLERANCE = 1e-5
"""Of the largest number that a layer gives. Everything is in float64, but scores are float32."""

MOVED = 0.05
"""Standard deviation of what is added to the weights."""

States = Sequence[Tensor]
"""The embeddings, and what each layer gives, (B, T, d) each."""


@torch.no_grad()
def check_model(model: ChiarPreTrainedModel, *, length: int = 24, seed: int = 0) -> None:
    """Check on random tokens that a model does what training, batches and generation rely on.

    - A row of a batch does not depend on the others.
    - A token does not depend on later ones.
    - Padding, on the left or on the right, changes nothing for real tokens.
    - Sparse execution gives what dense execution gives.
    - Continued from a cache, in pieces of several lengths, it gives what one forward gives; if it can be cached.
    - Documents in a row, whose positions restart, do not see each other; if its operators keep them apart.

    A copy is checked, in float64 and in evaluation mode. Its weights are moved a little first, so that those which
    begin at zero take part, and it is calibrated on the tokens, so that layers that choose by a score do choose. Each
    layer's output is compared, so that the first layer that fails is named.

    Args:
        model: one with operators or routers that are to be checked on its menus.
        length: T, at most the longest sequence of the model.
        seed: of the tokens.

    Raises:
        UserError: what does not hold, in which layer, and by how much; or the model is none of ours.

    """
    if not isinstance(model, ChiarPreTrainedModel):
        raise UserError(f"check_model takes a model of chiaroscuro, not a {type(model).__name__}")
    longest = model.config.max_position_embeddings
    if not is_whole(length) or not 12 <= length <= longest:
        raise UserError(f"length={length!r}: need 12 tokens or more, and at most max_position_embeddings={longest}")
    checked = _Checked(model, length, seed)
    checked.rows()
    checked.causality()
    checked.padding()
    checked.execution()
    checked.cache()
    checked.documents()


class _Checked:
    """A copy of a model, and the tokens that it is checked on; arguments as of `check_model`."""

    def __init__(self, model: ChiarPreTrainedModel, length: int, seed: int) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.config = self.model.config
        self.length = length
        self.generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(self.config.vocab_size, (4, length), generator=self.generator).to(model.device)
        for parameter in self.model.parameters():
            moved = torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64)
            parameter.add_(MOVED * moved.to(parameter.device))
        found = [*self.model.thresholds().values(), *self.model.kv_thresholds().values()]
        if any(thresholds.running for thresholds in found):
            calibrate(self.model, [self.ids])
        self.whole = self.states(self.ids)

    def states(self, ids: Tensor, **more: Any) -> States:
        """What the layers give."""
        given = {"use_cache": False} | more
        return self.model.trunk(input_ids=ids, output_hidden_states=True, **given).hidden_states

    def compare(self, ours: States, expected: States, complaint: str) -> None:
        """Raise a UserError that begins with the complaint, if what a layer gives is not what is expected of it."""
        for i, (found, wanted) in enumerate(zip(ours, expected, strict=True)):
            if found.numel() == 0:
                continue
            by = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
            if not by <= TOLERANCE:  # NaN is no match
                place = f"layer {i - 1}, menu {self.config.menus[i - 1]}," if i else "the embedding"
                raise UserError(f"{complaint}: {place} gives something else, by {by:.1g} of its largest number")

    def rows(self) -> None:
        """Each row alone."""
        for n in range(len(self.ids)):
            alone = self.states(self.ids[n : n + 1])
            self.compare(alone, _part(self.whole, n), "a row depends on the other rows of its batch")

    def causality(self) -> None:
        """The first row, with all tokens from some place on changed: every place is a row of a batch."""
        ids = self.ids[:1].repeat(self.length, 1)
        later = torch.arange(self.length, device=ids.device) >= torch.arange(self.length, device=ids.device)[:, None]
        changed = self.states(torch.where(later, (ids + 1) % self.config.vocab_size, ids))
        for t in range(1, self.length):
            earlier = slice(0, t)
            ours, expected = (_part(states, n, earlier) for states, n in ((changed, t), (self.whole, 0)))
            self.compare(ours, expected, f"a token sees later ones, from token {t} on")

    def padding(self) -> None:
        """The first row, shorter than the one beside it, padded on either side."""
        short = self.length - 5
        alone = self.states(self.ids[:1, :short])
        for side, begin in (("left", 5), ("right", 0)):
            mask = torch.ones_like(self.ids[:2], dtype=torch.bool)
            mask[0] = False
            mask[0, begin : begin + short] = True
            ids = self.ids[:2].clone()
            ids[0] = 0
            ids[0, begin : begin + short] = self.ids[0, :short]
            padded = self.states(ids, attention_mask=mask.long())
            self.compare(_part(padded, 0, slice(begin, begin + short)), alone, f"padding on the {side} changes a row")

    def execution(self) -> None:
        """Sparse and dense, where both are possible."""
        if not self.config.router_class.one_operator_per_token:
            return
        before = [block.execution for block in self.model.trunk.blocks]
        found = {}
        for execution in ("dense", "sparse"):
            for block in self.model.trunk.blocks:
                block.execution = execution
            found[execution] = self.states(self.ids)
        for block, own in zip(self.model.trunk.blocks, before, strict=True):
            block.execution = own
        self.compare(found["sparse"], found["dense"], "sparse execution is not the dense one")

    def cache(self) -> None:
        """In pieces, token by token too."""
        if self.config.uncacheable():
            return
        for pieces in ([1] * self.length, [5, 1, 3, self.length - 9]):
            for rows in (len(self.ids), 1):  # one row alone goes another way
                cache, parts = ChiarCache(self.config), []
                for piece in self.ids[:rows].split(pieces, dim=1):
                    parts.append(self.states(piece, **{CACHE: cache}, use_cache=True))
                ours = [torch.cat(layer, 1) for layer in zip(*parts, strict=True)]
                how = ("token by token" if pieces[0] == 1 else "in pieces") + (" of a row alone" if rows == 1 else "")
                self.compare(ours, _part(self.whole, slice(0, rows)), f"a cache changes what is computed {how}")

    def documents(self) -> None:
        """Two documents in each row, and each alone."""
        blocks = self.model.trunk.blocks
        if not all(unit.operator.separates_documents for block in blocks for unit in block.units):
            return
        first = self.length // 3
        lengths = (first, self.length - first)
        places = torch.cat([torch.arange(n) for n in lengths]).expand_as(self.ids).to(self.ids.device)
        together = self.states(self.ids, position_ids=places)
        for span in (slice(0, first), slice(first, self.length)):
            alone = self.states(self.ids[:, span])
            self.compare(_part(together, slice(None), span), alone, "a document sees the one before it in its row")


def _part(states: States, row: int | slice, time: slice = slice(None)) -> States:
    """Some tokens of some rows."""
    rows = slice(row, row + 1) if isinstance(row, int) else row
    return [state[rows, time] for state in states]
