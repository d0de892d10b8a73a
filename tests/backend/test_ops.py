"""The pure operations, without Triton."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import MODEL, ROOT, version_folder
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from halimede_engine import arithmetic, batching, session
from halimede_ops import errors, heads, spec, text, vectors
from halimede_ops.errors import (
    HalimedeError,
    InvalidDimensions,
    InvalidInput,
    InvalidModel,
    InvalidText,
    NonFiniteVector,
    UnknownInputType,
)
from halimede_ops.spec import MULTI_VECTOR, SPARSE, TOKEN_EMBEDDINGS
from halimede_tools.build.graph import rewrite
from halimede_tools.build.repository import SUFFIXES, served_name
from halimede_tools.settings import Settings

TOKENIZER = version_folder(Settings().repository / f"{MODEL}-tokenizer")
SPEC = spec.load(TOKENIZER)


@pytest.fixture(scope="module")
def tokenizer() -> text.TextTokenizer:
    return text.load(TOKENIZER, SPEC)


def test_the_error_tree_is_as_it_is_drawn() -> None:
    """Each error with its parent, Triton code and whether a retry can help; none is missing."""
    parents, drawn = ["HalimedeError"], {}
    for indent, name, code, retryable in re.findall(
        r"^([│├└─ ]*)(\w+) +([A-Z_]+) +(yes|no) ", errors.__doc__ or "", re.MULTILINE
    ):
        depth = len(indent) // 4
        parents[depth:] = [name]
        drawn[name] = (parents[max(0, depth - 1)], code, retryable == "yes")
    raised = {
        name: (kind if kind is HalimedeError else kind.__bases__[0], kind.code, kind.retryable)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, HalimedeError)
    }
    assert drawn == {
        name: (parent.__name__, code, retryable)
        for name, (parent, code, retryable) in raised.items()
    }


def test_spec_survives_its_file(tmp_path: Path) -> None:
    """A spec written and loaded is the same spec."""
    (tmp_path / "spec.json").write_text(SPEC.to_json())
    assert spec.load(tmp_path) == SPEC


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"name": 1}', "\x00"])
def test_bad_spec_is_named(tmp_path: Path, content: str) -> None:
    """A broken spec.json is an InvalidModel that says what to do, without its path."""
    (tmp_path / "spec.json").write_text(content)
    with pytest.raises(InvalidModel, match="build the model again") as raised:
        spec.load(tmp_path)
    assert str(tmp_path) not in str(raised.value)


def test_unknown_input_type_lists_the_known_without_repeating_the_given() -> None:
    """The error of an unknown input type names those that exist, and not the caller's text."""
    with pytest.raises(UnknownInputType, match="document, query") as raised:
        SPEC.prompt("my secret")
    assert "secret" not in str(raised.value)


def test_prompt_goes_in_front(tokenizer: text.TextTokenizer) -> None:
    """A prompt's tokens stand before the text's; no input type means the default's prompt."""
    prompted = dataclasses.replace(SPEC, prompts={"query": "search: "}, default_input_type="query")
    with_prompt = text.load(TOKENIZER, prompted)
    plain = tokenizer.encode(["search: cats"], [None])
    assert with_prompt.encode(["cats"], ["query"]) == plain
    assert with_prompt.encode(["cats"], [None]) == plain


def test_truncation_is_counted(tokenizer: text.TextTokenizer) -> None:
    """A long text is cut at max_tokens, and its whole number of tokens is told."""
    [tokens] = tokenizer.encode(["word " * 1000], [None])
    assert len(tokens.ids) == SPEC.max_tokens
    assert tokens.total == 1002
    [short] = tokenizer.encode(["word"], [None])
    assert short.total == len(short.ids) == 3


def test_invalid_utf8_is_refused_without_the_text() -> None:
    """Bytes that are not UTF-8 give InvalidText with the row and the byte's place."""
    with pytest.raises(InvalidText, match=r"text 3 is not valid UTF-8 \(byte 2\)"):
        text.decode(b"ab\xff", 3, SPEC)


def test_too_large_text_is_refused() -> None:
    """A text beyond max_text_bytes gives InvalidText with both sizes."""
    with pytest.raises(InvalidText, match="4,194,305 bytes; .* takes 4,194,304"):
        text.decode(b"a" * (SPEC.max_text_bytes + 1), 0, SPEC)


def test_texts_that_are_too_large_together_are_refused() -> None:
    """Texts within the limit of one, beyond that of a request: both sizes, and what to do."""
    largest = b"a" * SPEC.max_text_bytes
    assert len(text.decode_all([largest, largest], SPEC)) == 2
    with pytest.raises(
        InvalidInput,
        match="the 3 texts have 8,388,609 bytes together; a request takes 8,388,608. Send them in",
    ):
        text.decode_all([largest, largest, b"a"], SPEC)


def test_documented_limits_are_those_of_the_code() -> None:
    """The reference and the guide to security name the sizes that are enforced."""
    reference = (ROOT / "docs/reference/tensors.md").read_text()
    security = (ROOT / "docs/guides/security.md").read_text()
    text_mib, request_mib = spec.MAX_TEXT_BYTES // 2**20, spec.MAX_REQUEST_BYTES // 2**20
    assert SPEC.max_text_bytes == spec.MAX_TEXT_BYTES
    assert f"| one text | {text_mib} MiB of UTF-8 |" in reference
    assert f"| all texts of one request | {request_mib} MiB of UTF-8 |" in reference
    assert (
        f"| unanswered requests of more than {batching.INTERACTIVE_ROWS} texts, "
        f"{batching.INTERACTIVE_BYTES // 1024} KiB or {batching.INTERACTIVE_TOKENS:,} tokens, of one "
        f"model | {8 * request_mib} MiB of UTF-8" in reference
    )
    assert f"{text.COUNTED_CHARACTERS:,} characters" in reference.replace("\n", " ")
    assert f"largest text {text_mib} MiB, {request_mib} MiB and 128 rows a request" in security


@given(st.lists(st.integers(0, 300), max_size=60), st.sampled_from([256, 512, 4096]))
def test_plan_holds_every_row_once_within_the_budget(lengths: list[int], most: int) -> None:
    """A plan has each index once; a micro-batch beyond the budget is a single row."""
    parts = batching.plan(lengths, max_tokens=most)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    for part in parts:
        tokens = max(batching.padded_length(lengths[index]) for index in part) * len(part)
        assert len(part) == 1 or tokens <= most


@given(st.lists(st.integers(1, 256), min_size=2, max_size=40))
def test_plan_never_costs_more_than_one_run_a_row(lengths: list[int]) -> None:
    """Batching is chosen only where it is cheaper than running each row alone."""

    def cost(parts: list[list[int]]) -> int:
        return sum(
            batching.RUN_TOKENS
            + max(batching.padded_length(lengths[index]) for index in part) * len(part)
            for part in parts
        )

    assert cost(batching.plan(lengths)) <= cost([[index] for index in range(len(lengths))])


def test_tight_lengths_pad_little_and_are_few() -> None:
    """At most an eighth is padding, or one token, where a multiple of 16 would be more."""
    near = {tokens: batching.tight_length(tokens) for tokens in range(1, 257)}
    assert all(tokens <= near[tokens] <= batching.padded_length(tokens) for tokens in near)
    assert all(near[tokens] - tokens <= max(1, tokens / 8) for tokens in range(1, 129))
    assert len(set(near.values())) == 40
    assert (
        batching.tight_length(30, max_length=31) == 30
        and batching.tight_length(33, max_length=34) == 34
    )


@given(st.lists(st.integers(0, 300), max_size=60))
def test_packed_rows_hold_every_text_once_and_leave_little_free(lengths: list[int]) -> None:
    """A row is no longer than its longest text rounded up, one without tokens has its own row, and
    no two rows of that length would have fitted into one.
    """
    rows = batching.pack(lengths)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    used = [sum(lengths[index] for index in row) for row in rows]
    capacity = [
        -(-lengths[row[0]] // batching.PACKED_TOKENS) * batching.PACKED_TOKENS for row in rows
    ]
    assert all(tokens <= most for tokens, most in zip(used, capacity, strict=True))
    assert all(len(row) == 1 for row, tokens in zip(rows, used, strict=True) if not tokens)
    short = sorted(tokens for tokens, most in zip(used, capacity, strict=True) if 0 < most <= 64)
    assert len(short) < 2 or short[0] + short[1] > batching.PACKED_TOKENS


@given(st.lists(st.integers(1, 256), min_size=1, max_size=60), st.integers(1, 2))
def test_packed_models_see_few_shapes(lengths: list[int], streams: int) -> None:
    """Several rows are a multiple of PACKED_TOKENS long, and within the budget: 28 shapes."""
    for part in batching.plan_packed(lengths, streams):
        texts = [lengths[index] for index in part]
        sums = [sum(texts[index] for index in row) for row in batching.pack(texts)]
        if len(sums) > 1:
            length = batching.packed_length(max(sums))
            assert length % batching.PACKED_TOKENS == 0
            assert length * len(sums) <= batching.MICRO_BATCH_TOKENS


class Runs:
    """Stands in for a Session: keeps how many rows each run had."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def run_outputs(self, rows: Sequence[session.Row]) -> np.ndarray:
        self.rows.append(len(rows))
        return np.zeros((len(rows), 4), np.float32)


def test_lone_runs_get_all_threads_once_there_were_some() -> None:
    """The second session is opened at the LONE_RUNS-th lone run on end, and has those after it."""
    shared, alone = Runs(), Runs()
    opened: list[Runs] = []

    def open_lone() -> Runs:
        opened.append(alone)
        return alone

    sessions = session.AdaptiveSession(shared, open_lone)  # type: ignore[arg-type]
    row = session.Row(np.ones(4, np.int64), np.ones(4, np.int64))
    for _ in range(2):
        for _ in range(session.LONE_RUNS - 1):
            sessions.run_alone([row])
        sessions.run_together([row, row])
    assert not opened
    for _ in range(session.LONE_RUNS + 2):
        sessions.run_alone([row])
    sessions.run_together([row, row])
    assert opened == [alone]
    assert alone.rows == [1, 1, 1]
    assert shared.rows == 3 * ([1] * (session.LONE_RUNS - 1) + [2])


def test_used_lengths_sees_past_holes() -> None:
    """A row's length ends at its last 1; an all-masked row has length 0."""
    mask = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert batching.used_lengths(mask).tolist() == [2, 3, 0, 4]


def test_pad_and_mask_agree() -> None:
    """Padding puts zeros on the right, where the mask is 0."""
    assert batching.pad([[5, 6], [7]], 3).tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batching.mask([2, 1], 3).tolist() == [[1, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(("length", "size"), [(1, 16), (16, 16), (17, 32), (256, 256), (999, 256)])
def test_bucket(length: int, size: int) -> None:
    """The smallest bucket that holds a length; the last where none does."""
    assert batching.bucket(length, (16, 32, 64, 128, 256)) == size


def test_normalise_keeps_zero_zero() -> None:
    """Norms become 1; a zero vector stays zero and is never NaN."""
    out = vectors.normalise(np.array([[3, 4], [0, 0]], np.float32))
    assert out.tolist() == [[np.float32(0.6), np.float32(0.8)], [0, 0]]
    assert out.dtype == np.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_embed_refuses_what_is_not_finite(bad: float) -> None:
    """NaN, infinity and a norm beyond float32 in any component are an error about that row, however
    few dimensions are kept. A zero vector stays zero.
    """
    pooled = np.ones((3, SPEC.dims), np.float32)
    pooled[0] = 0
    assert not vectors.embed(pooled, SPEC)[0].any()
    pooled[2, -1] = bad
    for dimensions in (None, 8):
        with pytest.raises(NonFiniteVector, match="^input 2 has no vector") as raised:
            vectors.embed(pooled, SPEC, dimensions)
        assert raised.value.index == 2


@pytest.mark.parametrize("head", [SPARSE, MULTI_VECTOR, TOKEN_EMBEDDINGS])
def test_further_outputs_refuse_what_is_not_finite(head: str) -> None:
    """NaN at a token is an error about that row; NaN at padding is none."""
    ids, mask = np.ones((2, 3), np.int64), np.array([[1, 1, 1], [1, 1, 0]])
    rows = np.ones((2, 3, 1), np.float32)
    rows[1, 2] = np.nan
    assert all(
        np.isfinite(out).all() for out in heads.outputs({head: rows}, ids, mask, SPEC).values()
    )
    rows[1, 1] = np.nan
    with pytest.raises(NonFiniteVector, match="^input 1 "):
        heads.outputs({head: rows}, ids, mask, SPEC)


def test_embed_truncates_then_normalises() -> None:
    """Fewer dimensions are the leading ones, of norm 1 again."""
    pooled = np.random.default_rng(0).normal(size=(4, SPEC.dims)).astype(np.float32)
    out = vectors.embed(pooled, SPEC, 64)
    assert out.shape == (4, 64)
    assert np.allclose(np.linalg.norm(out, axis=1), 1, atol=1e-6)
    assert np.allclose(vectors.cosine(out, pooled[:, :64]), 1)


@pytest.mark.parametrize("dimensions", [0, -1, 385, 10**9])
def test_dimensions_outside_are_refused(dimensions: int) -> None:
    """Dimensions outside 1 … dims give InvalidDimensions with both numbers."""
    with pytest.raises(InvalidDimensions, match=f"is {dimensions}; .* 1 to 384"):
        vectors.check_dimensions(dimensions, SPEC)


def test_unknown_accelerator_is_refused() -> None:
    """An accelerator's name that Triton's backend does not know is an InvalidModel."""
    with pytest.raises(InvalidModel, match="'directml' is unknown"):
        session.execution_providers([session.Accelerator("directml")], threads=1, streams=1)


def test_missing_accelerator_is_reported_and_the_cpu_serves() -> None:
    """Without CUDA in this onnxruntime the CPU provider is used and the caller is told."""
    providers, missing = session.execution_providers(
        [session.Accelerator("cuda"), session.Accelerator("openvino")], threads=2, streams=1
    )
    assert missing == ["cuda"]
    assert [name for name, _ in providers] == ["OpenVINOExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 avx512_vnni\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd bf16\n", False),  # Arm: OpenVINO computes in another format there
        ("", False),
        (None, False),
    ],
)
def test_bf16_is_read_from_the_flags_of_the_cpu(
    cpuinfo: str | None, has: bool, tmp_path: Path
) -> None:
    """A CPU has bf16 if it has instructions for it; no such file means that it has not."""
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    assert arithmetic.has_bf16(path) is has


@pytest.mark.parametrize(("has", "computed"), [(True, "bf16"), (False, "f32")])
def test_a_cpu_without_bf16_computes_in_f32(
    has: bool, computed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO is asked for bf16 only where the CPU has instructions for it."""
    monkeypatch.setattr(arithmetic, "has_bf16", lambda: has)
    asked = session.Accelerator("openvino", arithmetic.properties("bf16"))
    [(_, options), _cpu], _missing = session.execution_providers([asked], threads=2, streams=1)
    assert json.loads(options["load_config"])["CPU"][arithmetic.PROPERTY] == computed
    assert arithmetic.is_missing(asked.parameters) is not has


def test_tensorrt_options_follow_tritons_keys() -> None:
    """The keys of Triton's backend become onnxruntime's TensorRT options."""
    options = session.tensorrt_options(
        {
            "precision_mode": "FP16",
            "max_workspace_size_bytes": "1024",
            "trt_engine_cache_enable": "1",
        }
    )
    assert options == {
        "trt_fp16_enable": "1",
        "trt_max_workspace_size": "1024",
        "trt_engine_cache_enable": "1",
    }


def test_broken_model_file_is_named(tmp_path: Path) -> None:
    """A truncated model.onnx is an InvalidModel that says what to do."""
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07not onnx")
    with pytest.raises(InvalidModel, match="build the model again"):
        session.open_session(tmp_path / "model.onnx")


@pytest.mark.parametrize("precision", SUFFIXES)
def test_weights_lie_beside_their_graph(
    tokenizer: text.TextTokenizer, tmp_path: Path, precision: str
) -> None:
    """Every graph that is built has its weights in a file of their own, which the user that Triton
    runs as may read; in one file with them it gives the same vectors.
    """
    folder = version_folder(Settings().repository / f"{served_name(MODEL, precision)}-onnx")
    weights, model = session.files(folder / session.FILE_NAME)
    assert (weights.name, model.name) == ("model.onnx.data", "model.onnx")
    assert model.stat().st_size < weights.stat().st_size / 10
    assert weights.stat().st_mode == model.stat().st_mode
    whole = tmp_path / "whole.onnx"
    onnx.save(rewrite.load(model), whole)
    rows = session.token_rows(tokenizer.encode(["a cat", "dogs"], [None] * 2))
    found, expected = (session.open_session(path)[0].run(rows) for path in (whole, model))
    assert vectors.cosine(found, expected).min() >= 0.99999


def test_constants_of_branches_keep_their_values(tmp_path: Path) -> None:
    """Large constants within an If lie beside the graph too, and are read back, each once."""
    values = [np.full(1024, value, np.float32) for value in (1.0, 2.0)]
    branches = [
        helper.make_graph(
            [helper.make_node("Add", ["x", "c"], [f"out{number}"])],
            "branch",
            [],
            [helper.make_tensor_value_info(f"out{number}", TensorProto.FLOAT, [1024])],
            [numpy_helper.from_array(value, "c")],
        )
        for number, value in enumerate(values)
    ]
    made = helper.make_model(
        helper.make_graph(
            [
                helper.make_node(
                    "If", ["first"], ["y"], then_branch=branches[0], else_branch=branches[1]
                )
            ],
            "choice",
            [
                helper.make_tensor_value_info("first", TensorProto.BOOL, []),
                helper.make_tensor_value_info("x", TensorProto.FLOAT, [1024]),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1024])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=10,
    )
    raw, target = tmp_path / "raw.onnx", tmp_path / session.FILE_NAME
    rewrite.save(made, raw)
    rewrite.optimise(raw, target)
    assert len(session.files(raw)) == len(session.files(target)) == 2
    for content in (str(raw), str(target), rewrite.load(target).SerializeToString()):
        run = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run
        for first, value in zip((True, False), values, strict=True):
            [y] = run(["y"], {"first": np.array(first), "x": np.zeros(1024, np.float32)})
            assert np.array_equal(y, value)


def test_masked_rows_give_zeros_and_rows_are_alike_in_any_company(
    tokenizer: text.TextTokenizer,
) -> None:
    """An all-masked row is zeros; a row's vector does not depend on its neighbours."""
    path = version_folder(Settings().repository / f"{MODEL}-onnx") / "model.onnx"
    told: list[int] = []
    opened, _ = session.open_session(path, threads=2, on_run=told.append)
    tokens = tokenizer.encode(["a cat", "word " * 300, "一只猫"], [None] * 3)
    rows = [
        session.Row(np.array(row.ids, np.int64), np.ones(len(row.ids), np.int64)) for row in tokens
    ]
    masked = session.Row(np.zeros(3, np.int64), np.zeros(3, np.int64))
    together = opened.run([masked, *rows])
    assert not together[0].any()
    near, _ = session.open_session(path, tight_padding=True, on_run=told.append)
    for engine, tokens_of_first in ((opened, 16), (near, 4)):
        told.clear()
        alone = np.concatenate([engine.run([row]) for row in rows])
        assert vectors.cosine(together[1:], alone).min() >= 0.99999
        assert (told[0], len(told)) == (tokens_of_first, len(rows))


def test_layer_norm_is_pytorchs() -> None:
    """Layer-norm without weights equals PyTorch's, and comes before a cut alone."""
    import torch

    values = np.random.default_rng(1).normal(3, 2, (5, 32)).astype(np.float32)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(values), (32,)).numpy()
    assert np.allclose(vectors.layer_norm(values), expected, atol=1e-5)
    facts = dataclasses.replace(SPEC, dims=32, layer_norm_before_cut=True)
    assert np.allclose(
        vectors.embed(values, facts, 8), vectors.normalise(expected[:, :8]), atol=1e-5
    )
    assert np.allclose(vectors.embed(values, facts), vectors.normalise(values))


def test_sparse_weights_take_the_largest_of_each_id() -> None:
    """Special ids, padding and zeros are left out; shorter rows end in NO_TOKEN."""
    ids = np.array([[0, 7, 5, 7, 2], [0, 9, 2, 1, 1]])
    weights = np.array([[1, 0.2, 0.5, 0.3, 1], [1, 0, 1, 4, 4]], np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found, largest = heads.sparse(ids, weights, mask, special_ids=(0, 1, 2))
    assert found.tolist() == [[5, 7], [heads.NO_TOKEN] * 2]
    assert np.allclose(largest, [[0.5, 0.3], [0, 0]])
    empty, _ = heads.sparse(ids, 0 * weights, mask, special_ids=())
    assert empty.shape == (2, 0)


def test_vectors_a_token_are_zero_behind_a_row() -> None:
    """Rows keep their tokens; padding is zeros, whatever stood there."""
    vectors_a_token = np.ones((2, 3, 4), np.float32)
    vectors_a_token[1, 2] = np.nan
    kept = heads.per_token(vectors_a_token, np.array([[1, 1, 1], [1, 1, 0]]))
    assert kept.shape == (2, 3, 4)
    assert kept[1, 1].all() and not kept[1, 2].any()
    padded = batching.pad_heads([np.ones((3, 2)), np.ones((1, 2))])
    assert padded.shape == (2, 3, 2) and padded.sum() == 8
