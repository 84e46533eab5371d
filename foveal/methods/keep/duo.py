"""DuoAttention: retrieval heads keep everything, streaming heads keep sinks and a recent window."""

from dataclasses import dataclass

from ...edits import Keep, Leave
from ...errors import InputError
from ...heads import HeadRoles, roles_for
from ...method import Method, check_count, check_range, method
from ...selection import FOREVER, Band, Selection
from ...verify import Beats, Claim, StaysNear
from .by_head import HeadPlan, check_share, outside, whole_share
from .profiles import profile_for


@method(
    "duo",
    paper="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (2024) [118]",
    claim=Claim(
        "Half of the KV heads as streaming heads (25 % of them whole in multi-head models) keep needle accuracy near dense.",
        number="Llama 3 8B at 50 %, Llama 2 7B at 25 % whole heads: needles near dense up to the full context",
        experiments=(
            StaysNear("duo(sink=16, recent=64)", "needle", within=0.1),
            Beats("duo(sink=16, recent=64)", "duo(sink=16, recent=64, roles='{random}')", "needle", by=0.2),
        ),
        setting="sinks and window are 64 + 256 scaled to the text; heads ranked by trained gates, else by retrieval score",
    ),
)
@dataclass(frozen=True)
class Duo(Method):
    """The share `whole` of the KV heads with the highest score keeps every key; the others keep `sink` + `recent` (deployed: 64 + 256).

    budget: a share of the cache instead; half of it goes to whole heads (at most `whole` of them), the rest to windows that grow
    with the text, of which at most 4 keys are sinks.
    score: what ranks the heads: "gate", trained as in the paper (`python -m foveal.methods.keep.duo_train`), or a head role like
    "retrieval"; None is gates where this model has them, else "retrieval".  roles: a file with that score (default: the one of this
    model). Streaming heads are windowed in prefill too, and a query sees exactly sink + recent keys, itself included, in prefill and in
    decode. Original positions.
    """

    budget: float | None = None
    whole: float = 0.5
    sink: int = 64
    recent: int = 256
    roles: str | None = None
    score: str | None = None

    def __post_init__(self) -> None:
        check_share("duo", self.budget)
        check_range("whole", self.whole, 0, 0.999)
        check_count("sink", self.sink)
        check_count("recent", self.recent, 2)

    def setup(self, model) -> HeadPlan:
        share = self.whole if self.budget is None else whole_share(self.budget, self.whole)
        roles, score = self._ranking(model.model)
        return HeadPlan.of(roles.top_share(score, share, model.kv_heads), model, self.budget)

    def _ranking(self, model) -> tuple[HeadRoles, str]:
        """The file that ranks the heads, and by which score."""
        if self.roles is not None:
            roles = HeadRoles.load(self.roles).for_model(model)
            return roles, self.score or ("gate" if "gate" in roles.scores else "retrieval")
        if self.score in (None, "gate"):
            try:
                return profile_for(model, "duo", made_by="train"), "gate"
            except InputError:
                if self.score is not None:
                    raise
        return roles_for(model), self.score or "retrieval"

    def _size(self, step, ahead: int):
        """Keys a streaming head's query may see, itself included: at least the sinks, the newest key and its own."""
        if self.budget is None:
            return self.sink + self.recent
        return step.budget(step.plan.window, ahead, least=self._sinks + 2)

    @property
    def _sinks(self) -> int:
        return self.sink if self.budget is None else min(self.sink, 4)

    def select(self, step) -> Selection:
        others = step.plan.others[step.layer]
        size = self._size(step, ahead=0)
        if step.decode or not others or size >= step.T:
            return super().select(step)
        sink, group = self._sinks, step.group_size
        recent = [size - sink if h // group in others else FOREVER for h in range(step.H)]
        return Band(sink, recent)

    def keep(self, step) -> Keep | Leave | None:
        others = step.plan.others[step.layer]
        if not others:
            return None
        sink, size = self._sinks, self._size(step, ahead=1)
        if step.decode:
            return Leave(size - 1, after=sink, heads=others)
        if size > step.T:
            return None
        token, last = step.token, step.q_token[:, -1, None, None]
        return Keep(mask=outside(step, others, (token >= sink) & (last - token >= size - sink - 1)))
