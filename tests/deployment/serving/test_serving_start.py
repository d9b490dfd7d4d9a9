"""What keeps a server from starting, told at once."""

from __future__ import annotations

import socket

import pytest

from luthier.deployment.serving.run import serve
from luthier.errors import UserError


def test_what_cannot_be_served_is_told(tiny_model_dir, terse_model_dir, adapters, monkeypatch):
    monkeypatch.setenv("EMPTY_KEY", " ")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wrong = [
            ({"path": "/nowhere"}, "no folder"),
            ({"host": "0.0.0.0"}, "other machines"),
            ({"host": "::"}, "other machines"),
            ({"api_key_env": "EMPTY_KEY"}, "EMPTY_KEY"),
            ({"port": port}, "cannot listen"),
            ({"engine": "magic"}, "no engine"),
            ({"kind": "q4_k"}, "q4_k_m"),
            ({"max_model_len": 10**6}, "reads 2,048 tokens"),
            ({"name": "a/b"}, "cannot be a model's name"),
            ({"adapters": {"orders": str(adapters["polite"])}}, "two adapters"),
            ({"path": str(terse_model_dir), "adapters": {"orders": str(adapters["orders"])}}, "it was trained on"),
        ]
        for change, told in wrong:
            with pytest.raises(UserError, match=told):
                serve(**{"path": str(adapters["orders"]), "port": 0} | change)
