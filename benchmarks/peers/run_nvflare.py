"""NVIDIA FLARE: its simulator, with a ModelController on the server and an Executor in each site."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nvflare.job_config.api import FedJob
from nvflare_parts import Server, Site
from workload import Order, order_from_command_line


def main(order: Order) -> None:
    """Run; the server writes the marks."""
    order.out.mkdir(parents=True, exist_ok=True)
    workspace = order.out / "nvflare"
    shutil.rmtree(workspace, ignore_errors=True)
    order_file = order.out / "order.json"
    order_file.write_text(order.to_json())
    here = str(Path(__file__).parent)  # its processes must find this folder's modules
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    job = FedJob(name="peers", min_clients=order.workers)
    job.to_server(Server(str(order_file)))
    job.to_server({"server": {"task_request_interval": 0.05}})  # seconds; a site waits 2 of them as it comes
    job.to_clients(Site(), tasks=["train"])
    job.simulator_run(str(workspace), n_clients=order.workers, threads=order.workers, log_config="concise")
    shutil.rmtree(workspace, ignore_errors=True)
    if not (order.out / "run.json").is_file():
        raise SystemExit("FLARE's simulation failed: see the log")
    os._exit(0)  # its threads would hold the process for some seconds more, which are no part of the work


if __name__ == "__main__":
    main(order_from_command_line())
