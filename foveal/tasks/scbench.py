"""SCBench (Li et al., 2025): several questions on one shared context, from a local copy or the hub."""

from dataclasses import dataclass

from foveal.errors import InputError
from foveal.tasks import scoring
from foveal.tasks.local import wanted, wanted_texts
from foveal.tasks.reader import Asked, Part, Reader, Source, four, texts
from foveal.tasks.task import Turn

_PLAIN = "{context}\n\n{input}"
_BOOK = "Read the book and answer the question."
_summary = scoring.best(scoring.rouge_l_sum)

_PARTS = {
    "kv": Part("Find the value of a key in the JSON object.\n\n{context}\n\n{input}", scoring.contains, 150),
    "prefix_suffix": Part(_PLAIN, scoring.contains, 150),
    "vt": Part(_PLAIN, scoring.string_match_all, 30),
    "qa_eng": Part(f"{_BOOK} Be very brief.\n\n{{context}}\n\nQuestion: {{input}}\nAnswer:", scoring.contains_any, 40),
    "qa_chn": Part(
        "请阅读下面的书并简短回答问题。\n\n{context}\n\n问题：{input}\n回答：",  # noqa: RUF001
        scoring.best(scoring.character_f1),
        40,
    ),
    "choice_eng": Part(
        f"{_BOOK}\n\n{{context}}\n\nQuestion: {{input}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n\n"
        "Answer with the letter of the correct option.",
        scoring.letter_or_text,
        40,
    ),
    "many_shot": Part(_PLAIN, scoring.contains_any, 10),
    "summary": Part(_PLAIN, _summary, 200),
    "mf": Part("Read the list of numbers.\n\n{context}\n\n{input}", scoring.first_number, 5),
    "summary_with_needles": Part(_PLAIN, _summary, 800),
}
# Where each turn names its own task.
_MIXED = {"scbench_summary": _summary, "scbench_passkey": scoring.first_integer}
_CODE = ("repoqa", "repoqa_and_kv")


@dataclass(frozen=True, kw_only=True)
class SCBench(Reader):
    """One set of SCBench: `get_task("scbench:kv", data="folder")`; ten of the twelve.

    data: a folder with `scbench_kv.jsonl` (or `data/scbench_kv.jsonl`), that file, or "microsoft/SCBench".
    mode: "turns" puts each question behind the earlier ones and their right answers in one conversation (the
    benchmark's default), "requests" asks each by itself. Either way the context is read once for all of them. The two
    sets on code repositories are not read: their score needs parsers of six programming languages.
    """

    name = "scbench"
    title, hub, parts = "SCBench", "microsoft/SCBench", _PARTS

    mode: str = "turns"

    def __post_init__(self) -> None:
        if self.subset in _CODE:
            raise InputError(
                f"SCBench's '{self.subset}' is scored with parsers of six programming languages, which Foveal does not "
                f"have; choose from {', '.join(self.parts)}."
            )
        if self.mode not in ("turns", "requests"):
            raise InputError(f"Expected mode to be 'turns' or 'requests', got {self.mode!r}; choose one.")
        super().__post_init__()

    def source(self):
        file = f"scbench_{self.subset}.jsonl"
        return Source([file, f"data/{file}"], (f"data/{file}",))

    def ask(self, row):
        (turns,) = wanted(row, ("multi_turns",), self.data)
        (context,) = wanted_texts(row, ("context",) if "context" in row else ("input",), self.data)
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise InputError(
                f"Expected a list of turns on line {row['']} of {self.data}, got {turns!r:.40}; correct it."
            )
        return context, [self._turn(turn | {"": row[""]}) for turn in turns]

    def _turn(self, turn: dict) -> Asked:
        where = f"line {turn['']} of {self.data}"
        (asked,), (answer,) = wanted_texts(turn, ("input",), self.data), wanted(turn, ("answer",), self.data)
        extra: tuple[str, ...] = ()
        if self.subset == "summary_with_needles":
            (kind,) = wanted(turn, ("task",), self.data)
            if kind not in _MIXED:
                raise InputError(
                    f"Expected one of {', '.join(_MIXED)} as the task of a turn on {where}, got '{kind}'; correct it."
                )
            extra = (kind,)
        options: dict[str, str] = {}
        if "{A}" in self.part.template:
            (found,) = wanted(turn, ("options",), self.data)
            options = dict(zip("ABCD", four(found, where), strict=True))
        return Asked(self.question(input=asked, **options), texts(answer), extra)

    def talks(self, asked: list[Asked]) -> list[list[Turn]]:
        """One conversation per question, after all earlier ones in mode "turns"."""
        turns = [(one.question, "", ", ".join(one.golds)) for one in asked]
        if self.mode == "requests":
            return [[turn] for turn in turns]
        # Later questions stand without what parts the first from the context.
        later = [(question.lstrip("\n"), lead, answer) for question, lead, answer in turns]
        return [[turns[0], *later[1 : i + 1]] for i in range(len(turns))]

    def _rate(self, answer, golds, extra):
        """The set's official score, or that of the turn's own task."""
        return _MIXED[extra[0]](answer, golds, ()) if extra else super()._rate(answer, golds, extra)
