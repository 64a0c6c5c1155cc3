"""Downloads, served from loopback."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from smkd.errors import DataError
from smkd.prepare.registry import Download
from smkd.prepare.run import fetch_file

CONTENT = bytes(range(256)) * 4000


@dataclass
class Server:
    """What the server does, and the Range headers it was sent."""

    url: str = ""
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which each of the first connections is cut."""
    ranges: bool = True
    failures: int = 0
    """Answers of 503 before the file comes."""
    asked: list[str | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, server: Server, *args: object) -> None:
        self.state = server
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        state = self.state
        state.asked.append(self.headers.get("Range"))
        if self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path != "/file":
            self.send_error(404)
        elif state.failures:
            state.failures -= 1
            self.send_error(503)
        else:
            self.send_file(state)

    def send_file(self, state: Server) -> None:
        start = 0
        if state.ranges and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(match[1])
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = start + state.cut_after.pop(0) if state.cut_after else len(CONTENT)
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    state = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, state))
    state.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def download(server: Server, path: str = "/file", content: bytes = CONTENT) -> Download:
    digest = hashlib.md5(content).hexdigest()
    return Download(server.url + path, "archive.tar.gz", f"md5:{digest}", "https://example.org/by-hand")


def get(download: Download, folder: Path, seen: list[tuple[int, int | None]] | None = None) -> Path:
    seen = [] if seen is None else seen
    return fetch_file(download, folder, lambda done, total: seen.append((done, total)), pause=0.001)


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = get(download(server), tmp_path / "new" / "folder", seen)
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert get(download(server), path.parent) == path
    assert server.asked == [None]
    assert [entry.name for entry in path.parent.iterdir()] == ["archive.tar.gz"]


def test_cut_connections_go_on_by_range(server: Server, tmp_path: Path) -> None:
    server.cut_after = [300_000, 1, 200_000]
    assert get(download(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=300001-", "bytes=500001-"]


def test_a_later_call_goes_on(server: Server, tmp_path: Path) -> None:
    (tmp_path / "archive.tar.gz.part").write_bytes(CONTENT[:1000])
    assert get(download(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut_after = False, [300_000]
    assert get(download(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-"]


def test_a_part_that_is_too_long_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "archive.tar.gz.part").write_bytes(CONTENT + b"more")
    assert get(download(server), tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.failures = 2
    assert get(download(server), tmp_path).read_bytes() == CONTENT


def test_a_dead_server_is_given_up(server: Server, tmp_path: Path) -> None:
    server.failures = 99
    with pytest.raises(DataError, match=r"503 Service Unavailable, 5 times in a row; fetch 'archive\.tar\.gz' by hand"):
        get(download(server), tmp_path)
    nowhere = Download("http://127.0.0.1:9/x", "x", "md5:0", "https://example.org/by-hand")
    with pytest.raises(DataError, match=r"cannot download http://127\.0\.0\.1:9/x: .*refused.*, 5 times in a row"):
        get(nowhere, tmp_path)


def test_a_wrong_checksum_is_refused_and_the_file_kept_aside(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has MD5 \w+, expected \w+; it is kept as '.*archive\.tar\.gz\.wrong'; try"):
        get(download(server, content=b"other"), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["archive.tar.gz.wrong"]
    assert (tmp_path / "archive.tar.gz.wrong").read_bytes() == CONTENT
    (tmp_path / "archive.tar.gz").write_bytes(b"damaged")  # also one that lies there already
    with pytest.raises(DataError, match="has MD5"):
        get(download(server), tmp_path)
    assert get(download(server), tmp_path).read_bytes() == CONTENT


def test_a_redirect_loop_ends(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"/loop: the server redirects without end; fetch .* https://example\.org/by-hand"
    ):
        get(download(server, "/loop"), tmp_path)
    assert len(server.asked) < 20


def test_not_found_says_where_to_fetch_by_hand(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"404 Not Found; fetch .* from https://example\.org/by-hand and give it with"):
        get(download(server, "/gone"), tmp_path)
    assert server.asked == [None]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_told_from_a_cut_connection(server: Server, tmp_path: Path) -> None:
    (tmp_path / "archive.tar.gz.part").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"cannot write '.*': No space left on device; the same command goes on"):
        get(download(server), tmp_path)
    assert server.asked == [None]
