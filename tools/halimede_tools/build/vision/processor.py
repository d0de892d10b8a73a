"""Processor: a model's `preprocessor_config.json` to the ImageSpec that images are prepared by.

The file is read by transformers' own class for it, the one that uses Pillow, so that defaults and
the format of older releases are the library's. Every option of these classes that changes a pixel
is either in the ImageSpec or refused by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from halimede_ops.errors import InvalidModel
from halimede_ops.spec import ImageSpec
from halimede_tools.build.kinds.files import read_json
from halimede_tools.build.kinds.recognise import PREPROCESSING

PROCESSOR = "processor_config.json"
"""File in which newer releases of transformers keep the same options, under `image_processor`."""
PROCESSORS = (
    "BeitImageProcessor", "BitImageProcessor", "CLIPImageProcessor", "ConvNextImageProcessor",
    "DeiTImageProcessor", "EfficientNetImageProcessor", "LevitImageProcessor",
    "MobileNetV1ImageProcessor", "MobileNetV2ImageProcessor", "MobileViTImageProcessor",
    "PoolFormerImageProcessor", "PvtImageProcessor", "SiglipImageProcessor", "ViTImageProcessor",
)  # fmt: skip
"""Classes of transformers that are supported. A file may name their older and faster forms as well:
`…FeatureExtractor` and `…ImageProcessorFast`."""
HONOURED = {
    "do_resize", "size", "resample", "crop_pct", "do_center_crop", "crop_size", "do_rescale",
    "rescale_factor", "rescale_offset", "do_normalize", "image_mean", "image_std", "include_top",
    "do_flip_channel_order",
}  # fmt: skip
"""Options of PROCESSORS that are in the ImageSpec."""
NO_EFFECT = {"do_convert_rgb", "do_reduce_labels"}
"""Options that change no pixel here: every image is RGB, and none has a map of labels."""
FORCING = ("rescale_offset", "include_top")
"""Options besides `do_…` that change pixels where they are true."""
OWN_DEFAULTS = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}
"""Type of a model with two towers → the processor of every model that was published of it."""
SIDES_ONLY = {
    "BeitImageProcessor", "DeiTImageProcessor", "EfficientNetImageProcessor", "PvtImageProcessor",
    "SiglipImageProcessor", "ViTImageProcessor",
}  # fmt: skip
"""Processors that resize to a height and a width alone; others also take a shortest edge."""
CONVNEXT, LEVIT = "ConvNextImageProcessor", "LevitImageProcessor"
LARGE_EDGE = 384
"""ConvNext's processor resizes to a square from this size on, and crops below it."""
LEVIT_RATIO = 256 / 224
"""How much larger than asked for Levit's processor resizes before it crops."""


def image_processor(folder: Path, name: str, config: Any = None) -> Any:
    """The transformers processor of a folder's images, the class that uses Pillow.

    A folder that says nothing has those of OWN_DEFAULTS, for the size in the model's `config`.

    Raises:
        InvalidModel: the folder says nothing and its type has no defaults, or names another class
            or an option that the class does not know.
    """
    import transformers

    found = options_file(folder)
    if found is None:
        return _default_processor(name, config)
    file, options = found
    kind = _class_name(options, folder)
    if kind not in PROCESSORS:
        raise InvalidModel(
            f"{name}: {file} names {kind or 'no image processor'}; supported are "
            f"{', '.join(PROCESSORS)}."
        )
    processor_class = getattr(transformers, kind)
    known = inspect.signature(processor_class.__init__).parameters
    for option, value in options.items():
        forces = option.startswith("do_") or option in FORCING
        if forces and value and option not in (known.keys() | NO_EFFECT):
            raise InvalidModel(
                f"{name}: {file} asks for {option}, which {kind} (Pillow) does not do. Remove it "
                "if the model was trained without."
            )
    return processor_class.from_dict(options)


def options_file(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The name of the file with a folder's options for images, and these; None without one."""
    for path in sorted(folder.rglob(PREPROCESSING)):
        return path.name, dict(read_json(path))
    for path in sorted(folder.rglob(PROCESSOR)):
        options = read_json(path).get("image_processor")
        if options:
            return path.name, dict(options)
    return None


def image_spec(processor: Any, name: str, *, positions: int = 1, pooling: str = "") -> ImageSpec:
    """The ImageSpec of a processor.

    Raises:
        InvalidModel: its images would differ in size, or an option has a value that is not
            supported.
    """
    kind = type(processor).__name__
    resize, crop = _sizes(processor, kind, name)
    mean, std = _normalisation(processor)
    return ImageSpec(
        height=crop[0],
        width=crop[1],
        resize=resize,
        resample=int(processor.resample or 0),
        scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        mean=mean,
        std=std,
        positions=positions,
        bgr=bool(getattr(processor, "do_flip_channel_order", False)),
        pooling=pooling,
    )


def _default_processor(name: str, config: Any) -> Any:
    import transformers

    kind = OWN_DEFAULTS.get(getattr(config, "model_type", ""))
    if kind is None:
        raise InvalidModel(
            f"{name} has no {PREPROCESSING}: nothing says how its images are resized and scaled. "
            "Add the file from where the model was published."
        )
    edge = config.vision_config.image_size
    square = {"height": edge, "width": edge}
    if kind == "CLIPImageProcessor":
        return transformers.CLIPImageProcessor(size={"shortest_edge": edge}, crop_size=square)
    return getattr(transformers, kind)(size=square)


def _class_name(options: Mapping[str, Any], folder: Path) -> str:
    """The processor that a file names, in its form with Pillow; by the model's type if it names
    none, as in the files of the first releases.
    """
    named = options.get("image_processor_type") or options.get("feature_extractor_type")
    if not named:
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

        path = folder / "config.json"
        kind = str(read_json(path).get("model_type")) if path.exists() else ""
        named = (IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or ("",))[0]
    return str(named).removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")


def _sizes(processor: Any, kind: str, name: str) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The size that images are resized to, as in ImageSpec, and their height and width at last."""
    resize = _resize(processor, kind, name) if processor.do_resize else ()
    if kind == CONVNEXT and resize:
        edge = int(processor.size["shortest_edge"])
        return resize, (edge, edge)
    if getattr(processor, "do_center_crop", False):
        crop = processor.crop_size
        return resize, (int(crop["height"]), int(crop["width"]))
    if len(resize) == 2:
        return resize, (resize[0], resize[1])
    raise InvalidModel(
        f"{name}: its {kind} gives images of different sizes, and the served model takes one size. "
        "Set do_resize with a height and a width, or do_center_crop with a crop_size."
    )


def _resize(processor: Any, kind: str, name: str) -> tuple[int, ...]:
    """The shortest edge, or height and width."""
    size = dict(processor.size) if isinstance(processor.size, Mapping) else {}
    ratio = float(getattr(processor, "crop_pct", None) or 1)
    if "shortest_edge" in size and kind not in SIDES_ONLY:
        edge = int(size["shortest_edge"])
        if kind == CONVNEXT and edge >= LARGE_EDGE:
            return edge, edge
        return (int(LEVIT_RATIO * edge if kind == LEVIT else edge / ratio),)
    if {"height", "width"} <= size.keys() and kind != CONVNEXT:
        height, width = int(size["height"] / ratio), int(size["width"] / ratio)
        by_edge = height == width and getattr(processor, "crop_pct", None) is not None
        return (height,) if by_edge else (height, width)
    wanted = {CONVNEXT: "a shortest_edge"}.get(kind, "a height and a width")
    raise InvalidModel(f"{name}: the size of its {kind} is {processor.size}; it needs {wanted}.")


def _normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, as in ImageSpec."""
    mean, std = np.zeros(3), np.ones(3)
    if getattr(processor, "do_normalize", False):
        mean, std = mean + processor.image_mean, std * processor.image_std
    if processor.do_rescale and getattr(processor, "rescale_offset", False):
        mean = mean + 1  # EfficientNet's pixels are scaled to -1 … 1
    if getattr(processor, "include_top", False):
        std = std * processor.image_std  # EfficientNet's are divided by it once more
    return tuple(map(float, mean)), tuple(map(float, std))
