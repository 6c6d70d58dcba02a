"""The speed comparison against the peers, one command: `python benchmarks/peers/compare.py --out DIR`.

Makes the environments, writes the plan, checks that everybody computes the same, then times all in turns.
What is done is kept: the same command goes on where it was stopped. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, HERE, REFERENCE, Contender
from environments import CannotInstallError, environment
from measure import run_measured
from provenance import code_of, commit, machine, mixed_code
from report import WARM_UP, counts, derive, equal, markdown, ratios

FINAL = "final.safetensors"
OWN_DROPOUT = None  # the model's own rates


class Comparison:
    """A comparison and its folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out.resolve()
        self.cores = [int(core) for core in options.cores.split(",")]
        self.pythons: dict[str, Path] = {}
        self.packages: dict[str, dict[str, str]] = {}
        self.unavailable: dict[str, str] = {}
        self.problems: list[str] = []
        names = (
            options.only.split(",") if options.only else [c.name for c in CONTENDERS.values() if c.by_default]
        )
        unknown = [name for name in names if name not in CONTENDERS]
        if unknown:
            raise SystemExit(f"--only: unknown {unknown[0]!r}; known: {', '.join(CONTENDERS)}")
        twins = [name.replace("bf16", "fp32") for name in names]  # what a bf16 run's right to count hangs on
        wanted = {REFERENCE, *names, *twins}
        self.contenders = [contender for name, contender in CONTENDERS.items() if name in wanted]
        self.workload = {
            key: getattr(options, key)
            for key in ("clients", "cohort", "examples", "tokens", "batch", "model")
        } | {"rounds": max(options.rounds, options.equality_rounds, options.quality_rounds)}

    def install(self) -> None:
        """Make the environments; a framework that cannot be installed is left out, and the table says why."""
        for framework in dict.fromkeys(contender.framework for contender in self.contenders):
            try:
                python, packages = environment(framework, self.options.cache.resolve())
                self.pythons[framework], self.packages[framework] = python, packages
            except CannotInstallError as error:
                if framework == "federa":
                    raise SystemExit(f"environment federa: {error}") from error
                print(f"environment {framework}: {error}", flush=True)
                self.unavailable[framework] = str(error)

    def plan(self) -> Path:
        """Write the plan, unless it is there; a folder holds one workload."""
        folder = self.out / "plan"
        if (folder / "plan.json").is_file():
            written = json.loads((folder / "plan.json").read_text())["workload"]
            other = [k for k, v in self.workload.items() if k != "rounds" and written[k] != v]
            if other:
                raise SystemExit(f"--out: {self.out} holds another workload ({other[0]} differs)")
            if self.workload["rounds"] > written["rounds"]:
                raise SystemExit(f"--out: the plan in {self.out} ends with round {written['rounds']}")
            return folder
        command = [str(self.pythons["federa"]), str(HERE / "plan.py"), json.dumps(self.workload), str(folder)]
        if subprocess.run(command, env=self._variables(CONTENDERS[REFERENCE]), check=False).returncode:
            raise SystemExit("the plan could not be written")
        return folder

    def equality(self, contender: Contender) -> dict[str, Any]:
        """Return how far a contender's final tensors are from the reference's, without dropout."""
        file, rounds = self.out / "equality" / f"{contender.name}.json", self.options.equality_rounds
        code = code_of(contender) + code_of(CONTENDERS[REFERENCE])
        key = {"code": code, "rounds": rounds}
        if (
            file.is_file()
            and (held := json.loads(file.read_text()))
            and held["key"] == key
            and "error" not in held
        ):
            return held
        print(f"equality: {contender.name}", flush=True)
        folder = file.with_suffix("")
        record: dict[str, Any] = {"key": key, "command": self._command(contender, folder, rounds, 0.0)}
        try:
            self._run(contender, folder, rounds, 0.0)
            record |= self._distance(folder / FINAL)
        except RuntimeError as error:
            record["error"] = str(error)
            print(f"  {error}", flush=True)
        write_json(file, record)
        return record

    def timed(self, contender: Contender, repeat: int) -> None:
        """Time one run, unless it is done."""
        file = self.out / "timed" / contender.name / f"{repeat}.json"
        if file.is_file():
            return
        print(f"repeat {repeat}: {contender.name}", end="", flush=True)
        folder = file.with_suffix("")
        load, when = os.getloadavg()[0], time.strftime("%Y-%m-%dT%H:%M:%S%z")
        try:
            measurement, marks = self._run(contender, folder, self.options.rounds, OWN_DROPOUT)
        except RuntimeError as error:
            self.problems.append(f"repeat {repeat} of {contender.name}: {error}")
            print(f": {error}", flush=True)
            return
        figures = derive(measurement, marks, contender.workers, self.workload["cohort"])
        print(f": {figures['clients_per_second']:.2f} clients/s", flush=True)
        command = self._command(contender, folder, self.options.rounds, OWN_DROPOUT)
        about = {"repeat": repeat, "when": when, "load_before": load, "code": code_of(contender)}
        write_json(file, figures | about | {"rounds": self.options.rounds, "command": command})

    def quality(self, contender: Contender) -> None:
        """Note how a contender's final tensors do on texts that nobody has trained on, unless it is known."""
        if self._known_quality(contender) is not None:
            return
        print(f"quality: {contender.name}", end="", flush=True)
        folder, rounds = self.out / "quality" / contender.name, self.options.quality_rounds
        try:
            self._run(contender, folder, rounds, OWN_DROPOUT)
            scores = self._helper("quality.py", self.out / "plan", folder / FINAL)
        except RuntimeError as error:
            self.problems.append(f"quality of {contender.name}: {error}")
            print(f": {error}", flush=True)
            return
        print(f": {scores['accuracy']:.3f}", flush=True)
        command = self._command(contender, folder, rounds, OWN_DROPOUT)
        key = self._quality_key(contender)
        write_json(folder.with_name(f"{contender.name}.json"), {"key": key, "command": command, **scores})

    def _quality_key(self, contender: Contender) -> dict[str, Any]:
        return {"code": code_of(contender, "quality.py"), "rounds": self.options.quality_rounds}

    def _known_quality(self, contender: Contender) -> dict[str, Any] | None:
        """Return what is written of it, if that is of this code and as many rounds."""
        file = self.out / "quality" / f"{contender.name}.json"
        held: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
        return held if held is not None and held["key"] == self._quality_key(contender) else None

    def results(self) -> dict[str, Any]:
        """Return all that is known so far, as `results.json` has it."""
        rows, equalities = {}, {}
        for contender in self.contenders:
            file = self.out / "equality" / f"{contender.name}.json"
            equality = json.loads(file.read_text()) if file.is_file() else None
            if equality is not None:
                equalities[contender.name] = equality
            runs = [
                json.loads(path.read_text())
                for path in sorted(
                    (self.out / "timed" / contender.name).glob("*.json"), key=lambda p: int(p.stem)
                )
            ]
            runs = [run for run in runs if run["rounds"] == self.options.rounds]
            unavailable = self.unavailable.get(contender.framework)
            about = {k: v for k, v in asdict(contender).items() if k not in ("by_default", "suffix")}
            rows[contender.name] = about | {
                "unavailable": unavailable,
                "equality": equality,
                "quality": self._known_quality(contender),
                "runs": runs,
            }
        runs_of = {name: row["runs"] for name, row in rows.items()}
        return {
            "workload": json.loads((self.out / "plan" / "plan.json").read_text())["workload"],
            "rounds": self.options.rounds,
            "equality_rounds": self.options.equality_rounds,
            "machine": machine(self.options.cores),
            "commit": commit(),
            "packages": self.packages,
            "contenders": rows,
            "ratios": ratios(runs_of, equalities),
            "warnings": [*self.problems, *mixed_code(self.contenders, runs_of)],
        }

    def _distance(self, final: Path) -> Any:
        """Return what `agree.py` says, or raise RuntimeError."""
        reference = self.out / "equality" / REFERENCE / FINAL
        return self._helper("agree.py", self.out / "plan" / "init.safetensors", reference, final)

    def _helper(self, script: str, *files: Path) -> Any:
        """Return what a script says of files, in the reference's environment, or raise RuntimeError."""
        command = [str(self.pythons["federa"]), str(HERE / script), *map(str, files)]
        variables = self._variables(CONTENDERS[REFERENCE])
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"{script} failed"])[-1])
        return json.loads(done.stdout)

    def _command(self, contender: Contender, folder: Path, rounds: int, dropout: float | None) -> list[str]:
        python = self.pythons[contender.framework]
        return contender.command(python, self.out / "plan", folder, rounds, dropout)

    def _run(
        self, contender: Contender, folder: Path, rounds: int, dropout: float | None
    ) -> tuple[Any, dict[str, Any]]:
        """Run a contender, and return the measurement and its marks.

        Raises:
            RuntimeError: it failed, or ran out of time.
        """
        folder.mkdir(parents=True, exist_ok=True)
        marks, log = folder / "run.json", folder / "log.txt"
        marks.unlink(missing_ok=True)
        command = self._command(contender, folder, rounds, dropout)
        measurement = run_measured(command, self._variables(contender), log, self.cores, self.options.timeout)
        if measurement.returncode != 0 or not marks.is_file():
            code = "out of time" if measurement.returncode is None else f"exit {measurement.returncode}"
            raise RuntimeError(f"failed ({code}), see {log}")
        return measurement, json.loads(marks.read_text())

    def _variables(self, contender: Contender) -> dict[str, str]:
        """Return the environment variables of a run: this process's, without what would lead astray."""
        dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        cache = self.options.cache.resolve()
        threads = str(contender.threads)
        return {name: value for name, value in os.environ.items() if name not in dropped} | {
            "PYTHONPATH": str(HERE),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(cache / "datasets"),
            "FEDERA_CACHE": str(cache / "federa"),
            "FLWR_HOME": str(cache / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            **contender.environment,
        }


def write_json(path: Path, content: Any) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line, read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/peers"), help="folder for results (default %(default)s)")
    add(
        "--rounds",
        type=int,
        default=8,
        help=f"of a timed run, {WARM_UP} of them warm-up (default %(default)s)",
    )
    add("--repeats", type=int, default=5, help="timed runs of every contender (default %(default)s)")
    add("--equality-rounds", type=int, default=3, help="rounds of the check (default %(default)s)")
    add(
        "--quality-rounds",
        type=int,
        default=0,
        help="of one run more of every contender, judged on texts that nobody has trained on (default: none)",
    )
    add("--only", help="names of contenders, with commas: " + ", ".join(CONTENDERS))
    add("--cores", default="0,1", help="all processes are held on these (default %(default)s)")
    add("--cache", type=Path, default=Path.home() / ".cache" / "federa-peers", help="for environments")
    add("--timeout", type=float, default=3600.0, help="seconds of one run (default %(default)s)")
    for name, value in (("clients", 100), ("cohort", 10), ("examples", 64), ("tokens", 64), ("batch", 16)):
        add(f"--{name}", type=int, default=value, help="of the workload (default %(default)s)")
    add("--model", default="minilm", help="minilm, or a folder of a BERT checkpoint (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds <= WARM_UP or options.equality_rounds < 1:
        parser.error(f"--rounds must exceed {WARM_UP}, and --equality-rounds 0")
    if options.repeats < 0 or options.quality_rounds < 0:
        parser.error("--repeats and --quality-rounds must not be negative")
    return options


def main(arguments: list[str]) -> int:
    """Run the comparison, and return the exit status: 1 if anything failed or is not equal."""
    comparison = Comparison(parse(arguments))
    comparison.out.mkdir(parents=True, exist_ok=True)
    comparison.install()
    comparison.plan()
    present = [c for c in comparison.contenders if c.framework not in comparison.unavailable]
    equalities = {contender.name: comparison.equality(contender) for contender in present}
    if "error" in equalities[REFERENCE]:
        raise SystemExit(f"{REFERENCE}, which all are compared with: {equalities[REFERENCE]['error']}")
    for contender in present:
        if contender.precision == "fp32" and not equal(equalities[contender.name]):
            comparison.problems.append(
                f"{contender.name} is not timed: its final tensors are not the reference's"
            )
    for repeat in range(comparison.options.repeats):
        for contender in present:  # in turns, so that a slow hour of the machine hits everybody
            if counts(contender.name, equalities):
                comparison.timed(contender, repeat)
                publish(comparison)
    if comparison.options.quality_rounds:
        for contender in present:
            comparison.quality(contender)
            publish(comparison)
    print(publish(comparison))
    return 1 if comparison.problems else 0


def publish(comparison: Comparison) -> str:
    """Write `results.json` and `results.md`, and return the latter."""
    results = comparison.results()
    write_json(comparison.out / "results.json", results)
    text = markdown(results)
    (comparison.out / "results.md").write_text(text)
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
