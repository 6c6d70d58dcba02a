"""federa: federated fine-tuning of pretrained language models.

`run(RunConfig(rounds=10), out="runs/first").summary["final"]` is the test accuracy of a first run.
"""

from federa.config import RunConfig, load_config
from federa.export import Predictor, export, load
from federa.run import Observer, Result, run
from federa.types import FederaError, Job, RoundFailedError, ServerState, State, Update

__all__ = [
    "FederaError",
    "Job",
    "Observer",
    "Predictor",
    "Result",
    "RoundFailedError",
    "RunConfig",
    "ServerState",
    "State",
    "Update",
    "export",
    "load",
    "load_config",
    "run",
]
__version__ = "0.1.0"
