"""Lenses: what the attention of a model does on a text, measured in one forward pass, without a length x length matrix."""

from . import capacity, distance, patterns, profile, receivers, residual, sinks  # noqa: F401  (defining a lens registers it)
from .attribution import agreement, cross_attention, explain, override_rows, saliency
from .circuits import find_circuit, path_patch
from .icl import compare_updates
from .influence import Influence, active_dormant, dormancy, influence
from .lens import Lens, lenses
from .page.picture import Picture
from .ranking import HeadRanking, rankings
from .reading import look
from .reasoning import suppression, thought_anchors
from .result import Look, Measure
from .retrieval import Retrieval
from .roles import instruction_drift
from .sinks import sink_rate
from .structure import edge_test, graph_attention

__all__ = [
    "HeadRanking",
    "Influence",
    "Lens",
    "Look",
    "Measure",
    "Picture",
    "Retrieval",
    "active_dormant",
    "agreement",
    "compare_updates",
    "cross_attention",
    "dormancy",
    "edge_test",
    "explain",
    "find_circuit",
    "graph_attention",
    "influence",
    "instruction_drift",
    "lenses",
    "look",
    "override_rows",
    "path_patch",
    "rankings",
    "saliency",
    "sink_rate",
    "suppression",
    "thought_anchors",
]
