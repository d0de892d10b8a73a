"""The check reaches a model's token limit, and both sides of each length that its config names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import small_models
import transformers as hf

from halimede_ops import spec
from halimede_ops.errors import QualityError
from halimede_tools.build import check, describe, towers
from halimede_tools.build.checks import long_texts
from halimede_tools.build.checks.long_texts import LongText
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.export import export
from halimede_tools.build.plan import build, build_request
from halimede_tools.settings import Settings

MAX_TOKENS = 2048
"""More than any of the check's other texts has: those have up to 1,100 tokens."""
MEMORY_BYTES = 1 << 30
BAR = 0.9999


def bigbird(folder: Path) -> Path:
    """BigBird, whose attention is sparse above 11 blocks of 128 tokens."""
    config = hf.BigBirdConfig(
        vocab_size=small_models.VOCABULARY, max_position_embeddings=MAX_TOKENS,
        attention_type="block_sparse", block_size=128, num_random_blocks=3, **small_models.SIZES,
    )  # fmt: skip
    return small_models.save(
        folder, small_models.build(hf.BigBirdModel, config), small_models.wordpiece(), MAX_TOKENS,
        **small_models.BERT_TOKENS,
    )  # fmt: skip


def phi3(folder: Path, original: int = 1300, max_tokens: int = MAX_TOKENS) -> Path:
    """Phi-3, whose positions are scaled by other factors above `original` tokens."""
    config = hf.Phi3Config(
        vocab_size=small_models.VOCABULARY, num_key_value_heads=2,
        max_position_embeddings=max_tokens, original_max_position_embeddings=original,
        rope_scaling={
            "type": "longrope", "short_factor": [1.0] * 8,
            "long_factor": [1.0 + 3 * index for index in range(8)],
        },
        eos_token_id=0, bos_token_id=0, pad_token_id=0, **small_models.SIZES,
    )  # fmt: skip
    return decoder(folder, small_models.build(hf.Phi3Model, config))


def mistral(folder: Path) -> Path:
    """Mistral with a sliding window."""
    config = hf.MistralConfig(
        vocab_size=small_models.VOCABULARY, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=MAX_TOKENS, sliding_window=1200, eos_token_id=0, bos_token_id=0,
        **small_models.SIZES,
    )  # fmt: skip
    return decoder(folder, small_models.build(hf.MistralModel, config))


def decoder(folder: Path, model: hf.PreTrainedModel) -> Path:
    return small_models.save(
        folder, model, small_models.byte_level("qwen"), MAX_TOKENS,
        pad_token="<|endoftext|>", eos_token="<|endoftext|>",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("form", "threshold", "right", "key"),
    [
        (bigbird, 1408, False, "attention_type block_sparse"),
        (phi3, 1300, False, "original_max_position_embeddings"),
        (mistral, 1200, True, "sliding_window"),
    ],
)
def test_both_sides_of_a_threshold_are_checked(
    tmp_path: Path, form: Callable[[Path], Path], threshold: int, right: bool, key: str
) -> None:
    """The text of `threshold` tokens is right in every graph, the longer ones in some; of the
    others the record names the key of the config and the length up to which they are right.
    """
    source, exported, long = (tmp_path / name for name in ("source", "exported", "long"))
    form(source)
    exported.mkdir()
    long.mkdir()
    export(source, ModelOptions("m"), exported)
    check.write_long_reference(source, ModelOptions("m"), "texts", MEMORY_BYTES, long)
    facts = spec.load(exported)
    rows = towers.text_rows(exported, facts)
    record: dict = {"missed": []}
    engine = towers.Engine(exported / "model.onnx", rows, facts)
    check.add_long_texts(record, engine, long, towers.BARS["fp32"])
    tokens = [text["tokens"] for text in record["long_texts"]]
    assert {threshold, threshold + long_texts.ABOVE} <= set(tokens)
    assert record["checked_tokens"] == facts.max_tokens
    assert bool(record["missed"]) is not right
    if not right:
        assert record["right_up_to"] == threshold
        assert f"{key} ({threshold})" in record["missed"][0]


def test_a_graph_that_is_right_up_to_a_length_is_refused_beyond_it(tmp_path: Path) -> None:
    """The error names the cause and the limit; with that limit the model is built."""
    home = Settings(home=tmp_path / "home", repository=tmp_path / "repository")
    source = str(phi3(tmp_path / "source", original=40, max_tokens=128))
    cause = r"texts of 48 tokens and more .* original_max_position_embeddings \(40\)"
    with pytest.raises(QualityError, match=f"{cause}.*Build it with --max-tokens 40, or"):
        build(build_request(source, "m", precisions=("fp32",)), home)
    shorter = build_request(source, "m", precisions=("fp32",), max_tokens=40)
    assert build(shorter, home) == ["m"]


def test_lengths_are_bounded_by_the_memory(tmp_path: Path) -> None:
    """What does not fit into the memory is not checked, and the record says so."""
    small_models.bert(tmp_path / "source")
    (tmp_path / "long").mkdir()
    scores_bytes = 4 * long_texts.BYTES_PER_SCORE
    check.write_long_reference(
        tmp_path / "source", ModelOptions("m"), "texts", scores_bytes * 300**2, tmp_path / "long"
    )
    texts = json.loads((tmp_path / "long" / check.LONG_FILE).read_text())["texts"]
    tokenizer = describe.load(tmp_path / "source", ModelOptions("m")).tokenizer
    assert [len(tokenizer(text)["input_ids"]) for text in texts] == [256, 300]


def test_the_configs_numbers_of_tokens_are_found_at_any_depth() -> None:
    """In a nested config and in a list; other numbers are left alone."""
    config = {
        "vocab_size": 30522,
        "attention_window": [64, 512],
        "text_config": {"rope_scaling": {"original_max_position_embeddings": 4096, "factor": 2.5}},
        "local_attention": 128,
        "use_sliding_window": True,
        "sliding_window": None,
    }
    assert long_texts.thresholds(config) == {
        64: "attention_window",
        512: "attention_window",
        4096: "original_max_position_embeddings",
        128: "local_attention",
    }
    assert long_texts.lengths(600, [64, 512, 4096], 10_000) == [64, 72, 256, 512, 520, 600]
    assert long_texts.lengths(600, [64, 512], 300) == [64, 72, 256, 300]


def test_what_long_texts_miss_is_one_sentence() -> None:
    found = [LongText(256, 1.0), LongText(512, 0.4), LongText(520, 0.99999), LongText(900, 0.5)]
    [line] = long_texts.missed(found, {128: "local_attention", 300: "sliding_window"}, BAR)
    assert "512 tokens and more" in line
    assert "sliding_window (300)" in line
    assert "local_attention" not in line
    assert "agreement 0.400000 at 512 tokens" in line
    assert long_texts.right_up_to(found, BAR) == 256
    assert long_texts.missed(found[:1], {}, BAR) == []
