"""federa: federated fine-tuning of pretrained language models.

`run(RunConfig(rounds=10), out="runs/first").summary["final"]` is the test accuracy of a first run.

The names below are loaded when they are first used: what only carries messages does without PyTorch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from federa.config import RunConfig, load_config
    from federa.errors import FederaError, RoundFailedError
    from federa.export import Predictor, export, load
    from federa.run import Observer, Result, run
    from federa.types import Job, ServerState, State, Update

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

_HOMES = {
    "config": ("RunConfig", "load_config"),
    "errors": ("FederaError", "RoundFailedError"),
    "export": ("Predictor", "export", "load"),
    "run": ("Observer", "Result", "run"),
    "types": ("Job", "ServerState", "State", "Update"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # else every name would be one

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package; `federa.run` is the function, whoever imports the module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):  # else the import system's doing
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
