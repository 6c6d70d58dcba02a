"""The warm worker of a node: frames, who may speak to it, and that there is one as long as its node lives."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest

import federa
from federa.errors import FederaError
from federa.flower import local, warm, worker
from federa.flower.app_folder import APP, write_app
from federa.flower.warm import ANSWER, CHANGED, HERE, OK, REQUEST, TAKEN, Owned, Worker

STUB = """
import os, signal, sys, time
from federa.errors import FederaError
from federa.flower import worker

class Echo:
    def answer(self, header, tensors):
        if header == b"die":
            os.kill(os.getpid(), signal.SIGKILL)
        return header[::-1], tensors + str(os.getpid()).encode()

def load_node(owned, folder):
    time.sleep(0.5)  # as one with a model would; two that start at once would meet
    if owned.client == 13:
        raise FederaError("task: no such thing")
    return Echo()

worker.load_node = load_node
worker.main()
"""


def gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{process}/stat") as file:  # nobody has to wait for it
        return file.read().rpartition(")")[2].split()[0] == "Z"


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)


@pytest.fixture()
def runtime(tmp_path, monkeypatch):
    """A folder for sockets of the test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture()
def keeper():
    """A process that a worker ends with."""
    process = subprocess.Popen(["sleep", "120"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture()
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 1\n")
    return path


@pytest.fixture()
def node(runtime, keeper, recipe_file, tmp_path, monkeypatch):
    """Return a function that makes a node's worker, as every message does, with a model that is none."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setattr(warm, "PROGRAM", (sys.executable, "-P", str(stub)))
    return lambda **said: Worker.of_node(Owned.of({"recipe": str(recipe_file), **said}), 77, keeper.pid)


def starts(node):
    return node.log.read_text().count("starts with")


def test_frames_come_as_they_were_sent():
    one, other = socket.socketpair()
    with one, other:
        local.send(one, (b"", b"header", bytes(3 << 10)), (4, 10, 1 << 20))
        assert local.receive(other, (4, 10, 1 << 20)) == [b"", b"header", bytes(3 << 10)]


def test_a_frame_that_is_too_long_is_neither_sent_nor_read():
    one, other = socket.socketpair()
    with one, other:
        with pytest.raises(FederaError, match="a part of 11 bytes, more than 10"):
            local.send(one, (b"good", b"x" * 11), (10, 10))
        one.sendall(struct.pack("!Q", 1 << 62))
        with pytest.raises(FederaError, match="more than 10"):
            local.receive(other, (10, 10))


@pytest.mark.parametrize(
    "sent", [b"", b"\0\0\0", struct.pack("!Q", 5) + b"four", struct.pack("!Q", 2) + b"ok"]
)
def test_a_frame_that_ends_early_is_no_frame(sent):
    one, other = socket.socketpair()
    with one, other:
        one.sendall(sent)
        one.close()
        with pytest.raises(ConnectionError, match="it ended after"):
            local.receive(other, (10, 10))


def test_sockets_lie_where_nobody_else_can_enter(runtime, monkeypatch):
    folder = local.private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700 and local.private_folder() == folder
    folder.chmod(0o750)
    with pytest.raises(FederaError, match="others may enter it"):
        local.private_folder()
    folder.rmdir()
    (runtime / "mine").mkdir(mode=0o700)
    folder.symlink_to(runtime / "mine")
    with pytest.raises(FederaError, match="others may enter it"):
        local.private_folder()


@pytest.fixture()
def answering(tmp_path):
    """A worker's loop in a thread, and a function that speaks to it."""
    path = tmp_path / "a.sock"
    listener = worker.listen(path)

    def answer(header, tensors):
        return header[::-1], tensors

    thread = threading.Thread(target=worker.answer_all, args=(listener, b"own", answer))
    thread.start()

    def speak(*frames, raw=b""):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(path))
            assert local.receive(connection, TAKEN) == [HERE]
            if raw:
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
            else:
                local.send(connection, frames, REQUEST)
            return local.receive(connection, ANSWER)

    yield speak
    if thread.is_alive():
        with contextlib.suppress(ConnectionRefusedError):  # it is about to end, and hears no more
            speak(b"other", b"", b"")
    thread.join(10)
    assert not thread.is_alive()


def test_a_worker_survives_what_is_no_message(answering, capsys):
    for raw in (b"\0" * 3, struct.pack("!Q", 1 << 40), struct.pack("!Q", 3) + b"own" + struct.pack("!Q", 9)):
        with pytest.raises(OSError):
            answering(raw=raw)
    assert capsys.readouterr().out.count("a message was lost") == 3
    assert answering(b"own", b"abc", b"xyz") == [OK, b"cba", b"xyz"]


def test_a_worker_ends_when_its_owner_says_something_else(answering):
    assert answering(b"other", b"abc", b"xyz") == [CHANGED, b"", b""]
    with pytest.raises(OSError):
        answering(b"own", b"abc", b"xyz")


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="Linux alone tells whose a process is")
def test_another_users_process_is_not_spoken_to(answering, monkeypatch, capsys):
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(OSError):
        answering(b"own", b"abc", b"xyz")
    assert f"a process of user {own} at the socket of user {own + 1}" in capsys.readouterr().out
    monkeypatch.undo()
    assert answering(b"own", b"abc", b"") == [OK, b"cba", b""]


def test_messages_at_once_start_one_worker(node):
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: node().ask(b"m%d" % n, b""), range(6)))
    assert [header for header, _ in answers] == [b"%dm" % n for n in range(6)]
    assert len({tensors for _, tensors in answers}) == 1 and starts(node()) == 1


def test_a_worker_whose_starter_dies_is_the_one_that_is_found(node):
    own = node()
    with own._lock() as lock:
        own._start(lock)  # and no more: killed here
    assert own.ask(b"abc", b"")[0] == b"cba"
    assert starts(own) == 1


def test_a_worker_that_dies_at_work_is_a_line_and_the_next_message_starts_another(node):
    first = node().ask(b"a", b"")[1]
    with pytest.raises(FederaError, match=r"the worker has ended .*worker\.log"):
        node().ask(b"die", b"")
    second = node().ask(b"a", b"")[1]
    os.kill(int(second), signal.SIGKILL)
    until(lambda: gone(int(second)))
    third = node().ask(b"a", b"")[1]
    assert len({first, second, third}) == 3 and starts(node()) == 3


def test_a_worker_that_does_not_start_says_why_and_where_more_is(node):
    with pytest.raises(
        FederaError, match=r"does not start: federa: task: no such thing \(all of it: /.*worker\.log\)"
    ):
        node(client=13).ask(b"a", b"")
    assert node(client=1).ask(b"a", b"")[0] == b"a"


def test_a_changed_recipe_has_a_worker_of_its_own(node, recipe_file):
    before = int(node().ask(b"a", b"")[1])
    assert int(node().ask(b"a", b"")[1]) == before
    recipe_file.write_text("seed: 2\n")
    after = int(node().ask(b"a", b"")[1])
    assert after != before
    until(lambda: gone(before))
    assert int(node().ask(b"a", b"")[1]) == after


def test_a_worker_ends_with_its_keeper_and_leaves_nothing(node, keeper):
    own = node()
    process = int(own.ask(b"a", b"")[1])
    assert not gone(process)
    keeper.kill()  # nobody has waited for it yet: it is gone all the same
    until(lambda: gone(process))
    assert not own.folder.exists()
    with pytest.raises(FederaError):  # the keeper's number stands for nobody now
        keeper.wait()
        node().ask(b"a", b"")


@pytest.mark.parametrize(
    "said, words",
    [
        ({}, "say which recipe"),
        ({"recipe": ""}, "say which recipe"),
        ({"recipe": 3}, "recipe=3 is no str"),
        ({"recipe": "/nowhere/recipe.yaml"}, "/nowhere/recipe.yaml cannot be read"),
        ({"recipe": "r", "client": "0"}, "client='0' is no int"),
        ({"recipe": "r", "client": True}, "client=True is no int"),
        ({"recipe": "r", "train": 1}, "train=1 is no str"),
    ],
)
def test_a_node_config_that_cannot_be_is_a_line(said, words):
    with pytest.raises(FederaError, match=words):
        Owned.of(said)


def test_a_node_works_with_what_its_owner_says_whatever_the_run_says(
    recipe_file, runtime, monkeypatch, capsys
):
    from flwr.app import ConfigRecord, Context, Message, RecordDict

    from federa.flower import app

    asked = []
    monkeypatch.setattr(app, "_keeper", lambda: 4242)
    monkeypatch.setattr(Worker, "ask", lambda self, *message: asked.append((self, message)) or (b"{}", b""))
    monkeypatch.setattr(app, "Message", lambda content, reply_to: content)
    content = RecordDict(
        {
            "header": ConfigRecord({"json": b"{}", "recipe": "/evil.yaml"}),
            "train": ConfigRecord({"train": "/etc/passwd"}),
        }
    )
    message = type("Said", (), {"content": content})()
    evil = {"recipe": "/evil.yaml", "train": "/etc/passwd", "client": 5, "state": "/evil", "plugins": "evil"}

    def context(**node_config):
        return Context(run_id=1, node_id=9, node_config=node_config, state=RecordDict(), run_config=evil)

    app.answer(message, context(recipe=str(recipe_file), train="mine.parquet", client=2))
    ((of, said),) = asked
    assert (of.owned.recipe, of.owned.train, of.owned.client, of.owned.state) == (
        str(recipe_file),
        "mine.parquet",
        2,
        None,
    )
    assert of.keeper == 4242 and said == (b"{}", b"")

    error = app.answer(message, context(train="mine.parquet"))
    assert len(asked) == 1 and error.code == 2 and "log" in error.reason and "recipe" not in error.reason
    assert capsys.readouterr().err.startswith("federa: --node-config: say which recipe")
    assert isinstance(Message, type)


def test_a_process_that_no_supernode_has_started_starts_nothing(monkeypatch):
    from federa.flower import app

    with pytest.raises(FederaError, match="SuperNode of this process has ended"):
        app._keeper()


def test_what_is_started_for_each_message_loads_no_model():
    code = "import sys, federa.flower.app\nprint(*{'torch', 'transformers', 'datasets', 'sklearn'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_public_names_are_the_functions_whatever_is_imported_first_and_little_is():
    code = """
import sys
import federa, federa.progress, federa.flower.serve, federa.flower.join
assert not {'matplotlib', 'sklearn'} & {*sys.modules}, 'a second of every start'
assert federa.__version__ and set(federa.__all__) <= set(dir(federa))
import federa.run, federa.export
from federa.run import Observer
assert federa.run.__module__ == 'federa.run' and callable(federa.run) and callable(federa.export)
assert federa.Observer is Observer
from federa import *
assert [name for name in federa.__all__ if name not in globals()] == []
try:
    federa.nothing
except AttributeError as error:
    assert 'nothing' in str(error)
else:
    raise SystemExit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert federa.FederaError is FederaError


def test_of_the_apps_folder_nothing_travels_but_what_says_that_federa_is_installed(tmp_path):
    from flwr.cli.build import build_fab_from_disk

    folder = tmp_path / "app"
    write_app(folder)
    write_app(folder)  # once more is no harm
    (folder / "mine.jsonl").write_text("{}")
    (folder / "evil.py").write_text("import os")
    with zipfile.ZipFile(BytesIO(build_fab_from_disk(folder))) as fab:
        assert sorted(fab.namelist()) == [".info/CONTENT", "pyproject.toml"]
    (folder / "pyproject.toml").write_text("[project]")
    with pytest.raises(FederaError, match="is there already"):
        write_app(folder)
    assert list(APP) == ["pyproject.toml"]


def test_a_runs_configuration_that_cannot_be_is_a_line(tmp_path):
    from federa.flower.plain import patience_of, serve_on

    usual = {"wait": 0.0, "deadline": 3600.0, "short": "wait", "ask-again": 60}
    patience = patience_of(usual)
    assert patience.start is None and patience.round == 3600 and patience.ask_again == 60
    assert patience.nodes is None and patience_of({**usual, "min-nodes": 2}).nodes == 2
    wrong = ({"wait": -1.0}, {"deadline": float("nan")}, {"short": "now"}, {"ask-again": True})
    for change in (*wrong, {"min-nodes": "two"}):
        with pytest.raises(FederaError, match=next(iter(change))):
            patience_of({**usual, **change})
    (tmp_path / "r.yaml").write_text("rounds: 1\n")
    whole = {"recipe": str(tmp_path / "r.yaml"), "out": str(tmp_path / "out"), "clients": 2, **usual}
    for change, words in (
        ({"recipe": "r.yaml"}, "recipe: give a whole path"),
        ({"out": ""}, "out: give a whole path"),
        ({"clients": 0}, "clients: say how many"),
        ({"out": str(tmp_path)}, "is there already"),
    ):
        with pytest.raises(FederaError, match=words):
            serve_on(None, {**whole, **change})
