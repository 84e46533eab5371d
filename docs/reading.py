"""What the table of all methods says, for the page on keeping, from the committed results of `benchmarks.compare_table`."""

from published import budgets, percent, share

BASELINES = ("dense", "random-keep", "streaming-llm")


def reading(result: dict) -> str:
    """Two tables, of methods that free memory and of those that keep every key: a method a line, points beside dense at each budget and
    length. Then who holds more than asked, and what one sequence costs.
    """
    rows = [r for r in result["rows"] if r.get("gain") and r["method"] != "dense" and "missing" not in r]
    if not rows:
        return "The run is not whole yet."
    bars = _bars(rows)
    frees = {name: some for name, some in _by_method(rows).items() if _frees(some)}
    reads = {name: some for name, some in _by_method(rows).items() if name not in frees}
    reach = [half for r in rows for half in (r["gain"][0] - r["gain"][1], r["gain"][2] - r["gain"][0])]
    parts = [
        f"{_dense(result['rows'])}Cells are points more or less than dense's at each budget, at {_lengths(rows)} tokens; their "
        f"95 % intervals reach {100 * min(reach):.1f} to {100 * max(reach):.1f} points to either side. **Bold**: not below dense, as far "
        "as that tells. *Slanted*: not above the better of `streaming-llm` and `random-keep`, which look at nothing."
    ]
    if frees:
        parts += [
            "### Methods that free memory",
            _against(frees, rows, bars),
            _over([r for x in frees.values() for r in x]),
        ]
    if reads:
        longest = max(r["length"] for r in rows)
        steps = (
            f"What a step reads is a share of the keys held, at each budget of {longest:,} tokens; "
            "100 / 100 / 100: the method chooses only while a prompt is read."
        )
        parts += ["### Methods that keep every key", steps, _against(reads, rows, {}, read=True)]
    return "\n\n".join(part for part in [*parts, _spent(result["rows"])] if part)


def _by_method(rows: list[dict]) -> dict[str, list[dict]]:
    return {name: [r for r in rows if r["method"] == name] for name in dict.fromkeys(r["method"] for r in rows)}


def _frees(rows: list[dict]) -> bool:
    return all(r["kept"] < 0.9 for r in rows)


def _bars(rows: list[dict]) -> dict[tuple, float]:
    """The upper end of what the better baseline reaches, at each budget and length."""
    plain = sorted((r for r in rows if r["method"] in BASELINES), key=lambda r: r["score"])
    return {(r["budget"], r["length"]): r["gain"][2] for r in plain}


def _dense(rows: list[dict]) -> str:
    scores = {r["length"]: percent(r["score"]) for r in rows if r["method"] == "dense" and "score" in r}
    return f"Dense has {' / '.join(scores[n] for n in sorted(scores))} points. " if scores else ""


def _lengths(rows: list[dict]) -> str:
    return " / ".join(f"{n:,}" for n in sorted({r["length"] for r in rows}))


def _against(groups: dict[str, list[dict]], rows: list[dict], bars: dict, read: bool = False) -> str:
    """The table of one group, best mean first. read: say what a step reads, at the longest length."""
    shares, lengths = budgets(rows), sorted({r["length"] for r in rows})
    lines = [
        "| method | " + " | ".join(map(share, shares)) + (" | a step reads, %" if read else "") + " |",
        "| --- |" + " ---: |" * (len(shares) + read),
    ]
    for name in sorted(groups, key=lambda name: -sum(r["gain"][0] for r in groups[name]) / len(groups[name])):
        found = {(r["budget"], r["length"]): r for r in groups[name]}
        shown = [
            " / ".join(_beside_dense(found[b, n], bars.get((b, n))) if (b, n) in found else "-" for n in lengths)
            for b in shares
        ]
        if read:
            steps = [found[b, lengths[-1]].get("read") for b in shares if (b, lengths[-1]) in found]
            shown.append("" if None in steps else " / ".join(f"{100 * x:.3g}" for x in steps))
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _beside_dense(row: dict, bar: float | None) -> str:
    told = f"{100 * row['gain'][0]:+.1f}"
    if row["gain"][2] >= 0:
        return f"**{told}**"
    return f"*{told}*" if bar is not None and row["method"] not in BASELINES and row["gain"][0] <= bar else told


def _over(rows: list[dict]) -> str:
    """Who holds more than 1.15 times what was asked for."""
    found: dict[tuple, list[dict]] = {}
    for r in rows:
        if r["kept"] > 1.15 * r["budget"]:
            found.setdefault((r["length"], -r["budget"]), []).append(r)
    told = []
    for (length, budget), over in sorted(found.items()):
        who = ", ".join(f"`{r['method']}` ({share(r['kept'])})" for r in over)
        if len(over) > 4:
            shares = [r["kept"] for r in over]
            who = f"{len(over)} methods ({share(min(shares))} to {share(max(shares))})"
        told.append(f"{who} at {share(-budget)} of {length:,} tokens")
    return f"Bytes over 1.15 times the budget: {'; '.join(told)}." if told else ""


def _spent(rows: list[dict]) -> str:
    """Bytes and seconds, from the runs of one sequence alone; methods far from the others are named."""
    timed = [r for r in rows if r.get("decode_tok_s") and r.get("prefill_s") and "kept" in r]
    dense = next((r for r in timed if r["method"] == "dense"), None)
    groups = _by_method([r for r in timed if r is not dense])
    if dense is None or not groups:
        return ""
    frees = [r for some in groups.values() if _frees(some) for r in some]
    held = [f"{_span([r['bytes'] / 1e6 for r in frees if r['budget'] == b])} at {share(b)}" for b in budgets(frees)]
    lines = [
        f"- **Cache**, MB: dense {dense['bytes'] / 1e6:,.0f}" + "".join(f", {x}" for x in held) + ".",
        _apart("Peak, weights included", "MB", 1e-6, "peak_bytes", dense, groups, lambda x: x > 1.1),
        _apart("Reading", "ms", 1e3, "prefill_s", dense, groups, lambda x: x > 5),
        _apart("Decoding", "tokens a second", 1, "decode_tok_s", dense, groups, lambda x: x < 0.5),
    ]
    return f"### What one sequence costs\n\nOf {dense['length']:,} tokens, alone:\n\n" + "\n".join(lines)


def _apart(what: str, unit: str, scale: float, key: str, dense: dict, groups: dict, far) -> str:
    """From the least to the most of each kind of method, and by name whose rows are all `far` as multiples of dense's."""
    odd = [name for name, some in groups.items() if all(far(r[key] / dense[key]) for r in some)]
    kinds: dict[str, list[float]] = {}
    for name, some in groups.items():
        kind = f"`{name}`" if name in odd else KINDS[_frees(some)]
        kinds.setdefault(kind, []).extend(scale * r[key] for r in some)
    told = [f"dense {scale * dense[key]:,.0f}"]
    told += [f"{kind} {_span(kinds[kind])}" for kind in sorted(kinds, key=lambda kind: (kind[0] == "`", kind))]
    return f"- **{what}**, {unit}: " + ", ".join(told) + "."


KINDS = {True: "methods that free memory", False: "methods that keep every key"}


def _span(values: list[float]) -> str:
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"
