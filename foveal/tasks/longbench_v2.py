"""LongBench v2 (Bai et al., 2024): 503 questions with four options, from a local copy or the hub."""

from dataclasses import dataclass

from foveal.errors import InputError
from foveal.tasks.local import wanted_texts
from foveal.tasks.reader import Asked, Part, Reader, Source
from foveal.tasks.scoring import letter_of_choice

_PART = Part(
    "Read the text and answer the question that follows it.\n\n{context}\n\nQuestion: {question}\nChoices:\n(A) {A}\n"
    '(B) {B}\n(C) {C}\n(D) {D}\n\nAnswer in this form: "The correct answer is (insert answer here)".',
    letter_of_choice,
    128,
)
_FIELDS = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer")


@dataclass(frozen=True, kw_only=True)
class LongBenchV2(Reader):
    """LongBench v2, all of it or one difficulty or length: `get_task("longbench-v2:short", data="folder")`.

    data: a folder with `data.json`, that file (JSON lines too), or "THUDM/LongBench-v2". Score: accuracy without
    reasoning first; a blind guess is right one time in four.
    """

    name = "longbench-v2"
    title, hub = "LongBench v2", "THUDM/LongBench-v2"
    parts = dict.fromkeys(("all", "easy", "hard", "short", "medium", "long"), _PART)

    subset: str = "all"

    def source(self):
        return Source(["data.json", "data.jsonl"], ("data.json",))

    def rows(self):
        rows = super().rows()
        chosen = [row for row in rows if self.subset in ("all", row.get("difficulty"), row.get("length"))]
        if not chosen:
            raise InputError(f"Expected rows of '{self.subset}' in {self.data}, found none of {len(rows):,}.")
        return chosen

    def ask(self, row):
        context, question, *choices, answer = wanted_texts(row, _FIELDS, self.data)
        if answer not in ("A", "B", "C", "D"):
            raise InputError(
                f"Expected A, B, C or D as the answer on line {row['']} of {self.data}, got '{answer:.40}'."
            )
        options = dict(zip("ABCD", map(str.strip, choices), strict=True))
        return context.strip(), [Asked(self.question(question=question.strip(), **options), (answer,))]
