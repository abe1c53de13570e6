"""What the figures have in common: a canvas of their own, quiet axes, and PNG."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, GRID = "#241d14", "#d9d2c5"


COLOURS = ("#2b4c9b", "#b97714", "#0b665c", "#a32a20", "#6b3fa0", "#3a2a14")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))


def line_look(number: int) -> dict[str, Any]:
    """Colour and dashes of a line, no two of the first 36 the same."""
    many = len(COLOURS)
    return {"color": COLOURS[number % many], "linestyle": DASHES[(number + number // many) % many]}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, on an Agg canvas; pyplot's global state is not touched."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def quieten(axes: Axes, sides: Any = slice(None)) -> None:
    """Small labels without ticks, and no frame at the given sides, by default at all."""
    axes.tick_params(which="both", length=0, labelsize=8, colors=INK)
    axes.spines[sides].set_visible(False)


def number_steps(axes: Axes, most: int = 4) -> None:
    """Label the x axis at so many whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def as_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()
