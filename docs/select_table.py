"""Tables of the pages on long prompts and on patterns, put in the place of their markers from the newest committed results."""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
PAGES = ("select.md", "patterns.md")
TASKS = {"needle": "needle", "niah_multikey_1": "needles by key", "vt": "variables", "perplexity": "nats a token"}


def on_page_markdown(markdown, page, config, files):
    """Fill in the tables."""
    return filled(markdown, RESULTS) if page.file.src_uri in PAGES else markdown


def filled(markdown, folder):
    """The page with its tables; where nothing was measured yet, the command that does it."""
    for name, (pattern, command, made) in TABLES.items():
        mark = f"<!-- table: {name} -->"
        if mark in markdown:
            found = sorted(folder.glob(pattern))
            text = f"Not measured yet: `{command}`.\n" if not found else made(json.loads(found[-1].read_text("utf-8")))
            markdown = markdown.replace(mark, text)
    return markdown


def speed(result):
    """One row a method and length: density, attention and prefill in times of dense, and the paper's words."""
    rows = []
    for r in result["rows"]:
        cells = {"tokens": f"{r['tokens'] // 1024}k", "method": r["method"]}
        if "skipped" in r:
            rows.append(cells | {"density": r["skipped"]})
            continue
        cells |= {"density": f"{r['density']:.0%}", "attention, ms": f"{r['attention_ms']:.1f}"}
        cells |= {"times dense's speed": times(r, "attention"), "prefill, s": f"{r['prefill_s']:.2f}"}
        rows.append(cells | {"of the prefill": times(r, "prefill"), "the paper": r.get("claim", "")})
    return circumstances(result) + table(rows)


def times(row, what):
    """How many times as fast as dense, for dense itself nothing."""
    return f"{row[f'{what}_faster']:.2f}" if f"{what}_faster" in row else ""


def indexers(result):
    """Flat and two-stage indexers side by side."""
    rows = [
        {
            "tokens": f"{r['tokens'] // 1024}k",
            "flat, ms": f"{r['flat_ms']:.1f}",
            "two stages, ms": f"{r['two_stages_ms']:.1f}",
            "times as fast": f"{r['faster']:.2f}",
            "same tokens": f"{r['same_tokens']:.1%}",
        }
        for r in result["indexers"]
    ]
    return table(rows)


def quality(result):
    """One row a method and length: density and the mean score of each task."""
    rows = {}
    for r in result["rows"]:
        key = r["method"], r["tokens"]
        cells = rows.setdefault(key, {"method": f"`{r['method']}`", "tokens": f"{r['tokens']:,}"})
        if "skipped" in r:
            cells["density"] = r["skipped"]
        else:
            cells |= {"density": f"{r['density']:.0%}", TASKS.get(r["task"], r["task"]): f"{r['score']:.2f}"}
    return circumstances(result) + table([*rows.values()])


def recall(result):
    """One row a method: what its queries find of what an exact choice of as many keys would read."""
    rows = [
        {
            "method": f"`{r['method']}`",
            "density": f"{r['density']:.0%}",
            "layers that choose": r["layers"],
            "of the exact top-k": f"{r['recall']:.0%}" if r["layers"] else "",
            "weight read": f"{r['weight']:.3f}" if r["layers"] else "",
            "by the exact top-k": f"{r['best']:.3f}" if r["layers"] else "",
        }
        for r in result["rows"]
    ]
    tokens = " and ".join(f"{n:,}" for n in sorted({r["tokens"] for r in result["rows"]}))
    return f"{tokens} tokens of a prompt, {result['model']['name']}, {circumstances(result)}{table(rows)}"


# ---------------------------------------------------------------------- what papers claim


def prompt_claims(result):
    """What papers on long prompts claim, beside the measured length that is nearest to theirs."""
    rows = []
    for what, method, kind, factor, tokens, word in PROMPT_CLAIMS:
        found = [r for r in result["rows"] if r["method"] == method and f"{kind}_faster" in r]
        cells = {"the paper": what, "here": f"`{method}`, not measured yet", "our number": "", "verdict": word}
        if found:
            row = min(found, key=lambda r: abs(r["tokens"] - tokens))
            dense = next(r for r in result["rows"] if r["tokens"] == row["tokens"] and r["method"].startswith("dense"))
            cells["here"] = f"`{method}` at {row['tokens'] // 1024}k, reads {row['density']:.0%}"
            cells["our number"] = f"{kind} {row[f'{kind}_faster']:.2f}x"
            told = verdict(factor, needed(factor, kind, row, dense, result["layers"]), "dense attention")
            cells["verdict"] = f"{told} {word}".strip()
        rows.append(cells)
    for r in result["indexers"]:
        factor = INDEXER_CLAIMS.get(r["tokens"])
        if factor is not None:
            cells = {"the paper": f"HISA: its indexer {factor}x at {r['tokens'] // 1024}k, over 99 % the same tokens"}
            cells["here"] = f"an indexer of 64 heads of 128, {r['queries']:,} queries, drawn keys"
            cells["our number"] = f"{r['faster']:.1f}x, {r['same_tokens']:.0%} the same tokens"
            cells["verdict"] = f"{verdict(factor, factor / r['faster'], 'the flat indexer')} {INDEXER_WORD}"
            rows.append(cells)
    return table(rows)


def needed(factor, kind, row, dense, layers):
    """How many times as slow dense attention would have to be for a claim to hold with our time of the method."""
    if kind == "attention":
        return factor / row["attention_faster"]
    attention = layers * dense["attention_ms"] / 1e3
    return 1 + (factor * row["prefill_s"] - dense["prefill_s"]) / attention


def verdict(factor, slower, baseline):
    """Whether a claim of a speed holds against our baseline, and if not, against which it would."""
    return "The speed holds." if slower <= 1 else f"{factor:g}x needs {baseline} {slower:.2f} times as slow."


def pattern_claims(result):
    """What papers on patterns claim, beside the measurement of the same shape."""
    rows = []
    for what, part, fits, name, base, factor, word in PATTERN_CLAIMS:
        for r in (r for r in result.get(part, []) if name in r and all(r.get(k) == v for k, v in fits.items())):
            faster = r[base]["ms"] / r[name]["ms"]
            shape = " x ".join(f"{n:,}" for n in r.get("grid") or r.get("shape") or [r["length"]])
            share = r.get(f"density, {name}") or r.get("density") or (1 / r["bound"] if "bound" in r else None)
            cells = {"the paper": what, "here": f"{shape} tokens" + (f", reads {share:.1%}" if share else "")}
            told = verdict(factor, factor / faster, "dense attention" if base == "dense" else "its baseline")
            rows.append(cells | {"our number": f"{faster:.2f}x", "verdict": f"{told} {word}".strip()})
    return circumstances(result) + table(rows)


PROMPT_CLAIMS = (  # claim, row of benchmarks.select, of what, times as fast, the paper's tokens, a word
    (
        "Token Sparse: attention up to 3.23x at 128k",
        *("token-sparse", "attention", 3.23, 131072),
        "It drops tokens that together carry half a percent of the attention, few of the drawn ones; 3.23x by reading less means 31 %.",
    ),
    (
        "the same, with a sparse method inside",
        *("token-sparse | xattention", "attention", 3.23, 131072),
        "What both read of other texts may be less.",
    ),
    ("PowerAttention: attention 21.6x at 128k", "power-attention", "attention", 21.6, 131072, ""),
    (
        "PowerAttention: a whole prefill 3.0x at 128k",
        *("power-attention", "prefill", 3.0, 131072),
        "Hardly any attention is left: what is not attention bounds it.",
    ),
    (
        "Flux: prefill up to 2.8x",
        *("flux, sparse layers", "prefill", 2.8, 131072),
        "Every layer is sparse here, the most there is to gain; a routed prompt gains its share of that.",
    ),
    (
        "DHSA: prefill 20 to 60 % shorter at 8k, 1.25x to 2.5x",
        *("dhsa", "prefill", 1.25, 8192),
        "The paper's dense model, Gemma 2 2B, takes 1.65 s for 8k on a card of 24 GB. Here the gain begins with longer texts (above), "
        "and a fourth of the cost of finding boundaries is in each of the four layers.",
    ),
)
INDEXER_CLAIMS = {32768: 2, 131072: 4}
INDEXER_WORD = (
    "The flat time includes writing every score and choosing among all of them; against scoring alone the gain is smaller. "
    "The tokens are those of drawn keys and no trained indexer's: over 99 % does not hold on them."
)
PATTERN_CLAIMS = (  # claim, part of benchmarks.patterns, which row, what, beside what, times as fast, a word
    (
        "GRAT: 35.8x for an image of 8,192 x 8,192 (FLUX, A100)",
        *("grids", {"grid": [512, 512]}, "grat, criss-cross", "dense", 35.8),
        "FLUX has as many tokens for that image (a token is 16 x 16 pixels). The cross of groups of 16 x 16 reads 6.2 % of them, so "
        "that no kernel gains more than 16x over an equally fast one.",
    ),
    (
        "the same, by the groups around",
        *("grids", {"grid": [512, 512]}, "grat, surrounding", "dense", 35.8),
        "The paper's radius is not published; ours is one group.",
    ),
    (
        "GNA, window 2,048, stride 1 (H100): 8.3x",
        *("neighborhood", {"shape": [32768], "stride": [1]}, "neighborhood", "dense", 8.3),
        "Its kernel alone; our time includes the permutation.",
    ),
    (
        "GNA, the same with stride 256: 12.6x of 16x",
        *("neighborhood", {"shape": [32768], "stride": [256]}, "neighborhood", "dense", 12.6),
        "Its kernel alone; of ours the host takes more than half.",
    ),
    (
        "GNA, window 80 x 80, stride 1, with permutation (H100): 5.2x",
        *("neighborhood", {"shape": [256, 256], "stride": [1, 1]}, "neighborhood", "dense", 5.2, ""),
    ),
    (
        "GNA, the same with stride 16 x 16: 9.2x of 10.2x",
        *("neighborhood", {"shape": [256, 256], "stride": [16, 16]}, "neighborhood", "dense", 9.2, ""),
    ),
    (
        "GNA, window 18 x 24 x 24, stride 16 x 8 x 8, with permutation (H100): 9.7x of 11.1x",
        *("neighborhood", {"shape": [30, 48, 80], "stride": [16, 8, 8]}, "neighborhood", "dense", 9.7, ""),
    ),
    (
        "FlashBias: more than 1.5x over a bias in memory",
        *("bias", {}, "factors", "bias as a tensor", 1.5),
        "The bias in memory runs in PyTorch's fused attention, ALiBi, 16 heads of 64.",
    ),
)


def circumstances(result):
    """Where and when it was measured."""
    meta, model = result["meta"], result.get("model", {}).get("name")
    asked = f"{model}, {result['samples']} questions a task; " if "samples" in result else ""
    return f"{asked}{meta['gpu'] or meta['cpu']}, torch {meta['versions']['torch']}, {meta['date']}.\n\n"


def table(rows):
    """A Markdown table with the union of all columns, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([_cell(str(row.get(c, ""))) for c in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text):
    """In code a bar is no end of a cell."""
    return text if text.startswith("`") else text.replace("|", "\\|")


TABLES = {
    "speed": ("select-h100-*.json", "python -m benchmarks.select", speed),
    "indexers": ("select-h100-*.json", "python -m benchmarks.select", indexers),
    "quality": ("select-quality-*.json", "python -m benchmarks.select_quality", quality),
    "recall": ("select-recall-*.json", "python -m benchmarks.select_recall", recall),
    "prompt claims": ("select-h100-*.json", "python -m benchmarks.select", prompt_claims),
    "pattern claims": ("patterns-h100-*.json", "python -m benchmarks.patterns", pattern_claims),
}
