"""lm-eval's own command in a new process, on a local task: what loads the model is the module saved beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from chiaroscuro import ChiarForCausalLM

pytest.importorskip("lm_eval")

TASK = """
task: lines
dataset_path: text
dataset_kwargs: {{data_files: {{test: {text}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""


@pytest.mark.slow
def test_the_command_loads_a_saved_model(
    tmp_path: Path, model: ChiarForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, text = tmp_path / "model", tmp_path / "lines.txt"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text.write_text("light and dark\nlight on dark\n" * 4)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/lines.yaml").write_text(TASK.format(text=text))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
    }
    arguments = ["--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"]
    arguments += ["--tasks", "lines", "--include_path", str(tmp_path / "tasks"), "--limit", "4", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments, "--output_path", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results*.json")
    bits = json.loads(written.read_text())["results"]["lines"]["bits_per_byte,none"]
    assert 1 < bits < 20


def test_a_retrofitted_model_is_judged_alike_alone_and_in_a_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    """With everything kept the likelihoods are the original's."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from chiaroscuro import retrofit
    from decoders import build

    texts = ["light and dark", "the dark between the lights, and light on dark", "on dark, light", "a light " * 9]
    requests = [
        Instance("loglikelihood", {}, (text, f" {end}"), i, ("lines", i, 1))
        for i, (text, end) in enumerate((text, end) for text in texts for end in ("light", "dark and light"))
    ]

    def judged(batch_size: int, **options: float) -> list[float]:
        model = build(vocab_size=len(tokenizer), pad_token_id=None, bos_token_id=None, eos_token_id=None)
        if options:
            retrofit(model, window=4, sinks=1, router="random", kv_router="norm", **options)
        judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
        return [likelihood for likelihood, _ in judge.loglikelihood(requests, disable_tqdm=True)]

    whole = judged(1)
    assert judged(4, attention_share=1.0, kv_share=1.0) == pytest.approx(whole, abs=1e-4)
    routed = judged(1, attention_share=0.5, kv_share=0.25)
    assert judged(4, attention_share=0.5, kv_share=0.25) == pytest.approx(routed, abs=1e-4)
    assert routed != pytest.approx(whole, abs=1e-2)
