"""Chat: rerankers that are decoders, which answer yes or no to a chat of a query and a document.

sentence-transformers renders the chat by the tokenizer's template, tokenizes it as one text, and
cuts it at the token limit; the tokens behind the document are then put back, since the answer
follows the last one. A template that puts both texts into fixed text is known by three strings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from halimede_ops.errors import InvalidModel
from halimede_ops.spec import ModelSpec
from halimede_ops.text import TextTokenizer

MODULE = "LogitScore"
QUERY, DOCUMENT = "\ue000query\ue001", "\ue000document\ue001"
"""Texts of the private use area of Unicode, which no template has."""
FILLERS = ("0", "1 2 3 4")
"""Two texts without a common token: the tokens that end both chats are those of the template."""
WHAT_WORKS = (
    "Give the folder a chat_template.jinja that puts the content of the role query, then that of "
    "the role document, into fixed text, both unchanged."
)
SAMPLES = (
    ("what is a panda?", "The giant panda is a bear."),
    ("", ""),
    (" spaces  around ", "\n new lines \n\n"),
    ("{{ query }} <|im_end|> %s {0}", "<b>&amp;</b> \\n </s> <|endoftext|>"),
    ("größe 東京 😀", "e\u0301 \u200b " + DOCUMENT[:1]),
)
"""Pairs whose tokens are compared, with long ones besides."""


def is_decoder(model: Any) -> bool:
    """Whether a loaded CrossEncoder takes its score from a decoder's next token."""
    return any(type(module).__name__ == MODULE for module in model)


def has_template(model: Any) -> bool:
    """Whether a loaded model's pairs are chats."""
    return is_decoder(model) and "message" in model[0].modality_config


def facts(model: Any, name: str) -> dict[str, Any]:
    """The fields of a ModelSpec that a reranker with a chat template has besides; else none.

    Raises:
        InvalidModel: the template does not put both texts into fixed text.
    """
    if not is_decoder(model):
        return {}
    if len(model) != 2:
        raise InvalidModel(
            f"{name} has {len(model)} modules; supported for a decoder that answers yes or no are "
            f"Transformer and {MODULE}."
        )
    if not has_template(model):
        return {}
    # The prompt is part of the template.
    return {
        "template": _template(model, name),
        "last_ids": _last_ids(model),
        "default_input_type": None,
    }


def counter(model: Any, spec: ModelSpec) -> Callable[[str], int]:
    """A function that counts the tokens of the whole chat of an empty query and this document."""
    before, between, behind = spec.template
    return lambda text: len(
        model.tokenizer(
            f"{before}{between}{text}{behind}", add_special_tokens=False, verbose=False
        )["input_ids"]
    )


def check_tokens(model: Any, spec: ModelSpec, tokenizer_json: str) -> None:
    """Raise unless the tokens of samples are those of sentence-transformers.

    Raises:
        InvalidModel: they are others.
    """
    from tokenizers import Tokenizer

    tokenizer = TextTokenizer(Tokenizer.from_str(tokenizer_json), spec)
    long = "a long text of many words " * spec.max_tokens
    for pair in (*SAMPLES, ("long", long), (long, "short")):
        found = tokenizer.encode([pair[0]], [None], [pair[1]])[0].ids
        given = model.preprocess([pair], prompt=_prompt(model))["input_ids"][0].tolist()
        if found != given:
            raise InvalidModel(
                f"{spec.name} has a chat template that changes a text, or a tokenizer that does. "
                + WHAT_WORKS
            )


def _template(model: Any, name: str) -> tuple[str, str, str]:
    try:
        chat = _rendered(model, QUERY, DOCUMENT)
    except Exception as error:  # jinja2 and the template each raise their own
        raise InvalidModel(
            f"{name} has a chat template that cannot be rendered ({type(error).__name__}). "
            + WHAT_WORKS
        ) from error
    before, _, rest = chat.partition(QUERY)
    between, _, behind = rest.partition(DOCUMENT)
    if f"{before}{QUERY}{between}{DOCUMENT}{behind}" != chat or chat.count("\ue000") != 2:
        raise InvalidModel(
            f"{name} has a chat template without the query or the document. " + WHAT_WORKS
        )
    return before, between, behind


def _rendered(model: Any, query: str, document: str) -> str:
    transformer = model[0]
    messages = [transformer.input_formatter.pair_to_messages((query, document))]
    prompt = _prompt(model)
    if prompt:
        messages = transformer.input_formatter.prepend_prompt_to_messages(messages, prompt)
    [chat] = transformer.processor.apply_chat_template(
        messages, tokenize=False, **_template_options(model)
    )
    return str(chat)


def _last_ids(model: Any) -> tuple[int, ...]:
    """The tokens that end every chat; none where sentence-transformers does not put them back."""
    if not model[0].processing_kwargs.get("chat_template", {}).get("restore_suffix", True):
        return ()
    first, second = (
        model.tokenizer(_rendered(model, text, text), add_special_tokens=False)["input_ids"]
        for text in FILLERS
    )
    count = _common_end(first, second)
    return tuple(first[len(first) - count :]) if count < min(len(first), len(second)) else ()


def _common_end(first: Sequence[int], second: Sequence[int]) -> int:
    count = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        count += 1
    return count


def _template_options(model: Any) -> dict[str, Any]:
    options = dict(model[0].processing_kwargs.get("chat_template", {}))
    options.pop("restore_suffix", None)
    return options


def _prompt(model: Any) -> str | None:
    prompt: str | None = model.prompts.get(model.default_prompt_name or "")
    return prompt
