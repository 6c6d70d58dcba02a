"""The clock beside real rounds: off by too much, the benchmark fails."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "shaped_links.py"


@pytest.fixture()
def links(monkeypatch, tmp_path):
    """Return a function that runs the benchmark with federations whose rounds take what is given."""
    spec = importlib.util.spec_from_file_location("shaped_links", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "shaped_links", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "split", lambda config, to: None)
    monkeypatch.setattr(module, "federation", lambda out, *_: out.name)
    monkeypatch.setattr(sys, "argv", ["shaped_links", "--out", str(tmp_path / "out")])

    def measure(told, took):
        monkeypatch.setattr(module, "foretold", lambda run, _: {"free": [1.0, 1.0], "shaped": told}[run])
        monkeypatch.setattr(module, "seconds", lambda run: {"free": [3.0, 3.0], "shaped": took}[run])
        module.main()

    return measure


def test_a_clock_that_is_right_over_the_rounds_is_enough(links, capsys):
    links([10.0, 10.0], [7.0, 14.5])
    assert "1.075 of what was foretold" in capsys.readouterr().out


@pytest.mark.parametrize("took", [[11.0, 11.2], [9.0, 8.8]])
def test_a_clock_that_is_off_by_more_than_a_tenth_is_not(links, took, tmp_path):
    with pytest.raises(SystemExit, match="more than 10% from what was foretold"):
        links([10.0, 10.0], took)
    assert (tmp_path / "out" / "shaped_links.json").is_file()
