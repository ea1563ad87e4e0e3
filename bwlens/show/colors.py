"""One sequential scale for every picture: safe for colour-blind eyes, readable text on each step.

"Blues", monotone in lightness: from pale to deep on a light page, from dim to bright on a dark one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

STEPS = 32
"""How many shades a page tells apart; more cannot be seen."""

TARGET = ("#c9400a", "#ffa94d")
"""The mark of the target, on a light and on a dark page: blue's opposite for every eye."""

_LIGHT = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
_DARK = ((27, 36, 48), (22, 62, 107), (33, 113, 181), (107, 174, 214), (214, 234, 250))

CHANGES = 15
"""Shades of a signed change; the middle one is none."""

_SIGNED = ((84, 48, 5), (191, 129, 45), (245, 245, 245), (53, 151, 143), (0, 60, 48))
_SIGNED_DARK = ((246, 200, 120), (140, 81, 10), (32, 38, 46), (1, 102, 94), (128, 225, 213))


def shade(value: float, dark: bool = False) -> tuple[int, int, int]:
    """The colour of a value in [0, 1]; values outside are clipped."""
    return _between(_DARK if dark else _LIGHT, value)


def signed(value: float, dark: bool = False) -> tuple[int, int, int]:
    """The colour of a change in [-1, 1]: brown is less, teal is more (ColorBrewer's BrBG)."""
    return _between(_SIGNED_DARK if dark else _SIGNED, (value + 1) / 2)


def changes(dark: bool = False) -> list[tuple[int, int, int]]:
    """The shades of change that a page tells apart, from the largest loss to the largest gain."""
    return [signed(2 * step / (CHANGES - 1) - 1, dark) for step in range(CHANGES)]


def _between(stops: tuple[tuple[int, int, int], ...], value: float) -> tuple[int, int, int]:
    place = min(max(value, 0.0), 1.0) * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    pairs = zip(stops[low], stops[low + 1], strict=True)
    red, green, blue = (round(a + (place - low) * (b - a)) for a, b in pairs)
    return red, green, blue


def limit(norms: Any) -> float:
    """The norm [layer, pos] that has the deepest shade: the largest, unless it dwarfs the rest.

    With Q1 and Q3 the quartiles of the norms at all tokens but the strongest (often a BOS), norms
    above f = Q3 + 3 (Q3 - Q1) lie far out (Tukey); f is raised until no more than one in fifty of
    them does, for what is common is no outlier. Where the largest norm exceeds 3.5 f, the scale
    ends at the largest norm up to f, and those beyond it are marked. 1 where all are 0.
    """
    # A GPU's numbers are no array's until they are on the CPU.
    values = np.asarray(norms.cpu() if hasattr(norms, "cpu") else norms, dtype=float)
    high = float(values.max(initial=0.0))
    rest = np.delete(values, values.max(0).argmax(), 1) if values.shape[1] > 2 else values
    rest = rest[rest > 0]
    if not len(rest):
        return high or 1.0
    low, up = np.quantile(rest, (0.25, 0.75))
    fence = max(up + 3 * (up - low), np.quantile(rest, 0.98, method="higher"))
    return high if high <= 3.5 * fence else float(values[values <= fence].max())


def scale(dark: bool = False) -> list[tuple[int, int, int]]:
    """The shades that a page tells apart, from no norm to the largest."""
    return [shade(step / (STEPS - 1), dark) for step in range(STEPS)]


def ink(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has the higher contrast on a background."""
    black, white = (0, 0, 0), (255, 255, 255)
    return black if contrast(black, background) >= contrast(white, background) else white


def contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """The contrast ratio of two colours, 1 (none) to 21 (black on white), as WCAG defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def themed(light: tuple[int, int, int], dark: tuple[int, int, int]) -> str:
    """The style of a background on light and on dark pages, with the ink for each."""
    both = [(css(light), css(dark)), (css(ink(light)), css(ink(dark)))]
    back, front = (f"light-dark({one},{other})" for one, other in both)
    return f"background-color:{back};color:{front}"


def luminance(color: tuple[int, int, int]) -> float:
    """Relative luminance of an sRGB colour, 0 (black) to 1 (white)."""
    linear = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in color)
    )
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def css(color: tuple[int, int, int]) -> str:
    """A colour as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def painted(value: float) -> str:
    """A background of the colour of a change in [-1, 1] with ink on it, in light and dark mode."""
    light, dark = signed(value), signed(value, dark=True)
    return (
        f"background:light-dark({css(light)},{css(dark)});"
        f"color:light-dark({css(ink(light))},{css(ink(dark))})"
    )
