"""Options and inputs of a call are checked once, with one line that names the argument."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from halimede.inputs.images import image_inputs, pair_inputs
from halimede.inputs.options import CallOptions, check_options, check_progress, check_window
from halimede.inputs.texts import encode_texts, stream_of
from halimede_ops.errors import InvalidDimensions, InvalidInput, InvalidText
from halimede_ops.lines import read_lines

RANGES = np.array([[-1, -1], [1, 1]], np.float64)


def test_options_become_one_type() -> None:
    """Numpy numbers are numbers, keys are bytes, ranges are float32."""
    given = {"dimensions": np.int64(3), "output_type": "int8", "ranges": RANGES, "sticky_key": "é"}
    options = check_options("embed", given)
    assert (options.dimensions, options.sticky_key) == (3, "é".encode())
    assert options.ranges is not None
    assert options.ranges.dtype == np.float32
    assert check_options("embed_images", {}) == CallOptions()
    given = {"deadline_s": None, "dimensions": None}
    assert check_options("embed_multimodal", given) == CallOptions()


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("embed", "dimension"),
        ("embed", "errors"),
        ("embed_images", "first"),
        ("embed_images", "input_type"),
        ("embed_multimodal", "window"),
        ("embed_sparse", "dimensions"),
        ("embed_multi", "output_type"),
        ("rank", "input_type"),
        ("classify", "ranges"),
    ],
)
def test_an_unknown_option_is_named(method: str, name: str) -> None:
    """An option of no method, or of another, is refused with the method's known options."""
    with pytest.raises(InvalidInput, match=rf"{method}\(\) has no option `{name}`.*Known: "):
        check_options(method, {name: 1})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dimensions", [1.5, True, "3"]),
        ("output_type", ["int4", 8, None, []]),
        ("sticky_key", [4, [], "\ud800"]),
        ("errors", ["colect", 1, None]),
        ("deadline_s", [0, -1, float("nan"), "x", True]),
        ("input_type", [5, b"query"]),
        ("ranges", [3, "x", [[1], [1, 2]], [1, 2], RANGES * np.nan, RANGES.astype(str)]),
    ],
)
def test_a_wrong_value_names_its_option(name: str, values: list[Any]) -> None:
    """The message is one line that begins with the option."""
    for value in values:
        with pytest.raises(InvalidInput, match=rf"^{name} ") as raised:
            check_options("embed_multimodal", {name: value})
        assert "\n" not in str(raised.value)
        assert "colect" not in str(raised.value)
        assert isinstance(raised.value, InvalidDimensions) == (name == "dimensions")


def test_window_and_progress_are_checked() -> None:
    """A window is a whole number above 0; progress is a bool."""
    assert check_window(np.int32(5)) == 5
    assert check_progress(True) is True
    for window in (0, "x", 1.5, True, None):
        with pytest.raises(InvalidInput, match="^window is "):
            check_window(window)
    with pytest.raises(InvalidInput, match="^progress is str"):
        check_progress("no")


def test_texts_are_a_str_or_ordered() -> None:
    """Every ordered iterable of str is accepted; a single str is one text."""
    given: list[Any] = [["a", "b"], ("a", "b"), np.array(["a", "b"]), iter("ab")]
    assert [encode_texts(texts) for texts in given] == [[b"a", b"b"]] * 4
    assert encode_texts("ab") == [b"ab"]


@pytest.mark.parametrize("value", [None, 5, b"ab", {"a": 1}, {"a"}, np.array(3)])
def test_what_is_no_list_is_refused(value: Any) -> None:
    """None, numbers, dicts and sets are refused by the argument's name."""
    with pytest.raises(InvalidInput, match="^texts is "):
        encode_texts(value)
    with pytest.raises(InvalidInput, match="^texts is "):
        stream_of(value, "texts")
    if not isinstance(value, bytes):
        with pytest.raises(InvalidInput, match="^images is "):
            image_inputs(value)
    if value is not None:
        with pytest.raises(InvalidInput, match="^texts is "):
            pair_inputs(value, None)


def test_a_single_text_or_path_is_no_stream() -> None:
    """A str is not read letter by letter."""
    for name in ("texts", "images"):
        with pytest.raises(InvalidInput, match=f"^{name} is a single str"):
            stream_of("a.jpg", name)
    with pytest.raises(InvalidInput, match="^images is a single str"):
        pair_inputs(["a"], "a.jpg")


def test_only_streams_are_async() -> None:
    """A stream may be async; the texts of one call may not."""

    async def texts() -> AsyncIterator[str]:
        yield "a"

    stream = texts()
    assert stream_of(stream, "texts") is stream
    with pytest.raises(InvalidInput, match="^texts is an async iterable"):
        encode_texts(stream)  # type: ignore[arg-type]


def test_only_line_ends_end_a_line() -> None:
    """LF, CR LF and CR end a line; U+2028, U+0085 and form feed are part of a text."""
    text = "\ufeffa\u2028b\r\nc\x85d\x0ce\rf\n\ng\n"
    lines = read_lines(io.BytesIO(text.encode()), "x")
    assert lines == ["a\u2028b", "c\x85d\x0ce", "f", "", "g"]
    assert read_lines(io.BytesIO(b""), "x") == []


def test_a_line_that_is_not_utf8_is_named() -> None:
    """The message has the line's number, not its text."""
    with pytest.raises(InvalidText, match=r"^x is not UTF-8 \(line 2\)"):
        read_lines(io.BytesIO(b"a\nb\xff\n"), "x")
