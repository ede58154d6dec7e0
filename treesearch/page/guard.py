"""Who is answered, and what a browser may do with the answer.

A page of another site that the same browser has open can send requests to this one. It gets nothing: no header lets it
read an answer (no CORS), requests that a browser marks as another site's are refused, and so is a name in `Host` that
was not agreed on (a name of theirs that leads here). Beyond loopback every request needs the token.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Iterable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "treesearch-token"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^:]+))(?::[0-9]+)?", re.ASCII)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone: localhost, 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Middleware around the page.

    Args:
        app: what answers.
        token: needed in the address (once: a cookie holds it from then on); None where loopback is listened on alone.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                kept = [(name, value) for name, value in message["headers"] if name.decode().lower() not in HEADERS]
                message = dict(message) | {"headers": kept + added}
            await send(message)

        answer = self._refusal(scope)
        await (self.app if answer is None else answer)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Any:
        """What is answered in place of the page; None for the page."""
        from starlette.responses import PlainTextResponse, RedirectResponse

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("this page only looks", 405)
        if self.token is None and not is_loopback(_name(headers.get("host", ""))):
            return PlainTextResponse("this page answers to localhost alone", 421)
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not _visit(headers):
            return PlainTextResponse("this page answers no other site", 403)
        if self.token is None:
            return None
        asked = parse_qs(scope["query_string"].decode("latin-1"))
        if _same(self.token, asked.pop("token", [])):
            answer = RedirectResponse(scope["path"] + (f"?{urlencode(asked, doseq=True)}" if asked else ""), 303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict", path="/")
            return answer
        if _same(self.token, _cookies(headers)):
            return None
        return PlainTextResponse("this page needs its token: open the address that `treesearch serve` printed", 401)


def _name(host: str) -> str:
    """The name in a Host header, without its port; empty where it is no name and port."""
    found = _HOST.fullmatch(host)
    return "" if found is None else found[1] or found[2]


def _visit(headers: Mapping[str, str]) -> bool:
    """Whether somebody followed a link here: the page opens, and the other site cannot read it."""
    return headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"


def _same(token: str, given: Iterable[str]) -> bool:
    return any(secrets.compare_digest(token.encode(), one.encode("utf-8", "surrogateescape")) for one in given)


def _cookies(headers: Mapping[str, str]) -> list[str]:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return []
    return [] if found is None else [found.value]
