"""What Prometheus is told."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_PATHS = (
    "/health",
    "/metrics",
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "luthier_requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "luthier_request_seconds",
            "Until a response is ready; of a stream, until it begins.",
            ["path"],
            registry=self._registry,
        )
        self._tokens = Counter("luthier_tokens", "Tokens read and written.", ["kind"], registry=self._registry)
        self._gone = Counter("luthier_clients_gone", "Clients that left before their answer.", registry=self._registry)
        self._writing = Gauge("luthier_answers_writing", "Answers that are written or wait.", registry=self._registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request got its response. Names in a path are a client's: they make no series of their own."""
        known = path if path in _PATHS else "/v1/models/" if path.startswith("/v1/models/") else "other"
        self._requests.labels(known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def wrote(self, usage: dict[str, int]) -> None:
        """An answer has ended."""
        self._tokens.labels("prompt").inc(usage["prompt_tokens"])
        self._tokens.labels("completion").inc(usage["completion_tokens"])

    def gone(self) -> None:
        """A client has left."""
        self._gone.inc()

    def exposed(self, writing: int) -> tuple[bytes, str]:
        """The text, and its media type."""
        self._writing.set(writing)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
