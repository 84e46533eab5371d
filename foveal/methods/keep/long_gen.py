"""LongGen: the layers in the middle keep the whole text, those below and above sinks and a window."""

from collections.abc import Iterable
from dataclasses import dataclass

from ...edits import Keep, Leave
from ...method import Method, check_count, check_range, method
from ...selection import Band, Selection
from ...verify import Claim, Falls
from .by_head import check_share, whole_share


@method(
    "long-gen",
    paper="A Little Goes a Long Way: Efficient Long Context Training and Inference with Partial Contexts (2024) [124]",
    claim=Claim(
        "Trained so, with a third of the layers full, needles to 128k are found at 38 % of the cache; imposed on a dense model, 28 %.",
        number="Llama 2 7B, needles to 128k: 100 % where trained with the pattern, 28 % where a dense model is cut to sinks and a window",
        experiments=(Falls("long-gen(sink=16, recent=112)", "needle", by=0.5),),
        setting="only the half about dense models, since none trained with the pattern is at hand; 128 keys of 1,024 tokens",
    ),
)
@dataclass(frozen=True)
class LongGen(Method):
    """The share `full` of the layers, in the middle, keeps every key; the others see and keep `sink` first tokens and the newest,
    sink + recent in all, in prefill and in decode: the paper's variant with attention sinks, 2,048 tokens, of which it does not state
    the split.

    The paper *trains* models this way (5 billion tokens while the context grows to 128k) and finds that the pattern put on a model
    trained densely loses most of what lies beyond the window. Here it is the pattern alone: for models trained with it, or as a baseline.
    budget: a share of the cache instead; half of it goes to full layers (at most `full` of them), the rest to windows that grow with
    the text, of which at most 4 keys are sinks. What no later query sees leaves after each chunk of a prompt. Original positions.
    """

    budget: float | None = None
    full: float = 1 / 3
    sink: int = 64
    recent: int = 1984

    def __post_init__(self) -> None:
        check_share("long-gen", self.budget)
        check_range("full", self.full, 0, 1)
        check_count("sink", self.sink)
        check_count("recent", self.recent, 2)

    def where(self, model) -> Iterable[int]:
        whole = self.full_layers(model.layers)
        return [i for i in model.layers if i not in whole]

    def full_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Of these layers those in the middle that keep everything."""
        if self.budget is None:
            count = round(self.full * len(layers))
        else:
            count = int(whole_share(self.budget, self.full) * len(layers) + 1e-9)
        first = (len(layers) - count) // 2
        return layers[first : first + count]

    def setup(self, model) -> float | None:
        """The share of the tokens the other layers keep, where a budget says so."""
        if self.budget is None:
            return None
        share = len(self.full_layers(model.layers)) / max(1, len(model.layers))
        return 1.0 if share == 1 else (self.budget - share) / (1 - share)

    @property
    def _sinks(self) -> int:
        return self.sink if self.budget is None else min(self.sink, 4)

    def _size(self, step, ahead: int):
        """Keys a query may see, itself included: at least the sinks, the newest key and its own."""
        if self.budget is None:
            return self.sink + self.recent
        return step.budget(step.plan, ahead, least=self._sinks + 2)

    def select(self, step) -> Selection:
        size = self._size(step, ahead=0)
        if step.decode or size >= step.T:
            return super().select(step)
        return Band(self._sinks, size - self._sinks)

    def keep(self, step) -> Keep | Leave | None:
        held = self._size(step, ahead=1) - 1  # with the next token itself, that is what its query may see
        if step.decode:
            return Leave(held, after=self._sinks)
        if held >= step.T:
            return None
        return step.keep_ends(self._sinks, held - self._sinks)
