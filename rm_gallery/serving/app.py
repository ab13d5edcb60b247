"""The application: protocols, what the server says of itself, and answers to what it refuses."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from rm_gallery import __version__
from rm_gallery.serving.guard import Guard, Keys
from rm_gallery.serving.limits import Limits, Refused
from rm_gallery.serving.metrics import CONTENT_TYPE, Metrics
from rm_gallery.serving.page import make_page
from rm_gallery.serving.protocols import add_protocols
from rm_gallery.serving.served import Models

_DESCRIPTION = (
    "Rewards of texts and conversations, in the shapes of vLLM, SGLang, OpenRLHF, Cohere, Jina and OpenAI. Every shape "
    "gives the same reward, that of rm_gallery.scoring.RewardScorer."
)
_ERROR = {"description": "Why the request is refused", "content": {"application/json": {"schema": {
    "type": "object", "properties": {"error": {"type": "object", "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "code": {"type": "integer"},
        "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    }}},
}}}}  # fmt: skip
_REFUSALS: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 401, 404, 408, 413, 422, 429), _ERROR)


def make_app(models: Models, limits: Limits | None = None, keys: Sequence[str] = ()) -> Guard:
    """The ASGI application of a server. keys: those that requests may have; none are needed if there are none.

    The models are closed when the server stops, after what was accepted is scored.
    """
    limits = limits or Limits()
    metrics = Metrics(models)
    is_ready = False

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal is_ready
        is_ready = True
        yield
        is_ready = False
        models.close()

    app = FastAPI(
        title="RM-Gallery", version=__version__, description=_DESCRIPTION, docs_url=None, redoc_url=None,
        lifespan=lifespan,
    )  # fmt: skip
    router = APIRouter(responses=_REFUSALS)
    add_protocols(router, models, limits)
    app.include_router(router)
    started = int(time.time())

    @app.get("/v1/models", tags=["server"], responses=_REFUSALS)
    async def list_models() -> JSONResponse:
        """The models by name."""
        cards = [
            {"id": model.name, "object": "model", "created": started, "owned_by": "rm-gallery",
             "max_model_len": model.max_length}
            for model in models.by_name.values()
        ]  # fmt: skip
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/health", tags=["server"])
    async def health() -> JSONResponse:
        """Whether every model still takes texts; 503 if the server has to be restarted."""
        dead = [model.name for model in models.by_name.values() if not model.is_alive]
        return JSONResponse({"status": "failed" if dead else "ok", "failed": dead}, 503 if dead else 200)

    @app.get("/ready", tags=["server"])
    async def ready() -> JSONResponse:
        """Whether requests are accepted; 503 before and after."""
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/metrics", tags=["server"], responses=_REFUSALS, response_class=PlainTextResponse)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    page, page_headers = make_page()

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        """The page for people."""
        return Response(page, headers=page_headers, media_type="text/html")

    _add_error_handlers(app)
    paths = {route.path for route in app.routes if hasattr(route, "path")} | set(app.openapi()["paths"])
    return Guard(app, keys=Keys(keys), limits=limits, metrics=metrics, paths=paths)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refuse(_: Any, error: Refused) -> JSONResponse:
        return JSONResponse(error.content(), error.status, dict(error.headers))

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(_: Any, error: RequestValidationError) -> JSONResponse:
        """Which field is wrong, without its value."""
        found = error.errors()[0]
        place = ".".join(str(part) for part in found["loc"] if part != "body")
        if found["type"] == "json_invalid":
            place, found = "", {"msg": "the body is not JSON"}
        elif not place and found["type"] == "missing":
            found = {"msg": "the body has to be a JSON object, with Content-Type: application/json"}
        message = f"{place}: {found['msg']}" if place else found["msg"]
        return await refuse(_, Refused(400, message.encode("ascii", "replace").decode(), place or None))

    @app.exception_handler(Exception)
    async def fail(_: Any, error: Exception) -> JSONResponse:
        """The guard logs where it happened."""
        return await refuse(_, Refused(500, f"{type(error).__name__}; the log of the server has the place"))

    @app.exception_handler(HTTPException)
    async def refuse_path(_: Any, error: HTTPException) -> JSONResponse:
        words = {404: "no such path; the server describes itself at /openapi.json", 405: "this path has another method"}
        if error.status_code == 400:  # from the parser of bodies
            words[400] = "the body is not JSON, or nested too deeply"
        refused = Refused(error.status_code, words.get(error.status_code, str(error.detail)), None, error.headers or {})
        return await refuse(_, refused)
