"""Scorers of answers: `scorer(answer, golds, extra) -> float` from 0 to 1, each the rule of the benchmark it names.

`golds` are the accepted or required texts, `extra` what else the rule needs (the classes to choose from).
"""

import difflib
import importlib.util
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from foveal.errors import InputError

Scorer = Callable[[str, Sequence[str], Sequence[str]], float]

# Wide punctuation and quotation marks that Chinese answers are freed of.
_WIDE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"  # noqa: RUF001
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_QUOTES = "\n:\"'.,?!{}"


def string_match_all(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """RULER: the share of golds that occur in the answer, upper and lower case alike."""
    text = clean(answer)
    return sum(gold.lower() in text for gold in golds) / len(golds)


def string_match_part(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """RULER's question answering: 1 if any gold occurs in the answer, upper and lower case alike."""
    text = clean(answer)
    return float(any(gold.lower() in text for gold in golds))


def clean(answer: str) -> str:
    """RULER's reading of an answer: control characters are line breaks, ends are stripped; here also lower case."""
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()


def best(one: Callable[[str, str], float]) -> Scorer:
    """The scorer that takes the best of the golds."""

    def scorer(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
        return max(one(answer, gold) for gold in golds)

    scorer.__name__, scorer.__doc__ = one.__name__, one.__doc__
    return scorer


# ---------------------------------------------------------------------------- words in common


def normalized(text: str) -> str:
    """Lower case without punctuation, English articles and extra space (the rule of SQuAD)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def normalized_zh(text: str) -> str:
    """Lower case without punctuation, wide or narrow, and without any space."""
    return "".join(c for c in text.lower() if c not in string.punctuation + _WIDE and not c.isspace())


def _f1(answer: Sequence[str], gold: Sequence[str]) -> float:
    same = sum((Counter(answer) & Counter(gold)).values())
    return 2 * same / (len(answer) + len(gold)) if same else 0.0


def token_f1(answer: str, gold: str) -> float:
    """F1 of the words in common, after SQuAD's normalisation (LongBench, InfiniteBench)."""
    return _f1(normalized(answer).split(), normalized(gold).split())


def character_f1(answer: str, gold: str) -> float:
    """F1 of the characters in common (InfiniteBench and SCBench, Chinese)."""
    return _f1(normalized_zh(answer), normalized_zh(gold))


def token_f1_zh(answer: str, gold: str) -> float:
    """F1 of the Chinese words in common, cut by jieba (LongBench). Raises `InputError` where jieba is missing."""
    return _f1(*([w for w in map(normalized_zh, segmented(text)) if w] for text in (answer, gold)))


def segmented(text: str) -> list[str]:
    """Chinese words of a text, cut by jieba, which LongBench's scores are defined with."""
    check_jieba()
    import jieba

    return list(jieba.cut(text, cut_all=False))


def check_jieba() -> None:
    """Raises `InputError` where jieba is missing."""
    if importlib.util.find_spec("jieba") is None:
        raise InputError("Expected the package 'jieba' for the Chinese sets of LongBench; run `pip install jieba`.")


# ---------------------------------------------------------------------------- ROUGE-L


def rouge_l(answer: str, gold: str) -> float:
    """ROUGE-L F1 of whole summaries as the package `rouge` 1.0 counts it (LongBench).

    Sentences end at full stops, words are separated by spaces and counted once each, however often they occur.
    """
    hyp, ref = ([" ".join(s.split()).split(" ") for s in text.split(".") if s] for text in (answer, gold))
    if not hyp or not ref:
        return 0.0
    found: set[str] = set()
    for sentence in ref:
        for other in hyp:
            found |= {sentence[i] for i in _subsequence(sentence, other, keep_reference=True)}
    recall, precision = (len(found) / len({w for s in part for w in s}) for part in (ref, hyp))
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(answer: str, gold: str) -> float:
    """`rouge_l` of Chinese words cut by jieba (LongBench). Raises `InputError` where jieba is missing."""
    return rouge_l(" ".join(segmented(answer)), " ".join(segmented(gold)))


def rouge_l_sum(answer: str, gold: str) -> float:
    """ROUGE-Lsum F1 as the package `rouge_score` counts it, without stemming (InfiniteBench, SCBench).

    Sentences end at line breaks; words are lower-case runs of letters and digits, each matched at most once.
    """
    hyp, ref = ([re.findall(r"[a-z0-9]+", s.lower()) for s in text.split("\n") if s] for text in (answer, gold))
    left = [Counter(w for s in part for w in s) for part in (hyp, ref)]
    sizes = [part.total() for part in left]
    if not all(sizes):
        return 0.0
    hits = 0
    for sentence in ref:
        matched = set().union(*(_subsequence(sentence, other, keep_reference=False) for other in hyp))
        for i in sorted(matched):
            if all(counts[sentence[i]] > 0 for counts in left):
                hits += 1
                for counts in left:
                    counts[sentence[i]] -= 1
    return 2 * hits / sum(sizes)


def _subsequence(ref: list[str], hyp: list[str], keep_reference: bool) -> list[int]:
    """Places in `ref` of one longest common subsequence; where two are as long, the packages choose differently."""
    table = [[0] * (len(hyp) + 1) for _ in range(len(ref) + 1)]
    for i, a in enumerate(ref):
        row, above = table[i + 1], table[i]
        for j, b in enumerate(hyp):
            row[j + 1] = above[j] + 1 if a == b else max(above[j + 1], row[j])
    i, j, found = len(ref), len(hyp), []
    while i and j:
        up, left = table[i - 1][j], table[i][j - 1]
        if ref[i - 1] == hyp[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif up > left or (up == left and not keep_reference):
            i -= 1
        else:
            j -= 1
    return found


# ---------------------------------------------------------------------------- LongBench


def edit_similarity(answer: str, gold: str) -> float:
    """How alike the first line of code and the gold line are, rounded to a percent (LongBench).

    Lines with a backtick, "#" or "//" are passed over. As in fuzzywuzzy without its C extension: difflib's ratio.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, gold).ratio()) / 100 if line and gold else 0.0


def classification(answer: str, golds: Sequence[str], extra: Sequence[str]) -> float:
    """1 / number of class names in the answer if the gold is one of them, the best gold counting (LongBench).

    Names that are part of the gold's do not count, save one that follows such a name directly: the official list is
    shortened while it is walked through.
    """
    return max(_classification(answer, gold, extra) for gold in golds)


def _classification(answer: str, gold: str, classes: Sequence[str]) -> float:
    named, i = [name for name in classes if name in answer], 0
    while i < len(named):
        if named[i] in gold and named[i] != gold:
            del named[i]
        i += 1
    return 1 / len(named) if gold in named else 0.0


def share_of_numbers(answer: str, gold: str) -> float:
    """The share of the answer's whole numbers that equal the gold's last (LongBench: counting, passage retrieval)."""
    numbers, wanted = re.findall(r"\d+", answer), re.findall(r"\d+", gold)[-1]
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def letter_of_choice(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """LongBench v2: 1 if the answer says "The correct answer is (X)", brackets or not, with the gold letter."""
    text = answer.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return float(found is not None and found[1] in golds)


# ---------------------------------------------------------------------------- InfiniteBench and SCBench


def first_integer(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """1 if the first run of digits in the answer is the gold (pass keys, sequences of digits)."""
    found = re.search(r"[0-9]+", answer)
    return float(found is not None and found[0] == golds[0])


def whole_word(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """1 if the gold is one of the answer's words, quotes and punctuation aside (InfiniteBench: key-value retrieval)."""
    return float(golds[0] in _words(answer, _QUOTES))


def contains(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """1 if the gold occurs in the answer as it is (SCBench: key-value retrieval, prefix and suffix)."""
    return float(golds[0] in answer)


def contains_any(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """1 if any gold occurs in the answer, upper and lower case alike (SCBench: questions, many shots)."""
    return float(any(gold.upper() in answer.upper() for gold in golds))


def name_in_capitals(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """1 if the first gold, written in capitals, is one of the answer's words (InfiniteBench: dialogue)."""
    return float(golds[0] in [word.upper() for word in _words(answer.strip(), _QUOTES)])


def last_integer(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """1 if the answer's last word is the gold number (InfiniteBench: running code)."""
    words = _words(answer.strip(), "\n.`'\":")
    return float(bool(words) and re.fullmatch(r"[+-]?\d+", words[-1]) is not None and int(words[-1]) == int(golds[0]))


def first_number(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """1 if the first number in the answer equals the gold; for a whole gold its fraction is cut off (finding numbers)."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    if found is None:
        return 0.0
    whole = re.fullmatch(r"[+-]?\d+", golds[0]) is not None
    return float(int(float(found[0])) == int(golds[0]) if whole else float(found[0]) == float(golds[0]))


def leading_share(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """The share of golds, in order, that the answer's numbers equal up to the first difference (calculation)."""
    right = 0
    for said, gold in zip(re.findall(r"[0-9]+", answer), golds, strict=False):
        if int(said) != int(gold):
            break
        right += 1
    return right / len(golds)


def letter_or_text(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """1 if the answer picks the gold option, by its letter or its text (questions with four options).

    The first letter decides if it is one of A to D, else what follows "answer is" or "option is", else the first
    single letter.
    """
    answer = answer.strip()
    if not answer:
        return 0.0
    if answer[0] in "ABCD":
        return float(answer[0] in golds)
    if answer in golds:
        return 1.0
    text = " ".join(_words(answer, "\n\"'.,?!{}"))
    for lead in ("answer is:", "answer:", "answer is", "option is"):
        if lead in text:
            return float(text[text.index(lead) + len(lead) + 1 :].startswith(tuple(golds)))
    letter = next((word for word in text.split() if word in "ABCD"), None)
    return float(letter is not None and letter in golds)


def letter_or_function(answer: str, golds: Sequence[str], extra: Sequence[str] = ()) -> float:
    """1 if the answer begins with the gold's letter ("B." or "B:") or names letter or function after "is:"."""
    answer = answer.strip()
    name, letter = golds
    if answer[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = re.sub(r" {2,}", " ", re.sub(r"[\n`'\"*-]|[Oo]ption", " ", answer))
    for lead in ("answer is:", "is:", "answer:", "correct option is:"):
        if lead in text:
            return float(text[text.index(lead) + len(lead) + 1 :].startswith((letter, name)))
    return 0.0


def _words(text: str, marks: str) -> list[str]:
    return text.translate(str.maketrans(dict.fromkeys(marks, " "))).split()
