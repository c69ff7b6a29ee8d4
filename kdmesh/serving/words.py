"""Numbers as people read them."""

from __future__ import annotations

_NOTHING = 0.01


def count(number: float) -> str:
    """Three digits and a letter: 950, 1.25 k, 32.1 M; what is left of a rate long after is 0."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor * 0.9995:
            return f"{number / factor:.3g} {letter}"
    return f"{number if number >= _NOTHING else 0:.3g}"


def size(num_bytes: float) -> str:
    """In KiB, MiB or GiB."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:g} B"


def seconds(number: float | None) -> str:
    """In ms or s; a dash where there is none."""
    if number is None:
        return "-"
    return f"{number * 1000:.3g} ms" if number < 1 else f"{number:.3g} s"
