"""Gathering: what several callers ask at one time travels in one call."""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from halimede.results import Result
from halimede_ops.errors import HalimedeError

R = TypeVar("R", bound=Result)
CALLS = 2
"""Calls under way at a time. What comes meanwhile waits for the next."""
GATHER_S = 0.004
"""Seconds for which a call waits for callers while another is under way."""
MAX_GATHERED = 64
"""Maximum inputs in a call of several callers. A caller with more has a call of its own."""


class _Waiting(NamedTuple):
    inputs: Sequence[Any]
    future: asyncio.Future[Any]


class Gatherer(Generic[R]):
    """Answers callers that ask the same of a model, with as few calls as are needed.

    A call starts at once if none is under way, so a lone caller waits for nobody. Beside another
    call it starts after GATHER_S: the callers of the call before ask again in that time, and the
    server works on the other call meanwhile.
    """

    def __init__(self, run: Callable[[list[Any]], Awaitable[R]]) -> None:
        self._run = run
        self._waiting: deque[_Waiting] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def ask(self, inputs: Sequence[Any]) -> R:
        """Return the result of these inputs, in their order.

        Raises:
            HalimedeError: it is about these inputs, or about the model.
        """
        if len(inputs) >= MAX_GATHERED:
            return await self._run(list(inputs))
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(inputs, future))
        self._plan()
        return await future

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits."""
        return not self._calls and not self._waiting

    def _plan(self) -> None:
        """Start a call now or soon, if one may start and somebody waits."""
        if not self._waiting or self._timer is not None or len(self._calls) >= CALLS:
            return
        if self._calls:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self._start)
        else:
            self._start()

    def _start(self) -> None:
        self._timer = None
        callers = self._next()
        if callers:
            call = asyncio.get_running_loop().create_task(self._answer(callers))
            self._calls.add(call)
            call.add_done_callback(self._ended)
        self._plan()

    def _ended(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._plan()

    def _next(self) -> list[_Waiting]:
        """Take the callers of the next call, in the order in which they came."""
        taken, size = [], 0
        while self._waiting and size + len(self._waiting[0].inputs) <= MAX_GATHERED:
            waiting = self._waiting.popleft()
            if not waiting.future.done():  # the caller has gone
                taken.append(waiting)
                size += len(waiting.inputs)
        return taken

    async def _answer(self, callers: list[_Waiting]) -> None:
        """Answer callers by one call; if it fails for one of them, answer each by its own."""
        try:
            result = await self._run([each for caller in callers for each in caller.inputs])
        except Exception as error:
            is_of_one = isinstance(error, HalimedeError) and not error.retryable
            if len(callers) > 1 and is_of_one:
                await asyncio.gather(*(self._answer([caller]) for caller in callers))
                return
            for caller in callers:
                if not caller.future.done():
                    caller.future.set_exception(error)
            return
        start = 0
        for caller in callers:
            stop = start + len(caller.inputs)
            if not caller.future.done():
                caller.future.set_result(rows(result, start, stop))
            start = stop


def rows(result: R, start: int, stop: int) -> R:
    """Return some rows of a result."""
    count = len(result)
    if (start, stop) == (0, count):
        return result
    part = copy.copy(result)
    for name, value in vars(result).items():
        if name == "indices":
            object.__setattr__(part, name, np.arange(stop - start))
        elif name != "labels" and isinstance(value, (np.ndarray, tuple)) and len(value):
            object.__setattr__(part, name, value[start:stop])
    return part
