"""`serve`: the live page over run folders."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from treesearch.cli.base import Command
from treesearch.errors import UsageError, missing
from treesearch.page.guard import is_loopback
from treesearch.page.server import make_app
from treesearch.report.terminal import say

PORT = 8765


@dataclass(frozen=True, kw_only=True)
class Serve(Command):
    """Show runs in a browser while they grow: the tree, curves, the best samples, the certificate. It only looks."""

    folder: Positional[str] = "runs"
    port: int = PORT
    """0 takes a free one"""
    host: str = "127.0.0.1"
    """address to listen on; beyond this machine the page needs a token, which is printed"""

    def run(self) -> int:
        if not Path(self.folder).is_dir():
            raise UsageError(f"{self.folder} is no folder: name a run, or a folder of runs")
        if not 0 <= self.port < 2**16:
            raise UsageError(f"--port {self.port}: expected 0..65535")
        token = None if is_loopback(self.host) else secrets.token_urlsafe(24)
        app = make_app(self.folder, token)
        try:
            import uvicorn
        except ImportError as error:
            raise missing("uvicorn", "page") from error
        config = uvicorn.Config(
            app, lifespan="off", log_level="critical", server_header=False, timeout_graceful_shutdown=1
        )
        with listen(self.host, self.port) as opened:
            shown = f"[{self.host}]" if ":" in self.host else self.host
            port = opened.getsockname()[1]
            say(f"http://{shown}:{port}/{'' if token is None else f'?token={token}'}\n(Ctrl-C ends it)")
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[opened])
        return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UsageError: the address is none of this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        what = "--port 0 takes a free one" if taken else "--host takes an address of this machine, such as 127.0.0.1"
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}; {what}") from error
