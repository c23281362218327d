from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageColor

from lit_multiip.comparison.plane import PALETTE, Series, plane


def test_every_row_is_drawn_in_its_own_colour_and_fronts_are_joined() -> None:
    apart = [Series("one", [(0.0, 1.0), (1.0, 0.0)]), Series("two", [(0.2, 0.4)], chosen=0)]
    joined = [Series("one", [(0.0, 1.0), (1.0, 0.0)], front=[0, 1]), Series("two", [(0.2, 0.4)])]
    pixels = [np.asarray(plane(series, "x", "y", "title")) for series in (apart, joined)]
    counts = [[int((p == np.array(ImageColor.getrgb(colour))).all(-1).sum()) for colour in PALETTE[:3]] for p in pixels]
    assert all(count[0] > 100 and count[1] > 100 and count[2] == 0 for count in counts)
    assert counts[1][0] > counts[0][0] + 1000  # the line between the two points
    assert counts[0][1] > counts[1][1]  # the ring


def test_one_point_and_equal_points_can_be_drawn_and_none_is_refused() -> None:
    assert (
        plane([Series("one", [(0.5, 0.5)])], "x", "y", "title").size
        == plane([Series("one", [(0.5, 0.5), (0.5, 0.5)])], "x", "y", "title").size
    )
    with pytest.raises(ValueError, match="no point to draw"):
        plane([Series("one", [])], "x", "y", "title")
