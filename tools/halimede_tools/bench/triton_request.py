"""Requests to Triton as the bytes that gRPC sends, made beforehand to leave the cores to the server
while they are sent.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from halimede_tools.bench import closed_loop

INFER = "/inference.GRPCInferenceService/ModelInfer"
"""The gRPC method of a request to Triton."""


def message(
    model: str,
    texts: Sequence[bytes],
    input_types: Sequence[str] = (),
    dimensions: Sequence[int] = (),
    priority: int = 0,
) -> bytes:
    """A request as it is sent to INFER; what is empty is left out."""
    from tritonclient.grpc import service_pb2 as pb

    request = pb.ModelInferRequest(model_name=model)
    if priority:
        request.parameters["priority"].uint64_param = priority

    def add_input(name: str, datatype: str, values: Sequence[bytes]) -> None:
        request.inputs.add(name=name, datatype=datatype, shape=[len(values), 1])
        request.raw_input_contents.append(b"".join(values))

    add_input("TEXT", "BYTES", [_with_length(text) for text in texts])
    if input_types:
        add_input("INPUT_TYPE", "BYTES", [_with_length(name.encode()) for name in input_types])
    if dimensions:
        add_input("DIMENSIONS", "INT32", [struct.pack("<i", dims) for dims in dimensions])
    return bytes(request.SerializeToString())


def _with_length(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def send_singly(address: str, model: str, texts: Sequence[str], callers: int) -> closed_loop.Load:
    """Send each text in a request of its own, over gRPC.

    Raises:
        RuntimeError: a request failed.
    """
    import grpc  # type: ignore[import-untyped]

    messages = [message(model, [text.encode()]) for text in texts]
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary(INFER)
        grpc.channel_ready_future(channel).result()
        load = closed_loop.futures(infer.future, messages, callers)
    load.raise_errors()
    return load
