"""Export: a model's folder to `model.onnx`, `tokenizer.json` and `spec.json`.

The graph goes from tokens to the pooled vector. It contains pooling, the modules after it and
further heads. The graph of an encoder of images goes from pixels, which it scales, to the vector.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halimede_engine import session
from halimede_ops import spec, text
from halimede_ops.errors import HalimedeError
from halimede_ops.spec import POOLED, SPARSE_KIND, ModelSpec
from halimede_tools.build import describe
from halimede_tools.build.checks import traced, weights
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.graph import rewrite, shapes
from halimede_tools.build.kinds import activation, chat, contents, loaded
from halimede_tools.build.vision import encoder


def export(source: Path, options: ModelOptions, folder: Path) -> None:
    """Build step: write `model.onnx` (FP32, standard ONNX operators only), `tokenizer.json` and
    `spec.json`.

    Raises:
        InvalidModel: the folder is not a model that is supported, or a weight is missing or not
            finite.
        UntrustedCode: it carries code that `options` does not trust.
        BuildError: the model cannot be traced.
    """
    from halimede_tools.build.graph import lookup, tracing

    model = describe.load(source, options)
    facts = describe.describe(model, source, options)
    tokenizer = describe.tokenizer_json(model)
    if facts.template:
        chat.check_tokens(model, facts, tokenizer)
    tracing.add_heads(model, source, facts)
    weights.check_model(model, options.name)
    if contents.has_torch_weights(source):
        loaded.check_weights(model, source, options.name)
    outputs = output_widths(facts)
    with _optimised(facts, outputs, folder, model) as path:
        if facts.static:
            lookup.trace(model, path)
        elif facts.takes_pairs:
            activated = activation.activation(model, source, facts.kind)
            tracing.trace_scores(model, activated, facts, path)
        elif facts.kind == SPARSE_KIND:
            tracing.trace_sparse(model, path)
        elif facts.late is not None:
            tracing.trace_late(model, path)
        elif contents.has_torch_weights(source):
            tracing.trace(model, list(outputs), path, facts.token_types)
        else:
            with contents.without_links(source) as linked:
                graph = contents.onnx_file(linked, facts.name)
                _from_onnx(model, facts.name, graph, list(outputs), path)
    (folder / text.FILE_NAME).write_text(tokenizer, "utf-8")
    (folder / spec.FILE_NAME).write_text(facts.to_json(), "utf-8")


def export_images(source: Path, options: ModelOptions, folder: Path) -> None:
    """Build step: write the `model.onnx` (FP32, standard ONNX operators only) of an encoder of
    images, the vision tower of a CLIP among them, and `spec.json`.

    Raises:
        InvalidModel: the folder is not a model of images that is supported, or a weight is not
            finite.
        UntrustedCode: it carries code that `options` does not trust.
        BuildError: the encoder could not be exported.
    """
    from halimede_tools.build.graph import tracing

    module, facts = encoder.load(source, options)
    weights.check_model(module, options.name)
    with _optimised(facts, {POOLED: facts.dims}, folder) as path:
        tracing.trace_images(module, facts.images(), path)
        if not facts.takes_texts:
            shapes.fold(path)
    (folder / spec.FILE_NAME).write_text(facts.to_json(), "utf-8")


@contextlib.contextmanager
def _optimised(
    facts: ModelSpec, outputs: Mapping[str, int], folder: Path, model: Any = None
) -> Iterator[Path]:
    """A path for the raw graph, which is optimised into `folder` at the end.

    With `model`, the graph must give its vectors.
    """
    with tempfile.TemporaryDirectory(dir=folder) as raw:
        path = Path(raw) / session.FILE_NAME
        try:
            with describe.quiet():
                yield path
            rewrite.keep_outputs(path, outputs)
            opened = rewrite.optimise(path, folder / session.FILE_NAME)
        except (OSError, MemoryError, HalimedeError):
            raise
        except Exception as error:  # torch, optimum, onnx and onnxruntime each raise their own
            config = {} if model is None else describe.transformer_config(model)
            raise traced.not_traced(facts.name, config, error) from error
        if model is not None and loaded.embeds_texts(model):
            with describe.quiet():
                traced.check(opened, model, facts.name)


def output_widths(facts: ModelSpec) -> dict[str, int]:
    """Every output of the graph: name → its last dimension."""
    return {POOLED: facts.dims, **facts.heads}


def _from_onnx(model: Any, name: str, ready: Path, outputs: list[str], path: Path) -> None:
    """Put the modules after the transformer behind a ready-made graph of it."""
    from halimede_tools.build.graph import tracing

    body = rewrite.load_body(ready)
    weights.check_graph(body, name)
    missing = [name for name in outputs if name not in rewrite.output_names(body)]
    if missing:
        tail = path.with_name("tail.onnx")
        tracing.trace_tail(list(model)[1:], missing, body, tail)
        rewrite.append(body, tail)
    rewrite.save(body, path)
