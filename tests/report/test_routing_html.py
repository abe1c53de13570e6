"""The page: whole, alone in the world, and never a program of the text it shows."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from traces import HOSTILE, make_trace, traces

from chiaroscuro.analysis.routing import LayerTrace, RoutingTrace
from chiaroscuro.report.palette import operator_styles
from chiaroscuro.report.routing_html import render_html
from chiaroscuro.report.visible import harmless

VOID = {"meta", "input", "link", "img", "br"}


class Page(HTMLParser):
    """The page as a parser sees it: elements, the text of each token; its tags are balanced."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.tokens, self.scripts, self.open = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append((tag, dict(attributes)))
        if dict(attributes).get("class") == "token":
            self.tokens.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        # `path` closes itself, as it may in SVG.
        if tag != "path":
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if attributes.get("class") == "token":
            self.tokens[-1] += data
        if tag == "script":
            self.scripts[-1] += data


@given(traces())
def test_every_token_stands_there_once_as_text(trace):
    page = Page(render_html(trace))
    assert page.tokens == [harmless(token) for token in trace.tokens]
    assert len(page.scripts) == 2


@given(traces())
def test_the_embedded_numbers_are_those_of_the_trace(trace):
    data = json.loads(Page(render_html(trace)).scripts[0])
    assert len(data["layers"]) == len(trace.layers)
    for shown, layer in zip(data["layers"], trace.layers, strict=True):
        names = [data["operators"][shown["operators"][index]] for index in shown["of"]]
        assert names == [layer.operator(token) for token in range(len(trace.tokens))]
        assert shown["entropy"] == pytest.approx(layer.entropy, abs=1e-5)
    assert data["operators"] == list(operator_styles(trace))


@given(traces())
def test_a_dot_for_every_token_in_every_layer_and_the_null_in_each(trace):
    page = Page(render_html(trace))
    marks = [attributes["d"].count("h0") for tag, attributes in page.elements if attributes.get("class") == "mark"]
    assert marks == [count for layer in trace.layers for count in layer.counts]
    lines = [attributes["class"] for tag, attributes in page.elements if tag == "path"]
    assert lines.count("rule null") == len(trace.layers)
    assert lines.count("rule threshold") == sum(len(layer.thresholds) for layer in trace.layers)


@given(traces())
def test_nothing_comes_from_elsewhere(trace):
    page = render_html(trace)
    for tag, attributes in Page(page).elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "source", "use", "image"}
        assert not {"src", "href", "srcset", "action", "data", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    assert "url(" not in style and "@import" not in style


def test_the_policy_admits_this_script_and_no_other():
    page = Page(render_html(make_trace(HOSTILE)))
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_an_operator_may_have_any_name():
    trace = make_trace(["a", "b"], [("dct", "</script><b>'\"")])
    assert json.loads(Page(render_html(trace)).scripts[0])["operators"][1] == "</script><b>'\""


def test_layers_without_a_choice_say_so():
    page = render_html(make_trace(["a", "b"], [("attention",)] * 2, gate="none"))
    assert page.count("no choice") == 3
    assert "threshold τ" not in page


def test_an_infinite_threshold_is_no_number_on_the_page():
    layer = LayerTrace(("dct", "attention"), (0, 0), (0.86, 0.87), (float("inf"),), (1.0, 0.0))
    page = Page(render_html(RoutingTrace(("a", "b"), (layer,), None, 0.8684, 256)))
    assert json.loads(page.scripts[0])["layers"][0]["thresholds"] == []
    assert not any("nan" in attributes.get("d", "") for _, attributes in page.elements)


def test_only_one_token_is_a_tab_stop():
    stops = [a["tabindex"] for _, a in Page(render_html(make_trace("abc"))).elements if a.get("class") == "token"]
    assert stops == ["0", "-1", "-1"]


def test_who_is_kept_is_told():
    layer = LayerTrace(("local", "attention"), (0, 1, 0), (0.86,) * 3, (), (2 / 3, 1 / 3), (1.0, 0.5, 0.0))
    trace = RoutingTrace(("a", "b", "c"), (layer,), None, 0.8684, 256)
    page = render_html(trace)
    assert json.loads(Page(page).scripts[0])["layers"][0]["kept"] == [1.0, 0.5, 0.0]
    assert "kept to be seen from far" in page
    without = render_html(replace(trace, layers=(replace(layer, kept=None),)))
    assert "kept to be seen from far" not in without
    assert trace.to_dict()["layers"][0]["kept"] == [1.0, 0.5, 0.0]
    assert "kept" not in replace(trace, layers=(replace(layer, kept=None),)).to_dict()["layers"][0]
