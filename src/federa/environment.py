"""What a run ran on: versions, hardware and commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from federa.cpu import native
from federa.machine import available_cores


def environment() -> dict[str, Any]:
    """Return the content of `environment.json`."""
    packages = ("federa", "torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "peft")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:  # of this package's own repository, not of one that it happens to be installed in
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        ask = [*git, "rev-parse", "HEAD"]
        commit = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "kernels": native.status(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "commit": commit,
        "versions": versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
