"""The options of one call, checked once."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from halimede_ops.errors import InvalidDimensions, InvalidInput
from halimede_ops.quantise import OUTPUT_TYPES, OutputType


class CallOptions(NamedTuple):
    """The options of one call, valid and of one type each."""

    input_type: str | None = None
    dimensions: int | None = None
    output_type: OutputType = "float32"
    ranges: np.ndarray | None = None
    """`[2, dims]` float32, for int8 and uint8."""
    sticky_key: bytes | None = None
    """UTF-8."""
    errors: Literal["raise", "collect"] = "raise"
    deadline_s: float | None = None


DEFAULTS = CallOptions()


def check_options(method: str, given: Mapping[str, object]) -> CallOptions:
    """Return the options of a call of this method.

    Raises:
        InvalidInput: an option is unknown to the method, or its value is invalid.
        InvalidDimensions: `dimensions` is no whole number above 0.
    """
    if not given:
        return DEFAULTS
    known = OPTIONS[method]
    for name in given:
        if name not in known:
            raise _unknown(method, name)
    checked: dict[str, Any] = {
        name: value if value is None and name in OPTIONAL else CHECKS[name](value)
        for name, value in given.items()
    }
    options = CallOptions(**checked)
    needs_ranges = options.output_type in ("int8", "uint8")
    if needs_ranges and options.ranges is None:
        raise InvalidInput(
            f"{options.output_type} needs ranges, or vectors of two calls could not be compared. "
            "Measure them once over a hundred texts or more: "
            "halimede_ops.quantise.measure_ranges(result.vectors)."
        )
    return options


def check_window(window: object) -> int:
    """Return the number of inputs in one part of a stream.

    Raises:
        InvalidInput: it is no whole number above 0.
    """
    return _positive_int("window", window)


def check_count(name: str, count: object) -> int | None:
    """Return the value of an argument that limits a number, such as `top_k`. None: no limit.

    Raises:
        InvalidInput: it is no whole number above 0.
    """
    return None if count is None else _positive_int(name, count)


def check_whole(name: str, value: object, least: int) -> int:
    """Return the value of an argument that is a whole number of at least `least`.

    Raises:
        InvalidInput: it is another.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if is_whole and int(cast(int, value)) >= least:
        return int(cast(int, value))
    raise InvalidInput(f"{name} is {_shown(value)}; give a whole number of at least {least}.")


def check_progress(progress: object) -> bool:
    """Return whether a progress bar is shown.

    Raises:
        InvalidInput: it is no bool.
    """
    if isinstance(progress, bool):
        return progress
    raise InvalidInput(f"progress is {_shown(progress)}; give True or False.")


def _unknown(method: str, name: str) -> InvalidInput:
    known = OPTIONS[method]
    near = difflib.get_close_matches(name, known, 1)
    suggestion = f" Did you mean {near[0]}?" if near else ""
    return InvalidInput(
        f"{method}() has no option `{name}`.{suggestion} Known: {', '.join(known)}."
    )


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0:
        return int(value)
    raise InvalidInput(f"{name} is {_shown(value)}; give a whole number above 0.")


def _dimensions(value: object) -> int:
    # Its bounds are the model's, which is not known here.
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    raise InvalidDimensions(f"dimensions is {_shown(value)}; give a whole number.")


def _input_type(value: object) -> str:
    if isinstance(value, str):
        return value
    raise InvalidInput(f"input_type is {_shown(value)}; give a str, such as 'query' or 'document'.")


def _output_type(value: object) -> OutputType:
    if isinstance(value, str) and value in OUTPUT_TYPES:
        return value
    given = "not known" if isinstance(value, str) else _shown(value)
    raise InvalidInput(f"output_type is {given}; give one of {', '.join(OUTPUT_TYPES)}.")


def _ranges(value: object) -> np.ndarray:
    try:
        ranges = np.asarray(value)
    except ValueError:  # rows of different lengths
        ranges = np.empty(0)
    if ranges.ndim != 2 or ranges.shape[0] != 2 or ranges.dtype.kind not in "iuf":
        raise InvalidInput(
            f"ranges are {type(value).__name__} of shape {list(ranges.shape)} and dtype "
            f"{ranges.dtype}; give numbers of shape [2, dims], the lowest and highest values."
        )
    if not np.isfinite(ranges).all():
        raise InvalidInput("ranges have NaN or infinity; measure them over valid vectors.")
    return ranges.astype(np.float32, copy=False)


def _sticky_key(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InvalidInput(f"sticky_key is {type(value).__name__}; give a str.")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise InvalidInput("sticky_key has a lone surrogate, which UTF-8 cannot hold.") from None


def _errors(value: object) -> str:
    if isinstance(value, str) and value in ("raise", "collect"):
        return value
    given = "not known" if isinstance(value, str) else _shown(value)
    raise InvalidInput(f"errors is {given}; give 'raise' or 'collect'.")


def _deadline_s(value: object) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and not math.isnan(cast(float, value)) and cast(float, value) > 0:
        return float(cast(float, value))
    raise InvalidInput(f"deadline_s is {_shown(value)}; give seconds above 0.")


def _shown(value: object) -> str:
    """A number as it is; of anything else the type."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return f"{value}" if is_number else type(value).__name__


EVERY = ("sticky_key", "deadline_s")
VECTOR = ("dimensions", "output_type", "ranges", *EVERY)
OPTIONS: dict[str, tuple[str, ...]] = {
    "embed": ("input_type", *VECTOR),
    "embed_images": (*VECTOR, "errors"),
    "embed_multimodal": ("input_type", *VECTOR, "errors"),
    "embed_documents": ("input_type", *VECTOR),
    "embed_documents(late=True)": ("input_type", *EVERY),
    "embed_sparse": ("input_type", *EVERY),
    "embed_multi": ("input_type", *EVERY),
    "rank": EVERY,
    "score": EVERY,
    "classify": EVERY,
}
"""Options of each method."""
OPTIONAL = frozenset(("input_type", "dimensions", "ranges", "sticky_key", "deadline_s"))
"""Options that may be None."""
CHECKS: dict[str, Callable[[object], Any]] = {
    "input_type": _input_type,
    "dimensions": _dimensions,
    "output_type": _output_type,
    "ranges": _ranges,
    "sticky_key": _sticky_key,
    "errors": _errors,
    "deadline_s": _deadline_s,
}
