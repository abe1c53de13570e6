"""`chiaroscuro retrofit`, on a small decoder and a small text."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from byte_tokenizer import byte_tokenizer
from chiaroscuro import retrofit
from chiaroscuro.analysis.facts import describe_checkpoint
from chiaroscuro.data.needles import Haystack
from chiaroscuro.model.loading import window_of
from chiaroscuro.report.retrofit_page import CONTROLS
from chiaroscuro.retrofitting.inside import noting_decisions
from chiaroscuro.studies.needles import needles_found
from chiaroscuro.studies.retrofitting import Measured
from decoders import build
from small_runs import WORDS

Run = Callable[..., tuple[int, str, str]]
LENGTH = 640


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A decoder with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("retrofit")
    tokenizer = byte_tokenizer()
    model = build(
        vocab_size=len(tokenizer), max_position_embeddings=1024, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text").mkdir()
    draw = random.Random(0)
    for split, lines in (("train", 90), ("validation", 40)):
        text = "\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(lines))
        (folder / "text" / f"{split}.txt").write_text(text + "\n")
    return folder / "model", folder / "text"


def small(places: tuple[Path, Path], output: Path, *more: object) -> list[object]:
    model, text = places
    return [
        *("retrofit", model, output, "--data", text, "--rows", 10, "--length", LENGTH, "--window", 32),
        *(
            "--needles",
            LENGTH,
            "--costs",
            LENGTH,
            "--text-rows",
            2,
            "--text-length",
            LENGTH,
            "--tries",
            1,
            "--seconds",
            0,
            *more,
        ),
    ]


def test_a_copy_and_its_report(run: Run, places: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, err = run(*small(places, tmp_path / "out", "--look", 0.5, "--json"))
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    assert found["before"]["perplexity"] > 1 and found["after"]["perplexity"] > 1
    assert found["needles"][0]["length"] == LENGTH and len(found["needles"][0]["after"]) == 5
    assert 0 < found["costs"][0]["cache"] < 0.6 and "prefill" not in found["costs"][0]
    assert found["controls"].keys() == CONTROLS.keys()
    assert found["look controls"].keys() == {"random", "H"} and min(found["look controls"].values()) > 1
    kept = [*found["kept"].values()]
    assert len(kept) == 3 and 0.1 < sum(kept) / 3 < 0.5
    assert found["shares"]["kv_router"] == found["shares"]["router"] == {"fitted": {"heads": 2, "history": 2048}}
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.chiaroscuro == found["shares"] and [*model.reaches] == [0, 1, 2]
    assert (tmp_path / "out/retrofit.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out/retrofit.md").read_text()
    assert "Every token sees 32 tokens and the first 4." in page and "![" in page and "| by chance |" in page
    assert "The same number of tokens look, chosen otherwise" in page
    code, out, err = run("evaluate", tmp_path / "out", "--data", places[1], "--length", 64, "--kv-share", 0.1, "--json")
    assert code == 0 and json.loads(out)["perplexity"] > 1, err
    figures = json.loads(out)
    assert [*figures["kept"]] == [*figures["looked"]] == ["0", "1", "2"]
    assert mean(figures["kept"].values()) < 0.8 * mean(found["kept"].values())  # the dial was turned
    whole = ("evaluate", tmp_path / "out", "--data", places[1], "--length", LENGTH, "--json")
    ends = [json.loads(run(*whole, *more)[1])["perplexity"] for more in ((), ("--history", 2048), ("--history", 0))]
    assert ends[0] == ends[1] != ends[2]
    code, out, err = run("evaluate", tmp_path / "out", "--data", places[1], "--length", 64, "--tokens", 64)
    assert code == 0 and "% of the tokens, the mean over the routed layers" in " ".join(out.split()), err
    code, out, err = run("needles", tmp_path / "out", "--lengths", LENGTH, "--keys", 1, "--tries", 1, "--json")
    (row,) = json.loads(out)["needles"]
    with noting_decisions(model) as decided:
        needles_found(model, Haystack(byte_tokenizer()), LENGTH, 5, 1)
    for side, name in enumerate(("looked", "kept")):
        each = [torch.cat([forward[side] for forward in layer]).float().mean() for layer in decided.values()]
        assert 0 < row[name] < 1 and row[name] == pytest.approx(float(sum(each) / 3), abs=1e-6)
    code, out, err = run("generate", tmp_path / "out", "the light", "--max-new-tokens", 4)
    assert code == 0, err


def test_a_target_is_kept(run: Run, places: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, err = run(*small(places, tmp_path / "out", "--target", "30%", "--layers", "0,2", "--one-head", "--json"))
    assert code == 0, err
    found = json.loads(out)
    assert found["shares"]["kv_share"] == min(one["kv_share"] for one in found["tried"] if one["rise"] <= 0.3)
    assert found["after"]["loss"] - found["before"]["loss"] <= 0.27  # log 1.3
    assert found["shares"]["layers"] == [0, 2]
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.chiaroscuro == found["shares"]
    assert found["shares"]["kv_router"] == found["shares"]["router"] == {"fitted": {"history": 2048}}


def test_a_target_that_cannot_be_met_leaves_the_fit(
    run: Run, places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chiaroscuro.studies.retrofitting.math.expm1", lambda rise: 1.0)
    code, _, err = run(*small(places, tmp_path / "out", "--target", "1%"))
    assert code == 2
    assert "with 90% kept the perplexity still rises by 100.0%, more than 1.0%" in err
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.chiaroscuro["kv_share"] == 0.25
    assert not any(reach.kept.unready() for reach in model.reaches.values())


def test_what_was_fitted_before_an_interruption_gets_its_report(
    run: Run, places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "new/out"  # its parent is made
    with monkeypatch.context() as patch:
        patch.setattr("chiaroscuro.studies.retrofitting.compare_needles", interrupted)
        code, _, err = run(*small(places, output))
    assert code == 2 and "interrupted" in err
    assert AutoModelForCausalLM.from_pretrained(output) is not None and not (output / "retrofit.json").exists()
    code, _, err = run(*small(places, output, "--kv-share", 0.5))
    assert code == 2 and "was made with another --kv-share" in err
    monkeypatch.setattr("chiaroscuro.studies.retrofitting.fit", None)  # it is not fitted again
    with monkeypatch.context() as patch:  # nor are its controls measured again, unless something else is asked for
        patch.setattr("chiaroscuro.studies.retrofitting.compare_controls", interrupted)
        patch.setattr("chiaroscuro.studies.retrofitting.compare_costs", interrupted)
        code, _, err = run(*small(places, output))
        assert code == 2 and "needles in 640 tokens: done" in err and "controls of" not in err
        code, _, err = run(*small(places, output, "--text-rows", 1))
        assert code == 2 and "perplexity of the copy: done" in err and "controls of" not in err
    code, out, err = run(*small(places, output, "--json"))
    assert code == 0, err
    found = json.loads(out)
    assert found == json.loads((output / "retrofit.json").read_text()) | {"output": str(output)}
    assert found["fit"]["kept"] == 0.25 and "fitted.json" not in {file.name for file in output.iterdir()}
    code, _, err = run(*small(places, output))
    assert code == 2 and "exists already: name another folder" in err


def interrupted(*given: Any) -> Any:
    raise KeyboardInterrupt


def test_lengths_that_nobody_gave_are_those_that_the_model_reads() -> None:
    measured = Measured(rows=3)
    for most, wanted in ((512, (512, (512,))), (1500, (1500, (1024, 1500))), (8192, (2048, (1024, 2048)))):
        within = measured.within(most)
        assert (within.length, within.needles, within.costs) == (wanted[0], wanted[1], wanted[1])
    assert Measured(length=64, needles=(80,)).within(512).needles == (80,)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--kv-share", 1.5], "--kv-share 1.5: must be a share of the tokens"),
        (["--look", -0.1], "--look -0.1: must be a share"),
        (["--look", 0], "--look 0: must be a share"),
        (["--look", 1.5], "--look 1.5: must be a share of the tokens, more than 0 and at most 1"),
        (["--history", -1], "Invalid value for '--history'"),
        (["--window", 0], "window=0: must be a whole number of tokens"),
        (["--sinks", -1], "sinks=-1"),
        (["--layers", "7"], "layers=[7]: the model has the layers 0 to 2"),
        (["--layers", "2-0"], "--layers 2-0: give numbers and ranges"),
        (["--layers", "all"], "--layers all: give numbers and ranges"),
        (["--target", "much"], "--target much: give a percentage, such as 1%"),
        (["--target", "0"], "--target 0%: must be more than 0%"),
        (["--rows", 3], "3 rows to fit on: give 10 or more"),
        (["--length", 4096], "--length 4096: "),
        (["--costs", "99999", "--text-length", 5000], "--text-length 5000, --costs 99999: "),
        (["--window", 600, "--length", 600], "--length 600: all of a row is within the window and the sinks, 6"),
        (["--target", "5%", "--kv-share", 0.5], "--target finds the share that is kept: leave out --kv-share"),
        (["--needles", "32"], "32 tokens are too few for"),
        (["--costs", "0,64"], "--costs 0: must be lengths of 1 token or more"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--kv-share", 0.0], "--kv-share 0: must be a share"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    run: Run, places: tuple[Path, Path], tmp_path: Path, more: list[object], complaint: str
) -> None:
    code, out, err = run(*small(places, tmp_path / "out", *more))
    assert code == 2 and complaint in err and err.strip().splitlines()[-1].startswith("error") and not out
    assert not (tmp_path / "out").exists()


def test_other_mistakes(run: Run, places: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments, complaint in (
        (["retrofit", tmp_path / "none", tmp_path / "out"], "no such checkpoint"),
        (["retrofit", places[0], tmp_path], "exists already: name another folder"),
        (["retrofit", places[0], places[0] / "config.json/x"], "config.json is a file; name a folder"),
        (["retrofit", places[0], "/proc/x"], "cannot write /proc/x"),
        (["retrofit", places[0], "/proc/x/y"], "cannot write /proc/x/y"),
        (["retrofit", places[0], tmp_path / ("x" * 300)], "File name too long"),
        (["fit", places[0], "--output", "/proc/x"], "cannot write /proc/x"),
        (["calibrate", places[0], "--output", "/proc/x"], "cannot write /proc/x"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and complaint in err, err


def test_a_copy_is_not_routed_twice(run: Run, places: tuple[Path, Path], tmp_path: Path) -> None:
    from chiaroscuro import retrofit
    from chiaroscuro.model.loading import load_checkpoint

    model = load_checkpoint(str(places[0]))
    retrofit(model, attention_share=1.0, kv_share=1.0)
    model.save_pretrained(tmp_path / "routed")
    byte_tokenizer().save_pretrained(tmp_path / "routed")
    code, _, err = run(*small((tmp_path / "routed", places[1]), tmp_path / "out"))
    assert code == 2 and "retrofitted already" in err
    assert torch.is_tensor(model.reaches[0].kept.calibration.values)


def test_needles_are_counted_as_the_report_counts_them(run: Run, places: tuple[Path, Path]) -> None:
    asked = ("needles", places[0], "--lengths", LENGTH, "--keys", 1, "--tries", 2)
    code, out, err = run(*asked, "--json")
    assert code == 0, err
    (row,) = json.loads(out)["needles"]
    model = AutoModelForCausalLM.from_pretrained(places[0])
    expected = needles_found(model, Haystack(byte_tokenizer()), LENGTH, 5, 2)
    assert (row["length"], row["keys"], row["by depth"]) == (LENGTH, 1, expected)
    assert row["found"] == sum(expected) / 5 and "kept" not in row  # of a model that routes nothing
    code, out, err = run(*asked)
    assert code == 0 and f"{LENGTH}" in out and "by depth" in out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--lengths", "4096"], "reads 1024 tokens at most; give less"),
        (["--lengths", "20"], "20 tokens are too few for"),
        (["--lengths", "many"], "--lengths many: give numbers"),
        (["--keys", "0"], "0 needles: must be from 1 to"),
        (["--keys", "4,0"], "0 needles: must be from 1 to"),
        (["--keys", "40"], "40 needles: must be from 1 to"),
        (["--tries", "0"], "greater than or equal to 1"),
        (["--share", "0.5"], "--share needs a CHIAR-Former or a retrofitted model"),
    ],
)
def test_a_mistake_about_needles_is_one_line(
    run: Run, places: tuple[Path, Path], options: list[str], complaint: str
) -> None:
    code, _, err = run("needles", places[0], *options)
    assert code == 2 and complaint in " ".join(err.split()) and "Traceback" not in err


def test_a_part_of_a_text_is_measured(run: Run, places: tuple[Path, Path]) -> None:
    found = []
    for more in ([], ["--tokens", "512"]):
        code, out, err = run("evaluate", places[0], "--data", places[1], "--length", 256, "--json", *more)
        assert code == 0, err
        found.append(json.loads(out)["tokens"])
    assert found[1] == 512 < found[0]


def test_recall_is_beyond_the_window_of_the_copy(run: Run, places: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(places[0])
    retrofit(model, window=16, sinks=1, attention_share=1.0, kv_share=1.0)
    model.save_pretrained(tmp_path / "copy")
    byte_tokenizer().save_pretrained(tmp_path / "copy")
    found = {}
    for more in ((), ("--window", 16), ("--window", 64)):
        code, out, err = run("evaluate", tmp_path / "copy", "--data", places[1], "--length", 128, "--json", *more)
        assert code == 0, err
        found[more] = json.loads(out)["recall"]["tokens"]
    assert found[()] == found["--window", 16] != found["--window", 64]


def test_what_was_done_to_a_decoder_is_told(run: Run, places: tuple[Path, Path], tmp_path: Path) -> None:
    facts = json.loads(run("info", places[0], "--json")[1])
    assert "window" not in facts and facts["layers"] == []
    model = build(vocab_size=300)
    retrofit(model, window=16, sinks=1, kv_share=0.5)
    assert window_of(model.config) == 16
    told = describe_checkpoint(model)
    assert (told["window"], told["sinks"], told["kv_share"], told["attention_share"]) == (16, 1, 0.5, 1.0)
    assert told["layers"] == [] and told["routed_layers"] == [0, 1, 2]
    model.save_pretrained(tmp_path)
    code, out, err = run("info", tmp_path)
    assert code == 0 and "routed layers" in out, err
    code, out, _ = run("info", places[0])
    assert code == 0 and "menu" not in out


def test_a_copy_is_fitted_anew_and_calibrated(run: Run, places: tuple[Path, Path], tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(places[0])
    entry = {"fitted": {"heads": 2}}
    retrofit(model, window=16, sinks=1, attention_share=0.5, kv_share=0.25, router=entry, kv_router=entry)
    model.save_pretrained(tmp_path / "copy")
    byte_tokenizer().save_pretrained(tmp_path / "copy")
    rows = ("--data", places[1], "--tokens", 6400, "--length", LENGTH)
    code, _, err = run("calibrate", tmp_path / "copy", "--data", places[1], "--output", tmp_path / "early")
    assert code == 2 and "was not fitted yet" in err and not (tmp_path / "early").exists()
    code, out, err = run("fit", tmp_path / "copy", *rows, "--output", tmp_path / "fitted", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["look"], found["kept"], len(found["layers"])) == (0.5, 0.25, 3)
    assert mean(layer["look"]["share"] for layer in found["layers"]) == pytest.approx(0.5, abs=1e-6)
    assert (tmp_path / "fitted/fit.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = run("fit", tmp_path / "copy", *rows, "--kept", 0.1, "--output", tmp_path / "other")
    assert code == 0 and "captured" in out, err
    fitted: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert fitted.config.chiaroscuro["kv_share"] == 0.1 and fitted.config.chiaroscuro["attention_share"] == 0.5

    asked = ("--data", places[1], "--share", 0.3, "--tokens", 4096)
    code, out, err = run("calibrate", tmp_path / "fitted", *asked, "--output", tmp_path / "set", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["attention_share"], found["kv_share"]) == (0.3, 0.25)
    assert mean(found["looked"].values()) == pytest.approx(0.3, abs=0.02)
    assert mean(found["kept"].values()) == pytest.approx(0.25, abs=0.02)
    code, out, err = run("calibrate", tmp_path / "fitted", *asked, "--output", tmp_path / "shown")
    assert code == 0 and "of the tokens, the mean over the routed layers" in " ".join(out.split()), err
    for command in ("fit", "calibrate"):
        code, _, err = run(command, places[0], "--data", places[1], "--output", tmp_path / "none")
        assert code == 2 and f"{command} needs a CHIAR-Former or a retrofitted model" in err
    code, _, err = run("fit", tmp_path / "copy", *rows[:2], "--tokens", 5760, *rows[4:], "--output", tmp_path / "none")
    assert code == 2 and "9 rows to fit on: give 10 or more, of all kinds" in err
    code, _, err = run("fit", tmp_path / "copy", *rows[:4], "--length", 17, "--output", tmp_path / "none")
    assert code == 2 and "all of a row is within the window" in err and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "--data", "TEXT", "--length", 64),
        ("generate", "zebra"),
        ("needles", "--lengths", 500, "--tries", 1),
        ("retrofit", "OUT", "--data", "TEXT", "--rows", 10, "--length", LENGTH, "--window", 32, "--needles", LENGTH),
    ],
    ids=lambda command: command[0],
)
def test_a_tokenizer_with_more_tokens_than_the_model_is_one_line(
    run: Run, places: tuple[Path, Path], tmp_path: Path, command: tuple[object, ...]
) -> None:
    model = build(vocab_size=60, max_position_embeddings=1024, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    meant = {"TEXT": places[1], "OUT": tmp_path / "out"}
    name, *options = (meant.get(str(word), word) for word in command)
    code, _, err = run(name, tmp_path / "model", *options)
    assert code == 2 and "outside the vocabulary, vocab_size=60" in err and err.count("error: ") == 1
    assert not (tmp_path / "out").exists()
