"""GET /v1/models and GET /v1/models/{id}."""

from typing import Any

from litestar import get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from app.pool.pool import Pool
from app.server.schema.responses import model_object


def handlers(pool: Pool) -> list[HTTPRouteHandler]:
    """Return the routes."""

    @get("/v1/models", sync_to_thread=False)
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(model) for model in pool.models()]}

    @get("/v1/models/{model_id:path}", sync_to_thread=False)
    def retrieve_model(model_id: FromPath[str]) -> dict[str, Any]:
        return model_object(pool.model(model_id.removeprefix("/")))

    return [list_models, retrieve_model]
