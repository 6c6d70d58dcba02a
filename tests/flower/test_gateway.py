"""What the gateway hands on, what it does not, and what it says of it."""

import asyncio
import base64

import httpx
import pytest

from federa.flower import gateway
from federa.flower.certs import make_certificates, node_keys
from federa.flower.gateway import AT_ONCE, KEY, SMALL, STAMP, Once, make_gateway

LIMIT = 100_000


@pytest.fixture()
def ask(tmp_path):
    """Return a function that sends a request to a gateway whose SuperLink is a function."""
    make_certificates(tmp_path, [], 1)
    keys = node_keys(tmp_path / "server")
    app = make_gateway("127.0.0.1:1", tmp_path / "ca.crt", LIMIT, keys.values())

    def send(superlink, path="/v1/fleet/pull-messages", method="POST", key=keys[0], headers=None, **words):
        words["headers"] = {KEY: base64.b64encode(key).decode(), **(headers or {})}

        async def main():
            transport = httpx.MockTransport(superlink)
            inner = httpx.AsyncClient(transport=transport, base_url="https://inner")
            app.state.clients = dict.fromkeys(keys.values(), inner)
            caller = httpx.ASGITransport(app, client=("1.2.3.4", 5))
            async with httpx.AsyncClient(transport=caller, base_url="https://outer") as client:
                return await client.request(method, path, **words)

        return asyncio.run(main())

    return send


@pytest.fixture(autouse=True)
def _nobody_told(monkeypatch):
    monkeypatch.setattr(gateway, "_told", set())


def test_a_flood_of_refusals_is_cut(capsys):
    for number in 2 * list(range(3 * gateway.MOST_REFUSALS)):
        gateway._refused(f"10.0.0.{number}", "no key")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == gateway.MOST_REFUSALS


def said(content=b"", status=200, **headers):
    """An answer whose content is still to come."""
    return httpx.Response(status, stream=httpx.ByteStream(content), headers=headers)


def never(request):
    raise AssertionError("this must not reach the SuperLink")


async def parts(size):
    for _ in range(size // 1000):
        yield bytes(1000)


def test_a_nodes_request_and_its_answer_go_through_unchanged(ask):
    seen = []

    def superlink(request):
        seen.append((request.method, request.url.path, request.read(), request.headers))
        return said(b"y" * 50_000, answer="b")

    answer = ask(superlink, content=b"x" * 60_000, headers={"x-signature": "a"})
    ((method, path, body, headers),) = seen
    assert (method, path, body, headers["x-signature"]) == (
        "POST",
        "/v1/fleet/pull-messages",
        b"x" * 60_000,
        "a",
    )
    assert headers["host"] == "inner"
    assert (answer.status_code, answer.content, answer.headers["answer"]) == (200, b"y" * 50_000, "b")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/docs",
        "/",
        "/v1/fleet/a/b",
        "/v1/fleet/../control/x",
    ],
)
def test_other_paths_are_not_there(ask, path):
    assert ask(never, path).status_code == 404


def test_other_ways_to_ask_are_refused(ask):
    assert ask(never, method="GET").status_code == 405


@pytest.mark.parametrize("body", [b"x" * (LIMIT + 1), "parts"], ids=["by its length", "by its parts"])
def test_what_is_too_long_is_refused_and_said(ask, body, capsys):
    read = []

    def superlink(request):
        read.append(len(request.read()))
        return said()

    content = parts(2 * LIMIT) if body == "parts" else body
    assert ask(superlink, content=content).status_code == 413
    assert not read
    assert f"refused 1.2.3.4: a request longer than {LIMIT} bytes" in capsys.readouterr().out


def test_what_is_just_short_enough_is_not(ask):
    def superlink(request):
        return said(str(len(request.read())).encode())

    assert ask(superlink, content=b"x" * LIMIT).text == str(LIMIT)
    assert ask(superlink, content=parts(LIMIT)).text == str(LIMIT)


def test_a_wrong_signature_is_told_and_said(ask, capsys):
    answer = ask(lambda request: said(b"no", 401), content=b"x")
    assert (answer.status_code, answer.content) == (401, b"no")
    assert "refused 1.2.3.4: its signature is not that of its key" in capsys.readouterr().out


def test_what_was_signed_once_is_taken_once(ask, capsys):
    """The SuperLink itself takes it for five minutes."""
    first, second = ({STAMP: f"2026-01-01T00:00:0{number}+00:00"} for number in (1, 2))
    assert ask(lambda request: said(), headers=first, content=b"x").status_code == 200
    assert ask(never, headers=first, content=b"y").status_code == 401
    assert ask(lambda request: said(), headers=second, content=b"x").status_code == 200
    assert "refused 1.2.3.4: what it says was said before" in capsys.readouterr().out


@pytest.mark.parametrize("status", [400, 401])
def test_what_was_not_signed_by_its_key_takes_no_memory(ask, status):
    """A body that cannot be read is refused before the signature is looked at."""
    stamp = {STAMP: "2026-01-01T00:00:01+00:00"}
    for _ in range(2):
        assert ask(lambda request: said(status=status), headers=stamp, content=b"x").status_code == status
    assert ask(lambda request: said(), headers=stamp, content=b"x").status_code == 200


def test_what_is_too_old_to_be_taken_is_forgotten(monkeypatch):
    once = Once()
    assert once.take(b"key", "1") and once.take(b"other", "1") and not once.take(b"key", "1")
    monkeypatch.setattr(gateway, "REMEMBERED", -1.0)
    assert once.take(b"key", "2") and len(once._seen) == 1


@pytest.mark.parametrize("key", [b"", b"-----BEGIN PUBLIC KEY-----"])
def test_an_unknown_key_does_not_reach_the_superlink(ask, key, capsys):
    assert ask(never, key=key, content=b"x").status_code == 401
    assert "refused 1.2.3.4: it has no key of a node of this federation" in capsys.readouterr().out


def test_a_header_that_is_no_key_is_refused(ask):
    assert ask(never, headers={KEY: "*"}, content=b"x").status_code == 401


def test_a_superlink_that_is_gone_is_503(ask):
    def superlink(request):
        raise httpx.ConnectError("gone")

    assert ask(superlink, content=b"x").status_code == 503


@pytest.mark.parametrize(("size", "most"), [(10, AT_ONCE), (SMALL + 1, 10)], ids=["small", "long"])
def test_few_small_requests_are_at_the_superlink_at_a_time(tmp_path, size, most):
    """So a crowd of nodes keeps neither the server nor each other waiting for long."""
    make_certificates(tmp_path, [], 1)
    (key,) = node_keys(tmp_path / "server").values()
    app = make_gateway("127.0.0.1:1", tmp_path / "ca.crt", LIMIT, [key])
    inside = seen = 0

    async def superlink(request):
        nonlocal inside, seen
        inside += 1
        seen = max(seen, inside)
        await request.aread()
        await asyncio.sleep(0.01)
        inside -= 1
        return said()

    async def main():
        inner = httpx.AsyncClient(transport=httpx.MockTransport(superlink), base_url="https://inner")
        app.state.clients = {key: inner}
        headers = {KEY: base64.b64encode(key).decode()}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://x") as client:
            calls = [client.post("/v1/fleet/a", content=b"x" * size, headers=headers) for _ in range(10)]
            return [answer.status_code for answer in await asyncio.gather(*calls)]

    assert asyncio.run(main()) == [200] * 10
    assert seen == most
