"""Figures as the decimal strings that the contract carries."""

import math
from decimal import ROUND_HALF_EVEN, Decimal


def decimal_string(value: float, places: int = 6) -> str:
    """Writes a figure with at most `places` digits after the point and no trailing zeros.

    decimal_string(0.1130000001) -> "0.113"; decimal_string(-0.0) -> "0".

    Raises:
        ValueError: for NaN and infinities, which the contract has no form for.
    """
    if not math.isfinite(value):
        raise ValueError("a figure that is not finite has no decimal form")
    text = format(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-places), ROUND_HALF_EVEN), "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
