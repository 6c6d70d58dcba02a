"""One virtual environment a framework, made at the first use and kept. Standard library only."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contenders import COMMON, ENVIRONMENTS

PYTHONS = ((3, 11), (3, 12))  # what pfl, Ray and federa all take


class CannotInstallError(Exception):
    """An environment cannot be made here; the message says why."""


def environment(name: str, cache: Path) -> tuple[Path, dict[str, str]]:
    """Return the Python of a framework's environment and the versions of all its packages.

    Args:
        name: of the framework.
        cache: the folder that keeps environments.

    Raises:
        CannotInstallError: pip failed, or this Python is not one that all frameworks take.
    """
    if sys.version_info[:2] not in PYTHONS:
        raise CannotInstallError(f"Python {sys.version.split()[0]}: run the driver with 3.11 or 3.12")
    folder = cache / "environments" / name
    python, ready = folder / "bin" / "python", folder / "ready.json"
    wanted = [*COMMON, *ENVIRONMENTS[name]]
    if not ready.is_file() or json.loads(ready.read_text())["requirements"] != wanted:
        print(f"environment {name}: installing", flush=True)
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted])
        ready.write_text(json.dumps({"requirements": wanted, "packages": _packages(python)}, indent=1))
    return python, json.loads(ready.read_text())["packages"]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise CannotInstallError((errors or done.stderr.splitlines() or ["no message"])[-1])
    return done.stdout


def _packages(python: Path) -> dict[str, str]:
    command = [str(python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed: list[Mapping[str, Any]] = json.loads(_run(command))
    return {package["name"]: package["version"] for package in listed}
