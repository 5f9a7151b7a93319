"""diffusion.plotting.error_rates: where the pixels of rates and intervals are."""

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from diffusion.plotting.curves import BLUE, RED
from diffusion.plotting.error_rates import ErrorRateRow, plot_error_rates


def columns(picture, colour):
    """The columns that have a colour, above the legend."""
    near = abs(picture[:-50] - np.array(to_rgb(colour)) * 255).max(-1) < 8
    return np.flatnonzero(near.any(0))


def test_an_interval_around_chance_is_centred_on_its_line(tmp_path):
    """And thrice as long from 20 to 80 % as from 40 to 60 %; a name is no formula."""
    widths = []
    for ends in ((0.2, 0.8), (0.4, 0.6)):
        row = ErrorRateRow("$^{$", 0.5, {"exact": None, "over people": ends}, [0.1, 0.9])
        plot_error_rates(tmp_path / "rates.png", [row])
        picture = np.asarray(Image.open(tmp_path / "rates.png").convert("RGB")).astype(float)
        chance, blue = columns(picture, RED), columns(picture, BLUE)
        assert np.ptp(chance) <= 4 and abs(blue[[0, -1]].mean() - chance.mean()) <= 2
        widths.append(np.ptp(blue))
    assert abs(widths[0] / widths[1] - 3) < 0.1
