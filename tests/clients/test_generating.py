"""Streamers, a prompt read in chunks, and weights in eight bits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from chiaroscuro import ChiarForCausalLM, calibrate

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def test_streamers(
    model: ChiarForCausalLM, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tokenizer("light and", return_tensors="pt")
    wanted = tokenizer.decode(model.generate(**prompt, **OPTIONS)[0][prompt.input_ids.shape[1] :])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**prompt, **OPTIONS, streamer=streamer)
    assert "".join(streamer) == wanted
    model.generate(**prompt, **OPTIONS, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == wanted.strip()


@pytest.mark.parametrize("chunk", [1, 3, 5, 64])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_in_chunks(
    model: ChiarForCausalLM, tokenizer: PreTrainedTokenizerFast, chunk: int, padded: bool
) -> None:
    tokenizer.padding_side = "left"
    texts = ["and the dark between the lights", "light on"] if padded else ["and the dark between the lights"]
    prompt = tokenizer(texts, return_tensors="pt", padding=True)
    wanted = model.generate(**prompt, **OPTIONS)
    assert torch.equal(model.generate(**prompt, **OPTIONS, prefill_chunk_size=chunk), wanted)


@pytest.mark.filterwarnings("ignore")  # deprecated, for torchao
def test_weights_in_eight_bits_by_pytorch(model: ChiarForCausalLM) -> None:
    ids = torch.arange(12)[None]
    small = torch.ao.quantization.quantize_dynamic(model.eval(), {torch.nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(small.lm_head).__module__
    with torch.no_grad():
        wanted, found = model(ids, labels=ids), small(ids, labels=ids)
    # A token at a threshold may go elsewhere; the others are near.
    assert (found.logits - wanted.logits).abs().median() < 0.01
    assert found.loss.item() == pytest.approx(wanted.loss.item(), abs=0.1)
    assert small.generate(ids, **OPTIONS).shape == (1, 20)


IN_EIGHT_BITS = """
import sys
from pathlib import Path
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig
import chiaroscuro

folder = Path(sys.argv[1])
ids = torch.arange(12)[None]
model = AutoModelForCausalLM.from_pretrained(folder / "whole")
how = TorchAoConfig(Int8WeightOnlyConfig())
small = AutoModelForCausalLM.from_pretrained(folder / "whole", quantization_config=how)
assert "Int8" in type(small.model.layers[1].feed_forward[0].weight).__name__
for i, thresholds in model.thresholds().items():
    assert torch.equal(small.thresholds()[i].values, thresholds.values)
with torch.no_grad():
    wanted, found = model(ids).logits, small(ids).logits
    # A token at a threshold may go elsewhere; the others are near.
    assert (found - wanted).abs().median() < 0.01
    small.save_pretrained(folder / "small")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder / "small")(ids).logits, found)
assert small.generate(ids, max_new_tokens=8, do_sample=False).shape == (1, 20)
print("as wanted")
"""


def test_weights_in_eight_bits_by_torchao(tmp_path: Path, model: ChiarForCausalLM) -> None:
    # Its libraries for CUDA complain on standard error where there is no GPU, whoever imports it, as transformers does
    # where it can: so `make test` installs it beside the environment, for this test alone.
    beside = Path(sys.prefix) / "torchao"
    if not beside.is_dir():
        pytest.skip("needs torchao beside the environment, where make test installs it")
    calibrate(model, [torch.arange(12)[None]], 0.5)
    model.eval().save_pretrained(tmp_path / "whole")
    done = subprocess.run(
        [sys.executable, "-c", IN_EIGHT_BITS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(beside)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1:] == ["as wanted"], done.stderr[-2000:]
