"""platform."""

from __future__ import annotations

from fastapi import APIRouter

from halimede.gateway.dialects import openai
from halimede.gateway.dialects.dialect import Dialect, register

routes = APIRouter()

DIALECT = register(Dialect("platform", routes, openai.error))
