"""What the terminal shows: every token, the trace's own counts, and in a pipe nothing but characters."""

import io
import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from traces import HOSTILE, make_trace, traces

from chiaroscuro.analysis.routing import LayerTrace, RoutingTrace
from chiaroscuro.report.routing_terminal import print_routing
from chiaroscuro.report.visible import harmless


def printed(trace, per_token=False, **options):
    console = Console(file=io.StringIO(), **{"width": 200, **options})
    print_routing(trace, console, per_token=per_token)
    return console.file.getvalue()


def rows_of_layers(output):
    """The table's lines: layer, operator, tokens, share …, and the layer's further operators below it."""
    lines = output.split("H 5–95 %")[1].splitlines()[2:]
    end = next(i for i, line in enumerate(lines) if "white noise" in line)
    return [line.split() for line in lines[:end] if line.strip()]


@given(traces(), st.booleans())
def test_a_pipe_gets_no_escape_code(trace, per_token):
    output = printed(trace, per_token)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", output)


@given(traces())
def test_the_table_counts_as_the_trace_does(trace):
    rows = rows_of_layers(printed(trace))
    expected = [(name, n) for layer in trace.layers for name, n in zip(layer.operators, layer.counts, strict=True)]
    # A layer's first line has its number before the operator.
    found = [row[1:3] if row[0].isdigit() else row[:2] for row in rows]
    assert [(name, int(count)) for name, count in found] == expected


@given(traces())
def test_the_null_stands_in_the_table(trace):
    assert re.search(rf"null +white noise, d = 256 +{trace.null_mean:.4f}", printed(trace))


@given(st.lists(st.sampled_from([" the", " cat", "s", "\n", "", "漢"]), min_size=1, max_size=20))
def test_brackets_stand_around_the_tokens_that_attention_got(tokens):
    trace = make_trace(tokens, [("dct", "attention")])
    output = printed(trace, width=1000)
    paragraph = output.split("Layer 1 ·")[1].split("layer   operator")[0]
    assert paragraph.count("[") == paragraph.count("]") == trace.layers[0].counts[1]


def test_together_counts_the_layers_that_took_attention():
    trace = make_trace(["a"], [("dct",), ("dct", "attention"), ("dct", "attention"), ("attention",)], seed=4)
    assert trace.depth == (2,)
    assert "\na²\n" in printed(trace)


def test_colour_shows_the_same_text():
    trace = make_trace([" The", " cat", " <b>", "\n", " [x]"], [("dct", "attention")])
    output = printed(trace, force_terminal=True, color_system="truecolor")
    assert "\x1b[" in output
    plain = re.sub(r"\x1b\[[\d;]*m", "", output)
    assert plain.count(" The cat <b>") == 2 and plain.count("[x]") == 2


def test_markup_and_control_characters_of_the_text_are_shown_not_obeyed():
    output = printed(make_trace(["[red]", "\x1b[2J", "[/]"], [("dct", "attention")]), force_terminal=True)
    assert "[red]" in output and "\x1b[2J" not in output and "␛[2J" in output


def test_no_color_gives_brackets(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    trace = make_trace(list("abcdefgh"), [("dct", "attention")])
    assert printed(trace, force_terminal=True).count("[a]") == (trace.layers[0].operator_index[0] == 1)


def test_every_token_has_its_entropy_in_every_layer():
    trace = make_trace(["␣x", "y", *map(harmless, HOSTILE)], [("dct", "attention")] * 26)
    output = printed(trace, per_token=True, width=80)
    assert max(map(len, output.splitlines())) <= 80
    cells = re.findall(r"(?<=\s)\.\d{4}[da](?=\s)", output)
    assert len(cells) == 26 * len(trace.tokens)


def test_who_is_kept_is_marked():
    layer = LayerTrace(("local", "attention"), (0, 1, 0), (0.86,) * 3, (), (2 / 3, 1 / 3), (1.0, 0.5, 0.0))
    trace = RoutingTrace(("aa", "bb", "cc"), (layer,), None, 0.8684, 256)
    output = printed(trace, per_token=True)
    assert "{aa}*" in output and "[bb]*" in output and "{cc}*" not in output
    assert "50.0%" in output and "kept*" in output
    for colour in ("truecolor", None):
        plain = printed(replace(trace, layers=(replace(layer, kept=None),)), color_system=colour)
        assert "kept" not in plain
    assert "\x1b[4" in printed(trace, color_system="truecolor", force_terminal=True)
