"""How a run shows itself: units, one line a round, JSON lines, the table at the end."""

import io
import json

import pytest
from rich.console import Console
from rich.table import Table

from federa.progress import (
    Bar,
    JsonLines,
    console,
    partition_table,
    readable_bytes,
    readable_seconds,
    result_table,
)
from federa.run import Result
from federa.types import Job, ServerState, Update
from running import build, configure

RECORD = {
    "round": 2, "loss": 1.23456, "accuracy": 0.5, "clients": 2, "rejected": 0, "verdicts": {"1": "ok", "4": "ok"},
    "examples": 10, "bytes_up": 1_200_000, "bytes_down": 800_000, "seconds_train": 1.0, "seconds_round": 61.0,
}  # fmt: skip
SUMMARY = {
    "metric": "accuracy", "head": "train", "final": 0.9, "best": 0.95, "best_round": 3, "rounds": 4,
    "trainable_parameters": 1_000, "total_parameters": 100_000, "bytes_up": 5_900_000, "bytes_down": 900,
    "per_client": {"mean": 0.8, "p10": 0.6, "worst": 0.5}, "target": None, "seconds_total": 125.0, "seconds_start": {"load": 5.0},
}  # fmt: skip


def printed(thing):
    out = Console(file=io.StringIO(), width=200)
    out.print(thing)
    return out.file.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (5_900_000, "5.9 MB"), (2.5e9, "2.5 GB"), (7e12, "7.0 TB"),
     (7e16, "70000.0 TB")],
)  # fmt: skip
def test_bytes(count, text):
    assert readable_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (125, "2 min 05 s"), (3599, "59 min 59 s"),
     (3600, "1 h 00 min"), (9000, "2 h 30 min")],
)  # fmt: skip
def test_seconds(seconds, text):
    assert readable_seconds(seconds) == text


def test_what_looks_like_markup_is_shown_as_it_is(capsys):
    table = Table("[/x] :smile:")
    console().print("[/x] :smile:")
    console().print(table)
    assert capsys.readouterr().out.count("[/x] :smile:") == 2


def test_json_lines(capsys):
    JsonLines().finished_round(RECORD)
    out = capsys.readouterr().out
    assert json.loads(out) == RECORD and out.count("\n") == 1


def test_a_log_gets_one_line_a_round_and_rejections_are_named(recipe):
    experiment, file = build(recipe), io.StringIO()
    bar = Bar(Console(file=file, soft_wrap=True))
    bar.started(experiment, [])
    bar.updated(Update(Job(1, 0, 0, 0.1), {}, 1.0, {}), 3)
    bar.evaluating(1, 2)
    bar.finished_round(RECORD)
    bar.finished_round({**RECORD, "round": 3, "rejected": 1, "verdicts": {"1": "ok", "4": "not finite"}})
    bar.close()
    start, one, two = file.getvalue().splitlines()
    assert start.startswith("federa on ") and "2,179 trained parameters" in start and "3 a round" in start
    assert one == "round   2/3  loss 1.2346  accuracy 0.5000  2.0 MB  1 min 01 s"
    assert (
        two == "round   3/3  loss 1.2346  accuracy 0.5000  4.0 MB  1 min 01 s  rejected: client 4: not finite"
    )


def test_a_terminal_gets_a_live_bar_that_goes_away(recipe):
    experiment, file = build(recipe), io.StringIO()
    bar = Bar(Console(file=file, force_terminal=True, width=120))
    bar.started(experiment, [{"bytes_up": 0, "bytes_down": 0}])
    bar.updated(Update(Job(2, 0, 0, 0.1), {}, 1.0, {}), 3)
    bar.evaluating(1, 2)
    bar._progress.refresh()
    shown = file.getvalue()
    bar.close()
    bar.close()
    assert "round 2/3" in shown and "client 1/3 evaluating 1/2" in shown


def result(recipe, **changes):
    summary = {**SUMMARY, **changes}
    return Result(configure(recipe, target=0.9), ServerState(4, {}), [], summary)


def test_the_table_at_the_end(recipe):
    text = printed(result_table(result(recipe)))
    assert "0.9000 (best 0.9500)" in text
    assert "mean 0.8000, 10th percentile 0.6000, worst 0.5000" in text
    assert "target 0.9" in text and "not reached" in text
    assert (
        "1,000 (1.00%)" in text
        and "5.9 MB up, 900 B down" in text
        and "2 min 05 s (start: load 5.0 s)" in text
    )
    reached = {"value": 0.9, "round": 3, "seconds": 75.0, "bytes": 2e6}
    text = printed(result_table(result(recipe, target=reached, head="local", per_client=None)))
    assert "round 3, 1 min 15 s, 2.0 MB" in text and "not reached" not in text
    assert "accuracy (mean over clients, each with its own head)" in text and "percentile" not in text


def test_who_holds_what_shows_the_first_few():
    text = printed(partition_table([3, 4] * 10, ["a", "b"], [[1, 2], [4, 0]] * 10))
    assert "... and 8 more clients" in " ".join(text.split())
    rows = [line.split() for line in text.splitlines() if line.split() and line.split()[0].isdigit()]
    assert rows[:2] == [["0", "3", "1", "2"], ["1", "4", "4", "0"]] and len(rows) == 12


def test_consoles_wrap_nothing_in_a_log(capsys):
    console().print("x" * 300)
    console(to_stderr=True).print("y" * 300)
    out, err = capsys.readouterr()
    assert out == "x" * 300 + "\n" and err == "y" * 300 + "\n"
