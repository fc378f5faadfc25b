"""A slider that redraws a picture: in JupyterLab, in classic notebooks and on Colab; one still picture where there are
no widgets.

Front ends may call back on another thread, so the redrawing takes a lock, sets torch's grad mode itself, and draws on a
Figure without pyplot. Pictures travel as PNG in an Image widget, which every version of ipywidgets since 7.7 shows.
"""

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

    Each picture is drawn when it is first asked for, and kept. CONDIFF_STATIC=1, or a missing ipywidgets, leaves one
    still picture.
    """
    from IPython.display import display

    pictures: dict[float, bytes] = {}

    def png(value: float) -> bytes:
        with _LOCK, torch.no_grad():
            if value not in pictures:
                buffer = io.BytesIO()
                FigureCanvasAgg(draw(value)).print_png(buffer)
                pictures[value] = buffer.getvalue()
            return pictures[value]

    widgets = None if os.environ.get("CONDIFF_STATIC") == "1" else _ipywidgets()
    if widgets is None:
        still = {"image/png": png(values[start]), "text/plain": describe(values[start])}
        display(still, raw=True)
        return
    options = [(f"{value:g}", value) for value in values]
    style = {"description_width": "auto"}
    control = widgets.SelectionSlider(
        options=options, value=values[start], description=name, continuous_update=False, style=style
    )
    # without align_self a VBox stretches the picture over the page
    image = widgets.Image(format="png", layout=widgets.Layout(align_self="flex-start", max_width="100%"))
    text = widgets.HTML()

    def redraw(_: object = None) -> None:
        value = control.value  # not the event's: moves are skipped while a picture is drawn
        image.value, text.value = png(value), html.escape(describe(value))

    control.observe(redraw, names="value")
    redraw()
    display(widgets.VBox([control, image, text]))


def _ipywidgets() -> object | None:
    try:
        import ipywidgets
    except ImportError:
        return None
    return ipywidgets
