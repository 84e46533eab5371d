"""Claims that can be re-checked: what a paper says, the experiment that tests it, and the verdict.

This package itself is what a method's file needs to state its claim; `foveal.verify.run` runs claims.
"""

from .claim import Claim
from .experiments import Beats, BytesAtMost, Chosen, Experiment, Falls, HeadsCarry, Same, StaysNear

__all__ = ["Beats", "BytesAtMost", "Chosen", "Claim", "Experiment", "Falls", "HeadsCarry", "Same", "StaysNear"]
