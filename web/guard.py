"""Who may ask: the page itself and programs on this computer, but no other web site.

Every site that is open in a browser can send requests to a server on the same computer. One that
comes under a name of its own (DNS rebinding) shows by the Host header, one that posts from its own
page by the Origin header, and a form by its content type.
"""

from __future__ import annotations

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.refusals import refusal

MAX_BODY = 2**18  # bytes; many times what fits into a context
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # or a browser would keep an older page
}
TOO_LARGE = f"the request is too large: more than {MAX_BODY // 1024} KiB; say it shorter"


class Guard:
    """Stands before an app that listens on a port of the loopback interface."""

    def __init__(self, app: ASGIApp, port: int):
        self.app = app
        names = ("127.0.0.1", "localhost", "[::1]")
        self.hosts = {f"{name}:{port}" for name in names}
        if port == 80:  # then browsers leave it out
            self.hosts |= set(names)
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = self._refuse(scope["method"], Headers(scope=scope))
        app = refused if refused is not None else self.app
        await app(scope, limited(receive), send_guarded)

    def _refuse(self, method: str, headers: Headers) -> ASGIApp | None:
        """What to answer instead of the app; None lets the request through."""
        if headers.get("host") not in self.hosts:
            return refusal(403, "this server answers under its own address only")
        if "origin" in headers and headers["origin"] not in self.origins:
            return refusal(403, "this server answers no other web site")
        if method == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return refusal(415, "send JSON, as Content-Type: application/json")
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > MAX_BODY:
                return refusal(413, TOO_LARGE)
        return None


def limited(receive: Receive) -> Receive:
    """`receive`, of a body that may not become larger than MAX_BODY."""
    left = MAX_BODY

    async def receive_limited() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, TOO_LARGE)
        return message

    return receive_limited
