"""LongBench (Bai et al., 2023): 21 sets in six kinds, from a local copy or the hub, with the official scores."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from foveal.errors import InputError
from foveal.tasks import scoring
from foveal.tasks.local import find, read_json, wanted, wanted_texts
from foveal.tasks.reader import Asked, Part, Reader, Source, texts

_READ = "Read the text and answer the question that follows it."
_BRIEF = "Answer from the text above, in as few words as you can, and explain nothing."
_QA = f"{_READ}\n\n{{context}}\n\n{_BRIEF}\n\nQuestion: {{input}}\nAnswer:"
_PAPER = (
    f'{_READ}\n\n{{context}}\n\n{_BRIEF} Answer yes/no questions with "yes" or "no"; if the text does not hold the '
    'answer, write "unanswerable".\n\nQuestion: {input}\nAnswer:'
)
_SUMMARY = "Read the text and summarize it.\n\n{context}\n\nWrite a one-page summary of the text.\n\nSummary:"
_MEETING = (
    "Read the transcript of a meeting and answer the query that follows it.\n\n{context}\n\n"
    "Answer in one or more sentences.\n\nQuery: {input}\nAnswer:"
)
_COUNT = (
    "Some of the paragraphs below occur more than once.\n\n{context}\n\n"
    "How many different paragraphs are there? Answer with the number alone.\n\nAnswer:"
)
_WHICH = (
    "Read the numbered paragraphs.\n\n{context}\n\nWhich of them is this the abstract of?\n\n{input}\n\n"
    'Answer with the paragraph\'s number, like "Paragraph 1".\n\nAnswer:'
)
_QA_ZH = "请阅读下面的文字，并用中文简短回答问题。\n\n{context}\n\n请根据上文尽量简短地回答，不要解释。\n\n问题：{input}\n回答："  # noqa: RUF001
_SUMMARY_ZH = "请阅读下面的会议记录。\n\n{context}\n\n请总结会议的内容。\n\n总结："  # noqa: RUF001
_WHICH_ZH = "请阅读下面编号的段落。\n\n{context}\n\n下面的摘要出自哪一段？\n\n{input}\n\n请回答段落的编号，例如“段落1”。\n\n回答："  # noqa: RUF001
_CODE = "Complete the code.\n{context}{input}"

_f1 = scoring.best(scoring.token_f1)
_f1_zh = scoring.best(scoring.token_f1_zh)
_rouge = scoring.best(scoring.rouge_l)
_rouge_zh = scoring.best(scoring.rouge_l_zh)
_number = scoring.best(scoring.share_of_numbers)
_edit = scoring.best(scoring.edit_similarity)
_chinese = (_f1_zh, _rouge_zh)

_PARTS = {
    "narrativeqa": Part(_QA, _f1, 128),
    "qasper": Part(_PAPER, _f1, 128),
    "multifieldqa_en": Part(_QA, _f1, 64),
    "multifieldqa_zh": Part(_QA_ZH, _f1_zh, 64),
    "hotpotqa": Part(_QA, _f1, 32),
    "2wikimqa": Part(_QA, _f1, 32),
    "musique": Part(_QA, _f1, 32),
    "dureader": Part(_QA_ZH, _rouge_zh, 128),
    "gov_report": Part(_SUMMARY, _rouge, 512),
    "qmsum": Part(_MEETING, _rouge, 512),
    "multi_news": Part(_SUMMARY, _rouge, 512),
    "vcsum": Part(_SUMMARY_ZH, _rouge_zh, 512),
    "trec": Part("Say the type of the last question.\n\n{context}\n{input}", scoring.classification, 64, False, True),
    "triviaqa": Part("Answer the last question, briefly.\n\n{context}\n\n{input}", _f1, 32, False, True),
    "samsum": Part("Summarize the last dialogue.\n\n{context}\n\n{input}", _rouge, 128, False, True),
    "lsht": Part("请判断最后一条新闻的类别。\n\n{context}\n{input}", scoring.classification, 64, False, True),
    "passage_count": Part(_COUNT, _number, 32),
    "passage_retrieval_en": Part(_WHICH, _number, 32),
    "passage_retrieval_zh": Part(_WHICH_ZH, _number, 32),
    "lcc": Part(_CODE, _edit, 64, False),
    "repobench-p": Part(_CODE, _edit, 64, False),
}


@dataclass(frozen=True, kw_only=True)
class LongBench(Reader):
    """One set of LongBench: `get_task("longbench:hotpotqa", data="folder")`; with "_e" behind it, LongBench-E's.

    data: a folder with `hotpotqa.jsonl` (or `data/hotpotqa.jsonl`, or `data.zip`), that file, or "THUDM/LongBench".
    prompts: the benchmark's `dataset2prompt.json`; without it the prompts are Foveal's own wording, and scores are not
    to be set beside published ones. As there, few-shot and code sets are asked without the chat template, and cut in
    the middle. The Chinese sets that are scored by words need the package jieba.
    """

    name = "longbench"
    title, hub, parts = "LongBench", "THUDM/LongBench", _PARTS

    prompts: str | Path | None = None

    def __post_init__(self) -> None:
        if self._key in self.parts and self.part.scorer in _chinese:
            scoring.check_jieba()
        super().__post_init__()

    @property
    def _key(self) -> str:
        return self.subset.removesuffix("_e")

    @property
    def part(self) -> Part:
        """How this set is asked and scored, with the official prompt where its file is given."""
        part = self.parts[self._key]
        if self.prompts is None:
            return part
        return replace(part, template=_official(self._prompts(), self._key))

    def source(self):
        file = f"{self.subset}.jsonl"
        return Source([file, f"data/{file}", "data.zip"], ("data.zip", f"data/{file}"), file)

    def files(self):
        """The file with the rows, and the official prompts where they are given."""
        return super().files() + ([] if self.prompts is None else [self._prompts()])

    def _prompts(self) -> Path:
        return find(self.prompts, ["dataset2prompt.json", "config/dataset2prompt.json"], "LongBench's prompts")

    def ask(self, row):
        context, asked = wanted_texts(row, ("context", "input"), self.data)
        (answers,) = wanted(row, ("answers",), self.data)
        classes = texts(row.get("all_classes") or [])
        return context, [Asked(self.question(input=asked), texts(answers), classes)]


@cache
def _official(path: Path, subset: str) -> str:
    prompts = read_json(path)
    template = prompts.get(subset) if isinstance(prompts, dict) else None
    if not isinstance(template, str) or "{context}" not in template:
        raise InputError(f"Expected a prompt with {{context}} for '{subset}' in {path}; give the original file.")
    return template
