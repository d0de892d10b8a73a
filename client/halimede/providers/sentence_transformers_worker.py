"""The process behind the provider sentence_transformers: JSON lines in, JSON lines out.

The first line opens a model: `{"id": 0, "model": …, "device": …}`; each other line embeds:
`{"id": n, "texts": […], "input_type": …}`. Answers carry the same id; an error is
`{"id": n, "error": class of halimede_ops.errors, "message": …}`. It ends with its stdin.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from typing import Any

import numpy as np

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def main() -> None:
    """Answer stdin's lines on stdout until it ends."""
    # What libraries print must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    model: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if model is None:
                model = _open(request["model"], request["device"])
                answer = _facts(model)
            else:
                answer = _embed(model, request["texts"], request["input_type"])
        except MemoryError:
            answer = {"error": "OutOfMemory", "message": "no memory for this many texts."}
        except _Refused as refused:
            answer = {"error": "UnknownInputType", "message": str(refused)}
        except Exception as error:  # its words may hold a text or a path
            name = "ServerError" if model is not None else "InvalidModel"
            answer = {"error": name, "message": f"the model failed ({type(error).__name__})."}
        answers.write(json.dumps({"id": request["id"], **answer}) + "\n")
        answers.flush()


class _Refused(Exception):
    """The model has no such prompt."""


def _open(name: str, device: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(name, device=device, local_files_only=os.path.isdir(name))  # noqa: PTH112


def _facts(model: Any) -> dict[str, Any]:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {
        "weights": _fingerprint(model),
        "precision": PRECISIONS.get(dtype, dtype),
        "dims": model.get_sentence_embedding_dimension(),
        "max_tokens": int(model.max_seq_length or model.tokenizer.model_max_length),
    }


def _fingerprint(model: Any) -> str:
    """SHA-256 of all that a vector depends on: weights, modules, tokenizer, prompts, limit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).numpy().tobytes())
    facts = (repr(model), json.dumps(model.prompts, sort_keys=True), model.max_seq_length)
    digest.update("\0".join(map(str, facts)).encode())
    digest.update(model.tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def _embed(model: Any, texts: list[str], input_type: str | None) -> dict[str, Any]:
    prompt = _prompt(model, input_type)
    vectors = model.encode(texts, prompt=prompt, show_progress_bar=False)
    encoded = model.tokenizer([prompt + text for text in texts], truncation=False, verbose=False)
    return {
        "vectors": base64.b64encode(np.ascontiguousarray(vectors, "<f4").tobytes()).decode(),
        "tokens": [len(ids) for ids in encoded["input_ids"]],
    }


def _prompt(model: Any, input_type: str | None) -> str:
    known = {"query": "", "document": "", **model.prompts}
    if not input_type:
        return str(known.get(model.default_prompt_name, ""))
    if input_type not in known:
        raise _Refused(
            f"the input type given is not one of the model's: {', '.join(sorted(known))}. "
            "Omit it for none."
        )
    return str(known[input_type])


if __name__ == "__main__":
    main()
