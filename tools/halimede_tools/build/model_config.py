"""The config.pbtxt of every folder of a model, as typed messages; the one file that knows them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from halimede_engine import arithmetic
from halimede_ops.errors import InvalidInput
from halimede_ops.spec import (
    CLASSIFIER,
    DENSE,
    KEPT,
    MULTI_VECTOR,
    PIXELS,
    POOLED,
    POOLED_TOKENS,
    RERANKER,
    SPANS,
    SPARSE,
    SPARSE_KIND,
    TOKEN_EMBEDDINGS,
    TOKEN_TYPES,
    VECTOR_OUTPUTS,
    ImageSpec,
    ModelSpec,
)
from halimede_repository import configs
from halimede_tools.build.keys import key_of
from halimede_tools.build.towers import ACCELERATORS, OPENVINO

MAX_BATCH_SIZE = 128
"""Largest number of rows in one request, and in one batch."""
MAX_IMAGES = 16
"""Largest number of images in one request, and in one batch: a request is held in memory."""
MAX_IMAGE_QUEUE_SIZE = 64
"""Requests with images that may wait: each may have MAX_IMAGES of 10 MB."""
MAX_QUEUE_SIZE = 1024
"""Requests that may wait at a step; more are rejected at once with UNAVAILABLE."""
PRIORITIES = 2
"""Priority levels: 1 overtakes 2 (bulk)."""
ONNX_INSTANCES = 1
"""Instances of the ONNX step. One queue gives the best batches."""
ROUTER_INSTANCES = 2
"""Instances of a router: one reads requests while the towers answer those of the other."""
TUNED = ("intra_op_thread_count", "streams", "micro_batch_tokens")
"""Parameters that `tune` finds for a machine; without them the backend uses its defaults."""
CPU, CUDA, TENSORRT = "cpu", "cuda", "tensorrt"
"""Devices that a config can ask for. `cpu` also runs on a GPU if Triton finds one."""
DEVICES = (CPU, CUDA, TENSORRT)
TENSORRT_CACHE = "/var/cache/halimede/tensorrt"
"""Folder on the server for TensorRT's engines, which the first start builds."""
TENSORRT_ROWS = 32
"""Rows in one request that TensorRT's kernels are tuned for."""
WARM_ROWS = (1, 8)
"""Rows of the warm-up requests."""
WARM_TOKENS = 512
"""Longest warm-up request."""
HEAD_OUTPUTS = {
    SPARSE: ("SPARSE_IDS", "SPARSE_WEIGHTS"),
    MULTI_VECTOR: ("MULTI_VECTORS",),
    TOKEN_EMBEDDINGS: ("TOKEN_EMBEDDINGS",),
    POOLED_TOKENS: ("SPAN_EMBEDDINGS", "SPAN_WEIGHTS"),
}
"""Outputs of an ensemble for each further head of its model."""
ALIAS_OUTPUT = "OUTPUT_EMBEDDINGS"
"""The only output of an alias: LiteLLM reads any, LlamaIndex this one."""
HEADER = (
    "# Written by the build. Change the build's source "
    "(halimede_tools/build/model_config.py), not this file.\n"
)


Parameters = dict[str, pb.ModelParameter]


class Pin(NamedTuple):
    """One version of one model."""

    model: str
    version: int


class Computed(NamedTuple):
    """How the build measured a precision on a CPU, and how a CPU shall run it."""

    arithmetic: str = ""
    """Empty: it was not measured."""
    engine: str = OPENVINO
    """One of `towers.ACCELERATORS`."""


IN_F32 = Computed(arithmetic.F32)


class Ensemble(NamedTuple):
    """What the configs of one ensemble say."""

    name: str
    spec: ModelSpec
    precision: str
    steps: Mapping[str, Pin]
    """The composing models, each with the version that the ensemble is made of."""
    missed: Sequence[str] = ()
    """What an accepted precision misses of its bar."""
    counterpart: str = ""
    """The ensemble of the model's other tower."""
    computed: Computed = Computed()


def to_text(config: pb.ModelConfig) -> str:
    """The text of config.pbtxt; equal configs give equal bytes."""
    return HEADER + str(text_format.MessageToString(config))


def serving(config: pb.ModelConfig, versions: Iterable[int]) -> pb.ModelConfig:
    """The config with a policy that serves exactly these versions."""
    served = _copy(config)
    served.version_policy.specific.versions[:] = sorted(versions)
    return served


def with_share(config: pb.ModelConfig, share: float) -> pb.ModelConfig:
    """The config of a candidate that answers this share of its model's requests."""
    changed = _copy(config)
    changed.parameters[configs.SHARE].string_value = f"{share:g}"
    return changed


def tuned(config: pb.ModelConfig, choice: Mapping[str, str]) -> pb.ModelConfig:
    """The config of an ONNX step, or of an ensemble in one process, with the TUNED parameters of a
    machine. `provider` names the accelerator on the CPU; empty for none.
    """
    changed = _copy(config)
    for name in TUNED:
        if name in changed.parameters:
            del changed.parameters[name]
        if name in choice:
            changed.parameters[name].string_value = choice[name]
    if "provider" in choice:
        policy = pb.ModelOptimizationPolicy.ExecutionAccelerators
        cpu = changed.optimization.execution_accelerators.cpu_execution_accelerator
        asked = arithmetic.properties(choice.get("arithmetic", arithmetic.F32))
        del cpu[:]
        if choice["provider"]:
            cpu.append(policy.Accelerator(name=choice["provider"], parameters=asked))
    return changed


def tokenizer(name: str, spec: ModelSpec) -> pb.ModelConfig:
    """A text, or a pair of texts → input_ids, attention_mask, token types, kept tokens, TOKENS."""
    return pb.ModelConfig(
        name=name,
        backend="tokenizer",
        max_batch_size=MAX_BATCH_SIZE,
        input=_text_inputs(spec),
        output=[
            *(_output(tokens, pb.TYPE_INT64, -1) for tokens in token_inputs(spec)),
            *([_output(KEPT, pb.TYPE_INT64, -1)] if spec.late else []),
            *([_output(SPANS, pb.TYPE_INT64, -1, 2)] if POOLED_TOKENS in spec.heads else []),
            _output("TOKENS", pb.TYPE_INT32, 1),
        ],
        instance_group=[_on_cpu()],
        dynamic_batching=_batching(),
        model_warmup=[
            pb.ModelWarmup(
                name="one text",
                batch_size=1,
                inputs={
                    entry.name: _warm(
                        pb.TYPE_STRING,
                        1,
                        input_data_file="input_type" if entry.name == "INPUT_TYPE" else "text",
                    )
                    for entry in _text_inputs(spec)
                    if entry.data_type == pb.TYPE_STRING
                },
            )
        ],
    )


def token_inputs(spec: ModelSpec) -> list[str]:
    """Names of the inputs of a model's graph that have a value for each token."""
    return ["input_ids", "attention_mask", *([TOKEN_TYPES] if spec.token_types else [])]


def onnx(
    name: str,
    spec: ModelSpec,
    precision: str,
    device: str,
    computed: Computed = IN_F32,
) -> pb.ModelConfig:
    """Tokens → the pooled vector or the scores, and one row a token for each further head."""
    tensorrt = tensorrt_parameters(spec, precision, text_shapes(spec))
    written = _onnx(name, spec, _accelerators(device, tensorrt, computed), device)
    written.max_batch_size = MAX_BATCH_SIZE
    written.input.extend(_input(tokens, pb.TYPE_INT64, -1) for tokens in token_inputs(spec))
    written.output.extend(
        _output(head, pb.TYPE_FP32, -1, width) for head, width in spec.heads.items()
    )
    written.model_warmup.extend(
        pb.ModelWarmup(
            name=f"{rows} x {length} tokens",
            batch_size=rows,
            inputs={
                key: _warm(pb.TYPE_INT64, length, input_data_file=key)
                for key in ("input_ids", "attention_mask")
            }
            | (
                {TOKEN_TYPES: _warm(pb.TYPE_INT64, length, zero_data=True)}
                if spec.token_types
                else {}
            ),
        )
        for length in warm_lengths(spec)
        for rows in WARM_ROWS
    )
    written.parameters["max_tokens"].string_value = str(spec.max_tokens)
    if spec.late and spec.late.has_unattended:
        written.parameters["unattended_tokens"].string_value = "true"
    return written


def vision(
    name: str,
    spec: ModelSpec,
    precision: str,
    device: str,
    computed: Computed = IN_F32,
) -> pb.ModelConfig:
    """Pixels → the projected vector."""
    image = spec.images()
    size = (3, image.height, image.width)
    tensorrt = tensorrt_parameters(spec, precision, image_shapes(image))
    written = _onnx(name, spec, _accelerators(device, tensorrt, computed), device)
    written.max_batch_size = MAX_IMAGES
    written.input.append(_input(PIXELS, pb.TYPE_UINT8, *size))
    written.model_warmup.extend(
        pb.ModelWarmup(
            name=f"{rows} images",
            batch_size=rows,
            inputs={
                PIXELS: pb.ModelWarmup.Input(data_type=pb.TYPE_UINT8, dims=size, zero_data=True)
            },
        )
        for rows in WARM_ROWS
    )
    written.parameters["max_tokens"].string_value = str(image.positions)
    return written


def _onnx(
    name: str,
    spec: ModelSpec,
    accelerators: pb.ModelOptimizationPolicy.ExecutionAccelerators,
    device: str,
) -> pb.ModelConfig:
    """The part of the config that all ONNX steps share."""
    return pb.ModelConfig(
        name=name,
        backend="onnxruntime",
        default_model_filename="model.onnx",
        output=[_output(POOLED, pb.TYPE_FP32, spec.dims)],
        instance_group=[_instances(device)],
        dynamic_batching=_batching(),
        optimization=pb.ModelOptimizationPolicy(execution_accelerators=accelerators),
    )


def pixels(name: str, spec: ModelSpec) -> pb.ModelConfig:
    """IMAGE → pixels, WIDTH, HEIGHT, FORMAT."""
    image = spec.images()
    return pb.ModelConfig(
        name=name,
        backend="image",
        max_batch_size=MAX_IMAGES,
        input=[_input("IMAGE", pb.TYPE_STRING, 1)],
        output=[_output(PIXELS, pb.TYPE_UINT8, 3, image.height, image.width), *_image_facts()],
        instance_group=[_on_cpu()],
        dynamic_batching=_batching(MAX_IMAGE_QUEUE_SIZE),
        model_warmup=[
            pb.ModelWarmup(
                name="one image",
                batch_size=1,
                inputs={"IMAGE": _warm(pb.TYPE_STRING, 1, input_data_file="image")},
            )
        ],
    )


def warm_lengths(spec: ModelSpec) -> list[int]:
    """Token lengths of the warm-up requests."""
    return [length for length in spec.length_buckets if length <= WARM_TOKENS]


def pooler(name: str, spec: ModelSpec) -> pb.ModelConfig:
    """The pooled vector, DIMENSIONS → EMBEDDING, scores → SCORE or SCORES, or the weights of a
    vocabulary → SPARSE_IDS, SPARSE_WEIGHTS; heads with ids and mask → their outputs; vectors of
    tokens with kept tokens → MULTI_VECTORS.
    """
    pooled = [] if spec.late else [_input(POOLED, pb.TYPE_FP32, spec.dims)]
    heads = [_input(head, pb.TYPE_FP32, -1, width) for head, width in spec.heads.items()]
    tokens = [
        _input(name, pb.TYPE_INT64, -1, *([2] if name == SPANS else []))
        for name in _pooled_tokens(spec)
    ]
    return pb.ModelConfig(
        name=name,
        backend="pooler",
        max_batch_size=MAX_BATCH_SIZE,
        input=[
            *pooled,
            *([_dimensions()] if spec.kind == DENSE else []),
            *heads,
            *tokens,
        ],
        output=[*_vector_outputs(spec), *_head_outputs(spec)],
        instance_group=[_on_cpu()],
        dynamic_batching=_batching(),
        model_warmup=[
            pb.ModelWarmup(
                name="one vector",
                batch_size=1,
                inputs={
                    **_warm_dimensions(spec),
                    **{
                        entry.name: pb.ModelWarmup.Input(
                            data_type=entry.data_type,
                            dims=[max(1, size) for size in entry.dims],
                            zero_data=True,
                        )
                        for entry in (*pooled, *heads, *tokens)
                    },
                },
            )
        ],
    )


def _pooled_tokens(spec: ModelSpec) -> list[str]:
    """Names of the tokenizer's tensors that the pooler takes: those of tokens, for heads, and the
    tokens of spans.
    """
    if spec.late:
        return [KEPT]
    per_token = ["input_ids", "attention_mask"] if spec.heads.keys() - {POOLED_TOKENS} else []
    return [*per_token, *([SPANS] if POOLED_TOKENS in spec.heads else [])]


def ensemble(described: Ensemble) -> pb.ModelConfig:
    """A text, or a pair of texts → EMBEDDING, SCORE, SCORES, sparse weights or multi-vectors,
    TOKENS, and the heads' outputs.
    """
    spec, steps = described.spec, described.steps
    outputs = [entry.name for entry in (*_vector_outputs(spec), *_head_outputs(spec))]
    heads = {head: head for head in spec.heads}
    names = {"input_ids": "ids", "attention_mask": "mask", TOKEN_TYPES: "types"}
    names |= {KEPT: KEPT, SPANS: SPANS}
    tokens = {name: names[name] for name in token_inputs(spec)}
    to_pooler = {name: names[name] for name in _pooled_tokens(spec)}
    pooled = {} if spec.late else {POOLED: "pooled"}
    texts = {entry.name: entry.name for entry in _text_inputs(spec)}
    dimensions = {"DIMENSIONS": "DIMENSIONS"} if spec.kind == DENSE else {}
    return pb.ModelConfig(
        name=described.name,
        platform="ensemble",
        max_batch_size=MAX_BATCH_SIZE,
        input=_inputs(spec),
        output=_embedded(spec),
        ensemble_scheduling=pb.ModelEnsembling(
            step=[
                _step(steps["tokenizer"], texts, {**tokens, **to_pooler, "TOKENS": "TOKENS"}),
                _step(steps["onnx"], tokens, {**pooled, **heads}),
                _step(
                    steps["pooler"],
                    {**pooled, **dimensions, **heads, **to_pooler},
                    {name: name for name in outputs},
                ),
            ]
        ),
        parameters=_text_facts(described),
    )


def one_process(described: Ensemble, device: str) -> pb.ModelConfig:
    """The inputs and outputs of the ensemble, from one process that opens the steps' files."""
    spec, precision = described.spec, described.precision
    pins = {step: described.steps[step] for step in ("tokenizer", "onnx")}
    files = {step: f"{pin.model}/{pin.version}" for step, pin in pins.items()}
    return pb.ModelConfig(
        name=described.name,
        backend="embedder",
        max_batch_size=MAX_BATCH_SIZE,
        input=_inputs(spec),
        output=_embedded(spec),
        instance_group=[_instances(device)],
        # No priorities and no limit here: with them, Triton's batcher misses a request that comes
        # while the backend reads others, until the next one comes or half a second passes. The
        # backend has both.
        dynamic_batching=pb.ModelDynamicBatching(),
        optimization=pb.ModelOptimizationPolicy(
            execution_accelerators=_accelerators(
                device,
                tensorrt_parameters(spec, precision, text_shapes(spec)),
                described.computed,
            )
        ),
        model_warmup=[
            pb.ModelWarmup(
                name=f"{rows} x {length} tokens",
                batch_size=rows,
                inputs=_warm_texts(spec, length),
            )
            for length in warm_lengths(spec)
            for rows in WARM_ROWS
        ],
        parameters=_text_facts(described)
        | _parameters(files | {"max_queue_size": str(MAX_QUEUE_SIZE)}),
    )


def warm_text(length: int) -> str:
    """Name of the file with a warm-up text of about `length` tokens."""
    return f"text_{length}"


def image_ensemble(described: Ensemble) -> pb.ModelConfig:
    """IMAGE, DIMENSIONS → EMBEDDING, WIDTH, HEIGHT, FORMAT."""
    steps, image = described.steps, described.spec.images()
    parameters = _facts(
        described.spec,
        described.precision,
        described.missed,
        arithmetic=described.computed.arithmetic,
        input="image",
        text_model=described.counterpart,
        max_image_bytes=str(image.max_image_bytes),
        max_image_pixels=str(image.max_image_pixels),
    )
    facts = {entry.name: entry.name for entry in _image_facts()}
    return pb.ModelConfig(
        name=described.name,
        platform="ensemble",
        max_batch_size=MAX_IMAGES,
        input=[_input("IMAGE", pb.TYPE_STRING, 1), _dimensions()],
        output=[_embedding(), *_image_facts()],
        ensemble_scheduling=pb.ModelEnsembling(
            step=[
                _step(steps["pixels"], {"IMAGE": "IMAGE"}, {PIXELS: "pixels", **facts}),
                _step(steps["onnx"], {PIXELS: "pixels"}, {POOLED: "pooled"}),
                _step(
                    steps["pooler"],
                    {POOLED: "pooled", "DIMENSIONS": "DIMENSIONS"},
                    {"EMBEDDING": "EMBEDDING"},
                ),
            ]
        ),
        parameters=parameters,
    )


def _image_facts() -> list[pb.ModelOutput]:
    return [
        _output("WIDTH", pb.TYPE_INT32, 1),
        _output("HEIGHT", pb.TYPE_INT32, 1),
        _output("FORMAT", pb.TYPE_STRING, 1),
    ]


def fusion(
    name: str, spec: ModelSpec, precision: str, models: Mapping[str, Pin], note: str
) -> pb.ModelConfig:
    """TEXT, INPUT_TYPE, IMAGE, DIMENSIONS → EMBEDDING. `models` has `text` and `image`, each in the
    version that the projection was made for.
    """
    served = {
        key: value
        for kind, pin in models.items()
        for key, value in ((f"{kind}_model", pin.model), (f"{kind}_version", str(pin.version)))
    }
    parameters = _facts(
        spec,
        precision,
        (),
        input="multimodal",
        max_tokens=str(spec.max_tokens),
        max_image_bytes=str(spec.images().max_image_bytes),
        fusion=note,
        **served,
    )
    return pb.ModelConfig(
        name=name,
        backend="fusion",
        max_batch_size=MAX_IMAGES,
        input=[
            _input("TEXT", pb.TYPE_STRING, 1, optional=True),
            _input_type(),
            _input("IMAGE", pb.TYPE_STRING, 1, optional=True),
            _dimensions(),
        ],
        output=[_embedding()],
        instance_group=[_on_cpu()],
        dynamic_batching=_batching(MAX_IMAGE_QUEUE_SIZE),
        parameters=parameters,
    )


def maxsim(name: str, described: Ensemble, version: int) -> pb.ModelConfig:
    """QUERY, TEXT → SCORE, TOKENS, by the multi-vectors of an ensemble in this version."""
    facts = scored(described.spec)
    return pb.ModelConfig(
        name=name,
        backend="maxsim",
        max_batch_size=MAX_BATCH_SIZE,
        input=_text_inputs(facts),
        output=_embedded(facts),
        instance_group=[_on_cpu()],
        dynamic_batching=_batching(),
        parameters=_facts(
            facts,
            described.precision,
            described.missed,
            max_tokens=str(facts.max_tokens),
            kind=RERANKER,
            model=described.name,
            model_version=str(version),
        ),
    )


def alias(name: str, model: str, text_input: str) -> pb.ModelConfig:
    """`text_input` → OUTPUT_EMBEDDINGS, by the served version of a model: `[texts]` BYTES →
    `[texts, dims]` float32, at most MAX_BATCH_SIZE texts.
    """
    texts = _input(text_input, pb.TYPE_STRING, -1)
    texts.reshape.shape[:] = [-1, 1]
    return pb.ModelConfig(
        name=name,
        platform="ensemble",
        input=[texts],
        output=[_output(ALIAS_OUTPUT, pb.TYPE_FP32, -1, -1)],
        ensemble_scheduling=pb.ModelEnsembling(
            step=[_step(Pin(model, -1), {"TEXT": text_input}, {"EMBEDDING": ALIAS_OUTPUT})]
        ),
    )


def scored(spec: ModelSpec) -> ModelSpec:
    """The facts of a model that scores pairs by the multi-vectors of another."""
    return dataclasses.replace(
        spec,
        kind=RERANKER,
        space=key_of("maxsim", spec.space),
        dims=1,
        max_tokens=spec.late.document_tokens if spec.late else spec.max_tokens,
        heads={},
        late=None,
        special_ids=(),
        matryoshka=(),
    )


def router(
    name: str, spec: ModelSpec, precision: str, towers: Mapping[str, Pin], missed: Sequence[str]
) -> pb.ModelConfig:
    """TEXT, INPUT_TYPE, DIMENSIONS → EMBEDDING, TOKENS, by one of the towers, each in the version
    that the build made.
    """
    served = {
        key: value
        for tower, pin in towers.items()
        for key, value in ((f"{tower}_model", pin.model), (f"{tower}_version", str(pin.version)))
    }
    return pb.ModelConfig(
        name=name,
        backend="router",
        max_batch_size=MAX_BATCH_SIZE,
        input=_inputs(spec),
        output=_embedded(spec),
        instance_group=[_on_cpu(ROUTER_INSTANCES)],
        dynamic_batching=_batching(),
        parameters=_facts(spec, precision, missed, max_tokens=str(spec.max_tokens), **served),
    )


def check_device(device: str) -> None:
    """Raise unless `device` is one of DEVICES.

    Raises:
        InvalidInput: it is another.
    """
    if device not in DEVICES:
        raise InvalidInput(f"device is {device!r}; use {', '.join(DEVICES)}.")


def read(path: Path) -> pb.ModelConfig:
    """The config of a model folder of the repository."""
    return text_format.Parse(path.read_text(), pb.ModelConfig())


def space(path: Path) -> str:
    """The space that an ensemble's config names."""
    return str(read(path).parameters["space"].string_value)


def is_shaped_alike(one: pb.ModelConfig, other: pb.ModelConfig) -> bool:
    """Whether two ensembles have the same inputs, outputs and dims."""
    shapes = [
        (list(config.input), list(config.output), config.parameters["dims"].string_value)
        for config in (one, other)
    ]
    return shapes[0] == shapes[1]


def called(config: pb.ModelConfig) -> list[str]:
    """The models that a fusion or a router calls; empty for any other config."""
    parts = {"fusion": ("text", "image"), "router": ("query", "document")}.get(config.backend, ())
    return [config.parameters[f"{part}_model"].string_value for part in parts]


def _copy(config: pb.ModelConfig) -> pb.ModelConfig:
    copy = pb.ModelConfig()
    copy.CopyFrom(config)
    return copy


def _inputs(spec: ModelSpec) -> list[pb.ModelInput]:
    """Inputs of a model that takes texts."""
    return [*_text_inputs(spec), *([_dimensions()] if spec.kind == DENSE else [])]


def _text_inputs(spec: ModelSpec) -> list[pb.ModelInput]:
    """Inputs of a tokenizer."""
    text = _input("TEXT", pb.TYPE_STRING, 1)
    if spec.kind == RERANKER:
        return [_input("QUERY", pb.TYPE_STRING, 1), text]
    if spec.kind == CLASSIFIER:
        return [text, _input("TEXT_PAIR", pb.TYPE_STRING, 1, optional=True)]
    spans = [_input("SPANS", pb.TYPE_INT32, -1, 2, optional=True)]
    return [text, _input_type(), *(spans if POOLED_TOKENS in spec.heads else [])]


def _warm_texts(spec: ModelSpec, length: int) -> dict[str, pb.ModelWarmup.Input]:
    """Inputs of a warm-up request with texts of about `length` tokens. Of a pair, the second text
    is so long.
    """
    files = {"QUERY": "text", "TEXT": warm_text(length), "INPUT_TYPE": "input_type"}
    texts = {
        entry.name: _warm(pb.TYPE_STRING, 1, input_data_file=files[entry.name])
        for entry in _text_inputs(spec)
        if entry.name in files
    }
    return texts | _warm_dimensions(spec)


def _warm_dimensions(spec: ModelSpec) -> dict[str, pb.ModelWarmup.Input]:
    if spec.kind != DENSE:
        return {}
    return {"DIMENSIONS": _warm(pb.TYPE_INT32, 1, input_data_file="dimensions")}


def _input_type() -> pb.ModelInput:
    return _input("INPUT_TYPE", pb.TYPE_STRING, 1, optional=True)


def _dimensions() -> pb.ModelInput:
    return _input("DIMENSIONS", pb.TYPE_INT32, 1, optional=True)


def _embedding() -> pb.ModelOutput:
    # -1, not dims: DIMENSIONS may ask for fewer.
    return _output("EMBEDDING", pb.TYPE_FP32, -1)


def _vector_outputs(spec: ModelSpec) -> list[pb.ModelOutput]:
    if spec.kind == DENSE:
        return [_embedding()]
    if spec.kind == SPARSE_KIND:
        return _sparse_outputs()
    if spec.late:
        return []
    return [_output(VECTOR_OUTPUTS[spec.kind], pb.TYPE_FP32, spec.dims)]


def _sparse_outputs() -> list[pb.ModelOutput]:
    ids, weights = HEAD_OUTPUTS[SPARSE]
    return [_output(ids, pb.TYPE_INT32, -1), _output(weights, pb.TYPE_FP32, -1)]


def _embedded(spec: ModelSpec) -> list[pb.ModelOutput]:
    return [*_vector_outputs(spec), _output("TOKENS", pb.TYPE_INT32, 1), *_head_outputs(spec)]


def _head_outputs(spec: ModelSpec) -> list[pb.ModelOutput]:
    outputs: list[pb.ModelOutput] = []
    for head, width in spec.heads.items():
        if head == SPARSE:
            outputs += _sparse_outputs()
        elif head == POOLED_TOKENS:
            vector, weight = HEAD_OUTPUTS[head]
            # -1, not the head's width: DIMENSIONS may ask for fewer.
            outputs += [_output(vector, pb.TYPE_FP32, -1, -1), _output(weight, pb.TYPE_FP32, -1)]
        else:
            outputs += [_output(name, pb.TYPE_FP32, -1, width) for name in HEAD_OUTPUTS[head]]
    return outputs


def _input(name: str, data_type: int, *dims: int, optional: bool = False) -> pb.ModelInput:
    return pb.ModelInput(name=name, data_type=data_type, dims=dims, optional=optional)


def _output(name: str, data_type: int, *dims: int) -> pb.ModelOutput:
    return pb.ModelOutput(name=name, data_type=data_type, dims=dims)


def _text_facts(described: Ensemble) -> Parameters:
    return _facts(
        described.spec,
        described.precision,
        described.missed,
        arithmetic=described.computed.arithmetic,
        max_tokens=str(described.spec.max_tokens),
        image_model=described.counterpart,
        kind="" if described.spec.kind == DENSE else described.spec.kind,
        labels=json.dumps(described.spec.labels) if described.spec.labels else "",
        query_tokens=str(described.spec.late.query_tokens) if described.spec.late else "",
    )


def _facts(spec: ModelSpec, precision: str, missed: Sequence[str], **further: str) -> Parameters:
    """Parameters that tell a client about a model; empty ones are left out."""
    facts = {"space": spec.space, "precision": precision, "dims": str(spec.dims), **further}
    facts["below_bar"] = "; ".join(missed)
    return _parameters({key: value for key, value in facts.items() if value})


def _parameters(values: Mapping[str, str]) -> Parameters:
    return {key: pb.ModelParameter(string_value=value) for key, value in values.items()}


def _instances(device: str) -> pb.ModelInstanceGroup:
    """The ONNX step's instances. KIND_AUTO uses a GPU if Triton has one, else the CPU."""
    group = pb.ModelInstanceGroup
    kind = group.KIND_AUTO if device == CPU else group.KIND_GPU
    return pb.ModelInstanceGroup(kind=kind, count=ONNX_INSTANCES)


def _accelerators(
    device: str, tensorrt: Mapping[str, str], computed: Computed
) -> pb.ModelOptimizationPolicy.ExecutionAccelerators:
    policy = pb.ModelOptimizationPolicy.ExecutionAccelerators
    if device == CUDA:
        return policy(gpu_execution_accelerator=[policy.Accelerator(name="cuda")])
    if device == TENSORRT:
        accelerator = policy.Accelerator(name="tensorrt", parameters=tensorrt)
        return policy(gpu_execution_accelerator=[accelerator])
    return policy(
        cpu_execution_accelerator=[
            policy.Accelerator(name=name, parameters=arithmetic.properties(computed.arithmetic))
            for name in ACCELERATORS[computed.engine]
        ]
    )


def text_shapes(spec: ModelSpec) -> dict[str, str]:
    """TensorRT's shapes: from one row of the shortest bucket to a full batch of the longest."""
    buckets = spec.length_buckets
    shapes = {
        "min": (1, buckets[0]),
        "opt": (TENSORRT_ROWS, min(buckets, key=lambda length: abs(length - 64))),
        "max": (MAX_BATCH_SIZE, buckets[-1]),
    }
    return {
        name: ",".join(f"{tokens}:{rows}x{length}" for tokens in token_inputs(spec))
        for name, (rows, length) in shapes.items()
    }


def image_shapes(image: ImageSpec) -> dict[str, str]:
    """TensorRT's shapes: from one image to a full batch."""
    rows = {"min": 1, "opt": MAX_IMAGES // 2, "max": MAX_IMAGES}
    return {
        name: f"{PIXELS}:{count}x3x{image.height}x{image.width}" for name, count in rows.items()
    }


def tensorrt_parameters(
    spec: ModelSpec, precision: str, shapes: Mapping[str, str]
) -> dict[str, str]:
    """Parameters of Triton's TensorRT accelerator: precision, engine cache, and the shapes `min`,
    `opt` and `max`.
    """
    return {
        "precision_mode": precision.upper(),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": f"{TENSORRT_CACHE}/{spec.space}-{precision}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": TENSORRT_CACHE,
        **{f"trt_profile_{name}_shapes": shape for name, shape in shapes.items()},
    }


def _on_cpu(instances: int = 1) -> pb.ModelInstanceGroup:
    return pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_CPU, count=instances)


def _batching(max_queue_size: int = MAX_QUEUE_SIZE) -> pb.ModelDynamicBatching:
    return pb.ModelDynamicBatching(
        priority_levels=PRIORITIES,
        default_priority_level=1,
        default_queue_policy=pb.ModelQueuePolicy(max_queue_size=max_queue_size),
    )


def _warm(
    data_type: int, length: int, input_data_file: str | None = None, zero_data: bool | None = None
) -> pb.ModelWarmup.Input:
    return pb.ModelWarmup.Input(
        data_type=data_type, dims=[length], input_data_file=input_data_file, zero_data=zero_data
    )


def _step(
    pin: Pin, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> pb.ModelEnsembling.Step:
    return pb.ModelEnsembling.Step(
        model_name=pin.model, model_version=pin.version, input_map=inputs, output_map=outputs
    )
