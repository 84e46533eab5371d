"""Two claims re-checked on the default model in their quick form; the lines, drawn before the first run, stand in the methods' files."""

import pytest

from foveal.verify.run import verify

pytestmark = [pytest.mark.model, pytest.mark.claim]


def findings(default_model, name):
    found = verify(*default_model, [name], quick=True)
    assert not found.failed
    return found.results[0].findings


def test_masking_retrieval_heads_breaks_recall_and_random_heads_do_not(default_model):
    """Wu et al. (2024) [51]: the heads that copy carry retrieval; as many random heads outside the top do not."""
    below_dense, below_random = findings(default_model, "ablate")
    assert below_dense["arms"]["dense"] >= 0.8
    assert below_dense["verdict"] == below_random["verdict"] == "holds"


def test_sinks_keep_perplexity_flat_and_a_window_alone_is_worse(default_model):
    """Xiao et al. (2023) [113]. How much worse is a matter of the whole run: the claim asks for one nat."""
    with_sinks, window = findings(default_model, "streaming-llm")
    assert with_sinks["verdict"] == "holds"
    assert window["measured"] >= 0.3 > -with_sinks["measured"]  # beyond the loss that counts as flat
