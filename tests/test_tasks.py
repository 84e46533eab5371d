"""Evaluation tasks: prompts split without changing their tokens, sizes kept, answers scored, all by the seed."""

import dataclasses
import math
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from foveal.data import book
from foveal.errors import InputError
from foveal.tasks import DEPTHS, get_task, tasks
from foveal.tasks.task import largest, place

CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GENERATE = ("passkey", "needle")


def characters(chat_template=CHAT, merges=(), limit=None):
    """A tokenizer of single bytes (and some pairs) that puts `<s>` in front by itself, as Llama's does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", *letters, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    options = {} if limit is None else {"model_max_length": limit}
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=chat_template, **options)


def text(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_the_book_is_whole():
    assert len(book().encode()) == 1_194_443
    assert book().startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
    assert book().rstrip().endswith("only found another orphan.")


def test_every_task_is_listed_and_made_by_name():
    assert list(tasks())[:3] == ["passkey", "needle", "perplexity"] and len(tasks()) == 27
    assert get_task("needle", per_context=2, max_new_tokens=9) == tasks()["needle"](per_context=2, max_new_tokens=9)
    for name, task in tasks().items():
        assert task.name == name and task.__doc__
        assert (task.kind, task.better) == (("nll", "lower") if "perplexity" in name else ("generate", "higher"))
        if not task.needs_data:
            assert get_task(name).name == name


def test_unknown_names_and_options_suggest_the_nearest():
    with pytest.raises(InputError, match=r"got 'neddle'; did you mean 'needle'\?"):
        get_task("neddle")
    with pytest.raises(InputError, match="choose from passkey, needle, perplexity"):
        get_task("qqq")
    with pytest.raises(InputError, match=r"no option 'per_contxt'; did you mean 'per_context'\?"):
        get_task("needle", per_contxt=2)
    with pytest.raises(InputError, match="Task 'needle' has no option 'subset'"):
        get_task("needle:hard")
    with pytest.raises(InputError, match="per_context from 1 to 5"):
        get_task("needle", per_context=6)
    with pytest.raises(InputError, match="max_new_tokens to be a positive whole number, got 0"):
        get_task("perplexity", max_new_tokens=0)


@pytest.mark.parametrize("limit", range(10, 300, 7))
def test_the_largest_that_fits_is_found_for_any_slope(limit):
    for size in (lambda k: k, lambda k: 5 + 3 * k, lambda k: 9 + int(k**1.5), lambda k: 9 + int(20 * math.log(k + 1))):
        best = max((k for k in range(1, 4_000) if size(k) <= limit), default=None)
        if limit < 100 or size(3_999) > limit:
            assert largest(size, 1, limit) == best
        assert largest(size, 1, limit, 30) == (None if best is None else min(best, 30))
        assert largest(size, 500, 10) is None


@pytest.mark.parametrize("name", GENERATE)
def test_a_prompt_holds_its_fact_at_its_depth_and_asks_for_it_after_the_context(name):
    tokenizer = characters()
    for sample in get_task(name, per_context=5).samples(tokenizer, 4_000, 10, seed=3):
        context, question = text(tokenizer, sample.context), text(tokenizer, sample.question)
        assert context.startswith("<s><user>") and context.count("<s>") == 1
        asked = re.fullmatch(
            r"What is the (.+?)\?(?: Answer with the number\.)?<end>\n<assistant>The (.+) is", question
        )
        assert asked and asked[1] == asked[2]
        fact = f"The {asked[1]} is {sample.target}."
        assert context.count(fact) == 1 and asked[1] not in question.replace(asked[1], "", 2)
        assert context.index(fact) / len(context) == pytest.approx(sample.depth, abs=0.15)


@pytest.mark.parametrize("name", GENERATE)
def test_five_samples_share_one_context_and_cover_the_depths(name):
    samples = get_task(name, per_context=5).samples(characters(), 3_000, 10)
    assert [sample.depth for sample in samples] == [*DEPTHS, *DEPTHS]
    assert len({sample.context for sample in samples[:5]}) == 1
    assert samples[0].context != samples[5].context
    assert len({sample.target for sample in samples}) == len({sample.question for sample in samples[:5]}) * 2 == 10


@pytest.mark.parametrize("name", GENERATE)
def test_one_fact_a_document_still_covers_the_depths(name):
    samples = get_task(name, per_context=1).samples(characters(), 2_000, 6)
    assert [sample.depth for sample in samples] == [*DEPTHS, DEPTHS[0]]
    assert len({sample.context for sample in samples}) == 6


@pytest.mark.parametrize("name", ["passkey", "needle", "perplexity"])
@pytest.mark.parametrize("length", [1_500, 1_777])
def test_samples_fill_the_length_and_no_more(name, length):
    task = get_task(name)
    sizes = [len(s.context) + len(s.question) + task.max_new_tokens for s in task.samples(characters(), length, 5)]
    # One more line of filler, or one more sentence of the novel, would be too long.
    slack = {"passkey": 100, "needle": 1_000, "perplexity": 0}[name]
    assert all(length - slack <= size <= length for size in sizes)


@pytest.mark.parametrize("name", ["passkey", "needle", "perplexity"])
def test_a_sample_depends_on_the_seed_and_not_on_how_many_there_are(name):
    task, tokenizer = get_task(name), characters()
    assert task.samples(tokenizer, 2_000, 3, seed=1) == task.samples(tokenizer, 2_000, 8, seed=1)[:3]
    assert task.samples(tokenizer, 2_000, 1, seed=1)[0].context != task.samples(tokenizer, 2_000, 1, seed=2)[0].context


@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_query_aware_moves_the_question_into_the_context(name):
    task, tokenizer = get_task(name), characters()
    for after, before in zip(
        task.samples(tokenizer, 2_000, 3), task.samples(tokenizer, 2_000, 3, query_aware=True), strict=True
    ):
        assert before.context + before.question == after.context + after.question
        assert (len(before.question), before.target) == (1, after.target)


@pytest.mark.parametrize("template", [CHAT, None])
def test_tokens_that_span_the_boundary_go_to_the_question(template):
    # The passkey document ends in a line break and its question begins with W: here they are one token.
    tokenizer = characters(template, merges=[("Ċ", "W")])
    sample = get_task("passkey").samples(tokenizer, 1_200, 1)[0]
    assert text(tokenizer, sample.question[:1]) == "\nW"
    whole = text(tokenizer, sample.context + sample.question).removeprefix("<s>")
    assert list(sample.context + sample.question) == tokenizer(whole)["input_ids"]


def test_without_a_chat_template_the_prompt_is_plain_and_begins_once():
    tokenizer = characters(chat_template=None)
    sample = get_task("passkey").samples(tokenizer, 1_200, 1)[0]
    assert text(tokenizer, sample.context).startswith("<s>There is important information")
    assert text(tokenizer, sample.question) == "What is the pass key? Answer with the number.\nThe pass key is"


def test_a_template_that_rewrites_the_prompt_is_refused():
    with pytest.raises(InputError, match="keeps the prompt as it is"):
        get_task("passkey").samples(characters(CHAT.replace("['content']", "['content'] | upper")), 2_000, 1)


@pytest.mark.parametrize(
    ("answer", "score"),
    [(" 12345.", 1), ("12345", 1), ("54321, no, 12345", 0), ("123456", 0), ("In 1851 it was 12345", 1), ("", 0)],
)
def test_the_first_number_with_the_right_count_of_digits_is_the_answer(answer, score):
    task = get_task("passkey")
    sample = dataclasses.replace(task.samples(characters(), 1_200, 1)[0], target="12345")
    assert task.score(sample, answer) == score


def test_perplexity_is_one_stretch_of_the_book_cut_before_the_targets():
    tokenizer = characters()
    for sample in get_task("perplexity", max_new_tokens=20).samples(tokenizer, 500, 4, seed=5):
        assert (len(sample.context), len(sample.question), len(sample.target)) == (479, 1, 20)
        stretch = text(tokenizer, sample.context + sample.question + sample.target)
        assert stretch.startswith("<s>") and stretch[3:] in book()


def test_perplexity_reaches_round_the_end_of_the_book():
    tokenizer = characters()
    near_the_end = next(seed for seed in range(10_000) if 0.996 < place(seed, 0) < 0.998)
    sample = get_task("perplexity").samples(tokenizer, 5_000, 1, near_the_end)[0]
    stretch = text(tokenizer, sample.context + sample.question + sample.target)[3:]
    assert "only found another orphan" in stretch and "Call me Ishmael" in stretch
    with pytest.raises(InputError, match=r"The book has 1,19\d,\d{3} tokens, but the length is 1,300,000"):
        get_task("perplexity").samples(tokenizer, 1_300_000, 1)


def test_perplexity_scores_the_mean_in_nats():
    task = get_task("perplexity", max_new_tokens=2)
    sample = task.samples(characters(), 50, 1)[0]
    assert task.score(sample, [math.log(2), math.log(8)]) == pytest.approx(math.log(4))
    with pytest.raises(InputError, match="each of 2 target tokens, got 1"):
        task.score(sample, [1.0])


@pytest.mark.parametrize("name", ["passkey", "needle", "perplexity"])
def test_lengths_out_of_range_name_the_numbers(name):
    task = get_task(name)
    with pytest.raises(InputError, match=r"needs at least [\d,]+ .*length is 40; ask for"):
        task.samples(characters(), 40, 1)
    with pytest.raises(InputError, match=r"asked for 3,001 tokens, but the model has 3,000 positions"):
        task.samples(characters(limit=3_000), 3_001, 1)
    with pytest.raises(InputError, match=r"asked for 3,001 tokens, but the model has 512 positions"):
        task.samples(characters(), 3_001, 1, positions=512)
    for length, n, said in ((0, 1, "length"), (1_000, 0, "n"), (1e3, 1, "length"), (True, 1, "length")):
        with pytest.raises(InputError, match=f"Expected {said} to be a positive whole number"):
            task.samples(characters(), length, n)


@pytest.mark.model
def test_default_model_finds_pass_key_and_needle(default_model):
    model, tokenizer = default_model
    for name in GENERATE:
        task = get_task(name)
        sample = task.samples(tokenizer, 512, 3)[2]
        prompt = sample.context + sample.question
        tokens = model.dummy_inputs["input_ids"].new_tensor([prompt])
        answer = model.generate(tokens, max_new_tokens=task.max_new_tokens, do_sample=False)[0, len(prompt) :]
        assert task.score(sample, tokenizer.decode(answer)) == 1.0
