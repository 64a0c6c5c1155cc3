"""A Hugging Face Hub of a few files on this machine, for tests of what is fetched."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants


@dataclass
class LoopbackHub:
    """What it serves, and what it was asked for.

    Attributes:
        files: content by 'owner/name@revision/file'.
        gated: repositories that refuse.
        cut: repositories whose files break off in the middle.
        asked: method and place of each request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            owner, name, _, revision, file = self.path.split("?")[0].lstrip("/").split("/", 4)
            repository = f"{owner}/{name}"
            place = f"{repository}@{revision}/{file}"
            hub.asked.append(f"{self.command} {place}")
            if repository in hub.gated:
                return self._refuse(403, "GatedRepo")
            if place not in hub.files:
                return self._refuse(404, "EntryNotFound")
            content = hub.files[place]
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", revision)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) // 2] if repository in hub.cut else content)
                self.close_connection = repository in hub.cut
            return None

        def _refuse(self, code: int, error: str) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@contextmanager
def served(hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve it in place of the Hub, with empty caches; the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        use(address, cache, monkeypatch)
        yield address
        server.shutdown()


def use(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the Hub to be at an address: what HF_ENDPOINT and HF_HOME do in a process that begins."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
