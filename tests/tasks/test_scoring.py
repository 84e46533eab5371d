"""Scorers against values of the packages the benchmarks use, and against answers worked out by hand."""

import sys
import types

import pytest

from foveal.errors import InputError
from foveal.tasks import scoring as s

# ROUGE-L of the package rouge 1.0.1 and ROUGE-Lsum of rouge_score 0.1.2, on the same pairs.
ROUGE = [
    (
        "The whale rose. It sank the boat and the crew swam.\nAhab was lost.",
        "Ahab was lost when the whale sank the boat.\nThe crew swam. One man lived.",
        0.740741,
        0.758621,
    ),
    ("a b c d e", "e d c b a", 0.2, 0.2),
    ("the the the cat", "the cat sat on the the mat", 0.285714, 0.545455),
    ("one two. three four\nfive", "three four. five one two", 1.0, 0.6),
    ("nothing", "else. at all", 0.0, 0.0),
    ("x y z a b c", "a b c x y z. x z", 0.5, 0.428571),
    ("", "a", 0.0, 0.0),
]


@pytest.mark.parametrize(("answer", "gold", "plain", "summary"), ROUGE)
def test_rouge_equals_the_packages(answer, gold, plain, summary):
    assert s.rouge_l(answer, gold) == pytest.approx(plain, abs=1e-6)
    assert s.rouge_l_sum(answer, gold) == pytest.approx(summary, abs=1e-6)


def test_edit_similarity_equals_fuzzywuzzy_and_takes_the_first_line_of_code():
    assert s.edit_similarity("return self.items[key]", "return self._items.get(key)") == 0.82
    assert s.edit_similarity("for i in range(10):", "while i < 10:") == 0.44
    assert s.edit_similarity("\n```python\n# comment\n// other\nx = 1\ny = 2", "x = 1") == 1.0
    assert s.edit_similarity("# only a comment", "x = 1") == 0.0


def test_string_matches_of_ruler():
    assert s.string_match_all(" 12, ABC\x00 and 7", ("12", "abc", "99")) == pytest.approx(2 / 3)
    assert s.string_match_part("It was the White Whale.", ("ahab", "white whale")) == 1.0
    assert s.string_match_part("Nobody.", ("ahab", "white whale")) == 0.0
    assert s.string_match_all("a\x01b", ("a\nb",)) == 1.0  # control characters are line breaks


def test_token_f1_forgets_case_articles_and_punctuation():
    assert s.token_f1("The White Whale!", "a white whale") == 1.0
    assert s.token_f1("the white whale and ahab", "whale") == pytest.approx(2 * (1 / 4) * 1 / (1 / 4 + 1))
    assert s.token_f1("", "whale") == 0.0
    assert s.best(s.token_f1)("ahab", ("whale", "ahab")) == 1.0


def test_chinese_is_scored_by_characters_or_words(monkeypatch):
    assert s.character_f1("白鲸 。", "白鲸") == 1.0
    assert s.character_f1("白马", "白鲸") == 0.5
    words = types.SimpleNamespace(cut=lambda text, cut_all: [text[i : i + 2] for i in range(0, len(text), 2)])
    monkeypatch.setitem(sys.modules, "jieba", words)
    monkeypatch.setattr(s.importlib.util, "find_spec", lambda name: object())
    assert s.token_f1_zh("白鲸出现\uff0c", "白鲸") == pytest.approx(2 / 3)
    assert s.rouge_l_zh("白鲸出现", "白鲸出现") == pytest.approx(1)
    monkeypatch.setattr(s.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install jieba"):
        s.token_f1_zh("白鲸", "白鲸")


def test_classification_divides_by_the_classes_named():
    classes = ("Other location", "location", "City", "State")
    assert s.classification("It is City.", ("City",), classes) == 1.0
    assert s.classification("City or State", ("City",), classes) == 0.5
    assert s.classification("State", ("City",), classes) == 0.0
    # "location" is part of the gold and does not count, "Other location" does.
    assert s.classification("Other location", ("Other location",), classes) == 1.0
    # Two parts of the gold in a row: the official loop skips the second.
    assert s.classification("a b ab", ("ab",), ("a", "b", "ab")) == 0.5


def test_numbers():
    assert s.share_of_numbers("Paragraph 3, or 4", "Paragraph 3") == 0.5
    assert s.share_of_numbers("段落12", "段落12") == 1.0
    assert s.share_of_numbers("none", "5") == 0.0
    assert s.first_integer("The key is 71432.", ("71432",)) == 1.0
    assert s.first_integer("In 1851: 71432", ("71432",)) == 0.0
    assert s.last_integer("The value is: -12.", ("-12",)) == 1.0 and s.last_integer("12 it is", ("12",)) == 0.0
    assert s.first_number("It is 12.0", ("12",)) == 1.0 and s.first_number("3.5", ("3.5",)) == 1.0
    assert s.first_number("13", ("12",)) == 0.0 and s.first_number("", ("12",)) == 0.0
    assert s.leading_share("[1, 3, 9, 4]", ("1", "3", "8", "4")) == 0.5
    assert s.leading_share("", ("1",)) == 0.0


def test_words():
    assert s.whole_word('"ab-1".', ("ab-1",)) == 1.0 and s.whole_word("ab-12", ("ab-1",)) == 0.0
    assert s.contains("xab-12", ("ab-1",)) == 1.0 and s.contains("AB-1", ("ab-1",)) == 0.0
    assert s.contains_any("it is ahab", ("STARBUCK", "Ahab")) == 1.0
    assert s.name_in_capitals("Ahab: yes", ("AHAB",)) == 1.0 and s.name_in_capitals("Ahabs", ("AHAB",)) == 0.0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("B", 1),
        ("B. the whale", 1),
        ("C", 0),
        ("the whale", 1),
        ("I think the answer is B", 1),
        ("I think the answer is:", 0),
        ("The correct option is C", 0),
        ("perhaps B", 1),
        ("", 0),
        ("none of them", 0),
    ],
)
def test_choices_by_letter_or_text(answer, score):
    assert s.letter_or_text(answer, ("the whale", "B")) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [("B.", 1), ("B: f", 1), ("C.", 0), ("The answer is: B", 1), ("Answer is: run", 1), ("It is: C", 0), ("B", 0)],
)
def test_faulty_functions_by_letter_or_name(answer, score):
    assert s.letter_or_function(answer, ("run", "B")) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("The correct answer is (B).", 1),
        ("**The correct answer is B**", 1),
        ("The correct answer is (C)", 0),
        ("B", 0),
    ],
)
def test_the_letter_of_longbench_v2(answer, score):
    assert s.letter_of_choice(answer, ("B",)) == score
