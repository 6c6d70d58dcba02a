"""The Flower app of a federation: one file that says what is installed on every machine, and no code.

Flower sends an app's folder from the server to every node. In this one there is nothing to run: its
components are federa's own, and of the folder nothing but `pyproject.toml` travels, whatever else comes to
lie in it.
"""

from __future__ import annotations

from pathlib import Path

from federa.errors import FederaError

APP = {
    "pyproject.toml": """\
[project]
name = "federa-app"
version = "0.1.0"
description = "A federation of what is installed; there is no code here"
license = "Apache-2.0"
dependencies = []  # nothing is installed when it runs: federa is there already

[tool.flwr.app]
publisher = "federa"
fab-include = ["pyproject.toml"]  # of this folder nothing else travels

[tool.flwr.app.components]
serverapp = "federa.flower.app:server_app"
clientapp = "federa.flower.app:client_app"

# Of the server alone: a node's recipe and data are those of its own --node-config.
[tool.flwr.app.config]
recipe = ""        # the recipe, a whole path on the SuperLink's machine
out = ""           # the run directory, likewise
clients = 0        # how many nodes there are
resume = false     # go on from the checkpoint in out
min-nodes = 0      # how many must have joined for a start; 0: all
wait = 0.0         # seconds for them to join at the start; 0: for ever
deadline = 3600.0  # seconds for the updates of a round
short = "wait"     # with fewer updates than min_success by then: wait or fail
ask-again = 60.0   # seconds until a silent node is asked again
""",
}


def write_app(folder: Path) -> None:
    """Write the app's folder.

    Raises:
        FederaError: there is another one, or the folder cannot be written.
    """
    for name, text in APP.items():
        path = folder / name
        try:
            if path.exists() and path.read_text(encoding="utf-8") != text:
                raise FederaError(f"{path} is there already, and another's; give a folder of its own")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise FederaError(f"{folder}: cannot be written ({error.strerror or error})") from error
