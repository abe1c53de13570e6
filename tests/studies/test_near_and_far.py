"""The study of who looks and who is kept: what it builds, and what it says of wrong runs."""

from pathlib import Path

import pytest
import torch

from chiaroscuro import ChiarConfig, ChiarForCausalLM
from chiaroscuro.studies.near_and_far import main, route


@pytest.mark.parametrize("sides", ["look", "kept", "both"])
def test_a_routed_model_has_the_full_one_s_weights_and_with_all_open_its_logits(sides: str) -> None:
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 30, "max_position_embeddings": 32}
    full = ChiarForCausalLM(ChiarConfig(operators=[["attention"]] * 2, **fields)).eval()
    routed = route(full, sides, "norm", window=4, sinks=1)
    assert routed.config.menus == [["local", "attention"]] * 2
    assert (routed.config.router, routed.config.kv_router) == {
        "look": ("norm", "random"),
        "kept": ("random", "norm"),
        "both": ("norm", "norm"),
    }[sides]
    ids = torch.randint(30, (2, 20))
    routed.set_attention_share(1.0, kv_share=None if sides == "look" else 1.0)
    torch.testing.assert_close(routed(input_ids=ids).logits, full(input_ids=ids).logits)
    routed.set_attention_share(0.0)
    assert not torch.allclose(routed(input_ids=ids).logits, full(input_ids=ids).logits)


def test_a_run_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "out.json")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
