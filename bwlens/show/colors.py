"""One sequential scale for every picture: safe for colour-blind eyes, readable text on each step.

The steps are those of the "Blues" family from pale to deep, monotone in lightness, so that they
also order correctly in grey.
"""

from __future__ import annotations

_STOPS = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))


def shade(value: float) -> tuple[int, int, int]:
    """The colour of a value in [0, 1]; values outside are clipped."""
    place = min(max(value, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    share = place - low
    red, green, blue = (
        round(a + share * (b - a)) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True)
    )
    return red, green, blue


def ink(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has the higher contrast on a background (WCAG luminance)."""
    light = luminance(background)
    return (0, 0, 0) if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else (255, 255, 255)


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
