"""The images, as far as they can be checked by reading: nothing here was built, and nothing here needs Docker."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from federa.cli import app
from federa.cli.words import split_words
from federa.config import load_config, parse_config

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def instructions(path):
    """Instructions of a Dockerfile in order, (name, the rest), lines joined and comments gone."""
    lines = [
        line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined]


def words(path, name):
    """The words of the one ENTRYPOINT or CMD, in its form without a shell."""
    (found,) = [rest for kind, rest in instructions(path) if kind == name]
    return yaml.safe_load(found)


def copied(path):
    return [source for kind, rest in instructions(path) if kind == "COPY" for source in rest.split()[:-1]]


def understood(line):
    """Check that the command line knows all words of a command, and the recipe all its keys."""
    assert line[0] == "federa"
    command = typer.main.get_command(app).commands[line[1]]
    context = command.make_context(line[1], line[2:])
    _, overrides = split_words(context.params.get("arguments") or [])
    load_config(None, [pair for pair in overrides if not pair.startswith("data.")])
    return context.params


@each
def test_what_is_copied_is_there_and_reaches_the_build(path):
    assert copied(path)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for source in copied(path):
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, f"{source} is left out of the build's context"
    for source in ("readme", "license-files"):
        wanted = PROJECT[source] if isinstance(PROJECT[source], list) else [PROJECT[source]]
        assert {*wanted} <= {*copied(path)}, "the build of the package asks for it"


def test_nothing_else_reaches_a_build():
    """Keys and data lie beside the recipe, often inside the repository."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == {source for path in FILES for source in copied(path)}


@each
def test_a_base_has_a_version(path):
    steps = instructions(path)
    defaults = dict(rest.split("=", 1) for kind, rest in steps if kind == "ARG")
    (base,) = [
        re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], rest) for kind, rest in steps if kind == "FROM"
    ]
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", base), base
    if base.startswith("python:"):
        assert base.split(":")[1].split("-")[0] in SpecifierSet(PROJECT["requires-python"])
    else:
        assert re.search(r"sys\.version_info >= \(3, 11\)", path.read_text()), "the build must look"
        assert PROJECT["requires-python"] == ">=3.11"


@each
def test_it_does_not_run_as_root_and_holds_no_secret(path):
    steps = instructions(path)
    (user,) = [rest for kind, rest in steps if kind == "USER"]
    assert int(user) > 0
    assert "RUN" not in [kind for kind, _ in steps[steps.index(("USER", user)) :]], (
        "after it nothing is installed"
    )
    assert not [kind for kind, _ in steps if kind == "ADD"], "it fetches from anywhere"
    named = " ".join(rest for kind, rest in steps if kind in ("ARG", "ENV", "COPY")).lower()
    assert not re.search(r"secret|token|password|passwd|\.key|pki", named)


@each
def test_what_is_installed_is_named_in_the_project_and_pinned(path):
    steps = [rest for kind, rest in instructions(path) if kind == "RUN" and "pip install" in rest]
    own = next(rest for rest in steps if '".[' in rest)
    extras = re.search(r'"\.\[([\w,]+)\]"', own)[1].split(",")
    assert {"flower", "privacy"} <= {*extras} <= {*PROJECT["optional-dependencies"]}
    files = re.findall(r"-c (\S+)", own)
    assert "docker/constraints.txt" in files
    pinned = pins(*(ROOT / file for file in files if file in copied(path)))
    needed = [
        *PROJECT["dependencies"],
        *(one for extra in extras for one in PROJECT["optional-dependencies"][extra]),
    ]
    for one in map(Requirement, needed):
        if one.name == "torch" and "base.txt" in files:
            assert "version('torch')" in path.read_text(), "the base's own"
        else:
            assert pinned[one.name] in one.specifier, one


def pins(*files):
    """Versions by name, of files of constraints."""
    lines = [
        line for file in files for line in file.read_text().splitlines() if line and not line.startswith("#")
    ]
    return dict(line.split("==") for line in lines)


@each
def test_the_command_line_knows_what_a_container_starts(path):
    start = words(path, "ENTRYPOINT")
    assert start == ["federa", {"server": "serve", "jetson": "join"}[path.stem]]
    if words(path, "CMD") == ["--help"]:  # nobody can know the server's name
        return
    params = understood([*start, *words(path, "CMD")])
    (port,) = [rest for kind, rest in instructions(path) if kind == "EXPOSE"]
    assert params["port"] == int(port) and f", {port})" in path.read_text(), "the health check's is the same"
    assert params["resume"] and params["certificates"] is not None and not params["insecure"]


def test_what_a_board_is_told_is_understood():
    """The command in the head of the file, and in the page: both are copied from there."""
    text = (ROOT / "docker" / "jetson.Dockerfile").read_text()
    head = " ".join(line.strip("# \\") for line in text.splitlines() if line.startswith("#     "))
    told = shlex.split(head[head.index("federa-jetson fed.") :])[1:]
    params = understood(["federa", "join", *told])
    assert params["keys"] is not None
    _, overrides = split_words(params["arguments"])
    client = load_config(None, [pair for pair in overrides if pair.startswith("client.")]).client
    assert (client.precision, client.micro_batch, client.checkpointing) == ("bf16", 1, True)


def test_a_federation_of_containers_starts_what_there_is():
    services = COMPOSE["services"]
    build = services["server"]["build"]
    assert (
        ROOT / "docker" / build["context"] / build["dockerfile"]
    ).resolve() == ROOT / "docker/server.Dockerfile"
    clients = {name: service for name, service in services.items() if name != "server"}
    assert len(clients) == 2
    for number, service in enumerate(clients.values()):
        params = understood([*service["entrypoint"], *service["command"]])
        host, port = params["server"].split(":")
        assert host in services and int(port) == 8443
        mounted = " ".join(service["volumes"])
        assert f"client-{number}.parquet:" in mounted and f"node-{number}:" in mounted
        assert all(volume.endswith(":ro") for volume in service["volumes"])
    assert "client" not in " ".join(services["server"]["volumes"]), "the server has no client's data"


def blocks(language):
    """The page's blocks of code in a language."""
    found = re.findall(
        r"^```(\w*)\n(.*?)^```", (ROOT / "docs" / "edge.md").read_text(), re.DOTALL | re.MULTILINE
    )
    return [block for name, block in found if name == language]


def test_commands_of_the_page_are_understood():
    lines = "\n".join(blocks("")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("federa ")]
    assert {line[1] for line in found} >= {"certs", "serve", "join", "bench"}
    for line in found:
        understood(line)


def test_recipes_of_the_page_are_recipes():
    assert blocks("yaml")
    for block in blocks("yaml"):
        parse_config(yaml.safe_load(block))
