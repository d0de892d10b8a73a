"""Two towers: models that embed texts and images into one space, as CLIP and SigLIP."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halimede_ops import text
from halimede_ops.errors import InvalidModel
from halimede_tools.build.kinds.files import read_json
from halimede_tools.build.vision import processor

SIGLIP, NAFLEX = "siglip", "siglip2"
TWO_TOWERS = ("clip", SIGLIP)
"""Model types whose `get_text_features` and `get_image_features` are in one space."""


def has_two_towers(model: Any) -> bool:
    """Whether a loaded model embeds texts and images."""
    return model_type(model) in TWO_TOWERS and hasattr(model[0].auto_model, "get_image_features")


def pads_texts(model: Any) -> bool:
    """Whether a loaded model sees every text padded to its token limit, as it was trained."""
    return model_type(model) == SIGLIP


def model_type(model: Any) -> str:
    """The type of a SentenceTransformer's first module, such as `bert`."""
    transformer = getattr(model[0], "auto_model", None)
    return str(getattr(getattr(transformer, "config", None), "model_type", ""))


def prepare(folder: Path, name: str) -> None:
    """Raise unless a folder's towers can be built; let transformers read a SigLIP's tokenizer.

    Raises:
        InvalidModel: it is a SigLIP without `tokenizer.json`, or one for images of any size, or a
            model of texts and images of another type.
    """
    configs = [read_json(path) for path in folder.rglob("config.json")]
    types = {config.get("model_type") for config in configs}
    if NAFLEX in types:
        raise InvalidModel(
            f"{name} is a SigLIP 2 for images of any size (NaFlex), which is not supported. Take "
            "the one for images of a fixed size, such as siglip2-base-patch16-224."
        )
    for config in configs:
        has_both = {"text_config", "vision_config"} <= config.keys()
        if has_both and config.get("model_type") not in TWO_TOWERS:
            raise InvalidModel(
                f"{name} is a {config.get('model_type')}, a model of texts and images of a type "
                f"that is not supported; {' and '.join(TWO_TOWERS)} are. For its texts alone, save "
                "its text model with its tokenizer in a folder of its own."
            )
    if SIGLIP in types and not any(folder.rglob(text.FILE_NAME)):
        raise InvalidModel(
            f"{name} has no {text.FILE_NAME}, and transformers cannot make one of SigLIP's "
            "spiece.model. Add the file from where the model was published."
        )
    if SIGLIP in types:
        _read_fast_tokenizer()


def _read_fast_tokenizer() -> None:
    """Let transformers read the `tokenizer.json` of a SigLIP folder. Its own SigLIP tokenizer needs
    sentencepiece, and has no such file.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, SiglipConfig

    name = "SiglipTokenizerFast"  # the name that AutoTokenizer looks for
    fast = type(name, (PreTrainedTokenizerFast,), {"model_input_names": ["input_ids"]})
    register: Any = AutoTokenizer.register
    register(SiglipConfig, fast_tokenizer_class=fast, exist_ok=True)


def pad_to_limit(model: Any, name: str) -> None:
    """Let a loaded SigLIP pad each text to its token limit, as `padding="max_length"` does.

    Raises:
        InvalidModel: its tokenizer pads on the left, or its token limit was changed.
    """
    limit = model[0].auto_model.config.text_config.max_position_embeddings
    if model.tokenizer.padding_side != "right":
        raise InvalidModel(
            f"{name} pads its texts on the left; SigLIP pads them on the right. Set padding_side "
            "in its tokenizer_config.json."
        )
    if model.max_seq_length != limit:
        raise InvalidModel(
            f"max_tokens is {model.max_seq_length}; {name} was trained with every text padded to "
            f"{limit} tokens, and takes no other limit."
        )
    padding = {"padding": "max_length", "max_length": limit}
    model[0].processing_kwargs["text"] = {**model[0].processing_kwargs.get("text", {}), **padding}


@contextlib.contextmanager
def completed(folder: Path) -> Iterator[Path]:
    """The folder as sentence-transformers can read it: itself, or a copy of links with a file of
    OWN_DEFAULTS where its two towers have no file for images.
    """
    towers = config(folder)
    if towers is None or processor.options_file(folder) is not None:
        yield folder
        return
    path, fields = towers
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "model"
        shutil.copytree(folder, copy, copy_function=_link)
        own = processor.image_processor(folder, folder.name, fields)
        own.save_pretrained(copy / path.parent.relative_to(folder))
        yield copy


def _link(file: str, link: str) -> None:
    Path(link).symlink_to(Path(file).resolve())


def lacks_preprocessing(folder: Path) -> bool:
    """Whether the images of a folder's towers are prepared by OWN_DEFAULTS."""
    return config(folder) is not None and processor.options_file(folder) is None


def config(folder: Path) -> tuple[Path, Any] | None:
    """The config.json of a folder's towers, and its content as transformers reads it."""
    for path in sorted(folder.rglob("config.json")):
        if read_json(path).get("model_type") in TWO_TOWERS:
            from transformers import AutoConfig

            return path, AutoConfig.from_pretrained(path.parent)
    return None
