"""The slider: the picture follows it, on any thread, and one still picture stands where there are no widgets."""

import sys
import threading

import ipywidgets
import pytest
import torch
from matplotlib.figure import Figure

from condiff_ref import widgets

seen: list[tuple[float, bool]] = []


def draw(value: float) -> Figure:
    seen.append((value, torch.is_grad_enabled()))
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, value])
    return figure


def describe(value: float) -> str:
    return f"a line up to {value:g} <b>"


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
    control, image, text = shown[0].children
    first = bytes(image.value)
    assert first.startswith(b"\x89PNG") and text.value == "a line up to 2 &lt;b&gt;"
    control.value = 3
    assert bytes(image.value) != first and text.value.startswith("a line up to 3")
    control.value = 2
    assert bytes(image.value) == first
    assert [value for value, _ in seen] == [2, 3]  # each is drawn once


def test_it_draws_without_a_graph_whatever_the_thread(shown: list):
    widgets.slider(draw, [1, 2], "height", describe)
    control = shown[0].children[0]
    thread = threading.Thread(target=lambda: setattr(control, "value", 2))
    thread.start()
    thread.join()
    assert seen == [(1, False), (2, False)]


@pytest.mark.parametrize("cause", ["static", "missing"])
def test_without_widgets_there_is_one_picture(cause: str, shown: list, monkeypatch: pytest.MonkeyPatch):
    if cause == "static":
        monkeypatch.setenv("CONDIFF_STATIC", "1")
    else:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    widgets.slider(draw, [1, 2], "height", describe, start=1)
    assert shown[0]["image/png"].startswith(b"\x89PNG") and shown[0]["text/plain"] == describe(2)


def test_it_uses_what_the_oldest_supported_ipywidgets_has():
    assert {"SelectionSlider", "Image", "HTML", "VBox", "Layout"} <= set(dir(ipywidgets))
