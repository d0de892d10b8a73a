"""Where a long text can be cut before it is tokenized, without a change of the token ids of the
part that is kept.

A tokenizer splits a text into words and each word into tokens. A place to cut ends a word,
whatever follows it: the words before it, and so their tokens, do not depend on the rest of the
text. Neither do the words after it depend on those before it, but for the first: some tokenizers
put a space in front of a text. `places` knows such places for the kinds of tokenizers listed here,
and for no other.

- BERT's words end at white space and at every punctuation mark.
- The words of byte-level BPE (GPT-2, Qwen, Llama, CLIP) are runs of letters, of digits, or of other
  characters. A run of letters ends at white space and at a punctuation mark.
- SentencePiece's words (Metaspace) end at a space.
- BPE without words (Gemma) merges over the whole text, but no merge crosses the start of a `▁`
  unless a token of the vocabulary has a `▁` behind another character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a client without the extra `onnx` has no tokenizers
    from tokenizers import Tokenizer

WINDOW = 4096
"""Characters in which a place to cut is looked for: a longer word is not cut."""
_LETTER = "[A-Za-zぁ-ゖァ-ヺ\u4e00-\u9fa5]"
_MARK = "[.,;:!?()。，、！？；：]"
_WORD_END = r"(?<=[^\W_])(?=[ \t\r\n])"
_SPACE = r"(?<=[^\W_])(?= )"
_WORD_OR_MARK = rf"{_WORD_END}|(?<={_LETTER})(?={_MARK})"
_BERT = rf"(?=[ \t\r\n]|{_MARK})"

_LOCAL_NORMALIZERS = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled"}
_LOCAL_NORMALIZERS |= {"Lowercase", "Prepend", "Strip", "StripAccents"}
"""Normalizers that change a word the same way whatever follows its end."""
_LOCAL_REPLACED = {" ", "``", "''", " {2,}", r"\s+"}
"""Patterns that a Replace may have."""
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
SPLITS = {
    *(
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for digits in (r"\p{N}", r"\p{N}{1,3}")
    ),
    rf"{_CONTRACTIONS}|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+",
    rf"<\|startoftext\|>|<\|endoftext\|>|{_CONTRACTIONS}|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+",
}
"""Regular expressions of words: of Qwen, Llama 3 and CLIP."""


def places(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """The places where this tokenizer's texts can be cut; None where none is known to be safe."""
    normalizer, words = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
    pattern = _word_pattern(words) if _is_local(normalizer) else None
    if pattern is None and _merges_within_words(tokenizer, normalizer, words):
        pattern = _SPACE
    added = tokenizer.get_added_tokens_decoder().values()
    if pattern is None or any(re.search(f"(?!^)(?:{pattern})", one.content) for one in added):
        return None  # a token that was added as a whole must not be cut
    return re.compile(pattern)


def cut(text: str, at_least: int, pattern: re.Pattern[str] | None) -> str:
    """The text up to its first place to cut from `at_least` characters on.

    If the next WINDOW characters have none, the window at twice the distance is tried, and so on;
    without any the text stays whole.
    """
    while pattern is not None and at_least < len(text):
        place = pattern.search(text, at_least, at_least + WINDOW)
        if place:
            return text[: place.start()]
        at_least *= 2
    return text


def cut_front(text: str, at_least: int, pattern: re.Pattern[str] | None) -> str:
    """As `cut`, from the front: the text from a place with `at_least` characters after it."""
    while pattern is not None and at_least < len(text):
        end = len(text) - at_least
        place = pattern.search(text, max(0, end - WINDOW), end)
        if place:
            return text[place.start() :]
        at_least *= 2
    return text


def _state(component: Any) -> Mapping[str, Any]:
    """The fields of a tokenizer's component, as in tokenizer.json; empty without one."""
    return json.loads(component.__getstate__()) if component is not None else {}


def _is_local(normalizer: Mapping[str, Any]) -> bool:
    kind = normalizer.get("type")
    if kind == "Sequence":
        return all(map(_is_local, normalizer["normalizers"]))
    if kind == "Replace":
        return not _LOCAL_REPLACED.isdisjoint(normalizer["pattern"].values())
    return kind is None or kind in _LOCAL_NORMALIZERS


def _word_pattern(words: Mapping[str, Any]) -> str | None:
    """The ends of the words that a pre-tokenizer makes; None if they are not known."""
    kind = words.get("type")
    if kind == "Sequence":
        steps = [step for step in words["pretokenizers"] if step["type"] != "Digits"]
        return _word_pattern(steps[0]) if steps else None
    if kind == "BertPreTokenizer":
        return _BERT
    if kind == "ByteLevel" and words["use_regex"]:
        return _WORD_OR_MARK
    if kind == "Split" and words["pattern"].get("Regex") in SPLITS:
        return _WORD_OR_MARK
    if kind in ("Whitespace", "WhitespaceSplit"):
        return _WORD_END
    if kind == "Metaspace" and words["split"]:
        return _SPACE
    return None


def _merges_within_words(
    tokenizer: Tokenizer, normalizer: Mapping[str, Any], words: Mapping[str, Any]
) -> bool:
    """Whether BPE over the whole text never merges across the start of a `▁`."""
    splits_nothing = words.get("type") in (None, "Split") and words.get("pattern") in (
        None,
        {"String": " "},
    )
    replaces_spaces = normalizer.get("type") == "Replace" and normalizer["content"] == "▁"
    is_bpe = type(tokenizer.model).__name__ == "BPE"
    if not (is_bpe and replaces_spaces and splits_nothing):
        return False
    return not any(re.search("[^▁]▁", token) for token in tokenizer.get_vocab())
