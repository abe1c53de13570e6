"""`check_model` lets all that is built in pass, and finds whatever an extension can do wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor

from chiaroscuro import (
    ChiarConfig,
    ChiarForCausalLM,
    UserError,
    calibrate,
    check_model,
    register_operator,
    register_router,
)
from chiaroscuro.layers import Context, Decision, Operator, OperatorState, PackedTokens, Router, ScoreRouter
from chiaroscuro.layers.registry import OPERATORS, ROUTERS

FIELDS: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "window": 4,
    "sinks": 1,
    "meta_router": "none",
}


def build(**changes: Any) -> ChiarForCausalLM:
    torch.manual_seed(0)
    return ChiarForCausalLM(ChiarConfig(**FIELDS | changes))


pytestmark = pytest.mark.usefixtures("registries_as_before")


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_every_operator_passes(operator: str, norm: str) -> None:
    menus = [[operator], ["attention"] if operator == "attention" else [operator, "attention"]]
    check_model(build(operators=menus, norm=norm, short_conv=3))


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"fitted"}))
def test_every_router_passes(router: str) -> None:
    context = "routed" if issubclass(ROUTERS[router], ScoreRouter) else "all"
    check_model(build(operators=[["dct", "conv", "attention"]] * 2, router=router, attention_context=context))


@pytest.mark.parametrize("operator", ["rbf", "attention"])
@pytest.mark.parametrize("router", ["random", "norm", "learned"])
def test_what_is_routed_is_cached_for_a_row_alone(operator: str, router: str) -> None:
    model = build(operators=[["conv", operator]] * 2, router=router, attention_context="routed", attention_share=0.5)
    check_model(model)
    prompt = torch.randint(60, (1, 12), generator=torch.Generator().manual_seed(1))
    model.eval()
    calibrate(model, [prompt.repeat(2, 1)])
    answers = [
        model.generate(prompt, max_new_tokens=20, pad_token_id=0, do_sample=False, use_cache=c) for c in (True, False)
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("heads", [1, 2])
def test_who_is_kept_passes(heads: int) -> None:
    kv_router = {"learned": {"heads": heads}}
    check_model(build(operators=[["local", "attention"]] * 2, attention_context="kept", kv_router=kv_router))


class Broken(Operator):
    """What each of the others does not get wrong."""

    separates_documents = True

    def mix(self, x: Tensor, context: Context) -> Tensor:
        return x

    def new_cache(self) -> Any:
        return None


class Future(Broken):
    def mix(self, x: Tensor, context: Context) -> Tensor:
        return x + x.roll(-1, 1)


class AcrossRows(Broken):
    def mix(self, x: Tensor, context: Context) -> Tensor:
        return x - x.mean(0)


class Padding(Broken):
    def mix(self, x: Tensor, context: Context) -> Tensor:
        return x.cumsum(1)  # of what stands at padding, too


class Packed(Broken):
    def mix_packed(self, x: Tensor, tokens: PackedTokens, context: Context) -> Tensor:
        return 2 * tokens.take(x)


class Nothing(OperatorState):
    def select(self, rows: Tensor) -> None: ...


class Cached(Broken):
    """Forgets what it has seen."""

    separates_documents = False

    def mix(self, x: Tensor, context: Context) -> Tensor:
        real = context.real(x.shape[1])
        return (x if real is None else x * real[..., None]).cumsum(1)

    def new_cache(self) -> Any:
        return Nothing()


class Sum(OperatorState):
    total: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        self.total = None if self.total is None else self.total[rows]


class Alone(Cached):
    """Forgets what it has seen where one token of one row comes alone."""

    def mix(self, x: Tensor, context: Context) -> Tensor:
        total, state = super().mix(x, context), context.state
        if state is not None:
            if state.total is not None and x.shape[:2] != (1, 1):
                total = total + state.total[:, None]
            state.total = total[:, -1]
        return total

    def new_cache(self) -> Any:
        return Sum()


class Documents(Cached):
    """Says that it keeps documents apart, and does not."""

    separates_documents = True

    @classmethod
    def uncacheable(cls, options: Any) -> str:
        return "is not asked to be"


class NotANumber(Broken):
    def mix(self, x: Tensor, context: Context) -> Tensor:
        return x * torch.nan


@pytest.mark.parametrize(
    ("cls", "complaint"),
    [
        (Future, r"a token sees later ones, from token \d on: layer 1, menu \['odd'"),
        (AcrossRows, r"a row depends on the other rows of its batch: layer 1, menu \['odd'"),
        (Padding, r"padding on the left changes a row: layer 1, menu \['odd'"),
        (Packed, r"sparse execution is not the dense one: layer 1, menu \['odd', 'attention'\], gives something else"),
        (Cached, r"a cache changes what is computed token by token: layer 1, menu \['odd'"),
        (Alone, r"a cache changes what is computed token by token of a row alone: layer 1, menu \['odd'"),
        (Documents, r"a document sees the one before it in its row: layer 1, menu \['odd'"),
        (NotANumber, r"not finite|a row depends .* by nan"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_what_an_operator_does_wrong_is_found(cls: Any, complaint: str, alone: bool) -> None:
    register_operator("odd", cls)
    menu = ["odd"] if alone else ["odd", "attention"]
    model = build(operators=[["attention"], menu], router="norm")
    if alone and cls is Packed:  # a layer of one operator packs what padding leaves
        complaint = "padding on the left changes a row"
    with pytest.raises(UserError, match=complaint):
        check_model(model)


class FutureRouter(ScoreRouter):
    scores_entropy = False

    def score(self, x: Tensor, entropy: Tensor, context: Context) -> Tensor:
        return x.detach()[..., 0].roll(-1, 1).float()


class OfTheRow(Router):
    """Attention for tokens whose first feature is above the mean of the row: a choice that waits for all of it."""

    def forward(self, x: Tensor, entropy: Tensor, context: Context | None = None) -> Decision:
        first = x.detach()[..., 0]
        return Decision((first > first.mean(1, keepdim=True)).long())


class OfTheBatch(OfTheRow):
    def forward(self, x: Tensor, entropy: Tensor, context: Context | None = None) -> Decision:
        first = x.detach()[..., 0]
        return Decision((first > first.mean()).long())


@pytest.mark.parametrize(
    ("cls", "complaint"),
    [
        (FutureRouter, "a token sees later ones"),
        (OfTheRow, "a token sees later ones"),
        (OfTheBatch, "a row depends on the other rows of its batch"),
    ],
)
def test_what_a_router_does_wrong_is_found(cls: Any, complaint: str) -> None:
    register_router("odd", cls)
    with pytest.raises(UserError, match=rf"{complaint}.*: layer 0, menu \['dct', 'attention'\]"):
        check_model(build(operators=[["dct", "attention"]] * 2, router="odd"))


@pytest.mark.parametrize(
    ("pooling", "complaint"), [("batch", "a row depends on the other rows"), ("sequence", "a token sees later ones")]
)
def test_the_documented_modes_that_see_more_are_found(pooling: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_model(build(operators=[["dct", "attention"]] * 2, meta_router=pooling))


def test_the_model_stays_as_it_was() -> None:
    model = build(operators=[["dct", "attention"]] * 2).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_model(model)
    assert model.training and model.dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"length": 5}, "length=5: need 12 tokens or more"), ({"length": 41}, "at most max_position_embeddings=40")],
)
def test_mistakes(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_model(build(), **options)
    with pytest.raises(UserError, match="takes a model of chiaroscuro, not a Linear"):
        check_model(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
