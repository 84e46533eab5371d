"""Lenses: what the attention of a model does on a text, measured in one forward pass, without a length x length matrix."""

from . import distance, patterns, profile, receivers, residual, sinks  # noqa: F401  (defining a lens registers it)
from .influence import Influence, active_dormant, dormancy, influence
from .lens import Lens, lenses
from .ranking import HeadRanking, rankings
from .reading import look
from .result import Look, Measure
from .sinks import sink_rate

__all__ = [
    "HeadRanking",
    "Influence",
    "Lens",
    "Look",
    "Measure",
    "active_dormant",
    "dormancy",
    "influence",
    "lenses",
    "look",
    "rankings",
    "sink_rate",
]
