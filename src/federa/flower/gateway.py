"""What the world sees of a SuperLink: TLS, and of its HTTP interfaces the nodes' alone.

Flower serves nodes, control and running apps at one port, and control and apps are open to whoever reaches
it: a stranger could start an app of his own on the server. So the SuperLink listens on this machine only, and
this process hands the nodes' requests on, none longer than a limit. Whom it turns away it says in a line,
which `federa serve` tells on.
"""

from __future__ import annotations

import argparse
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

NODES = "/v1/fleet"
REFUSED = "refused"  # how a line about a caller begins
HOP = {
    "host",
    "connection",
    "transfer-encoding",
    "content-length",
    "keep-alive",
    "upgrade",
    "accept-encoding",
}


def _refused(who: str, why: str) -> None:
    print(f"{REFUSED} {who}: {why}", flush=True)


class LoudTLS(ssl.SSLObject):
    """TLS that says why a handshake failed; asyncio keeps it to itself."""

    def do_handshake(self) -> None:
        """See `ssl.SSLObject.do_handshake`."""
        with self._loud():
            super().do_handshake()

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """See `ssl.SSLObject.read`; with TLS 1.3 the caller's refusal comes after the handshake."""
        with self._loud():
            return super().read(len, buffer) if buffer is not None else super().read(len)

    @staticmethod
    @contextmanager
    def _loud() -> Iterator[None]:
        try:
            yield
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            raise
        except ssl.SSLError as error:
            reason = (error.reason or str(error)).replace("_", " ").lower()
            _refused("a caller", f"no TLS with it ({reason})")
            raise


class _TooLongError(Exception):
    """A request's body is longer than the limit."""


async def _body(request: Request, limit: int) -> bytes:
    """Return a request's body; stop reading where it gets too long.

    Raises:
        _TooLongError: it does.
    """
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > limit:
        raise _TooLongError
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > limit:
            raise _TooLongError
    return bytes(parts)


def _who(request: Request) -> str:
    return request.client.host if request.client is not None else "a caller"


def make_gateway(upstream: str, ca: Path, limit: int) -> Starlette:
    """Return the application.

    Args:
        upstream: host and port of the SuperLink, on this machine.
        ca: the certificate that it is signed by.
        limit: of a request's body, in bytes.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        trusted = ssl.create_default_context(cafile=str(ca))
        async with httpx.AsyncClient(base_url=f"https://{upstream}", verify=trusted, timeout=120) as client:
            app.state.client = client
            yield

    async def forward(request: Request) -> Response:
        try:
            body = await _body(request, limit)
        except _TooLongError:
            _refused(_who(request), f"a request longer than {limit} bytes")
            return PlainTextResponse(f"longer than {limit} bytes", 413)
        headers = {name: value for name, value in request.headers.items() if name not in HOP}
        try:
            answer = await request.app.state.client.post(request.url.path, content=body, headers=headers)
        except httpx.HTTPError:
            return PlainTextResponse("the SuperLink is not there", 503)
        if answer.status_code in (401, 403):
            _refused(_who(request), "it has no key of a node of this federation")
        kept = {
            name: value for name, value in answer.headers.items() if name not in {*HOP, "content-encoding"}
        }
        return Response(answer.content, answer.status_code, kept)

    return Starlette(routes=[Route(NODES + "/{name}", forward, methods=["POST"])], lifespan=lifespan)


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="federa-gateway")
    for name in ("host", "upstream", "certificate", "key", "ca"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--limit", type=int, required=True)
    words = parser.parse_args()
    config = uvicorn.Config(
        make_gateway(words.upstream, Path(words.ca), words.limit),
        host=words.host,
        port=words.port,
        ssl_certfile=words.certificate,
        ssl_keyfile=words.key,
        log_level="warning",
        server_header=False,
    )
    config.load()
    assert config.ssl is not None
    config.ssl.sslobject_class = LoudTLS
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
