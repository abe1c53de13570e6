"""What is said of the tokens that are kept: the share of the real ones, counted here one by one, and a column of it."""

from typing import Any

import pytest
import torch
from rich.console import Console

from chiaroscuro import ChiarConfig, ChiarForCausalLM, calibrate
from chiaroscuro.analysis.routing_summary import describe_routing
from chiaroscuro.report.tables import routing_table


@pytest.mark.parametrize("heads", [1, 2])
def test_the_share_that_is_kept_is_of_real_tokens_and_all_heads(heads: int) -> None:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 30, "meta_router": "none"}
    model = ChiarForCausalLM(
        ChiarConfig(
            operators=[["local", "attention"], [{"attention": {"attention_context": "all"}}]],
            window=4,
            attention_context="kept",
            kv_share=0.3,
            kv_router={"learned": {"heads": heads}},
            router="norm",
            **fields,
        )
    ).eval()
    ids, mask = torch.randint(30, (3, 20)), torch.ones(3, 20, dtype=torch.long)
    mask[1, :12] = 0
    calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
    output = model(input_ids=ids, attention_mask=mask, output_routing=True)
    alone = model(input_ids=ids[:1], output_routing=True)
    looks = [(each.routing, each.meta_gate) for each in (output, alone)]
    first, second = (layer for layer in describe_routing(looks, 16)["layers"])
    kept = [each.routing[0].kept for each in (output, alone)]
    chosen = [
        kept[b][i, j].float().mean()
        for b in (0, 1)
        for i in range(len(kept[b]))
        for j in range(20)
        if b == 1 or mask[i, j]
    ]
    assert first["kept"] == pytest.approx(float(torch.stack(chosen).mean()))
    assert 0.2 < first["kept"] < 0.4 and "kept" not in second
    console = Console(width=100)
    with console.capture() as shown:
        console.print(routing_table([first, second], [0.8, 0.85, 0.9]))
    assert f"{first['kept']:.1%}" in shown.get() and "kept" in shown.get()
    with console.capture() as shown:
        console.print(routing_table([second], [0.8, 0.85, 0.9]))
    assert "kept" not in shown.get()
