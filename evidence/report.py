"""Differences, intervals and tables of comparisons, from comparison.json and bench.json alone.

python -m evidence.report       makes the tables of evidence/README.md, each comparison.md and
                                the figures in evidence/results anew
"""
import argparse
import csv
import io
import math
import re
import statistics
import sys
from pathlib import Path

from data.runs import read_json
from evidence import figures
from evidence.common import relative, write_text
from evidence.controls import BLIND_MASKS, PRESETS
from evidence.figures import in_words
from evidence.paired import (COLUMNS, DIFFERENCES, base_name, by_seed, joined, paired_difference,
                             sweep_title)
from evidence.peers import PEERS

HERE = relative(Path(__file__).resolve().parent)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# the controls that each method is compared with
CONTROLS = {"nalora": ["nalora-shuffled", "random-mask", "random-uniform"],
            "nalora-neutral": ["nalora"],
            "nalora-mask": ["shuffled-mask", "random-mask", "redrawn-mask", "inverted-mask"],
            "redrawn-mask": ["shuffled-mask", "random-mask"],
            "turns-mask": ["redrawn-mask"],
            "credit-mask": ["turns-mask", "nalora-mask"],
            "nalora-scale": ["uniform-scale"],
            **{peer: ["nalora"] for peer in PEERS},
            **{f"nalora-{peer}": [peer] for peer in PEERS}}

def references(comparison, label):
    """Labels that a variant is compared with, at its value of the sweep: every LoRA, its own method
    without flags, and of each control the one whose flags differ least, of the same score if it
    looks at the gates."""
    variants = comparison["variants"]
    own = variants[label]

    def of(method):
        return [other for other, v in variants.items()
                if v["method"] == method and other != label and v["value"] in (None, own["value"])]

    def score(v):
        return (re.findall(r"score=(\w+)", v["changes"]) or ["phi_prime"])[0]

    def fair(other):
        v = variants[other]
        blind = PRESETS.get(v["method"], {"mask": "none"}).get("mask") in BLIND_MASKS
        return blind or score(v) == score(own)

    def differing(other):
        theirs = variants[other]["changes"].split(",")
        return len(set(own["changes"].split(",")) ^ set(theirs))

    lora = of("lora") if own["method"] != "lora" else []
    plain = [other for other in of(own["method"])
             if variants[other]["changes"] == (own["value"] or "")]
    matched = [list(filter(fair, of(method))) for method in CONTROLS.get(own["method"], [])]
    controls = [min(others, key=differing) for others in matched if others]
    return list(dict.fromkeys(lora + plain + controls))

def describe(ours, theirs, digits):
    """"mean [low, high] verdict" of ours - theirs, {seed: value} each; a called difference with the
    number of seeds that agree in its sign. "-" where fewer than two seeds have both."""
    seeds = len(set(ours) & set(theirs))
    if seeds < 2:
        return "-"
    mean, low, high, agree = paired_difference(ours, theirs)
    verdict = f"{'lower' if mean < 0 else 'higher'} in {agree} of {seeds}"
    if low <= 0 <= high:
        verdict = "no difference seen"
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {verdict}"

def mean_and_deviation(values, digits):
    values = list(values)
    if not values:
        return "-"
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"

def markdown_table(header, rows):
    """A | in a cell, such as of |φ'|, does not end it."""
    lines = [header, ["---"] * len(header), *rows]
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def about(comparison):
    """What was compared, in one sentence, and on which machine."""
    m = comparison["machine"]
    c = comparison["configuration"]
    targets = ", ".join(c.get("targets", []))
    if c.get("targets") == ALL_LINEAR:
        targets = "all linear layers"
    adapters = ""
    if "rank" in c and c["method"] != "full":
        adapters = f"LoRA of rank {c['rank']} and alpha {c['alpha']:g} on {targets}, "
    seeds = ", ".join(map(str, comparison["seeds"]))
    return (f"Base {c['base']}, {c['train_size'] or 'all'} examples of {c['data']}, {adapters}"
            f"{c['steps']} steps of {c['batch_size']}, {c['optimizer']}, {c['dtype']}; seeds "
            f"{seeds}; {tuning_text(comparison)}. {m['cores']} cores of {m['processor']}, Python "
            f"{m['python']}, PyTorch {m['torch']}.")

def tables(comparison):
    """{"about", "results", "selection", "differences", "costs": Markdown} of a comparison, from
    comparison.json alone."""
    variants = comparison["variants"]
    rows = comparison["rows"]
    text = {"about": about(comparison)}
    for name, columns in COLUMNS.items():
        columns = measured(comparison, columns)
        lines = [["base", ""]]
        for k, (_, digits) in columns.items():
            known = comparison["base"].get(k)
            lines[0].append("-" if known is None else f"{known:.{digits}f}")
        for label in dict.fromkeys(row["variant"] for row in rows):
            rate = rate_text(variants[label]) if label in variants else ""
            values = [mean_and_deviation(by_seed(comparison, label, k).values(), digits)
                      for k, (_, digits) in columns.items()]
            lines.append([in_words(label) + diverged_text(rows, label), rate, *values])
        titles = [title for title, _ in columns.values()]
        text[name] = markdown_table(["", "lr", *titles], lines)
    if len(comparison["seeds"]) > 1:
        text["differences"] = difference_table(comparison)
    if comparison["step_time"]:
        text["costs"] = cost_table(comparison)
    return text

def difference_table(comparison):
    columns = measured(comparison, DIFFERENCES)
    lines = []
    for label in comparison["variants"]:
        for other in references(comparison, label):
            line = [pair_in_words(label, other)]
            for k, (_, digits) in columns.items():
                line.append(describe(outcome_by_seed(comparison, label, k),
                                     outcome_by_seed(comparison, other, k), digits))
            lines.append(line)
    return markdown_table(["", *(title for title, _ in columns.values())], lines)

def outcome_by_seed(comparison, label, column):
    """by_seed, but full fine-tuning has no M: it is 0 by definition, not a result."""
    if column == "misalignment" and comparison["variants"][label]["method"] == "full":
        return {}
    return by_seed(comparison, label, column)

def pair_in_words(ours, theirs):
    return f"{in_words(ours)} − {in_words(theirs)}"

def cost_table(comparison):
    lines = []
    for label in comparison["variants"]:
        own = [row for row in comparison["rows"]
               if row["variant"] == label and "diverged" not in row]
        if own:
            memory = statistics.median(row["peak_memory_mb"] for row in own)
            lines.append([in_words(label), f"{own[0]['trainable_parameters']:,}",
                          f"{comparison['step_time'][label]:.2f}", f"{memory:,.0f}",
                          f"{own[0]['file_bytes'] / 1e3:,.0f}"])
    return markdown_table(["", "trainable parameters", "step time / LoRA", "peak memory (MB)",
                           "file (kB)"], lines)

def sweep_table(comparisons, column):
    """Markdown of mean paired differences: a row per pair of methods, a column per value of each
    sweep. Bold: every seed has that sign; in brackets: no difference seen."""
    pairs = {}
    for c in comparisons:
        for label, own in c["variants"].items():
            for other in references(c, label):
                theirs = c["variants"][other]
                value = own["value"] or theirs["value"]
                x = by_seed(c, label, column)
                y = by_seed(c, other, column)
                seeds = set(x) & set(y)
                if value and len(seeds) > 1:
                    mean, low, high, agree = paired_difference(x, y)
                    text = f"{mean:+.{DIFFERENCES[column][1]}f}"
                    if low <= 0 <= high:
                        text = f"({text})"
                    elif agree == len(seeds):
                        text = f"**{text}**"
                    cells = pairs.setdefault(pair_in_words(own["spec"], theirs["spec"]), {})
                    cells[f"{sweep_title(c)} {value.partition('=')[2]}"] = text
    headings = list(dict.fromkeys(heading for cells in pairs.values() for heading in cells))
    lines = [[pair, *(cells.get(heading, "") for heading in headings)]
             for pair, cells in pairs.items()]
    return markdown_table(["", *headings], lines)

def diverged_text(rows, label):
    own = [row for row in rows if row["variant"] == label]
    diverged = sum("diverged" in row for row in own)
    return f" ({diverged} of {len(own)} seeds diverged)" if diverged else ""

def rate_text(variant):
    """The learning rate of a variant, marked where it was the lowest or highest of its grid, so
    that the best one may lie beyond."""
    rates = [lr for lr, _ in variant["tuning"]]
    text = f"{variant['lr']:g}"
    if len(rates) > 1 and variant["lr"] in (min(rates), max(rates)):
        text += " (lowest)" if variant["lr"] == min(rates) else " (highest)"
    return text

def measured(comparison, columns):
    """Those of the columns that some run has."""
    return {k: v for k, v in columns.items()
            if any(row.get(k) is not None for row in comparison["rows"])}

def tuning_text(comparison):
    rates = sorted({lr for v in comparison["variants"].values() if len(v["tuning"]) > 1
                    for lr, _ in v["tuning"]})
    if not rates:
        return "learning rates given, not tuned"
    seeds = comparison["tuning_seeds"]
    return (f"learning rate of lowest validation loss among {', '.join(f'{lr:g}' for lr in rates)} "
            f"with seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")

def markdown(comparison):
    """comparison.md: all tables of a comparison."""
    captions = {
        "differences": "Paired differences, mean over seeds [95 % bootstrap interval]:\n\n",
        "costs": "Step time: median of few pairs of steps. Peak memory: of the whole run with its "
        "evaluation. For either alone there is evidence.bench.\n\n"}
    parts = [captions.get(name, "") + table for name, table in tables(comparison).items()]
    if comparison["sweep"] and len(comparison["seeds"]) > 1:
        for column, (title, _) in measured(comparison, DIFFERENCES).items():
            parts.append(f"The same differences in {title}, side by side. Bold: all seeds agree in "
                         "the sign; in brackets: no difference seen.\n\n"
                         + sweep_table([comparison], column))
    return "\n\n".join(parts) + "\n"

# ---- tables of a page, as its comments ask for them ----------------------------------------------

def find(comparison, spec, value):
    """The label of a method at a value of the sweep, or None."""
    for label, v in comparison["variants"].items():
        if v["spec"] == spec and v["value"] in (None, value):
            return label

def by_value(comparisons):
    """[(heading, comparison, value)]: a column of a page's table each. Sweeps of the same base and
    optimizer are joined."""
    found = []
    titles = dict.fromkeys(map(sweep_title, comparisons))
    for title in titles:
        comparison = joined([c for c in comparisons if sweep_title(c) == title])
        values = dict.fromkeys(v["value"] for v in comparison["variants"].values())
        for value in [v for v in values if v is not None] or [None]:
            heading = base_name(comparison["base"]["path"])
            if value is not None:
                heading = setting_in_words(comparison["sweep"], value)
                if len(titles) > 1:
                    heading = f"{title}, {heading}"
            found.append((heading, comparison, value))
    return found

def setting_in_words(sweep, value):
    """"keep=0.1" is "keep 0.1"; the empty value of a sweep over examples is "all examples"."""
    number = value.partition(",")[0].partition("=")[2] or figures.ALL_VALUES[sweep]
    return f"{number} examples" if sweep == "train-size" else f"{sweep} {number}"

def loss_table(comparisons, specs):
    """Markdown: validation losses, mean and standard deviation over seeds, a row per method."""
    columns = by_value(comparisons)
    lines = []
    for spec in specs:
        labels = [find(c, spec, value) for _, c, value in columns]
        losses = [by_seed(c, label, "val_loss").values()
                  for label, (_, c, _) in zip(labels, columns)]
        lines.append([in_words(spec), *(mean_and_deviation(x, 4) for x in losses)])
    return markdown_table(["", *(heading for heading, _, _ in columns)], lines)

def pair_table(comparisons, outcomes, pairs):
    """Markdown: paired differences, a row per pair of methods and a column per outcome."""
    columns = [(heading, c, value, outcome) for heading, c, value in by_value(comparisons)
               for outcome in outcomes]
    lines = []
    for ours, theirs in pairs:
        line = [pair_in_words(ours, theirs)]
        for _, c, value, outcome in columns:
            x, y = (outcome_by_seed(c, find(c, spec, value), outcome) for spec in (ours, theirs))
            line.append(describe(x, y, DIFFERENCES[outcome][1]))
        lines.append(line)
    titles = [heading for heading, _, _, _ in columns]
    if len(titles) == len(outcomes):        # of one comparison
        titles = [DIFFERENCES[outcome][0] for outcome in outcomes]
    return markdown_table(["", *titles], lines)

def speed_table(benches):
    """Markdown: step time and memory of each contestant beside LoRA's, a column per base."""
    names = [base_name(b["configuration"]["base"]) for b in benches]
    lines = []
    for row in benches[0]["rows"]:
        rows = [next(r for r in b["rows"] if r["name"] == row["name"]) for b in benches]
        lines.append([in_words(row["name"]),
                      *(f"{spread(r['step_ms'], 0)} ms, {spread(r['ratio'], 2)}" for r in rows),
                      *(f"{r['peak_memory_mb'][1]:,.0f}" for r in rows)])
    return markdown_table(["", *(f"{name}: a step, and its time / LoRA's" for name in names),
                           *(f"{name}: peak memory (MB)" for name in names)], lines)

def page_table(kind, names, what, results):
    """The Markdown that <!-- KIND of NAME NAME ...: WHAT --> asks for."""
    if kind == "speed":
        return speed_table([read_json(results / name / "bench.json") for name in names])
    comparisons = [read_json(results / name / "comparison.json") for name in names]
    if kind == "about":
        return about(comparisons[0])
    if kind == "losses":
        return loss_table(comparisons, what.split("; "))
    outcomes = kind.split(", ")
    if not set(outcomes) <= set(DIFFERENCES):
        raise ValueError(f"<!-- {kind} of ... -->: there is no such table; choose among about, "
                         f"losses, speed, {', '.join(DIFFERENCES)}.")
    return pair_table(comparisons, outcomes, [pair.split(" - ") for pair in what.split("; ")])

TABLES = re.compile(r"(<!-- ([\w, ]+) of ([\w -]+?)(?:: ([^>]*))? -->)\n.*?<!-- end -->", re.S)

def with_tables(text, results):
    """The text with everything between <!-- KIND of NAME ... --> and <!-- end --> made anew."""
    def block(found):
        comment, kind, names, what = found.groups()
        return f"{comment}\n{page_table(kind, names.split(), what, results)}\n<!-- end -->"

    return TABLES.sub(block, text)

def report(results, readme):
    """Draws the figures of the comparisons in `results` and makes the README's tables anew, all
    from what was measured."""
    comparisons = {path.parent.name: read_json(path)
                   for path in sorted(results.glob("*/comparison.json"))}
    if not comparisons:
        raise ValueError(f"{results} holds no comparison: make one with evidence.compare.")
    for name, comparison in comparisons.items():
        needed = {"variants", "rows", "base", "seeds", "tuning_seeds", "sweep", "step_time"}
        if not needed | {"configuration", "machine"} <= set(comparison):
            raise ValueError(f"{results / name / 'comparison.json'} is no comparison of this "
                             "program: make it again with evidence.compare.")
    for name, comparison in comparisons.items():
        write_text(results / name / "comparison.md", markdown(comparison))
        figures.draw_comparison(comparison, results / name, anew=True)
    whole = {c["base"]["path"]: c for c in comparisons.values()     # the last of each base
             if {"full", "nalora"} <= set(c["variants"]) and not c["sweep"]}
    whole = sorted(whole.values(), key=count_layers)
    figures.draw_homogeneity(whole, results / "homogeneity.png")
    figures.draw_keep([c for c in comparisons.values() if c["sweep"] == "keep"], results)
    text = with_tables(readme.read_text(encoding="utf-8"), results)
    write_text(readme, text)
    print(f"{readme} and the figures in {results} are made anew from {', '.join(comparisons)}.")

def count_layers(comparison):
    return len(comparison["base"]["layers"]["k_hat"])

def csv_text(rows):
    """One line per variant and seed; what is per layer stays in the JSON."""
    left_out = ("layers", "history", "reference")
    names = list(dict.fromkeys(k for row in rows for k in row if k not in left_out))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rounded(rows))
    return buffer.getvalue()

def rounded(value):
    """The value with every float at six significant digits, and NaN as null: results stay small and
    are JSON."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value

def spread(quartiles, digits):
    low, median, high = quartiles
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

def bench_tables(b):
    """{"steps", "sizes", "profile": Markdown} from bench.json alone."""
    c = b["configuration"]
    m = b["machine"]
    peft = next((r["peak_memory_mb"][1] for r in b["rows"] if r["name"] == "PEFT LoRA"), None)
    lines = [[r["name"], spread(r["step_ms"], 1), spread(r["ratio"], 2),
              spread(r["ratio_to_peft"], 2) if r["ratio_to_peft"] else "-",
              f"{r['tokens_per_second']:,.0f}", spread(r["peak_memory_mb"], 0),
              f"{r['peak_memory_mb'][1] / peft:.2f}" if peft else "-",
              f"{r['share_of_matmul_peak']:.0%}", f"{r['first_loss']:.4f}"] for r in b["rows"]]
    steps = markdown_table(["", "ms a step", "time / LoRA's", "time / PEFT LoRA's", "tokens/s",
                            "peak memory (MB)", "memory / PEFT LoRA's", "share of matmul peak",
                            "first loss"], lines)
    generation = "."
    if b["generation_seconds"]:
        generation = f"; {b['problems']} problems are answered in {b['generation_seconds']:.1f} s."
    about = (f"Base {c['base']}, {c['batch_size']} problems a step, rank {c['rank']}, "
             f"{c['dtype']}, {c['threads']} threads, {b['rounds']} rounds; medians (and quartiles; "
             "of memory, of a whole process, the range of three). A matrix product reaches "
             f"{b['matmul_peak'] / 1e9:,.0f} GFLOP/s; shares of it count the products of a step, "
             f"without attention's. {m['cores']} cores of {m['processor']}, Python {m['python']}, "
             f"PyTorch {m['torch']}. Starting Python, importing nalora and loading the base takes "
             f"{spread(b['start_seconds'], 1)} s{generation}")
    lines = [[s["layers"], 64 * s["windows"], f"{s['lora']:.1f}", f"{s['nalora']:.1f}",
              f"{s['nalora'] / s['lora']:.2f}"] for s in b["sizes"]]
    sizes = markdown_table(["layers", "tokens a step", "LoRA (ms)", "NA-LoRA (ms)", "ratio"], lines)
    both = zip(b["profile"]["lora"].items(), b["profile"]["nalora"].items())
    lines = [[f"`{x}`", f"{p:.1%}", f"`{y}`", f"{q:.1%}"] for (x, p), (y, q) in both]
    profile = markdown_table(["LoRA", "", "NA-LoRA", ""], lines)
    return {"steps": f"{about}\n\n{steps}", "sizes": sizes, "profile": profile}

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m evidence.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    args = parser.parse_args(argv)
    try:
        report(args.results, args.readme)
    except (ValueError, OSError) as e:
        print(f"evidence.report: {e}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
