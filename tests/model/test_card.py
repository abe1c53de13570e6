"""The page beside saved weights: it says what the configuration says, and never replaces one that is there."""

from pathlib import Path

import yaml

from chiaroscuro import ChiarConfig, ChiarForCausalLM, ChiarForMixedTasks, ChiarForSequenceClassification, retrofit
from chiaroscuro.model.card import CARD, model_card
from decoders import build


def front_matter(text: str) -> dict[str, object]:
    _, fields, _ = text.split("---\n", 2)
    found: dict[str, object] = yaml.safe_load(fields)
    return found


def test_it_lies_beside_the_weights(tmp_path: Path) -> None:
    config = ChiarConfig(
        vocab_size=32, hidden_size=16, num_attention_heads=2, num_hidden_layers=3, attention_share=0.25
    )
    model = ChiarForCausalLM(config)
    model.save_pretrained(tmp_path)
    card = (tmp_path / CARD).read_text()
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["chiaroscuro", "routed-attention"],
    }
    assert f"| parameters | {model.num_parameters():,} |" in card
    assert "| share of the costliest operator | 25% |" in card and "AutoModelForCausalLM" in card
    model.set_attention_share(0.5)
    model.save_pretrained(tmp_path)
    assert "| share of the costliest operator | 50% |" in (tmp_path / CARD).read_text()
    changed = (tmp_path / CARD).read_text().replace("What it was trained on", "It was trained on WikiText-2. What")
    (tmp_path / CARD).write_text(changed)
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == changed
    (tmp_path / "in the way" / CARD).mkdir(parents=True)
    model.save_pretrained(tmp_path / "in the way")
    (tmp_path / CARD).write_text("The author's own.")
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "The author's own."


def test_of_a_classifier_and_of_a_retrofitted_model(tmp_path: Path) -> None:
    config = ChiarConfig(vocab_size=32, hidden_size=16, num_attention_heads=2, num_hidden_layers=3)
    card = model_card(ChiarForSequenceClassification(config))
    assert front_matter(card)["pipeline_tag"] == "text-classification" and "AutoModelForSequenceClassification" in card
    model = build()
    retrofit(model, window=6, sinks=1, kv_share=0.3, kv_router="random", layers=[0, 2])
    model.save_pretrained(tmp_path)
    card = (tmp_path / CARD).read_text()
    assert "| window, sinks | 6, 1 |" in card and "| kept to be seen from there | 30% |" in card
    assert "| routed layers | 2 |" in card


def test_a_model_of_several_heads_is_loaded_by_its_own_class() -> None:
    fields = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    card = model_card(ChiarForMixedTasks(ChiarConfig(**fields, task_labels={"films": 2})))
    assert 'model = ChiarForMixedTasks.from_pretrained("this/folder")' in card and "AutoModel" not in card


def test_a_share_is_told_where_the_model_follows_one() -> None:
    fields = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    for changes in ({"router": "soft"}, {"entropy_thresholds": [0.8, 0.9], "calibration": "fixed"}):
        assert "share of the costliest operator" not in model_card(ChiarForCausalLM(ChiarConfig(**fields, **changes)))
