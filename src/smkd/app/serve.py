"""Show the page on a port of this machine; it uses no internet, and its files are removed at the end."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from smkd.app.support import START, Support, folder_classes, taken
from smkd.classify.choose_features import Reader
from smkd.errors import ConfigError, DataError
from smkd.progress import shown

LARGEST_UPLOAD = "1gb"


def check_gradio() -> None:
    """Raise `ConfigError` if the extra is not installed."""
    # read when gradio is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError("smkd app needs the extra: pip install 'smkd[app]'") from error


def check_port(host: str, port: int) -> None:
    """Raise `ConfigError` if the address cannot be listened on."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot be listened on: {error.strerror}") from error


class KnownHosts:
    """Middleware that refuses requests whose `Host` header is not a name of this machine.

    Without it a page of the internet could have its own name point to this machine (DNS rebinding), and the browser
    would let it read the answers. An IP address as the host is always right: it needs no name server.

    Args:
        app: the ASGI application that gets all other requests.
        names: of this machine, in lower case.
    """

    def __init__(self, app: Any, names: frozenset[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it with status 400."""
        if scope["type"] in ("http", "websocket") and not self._is_known(scope):
            from starlette.responses import PlainTextResponse

            refusal = PlainTextResponse("this name is not known here; start smkd app with --host NAME", 400)
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_known(self, scope: Any) -> bool:
        given = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
        with contextlib.suppress(ValueError):  # no host, or none that is well formed
            name = urlsplit(f"//{given[0] if len(given) == 1 else ''}").hostname or ""
            if name in self.names:
                return True
            ipaddress.ip_address(name)
            return True
        return False


def host_names(host: str) -> frozenset[str]:
    """The names by which the page may be asked for.

    Args:
        host: the value of `--host`.
    """
    machine = socket.gethostname().lower()
    return frozenset({"localhost", host.lower(), machine, f"{machine}.local"})


def serve(
    reader: Reader, about: str, folder: Path | None, host: str, port: int, open_browser: bool,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Show the page until Ctrl+C or a request to terminate, and remove its files then.

    Requests for a host that is not in `host_names` are refused.

    Args:
        reader: of the backbone of every classifier.
        about: a sentence about it.
        folder: class folders to begin with.
        host, port: address to listen on.
        open_browser: also open the page in the browser.
        say: takes a line for the user.

    Raises:
        DataError: the folder is none of class folders, or an image in it cannot be read.
    """
    # `kill`, `docker stop`: end as Ctrl+C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="smkd-app-") as name:
        place = Path(name)
        os.environ["GRADIO_TEMP_DIR"] = name
        start = START if folder is None else _begun(reader, folder, place)

        from starlette.middleware import Middleware

        from smkd.app.page import CSS, THEME, build_page

        page = build_page(reader, start, place, about)
        say(f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port} (Ctrl+C ends it)")
        page.launch(
            server_name=host, server_port=port, inbrowser=open_browser, share=False, quiet=True, theme=THEME, css=CSS,
            footer_links=["settings"], run_history=False, ssr_mode=False, mcp_server=False,
            max_file_size=LARGEST_UPLOAD, show_error=True,
            app_kwargs={"middleware": [Middleware(KnownHosts, names=host_names(host))]},
        )  # fmt: skip


def _begun(reader: Reader, folder: Path, place: Path) -> Support:
    """Classes of a folder; its images are copied, so that the page may hand them out and nothing else."""
    support = Support()
    for name, paths in folder_classes(folder).files.items():
        inside = Path(tempfile.mkdtemp(dir=place))
        copies = [
            str(shutil.copy(path, inside / f"{number:03}-{Path(path).name}")) for number, path in enumerate(paths)
        ]
        photos, refused = taken(reader.encoder, copies, track=shown)
        if refused:
            raise DataError(f"class '{name}': {refused[0]}")
        support = support.with_class(name, photos)
    return support
