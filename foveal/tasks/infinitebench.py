"""InfiniteBench (Zhang et al., 2024): 12 sets beyond 100,000 tokens, from a local copy or the hub."""

import re
from dataclasses import dataclass

from foveal.errors import InputError
from foveal.tasks import scoring
from foveal.tasks.local import wanted, wanted_texts
from foveal.tasks.reader import Asked, Part, Reader, Source, four, texts

_HIDDEN = "Something important is hidden in a lot of irrelevant text. Find it and memorize it.\n\n{context}\n\n{input}"
_BOOK = "Read the book and answer the question."
_CHOICES = "A. {A}\nB. {B}\nC. {C}\nD. {D}"
_PARTS = {
    "passkey": Part(_HIDDEN, scoring.first_integer, 6),
    "number_string": Part(_HIDDEN, scoring.first_integer, 12),
    "kv_retrieval": Part("Find the value of a key in the JSON object.\n\n{context}\n\n{input}", scoring.whole_word, 50),
    "longbook_sum_eng": Part("Summarize the book.\n\n{context}\n\nSummary:", scoring.best(scoring.rouge_l_sum), 1200),
    "longbook_choice_eng": Part(
        f"{_BOOK}\n\n{{context}}\n\nQuestion: {{input}}\n{_CHOICES}\n\nAnswer with the letter of the correct option.",
        scoring.letter_or_text,
        40,
    ),
    "longbook_qa_eng": Part(
        f"{_BOOK} Be very brief.\n\n{{context}}\n\nQuestion: {{input}}\nAnswer:", scoring.best(scoring.token_f1), 40
    ),
    "longbook_qa_chn": Part(
        "请阅读下面的书并简短回答问题。\n\n{context}\n\n问题：{input}\n回答：",  # noqa: RUF001
        scoring.best(scoring.character_f1),
        40,
    ),
    "longdialogue_qa_eng": Part(
        "In the script below one name of a character is replaced by $$MASK$$.\n\n{context}\n\n"
        "Whose name is it? Answer with the name alone, as the script writes it.",
        scoring.name_in_capitals,
        40,
    ),
    "math_find": Part("Read the list of numbers.\n\n{context}\n\n{input}", scoring.first_number, 3),
    "math_calc": Part(
        "Give the values after each operation, as a list of numbers.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: {context}\nValues:",
        scoring.leading_share,
        30_000,
    ),
    "code_run": Part("Read the Python code.\n\n{context}\n\n{input} Answer with the number.", scoring.last_integer, 5),
    "code_debug": Part(
        f"One function of this code has a deliberate, obvious error.\n\n{{context}}\n\nWhich one?\n{_CHOICES}\n\n"
        'Answer with the letter and a full stop, like "A.".',
        scoring.letter_or_function,
        5,
    ),
}


@dataclass(frozen=True, kw_only=True)
class InfiniteBench(Reader):
    """One set of InfiniteBench: `get_task("infinitebench:kv_retrieval", data="folder")`.

    data: a folder with `kv_retrieval.jsonl`, that file, or "xinrongzhang2022/InfiniteBench". The prompts are Foveal's
    own wording, with the benchmark's generated tokens and scores (percent there, shares of 1 here).
    """

    name = "infinitebench"
    title, hub, parts = "InfiniteBench", "xinrongzhang2022/InfiniteBench", _PARTS

    def source(self):
        return Source([f"{self.subset}.jsonl"], (f"{self.subset}.jsonl",))

    def ask(self, row):
        context, asked = wanted_texts(row, ("context", "input"), self.data)
        (answer,) = wanted(row, ("answer",), self.data)
        if "{A}" not in self.part.template:
            return context, [Asked(self.question(input=asked), texts(answer))]
        (options,) = wanted(row, ("options",), self.data)
        options = four(options, f"line {row['']} of {self.data}")
        golds = chosen(texts(answer), options, f"line {row['']} of {self.data}")
        return context, [Asked(self.question(input=asked, **dict(zip("ABCD", options, strict=True))), golds)]


def chosen(golds: tuple[str, ...], options: tuple[str, ...], where: str) -> tuple[str, str]:
    """The text and the letter of the right option, whichever of them is given."""
    for gold in golds:
        if gold in options:
            return gold, "ABCD"[options.index(gold)]
    for gold in golds:
        if re.fullmatch("[ABCD]", gold):
            return options["ABCD".index(gold)], gold
    raise InputError(f"Expected the answer among the options on {where}, got {', '.join(golds):.60}; correct it.")
