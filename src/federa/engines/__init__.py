"""Engines: where and how fast the clients of a round are run; `Engine` says what a result owes to them."""

from federa.engines.base import ENGINES, Clients, Engine, Session
from federa.engines.processes import Processes
from federa.engines.ray import Ray
from federa.engines.serial import Serial
from federa.engines.stacked import Stacked

__all__ = ["ENGINES", "Clients", "Engine", "Processes", "Ray", "Serial", "Session", "Stacked"]
