"""A laboratory of tiny models: each experiment trains in seconds to minutes on a CPU and holds its numbers against lines drawn before."""

from . import backcopy, heads, multitask, phases, recall, regression, scan_and_snap, sinks  # noqa: F401  (defining a lab registers it)
from .lab import Finding, Lab, Report, get_lab, labs

__all__ = ["Finding", "Lab", "Report", "get_lab", "labs"]
