"""What a retrofit did to a model, as a page."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from chiaroscuro.layers.registry import split_entry
from chiaroscuro.report.tables import markdown_table

CONTROLS = {
    "window alone": "nobody: the window alone",
    "random": "by chance",
    "H": "the highest spectral entropy*",
    "key norm": "the shortest keys, by head*",
    "received attention": "those that are attended to most from far, by head*",
    "whole heads": "all of some key-value heads, by DuoAttention's gates",
    "whole layers": "all of some layers",
}
"""What the controls keep, by name."""

COSTS = ("cache", "memory", "prefill", "prefill predicted", "decoding", "decoding predicted")


def render_retrofit(found: Mapping[str, Any], picture: str) -> str:
    """What `retrofit_copy` found as a Markdown page, with the picture of that name."""
    said = found["shares"]
    rise = found["after"]["perplexity"] / found["before"]["perplexity"] - 1
    lines = [
        f"# {found['model']}, retrofitted",
        "",
        f"Every token sees {found['window']} tokens and the first {found['sinks']}. {_side(said, found)} Scores were "
        f"fitted on {found['fit_rows']} rows of {found['fit_length']:,} tokens of {found['data']}, of needles and of "
        "copies. Layers that are not named below are whole.",
        "",
        f"On {found['rows']} rows of {found['length']:,} tokens of {found['data']}, validation: perplexity "
        f"{found['before']['perplexity']:.2f} before, **{found['after']['perplexity']:.2f}** after ({rise:+.1%}); on "
        f"recall tokens, {_recall(found)}.",
        "",
        "As many kept by other means, everybody looking; those of a star could not be used, for they choose from the "
        "complete row:",
        "",
        markdown_table(
            ["kept", "perplexity", ""],
            [
                [CONTROLS[name], f"{value:.2f}", f"{value / found['before']['perplexity'] - 1:+.1%}"]
                for name, value in sorted(found["controls"].items(), key=lambda item: -item[1])
            ],
        ),
        *_lookers(found),
        f"![Perplexity, needles, shares and costs]({picture})",
        "",
        "## By position",
        "",
        markdown_table(
            ["tokens read", "before", "after", ""],
            [
                [
                    f"{a['first']:,}–{a['last']:,}",
                    f"{a['perplexity']:.2f}",
                    f"{b['perplexity']:.2f}",
                    f"{b['perplexity'] / a['perplexity'] - 1:+.1%}",
                ]
                for a, b in zip(found["before"]["positions"], found["after"]["positions"], strict=True)
                if a["tokens"]
            ],
        ),
        "## Needles",
        "",
        "How many are found, by depth from the first part of the text to the last.",
        "",
        markdown_table(
            ["tokens", "keys", "tries a depth", "before", "after", "before, by depth", "after, by depth"],
            [
                [
                    f"{one['length']:,}",
                    str(one["keys"]),
                    str(one["tries"]),
                    f"{mean(one['before']):.0%}",
                    f"{mean(one['after']):.0%}",
                    " ".join(f"{part:.0%}" for part in one["before"]),
                    " ".join(f"{part:.0%}" for part in one["after"]),
                ]
                for one in found["needles"]
            ],
        ),
        "## Costs",
        "",
        "The cache after so many tokens as a part of the original's, and the peak memory of a prefill, weights "
        "included, likewise; and how many times faster prefill, and decoding after it, are than the original, the two "
        "taking turns. Predicted is what a prefill's operations say, and the bytes of weights and cache that decoding "
        "reads.",
        "",
        markdown_table(
            ["tokens", *COSTS],
            [
                [f"{one['length']:,}", *(f"{one[kind]:.2f}" if kind in one else "" for kind in COSTS)]
                for one in found["costs"]
            ],
        ),
        "## Layers",
        "",
        markdown_table(
            ["layer", "look", "kept", "kept: rank correlation", "recall", "captured", "harm"],
            [_layer(found, layer) for layer in found["kept"]],
        ),
    ]
    return "\n".join(lines)


def _lookers(found: Mapping[str, Any]) -> list[str]:
    """The table of who else might look, where not all do."""
    if "look controls" not in found:
        return []
    names = {"random": "by chance", "H": "the highest spectral entropy"}
    before = found["before"]["perplexity"]
    rows = [
        [names[name], f"{value:.2f}", f"{value / before - 1:+.1%}"] for name, value in found["look controls"].items()
    ]
    return [
        "The same number of tokens look, chosen otherwise, for all heads alike; who is kept is decided by the fitted "
        "scores. The thresholds of who looks were set on this text.",
        "",
        markdown_table(["look", "perplexity", ""], rows),
    ]


def _side(said: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    looked, kept = (mean(found[side].values()) for side in ("looked", "kept"))
    heads = " and their heads" if "heads" in split_entry(said["kv_router"])[1] else ""
    looks = "All look beyond" if said["attention_share"] == 1 else f"{looked:.0%} of the tokens look beyond"
    return f"{looks}, and {kept:.0%} are kept to be seen from there, the mean over {len(found['kept'])} layers{heads}."


def _recall(found: Mapping[str, Any]) -> str:
    parts = [found[name]["recall"]["perplexity"] for name in ("before", "after")]
    return "there are none" if None in parts else f"{parts[0]:.2f} and {parts[1]:.2f}"


def _layer(found: Mapping[str, Any], layer: Any) -> list[str]:
    fitted: dict[str, Any] = next(
        (one.get("kept", {}) for one in found["fit"]["layers"] if one["layer"] == int(layer)), {}
    )
    figures = [fitted.get(name) for name in ("rank_correlation", "recall", "captured")]
    harm = fitted.get("harm")
    return [
        str(layer),
        f"{found['looked'][layer]:.0%}",
        f"{found['kept'][layer]:.0%}",
        *("" if figure is None else f"{figure:.2f}" for figure in figures),
        "" if harm is None else f"{harm:.4f}",
    ]
