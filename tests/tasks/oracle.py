"""A reader with perfect recall for every generated task: it reads the prompt's text and nothing else."""

import re
from collections import Counter


def answer(name: str, prompt: str) -> str:
    """The answer to a prompt, found in its text."""
    if name.startswith("niah_"):
        query = re.search(r"for ([^?]+) mentioned in", prompt[prompt.rindex("What ") :])[1]
        asked = re.split(r", and |, ", query)
        return " ".join(
            v for k, v in re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", prompt) if k in asked
        )
    return globals()[f"_{name.replace('-', '_')}"](prompt)


def _passkey(prompt):
    what = re.findall(r"What is the ([^?]+)\?", prompt)[-1]
    return re.search(rf"The {what} is (\d+)\. Remember it", prompt)[1]


_retrieve_number = _passkey


def _needle(prompt):
    key = re.findall(r"What is the magic number of the (\w+)\?", prompt)[-1]
    return re.search(rf"The magic number of the {key} is (\d+)\.", prompt)[1]


_multi_turn = _needle


def _niah(prompt):
    city = re.findall(r"What is the best thing to do in (\w+)\?", prompt)[-1]
    return re.search(rf"The best thing to do in {city} is (to eat [^.]+)\.", prompt)[1]


def _multi_needle(prompt):
    return " and ".join(re.findall(r"A secret ingredient of the perfect pie is (\w+)\.", prompt))


def _retrieve_kv(prompt):
    key = re.findall(r'Key: "([^"]+)"', prompt)[-1]
    return re.search(rf'"{key}": "([^"]+)"', prompt)[0].split(": ")[1] + "."


def _vt(prompt):
    text = prompt[prompt.rindex("Memorize and track") :]
    value = re.findall(r"assigned the value (\d+) in", text)[-1]
    held = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        held[name] = held.get(source, source)
    return " ".join(name for name, number in held.items() if number == value)


def _cwe(prompt):
    text = prompt[prompt.rindex("Below is a numbered list") : prompt.rindex("Question:")]
    return " ".join(word for word, _ in Counter(re.findall(r"\d+\. (\w+)", text)).most_common(10))


def _fwe(prompt):
    text = prompt[prompt.index("coded words. ") + 13 : prompt.rindex("Question:")]
    return " ".join(word for word, _ in Counter(re.findall(r"\b[a-z]{6}\b", text)).most_common(3))


def _arithmetic(prompt):
    start, changes = re.findall(r"Start: (\d+)\nChanges: ([^\n]+)", prompt)[-1]
    value, lines = int(start), []
    for change in map(int, changes.split(", ")):
        lines.append(f"{value} {'+' if change > 0 else '-'} {abs(change)} = {value + change}")
        value += change
    return "\n".join(lines)
