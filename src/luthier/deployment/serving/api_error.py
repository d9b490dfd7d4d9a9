"""What a client is told when a request is refused."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: HTTP's.
        message: what is wrong, and what to do.
        code: for programs, such as ``model_not_found``.
        param: the field that is wrong.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def to_json(self) -> dict[str, Any]:
        """OpenAI's form of it."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
