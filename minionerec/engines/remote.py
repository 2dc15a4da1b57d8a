"""An engine that another process serves over HTTP, `python -m scripts.serve_vllm`."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minionerec.common.files import InputError
from minionerec.engines.prefix_scorer import PrefixEngine

PATIENCE = 600  # seconds for an answer


class RemoteEngine(PrefixEngine):
    """A `PrefixEngine` behind a URL, which any number of training processes may share.

    Args:
        url: where the server listens.
        flag: the flag that gave it, for errors.

    Raises:
        InputError: nobody answers there, or something else does.
    """

    def __init__(self, url: str, flag: str = "--vllm_server_base_url"):
        self.url, self.flag = url.rstrip("/"), flag
        try:
            self.vocabulary = int(self._ask("/info")["vocabulary"])
        except (KeyError, TypeError):
            raise InputError(f"{flag} {url}: another server; expected python -m scripts.serve_vllm") from None

    def _ask(self, path: str, body: Any = None, size: int | None = None) -> Any:
        """The answer to a request; with a body, which may be an open file of `size` bytes, it is a POST."""
        headers = {"Content-Type": "application/octet-stream"}
        headers |= {"Content-Length": str(size)} if size is not None else {}
        try:
            request = urllib.request.Request(self.url + path, data=body, headers=headers)
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace").strip() or error.reason
            raise InputError(f"{self.flag} {self.url}: {reason.splitlines()[0]}") from None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.flag} {self.url}: no answer ({error}); python -m scripts.serve_vllm starts a server"
            ) from None

    def score_tokens(self, prefixes: Sequence[list[int]], tokens: Sequence[list[int]]) -> list[list[float]]:
        body = json.dumps({"prefixes": list(prefixes), "tokens": list(tokens)}).encode()
        return self._ask("/score", body)["log_probs"]

    def load_file(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            self._ask("/weights", file, os.path.getsize(path))
