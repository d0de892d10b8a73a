"""The config.pbtxt of every folder of a model, as typed messages; the one file that knows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from halimede_ops.spec import POOLED, ModelSpec

MAX_BATCH_SIZE = 128
"""Most rows in one request, and most that are batched together."""
MAX_QUEUE_SIZE = 1024
"""Requests that may wait at a step; more are rejected at once with UNAVAILABLE."""
ONNX_INSTANCES = 1
"""Instances of the ONNX step: rows that wait together are batched best, so one."""
CPU_ACCELERATORS = ("openvino",)
"""Execution accelerators of the ONNX step on CPU."""
HEADER = "# Written by the build. Change the build's source (tools/config.py), not this file.\n"


def to_text(config: pb.ModelConfig) -> str:
    """The text of config.pbtxt; equal configs give equal bytes."""
    return HEADER + str(text_format.MessageToString(config))


def tokenizer(name: str, spec: ModelSpec) -> pb.ModelConfig:
    """TEXT, INPUT_TYPE → input_ids, attention_mask, TOKENS."""
    return pb.ModelConfig(
        name=name,
        backend="tokenizer",
        max_batch_size=MAX_BATCH_SIZE,
        input=[_text(), _input_type()],
        output=[
            _output("input_ids", pb.TYPE_INT64, -1),
            _output("attention_mask", pb.TYPE_INT64, -1),
            _output("TOKENS", pb.TYPE_INT32, 1),
        ],
        instance_group=[_on_cpu()],
        dynamic_batching=_batching(),
        model_warmup=[
            pb.ModelWarmup(
                name="one text",
                batch_size=1,
                inputs={
                    "TEXT": _warm(pb.TYPE_STRING, 1, input_data_file="text"),
                    "INPUT_TYPE": _warm(pb.TYPE_STRING, 1, input_data_file="input_type"),
                },
            )
        ],
    )


def onnx(name: str, spec: ModelSpec) -> pb.ModelConfig:
    """input_ids, attention_mask → the pooled vector."""
    return pb.ModelConfig(
        name=name,
        backend="onnxruntime",
        default_model_filename="model.onnx",
        max_batch_size=MAX_BATCH_SIZE,
        input=[_input("input_ids", pb.TYPE_INT64, -1), _input("attention_mask", pb.TYPE_INT64, -1)],
        output=[_output(POOLED, pb.TYPE_FP32, spec.dims)],
        instance_group=[
            pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_AUTO, count=ONNX_INSTANCES)
        ],
        dynamic_batching=_batching(),
        optimization=pb.ModelOptimizationPolicy(
            execution_accelerators=pb.ModelOptimizationPolicy.ExecutionAccelerators(
                cpu_execution_accelerator=[
                    pb.ModelOptimizationPolicy.ExecutionAccelerators.Accelerator(name=name)
                    for name in CPU_ACCELERATORS
                ]
            )
        ),
        model_warmup=[
            pb.ModelWarmup(
                name=f"{rows} x {length} tokens",
                batch_size=rows,
                inputs={
                    key: _warm(pb.TYPE_INT64, length, input_data_file=key)
                    for key in ("input_ids", "attention_mask")
                },
            )
            for length in spec.length_buckets
            for rows in (1, 8)
        ],
    )


def pooler(name: str, spec: ModelSpec) -> pb.ModelConfig:
    """The pooled vector, DIMENSIONS → EMBEDDING."""
    return pb.ModelConfig(
        name=name,
        backend="pooler",
        max_batch_size=MAX_BATCH_SIZE,
        input=[_input(POOLED, pb.TYPE_FP32, spec.dims), _dimensions()],
        output=[_embedding()],
        instance_group=[_on_cpu()],
        dynamic_batching=_batching(),
        model_warmup=[
            pb.ModelWarmup(
                name="one vector",
                batch_size=1,
                inputs={
                    POOLED: _warm(pb.TYPE_FP32, spec.dims, zero_data=True),
                    "DIMENSIONS": _warm(pb.TYPE_INT32, 1, input_data_file="dimensions"),
                },
            )
        ],
    )


def ensemble(
    name: str, spec: ModelSpec, precision: str, steps: Mapping[str, str]
) -> pb.ModelConfig:
    """TEXT, INPUT_TYPE, DIMENSIONS → EMBEDDING, TOKENS; `steps` names the composing models."""
    parameters = {
        "space": spec.space,
        "precision": precision,
        "dims": str(spec.dims),
        "max_tokens": str(spec.max_tokens),
    }
    return pb.ModelConfig(
        name=name,
        platform="ensemble",
        max_batch_size=MAX_BATCH_SIZE,
        input=[_text(), _input_type(), _dimensions()],
        output=[_embedding(), _output("TOKENS", pb.TYPE_INT32, 1)],
        ensemble_scheduling=pb.ModelEnsembling(
            step=[
                _step(
                    steps["tokenizer"],
                    {"TEXT": "TEXT", "INPUT_TYPE": "INPUT_TYPE"},
                    {"input_ids": "ids", "attention_mask": "mask", "TOKENS": "TOKENS"},
                ),
                _step(
                    steps["onnx"],
                    {"input_ids": "ids", "attention_mask": "mask"},
                    {POOLED: "pooled"},
                ),
                _step(
                    steps["pooler"],
                    {POOLED: "pooled", "DIMENSIONS": "DIMENSIONS"},
                    {"EMBEDDING": "EMBEDDING"},
                ),
            ]
        ),
        parameters={
            key: pb.ModelParameter(string_value=value) for key, value in parameters.items()
        },
    )


def read(path: Path) -> pb.ModelConfig:
    """The config of a model folder of the repository."""
    return text_format.Parse(path.read_text(), pb.ModelConfig())


def _text() -> pb.ModelInput:
    return _input("TEXT", pb.TYPE_STRING, 1)


def _input_type() -> pb.ModelInput:
    return _input("INPUT_TYPE", pb.TYPE_STRING, 1, optional=True)


def _dimensions() -> pb.ModelInput:
    return _input("DIMENSIONS", pb.TYPE_INT32, 1, optional=True)


def _embedding() -> pb.ModelOutput:
    # -1, not dims: DIMENSIONS may ask for fewer.
    return _output("EMBEDDING", pb.TYPE_FP32, -1)


def _input(name: str, data_type: int, length: int, optional: bool = False) -> pb.ModelInput:
    return pb.ModelInput(name=name, data_type=data_type, dims=[length], optional=optional)


def _output(name: str, data_type: int, length: int) -> pb.ModelOutput:
    return pb.ModelOutput(name=name, data_type=data_type, dims=[length])


def _on_cpu() -> pb.ModelInstanceGroup:
    return pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)


def _batching() -> pb.ModelDynamicBatching:
    return pb.ModelDynamicBatching(
        default_queue_policy=pb.ModelQueuePolicy(max_queue_size=MAX_QUEUE_SIZE)
    )


def _warm(
    data_type: int, length: int, input_data_file: str | None = None, zero_data: bool | None = None
) -> pb.ModelWarmup.Input:
    return pb.ModelWarmup.Input(
        data_type=data_type, dims=[length], input_data_file=input_data_file, zero_data=zero_data
    )


def _step(
    model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> pb.ModelEnsembling.Step:
    return pb.ModelEnsembling.Step(
        model_name=model, model_version=-1, input_map=inputs, output_map=outputs
    )
