"""The subprocess of the provider sentence_transformers: JSON lines in, JSON lines out.

The first line opens a model: `{"id": 0, "model": …, "device": …}`; each other line embeds:
`{"id": n, "texts": […], "input_type": …}` or `{"id": n, "images": [base64 of a file, …]}`. Answers
carry the same id. An error is `{"id": n, "error": class of halimede_ops.errors, "message": …}`, and
has `"place": {"subject": "image", "index": …}` if it is about one image. The process ends with its
stdin.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import sys
from typing import Any

import numpy as np

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def main() -> None:
    """Answer the lines of stdin on stdout until stdin ends."""
    # Libraries print to stderr, so that their words do not mix with the answers.
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
                embed = _embed_images if "images" in request else _embed
                answer = embed(model, request)
        except MemoryError:
            answer = {"error": "OutOfMemory", "message": "no memory for this many texts."}
        except _Refused as refused:
            answer = {"error": refused.error, "message": str(refused), "place": refused.place}
        except Exception as error:  # its words may hold a text or a path
            name = "ServerError" if model is not None else "InvalidModel"
            answer = {"error": name, "message": f"the model failed ({type(error).__name__})."}
        answers.write(json.dumps({"id": request["id"], **answer}) + "\n")
        answers.flush()


class _Refused(Exception):
    """The request is invalid."""

    def __init__(self, error: str, message: str, **place: str | int) -> None:
        super().__init__(message)
        self.error = error
        """Name of a class of halimede_ops.errors."""
        self.place = place


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
        "images": "image" in getattr(model, "modalities", ()),
    }


def _fingerprint(model: Any) -> str:
    """SHA-256 of what decides a vector: weights, modules, tokenizer, prompts, token limit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).numpy().tobytes())
    facts = (repr(model), json.dumps(model.prompts, sort_keys=True), model.max_seq_length)
    digest.update("\0".join(map(str, facts)).encode())
    digest.update(model.tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def _embed(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    prompt, texts = _prompt(model, request["input_type"]), request["texts"]
    vectors = model.encode(texts, prompt=prompt, show_progress_bar=False)
    encoded = model.tokenizer([prompt + text for text in texts], truncation=False, verbose=False)
    return {"vectors": _packed(vectors), "tokens": [len(ids) for ids in encoded["input_ids"]]}


def _embed_images(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    opened = [_picture(base64.b64decode(data), row) for row, data in enumerate(request["images"])]
    vectors = model.encode([picture for picture, _ in opened], show_progress_bar=False)
    return {
        "vectors": _packed(vectors),
        "images": [[*picture.size, name] for picture, name in opened],
    }


def _picture(data: bytes, row: int) -> tuple[Any, str]:
    """Return the picture as built models see it, and the name of its format."""
    from PIL import Image, ImageOps

    from halimede_ops.image import COMMON_NAMES, FORMATS

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            name = COMMON_NAMES.get(str(image.format), str(image.format))
            return ImageOps.exif_transpose(image).convert("RGB"), name
    except Image.DecompressionBombError:
        raise _Refused(
            "ImageTooLarge", "has too many pixels.", subject="image", index=row
        ) from None
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise _Refused(
            "InvalidImage",
            f"is none of {', '.join(FORMATS)}, or damaged ({type(error).__name__}).",
            subject="image",
            index=row,
        ) from None


def _packed(vectors: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(vectors, "<f4").tobytes()).decode()


def _prompt(model: Any, input_type: str | None) -> str:
    known = {"query": "", "document": "", **model.prompts}
    if not input_type:
        return str(known.get(model.default_prompt_name, ""))
    if input_type not in known:
        raise _Refused(
            "UnknownInputType",
            f"the input type given is not one of the model's: {', '.join(sorted(known))}. "
            "Omit it for none.",
        )
    return str(known[input_type])


if __name__ == "__main__":
    main()
