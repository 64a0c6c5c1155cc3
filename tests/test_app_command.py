"""What `smkd app` says when it cannot begin."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from made_images import photographs
from smkd.app.support import START
from smkd.classify import open_encoder
from smkd.cli import classify
from smkd.errors import SmkdError

app = typer.Typer()
app.command()(classify.app)


def refused(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, SmkdError), (result.output, result.exception)
    message = str(result.exception)
    assert "\n" not in message
    return message


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refused("--backbone", "pixels") == "smkd app needs the extra: pip install 'smkd[app]'"


def test_what_cannot_be_served(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra 'app'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused("--backbone", "pixels", "--port", str(port))
    assert line.startswith(f"--host 127.0.0.1 --port {port}: cannot be listened on: ")
    assert "--host 300.1.1.1" in refused("--backbone", "pixels", "--host", "300.1.1.1")
    assert "does not exist" in refused("--backbone", tmp_path / "none.pt", "--port", str(port))
    assert "does not exist" in refused(tmp_path / "none", "--backbone", "pixels", "--port", str(port))
    folder = photographs(tmp_path / "photos", (2, 2))
    (next(folder.iterdir()) / "bad.png").write_text("no image")
    line = refused(folder, "--backbone", "pixels", "--port", str(port))
    assert "bad.png': not an image of a known format" in line
    assert line.startswith(f"class '{next(folder.iterdir()).name}': ")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200), ("[::1]:7860", 200), ("LOCALHOST:7860", 200), ("lab.example.org", 200),
        ("192.168.0.7:7860", 200), ("evil.example.com:7860", 400), ("127.0.0.1.evil.example.com", 400),
        ("localhost@evil.example.com", 400), ("[::1", 400), ("", 400),
    ],
)  # fmt: skip
def test_names_of_other_hosts_are_refused(host: str, status: int) -> None:
    """A page of the internet cannot have its own name point here (DNS rebinding)."""
    pytest.importorskip("gradio", reason="needs the extra 'app'")
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    from smkd.app.serve import KnownHosts, host_names

    page = Starlette(
        routes=[Route("/", lambda _: PlainTextResponse("the page"))],
        middleware=[Middleware(KnownHosts, names=host_names("Lab.example.org"))],
    )
    answer = TestClient(page).get("/", headers={"host": host})
    assert answer.status_code == status
    assert ("the page" in answer.text) == (status == 200)


def test_events_take_turns(tmp_path: Path) -> None:
    """Each reads the state and writes it back, so that two at once would lose photographs."""
    pytest.importorskip("gradio", reason="needs the extra 'app'")
    from smkd.app.page import build_page
    from smkd.classify.choose_features import Reader

    page = build_page(Reader(open_encoder("pixels"), "auto"), START, tmp_path, "")
    turns = {
        event.name: (event.concurrency_id, event.concurrency_limit) for event in page.fns.values() if event.outputs
    }
    assert {"add_class", "show", "press"} <= set(turns)
    assert set(turns.values()) == {("state", 1)}
