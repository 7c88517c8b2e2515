"""GET /metrics, for Prometheus."""

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from app.observability.metrics import CONTENT_TYPE, Metrics


def handler(metrics: Metrics) -> HTTPRouteHandler:
    """Return the route."""

    @get("/metrics", sync_to_thread=False)
    def scrape() -> Response[bytes]:
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE, "cache-control": "no-store"})

    return scrape
