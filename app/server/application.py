"""The Litestar application: its routes and its error handlers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from litestar import Litestar

from app.server import exceptions
from app.server.routes import chat, completions, embeddings, health, models, page, text
from app.server.routes import metrics as metrics_route

if TYPE_CHECKING:
    from app.config import ServeSettings
    from app.observability.metrics import Metrics
    from app.pool.pool import Pool


def create_app(pool: Pool, settings: ServeSettings, metrics: Metrics) -> Litestar:  # noqa: ARG001
    """Return the application. Serve it within an `Edge`, which gives each request its id and its headers."""
    return Litestar(
        route_handlers=[
            chat.handler(pool, metrics),
            completions.handler(pool, metrics),
            *embeddings.handlers(pool, metrics),
            *models.handlers(pool),
            *text.handlers(pool),
            *health.handlers(pool),
            metrics_route.handler(metrics),
            *page.handlers(),
        ],
        exception_handlers=exceptions.HANDLERS,
        openapi_config=None,
        logging_config=None,
        debug=False,  # else the framework's own environment variables decide
        pdb_on_exception=False,
    )
