"""Methods: which parameters train, and from where they start. One file each."""

from federa.methods.adapter import Adapter
from federa.methods.base import METHODS, Method, Setup
from federa.methods.bitfit import BitFit
from federa.methods.federa import FeDeRA
from federa.methods.ft import FullFineTuning
from federa.methods.lora import LoRA
from federa.methods.probe import Probe

__all__ = ["METHODS", "Adapter", "BitFit", "FeDeRA", "FullFineTuning", "LoRA", "Method", "Probe", "Setup"]
