"""How figures are written for people: three digits, units that fit, a real minus sign."""

from __future__ import annotations

import math
from collections.abc import Sequence


def milliseconds(value: float) -> str:
    """Return a latency in ms as text.

    >>> milliseconds(1.254), milliseconds(0.0312), milliseconds(20_000)
    ('1.25 ms', '31.2 µs', '20.0 s')
    """
    if value < 0.1:
        return f"{_digits(value * 1e3)} µs"
    return f"{_digits(value)} ms" if value < 10_000 else f"{_digits(value / 1e3)} s"


def size(value: float) -> str:
    """Return a number of bytes as text, with decimal prefixes.

    >>> size(1_096_534), size(812)
    ('1.10 MB', '812 B')
    """
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def number(value: float) -> str:
    """Return a count as text, small ones in full.

    >>> number(40_551_040), number(1_234)
    ('40.6 M', '1,234')
    """
    return f"{value:,.0f}" if value < 10_000 else _scaled(value, ("", "k", "M", "G", "T"))


def percent(fraction: float) -> str:
    """Return a fraction as text.

    >>> percent(0.9173)
    '91.73 %'
    """
    return f"{100 * fraction:.2f} %"


def plain(value: float, *, sign: bool = False) -> str:
    """Return a number without a unit, such as a metric of the user's.

    >>> plain(0.91731), plain(-0.0042, sign=True), plain(0.01, sign=True)
    ('0.9173', '−0.0042', '+0.01')
    """
    return _minus(f"{value:+.4g}" if sign else f"{value:.4g}")


def counted(count: int, what: str) -> str:
    """Write a number of things.

    >>> counted(1, "channel"), counted(2000, "channel")
    ('1 channel', '2,000 channels')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def p_value(value: float) -> str:
    """Return the p-value of a test.

    >>> p_value(0.0312), p_value(3e-9)
    ('p = 0.031', 'p < 0.001')
    """
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def points(fraction: float) -> str:
    """Return a change of a fraction in percentage points.

    >>> points(-0.0031)
    '−0.31 pp'
    """
    return _minus(f"{100 * fraction:+.2f} pp")


def ratio(value: float) -> str:
    """Return a factor as text.

    >>> ratio(1.853)
    '1.85×'
    """
    return f"{value:.2f}×" if math.isfinite(value) else "∞"


def faster(factor: float) -> str:
    """Say in words how a speed changed by ``factor``.

    >>> faster(1.853), faster(0.5), faster(1.001)
    ('1.85× faster', '2.00× slower', 'the same')
    """
    if abs(factor - 1) < 0.005:
        return "the same"
    return f"{ratio(factor)} faster" if factor > 1 else f"{ratio(1 / factor)} slower"


def growth(factor: float) -> str:
    """Say how an amount changed by ``factor``.

    >>> growth(0.316), growth(1.0)
    ('−68.4 %', 'the same')
    """
    return "the same" if factor == 1 else _minus(f"{100 * (factor - 1):+.1f} %")


def in_unit(value: float, unit: str) -> str:
    """Return a gate's limit or value in the gate's own unit.

    >>> in_unit(0.5, "pp"), in_unit(1.3, "x"), in_unit(2e6, "bytes"), in_unit(-0.25, "metric")
    ('0.50 pp', '1.30×', '2.00 MB', '−0.25')
    """
    texts = {"x": ratio, "ms": milliseconds, "bytes": size, "fraction": percent, "metric": plain}
    return texts[unit](value) if unit in texts else _minus(f"{value:.2f} {unit}")


def _digits(value: float) -> str:
    """Return three significant digits without an exponent."""
    decimals = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9))
    return f"{value:,.{decimals}f}"


def _scaled(value: float, units: Sequence[str]) -> str:
    step = 0
    while value >= 1000 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    text = _digits(value) if step else f"{value:,.0f}"
    return f"{text} {units[step]}".rstrip()


def _minus(text: str) -> str:
    return text.replace("-", "−")
