"""A slider that redraws a picture: in JupyterLab, in classic notebooks and on Colab; one still picture where there are
no widgets.

Front ends may call back on another thread, so the redrawing takes a lock, sets torch's grad mode itself, and draws on a
Figure without pyplot. Pictures travel as PNG within HTML, which every version of ipywidgets since 7.7 shows: its Image
has no words for those who do not see it.
"""

import base64
import html
import io
import os
import threading
from collections.abc import Callable, Sequence

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_LOCK = threading.Lock()


def slider(
    draw: Callable[[float], Figure],
    values: Sequence[float],
    name: str,
    describe: Callable[[float], str],
    start: int = 0,
) -> None:
    """Show draw(value), with its description, for the value that the slider is at, values[start] at first.

    All pictures are drawn at once, after the first is shown: so the slider answers quickly, and shows what held when
    the cell ran, whatever later cells call by the same names. CONDIFF_STATIC=1, or a missing ipywidgets, leaves one
    still picture.
    """
    from IPython.display import display

    shown: dict[float, tuple[bytes, str]] = {}

    def drawn(value: float) -> tuple[bytes, str]:
        with _LOCK, torch.no_grad():
            if value not in shown:
                buffer = io.BytesIO()
                FigureCanvasAgg(draw(value)).print_png(buffer)
                shown[value] = buffer.getvalue(), describe(value)
            return shown[value]

    widgets = None if os.environ.get("CONDIFF_STATIC") == "1" else _ipywidgets()
    if widgets is None:
        png, words = drawn(values[start])
        display({"image/png": png, "text/plain": words}, raw=True)
        return
    options = [(f"{value:g}", value) for value in values]
    style = {"description_width": "auto"}
    control = widgets.SelectionSlider(
        options=options, value=values[start], description=name, continuous_update=False, style=style
    )
    picture = widgets.HTML()

    def redraw(_: object = None) -> None:
        picture.value = _with_words(*drawn(control.value))  # not the event's: moves are skipped while one is drawn

    control.observe(redraw, names="value")
    redraw()
    display(widgets.VBox([control, picture]))
    for value in values:
        drawn(value)


def _with_words(png: bytes, words: str) -> str:
    """The picture above its description, which a screen reader says once, as that of the picture."""
    data, words = base64.b64encode(png).decode(), html.escape(words)
    picture = f'<img alt="{words}" src="data:image/png;base64,{data}" style="max-width: 100%">'
    return f'<figure style="margin: 0">{picture}<figcaption aria-hidden="true">{words}</figcaption></figure>'


def _ipywidgets() -> object | None:
    try:
        import ipywidgets
    except ImportError:
        return None
    return ipywidgets
