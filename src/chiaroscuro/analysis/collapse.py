"""Which operators of a menu are still in use when training is over.

The paper trains three operators, finds that one of them gets almost no tokens, and builds its model from the other two.
The records of a run tell whether that happened: each has the share of the tokens that every operator got. Thresholds
that follow the data fix these shares, so only soft or hard routing or fixed thresholds can collapse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chiaroscuro.errors import UserError

LAST_PART = 0.1
"""Of the records, those at the end that a final share is the mean of: a single batch would be noise."""


@dataclass(frozen=True)
class LayerCollapse:
    """One routed layer over training.

    Attributes:
        layer: Its number, from 1.
        operators: Its menu, in order of cost.
        share: Of each operator, in every record.
        utilisation: U = −Σ_k ḡ_k log ḡ_k / log K in every record, ḡ the shares of K operators: 1 if all get the same
            share, 0 if one gets all tokens.
        final_share: Mean share over the last tenth of the records.
        surviving: The operators whose final share is not below the floor.
    """

    layer: int
    operators: tuple[str, ...]
    share: list[list[float]]
    utilisation: list[float]
    final_share: list[float]
    surviving: tuple[str, ...]


@dataclass(frozen=True)
class CollapseTrace:
    """The routing of a run over its training.

    Attributes:
        steps: The step of every record.
        layers: The layers that have a choice.
        operators: All operators on their menus.
        share: Of each of these in every record, over all tokens of all routed layers.
        final_share: Mean over the last tenth of the records.
        collapsed: The operators that survive on no menu.
        floor: The share below which an operator counts as collapsed.
    """

    steps: list[int]
    layers: list[LayerCollapse]
    operators: tuple[str, ...]
    share: list[list[float]]
    final_share: list[float]
    collapsed: tuple[str, ...]
    floor: float

    def to_dict(self) -> dict[str, Any]:
        """The trace as plain data, ready for JSON."""
        return asdict(self)


def trace_collapse(records: Sequence[Mapping[str, Any]], floor: float = 0.01) -> CollapseTrace:
    """Follow the operators' shares over a run.

    Args:
        records: Of the run, oldest first. Those of training steps that have routing are used.
        floor: An operator with a smaller final share has collapsed.

    Raises:
        UserError: if no layer of the run had a choice, or a record is damaged.

    Source: arXiv 2606.08327, "operator collapse"; its regulariser rewards a large U.
    """
    looks = [record for record in of_training(records) if record.get("layers")]
    for look in looks:
        _refuse_damaged(look, looks[0])
    chosen = [i for i, layer in enumerate(looks[0]["layers"]) if len(layer["operators"]) > 1] if looks else []
    if not chosen:
        raise UserError("no layer of this run has a choice of operators, so none can collapse")
    layers = [_layer([look["layers"][i] for look in looks], floor) for i in chosen]
    operators = tuple(dict.fromkeys(name for layer in layers for name in layer.operators))
    share = np.mean(
        [
            [
                [at[layer.operators.index(name)] if name in layer.operators else 0.0 for name in operators]
                for at in layer.share
            ]
            for layer in layers
        ],
        axis=0,
    )
    alive = {name for layer in layers for name in layer.surviving}
    return CollapseTrace(
        steps=[look["step"] for look in looks],
        layers=layers,
        operators=operators,
        share=share.tolist(),
        final_share=_final(share),
        collapsed=tuple(name for name in operators if name not in alive),
        floor=floor,
    )


def of_training(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of training steps.

    Raises:
        UserError: one of them has no step, or is no record.

    """
    found = [record for record in records if not isinstance(record, Mapping) or record.get("kind") == "train"]
    for record in found:
        if not isinstance(record, Mapping) or not isinstance(record.get("step"), int):
            raise UserError(f"a record is damaged, for it has no step: {str(record)[:60]}")
    return found


def _refuse_damaged(look: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Refuse a record whose layers are not the first one's, or whose shares are not a number for each operator."""
    try:
        menus = [[(layer["layer"], list(layer["operators"])) for layer in each["layers"]] for each in (look, first)]
        shares = [layer["share"] for layer in look["layers"]]
        whole = all(
            len(share) == len(menu) > 0 and all(isinstance(part, (int, float)) for part in share)
            for share, (_, menu) in zip(shares, menus[0], strict=True)
        )
    except (TypeError, KeyError):
        whole = False
    if not whole or menus[0] != menus[1]:
        raise UserError(f"the record of step {look['step']} is damaged: its layers are not those of a run")


def utilisation(share: Sequence[float]) -> float:
    """−Σ_k ḡ_k log ḡ_k / log K for two or more shares, with 0 log 0 = 0."""
    return sum(-part * math.log(part) for part in share if part > 0) / math.log(len(share))


def _layer(looks: Sequence[Mapping[str, Any]], floor: float) -> LayerCollapse:
    operators, share = tuple(looks[0]["operators"]), [list(look["share"]) for look in looks]
    final = _final(np.array(share))
    return LayerCollapse(
        layer=looks[0]["layer"],
        operators=operators,
        share=share,
        utilisation=[utilisation(at) for at in share],
        final_share=final,
        surviving=tuple(name for name, part in zip(operators, final, strict=True) if part >= floor),
    )


def _final(share: np.ndarray) -> list[float]:
    return share[-max(1, round(LAST_PART * len(share))) :].mean(axis=0).tolist()
