"""What the app shows, computed without a page: against the model's own outputs, and for two visitors at once."""

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from served_models import retrofitted

from byte_tokenizer import byte_tokenizer
from chiaroscuro import ChiarConfig, ChiarForCausalLM, UserError, calibrate, retrofit
from chiaroscuro.app import measuring, page, reading
from chiaroscuro.app.reading import MOST, read, take_up
from chiaroscuro.app.runs import curves, find_runs, table_of
from chiaroscuro.app.served import Served, serve
from chiaroscuro.app.view import LOSS, ROUTING, draw_panels, draw_reading, draw_written, summary, tip_of
from chiaroscuro.app.writing import _piece, write
from chiaroscuro.layers.router import Decision
from chiaroscuro.retrofitting.inside import noting_decisions
from chiaroscuro.retrofitting.routed_model import RoutedModel
from chiaroscuro.retrofitting.whole import without_routing
from decoders import build

Run = Callable[..., tuple[int, str, str]]
TEXT = "the light falls on a wall and what is dark stays dark until the sun has gone round"
MARKUP = "<script>alert(1)</script> <b>the</b> & “light” \x1b[31m\n\ton a wall"


def plain() -> Served:
    tokenizer: Any = byte_tokenizer()
    model = build(vocab_size=len(tokenizer), pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return Served(model, tokenizer, "plain")


BY_HEAD: Any = {"fitted": {"heads": 2}}


@pytest.fixture(params=["own", "retrofitted", "by head", "plain"])
def model(request: pytest.FixtureRequest, served: Served) -> Served:
    made = {
        "own": lambda: served,
        "retrofitted": retrofitted,
        "by head": lambda: retrofitted(BY_HEAD),
        "plain": plain,
    }
    return made[request.param]()


def test_losses_are_the_models_own(model: Served) -> None:
    text = take_up(model, TEXT)
    reading = read(model, text)
    ids = torch.tensor([text.ids])
    with torch.no_grad():
        log_p = model.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        ours = -log_p.gather(1, ids[0, 1:, None])[:, 0]
        if model.dials:
            with without_routing(model.model):
                log_p = model.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        full = -log_p.gather(1, ids[0, 1:, None])[:, 0]
    assert reading.loss[0] is None and reading.full[0] is None
    assert reading.loss[1:] == pytest.approx(ours.tolist(), rel=1e-4, abs=1e-5)
    assert reading.full[1:] == pytest.approx(full.tolist(), rel=1e-4, abs=1e-5)
    assert "".join(reading.tokens) == TEXT
    assert bool(reading.layers) == bool(model.dials)
    for layer in reading.layers.values():
        assert layer.score is not None and layer.threshold is not None and layer.far is not None
        assert [score > own for score, own in zip(layer.score, layer.threshold, strict=True)] == [
            bool(i) for i in layer.index
        ]


def test_the_score_of_a_retrofitted_layer_is_the_one_that_decides() -> None:
    """Here it is H, which the router is given; nobody passes zeros for it."""
    served = plain()
    retrofit(served.model, window=8, sinks=1, attention_share=0.5, router="threshold", kv_router="norm")
    calibrate(served.model, [torch.randint(3, 200, (2, 128))])
    found = read(served, take_up(served, TEXT))
    for layer in found.layers.values():
        assert layer.score is not None and layer.threshold is not None
        assert layer.score == pytest.approx(layer.entropy, abs=1e-6)
        above = [int(score > own) for score, own in zip(layer.score, layer.threshold, strict=True)]
        assert above == list(layer.index)


def test_what_looks_by_head_is_shown_as_a_part_of_the_heads(tmp_path: Path) -> None:
    model = retrofitted(BY_HEAD)
    text = take_up(model, TEXT)
    with noting_decisions(model.model) as decided, torch.no_grad():
        model.model(input_ids=torch.tensor([text.ids]), use_cache=False)
    looks = {i: one[0][0][0].float().mean(-1).tolist() for i, one in decided.items()}
    reading = read(model, text)
    assert {i: list(layer.level) for i, layer in reading.layers.items()} == looks
    halves = [(i, t) for i, one in looks.items() for t, part in enumerate(one) if part == 0.5]
    assert halves
    layer, t = halves[0]
    assert "far, by 50% of the key-value heads" in tip_of(reading, t, layer)
    assert "of the layers and heads that choose" in tip_of(reading, t, None)
    (tmp_path / "text.txt").write_text(TEXT)
    for i, row in enumerate(measuring.shares_of_file(model, tmp_path / "text.txt", None, None)):
        assert row["far"] == pytest.approx(sum(looks[i]) / len(looks[i])) and row["near"] == 1 - row["far"]


def test_what_is_far_is_under_the_cap_of_the_scores() -> None:
    """A Gemma 2 caps them: the mass beyond the window is that of its own attention."""
    model = build("gemma2")
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights = model(ids, output_attentions=True, use_cache=False).attentions
    retrofit(model, window=8, sinks=2, attention_share=1.0, kv_share=1.0)
    place = torch.arange(40)
    beyond = (place <= place[:, None] - 8) & (place >= 2)
    for i, mass in reading._far(model, ids).items():
        wanted = (weights[i][0] * beyond).sum(-1).mean(0)
        torch.testing.assert_close(torch.tensor(mass), wanted, atol=1e-4, rtol=1e-3)


def test_a_dial_reroutes_and_leaves_no_trace(model: Served) -> None:
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    config = model.model.config.to_dict()
    text = take_up(model, TEXT)
    first = read(model, text)
    none, all_of_them = read(model, text, 0.0, 0.0), read(model, text, 1.0, 1.0)
    if model.dials:
        assert all_of_them.loss[1:] == pytest.approx(all_of_them.full[1:], rel=1e-4, abs=1e-5)
        assert none.loss != all_of_them.loss
    assert read(model, text) == first
    assert model.model.config.to_dict() == config
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_text_is_read_with_full_attention_once_and_a_dial_costs_one_forward(served: Served) -> None:
    calls = []
    handle = served.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        text = take_up(served, TEXT)
        at_first = len(calls)
        for share in (0.1, 0.5, 0.9):
            read(served, text, share, share)
    finally:
        handle.remove()
    assert len(calls) == at_first + 3


def test_two_visitors_have_each_their_own_dials(served: Served) -> None:
    text = take_up(served, TEXT)
    alone = {share: read(served, text, share, None) for share in (0.0, 0.3, 0.6, 1.0)}
    wrong = []

    def visit(share: float) -> None:
        for _ in range(10):
            if read(served, text, share, None) != alone[share]:
                wrong.append(share)

    visitors = [threading.Thread(target=visit, args=(share,)) for share in alone]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert not wrong


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_writes_what_generate_writes(model: Served, temperature: float) -> None:
    *_, (ours, whole) = write(model, "the light", look=None, kept=None, most=12, temperature=temperature)
    assert len(ours.pieces) == len(whole.pieces) == 12 and ours.speed > 0 and ours.numbers
    if temperature == 0:
        ids = model.tokenizer("the light", return_tensors="pt", add_special_tokens=False)["input_ids"]
        more: Any = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
        for written, routed in ((ours, True), (whole, False)):
            if routed or not model.dials:
                answer = model.model.generate(ids, **more)
            else:
                with without_routing(model.model):
                    answer = model.model.generate(ids, **more)
            text = model.tokenizer.decode(answer[0, ids.shape[1] :], clean_up_tokenization_spaces=False)
            assert text.startswith("".join(written.pieces)) and len(text) - len("".join(written.pieces)) <= 4
    if model.dials:
        assert ours.numbers is not None and whole.numbers is not None and ours.numbers <= whole.numbers


def test_a_character_of_several_tokens_is_written_whole() -> None:
    tokenizer: Any = byte_tokenizer()
    text = "שלום 日本 é ok"
    ids, pieces = tokenizer(text, add_special_tokens=False)["input_ids"], ()
    assert len(ids) > len(text)
    for n in range(1, len(ids) + 1):
        pieces = (*pieces, _piece(tokenizer, ids[:n], pieces))
    assert "".join(pieces) == text and pieces[0] == ""


def test_a_model_without_a_cache_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = byte_tokenizer()
    torch.manual_seed(0)
    config = ChiarConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=64,
        operators=[["attention"]],
        meta_router="sequence",
        use_cache=False,
    )
    assert config.uncacheable()
    *_, (ours, _) = write(
        Served(ChiarForCausalLM(config), tokenizer, "no cache"), "the light", look=None, kept=None, most=4
    )
    assert len(ours.pieces) == 4 and ours.numbers is None
    assert "no cache" in draw_written("the light", ours, "as routed")
    monkeypatch.setattr(measuring, "SECONDS", 0.01)
    monkeypatch.setattr(measuring, "prefill_memory", lambda model, length: 2**20)
    *_, rows = measuring.measure(Served(ChiarForCausalLM(config), tokenizer, "no cache"), None, None)
    assert rows[0]["forward, times as fast"] > 0 and "decoding, ms" not in rows[0] and "cache, MB" not in rows[0]


def test_markup_is_shown_and_not_obeyed(model: Served) -> None:
    reading = read(model, take_up(model, MARKUP))
    for layer in (None, 0):
        for colour in (ROUTING, LOSS):
            drawn = draw_reading(reading, layer, colour)
            assert "<script" not in drawn and "<b>" not in drawn and "\x1b" not in drawn
            shown = re.sub(r"<[^>]+>", "", drawn.split("<figure")[0])
            assert shown.replace("⏎", "").startswith("&lt;script&gt;alert(1)&lt;/script&gt;")
    *_, (ours, _) = write(model, MARKUP, look=None, kept=None, most=2)
    assert "<script" not in draw_written(MARKUP, ours, "as routed")
    assert "<script" not in page.said(MARKUP, wrong=True)


def test_a_token_tells_what_is_known_of_it(served: Served) -> None:
    reading = read(served, take_up(served, TEXT))
    tip = tip_of(reading, 20, 1)
    for what in ("layer 2: ", "H 0.", "score ", "threshold ", "kept by ", "near ", "far ", "with full attention "):
        assert what in tip
    assert "of the layers that choose" in tip_of(reading, 20, None)
    assert "are kept" in summary(reading, "small")
    assert "routes nothing" in summary(read(plain(), take_up(plain(), TEXT)), "plain")


def test_of_three_operators_the_costliest_alone_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = byte_tokenizer()
    torch.manual_seed(0)
    config = ChiarConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2, operators=[["dct", "rbf", "attention"]]
    )
    three = Served(ChiarForCausalLM(config), tokenizer, "three")
    found = read(three, take_up(three, TEXT))
    index = found.layers[0].index
    assert set(index) == {0, 1, 2}
    assert found.attention == tuple(float(i == 2) for i in index)
    assert f" {index.count(2) / len(index):.1%} got the costliest operator" in summary(found, "three")
    assert "attention in 0% of the layers" in tip_of(found, index.index(1), None)
    for number in range(3):
        monkeypatch.setattr(three.model.model.layers[0].router, "forward", always(number))
        *_, (ours, _) = write(three, "the light", look=None, kept=None, most=2)
        assert ours.levels == (float(number == 2),) * 2


def always(number: int) -> Callable[..., Decision]:
    return lambda x, entropy, context=None: Decision(torch.full(x.shape[:2], number))


def test_where_all_look_it_is_said_who_is_kept() -> None:
    served = plain()
    retrofit(served.model, window=8, sinks=1, attention_share=1.0, kv_share=0.5, router="norm", kv_router="norm")
    calibrate(served.model, [torch.randint(3, 200, (2, 128))])
    found = read(served, take_up(served, TEXT))
    assert found.attention is None and found.kept is not None and found.level == found.kept
    tip = tip_of(found, 20, None)
    assert f"kept in {found.kept[20]:.0%} of the layers that choose" in tip and "attention in" not in tip
    assert ": kept: " in draw_reading(found, None, ROUTING) and "costliest" not in summary(found, "copy")
    assert "layer 9 chooses nothing" in tip_of(found, 20, 8)


def test_full_attention_s_memory_is_that_of_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured of what is saved, and that a model is whole for a while is not."""
    seen = []
    monkeypatch.setattr(measuring, "SECONDS", 0.01)
    monkeypatch.setattr(measuring, "LENGTHS", (32,))
    monkeypatch.setattr(measuring, "prefill_memory", lambda model, length: seen.append(isinstance(model, RoutedModel)))
    served = retrofitted()
    list(measuring.measure(served, None, None))
    assert seen == [True, False] and isinstance(served.model, RoutedModel)


@pytest.mark.parametrize("text", ["語" * 5000, "x" * 2**20])
def test_of_a_long_file_the_beginning_is_shown(tmp_path: Path, text: str) -> None:
    """No character of several tokens is cut in two, and no more is read than can be shown."""
    served = retrofitted()
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    assert measuring.shares_of_file(served, tmp_path / "long.txt", None, None)


def test_it_measures_what_a_model_costs(
    model: Served, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "SECONDS", 0.01)
    monkeypatch.setattr(measuring, "LENGTHS", (32, 64, 4096))
    # A process of its own measures each figure, and tests/analysis/test_memory.py has those of all kinds of models.
    own, lengths = request.node.callspec.params["model"] == "own", [32, 64]
    if own:
        lengths = [64]
        monkeypatch.setattr(measuring, "LENGTHS", (64, 4096))
    else:
        monkeypatch.setattr(measuring, "prefill_memory", lambda model, length: 2**20)
    *_, rows = measuring.measure(model, None, None)
    assert [row["length"] for row in rows] == lengths
    for row in rows:
        assert row["forward, times as fast"] > 0 and row["decoding, ms"] > 0
        assert 0 < row["forward's memory, MB"] < 2 * row["memory of full attention, MB"]
        assert (row["cache, MB"] < row["cache of full attention, MB"]) == bool(model.dials)
    table = page._table(rows)
    assert table is not None and len(table["data"]) == len(lengths)


def test_the_shares_of_a_file(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 40)
    rows = measuring.shares_of_file(served, file, 1.0, None)
    assert [row["attention"] for row in rows] == [1.0] * 3 and rows[0]["kept"] is not None


def test_runs_are_found_and_drawn(run_folder: Path, tmp_path: Path) -> None:
    found = find_runs(str(run_folder.parent))
    assert found.runs == (run_folder,) and not found.sweeps
    panels = curves(run_folder)
    assert set(panels) == {"loss", "shares", "H, 5% quantile", "H, 50% quantile", "H, 95% quantile", "gate"}
    assert set(panels["loss"]) == {"train", "validation"} and "layer 1, kept" in panels["shares"]
    assert draw_panels(panels)[1:4] == b"PNG"
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/table.md").write_text("| a |\n")
    assert table_of(find_runs(str(tmp_path)).sweeps[0]) == "| a |\n"


# Mistakes, one line each


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no/such/model"], "no such checkpoint"),
        ([""], "empty"),
        (["{file}"], "file"),
        (["{empty}"], "config.json"),
        (["{cut}"], "cut"),
        (["{run}", "--port", "0"], "--port 0: must be from 1 to 65535"),
        (["{run}", "--port", "70000"], "--port 70000: must be from 1 to 65535"),
        (["{run}", "--port", "-1"], "--port"),
        (["{run}", "--port", "many"], "--port"),
        (["{run}", "--port", "{taken}"], "can't be used"),
        (["{run}", "--speed", "3"], "--speed"),
        (["{run}", "another"], "another"),
    ],
)
def test_a_mistake_on_the_command_line(
    run: Run, run_folder: Path, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    import shutil
    import socket

    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    shutil.copytree(run_folder / "model", tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {
            "file": tmp_path / "file.txt",
            "empty": tmp_path / "empty",
            "cut": tmp_path / "cut",
            "run": run_folder,
            "taken": taken.getsockname()[1],
        }
        code, _, err = run("app", *(each.format(**places) for each in arguments))
    assert code == 2 and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert complaint.lower() in err.lower() or complaint == "cut", err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the text is empty"),
        (" \n\t", "the text is empty"),
        ("light \ud800", "not valid Unicode"),
        ("light " * 3 * MOST, "at most 128 are shown"),
    ],
)
def test_a_mistake_in_the_text(served: Served, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        take_up(served, text)


@pytest.mark.parametrize(
    ("prompt", "more", "complaint"),
    [
        ("", {}, "the prompt is empty"),
        ("light \ud800", {}, "not valid Unicode"),
        ("light " * 400, {}, "the model reads 128"),
        ("light", {"temperature": -1.0}, "temperature -1"),
        ("light", {"temperature": 0.001}, "temperature 0.001"),
        ("light", {"seed": -1}, "seed -1"),
        ("light", {"seed": 2**64}, "seed 18446744073709551616"),
        ("light", {"look": 1.5}, "from 0 to 1"),
    ],
)
def test_a_mistake_in_writing(served: Served, prompt: str, more: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        list(write(served, prompt, **{"look": None, "kept": None, **more}))


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"", "is empty"), (b"\xff\xfe\x00", "not UTF-8"), (None, "can't be read")]
)
def test_a_mistake_in_a_file(served: Served, tmp_path: Path, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        measuring.shares_of_file(served, tmp_path / "text.txt", None, None)


def test_a_file_for_a_model_that_routes_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(UserError, match="routes nothing"):
        measuring.shares_of_file(plain(), tmp_path / "text.txt", None, None)


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (None, "is no folder"),
        ({}, "holds no run"),
        ({"metrics.jsonl": ""}, "has no loss yet"),
        ({"metrics.jsonl": '{"kind": "train", "step": 1}\n'}, "has no loss yet"),
        ({"metrics.jsonl": "{}\n{}\n"}, "line 1 is something else"),
    ],
)
def test_a_mistake_about_runs(tmp_path: Path, made: dict[str, str] | None, complaint: str) -> None:
    place = tmp_path / "runs"
    if made is not None:
        place.mkdir()
        for name, content in made.items():
            (place / name).write_text(content)
    with pytest.raises(UserError, match=complaint):
        curves(find_runs(str(place)).runs[0])
    with pytest.raises(UserError, match="the name is empty"):
        find_runs(" ")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    broken = plain()
    with torch.no_grad():
        broken.model.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        take_up(broken, TEXT)
    with pytest.raises(UserError, match="not finite"):
        list(write(broken, TEXT, look=None, kept=None))


def test_nothing_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("chiaroscuro.app.served.find_smollm2", lambda: None)
    with pytest.raises(UserError, match="name a checkpoint, or run chiaroscuro quickstart first"):
        serve(None)


def test_the_extra_is_asked_for(served: Served, run_folder: Path) -> None:
    code = "import sys; sys.modules['gradio'] = None\nfrom chiaroscuro.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "app", str(run_folder), "--port", "7999"], capture_output=True, text=True
    )
    assert (
        done.returncode == 2 and "pip install 'chiaroscuro[lab,app]'" in done.stderr and "Traceback" not in done.stderr
    )
