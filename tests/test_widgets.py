"""The slider: the picture follows it, on any thread, and one still picture stands where there are no widgets. And the
colours of all pictures, as seen by those who see fewer."""

import base64
import itertools
import sys
import threading
from html.parser import HTMLParser

import ipywidgets
import numpy
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from condiff_ref import widgets
from condiff_ref.viz import COLOURS

seen: list[tuple[float, bool]] = []


def draw(value: float) -> Figure:
    seen.append((value, torch.is_grad_enabled()))
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, value])
    return figure


def describe(value: float) -> str:
    return f"a line up to {value:g} <b>"


class Figures(HTMLParser):
    """The picture, its alternative text and its caption in a piece of HTML."""

    png, alt, caption = b"", "", ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag == "img":
            self.alt = dict(attributes)["alt"]
            self.png = base64.b64decode(dict(attributes)["src"].removeprefix("data:image/png;base64,"))

    def handle_data(self, data: str) -> None:
        self.caption += data


def read(text: str) -> tuple[bytes, str, str]:
    parser = Figures()
    parser.feed(text)
    return parser.png, parser.alt, parser.caption


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list:
    """What the slider displays."""
    things: list = []
    monkeypatch.setattr("IPython.display.display", lambda thing, **how: things.append(thing))
    monkeypatch.delenv("CONDIFF_STATIC", raising=False)
    seen.clear()
    return things


def test_the_picture_and_its_description_follow_the_slider(shown: list):
    widgets.slider(draw, [1, 2, 3], "height", describe, start=1)
    control, picture = shown[0].children
    first = picture.value
    png, alt, caption = read(first)
    assert png.startswith(b"\x89PNG") and alt == caption == "a line up to 2 <b>"
    control.value = 3
    assert read(picture.value)[0] != png and read(picture.value)[1] == "a line up to 3 <b>"
    control.value = 2
    assert picture.value == first


def test_each_picture_is_drawn_once_when_the_cell_runs(shown: list):
    widgets.slider(draw, [1, 2, 3], "height", describe, start=1)
    assert [value for value, _ in seen] == [2, 1, 3]
    for value in (3, 1, 2):
        shown[0].children[0].value = value
    assert len(seen) == 3


def test_it_draws_without_a_graph_whatever_the_thread(shown: list, monkeypatch: pytest.MonkeyPatch):
    class Moved(ipywidgets.VBox):
        """Displayed, and moved at once, from a thread that has its own grad mode."""

        def __init__(self, children: list):
            super().__init__(children)
            thread = threading.Thread(target=lambda: setattr(children[0], "value", 2))
            thread.start()
            thread.join()

    monkeypatch.setattr(ipywidgets, "VBox", Moved)
    widgets.slider(draw, [1, 2], "height", describe)
    assert seen == [(1, False), (2, False)] and read(shown[0].children[1].value)[1] == "a line up to 2 <b>"


@pytest.mark.parametrize("cause", ["static", "missing"])
def test_without_widgets_there_is_one_picture(cause: str, shown: list, monkeypatch: pytest.MonkeyPatch):
    if cause == "static":
        monkeypatch.setenv("CONDIFF_STATIC", "1")
    else:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    widgets.slider(draw, [1, 2], "height", describe, start=1)
    assert shown[0]["image/png"].startswith(b"\x89PNG") and shown[0]["text/plain"] == describe(2)


def test_it_uses_what_the_oldest_supported_ipywidgets_has():
    assert {"SelectionSlider", "HTML", "VBox"} <= set(dir(ipywidgets))


# --- colours ----------------------------------------------------------------------------------------------------------

# Machado, Oliveira & Fernandes 2009, table 1, severity 1.0: what linear RGB becomes.
SIGHT = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "grey": [[0.2126, 0.7152, 0.0722]] * 3,  # luminance
}
# In CIE Lab a distance of 2.3 is just noticed (Mahy, Van Eycken & Oosterlinck 1994). Colours with no second mark beside
# them want far more; in grey, as from an office printer, lines still have their dashes and points their shapes.
APART = {"protanopia": 15, "deuteranopia": 15, "tritanopia": 15, "grey": 7}


def cie_lab(colour: str, sight: list) -> numpy.ndarray:
    """L*, a*, b* (CIE 1976) of an sRGB colour as seen in that way; the white of sRGB is the white."""
    coded = numpy.array(to_rgb(colour))
    linear = numpy.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    to_xyz = numpy.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ (numpy.array(sight) @ linear).clip(0, 1) / to_xyz.sum(axis=1)
    x, y, z = numpy.where(ratio > (6 / 29) ** 3, numpy.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_ruler_of_colours_agrees_with_published_values():
    same = numpy.eye(3).tolist()
    for colour, published in (("#FFFFFF", (100, 0, 0)), ("#FF0000", (53.2, 80.1, 67.2)), ("#808080", (53.6, 0, 0))):
        assert cie_lab(colour, same) == pytest.approx(published, abs=0.15)
    red, green = (cie_lab(colour, SIGHT["deuteranopia"]) for colour in ("#B03A2E", "#5B7D2E"))  # what it is known for
    assert numpy.linalg.norm(red - green) < 15 < numpy.linalg.norm(cie_lab("#B03A2E", same) - cie_lab("#5B7D2E", same))


@pytest.mark.parametrize("sight", SIGHT)
def test_no_two_roles_look_alike_whatever_the_eyes(sight: str):
    seen_as = {role: cie_lab(colour, SIGHT[sight]) for role, colour in (COLOURS | {"paper": "#FFFFFF"}).items()}
    for one, other in itertools.combinations(seen_as, 2):
        distance = float(numpy.linalg.norm(seen_as[one] - seen_as[other]))
        assert distance > APART[sight], f"{one} and {other} are {distance:.1f} apart"
