"""`zemoe bench`: a layer's time beside baselines and beside the floor of the machine."""

from .command import run
from .request import BenchRequest

__all__ = ["BenchRequest", "run"]
