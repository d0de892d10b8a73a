"""The generated pages of docs/reference/: `python tests/reference_pages.py` writes them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forms
import typer

from halimede.cli import app
from halimede_ops import errors

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
NOTE = "<!-- Generated: `make docs-reference` writes this page. -->\n\n"


def commands() -> str:
    """The page of the command line, from its own help."""
    program, *others = below("halimede", typer.main.get_command(app))
    contents = [
        f"- [`{name}`](#{name.replace(' ', '-')}): {paragraphs(command)[0].splitlines()[0]}"
        for name, command in others
        if not hasattr(command, "commands") or command.invoke_without_command
    ]
    sections = [section(*one) for one in (program, *others)]
    return "\n".join([f"{NOTE}# Commands\n", *contents, "", *sections])


def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command by its whole name, then those below it."""
    yield name, command
    for part, child in getattr(command, "commands", {}).items():
        yield from below(f"{name} {part}", child)


def section(name: str, command: Any) -> str:
    """What one command does, and what it takes."""
    rows = [row(param) for param in command.params if param.name != "help"]
    table = ["| argument or option | default | |", "|---|---|---|", *rows, ""] if rows else []
    return "\n".join([f"## {name}\n", "\n\n".join(paragraphs(command)), "", *table])


def row(param: Any) -> str:
    """One argument or option."""
    is_argument = param.param_type_name == "argument"
    named = param.name.upper() if is_argument else ", ".join(param.opts + param.secondary_opts)
    default = "required" if param.required else f"`{param.default}`" if param.default else ""
    said = (param.help or "").replace("|", "\\|")
    return f"| `{named}` | {default} | {said} |"


def paragraphs(command: Any) -> list[str]:
    """A command's help."""
    return inspect.cleandoc(command.help or "").split("\n\n")


def models() -> str:
    """The page of models, from the forms that tests build."""
    sections = []
    for suite in forms.SUITES:
        rows = [
            f"| {form.what} | {', '.join(form.published)} | {form.more} |"
            for form in suite.forms.values()
        ]
        sections += [
            f"### {suite.title}",
            "",
            f"Compared with {suite.reference}: {suite.bound}. `{suite.test}`",
            "",
            "| form | models of the catalogue | what else to know |",
            "|---|---|---|",
            *rows,
            "",
        ]
    others = [f"| {name} | {why} |" for name, why in forms.NOT_VERIFIED.items()]
    return "\n".join(
        [
            MODELS_HEAD,
            *sections,
            "### Not verified",
            "",
            "| model | why |",
            "|---|---|",
            *others,
            "",
        ]
    )


MODELS_HEAD = f"""{NOTE}# Models

`halimede models --available` lists the catalogue and filters it by kind, language, dimensions, size,
licence and use case. `halimede build NAME` builds a model of it
([your own model](../guides/your-own-model.md)).

## The default model

| model | what | mean cosine to sentence-transformers | lowest cosine | lowest invariance | file |
|---|---|---|---|---|---|
| `all-MiniLM-L6-v2` | FP32 | 1.000000 | 1.000000 | 1.000000 | 90.3 MB |
| `all-MiniLM-L6-v2-fp16` | FP16 weights, bf16 arithmetic | 0.999957 | 0.999864 | 0.999979 | 45.3 MB |
| `all-MiniLM-L6-v2-int8` | static QDQ INT8 | 0.998168 | 0.959800 | 1.000000 | 23.2 MB |

Over 600 texts, more than half of them under 20 tokens: queries, questions, titles, list items,
messages, long texts, over 30 languages, and odd ones such as control characters or one word 400
times. On a CPU without bf16, FP16 computes in f32 (1.000000). The figures are from `quality.json` of
each precision ([what the build checks](../guides/your-own-model.md#precision)).

## What was verified, and how

The weights of the default model are real. No hub is reached where halimede is tested, so every other
model was verified on its *form*: a small model of the same architecture with random weights, in the
folder form that its authors publish, with a tokenizer of the same kind. A real Triton serves each
form, and what it gives is compared with the reference library on the same folder: 100 mixed inputs
(odd characters, empty, beyond the limit), together and alone. The tables are written from
`tests/forms.py`, which the tests themselves read.
"""


def error_classes() -> str:
    """The page of errors, from the tree in `halimede_ops.errors`."""
    [tree] = re.findall(
        r"^HalimedeError .*?(?=\n\n)", errors.__doc__ or "", re.DOTALL | re.MULTILINE
    )
    rows = [
        f"| `{error.__name__}` | {error.code} | {'yes' if error.retryable else 'no'} "
        f"| {' '.join((error.__doc__ or '').split())} |"
        for error in family(errors.HalimedeError)
    ]
    return f"""{NOTE}# Errors

Every error that halimede raises is a `HalimedeError`. A message names what was wrong, what was given
and what to do; it never holds a user's text or a path of the server. `error.code` is the name of a
Triton error code: backends answer with it, and the client turns it back into the class.
`error.retryable` says whether the same request can succeed on a second try.

```
{tree}
```

| error | Triton code | retryable | meaning |
|---|---|---|---|
{chr(10).join(rows)}
"""


def family(error: type[errors.HalimedeError]) -> Iterator[type[errors.HalimedeError]]:
    """An error class and all below it, in the order of the tree."""
    yield error
    for below in error.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from family(below)


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": commands,
    "errors.md": error_classes,
    "models.md": models,
}
"""Page → what gives its text."""

if __name__ == "__main__":
    for name, text in PAGES.items():
        (FOLDER / name).write_text(text())
