"""What a client holds in memory: with a bf16 base no float32 copy of it, and less for every way to save some."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "client_memory.py"
SMALL = {"layers": 4, "width": 512, "vocabulary": 16000, "batch": 16, "tokens": 64, "steps": 2}
BASE = 4 * (16000 * 512 + 4 * 12 * 512**2 + 514 * 512) / 2**20  # MB of it in float32, without vectors


@pytest.mark.slow
def test_every_way_to_save_memory_saves_some():
    words = [word for name, size in SMALL.items() for word in (f"--{name}", str(size))]
    command = [sys.executable, str(SCRIPT), "--kernels", "off", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=4) for line in done.stdout.splitlines()[1:]]
    ready = {name.strip(): float(held) for name, _, held, _, _ in rows}
    training = {name.strip(): float(most) for name, _, _, most, _ in rows}
    saved = ready["fp32"] - ready["bf16"]
    assert 0.4 * BASE < saved < 0.6 * BASE, "half of the base, so there is no second copy"
    both = training["bf16, checkpointing, micro_batch 1"]
    for way in ("bf16, checkpointing", "bf16, micro_batch 1"):
        assert training[way] < training["bf16"] < training["fp32"], training
    assert both < 0.85 * training["bf16, checkpointing"], (
        training
    )  # beside one example alone it saves little here
