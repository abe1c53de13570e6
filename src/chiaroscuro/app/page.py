"""The page: four tabs, and the server that shows them on this machine alone."""

import io
import os
import socket
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from chiaroscuro.app.measuring import measure, shares_of_file
from chiaroscuro.app.reading import Text, read, take_up
from chiaroscuro.app.runs import curves, find_runs, table_of
from chiaroscuro.app.served import Served
from chiaroscuro.app.view import LOSS, ROUTING, draw_panels, draw_reading, draw_written, escaped, summary
from chiaroscuro.app.writing import write
from chiaroscuro.errors import UserError

HOST = "127.0.0.1"
PICTURES_KEPT = 3600
"""Seconds after which Gradio deletes the files that it has shown; all of them when the page is closed."""
EXAMPLE = (
    "Return a list of the words in the string, using sep as the delimiter string. If maxsplit is given, at most "
    "maxsplit splits are done, and the remainder of the string is returned as the final element of the list."
)


def free_port(port: int) -> int:
    """The port, if nobody listens on it.

    Raises:
        UserError: somebody does, or it is no port for users.

    """
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 1 to 65535")
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port {port} can't be used ({error.strerror}): name another one") from None
    return port


def launch(served: Served, port: int, *, block: bool = True) -> Any:
    """Show the page until it is interrupted.

    Args:
        served: the model.
        port: on 127.0.0.1.
        block: whether to wait; otherwise the running page is returned, to be closed.

    Raises:
        UserError: the extra is not installed, or the port is taken.

    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    gradio = _gradio()
    page = build(served)
    local = ("ui-sans-serif", "system-ui", "sans-serif")
    mono = ("ui-monospace", "Consolas", "monospace")
    page.queue(default_concurrency_limit=4).launch(
        server_name=HOST,
        server_port=free_port(port),
        share=False,
        quiet=True,
        prevent_thread_lock=not block,
        footer_links=[],
        theme=gradio.themes.Base(font=local, font_mono=mono),  # the fonts of the system: none is loaded
        css=files("chiaroscuro.app").joinpath("style.css").read_text("utf-8"),
    )
    return page


def _gradio() -> Any:
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise UserError(f"the app needs {error.name}: pip install 'chiaroscuro[lab,app]'") from None
    return gradio


def build(served: Served) -> Any:
    """The page of a model."""
    gr = _gradio()
    with gr.Blocks(
        title=f"chiaroscuro · {served.name}",
        analytics_enabled=False,
        delete_cache=(PICTURES_KEPT, PICTURES_KEPT),
    ) as page:
        gr.Markdown(f"# chiaroscuro\n{escaped(served.name)}, {served.model.num_parameters():,} parameters")
        with gr.Tab("Read"):
            _read_tab(gr, served)
        with gr.Tab("Write"):
            _write_tab(gr, served)
        with gr.Tab("Measure"):
            _measure_tab(gr, served)
        with gr.Tab("Runs"):
            _runs_tab(gr)
    return page


def said(line: str, wrong: bool = False) -> str:
    """A line of the page that says what happened."""
    return f'<p class="said{" wrong" if wrong else ""}" role="status">{escaped(line)}</p>'


def _dials(gr: Any, served: Served) -> tuple[Any, Any]:
    """A slider for each side; one that the model lacks can't be moved."""
    labels = {"look": "Share that looks far, or gets the costliest operator", "kept": "Share that is kept"}
    sliders = [
        gr.Slider(0, 1, served.dials.get(side, 1.0), step=0.01, label=label, interactive=side in served.dials)
        for side, label in labels.items()
    ]
    return sliders[0], sliders[1]


# ---- Read ----------------------------------------------------------------------------------------------------


def _read_tab(gr: Any, served: Served) -> None:
    layers = served.model.config.num_hidden_layers
    known = gr.State(None)
    box = gr.Textbox(EXAMPLE, lines=4, max_lines=8, label="Text")
    button = gr.Button("Read", variant="primary")
    with gr.Row():
        look, kept = _dials(gr, served)
    with gr.Row():
        layer = gr.Slider(0, layers, 0, step=1, label="Layer; 0 shows all")
        colour = gr.Radio([ROUTING, LOSS], value=ROUTING, label="Colour by")
    line, shown = gr.HTML(), gr.HTML()

    def take(text: str, *dials: Any) -> tuple[Any, str, str]:
        try:
            taken = take_up(served, text)
        except UserError as error:
            return None, said(str(error), wrong=True), ""
        return taken, *show(taken, *dials)

    def show(taken: Text | None, look: float, kept: float, layer: int, colour: str) -> tuple[str, str]:
        if taken is None:
            return said("Type or paste a text, and press Read."), ""
        try:
            reading = read(served, taken, look, kept)
        except UserError as error:
            return said(str(error), wrong=True), ""
        number = int(layer) - 1 if layer else None
        return said(summary(reading, served.name)), draw_reading(reading, number, colour)

    dials = [look, kept, layer, colour]
    gr.on([button.click, box.submit], take, [box, *dials], [known, line, shown], show_progress="hidden")
    for dial in dials:
        dial.change(show, [known, *dials], [line, shown], show_progress="hidden", trigger_mode="always_last")


# ---- Write ---------------------------------------------------------------------------------------------------


def _write_tab(gr: Any, served: Served) -> None:
    prompt = gr.Textbox("Return a copy of the string with", lines=2, label="Prompt")
    with gr.Row():
        look, kept = _dials(gr, served)
    with gr.Row():
        most = gr.Slider(1, 500, 60, step=1, label="New tokens, at most")
        temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature; 0 takes the likeliest token")
        seed = gr.Number(0, precision=0, label="Seed")
    with gr.Row():
        button = gr.Button("Write", variant="primary")
        stop = gr.Button("Stop")
    line = gr.HTML()
    with gr.Row():
        ours, whole = gr.HTML(), gr.HTML()

    def go(
        prompt: str, look: float, kept: float, most: int | None, temperature: float | None, seed: int | None
    ) -> Iterator[Any]:
        yield said("Writing …"), "", ""
        drawn = ("", "")
        try:
            if most is None or temperature is None or seed is None:
                raise UserError("a number is missing: give how many tokens, the temperature and the seed")
            for a, b in write(
                served, prompt, look=look, kept=kept, most=int(most), temperature=temperature, seed=int(seed)
            ):
                drawn = (draw_written(prompt, a, "as routed"), draw_written(prompt, b, "with full attention"))
                yield said("Writing …"), *drawn
        except UserError as error:
            yield said(str(error), wrong=True), *drawn
            return
        yield said("Done."), *drawn

    started = button.click(go, [prompt, look, kept, most, temperature, seed], [line, ours, whole])
    stop.click(lambda: said("Stopped."), None, line, cancels=[started])


# ---- Measure -------------------------------------------------------------------------------------------------


def _measure_tab(gr: Any, served: Served) -> None:
    with gr.Row():
        look, kept = _dials(gr, served)
    button = gr.Button("Measure speed, memory and operations", variant="primary")
    line, table = gr.HTML(), gr.Dataframe(interactive=False, label="By length")
    file = gr.File(label="A text file: whom the model routes in it", type="filepath")
    of_file, shares = gr.HTML(), gr.Dataframe(interactive=False, label="By layer")

    def go(look: float, kept: float) -> Iterator[Any]:
        yield said("Measuring; the two models take turns …"), None
        rows: list[dict[str, Any]] = []
        try:
            for rows in measure(served, look, kept):
                yield said("Measuring; the two models take turns …"), _table(rows)
        except UserError as error:
            yield said(str(error), wrong=True), _table(rows)
            return
        yield said("Done. Other work on this machine makes times vary; ratios vary less."), _table(rows)

    def drop(path: str | None, look: float, kept: float) -> tuple[str, Any]:
        if path is None:
            return "", None
        try:
            return said(f"The beginning of {Path(path).name}."), _table(shares_of_file(served, path, look, kept))
        except UserError as error:
            return said(str(error), wrong=True), None

    button.click(go, [look, kept], [line, table])
    file.change(drop, [file, look, kept], [of_file, shares])


def _table(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Rows of figures as a table that Gradio shows."""
    if not rows:
        return None
    headers = list(dict.fromkeys(name for row in rows for name in row))
    return {"headers": headers, "data": [[_shown(row.get(name)) for name in headers] for row in rows]}


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


# ---- Runs ----------------------------------------------------------------------------------------------------


def _runs_tab(gr: Any) -> None:
    folder = gr.Textbox("runs", label="Folder of runs")
    button = gr.Button("Look", variant="primary")
    line = gr.HTML()
    run = gr.Dropdown([], label="Run", interactive=True)
    of_run = gr.HTML()  # a line of its own: a new list changes the choice, whose answer would hide that of the folder
    picture = gr.Image(label="Over training", show_label=False, format="png", interactive=False, buttons=["fullscreen"])
    sweep = gr.Dropdown([], label="Sweep", interactive=True)
    of_sweep = gr.HTML()
    table = gr.Markdown()

    def look(folder: str) -> tuple[str, Any, Any]:
        try:
            found = find_runs(folder)
        except UserError as error:
            return said(str(error), wrong=True), gr.Dropdown([], value=None), gr.Dropdown([], value=None)
        runs, sweeps = ([str(place) for place in places] for places in (found.runs, found.sweeps))
        return (
            said(f"{len(runs)} runs, {len(sweeps)} sweeps."),
            gr.Dropdown(runs, value=runs[0] if runs else None),
            gr.Dropdown(sweeps, value=sweeps[0] if sweeps else None),
        )

    button.click(look, folder, [line, run, sweep])
    run.change(_guarded(_picture_of, None), run, [of_run, picture])
    sweep.change(_guarded(lambda place: table_of(Path(place)), ""), sweep, [of_sweep, table])


def _picture_of(run: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(draw_panels(curves(Path(run)))))


def _guarded(make: Callable[[str], Any], nothing: Any) -> Callable[[str | None], tuple[str, Any]]:
    """What a choice shows, or the line that says why it shows nothing."""

    def shown(chosen: str | None) -> tuple[str, Any]:
        if not chosen:
            return "", nothing
        try:
            return said(chosen), make(chosen)
        except UserError as error:
            return said(str(error), wrong=True), nothing

    return shown
