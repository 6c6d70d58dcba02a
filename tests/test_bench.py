"""`federa bench`: figures of the right kind, the fastest chosen, and the recipe changed only on request."""

import pytest
import yaml

from federa.bench import Bench, Timing, bench, lines
from federa.config import parse_config
from federa.types import FederaError
from running import federa


@pytest.fixture(scope="module")
def recipe_file(encoder, train_csv, test_csv, tmp_path_factory):
    from small import small_recipe

    path = tmp_path_factory.mktemp("bench") / "recipe.yaml"
    path.write_text(f"# mine\n{yaml.safe_dump(small_recipe(encoder('bert'), train_csv, test_csv))}")
    return path


def test_everything_is_measured_and_written_on_request(recipe_file, capsys):
    assert federa("bench", recipe_file, "--repeats", 1) == 0
    out = capsys.readouterr().out
    before = recipe_file.read_text()
    for word in (
        "GFLOP/s",
        "of the peak",
        "engine serial",
        "engine processes",
        "batch of 8",
        "fastest: client",
    ):
        assert word in out
    assert federa("bench", recipe_file, "--repeats", 1, "--write") == 0
    after = recipe_file.read_text()
    assert after.startswith("# mine")
    assert after != before
    changed = yaml.safe_load(after)
    assert changed["engine"]["name"] in ("serial", "processes")
    assert changed["client"]["precision"] in ("fp32", "bf16")
    parse_config(changed)  # and it is still a recipe


def test_the_fastest_by_median_is_chosen():
    result = Bench(2, "fused")
    result.precisions = [
        Timing("fp32", {"client.precision": "fp32"}, (1, 9, 2)),
        Timing("bf16", {"client.precision": "bf16"}, (3, 3, 3)),
    ]
    result.engines = [
        Timing("serial", {"engine.name": "serial"}, (5, 5, 6)),
        Timing("processes", {"engine.name": "processes", "engine.workers": 2}, (4, 4, 100)),
    ]
    assert result.best() == {"client.precision": "bf16", "engine.name": "serial"}


def test_mistakes(recipe_file, capsys):
    assert federa("bench", "--write") == 2
    assert "RECIPE.yaml" in capsys.readouterr().err
    with pytest.raises(FederaError, match="repeats"):
        bench(parse_config(yaml.safe_load(recipe_file.read_text())), print, 0)


def test_flops_of_a_step_are_those_of_its_matrices(recipe_file):
    """Two layers of hidden 32 (feed-forward 64?) and rank-4 factors: bounds that a wrong count would leave."""
    config = parse_config(yaml.safe_load(recipe_file.read_text()))
    result = bench(config, lambda what: None, 1)
    assert result.step_flops > 0
    assert dict(lines(result, config))["cores"] == str(result.cores)
