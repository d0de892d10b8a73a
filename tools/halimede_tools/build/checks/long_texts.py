"""Long texts: the lengths at which a model may compute in another way, and texts of these lengths.

A traced graph has the branches that the traced text took. The attention of some models, and the
positions of others, change with the length of a text: BigBird's attention is sparse above a number
of tokens, and Phi-3 scales its positions above another. So every model is checked on both sides of
each number of tokens that its config names, and at its token limit.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from halimede_tools.build.samples.corpus import SENTENCES

NAMED = re.compile(
    "window|local|chunk|block_size|radius|original_max_position|max_distance|bucket|max_relative"
)
"""Parts of the keys of a config that hold a number of tokens at which a model changes."""
HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads", "encoder_attention_heads")
"""Keys of a config that hold the number of attention heads."""
SHORTEST = 256
"""Shortest of the lengths that are doubled up to the token limit. The texts of the check are mostly
shorter."""
ABOVE = 8
"""Tokens by which a text exceeds a number that the config names."""
BYTES_PER_SCORE = 16
"""Memory for one attention score: four float32 copies."""


class LongText(NamedTuple):
    """How far the result of one long text agrees with the model's own."""

    tokens: int
    agreement: float
    """The cosine of the vectors; for scores, 1 minus their largest difference."""


def thresholds(config: Mapping[str, Any]) -> dict[int, str]:
    """Numbers of tokens at which the model may compute in another way → the config's key."""
    found: dict[int, str] = {}
    if config.get("attention_type") == "block_sparse":  # as BigBird's forward computes it
        above = (5 + 2 * config["num_random_blocks"]) * config["block_size"]
        found[above] = "attention_type block_sparse"
    for key, value in _numbers(config):
        if NAMED.search(key):
            found.setdefault(value, key)
    return found


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a config above 1, at any depth, with its key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and number > 1:
                yield key, number


def longest(config: Mapping[str, Any], memory_bytes: int) -> int:
    """Tokens of the longest text whose attention scores fit into the memory. They grow with the
    square of the tokens.
    """
    sizes = [int(part[key]) for part in _parts(config) for key in HEADS if part.get(key)]
    return math.isqrt(memory_bytes // (BYTES_PER_SCORE * max(sizes, default=16)))


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def lengths(max_tokens: int, named: Sequence[int], limit: int) -> list[int]:
    """The lengths in tokens to check, ascending; none is above `limit`."""
    doubled = [SHORTEST << power for power in range(max_tokens.bit_length())]
    beside = [length for number in named for length in (number, number + ABOVE)]
    return sorted({min(max_tokens, limit, length) for length in (*doubled, *beside, max_tokens)})


def texts(sizes: Sequence[int], tokens: Callable[[str], int]) -> list[str]:
    """A text of each size: the longest part of one long text that has at most so many tokens."""
    chance, whole = random.Random(6), ""
    while tokens(whole) <= max(sizes):
        whole += " ".join(chance.choices(SENTENCES, k=20)) + " "
    return [_part(whole, size, tokens) for size in sizes]


def _part(whole: str, size: int, tokens: Callable[[str], int]) -> str:
    least, most = 0, len(whole)
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if tokens(whole[:middle]) <= size else (least, middle - 1)
    return whole[:least]


def missed(found: Sequence[LongText], named: Mapping[int, str], bar: float) -> list[str]:
    """What long texts miss of the bar of their agreement: one sentence, or none."""
    below = [text for text in found if not text.agreement >= bar]
    if not below:
        return []
    first, right = below[0], right_up_to(found, bar)
    keys = [f"{key} ({number})" for number, key in named.items() if right <= number < first.tokens]
    cause = f", where {' and '.join(sorted(keys))} of its config takes effect" if keys else ""
    worst = min(below, key=lambda text: text.agreement)
    return [
        f"texts of {first.tokens} tokens and more do not get the model's own result{cause} "
        f"(agreement {worst.agreement:.6f} at {worst.tokens} tokens, the bar is {bar})"
    ]


def right_up_to(found: Sequence[LongText], bar: float) -> int:
    """The length in tokens up to which every text reaches the bar; 0 if the shortest does not."""
    right = 0
    for text in found:
        if not text.agreement >= bar:
            break
        right = text.tokens
    return right
