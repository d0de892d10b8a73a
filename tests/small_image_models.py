"""Small encoders of images with random weights, each in the folder form it is published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import small_models
import transformers as hf
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st

SIZES = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    image_size=32, patch_size=8,
)  # fmt: skip
STAGES = dict(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])
SQUARE = {"height": 32, "width": 32}
ROOT_INIT = dict(initializer_range=0.2)


def save(folder: Path, model: Any, processor: Any) -> Path:
    """A folder with a model and the preprocessing of its images."""
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def siglip(folder: Path, masked: bool = False) -> Path:
    """SigLIP 2 for images of one size: both towers, and Gemma's tokenizer, which gives no mask."""
    text = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        vocab_size=small_models.VOCABULARY, max_position_embeddings=64, projection_size=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    config = hf.SiglipConfig(text_config=text, vision_config=SIZES)
    inputs = ["input_ids", "attention_mask"] if masked else ["input_ids"]
    small_models.save(
        folder, small_models.build(hf.SiglipModel, config), small_models.gemma(), 64,
        pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        model_input_names=inputs,
    )  # fmt: skip
    hf.SiglipImageProcessor(size=SQUARE).save_pretrained(folder)
    return folder


def siglip_1(folder: Path) -> Path:
    """The first SigLIP: its tokenizer's class is one that transformers has in a slow form alone."""
    siglip(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "SiglipTokenizer"})
    )
    return folder


def vit(folder: Path) -> Path:
    """ViT with its pooler, as vit-base-patch16-224-in21k."""
    model = small_models.build(hf.ViTModel, hf.ViTConfig(**SIZES, **ROOT_INIT))
    return save(folder, model, hf.ViTImageProcessor(size=SQUARE))


def vit_classifier(folder: Path) -> Path:
    """ViT for classification, as vit-base-patch16-224: without a pooler."""
    model = small_models.build(hf.ViTForImageClassification, hf.ViTConfig(**SIZES, **ROOT_INIT))
    return save(folder, model, hf.ViTImageProcessor(size=SQUARE, resample=3))


def dinov2(folder: Path, registers: bool = False) -> Path:
    """DINOv2: trained with larger images than its processor gives, as dinov2-base."""
    sizes = {**SIZES, "image_size": 80, "mlp_ratio": 2, **ROOT_INIT}
    del sizes["intermediate_size"]
    if registers:
        config: Any = hf.Dinov2WithRegistersConfig(num_register_tokens=4, **sizes)
        model = small_models.build(hf.Dinov2WithRegistersModel, config)
    else:
        model = small_models.build(hf.Dinov2Model, hf.Dinov2Config(**sizes))
    processor = hf.BitImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE, resample=3)
    return save(folder, model, processor)


def dinov2_with_registers(folder: Path) -> Path:
    """DINOv2 with register tokens."""
    return dinov2(folder, registers=True)


def beit(folder: Path) -> Path:
    """BEiT for classification: its pooler is the layer norm of the mean of the patches."""
    config = hf.BeitConfig(
        use_relative_position_bias=True, use_mean_pooling=True, **SIZES, **ROOT_INIT
    )
    model = small_models.build(hf.BeitForImageClassification, config)
    processor = hf.BeitImageProcessor(size={"height": 36, "width": 36}, crop_size=SQUARE)
    return save(folder, model, processor)


def deit(folder: Path) -> Path:
    """DeiT for classification with a teacher: no pooler, and a distillation token."""
    model = small_models.build(
        hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig(**SIZES, **ROOT_INIT)
    )
    processor = hf.DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SQUARE)
    return save(folder, model, processor)


def swin(folder: Path) -> Path:
    """Swin for classification: shifted windows, no class token, a pooler without weights."""
    config = hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
        **ROOT_INIT,
    )  # fmt: skip
    model = small_models.build(hf.SwinForImageClassification, config)
    return save(folder, model, hf.ViTImageProcessor(size=SQUARE))


def swinv2(folder: Path) -> Path:
    """Swin v2."""
    config = hf.Swinv2Config(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
        **ROOT_INIT,
    )  # fmt: skip
    model = small_models.build(hf.Swinv2Model, config)
    return save(folder, model, hf.ViTImageProcessor(size=SQUARE))


def convnext(folder: Path) -> Path:
    """ConvNeXt for classification: convolutions, and a processor that crops by a ratio."""
    config = hf.ConvNextConfig(**STAGES, layer_scale_init_value=1.0, **ROOT_INIT)
    model = small_models.build(hf.ConvNextForImageClassification, config)
    processor = hf.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875)
    return save(folder, model, processor)


def convnextv2(folder: Path) -> Path:
    """ConvNeXt v2."""
    model = small_models.build(hf.ConvNextV2Model, hf.ConvNextV2Config(**STAGES, **ROOT_INIT))
    return save(folder, model, hf.ConvNextImageProcessor(size={"shortest_edge": 64}))


def resnet(folder: Path) -> Path:
    """ResNet: the vector is the mean over the picture."""
    config = hf.ResNetConfig(embedding_size=16, layer_type="basic", **STAGES)
    model = small_models.build(hf.ResNetForImageClassification, config)
    return save(folder, model, hf.ConvNextImageProcessor(size={"shortest_edge": 64}))


def mobilevit(folder: Path) -> Path:
    """MobileViT: images with blue first, not normalised."""
    config = hf.MobileViTConfig(
        image_size=64, patch_size=2, hidden_sizes=[16, 24, 32], num_attention_heads=2,
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], **ROOT_INIT,
    )  # fmt: skip
    model = small_models.build(hf.MobileViTModel, config)
    processor = hf.MobileViTImageProcessor(
        size={"shortest_edge": 70}, crop_size={"height": 64, "width": 64}
    )
    return save(folder, model, processor)


def efficientnet(folder: Path) -> Path:
    """EfficientNet: pixels from -1 to 1, divided by the standard deviation twice."""
    config = hf.EfficientNetConfig(
        image_size=64,
        width_coefficient=0.25,
        depth_coefficient=0.5,
        hidden_dim=320,
        initializer_range=0.5,
    )
    model = small_models.build(hf.EfficientNetModel, config)
    processor = hf.EfficientNetImageProcessor(
        size={"height": 64, "width": 64}, rescale_offset=True, rescale_factor=1 / 127.5
    )
    return save(folder, model, processor)


def ijepa(folder: Path) -> Path:
    """I-JEPA: neither a class token nor a pooler."""
    config = hf.IJepaConfig(**SIZES, **ROOT_INIT)
    model = hf.IJepaModel(config, add_pooling_layer=False)
    return save(folder, model, hf.ViTImageProcessor(size=SQUARE))


def clip_vision(folder: Path) -> Path:
    """The vision tower of a CLIP with its projection, alone."""
    config = hf.CLIPVisionConfig(projection_dim=32, initializer_factor=5.0, **SIZES)
    model = small_models.build(hf.CLIPVisionModelWithProjection, config)
    return save(folder, model, hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE))


def siglip_vision(folder: Path) -> Path:
    """The vision tower of a SigLIP, alone."""
    model = small_models.build(hf.SiglipVisionModel, hf.SiglipVisionConfig(**SIZES))
    return save(folder, model, hf.SiglipImageProcessor(size=SQUARE))


def sentence_vit(folder: Path) -> Path:
    """A ViT that sentence-transformers saved, with its mean over all positions, normalised."""
    plain = vit(folder.with_name(folder.name + "-plain"))
    model = SentenceTransformer(
        modules=[st.Transformer(str(plain)), st.Pooling(64, "mean"), st.Normalize()], device="cpu"
    )
    model.save(str(folder), create_model_card=False)
    return folder


def plain_clip(folder: Path) -> Path:
    """CLIP without a file that says how its images are prepared."""
    small_models.clip(folder)
    (folder / "preprocessor_config.json").unlink()
    return folder
