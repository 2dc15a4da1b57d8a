"""An engine over HTTP: exact scores of chosen tokens, and other weights; `scripts/serve_vllm.py` starts it.

GET /info gives {"model", "vocabulary"}. POST /score takes {"prefixes": [[id, ...], ...], "tokens": [[id, ...], ...]}
and gives {"log_probs": [[float, ...], ...]}, over the full vocabulary. POST /weights takes a safetensors file with the
names of the checkpoint. Requests are answered one after the other.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from minionerec.engines.prefix_scorer import PrefixEngine, find_memory_folder


class EngineServer(HTTPServer):
    """An HTTP server around an engine.

    Args:
        address: host and port to listen on.
        engine: what answers.
        model: what the engine was started with.
    """

    def __init__(self, address: tuple[str, int], engine: PrefixEngine, model: str):
        super().__init__(address, _Handler)
        self.engine, self.model = engine, model


class _Handler(BaseHTTPRequestHandler):
    server: EngineServer

    def do_GET(self) -> None:
        """GET /info."""
        if self.path != "/info":
            return self._answer({"error": f"{self.path}: expected /info, /score or /weights"}, 404)
        return self._answer({"model": self.server.model, "vocabulary": self.server.engine.vocabulary})

    def do_POST(self) -> None:
        """POST /score and /weights."""
        length = int(self.headers.get("Content-Length", 0))
        try:
            if self.path == "/score":
                asked = json.loads(self.rfile.read(length))
                self._answer({"log_probs": self.server.engine.score_tokens(asked["prefixes"], asked["tokens"])})
            elif self.path == "/weights":
                self._load_weights(length)
                self._answer({})
            else:
                self._answer({"error": f"{self.path}: expected /info, /score or /weights"}, 404)
        except Exception as error:  # the client is told, and the server goes on
            self._answer({"error": f"{type(error).__name__}: {error}"}, 400)

    def _load_weights(self, length: int) -> None:
        """Write the body to a file and let the engine load it."""
        with tempfile.NamedTemporaryFile(suffix=".safetensors", dir=find_memory_folder()) as file:
            shutil.copyfileobj(_Limited(self.rfile, length), file)
            file.flush()
            if os.path.getsize(file.name) != length:
                raise ValueError(f"expected {length} bytes of weights")
            self.server.engine.load_file(file.name)

    def _answer(self, content: Any, status: int = 200) -> None:
        body = (json.dumps(content) if status == 200 else content["error"]).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """No line for every request."""


class _Limited:
    """The first bytes of a stream, as a file that ends."""

    def __init__(self, stream: Any, length: int):
        self.stream, self.left = stream, length

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        part = self.stream.read(min(size, self.left))
        self.left -= len(part)
        return part
