"""OpenAI's Files and Batches: jobs of many embeddings, on disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, FastAPI, Form, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse
from pydantic import Field, ValidationError

from halimede.gateway.batches.runner import Runner
from halimede.gateway.batches.store import (
    FINAL,
    MAX_METADATA,
    WINDOW_S,
    Batch,
    Store,
    new_id,
    now,
    page,
    shown,
)
from halimede.gateway.calls import Asked, Call, Gateway, answer
from halimede.gateway.dialects import openai
from halimede.gateway.dialects.dialect import Body, Dialect, invalid, reads, register, takes
from halimede.gateway.edge.keys import Keys
from halimede.gateway.errors import Problem, problem_of
from halimede.gateway.models.served import Model
from halimede_ops.errors import HalimedeError

MAX_PAGE = 10_000
"""Maximum rows of a list."""
log = logging.getLogger("halimede.gateway.batches")


class BackgroundCall(Call):
    """A call that nobody waits for."""

    async def model(self, name: str | None, use_fallback: bool = True) -> Model:
        """Return the model of a name that the caller may ask."""
        return (await super().model(name, use_fallback)).in_background


@contextlib.asynccontextmanager
async def _running(app: FastAPI) -> AsyncIterator[None]:
    """Run batches as long as the gateway runs."""
    gateway: Gateway = app.state.gateway
    if gateway.config.files is None:
        yield
        return

    async def ask(batch: Batch, body: Any) -> tuple[int, bytes]:
        return await asked(gateway, app.state.keys, batch, body)

    runner = app.state.runner = Runner(Store(gateway.config.files), ask)
    task = asyncio.create_task(runner.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def asked(gateway: Gateway, keys: Keys, batch: Batch, body: Any) -> tuple[int, bytes]:
    """Return the status and body of the answer to a batch's body of `POST /v1/embeddings`.

    Raises:
        Problem: the same body can be answered later.
    """
    try:
        request = openai.EmbeddingsRequest.model_validate(body)
        call = BackgroundCall(gateway, await keys.caller_of(batch.key_id, batch.space))
        return 200, bytes((await openai.embeddings(call, request)).body)
    except ValidationError as error:
        problem = invalid(error)
    except HalimedeError as error:
        problem = problem_of(error)
    except Problem as error:
        problem = error
    except Exception as error:
        log.error("A line of a batch failed with %s.", type(error).__name__)  # no text of its own
        problem = Problem(500, "The gateway failed on this line.", "server_error")
    if problem.retry_after_s is not None:
        raise problem
    status, refusal = openai.error(problem)
    return status, orjson.dumps(refusal)


async def runner(request: Request) -> Runner:
    """Return the runner of the gateway.

    Raises:
        Problem: the gateway keeps no files.
    """
    found = getattr(request.app.state, "runner", None)
    if found is None:
        raise Problem(404, "this gateway keeps no files. gateway.files sets the folder for them.")
    return found


routes = APIRouter(lifespan=_running)
Batches = Annotated[Runner, Depends(runner)]
After = Annotated[str | None, Query(description="The last id of the page before.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]


@routes.post("/v1/files", summary="Store a file")
async def create_file(
    call: Asked, batches: Batches, file: UploadFile, purpose: Annotated[Literal["batch"], Form()]
) -> Response:
    """Store the lines of a batch."""
    name = file.filename or "file"
    stored = await asyncio.to_thread(
        batches.store.add_file, file.file, name, purpose, call.caller.key_id
    )
    return answer(call, shown(stored))


@routes.get("/v1/files", summary="List files")
async def list_files(
    call: Asked,
    batches: Batches,
    purpose: str | None = None,
    after: After = None,
    limit: Limit = MAX_PAGE,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """Return the caller's files."""
    files = await asyncio.to_thread(batches.store.all_files, call.caller.key_id)
    files = [file for file in files if purpose in (None, file.purpose)]
    return answer(call, page(files, after, limit, oldest_first=order == "asc"))


@routes.get("/v1/files/{file_id}", summary="Describe a file")
async def get_file(file_id: str, call: Asked, batches: Batches) -> Response:
    """Return a file, without its bytes."""
    return answer(call, shown(batches.store.file(file_id, call.caller.key_id)))


@routes.get("/v1/files/{file_id}/content", summary="Read a file")
async def get_content(file_id: str, call: Asked, batches: Batches) -> Response:
    """Return the bytes of a file."""
    file = batches.store.file(file_id, call.caller.key_id)
    return FileResponse(batches.store.data(file.id), media_type="application/octet-stream")


@routes.delete("/v1/files/{file_id}", summary="Delete a file")
async def delete_file(file_id: str, call: Asked, batches: Batches) -> Response:
    """Delete a file. A batch that has begun to read it goes on."""
    batches.store.delete_file(file_id, call.caller.key_id)
    return answer(call, {"id": file_id, "object": "file", "deleted": True})


class BatchRequest(Body):
    """Body of `POST /v1/batches`."""

    input_file_id: str
    """A file of JSON lines: `custom_id`, `method` POST, `url` /v1/embeddings, and `body`."""
    endpoint: Literal["/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(None, max_length=MAX_METADATA)


@routes.post("/v1/batches", summary="Start a batch", openapi_extra=takes(BatchRequest))
async def create_batch(
    call: Asked, batches: Batches, body: Annotated[BatchRequest, reads(BatchRequest)]
) -> Response:
    """Start to embed the lines of a file in the background."""
    file = batches.store.file(body.input_file_id, call.caller.key_id)
    batch = Batch(
        id=new_id("batch_"),
        endpoint=body.endpoint,
        input_file_id=file.id,
        completion_window=body.completion_window,
        created_at=now(),
        expires_at=now() + WINDOW_S,
        metadata=body.metadata,
        key_id=call.caller.key_id,
        space=call.caller.space,
        answers_id=new_id("file-"),
        failures_id=new_id("file-"),
    )
    await asyncio.to_thread(batches.store.add_batch, batch)
    batches.wake()
    return answer(call, shown(batch))


@routes.get("/v1/batches", summary="List batches")
async def list_batches(
    call: Asked, batches: Batches, after: After = None, limit: Limit = 20
) -> Response:
    """Return the caller's batches, the newest first."""
    rows = await asyncio.to_thread(batches.store.all_batches, call.caller.key_id)
    return answer(call, page(rows, after, limit))


@routes.get("/v1/batches/{batch_id}", summary="Describe a batch")
async def get_batch(batch_id: str, call: Asked, batches: Batches) -> Response:
    """Return a batch: how far it is, and the files of its answers."""
    return answer(call, shown(batches.store.batch(batch_id, call.caller.key_id)))


@routes.post("/v1/batches/{batch_id}/cancel", summary="Cancel a batch")
async def cancel_batch(batch_id: str, call: Asked, batches: Batches) -> Response:
    """End a batch. The lines that are answered so far are kept."""
    batch = batches.store.batch(batch_id, call.caller.key_id)
    if batch.status in FINAL:
        raise Problem(409, f"the batch has ended: it is {batch.status}.", "batch_ended")
    batches.store.cancel(batch.id)
    batches.wake()
    return answer(call, shown(batches.store.batch(batch_id, call.caller.key_id)))


DIALECT = register(Dialect("batches", routes, openai.error))
