"""A run over nodes is the simulator's run: the same cohorts, updates, checks and metrics."""

import pytest

from federa.config import parse_config
from federa.run import run
from running import same, steady


@pytest.mark.parametrize("method", ["federa", "lora", "adapter", "bitfit", "ft"])
def test_a_federation_gives_the_simulators_metrics(recipe, federation, tmp_path, method):
    changes = {"method": {"name": method}}
    expected = run(parse_config({**recipe, **changes}))
    _, config, place = federation(**changes)
    found = run(config, tmp_path / "run", place=place)
    assert same(found.state.params, expected.state.params)
    assert steady(found.records) == steady(expected.records)
    assert found.summary["bytes_down"] == expected.summary["bytes_down"]
