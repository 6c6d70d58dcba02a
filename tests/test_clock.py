"""Runs on a clock: rounds worked out by hand, targets reached and not, and the table."""

import csv
import json

import pytest

from federa import clock, run
from federa.clock import Device, Replay, Spent, replay, time_to_targets
from federa.config import parse_config
from federa.server import make_jobs
from federa.types import FederaError
from running import configure, federa

SLOW = Device(up=1.0, down=4.0, latency=100.0, speed=0.5)


def test_a_transfer_by_hand():
    assert Device(up=8, down=80, latency=0).transfer(up=1e6, down=1e6) == pytest.approx(1.0 + 0.1)
    assert Device(up=8, down=80, latency=25).transfer(up=0, down=0) == pytest.approx(0.05)


def test_a_transfer_of_several_turns():
    assert Device(up=8, down=80, latency=25, turns=5).transfer(up=0, down=0) == pytest.approx(0.25)


def test_idle_seconds_are_a_rounds(recipe, tmp_path):
    run(configure(recipe, rounds=3), tmp_path / "run")
    busy, idle = (replay(tmp_path / "run", Device(idle=seconds)).spent for seconds in (0, 2))
    assert [b.total - a.total for a, b in zip(busy, idle, strict=True)] == pytest.approx([2, 4, 6])
    assert [a.compute for a in busy] == [b.compute for b in idle]
    assert [(a.idle, b.idle) for a, b in zip(busy, idle, strict=True)] == [(0, 2), (0, 4), (0, 6)]


def test_training_is_timed_anew(recipe, tmp_path):
    for method in ("lora", "ft"):
        run(configure(recipe, rounds=1, method__name=method), tmp_path / method)
    found = clock.measure_compute({name: tmp_path / name for name in ("lora", "ft")}, repeats=3)
    assert found.keys() == {"lora", "ft"}
    assert all(1e-5 < seconds < 1 for seconds in found.values())
    one, two = (replay(tmp_path / "lora", SLOW, compute=c).spent[-1].compute for c in (1.0, 2.0))
    assert two == pytest.approx(2 * one)


def test_a_round_lasts_as_long_as_its_slowest_client(recipe, tmp_path):
    config = configure(recipe, rounds=2, method__name="federa")
    result = run(config, tmp_path / "run")
    found = replay(tmp_path / "run", SLOW)
    sizes = json.loads((tmp_path / "run" / "partition.json").read_text())["client_sizes"]
    each = sum(r["seconds_train"] / r["examples"] for r in result.records) / 2
    sent = 4 * result.summary["travelling_parameters"]
    total, met = 0.0, set()
    for number, spent in enumerate(found.spent, 1):
        times = []
        for job in make_jobs(config, number, sizes):
            late = number > 1 and job.client_id not in met
            down = sent + (result.summary["start_bytes"] if late else 0)
            met.add(job.client_id)
            times.append(2 * each * sizes[job.client_id] + 8e-6 * (sent / 1.0 + down / 4.0) + 0.2)
        total += max(times)
        assert spent.total == pytest.approx(total)
        assert spent.compute + spent.transfer == pytest.approx(total)
    assert found.scores == {r["round"]: r["accuracy"] for r in result.records}
    assert found.spent[-1].waiting > 0


def test_steps_bound_what_a_client_trains(recipe, tmp_path):
    few = run(configure(recipe, rounds=1, client__max_steps=1), tmp_path / "few")
    (spent,) = replay(tmp_path / "few", Device(up=1e9, down=1e9, latency=0)).spent
    each = few.records[0]["seconds_train"] / few.records[0]["examples"]
    assert spent.compute == pytest.approx(8 * each), "one batch of eight, whatever the client's size"


def test_an_example_of_several_rows_costs_several(recipe, tmp_path):
    """Questions about long texts are windows: seconds are a window's, and so are what a client trains on."""
    one = run(configure(recipe, rounds=1), tmp_path / "run")
    fast = Device(up=1e9, down=1e9, latency=0)
    (before,) = replay(tmp_path / "run", fast, compute=1.0).spent
    file = tmp_path / "run" / "partition.json"
    held = json.loads(file.read_text())
    assert held["client_rows"] == held["client_sizes"], "a text is a row"
    file.write_text(json.dumps({**held, "client_rows": [3 * rows for rows in held["client_rows"]]}))
    (after,) = replay(tmp_path / "run", fast, compute=1.0).spent
    assert after.compute == 3 * before.compute and one.records[0]["examples"] > 0


def test_a_seed_that_failed_did_not_reach_the_target():
    def plays(method, seed, score):
        return Replay(method, "here", seed, {1: score}, [Spent(10.0, 10.0, 0.0, 0.0, 0.0)])

    runs = [plays("ft", seed, 0.8) for seed in range(3)] + [plays("lora", 0, 0.8)]
    rows = {row["method"]: row for row in time_to_targets(runs, (0.9,))}
    assert (rows["lora"]["reached"], rows["lora"]["seeds"], rows["lora"]["seconds"]) == (1, 3, None)
    with pytest.raises(FederaError, match="no run of ft that learnt anything"):
        time_to_targets([plays("ft", 0, 0.0), plays("lora", 0, 0.0)], (0.9,))


def test_faster_machines_and_links_take_less(recipe, tmp_path):
    run(configure(recipe, rounds=2), tmp_path / "run")
    slow = replay(tmp_path / "run", SLOW).spent[-1]
    for better in (
        Device(2, 4, 100, 0.5),
        Device(1, 8, 100, 0.5),
        Device(1, 4, 50, 0.5),
        Device(1, 4, 100, 1),
    ):
        assert replay(tmp_path / "run", better).spent[-1].total < slow.total


def curve(method, seed, scores, seconds=10.0, setting="s"):
    spent = [
        Spent(n * seconds, n * seconds / 2, n * seconds / 4, n * seconds / 4, n * seconds / 10)
        for n in range(1, len(scores) + 1)
    ]
    return Replay(method, setting, seed, dict(enumerate(scores, 1)), spent)


def test_targets_by_hand():
    runs = [
        curve("ft", 0, [0.5, 0.7, 1.0], 100),
        curve("ft", 1, [0.4, 0.8, 0.8], 100),
        curve("ft", 2, [0.5, 0.6, 0.5], 100),
        curve("lora", 0, [0.6, 0.95, 0.95], 10),  # 0.9 of 1.0 in round 2
        curve("lora", 1, [0.1, 0.1, 0.73], 10),  # 0.9 of 0.8 in round 3
        curve("lora", 2, [0.1, 0.1, 0.1], 10),  # never
        curve("bitfit", 0, [0.1, 0.1, 0.1], 1),
        curve("bitfit", 1, [0.8, 0.1, 0.1], 1),
        curve("bitfit", 2, [0.1, 0.1, 0.1], 1),
    ]
    runs += [curve("federa", seed, [0.9] * 3, 5 + seed) for seed in range(3)]
    ft, lora, bitfit, federa = time_to_targets(runs, [0.9])
    assert (ft["seconds"], ft["rounds"], ft["reached"], ft["reduction"]) == (200, 2, 3, 0)
    assert (lora["seconds"], lora["rounds"], lora["reached"], lora["seeds"]) == (20, 2, 2, 3)
    assert lora["reduction"] == pytest.approx(0.9)
    assert bitfit["reached"] == 1 and bitfit["seconds"] is None and bitfit["reduction"] is None
    assert clock.shown(bitfit)[4:] == [*6 * [""], "not reached", ""]
    assert clock.shown(lora)[5:] == ["20 s", "10 s", "5 s", "5 s", "2 s", "90.0%", "-233.3%"]
    assert clock.headers("ft")[5:10] == ("time", "compute", "transfer", "idle", "waiting")
    assert federa["reduction_others"] == pytest.approx(1 - 6 / 20) and ft["reduction_others"] is None
    assert clock.shown(ft)[-2:] == ["0.0%", ""] and len(clock.shown(bitfit)) == len(clock.headers("ft"))


def test_settings_are_apart_and_a_reference_is_needed():
    runs = [curve("ft", 0, [1.0], 5, "a"), curve("lora", 0, [1.0], 1, "a"), curve("ft", 0, [1.0], 7, "b")]
    assert [(row["setting"], row["method"]) for row in time_to_targets(runs, [0.9])] == [
        ("a", "ft"),
        ("a", "lora"),
        ("b", "ft"),
    ]
    with pytest.raises(FederaError, match="a: no run of bitfit"):
        time_to_targets(runs, [0.9], "bitfit")


def test_the_command_shows_and_writes_a_comparison(recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(parse_config({**recipe, "rounds": 2}).to_yaml())
    words = ("--methods", "lora,ft", "--seeds", 0, "--jobs", 1, "--out", tmp_path / "out")
    assert federa("compare", path, *words) == 0
    capsys.readouterr()
    assert federa("time-to-target", tmp_path / "out", "--up", 1) == 0
    shown = capsys.readouterr().out
    assert "1 Mbit/s up" in shown and "95%" in shown and "idle" in shown and "waiting" in shown
    rows = list(csv.DictReader((tmp_path / "out" / "time_to_target.csv").open()))
    assert {"seconds", *clock.PARTS} <= rows[0].keys()
    assert len(rows) == 2 * len(clock.FRACTIONS)
    assert (tmp_path / "out" / "time_to_target.md").read_text().count("\n") == 2 + len(rows)
    words = ("--device", "phone", "--up", 2, "--idle", 1, "--turns", 5, "--measure")
    assert federa("time-to-target", tmp_path / "out", *words) == 0
    assert "2 Mbit/s up, 50 down, 40 ms; 0.3 times" in capsys.readouterr().out
    later = list(csv.DictReader((tmp_path / "out" / "time_to_target.csv").open()))
    assert all(
        float(b["seconds"]) > float(a["seconds"]) for a, b in zip(rows, later, strict=True) if a["seconds"]
    )
    assert federa("time-to-target", tmp_path / "out", "--up", 0) == 2
    assert federa("time-to-target", tmp_path / "out", "--device", "toaster") == 2
    assert "known: laptop, phone" in capsys.readouterr().err
    assert federa("time-to-target", tmp_path) == 2
    assert "is no comparison" in capsys.readouterr().err
    (tmp_path / "cells.csv").write_text("a,b\n1,2\n")
    assert federa("time-to-target", tmp_path) == 2
    assert "is no comparison's: it has no column status" in capsys.readouterr().err


def test_an_unfinished_run_has_no_time(recipe, tmp_path):
    run(configure(recipe, rounds=1), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(FederaError, match="the run is not finished"):
        replay(tmp_path / "run", SLOW)


def test_the_command_makes_the_runs_of_a_recipe_first(recipe, tmp_path, capsys, monkeypatch):
    """Under its longer name too, and once: later calls find the runs."""
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(parse_config({**recipe, "rounds": 2}).to_yaml())
    words = ["time-to-target", path, "rounds=1", "--methods", "lora,ft", "--seeds", 0, "--out", out]
    assert federa("bench", *words, "--jobs", 1) == 0
    assert "ft's" in capsys.readouterr().out
    assert len(list(csv.DictReader((out / "time_to_target.csv").open()))) == 2 * len(clock.FRACTIONS)
    before = {file: file.stat().st_mtime_ns for file in out.glob("cells/*/*/metrics.jsonl")}
    assert len(before) == 2
    assert federa(*words, "--jobs", 1) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert federa("time-to-target", out, "--methods", "lora") == 2
    assert "--methods: the runs in" in capsys.readouterr().err
    assert federa("time-to-target", tmp_path / "nowhere.yaml") == 2
