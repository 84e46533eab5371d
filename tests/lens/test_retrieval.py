"""Retrieval heads from one pass, against attention weights and against greedy decoding with the probe of the calibration."""

import pytest
import torch
from lens_reference import Whole, close
from models import tiny

from foveal.attach import attach
from foveal.errors import InputError
from foveal.head_scores import CopyProbe, copy_scores
from foveal.lens import HeadRanking, look
from foveal.lens.retrieval import Retrieval

IDS = torch.randint(5, 20, (60,), generator=torch.Generator().manual_seed(1)).tolist()
NEEDLE, ANSWER = (12, 30), (50, 58)


@pytest.mark.parametrize("chunk", [4096, 13])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_against_the_weights(family, chunk):
    whole = Whole(tiny(family), IDS)
    seen = look(whole.model, None, IDS, [Retrieval(NEEDLE, ANSWER)], chunk=chunk)

    def copied(w):
        hits = torch.zeros(w.shape[0], 60, dtype=torch.double)
        for t in range(*ANSWER):
            for h, j in enumerate(w[:, t - 1].argmax(-1).tolist()):
                hits[h, j] = max(hits[h, j], float(IDS[j] == IDS[t]))
        return hits[:, slice(*NEEDLE)].mean(1)

    def semantic(w):
        needle = IDS[slice(*NEEDLE)]
        return sum(needle.count(IDS[t]) * w[:, t - 1, slice(*NEEDLE)].sum(-1) for t in range(*ANSWER))

    expected = whole.table(copied)
    assert expected.nan_to_num(0).max() > 0
    close(seen["retrieval.copied"], expected)
    close(seen["retrieval.semantic"], whole.table(semantic))


def test_it_is_what_greedy_decoding_shows():
    model, probe, prompt = tiny("llama"), CopyProbe(), IDS[:40]
    looked, answer = [], []
    with torch.no_grad(), attach(model, probe) as session:
        model(torch.tensor([prompt[:-1]]))
        token = prompt[-1]
        for _ in range(8):
            token = int(model(torch.tensor([[token]]), past_key_values=session.store).logits[0, -1].argmax())
            answer.append(token)
            looked.append(torch.stack([probe.record[i] for i in range(3)]))
    expected = copy_scores(torch.stack(looked), prompt, (0, 39), answer)
    assert expected.max() > 0
    seen = look(model, None, prompt + answer, [Retrieval((0, 39), (40, 48))])
    close(seen["retrieval.copied"], expected)


def test_the_best_heads_come_first():
    seen = look(tiny("llama"), None, IDS, [Retrieval(NEEDLE, ANSWER)])
    order = HeadRanking.of(seen, "retrieval.semantic")
    assert order.top(1)[0] == divmod(int(seen["retrieval.semantic"].argmax()), 6)


@pytest.mark.parametrize(
    ("needle", "answer"),
    [((5, 5), (10, 12)), ((5, 8), (8, 12)), ((5, 8), (12, 12)), ((5, 8), (50, 61)), ((-1, 8), (50, 60))],
)
def test_what_lies_elsewhere_is_refused(needle, answer):
    with pytest.raises(InputError, match="needle"):
        look(tiny("llama"), None, IDS, [Retrieval(needle, answer)])
