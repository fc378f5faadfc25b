"""Whether scenes show what they are asked to show."""

import pytest
import torch

from condiff_ref import adherence
from condiff_ref.scenes import EMPTY, SceneObject, by_quadrant, scenes

REAL = scenes(300, torch.Generator().manual_seed(5))


def test_real_scenes_are_read_as_what_they_are():
    found = adherence.adherence(REAL.images, REAL.objects)
    assert found["place"].value > 0.92
    assert found["empty"].value == 1
    assert found["size"].value > 0.99
    assert found["whole 1"].value > 0.9
    assert found["whole 2"].value > 0.85
    assert found["binding error"].value < 0.02


def test_the_reader_names_digits_sizes_and_empty_quadrants():
    digit, size = adherence.read(REAL.images)
    asked, asked_size = by_quadrant(REAL.objects)
    assert torch.equal(digit == EMPTY, asked == EMPTY)
    assert torch.equal(size == -1, asked == EMPTY)
    assert (size == asked_size).double().mean() > 0.99


def test_pictures_of_the_exchanged_captions_are_binding_errors_and_nothing_else():
    other = adherence.swap(REAL.objects)
    found = adherence.adherence(REAL.images, other)
    assert found["binding error"].value > 0.8
    assert found["whole 2"].value < 0.15  # two equal digits stay right
    assert found["whole 1"].value > 0.9


def test_swapping_twice_changes_nothing_and_once_only_the_digits():
    swapped = adherence.swap(REAL.objects)
    assert adherence.swap(swapped) == list(REAL.objects)
    for some, others in zip(REAL.objects, swapped, strict=True):
        assert [o.digit for o in others] == [o.digit for o in some][::-1]
        assert [(o.size, o.quadrant) for o in others] == [(o.size, o.quadrant) for o in some]


def test_the_confusion_table_counts_every_quadrant_once():
    table = adherence.confusion(REAL.images, REAL.objects)
    assert torch.equal(table.sum(1), torch.bincount(by_quadrant(REAL.objects)[0].flatten(), minlength=11))
    assert table.diagonal().sum() > 0.95 * table.sum()


def test_blank_pictures_show_nothing_of_what_was_asked():
    found = adherence.adherence(torch.full_like(REAL.images, -1), REAL.objects)
    assert found["place"].value == 0
    assert found["empty"].value == 1
    assert "size" not in found  # no digit in place has none


def test_other_pictures_are_refused_with_their_shape():
    with pytest.raises(ValueError, match=r"\(n, 1, 16, 16\), got \(2, 1, 28, 28\)"):
        adherence.read(torch.zeros(2, 1, 28, 28))
    with pytest.raises(ValueError, match="300 pictures but 1 lists"):
        adherence.adherence(REAL.images, [(SceneObject(1, 1, 1),)])
