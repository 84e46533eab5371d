"""Generated tasks: sizes, seeds, gold answers, a perfect reader and a blind one, the protocol's counts and places."""

import functools
import json
import math
import random
import re
from collections import Counter
from itertools import pairwise

import pytest
from oracle import answer
from test_tasks import characters, text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveal.data import book
from foveal.errors import InputError
from foveal.tasks import RULER_11, RULER_13, get_task, tasks, words

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
GENERATED = [name for name, task in tasks().items() if task.kind == "generate" and not task.needs_data]
# Enough characters, which are the tokens here, for the largest of the smallest prompts.
LENGTH = {"vt": 3_000, "cwe": 4_000, "arithmetic": 2_000}
PIECE = {"niah": 1_000, "needle": 1_000, "multi-needle": 1_000, "multi-turn": 1_200}  # the longest sentences


@functools.cache
def made(name, n=3, seed=0, length=None, **options):
    task, tokenizer = get_task(name, **options), characters()
    return task, [
        (sample, text(tokenizer, sample.context), text(tokenizer, sample.question))
        for sample in task.samples(tokenizer, length or LENGTH.get(name, 2_500), n, seed)
    ]


def words_as_tokens():
    """A tokenizer that counts words and cannot tell them apart."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize("name", GENERATED)
def test_a_perfect_reader_scores_all_and_a_blind_one_nothing(name):
    task, samples = made(name, n=6)
    for i, (sample, context, question) in enumerate(samples):
        assert task.score(sample, answer(name, context + question)) == 1.0
        assert task.score(sample, "") == 0.0
        assert task.score(sample, "I do not know.") == 0.0
        others = [s for s, _, _ in samples[:i] + samples[i + 1 :] if set(_golds(s)).isdisjoint(_golds(sample))]
        assert all(task.score(sample, " ".join(_golds(other))) < 1.0 for other in others)


@pytest.mark.parametrize("name", GENERATED)
def test_the_answer_is_in_the_context_and_not_in_the_question(name):
    task, samples = made(name)
    for sample, context, question in samples:
        if name != "arithmetic":  # whose results are worked out
            assert all(gold in context for gold in _golds(sample))
            assert task.score(sample, question[question.rfind("<user>") :]) < 1.0
        assert question.strip()


@pytest.mark.parametrize("name", GENERATED)
def test_samples_fill_the_length_and_no_more(name):
    task, samples = made(name)
    length, group = LENGTH.get(name, 2_500), getattr(task, "per_context", 1)
    sizes = [len(s.context) + len(s.question) + task.max_new_tokens for s, _, _ in samples]
    assert max(sizes) <= length
    if name != "arithmetic":  # whose steps are as many as fit the answer
        assert max(sizes) >= length - PIECE.get(name, 150) or group > 1


@pytest.mark.parametrize("name", GENERATED)
def test_samples_depend_on_the_seed_and_not_on_how_many_there_are(name):
    task, tokenizer, length = get_task(name), characters(), LENGTH.get(name, 2_500)
    assert task.samples(tokenizer, length, 2, seed=1) == task.samples(tokenizer, length, 5, seed=1)[:2]
    other = task.samples(tokenizer, length, 1, seed=2)[0]
    assert task.samples(tokenizer, length, 1, seed=1)[0].target != other.target


@pytest.mark.parametrize("name", GENERATED)
def test_query_aware_leaves_one_token_to_feed(name):
    task, tokenizer, length = get_task(name), characters(), LENGTH.get(name, 2_500)
    after, before = (task.samples(tokenizer, length, 1, query_aware=aware)[0] for aware in (False, True))
    assert after.context + after.question == before.context + before.question
    assert (len(before.question), before.target) == (1, after.target)


@pytest.mark.parametrize("name", GENERATED)
def test_lengths_out_of_range_are_refused(name):
    with pytest.raises(InputError, match=r"needs at least [\d,]+ tokens .*length is 90; ask for more"):
        get_task(name).samples(characters(), 90, 1)
    with pytest.raises(InputError, match="the model has 512 positions"):
        get_task(name).samples(characters(), 3_000, 1, positions=512)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("needle", {"per_context": "2"}, "Task 'needle' wants a whole number as 'per_context', got '2'"),
        ("needle", {"per_context": 2.0}, r"a whole number as 'per_context', got 2\.0"),
        ("niah", {"depths": True}, "a whole number as 'depths', got True"),
        ("vt", {"hops": "a"}, "a whole number as 'hops', got 'a'"),
        ("vt", {"hops": -3}, "hops to be a whole number from 1 to 100, got -3"),
        ("vt", {"hops": 20_000}, "hops to be a whole number from 1 to 100, got 20000"),  # there are not so many names
        ("key-perplexity", {"short": "x"}, "a number as 'short', got 'x'"),
        ("qa_1", {"data": 5}, "a file or a folder as a text as 'data', got 5"),
        ("longbench", {"subset": 5, "data": "."}, "a text as 'subset', got 5"),
        ("longbench:qasper", {"truncate": "no", "data": "."}, "True or False as 'truncate', got 'no'"),
    ],
)
def test_options_of_another_type_are_refused(name, options, said):
    with pytest.raises(InputError, match=said):
        get_task(name, **options)


def test_whole_numbers_are_numbers_and_defaults_are_taken():
    assert get_task("key-perplexity", gain=1, max_new_tokens=256).gain == 1


def _golds(sample):
    return [sample.target] if isinstance(sample.target, str) else sample.target


# ---------------------------------------------------------------------------- words and suite


def test_every_word_is_in_the_book():
    known = set(re.findall(r"[A-Za-z]+", book()))
    for group in (words.ADJECTIVES, words.NOUNS, words.FOODS, words.CITIES):
        assert known.issuperset(group) and len(set(group)) == len(group)
    assert len(words.ADJECTIVES) * len(words.NOUNS) > 50_000 and len(words.vocabulary()) > 12_000
    assert not {"which", "whale-boat", "don"} & set(words.vocabulary())


def test_the_suite_has_eleven_tasks_and_two_that_need_data():
    assert len(RULER_11) == 11 and set(RULER_13) - set(RULER_11) == {"qa_1", "qa_2"}
    assert {tasks()[name].label for name in RULER_13} == {"RULER-style, regenerated"}
    assert [get_task(name).max_new_tokens for name in RULER_11] == [128] * 8 + [30, 120, 50]


# ---------------------------------------------------------------------------- the eight needles

NEEDLES = {  # haystack, needles in it, golds, digits or characters of a value
    "niah_single_1": ("noise", 1, 1, 7),
    "niah_single_2": ("prose", 1, 1, 7),
    "niah_single_3": ("prose", 1, 1, 36),
    "niah_multikey_1": ("prose", 4, 1, 7),
    "niah_multikey_2": ("needles", None, 1, 7),
    "niah_multikey_3": ("needles", None, 1, 36),
    "niah_multivalue": ("prose", 4, 4, 7),
    "niah_multiquery": ("prose", 4, 4, 7),
}


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_are_as_many_and_as_long_as_the_protocol_says(name):
    haystack, count, golds, size = NEEDLES[name]
    for sample, context, question in made(name)[1]:
        found = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", context)
        assert len(sample.target) == golds and {len(value) for _, _, value in found} == {size}
        assert len({value for _, _, value in found}) == len(found)
        kind = "numbers" if size == 7 else "uuids"
        assert {said for said, _, _ in found} == {kind}
        body = context[context.index("afterwards.\n") + 12 :].rstrip("\n")
        if haystack == "needles":
            assert len(found) == len(body.split("\n")) > 15
        else:
            assert len(found) == count
        if haystack == "noise":
            lines = Counter(body.split("\n"))
            noise, n = lines.most_common(1)[0]
            assert noise == NOISE
            assert n == lines.total() - 1
        keys = [key for _, key, _ in found]
        if name == "niah_multivalue":
            assert len(set(keys)) == 1
        else:
            assert len(set(keys)) == len(keys) or haystack == "needles"
            asked = [key for key in keys if key in question]
            assert len(asked) == golds
        one = golds == 1
        assert ("A special magic" in context) is one and (" are all " in question) is not one
        assert (f"magic {kind.removesuffix('s')} for" in question) is one


def test_needles_in_prose_stand_between_sentences_at_their_depths_among_forty():
    flat = [" ".join(sentence.split()) for sentence in words.sentences() if sentence.strip()]
    for name in ("niah_single_2", "niah_multikey_1"):
        for sample, context, _ in made(name, n=4)[1]:
            body = context[context.index("afterwards.\n") + 12 : -1]
            parts = re.split(r" ?One of the special magic numbers for \S+ is: (\d{7})\. ?", body)
            prose = " ".join(part for part in parts[::2] if part)
            start = next(i for i in range(len(flat)) if prose.startswith(" ".join(flat[i : i + 3])))
            ends, joined = [0], ""
            while len(joined) < len(prose):  # the last sentence may be cut
                joined = f"{joined} {flat[(start + len(ends) - 1) % len(flat)]}".strip()
                ends.append(min(len(joined), len(prose)))
            assert joined.startswith(prose)
            before = " ".join(part for part in parts[: 2 * parts[1::2].index(sample.target[0]) + 1 : 2] if part)
            assert round(sample.depth * 100) in {round(100 * i / 39) for i in range(40)}
            assert len(before) == ends[int((len(ends) - 1) * sample.depth + 1e-9)]


def test_needles_between_lines_stand_at_their_depth():
    for name in ("niah_single_1", "niah_multikey_2"):
        for sample, context, _ in made(name, n=6)[1]:
            lines = context[context.index("afterwards.\n") + 12 : -1].split("\n")
            at = next(i for i, line in enumerate(lines) if sample.target[0] in line)
            assert sample.depth == at / (len(lines) - 1)


def test_depths_differ_between_samples():
    assert len({sample.depth for sample, _, _ in made("niah_single_2", n=10)[1]}) > 5


# ---------------------------------------------------------------------------- variables and counts


def test_variables_form_one_chain_of_four_hops_in_order_after_an_example():
    for sample, context, question in made("vt", n=4)[1]:
        example, text = context.split("Memorize and track")[1:]
        for part, letters in ((example, 3), (text, 5)):
            chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", part)
            assert len(chain) == 5 and {len(name) for name, _ in chain} == {letters}
            assert chain[0][1].isdigit() and len(chain[0][1]) == 5
            assert all(after[1] == before[0] for before, after in pairwise(chain))
        assert sample.target == tuple(name for name, _ in chain)
        assert f"assigned the value {chain[0][1]}" in question and "5 variables" in question
        assert all(name in example.split("they are:")[1] for name, _ in re.findall(r"VAR (\w+) = (\w+)", example))
        assert example.count("The grass is green.") == 5  # the fewest, for 500 characters do not hold them


def test_the_example_of_variable_tracking_takes_at_most_five_hundred_tokens():
    tokenizer = words_as_tokens()
    example = get_task("vt")._example(tokenizer, random.Random(0))
    assert 500 - len(NOISE.split()) < len(example.split()) <= 500


@pytest.mark.parametrize(("length", "many", "few", "example"), [(4_000, 6, 1, (20, 3, 1)), (9_000, 30, 3, (40, 10, 3))])
def test_common_words_stand_as_often_as_the_protocol_says(length, many, few, example):
    for sample, context, _ in made("cwe", n=2, length=length)[1]:
        shots = context.split("Below is a numbered list")[1:]
        for part, (m, f, n) in zip(shots, ((*example[1:], example[0]), (many, few, None)), strict=True):
            listed = part[: part.find("Question:")] if "Question:" in part else part
            numbers, found = zip(*re.findall(r"(\d+)\. (\w+)", listed), strict=True)
            assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))
            counts = Counter(found)
            assert Counter(counts.values()) == {m: 10, f: len(counts) - 10}
            assert n is None or len(counts) == n
        assert set(sample.target) == {word for word, count in counts.items() if count == many}


def test_coded_words_follow_the_zeta_law():
    for sample, context, _ in made("fwe", n=3, length=6_000)[1]:
        found = context[context.index("coded words. ") + 13 :].split()
        counts = Counter(found)
        assert counts.most_common(1)[0][0] == "..." and all(len(w) == 6 for w in counts if w != "...")
        # All counts follow from M alone; look for it near what the first count says.
        near = int(counts["..."] * math.pi**2 / 6)
        ranks = range(1, (6_000 - 50) // 50 + 1)
        laws = [[c for k in ranks if (c := int(m / k**2 / (math.pi**2 / 6)))] for m in range(near, near + 4)]
        assert sorted(counts.values(), reverse=True) in laws
        assert list(sample.target) == [w for w, _ in counts.most_common(4)[1:]]
        assert counts[sample.target[2]] > counts.most_common(5)[4][1]


# ---------------------------------------------------------------------------- the other tasks


def test_the_grid_goes_round_its_depths_and_needles_follow_the_end_of_a_sentence():
    task, samples = made("niah", n=8, depths=4, length=4_000)
    assert [sample.depth for sample, _, _ in samples] == [0, 1 / 3, 2 / 3, 1] * 2
    for sample, context, _ in samples:
        body = context[context.index("<user>") + 6 :]
        needle = re.search(r"The best thing to do in \w+ is to eat [^.]+\. ?", body)
        rest = body[: needle.start()] + body[needle.end() :]
        assert needle.start() <= sample.depth * len(rest) + 1
        assert needle.start() >= sample.depth * len(rest) - 1_000
        assert needle.start() == 0 or re.search(r"[.?!][\"')]*\s*$", body[: needle.start()])
    with pytest.raises(InputError, match="depths to be a whole number from 2 on, got 1"):
        get_task("niah", depths=1)
    golds = samples[0][0].target
    assert task.score(samples[0][0], f"eat {golds[0].upper()} all day") == pytest.approx(1 / 3)


def test_several_needles_are_spread_over_the_text():
    for sample, context, question in made("multi-needle", n=4, needles=4, length=6_000)[1]:
        at = [context.index(f"perfect pie is {food}.") / len(context) for food in sample.target]
        assert all(i / 4 - 0.25 <= x <= (i + 1) / 4 + 0.1 for i, x in enumerate(at)) and at == sorted(at)
        assert "4 secret ingredients" in question
    with pytest.raises(InputError, match="needles to be a whole number from 2 to 10, got 1"):
        get_task("multi-needle", needles=1)


def test_turns_share_one_context_and_hold_the_right_answers_before():
    _, samples = made("multi-turn", n=8, length=4_000)
    for group in (samples[:4], samples[4:]):
        assert len({sample.context for sample, _, _ in group}) == 1
        assert [sample.turn for sample, _, _ in group] == [0, 1, 2, 3]
        assert len({sample.depth for sample, _, _ in group}) == 4
        for i, (sample, _, question) in enumerate(group):
            assert question.count("<user>") == question.count("<assistant>") - 1 == i
            earlier = [s.target for s, _, _ in group[:i]]
            assert re.findall(r"is (\d{7})<end>", question) == earlier and sample.target not in question
    orders = [[sample.depth for sample, _, _ in made("multi-turn", n=4, seed=seed)[1]] for seed in range(4)]
    assert any(order != sorted(order) for order in orders)


def test_turns_without_a_chat_template_are_plain_text():
    tokenizer = characters(chat_template=None)
    sample = get_task("multi-turn").samples(tokenizer, 3_000, 2)[1]
    assert re.fullmatch(
        r"What is the magic number of the (\w+)\?\nThe magic number of the \1 is \d{7}\n\n"
        r"What is the magic number of the (\w+)\?\nThe magic number of the \2 is",
        text(tokenizer, sample.question),
    )


def test_retrieve_kv_is_a_json_object_that_holds_the_pair_at_its_depth():
    for sample, context, question in made("retrieve-kv", n=5, length=5_000)[1]:
        pairs = json.loads(context[context.index("{") : context.rindex("}") + 1])
        key = re.search(r'Key: "([^"]+)"', question)[1]
        assert pairs[key] == sample.target and len(pairs) > 40
        assert list(pairs).index(key) / len(pairs) == pytest.approx(sample.depth, abs=0.03)


def test_retrieve_number_repeats_digits_and_wants_all_ten():
    task, samples = made("retrieve-number", n=6)
    for sample, _, _ in samples:
        assert re.fullmatch(r"\d{10}", sample.target) and re.search(r"(.)\1", sample.target)
        assert task.score(sample, sample.target[:9]) == 0 and task.score(sample, f" {sample.target}.") == 1


def test_arithmetic_stays_below_a_hundred_and_counts_what_is_right_in_order():
    task, samples = made("arithmetic", n=3)
    for sample, context, question in samples:
        results = list(map(int, sample.target))
        assert all(0 <= result <= 99 for result in results) and len(results) >= 20
        said = answer("arithmetic", context + question).split("\n")
        assert len("\n".join(said)) <= task.max_new_tokens < len("\n".join(said)) + 30
        wrong = "\n".join([*said[:5], "0 + 0 = 100", *said[6:]])
        assert task.score(sample, wrong) == 5 / len(results)
        assert task.score(sample, "\n".join(said[:7])) == 7 / len(results)
    short, _ = made("arithmetic", n=1, length=900)[1][0][0], None
    assert len(short.target) < len(samples[0][0].target)  # a short length leaves room for fewer changes
