"""Tables and their reading for the pages, made from the committed results of `benchmarks.compare_table` and `benchmarks.kvpress_side`."""

import re


def machine(meta: dict) -> str:
    """The machine of a result, whichever way its file says it."""
    hardware = meta.get("hardware") or meta
    return hardware.get("gpu") or hardware.get("cpu_model") or hardware["cpu"]


# ---------------------------------------------------------------------- the table of all methods


def compare(result: dict) -> str:
    """For each length a table: a method a line, at each budget its score, the difference to dense and what it holds and reads."""
    rows = result["rows"]
    parts = [
        f"Scores are means over {_tasks(rows)} tasks, in percent; ± is their difference to dense on the same "
        "questions with its 95 % paired interval. Held: bytes of the cache, of dense's. Read: keys a step reads, of those held, "
        "where fewer than all."
    ]
    attends = any("attention_ms" in r for r in rows)
    parts += [_costs(rows)] if attends else []
    for length in sorted({r["length"] for r in rows}):
        here = [r for r in rows if r["length"] == length]
        dense = next((r for r in here if r["method"] == "dense"), None)
        told = "not measured" if dense is None or "score" not in dense else f"{percent(dense['score'])}"
        asked = f"{here[0]['samples']} questions a task"
        parts.append(f"### {length:,} tokens\n\nDense: {told}; {asked}.\n\n" + _by_budget(here))
        parts.append(_by_task(here))
    parts += [] if attends else [_speeds(rows)]
    parts.append(_missing(rows))
    return "\n\n".join(p for p in parts if p)


def _by_budget(rows: list[dict]) -> str:
    shares = budgets(rows)
    lines = [
        "| method | " + " | ".join(f"{share(b)}: score, ±\u00a0dense | held, read" for b in shares) + " |",
        "| --- |" + " ---: | ---: |" * len(shares),
    ]
    for name in dict.fromkeys(r["method"] for r in rows if r["method"] != "dense"):
        cells = []
        for b in shares:
            r = next((r for r in rows if r["method"] == name and r["budget"] == b), {})
            cells += [f"{percent(r['score'])}, {_gain(r)}", _held(r)] if "score" in r else ["", ""]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_task(rows: list[dict]) -> str:
    """The tasks one by one, at the middle budget."""
    shares = budgets(rows)
    middle = shares[len(shares) // 2]
    chosen = [r for r in rows if "tasks" in r and (r["method"] == "dense" or r["budget"] == middle)]
    alike: dict[str, list[str]] = {}  # tasks that differ in a last number share a column
    for t in dict.fromkeys(t for r in chosen for t in r["tasks"]):
        alike.setdefault(re.sub(r"_\d+$", "", t), []).append(t)
    if not alike:
        return ""
    heads = [
        " / ".join([some[0].replace("_", "_<wbr>"), *(t.rsplit("_", 1)[1] for t in some[1:])])
        for some in alike.values()
    ]
    lines = [f"| at {share(middle)} | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for r in chosen:
        cells = [
            " / ".join(f"{100 * r['tasks'][t][0]:.3g}" if t in r["tasks"] else "-" for t in some)
            for some in alike.values()
        ]
        lines.append(f"| `{r['method']}` | " + " | ".join(cells) + " |")
    return f"#### Task by task, {rows[0]['length']:,} tokens\n\n" + "\n".join(lines)


def _speeds(rows: list[dict]) -> str:
    timed = [r for r in rows if r.get("decode_tok_s") and r.get("prefill_s")]
    if not timed:
        return ""
    length = timed[0]["length"]
    lines = [
        "| method | budget | reading, ms | tokens a second | peak, MB | cache, MB |",
        "| --- |" + " ---: |" * 5,
    ]
    for r in timed:
        what = "" if r["method"] == "dense" else share(r["budget"])
        cells = f"{1e3 * r['prefill_s']:,.0f}", f"{r['decode_tok_s']:,.0f}", f"{r['peak_bytes'] / 1e6:,.0f}"
        lines.append(f"| `{r['method']}` | {what} | " + " | ".join(cells) + f" | {r['bytes'] / 1e6:,.1f} |")
    head = f"### Speed and memory\n\nOne sequence of {length:,} tokens alone on a GPU that does nothing else"
    return f"{head}; weights are in the peak.\n\n" + "\n".join(lines)


def _costs(rows: list[dict]) -> str:
    """A CPU's: bytes and attention first, since there weights bound the speed of a small model."""
    timed = [r for r in rows if r.get("attention_ms")]
    dense = next((r for r in timed if r["method"] == "dense"), {})
    lines = [
        "| method | budget | cache, MB | of dense's | attention, ms a token | of dense's | tokens a second | reading, ms | peak, MB |",
        "| --- |" + " ---: |" * 8,
    ]
    for r in timed:
        of_dense = f"{100 * r['attention_ms'] / dense['attention_ms']:.0f} %" if dense else ""
        cells = [
            "" if r["method"] == "dense" or r["budget"] is None else share(r["budget"]),
            f"{r['bytes'] / 1e6:,.1f}",
            f"{100 * r['kept']:.0f} %",
            f"{r['attention_ms']:.2f}",
            of_dense,
            f"{r['decode_tok_s']:,.1f}",
            f"{1e3 * r['prefill_s']:,.0f}",
            f"{r['peak_bytes'] / 1e6:,.0f}",
        ]
        lines.append(f"| `{r['method']}` | " + " | ".join(cells) + " |")
    head = f"### Memory and attention\n\nOne sequence of {timed[0]['length']:,} tokens alone on a CPU"
    told = "attention is its part of a decode step, over all layers and with all that a method does there; weights are in the peak"
    return f"{head}; {told}.\n\n" + "\n".join(lines)


def _missing(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        for why in dict.fromkeys(r.get("missing", {}).values()):
            tasks = ", ".join(t for t, w in r["missing"].items() if w == why)
            name = r["method"] if r["method"] == "dense" else f"{r['method']} at {share(r['budget'])}"
            lines.append(f"- {name}, {r['length']:,} tokens, {tasks}: {why}")
    return "Not whole, and so not in the means:\n\n" + "\n".join(lines) if lines else ""


# ---------------------------------------------------------------------- beside kvpress


def kvpress(result: dict) -> str:
    """A table a length, a line a method and budget, both sides beside each other."""
    meta, rows = result["meta"], result["rows"]
    asked, answered = meta["samples"] * len(meta["tasks"]), [r["score"]["n"] for r in rows]
    seconds = f"medians over {meta['timed']['prompts']} prompts and {meta['timed']['tokens']} tokens after each, one process alone"
    parts = [
        f"{meta['model']} in {meta['dtype']}, {meta['samples']} samples of each task ({', '.join(meta['tasks'])}). "
        "Each cell is Foveal / kvpress. Difference: Foveal's score less kvpress's "
        "on the same prompts, in points, with its 95 % paired interval. "
        f"Seconds are {seconds if any(r['read_s'] for r in rows) else 'not measured yet'}."
        + (
            f" The run was stopped: {min(answered)} to {max(answered)} of {asked} prompts are answered by both."
            * (min(answered) < asked)
        )
    ]
    for length in dict.fromkeys(r["length"] for r in rows):
        here = [r for r in rows if r["length"] == length]
        lines = [
            "| method | budget | score, % | difference | cache, of dense | peak, MB | reading, ms | a token, ms |",
            "| --- |" + " ---: |" * 7,
            *(_beside(here, key) for key in dict.fromkeys((r["method"], r["budget"]) for r in here)),
        ]
        parts += [f"### {length:,} tokens", "\n".join(lines)]
    if meta["failed"]:
        parts.append("\n".join(f"- {side}, {m} at {share(b)}: {why}" for side, m, b, why in meta["failed"]))
    if told := _times(rows):
        parts.append(told)
    versions = meta["versions"]
    parts.append(
        "Foveal {foveal}, transformers {transformers}; ".format(**versions["foveal"])
        + "kvpress {kvpress}, transformers {transformers}.".format(**versions["kvpress"])
    )
    return "\n\n".join(parts)


def _times(rows: list[dict]) -> str:
    """Foveal's seconds in kvpress's, from the least to the most of all rows."""
    sides = {((r["method"], r["budget"], r["length"]), r["side"]): r for r in rows}
    told = []
    for what, key in (("a token", "token_ms"), ("reading", "read_s")):
        pairs = [
            (r[key], sides.get((row, "kvpress"), {}).get(key)) for (row, side), r in sides.items() if side == "foveal"
        ]
        shares = [ours / theirs for ours, theirs in pairs if ours and theirs]
        if shares:
            told.append(f"{what} {min(shares):.2f} to {max(shares):.2f}")
    return f"Foveal's time as a multiple of kvpress's: {', '.join(told)}." if told else ""


def _beside(rows: list[dict], key: tuple[str, float]) -> str:
    sides = {r["side"]: r for r in rows if (r["method"], r["budget"]) == key}

    def both(show) -> str:
        return " / ".join(show(sides[s]) if s in sides else "-" for s in ("foveal", "kvpress"))

    over = sides.get("foveal", {}).get("over_kvpress")
    gap = "" if over is None else points(over["mean"], over["low"], over["high"])
    cells = (
        both(lambda r: f"{100 * r['score']['mean']:.1f}"),
        gap,
        both(lambda r: f"{r['bytes_of_dense']:.3f}"),
        both(lambda r: f"{r['peak_mb']:,.0f}"),
        both(lambda r: "-" if r["read_s"] is None else f"{1e3 * r['read_s']:.0f}"),
        both(lambda r: "-" if r["token_ms"] is None else f"{r['token_ms']:.1f}"),
    )
    return f"| {key[0]} | {'' if key[0] == 'dense' else share(key[1])} | " + " | ".join(cells) + " |"


# ---------------------------------------------------------------------- a search


def tune(result: dict) -> str:
    """What `foveal tune` answered, its picture, and the candidates that saw every prompt."""
    from foveal.compare.rows import summary_rows

    meta, rows = result["meta"], [r for r in summary_rows(result) if r.quality is not None and r.kv_share is not None]
    tried = [r for r in rows if not r.baseline]
    n = lambda r: max(s.n for s in r.tasks.values())
    most = max(map(n, tried))
    finals = sorted((r for r in tried if n(r) == most), key=lambda r: -r.quality)
    lines = [
        "| candidate | of dense, % | 95 % | memory, of dense | prompts |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(f"| `{r.label}` | {100 * r.quality:.1f} | {_ends(r)} | {100 * r.kv_share:.1f} % | {n(r)} |" for r in finals),
    ]
    others = len(tried) - len(finals)
    picture = _picture(rows, finals, meta["limits"])
    return (
        f"```text\n$ {meta['command']}\n{meta['answer']}\n```\n\n{picture}\n\n"
        + "\n".join(lines)
        + f"\n\n{others} other "
        f"candidates left earlier, on fewer prompts. The search took {meta['elapsed_s']:.0f} seconds."
    )


def _ends(row) -> str:
    return "" if row.quality_low is None else f"{100 * row.quality_low:.1f} to {100 * row.quality_high:.1f}"


def _picture(rows: list, finals: list, limits: dict) -> str:
    """Memory against quality, both as shares of dense, with the limits; full dots saw every prompt."""
    wide, high, left, base = 640, 300, 48, 36
    top = max(1.05, *(r.quality for r in rows))
    far = max(1.1 * r.kv_share for r in rows)
    x = lambda kept: left + (wide - left - 8) * kept / far
    y = lambda score: 8 + (high - base - 8) * (1 - max(score, 0) / top)
    line = lambda a, b, c, d, more="": (
        f'<line x1="{a:.0f}" y1="{b:.0f}" x2="{c:.0f}" y2="{d:.0f}" stroke="currentColor"{more}/>'
    )
    text = lambda a, b, said, more="": (
        f'<text x="{a:.0f}" y="{b:.0f}" font-size="12" fill="currentColor"{more}>{said}</text>'
    )
    bar, room = x(limits["memory"]), y(1 - limits["max_drop"])
    parts = [
        f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="Memory against quality of the candidates">',
        f'<rect x="{left}" y="8" width="{bar - left:.0f}" height="{room - 8:.0f}" fill="currentColor" opacity="0.08"/>',
        line(left, high - base, wide, high - base),
        line(left, 8, left, high - base),
        line(bar, 8, bar, high - base, ' stroke-dasharray="4"'),
        line(left, room, wide, room, ' stroke-dasharray="4"'),
    ]
    for k in range(6):
        at = k / 4
        if at <= far:
            parts.append(text(x(at), high - base + 16, share(at), ' text-anchor="middle"'))
        if at <= top:
            parts.append(text(left - 6, y(at) + 4, share(at), ' text-anchor="end"'))
    parts.append(text(wide, high - 4, "memory, of dense", ' text-anchor="end"'))
    parts.append(text(left + 6, 20, "score, of dense"))
    for r in sorted(rows, key=lambda r: r in finals):
        solid = r in finals or r.baseline
        look = 'fill="currentColor"' if solid else 'fill="none" stroke="currentColor" opacity="0.5"'
        told = f"{r.label}: {100 * r.quality:.1f} % in {100 * r.kv_share:.1f} %"
        parts.append(
            f'<circle cx="{x(r.kv_share):.1f}" cy="{y(r.quality):.1f}" r="4" {look}><title>{told}</title></circle>'
        )
    return "\n".join([*parts, "</svg>"])


# ---------------------------------------------------------------------- numbers as text


def _tasks(rows: list[dict]) -> int:
    return max((len(r.get("tasks", {})) for r in rows), default=0)


def budgets(rows: list[dict]) -> list[float]:
    return sorted({r["budget"] for r in rows if r["method"] != "dense" and r["budget"] is not None}, reverse=True)


def share(x: float) -> str:
    return f"{100 * x:.3g} %"


def percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f}"


def _gain(row: dict) -> str:
    return points(*row["gain"]) if row.get("gain") else ""


def points(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} [{100 * low:+.1f},\u00a0{100 * high:+.1f}]"


def _held(row: dict) -> str:
    read = row.get("read")
    less = read is not None and read < 0.995
    return f"{100 * row['kept']:.0f}\u00a0%" + (f", {100 * read:.0f}\u00a0%" if less else "")


# ---------------------------------------------------------------------- a server under load


def load(result: dict) -> str:
    """A line a server: what 64 clients got of it."""
    s = result["settings"]
    lines = [
        f"{s['clients']} clients, prompts of {min(s['lengths'])} to {max(s['lengths']):,} words, answers of at most {s['answer']} tokens, "
        f"{s['seconds'] / 60:.0f} minutes after a warm-up of {s['warmup']:.0f} seconds; each server on {s['cores']} cores of its own.",
        "",
        "| server | requests a minute | tokens / s | first token, s | between, s | fit in {:g} GiB | errors | memory |".format(
            s["memory"]
        ),
        "| --- |" + " ---: |" * 6 + " --- |",
    ]
    for name, r in result["servers"].items():
        ends = [
            " / ".join(f"{r[key][q]:.{digits}f}" for q in ("p50", "p99")) if r.get(key) else "-"
            for key, digits in TIMES
        ]
        cells = [
            f"{r['requests_per_minute']:g}",
            f"{r['tokens_per_second']:g}",
            *ends,
            f"{r.get('conversations_in_cache') or '-'}" + r" \*" * bool(r.get("conversation_note")),
        ]
        flat = "flat" if r["resident_bytes"]["flat"] else "grows"
        idle = ", back to zero" if r.get("back_to_zero") else ""
        lines.append(
            f"| {SERVERS[name]} | " + " | ".join(map(str, [*cells, sum(r["errors"].values()), flat + idle])) + " |"
        )
    told = "Times are medians and 99th of a hundred; conversations of about 1,600 tokens fit by the bytes of one alone"
    if any(r.get("conversation_note") for r in result["servers"].values()):
        told += " (\\*: by a cache filled apart from the server, where the answer to such a prompt ended at once)"
    return "\n".join([*lines, "", f"{told}."])


TIMES = (("first_token_s", 0), ("between_chunks_s", 2))
SERVERS = {
    "dense": "Foveal, dense",
    "half": "Foveal, 50 %",
    "quarter": "Foveal, 25 %",
    "transformers": "transformers, batched",
    "transformers-plain": "transformers, in turn",
}
