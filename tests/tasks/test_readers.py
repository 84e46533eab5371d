"""Readers of published benchmarks, on small files in their formats."""

import json
import zipfile

import huggingface_hub
import pytest
from test_tasks import characters, text

from foveal.errors import InputError
from foveal.tasks import get_task

CHOICES = ("choice_A", "choice_B", "choice_C", "choice_D")
LONG = " ".join(f"Paragraph {i} speaks of number {i * 7}." for i in range(200))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def longbench(folder, subset, rows=3, **fields):
    row = {"context": "The whale is white.", "input": "Which colour?", "answers": ["White"], "all_classes": None}
    return write(folder / f"{subset}.jsonl", [row | {"length": 10, "_id": str(i)} | fields for i in range(rows)])


def made(task, length=3_000, n=1, template=True, **options):
    tokenizer = characters() if template else characters(chat_template=None)
    return [
        (sample, text(tokenizer, sample.context), text(tokenizer, sample.question))
        for sample in task.samples(tokenizer, length, n, **options)
    ]


# ---------------------------------------------------------------------------- LongBench


def test_longbench_puts_the_question_after_the_context_and_scores_f1(tmp_path):
    longbench(tmp_path, "hotpotqa")
    task = get_task("longbench:hotpotqa", data=tmp_path)
    assert (task.name, task.max_new_tokens) == ("longbench:hotpotqa", 32)
    ((sample, context, question),) = made(task)
    assert context.startswith("<s><user>Read the text") and context.endswith("The whale is white.")
    assert "Question: Which colour?\nAnswer:<end>" in question
    assert task.score(sample, "It is white") == pytest.approx(2 * (1 / 3) / (1 / 3 + 1))


@pytest.mark.parametrize(
    ("subset", "tokens", "fields", "answer", "score"),
    [
        ("qasper", 128, {}, "White", 1),
        ("gov_report", 512, {"answers": ["the cat sat on the the mat"]}, "the the the cat", 0.285714),
        ("trec", 64, {"answers": ["City"], "all_classes": ["City", "State"]}, "\nCity\nState", 1),
        ("trec", 64, {"answers": ["City"], "all_classes": ["City", "State"]}, "City State", 0.5),
        ("triviaqa", 32, {}, "White\nQuestion: more words", 1),
        ("samsum", 128, {"answers": ["a b c"]}, "a b c\nDialogue: a b c d e f", 1),
        ("passage_count", 32, {"answers": ["5"]}, "5 or 6", 0.5),
        ("passage_retrieval_en", 32, {"answers": ["Paragraph 9"]}, "Paragraph 9", 1),
        ("lcc", 64, {"answers": ["x = 1"], "input": ""}, "x = 1\ny", 1),
        ("repobench-p", 64, {"answers": ["x = 1"]}, "y", 0),
        ("hotpotqa_e", 32, {"answers": ["black", "White"]}, "white", 1),
    ],
)
def test_longbench_sets_have_their_own_score_and_tokens(tmp_path, subset, tokens, fields, answer, score):
    longbench(tmp_path, subset, **fields)
    task = get_task(f"longbench:{subset}", data=tmp_path)
    ((sample, context, question),) = made(task)
    assert task.max_new_tokens == tokens
    assert task.score(sample, answer) == pytest.approx(score, abs=1e-6)
    # Few-shot and code sets go without the chat template.
    plain = subset in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
    assert ("<user>" in context) is not plain and ("<assistant>" in question) is not plain


def test_longbench_takes_the_official_prompts_where_they_are_given(tmp_path):
    longbench(tmp_path, "hotpotqa")
    prompts = tmp_path / "dataset2prompt.json"
    prompts.write_text(json.dumps({"hotpotqa": "Passages: {context} Now {input}!"}))
    task = get_task("longbench:hotpotqa", data=tmp_path, prompts=tmp_path)
    _, context, question = made(task)[0]
    assert context == "<s><user>Passages: The whale is white."
    assert question.startswith(" Now Which colour?!")
    prompts.write_text(json.dumps({"hotpotqa": "no place"}))
    other = tmp_path / "other.json"
    other.write_text(prompts.read_text())
    with pytest.raises(InputError, match=r"prompt with \{context\} for 'hotpotqa'"):
        get_task("longbench:hotpotqa", data=tmp_path, prompts=other)


def test_braces_in_the_data_are_left_alone(tmp_path):
    longbench(tmp_path, "hotpotqa", context="{input} {context} {0}", input="{context} {x}")
    _, context, question = made(get_task("longbench:hotpotqa", data=tmp_path))[0]
    assert context.endswith("{input} {context} {0}") and "Question: {context} {x}\n" in question
    row = {"context": "c", "input": "Is {B} set?", "answer": "A", "options": ["x", "{C}", "z", "w"]}
    task = get_task("infinitebench:longbook_choice_eng", data=write(tmp_path / "choice.jsonl", [row]))
    assert "Question: Is {B} set?\nA. x\nB. {C}\nC. z\n" in made(task)[0][2]


def test_contexts_are_cut_in_the_middle_to_the_length_or_passed_over(tmp_path):
    longbench(tmp_path, "hotpotqa", context=LONG)
    tokenizer = characters()
    ((sample, context, question),) = made(get_task("longbench:hotpotqa", data=tmp_path), length=1_000)
    assert 998 <= len(sample.context) + len(sample.question) + 32 <= 1_000
    body = context.split("\n\n")[1]
    half = len(body) // 2
    assert body[:half] == LONG[:half] and body[-half:] == LONG[-half:] and len(body) < len(LONG)
    assert "Question: Which colour?" in question
    task = get_task("longbench:hotpotqa", data=tmp_path, truncate=False)
    with pytest.raises(InputError, match=r"asked for 1 samples of 1,000 tokens, but only 0 of its 3 rows"):
        task.samples(tokenizer, 1_000, 1)
    assert len(task.samples(tokenizer, 9_000, 3)) == 3
    with pytest.raises(InputError, match=r"asked for 4 samples of 9,000 tokens, but only 3 of its 3 rows"):
        task.samples(tokenizer, 9_000, 4)
    with pytest.raises(InputError, match="only 0 of its 3 rows"):
        get_task("longbench:hotpotqa", data=tmp_path).samples(tokenizer, 60, 1)


def test_rows_come_in_an_order_drawn_by_the_seed(tmp_path):
    write(tmp_path / "qasper.jsonl", [{"context": f"c{i}", "input": "q", "answers": [f"a{i}"]} for i in range(20)])
    task, tokenizer = get_task("longbench:qasper", data=tmp_path), characters()
    some, all_ = task.samples(tokenizer, 1_500, 5, seed=1), task.samples(tokenizer, 1_500, 20, seed=1)
    assert some == all_[:5] and {s.target for s in all_} == {(f"a{i}",) for i in range(20)}
    assert all(sample.target == (f"a{sample.index}",) for sample in all_)
    assert [s.target for s in all_] != [s.target for s in task.samples(tokenizer, 1_500, 20, seed=2)]
    aware = task.samples(tokenizer, 1_500, 1, seed=1, query_aware=True)[0]
    assert aware.context + aware.question == some[0].context + some[0].question and len(aware.question) == 1


def test_data_may_be_a_file_a_folder_an_archive_or_on_the_hub(tmp_path, monkeypatch):
    file = longbench(tmp_path / "data", "qasper")
    archive = tmp_path / "zip" / "data.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as z:
        z.write(file, "data/qasper.jsonl")
    asked = []

    def download(repo, name, repo_type):
        asked.append((repo, name, repo_type))
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for data in (file, tmp_path, tmp_path / "data", archive, archive.parent, "THUDM/LongBench"):
        assert made(get_task("longbench:qasper", data=data))[0][0].target == ("White",)
    assert set(asked) == {("THUDM/LongBench", "data.zip", "dataset")}
    with pytest.raises(InputError, match=r"Expected trec.jsonl in the archive"):
        get_task("longbench:trec", data=archive)


def test_what_cannot_be_found_or_fetched_is_told(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match=r"could be fetched from the hub \(OSError\); give a local copy"):
        get_task("longbench:qasper", data="THUDM/LongBench")
    with pytest.raises(
        InputError, match=r"in the folder .* as qasper.jsonl or data/qasper.jsonl or data.zip, found none"
    ):
        get_task("longbench:qasper", data=tmp_path)
    with pytest.raises(InputError, match="Expected a file, a folder or a data set on the hub"):
        get_task("longbench:qasper", data=tmp_path / "nothing" / "here")
    with pytest.raises(InputError, match="needs LongBench: give its folder as `data`, or 'THUDM/LongBench'"):
        get_task("longbench:qasper")
    with pytest.raises(InputError, match=r"got 'qaspar'; did you mean 'qasper'\?"):
        get_task("longbench:qaspar", data=tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"context": "c", "input": ', "Expected a JSON object on line 3 of"),
        ("[1, 2]", "Expected a JSON object on line 3 of"),
        ("[" * 100_000, "Expected a JSON object on line 3 of .*: more brackets in brackets than can be read"),
        ('{"context": ' + "1" * 5_000 + "}", "Expected a JSON object on line 3 of .*: a number of too many digits"),
        ('{"context": "\\ud800", "input": "q", "answers": ["a"]}', "on line 3 of .*: half of a character"),
        ('{"context": "c", "input": "q"}', "Expected the field 'answers' on line 3 of .*, found context, input"),
        ('{"context": null, "input": "q", "answers": ["a"]}', "Expected a text as 'context' on line 3 of .*, got None"),
        ('{"context": "c", "input": 5, "answers": ["a"]}', "Expected a text as 'input' on line 3 of .*, got 5"),
        ('{"context": "c", "input": "q", "answers": []}', r"answers that can be scored on line 3 of .*, got \(\)"),
        ('{"context": "c", "input": "q", "answers": null}', r"answers that can be scored on line 3 of .*, got \(\)"),
    ],
)
def test_malformed_lines_are_named_before_any_work(tmp_path, line, said):
    good = json.dumps({"context": "c", "input": "q", "answers": ["a"]})
    (tmp_path / "qasper.jsonl").write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(InputError, match=said):
        get_task("longbench:qasper", data=tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("longbench:passage_count", {"answers": ["me"]}, r"answers that can be scored on line 1 .*, got \('me',\)"),
        ("infinitebench:code_run", {"answer": ["eight"]}, "answers that can be scored on line 1"),
        ("infinitebench:math_find", {"answer": "much"}, "answers that can be scored on line 1"),
        (
            "infinitebench:longbook_choice_eng",
            {"answer": "x", "options": ["x", "y", "z"]},
            "four options on line 1 .*got 3",
        ),
        (
            "scbench:choice_eng",
            {"multi_turns": [{"input": "q", "answer": "A"}]},
            "Expected the field 'options' on line 1",
        ),
        ("scbench:kv", {"multi_turns": ["q"]}, r"Expected a list of turns on line 1 of .*, got \['q'\]"),
        (
            "longbench-v2",
            {"question": "q", "answer": "E"} | dict.fromkeys(CHOICES, "c"),
            "A, B, C or D .* line 1 .*got 'E'",
        ),
        (
            "longbench-v2",
            {"question": "q", "answer": "A"} | dict.fromkeys(CHOICES, 3),
            "a text as 'choice_A' on line 1",
        ),
    ],
)
def test_answers_that_cannot_be_scored_are_named_before_any_work(tmp_path, name, row, said):
    file = write(tmp_path / "rows.jsonl", [{"context": "c", "input": "q"} | row])
    with pytest.raises(InputError, match=said):
        get_task(name, data=file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "got more brackets in brackets than can be read"),
        ('{"data": "\\udc00"}', "got half of a character"),
        ('{"data":\n}', "got an error on line 2"),
    ],
)
def test_json_that_cannot_be_used_is_told(tmp_path, text, said):
    (tmp_path / "squad.json").write_text(text)
    with pytest.raises(InputError, match=f"Expected JSON in .*squad.json.* {said}"):
        get_task("qa_1", data=tmp_path)


def test_pairs_of_surrogates_are_characters(tmp_path):
    (tmp_path / "qasper.jsonl").write_text('{"context": "\\ud83d\\ude42", "input": "q", "answers": ["a"]}\n')
    assert get_task("longbench:qasper", data=tmp_path).rows()[0]["context"] == "\U0001f642"


def test_empty_files_and_other_encodings_are_refused(tmp_path):
    file = tmp_path / "qasper.jsonl"
    file.write_text("\n\n")
    with pytest.raises(InputError, match="found an empty file"):
        get_task("longbench:qasper", data=tmp_path)
    file.write_bytes(b'{"context": "\xff"}\n')
    with pytest.raises(InputError, match=r"Expected UTF-8 text .* got byte 13"):
        get_task("longbench:qasper", data=tmp_path)


def test_chinese_word_scores_ask_for_jieba_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("foveal.tasks.scoring.importlib.util.find_spec", lambda name: None)
    longbench(tmp_path, "multifieldqa_zh")
    with pytest.raises(InputError, match="pip install jieba"):
        get_task("longbench:multifieldqa_zh", data=tmp_path)


# ---------------------------------------------------------------------------- LongBench v2


def choices(**fields):
    row = {f"choice_{x}": f"option {x}" for x in "ABCD"}
    return (
        row
        | {"context": " Text. ", "question": "Which?", "answer": "C", "difficulty": "easy", "length": "short"}
        | fields
    )


def test_longbench_v2_asks_for_a_letter_and_selects_rows(tmp_path):
    rows = [choices(), choices(difficulty="hard", length="long", answer="A")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    task = get_task("longbench-v2", data=tmp_path)
    samples = made(task, n=2)
    assert {sample.target for sample, _, _ in samples} == {("C",), ("A",)}
    sample, context, question = samples[0]
    assert context.endswith("\n\nText.") and "(B) option B\n(C) option C" in question
    assert task.score(sample, f"The correct answer is ({sample.target[0]})") == 1.0
    blind = [task.score(s, "The correct answer is (A)") for s, _, _ in samples]
    assert sorted(blind) == [0.0, 1.0]
    for subset, letter in (("hard", "A"), ("long", "A"), ("easy", "C")):
        assert made(get_task(f"longbench-v2:{subset}", data=tmp_path))[0][0].target == (letter,)
    with pytest.raises(InputError, match=r"rows of 'medium' .* found none of 2"):
        get_task("longbench-v2:medium", data=tmp_path)
    (tmp_path / "data.json").write_text('[\n{"a": 1},\n{]')
    with pytest.raises(InputError, match="got an error on line 3"):
        get_task("longbench-v2", data=tmp_path)
    (tmp_path / "data.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="Expected a list of objects"):
        get_task("longbench-v2", data=tmp_path)


# ---------------------------------------------------------------------------- InfiniteBench

OPTIONS = {"options": ["red", "white", "blue", "black"]}


@pytest.mark.parametrize(
    ("subset", "tokens", "fields", "answer", "score"),
    [
        ("passkey", 6, {"answer": "71432"}, " 71432.", 1),
        ("number_string", 12, {"answer": ["7773330001"]}, "7773330001", 1),
        ("kv_retrieval", 50, {"answer": ["ab-1"]}, '"ab-1"', 1),
        ("longbook_sum_eng", 1200, {"answer": ["the cat sat on the the mat"]}, "the the the cat", 0.545455),
        ("longbook_choice_eng", 40, {"answer": ["white"]} | OPTIONS, "B", 1),
        ("longbook_choice_eng", 40, {"answer": "B"} | OPTIONS, "white", 1),
        ("longbook_qa_eng", 40, {"answer": ["black", "white"]}, "White.", 1),
        ("longbook_qa_chn", 40, {"answer": ["白鲸"]}, "白马", 0.5),
        ("longdialogue_qa_eng", 40, {"answer": ["AHAB"]}, "Ahab", 1),
        ("math_find", 3, {"answer": 12}, "12", 1),
        ("math_find", 3, {"answer": [3.5]}, "3.5", 1),
        ("math_calc", 30_000, {"answer": [1, 4, 8]}, "[1, 4, 9]", 2 / 3),
        ("code_run", 5, {"answer": -4}, "-4", 1),
        ("code_debug", 5, {"answer": ["white", "B"]} | OPTIONS, "B. white", 1),
    ],
)
def test_infinitebench_sets_have_their_own_score_and_tokens(tmp_path, subset, tokens, fields, answer, score):
    write(tmp_path / f"{subset}.jsonl", [{"id": 0, "context": "Call me Ishmael.", "input": "Who?"} | fields])
    assert get_task(f"infinitebench:{subset}", data=tmp_path).max_new_tokens == tokens
    task = get_task(f"infinitebench:{subset}", data=tmp_path, max_new_tokens=6)
    ((sample, context, question),) = made(task)
    assert context.endswith("Call me Ishmael.") and ("D. black" in question) is ("options" in fields)
    assert task.score(sample, answer) == pytest.approx(score, abs=1e-6)
    assert task.score(sample, "") == 0.0


def test_answers_that_are_no_option_are_refused(tmp_path):
    row = {"context": "c", "input": "q", "answer": ["green"]} | OPTIONS
    write(tmp_path / "longbook_choice_eng.jsonl", [row])
    with pytest.raises(InputError, match="Expected the answer among the options on line 1"):
        get_task("infinitebench:longbook_choice_eng", data=tmp_path)


# ---------------------------------------------------------------------------- SCBench


def scbench(folder, subset, turns, **fields):
    rows = [{"id": i, "context": f"Context {i}.", "multi_turns": turns} | fields for i in range(2)]
    return write(folder / f"scbench_{subset}.jsonl", rows)


KV = [{"input": f"Key: k{i}", "answer": f"v{i}"} for i in range(3)]


def test_scbench_turns_share_one_context_and_hold_earlier_right_answers(tmp_path):
    scbench(tmp_path / "data", "kv", KV)
    samples = made(get_task("scbench:kv", data=tmp_path), n=5)
    assert [sample.turn for sample, _, _ in samples] == [0, 1, 2, 0, 1]
    assert len({sample.context for sample, _, _ in samples[:3]}) == 1 and samples[0][1] != samples[3][1]
    assert [sample.target for sample, _, _ in samples[:3]] == [("v0",), ("v1",), ("v2",)]
    assert samples[0][2] == "\n\nKey: k0<end>\n<assistant>"
    assert samples[2][2].split("<end>\n") == [
        "\n\nKey: k0",
        "<assistant>v0",
        "<user>Key: k1",
        "<assistant>v1",
        "<user>Key: k2",
        "<assistant>",
    ]


def test_scbench_requests_stand_alone(tmp_path):
    scbench(tmp_path, "kv", KV)
    task = get_task("scbench:kv", data=tmp_path, mode="requests")
    samples = made(task, n=3)
    assert [question for _, _, question in samples] == [f"\n\nKey: k{i}<end>\n<assistant>" for i in range(3)]
    assert len({sample.context for sample, _, _ in samples}) == 1
    assert [task.score(sample, "it is v1") for sample, _, _ in samples] == [0, 1, 0]


@pytest.mark.parametrize(
    ("subset", "tokens", "turn", "answer", "score"),
    [
        ("prefix_suffix", 150, {"answer": "abc"}, "xabcx", 1),
        ("vt", 30, {"answer": ["AB", "CD"]}, "ab only", 0.5),
        ("qa_eng", 40, {"answer": ["Ahab", "Captain"]}, "the captain", 1),
        ("qa_chn", 40, {"answer": "白鲸"}, "白马", 0.5),
        ("choice_eng", 40, {"answer": "B", "options": OPTIONS["options"]}, "B", 1),
        ("many_shot", 10, {"answer": ["(B)"]}, "(b)", 1),
        ("summary", 200, {"answer": "the cat sat on the the mat"}, "the the the cat", 0.545455),
        ("mf", 5, {"answer": 12}, "12.0", 1),
    ],
)
def test_scbench_sets_have_their_own_score_and_tokens(tmp_path, subset, tokens, turn, answer, score):
    scbench(tmp_path, subset, [{"input": "Which?"} | turn])
    task = get_task(f"scbench:{subset}", data=tmp_path)
    ((sample, context, question),) = made(task)
    assert (task.max_new_tokens == tokens and context.rstrip().endswith("Context 0.")) or "Context 1." in context
    assert ("C. blue" in question) is (subset == "choice_eng")
    assert task.score(sample, answer) == pytest.approx(score, abs=1e-6)


def test_scbench_mixed_sets_score_each_turn_by_its_own_task(tmp_path):
    turns = [
        {"input": "Summarize.", "answer": "the cat sat on the the mat", "task": "scbench_summary"},
        {"input": "Pass key?", "answer": "123", "task": "scbench_passkey"},
    ]
    scbench(tmp_path, "summary_with_needles", turns)
    task = get_task("scbench:summary_with_needles", data=tmp_path)
    (first, _, _), (second, _, _) = made(task, n=2)
    assert task.score(first, "the the the cat") == pytest.approx(0.545455, abs=1e-6)
    assert [task.score(second, said) for said in ("123", "It is 123 of 9", "9 123")] == [1, 1, 0]
    scbench(tmp_path, "summary_with_needles", [turns[0] | {"task": "other"}])
    with pytest.raises(InputError, match=r"as the task of a turn on line 1 .* got 'other'"):
        get_task("scbench:summary_with_needles", data=tmp_path)


def test_scbench_says_what_it_does_not_read(tmp_path):
    with pytest.raises(InputError, match="scored with parsers of six programming languages"):
        get_task("scbench:repoqa", data=tmp_path)
    scbench(tmp_path, "kv", KV, multi_turns=[])
    with pytest.raises(InputError, match="Expected a list of turns on line 1"):
        get_task("scbench:kv", data=tmp_path)
    scbench(tmp_path, "kv", [{"input": "q"}])
    with pytest.raises(InputError, match=r"Expected the field 'answer' on line 1 .*, found input; add it"):
        get_task("scbench:kv", data=tmp_path)
    with pytest.raises(InputError, match="mode to be 'turns' or 'requests', got 'both'"):
        get_task("scbench:kv", data=tmp_path, mode="both")


# ---------------------------------------------------------------------------- RULER's question answering


def squad(folder, articles=3, paragraphs=4):
    def paragraph(a, p):
        asked = {"question": f"Who rules {a}-{p}?", "answers": [{"text": f"King{a}{p}"}] * 2, "is_impossible": False}
        never = {"question": "Nobody?", "answers": [], "is_impossible": True}
        return {"context": f"In country {a}-{p} King{a}{p} rules.", "qas": [asked, never]}

    data = [{"paragraphs": [paragraph(a, p) for p in range(paragraphs)]} for a in range(articles)]
    (folder / "dev-v2.0.json").write_text(json.dumps({"data": data}))


def hotpotqa(folder):
    rows = [
        {
            "question": f"Where is {i}?",
            "answer": f"Town{i}",
            "context": [[f"Title {i}", [f"{i} is in", f" Town{i}."]], [f"Other {i}", ["Nothing."]]],
        }
        for i in range(5)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(("name", "needed", "all_"), [("qa_1", 1, 12), ("qa_2", 2, 10)])
def test_documents_hold_the_answer_among_numbered_distractors(tmp_path, name, needed, all_):
    squad(tmp_path), hotpotqa(tmp_path)
    task = get_task(name, data=tmp_path)
    for length in (900, 4_000):
        for sample, context, question in made(task, length=length, n=4):
            size = len(sample.context) + len(sample.question) + 32
            blocks = context.split("Document ")[1:]
            assert [b.split(":")[0] for b in blocks] == [str(i) for i in range(1, len(blocks) + 1)]
            assert len({b.split(":\n")[1].strip() for b in blocks}) == len(blocks)
            assert size <= length and (len(blocks) == all_ or size > length - 60) and len(blocks) >= needed
            (gold,) = sample.target
            assert context.count(gold) == 1 and gold not in question
            asked = question[question.index("Question: ") + 10 : question.index("<end>")]
            assert (gold[4:] if name == "qa_2" else f"{gold[4]}-{gold[5]}") in asked
            assert (task.score(sample, f"it is {gold.upper()}"), task.score(sample, "King")) == (1.0, 0.0)


def test_paragraphs_of_the_same_article_distract_first(tmp_path):
    squad(tmp_path)
    for sample, context, _ in made(get_task("qa_1", data=tmp_path), length=480, n=4):
        (gold,) = sample.target
        assert 1 < context.count("In country") <= 4
        assert context.count(f"In country {gold[4]}-") == context.count("In country")


def test_questions_keep_to_seed_and_count_and_those_that_fit(tmp_path):
    squad(tmp_path)
    task, tokenizer = get_task("qa_1", data=tmp_path), characters()
    assert task.samples(tokenizer, 900, 2, seed=1) == task.samples(tokenizer, 900, 6, seed=1)[:2]
    assert task.samples(tokenizer, 900, 1, seed=1) != task.samples(tokenizer, 900, 1, seed=2)
    with pytest.raises(InputError, match=r"asked for 13 samples of 900 tokens, but only 12 of its 12 questions fit"):
        task.samples(tokenizer, 900, 13)
    with pytest.raises(InputError, match="only 0 of its 12 questions fit"):
        task.samples(tokenizer, 300, 1)


def test_question_answering_needs_its_data_in_the_original_format(tmp_path):
    with pytest.raises(InputError, match=r"Task 'qa_1' needs a local SQuAD 2.0"):
        get_task("qa_1")
    with pytest.raises(InputError, match=r"HotpotQA in the folder .* as hotpotqa.json or"):
        get_task("qa_2", data=tmp_path)
    (tmp_path / "hotpotqa.json").write_text('[{"question": "q"}]')
    with pytest.raises(InputError, match=r"Expected HotpotQA in .* its fields are others \(KeyError: 'answer'\)"):
        get_task("qa_2", data=tmp_path)
    (tmp_path / "hotpotqa.json").write_text('[{"question": "q", "answer": null, "context": []}]')
    with pytest.raises(InputError, match="expected a text, got None"):
        get_task("qa_2", data=tmp_path / "hotpotqa.json")
    unanswered = {"context": "c", "qas": [{"question": "q", "answers": []}]}
    (tmp_path / "none.json").write_text(json.dumps({"data": [{"paragraphs": [unanswered]}]}))
    with pytest.raises(InputError, match=r"questions with an answer in .*, found none"):
        get_task("qa_1", data=tmp_path / "none.json")
    (tmp_path / "squad.json").write_text('{"data": []}')
    with pytest.raises(InputError, match=r"questions with an answer in .*, found none"):
        get_task("qa_1", data=tmp_path)
