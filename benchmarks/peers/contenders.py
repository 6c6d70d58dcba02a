"""Who takes part, in which environment, and with which command line. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
REPO = HERE.parents[1]

# The same in all environments, so that no contender has another arithmetic library than its neighbour.
COMMON = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "peft==0.21.2",
    "numpy==2.4.6",
    "safetensors==0.8.0",
)
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "federa": ("-e", f"{REPO}[quickstart]"),
    "plain": (),
    # An open range: 1.42.0 wants a certifi that not every index has; pip takes the newest that installs.
    "flower": ("flwr[simulation]>=1.41,<1.43",),
    "pfl": ("pfl[pytorch]==0.6.0",),
    "nvflare": ("nvflare==2.9.0",),
}

# What glibc does with freed memory when federa's engines have spoken to it; for `plain-2x1-malloc`.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}


@dataclass(frozen=True)
class Contender:
    """One way to run the workload.

    Attributes:
        framework: whose engine it is; names its environment and its script, `run_<framework>.py`.
        workers: processes that train clients at a time.
        threads: of each.
        precision: `fp32`, or `bf16` for federa's own arithmetic.
        by_default: takes part unless the command line says otherwise.
        environment: variables set for it alone.
        suffix: told apart by, where all of the above is equal.
    """

    framework: str
    workers: int
    threads: int
    precision: str = "fp32"
    by_default: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    suffix: str = ""

    @property
    def name(self) -> str:
        """What tables and folders call it."""
        if self.framework == "federa":
            return f"federa-{'serial' if self.workers == 1 else 'processes'}-{self.precision}{self.suffix}"
        return f"{self.framework}-{self.workers}x{self.threads}{self.suffix}"

    def command(self, python: Path, plan: Path, out: Path, rounds: int, dropout: float | None) -> list[str]:
        """Return the command line of one run.

        Args:
            python: of its environment.
            plan: the folder of the plan.
            out: the folder for `run.json` and `final.safetensors`.
            rounds: how many.
            dropout: replaces every rate of the model; None keeps the model's own.
        """
        command = [str(python)]
        if self.framework == "pfl" and self.workers > 1:  # pfl's own way to several processes
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.workers}"]
        command += [str(HERE / f"run_{self.framework}.py"), "--plan", str(plan), "--out", str(out)]
        command += ["--rounds", str(rounds), "--workers", str(self.workers), "--threads", str(self.threads)]
        if dropout is not None:
            command += ["--dropout", str(dropout)]
        if self.framework == "federa":
            command += ["--precision", self.precision]
        return command


REFERENCE = "federa-serial-fp32"  # the run that all others must agree with
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("federa", 1, 2),
        Contender("federa", 2, 1),
        Contender("federa", 1, 2, "bf16"),
        Contender("federa", 2, 1, "bf16"),
        Contender("plain", 1, 2),
        Contender("plain", 2, 1),
        Contender("flower", 1, 2),
        Contender("flower", 2, 1),
        Contender("pfl", 1, 2),
        Contender("pfl", 2, 1),
        Contender("nvflare", 1, 2),
        Contender("nvflare", 2, 1),
        # These two split federa's gain in fp32: its setting for freed memory, and its fused kernels.
        Contender("plain", 2, 1, by_default=False, environment=KEEP_FREED_MEMORY, suffix="-malloc"),
        Contender(
            "federa", 2, 1, by_default=False, environment={"FEDERA_KERNELS": "off"}, suffix="-no-kernels"
        ),
    )
}
