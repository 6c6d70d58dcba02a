"""Running the cells of a comparison: one after the other, or several at a time in processes of their own."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from federa.checkpoint import RunDirectory
from federa.compare.grid import Cell
from federa.config import RunConfig, parse_config
from federa.engines import Stacked
from federa.errors import DoesNotFitError, FederaError, RoundFailedError
from federa.machine import available_cores, die_with_parent
from federa.models import pick_device
from federa.progress import readable_seconds
from federa.run import run

Summary = dict[str, Any]
Say = Callable[[str], None]
Finished = Callable[[Cell, Summary | None, str], None]
IN_ONE_PROCESS = ("serial", "stacked")


def jobs_for(config: RunConfig, asked: int | None) -> int:
    """Return how many runs go at a time.

    Unless asked, one a core for the serial engine on a CPU without threads of its own, else one. Clients side
    by side go in one process as well, so several such runs may share a GPU, where that is asked for.

    Raises:
        FederaError: more than one at a time of an engine that has workers of its own, or that plans with all
            free memory.
    """
    name, threads, cores = config.engine.name, config.engine.threads or 1, available_cores()
    if asked is None:
        device = pick_device("auto").type if config.device == "auto" else config.device
        alone = name != "serial" or device != "cpu"
        return 1 if alone else max(1, cores // threads)
    if asked > 1 and name not in IN_ONE_PROCESS:
        raise FederaError(
            f"--jobs {asked}: engine.name={name} has workers of its own; use engine.name=serial"
        )
    if asked > 1 and isinstance(config.engine, Stacked) and config.engine.clients is None:
        raise FederaError(f"--jobs {asked}: every run would plan with all free memory; set engine.clients")
    if asked * threads > cores:
        raise FederaError(f"--jobs {asked}: with engine.threads that is more than the {cores} cores")
    return asked


class Runner:
    """Runs cells; what is finished in the folder is taken as it is.

    Args:
        folder: of the comparison.
        jobs: cells at a time.
    """

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder, self._jobs = folder, jobs
        self._pool: ProcessPoolExecutor | None = None

    def run(self, cells: Sequence[Cell], finished: Finished) -> dict[Path, Summary | None]:
        """Return the summary of every cell, by its folder; None for one that failed.

        Args:
            cells: to run.
            finished: is told of each as it ends, with what went wrong, if anything did.
        """
        results: dict[Path, Summary | None] = {}
        for cell, (summary, wrong) in self._answers(cells):
            results[cell.folder] = summary
            finished(cell, summary, wrong)
        return results

    def _answers(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, tuple[Summary | None, str]]]:
        if self._pool is None or len(cells) < 2:
            for cell in cells:
                yield cell, run_cell(cell.config, self.folder / cell.folder)
            return
        waiting = {
            self._pool.submit(
                _in_worker, cell.config.model_dump(mode="json"), str(self.folder / cell.folder)
            ): cell
            for cell in cells
        }
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool as error:
            raise RoundFailedError(
                "a run was killed (out of memory?); start the comparison again, perhaps with fewer --jobs: "
                "what is finished is kept"
            ) from error

    @contextmanager
    def open(self) -> Iterator[Runner]:
        """Start the processes, and end them (what they run as well) with the block."""
        if self._jobs == 1:
            yield self
            return
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        pool = ProcessPoolExecutor(self._jobs, context, _start_worker, (available_cores() // self._jobs,))
        self._pool = pool
        try:
            yield self
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._pool = None


def run_cell(config: RunConfig, folder: Path) -> tuple[Summary | None, str]:
    """Run or resume one cell; return its summary, or None and why it failed.

    What no one foresaw (a GPU without memory left) is this cell's failure alone, for hours of others may wait
    behind it; a file beside its folder has the whole of it.

    Raises:
        FederaError: a mistake in its recipe, or a run of another recipe in its folder.
    """
    told = folder.with_name(f"{folder.name}-error.txt")
    try:
        summary = run(config, folder, resume=True).summary
        told.unlink(missing_ok=True)
        return summary, ""
    except (RoundFailedError, DoesNotFitError) as error:
        told.unlink(missing_ok=True)
        return None, str(error)
    except FederaError as error:
        if not str(error).startswith("--resume:"):
            raise
        what = str(error).removeprefix("--resume: ").partition(";")[0]
        raise FederaError(f"--out: {what}; compare into another directory") from error
    except Exception as error:
        told.parent.mkdir(parents=True, exist_ok=True)
        told.write_text(traceback.format_exc())
        reason = str(error).strip().partition("\n")[0]
        return None, f"{type(error).__name__}: {reason} (all of it: {told})"


def _start_worker(threads: int) -> None:
    die_with_parent()
    torch.set_num_threads(threads)


def _in_worker(recipe: dict[str, Any], folder: str) -> tuple[Summary | None, str]:
    return run_cell(parse_config(recipe), Path(folder))


class Told:
    """Says a line for every run that ends."""

    def __init__(self, of: int, say: Say) -> None:
        self._done, self._of, self._say = 0, of, say

    def __call__(self, cell: Cell, summary: Summary | None, wrong: str) -> None:
        """Say what a run came to, or what went wrong."""
        self._done += 1
        what = f"[{self._done}/{self._of}] {cell.setting}: {cell.folder.name}"
        if summary is None:
            self._say(f"{what}: {wrong}")
            return
        spent = readable_seconds(summary["seconds_rounds"])
        self._say(f"{what}: {summary['metric']} {summary['final']:.4f} in {spent}")


def require_same_data(folder: Path, cells: Sequence[Cell]) -> None:
    """Raise unless finished cells of a setting met the same examples and the same encoder.

    Those of one seed met the same clients as well.

    Raises:
        FederaError: they did not: data or model have changed since the first of them ran.
    """
    met: dict[tuple[object, ...], tuple[object, Cell]] = {}
    for cell in cells:
        run = RunDirectory(folder / cell.folder)
        held, result = run.read_json("partition.json") or {}, run.read_json("result.json") or {}
        for what, where, value in (
            ("data", (), held.get("data")),
            ("data", (cell.config.seed,), held.get("fingerprint")),
            ("model", (), result.get("fingerprint")),
        ):
            found, first = met.setdefault((what, cell.setting, *where), (value, cell))
            if found != value:
                raise FederaError(
                    f"--out: {first.folder} and {cell.folder} in {folder} were not run on the same {what}; "
                    "compare into another directory"
                )
