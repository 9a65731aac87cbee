"""Differences, intervals and tables of comparisons, from comparison.json and bench.json alone.

python -m evidence.report       makes the tables of evidence/README.md, each comparison.md and
                                the figures in evidence/results anew
"""

import argparse
import csv
import io
import math
import os
import re
import statistics
import sys
from pathlib import Path

from evidence import figures
from evidence.controls import BLIND_MASKS, PRESETS
from evidence.paired import (
    COLUMNS,
    DIFFERENCES,
    by_seed,
    paired_difference,
    sweep_title,
)
from evidence.peers import PEERS
from nalora import read_json, write_files

HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# the controls that each method is compared with
CONTROLS = {
    "nalora": ["nalora-shuffled", "random-mask", "random-uniform"],
    "nalora-neutral": ["nalora"],
    "nalora-mask": ["shuffled-mask", "random-mask", "redrawn-mask", "inverted-mask"],
    "redrawn-mask": ["shuffled-mask", "random-mask"],
    "nalora-scale": ["uniform-scale"],
    **{peer: ["nalora"] for peer in PEERS},
    **{f"nalora-{peer}": [peer] for peer in PEERS},
}
def references(comparison, label):
    """Labels that a variant is compared with, at its value of the sweep: every LoRA, its own method
    without flags, and of each control the one whose flags differ least, of the same score if it
    looks at the gates."""
    variants = comparison["variants"]
    own = variants[label]
    of = lambda method: [
        other
        for other, v in variants.items()
        if v["method"] == method and other != label and v["value"] in (None, own["value"])
    ]
    differing = lambda other: len(
        set(own["changes"].split(",")) ^ set(variants[other]["changes"].split(","))
    )
    score = lambda v: (re.findall(r"score=(\w+)", v["changes"]) or ["phi_prime"])[0]
    blind = lambda v: PRESETS.get(v["method"], {"mask": "none"}).get("mask") in BLIND_MASKS
    fair = lambda method: [
        other
        for other in of(method)
        if blind(variants[other]) or score(variants[other]) == score(own)
    ]
    controls = [
        min(fair(method), key=differing)
        for method in CONTROLS.get(own["method"], [])
        if fair(method)
    ]
    plain = [
        other for other in of(own["method"]) if variants[other]["changes"] == (own["value"] or "")
    ]
    return list(dict.fromkeys(of("lora") * (own["method"] != "lora") + plain + controls))


def describe(ours, theirs, digits):
    """"mean [low, high] verdict" of ours - theirs, {seed: value} each; a called difference with the
    number of seeds that agree in its sign. "-" where fewer than two seeds have both."""
    if len(set(ours) & set(theirs)) < 2:
        return "-"
    mean, low, high, agree = paired_difference(ours, theirs)
    verdict = (
        "no difference seen"
        if low <= 0 <= high
        else f"{'lower' if mean < 0 else 'higher'} in {agree} of {len(set(ours) & set(theirs))}"
    )
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {verdict}"


def mean_and_deviation(values, digits):
    values = list(values)
    if not values:
        return "-"
    return f"{statistics.mean(values):.{digits}f}" + (
        f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    )


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


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
    return (
        f"Base {c['base']}, {c['train_size'] or 'all'} examples of {c['data']}, {adapters}"
        f"{c['steps']} steps of {c['batch_size']}, {c['optimizer']}, {c['dtype']}; seeds {seeds}; "
        f"{tuning_text(comparison)}. {m['cores']} cores of {m['processor']}, Python {m['python']}, "
        f"PyTorch {m['torch']}."
    )


def tables(comparison):
    """{"about", "results", "selection", "differences", "costs": Markdown} of a comparison, from
    comparison.json alone."""
    variants = comparison["variants"]
    rows = comparison["rows"]
    text = {"about": about(comparison)}
    for name, columns in COLUMNS.items():
        columns = measured(comparison, columns)
        base = [
            "base",
            "",
            *(
                f"{comparison['base'][k]:.{digits}f}"
                if comparison["base"].get(k) is not None
                else "-"
                for k, (_, digits) in columns.items()
            ),
        ]
        lines = [
            [
                label + diverged_text(rows, label),
                rate_text(variants[label]) if label in variants else "",
                *(
                    mean_and_deviation(by_seed(comparison, label, k).values(), digits)
                    for k, (_, digits) in columns.items()
                ),
            ]
            for label in dict.fromkeys(row["variant"] for row in rows)
        ]
        text[name] = markdown_table(
            ["", "lr", *(title for title, _ in columns.values())], [base, *lines]
        )
    if len(comparison["seeds"]) > 1:
        columns = measured(comparison, DIFFERENCES)

        def difference(label, other, k):
            if (
                variants[label]["method"] == "full" and k == "misalignment"
            ):  # 0 by definition: not a result
                return "-"
            return describe(
                by_seed(comparison, label, k), by_seed(comparison, other, k), columns[k][1]
            )

        text["differences"] = markdown_table(
            ["", *(title for title, _ in columns.values())],
            [
                [f"{label} - {other}", *(difference(label, other, k) for k in columns)]
                for label in variants
                for other in references(comparison, label)
            ],
        )
    if comparison["step_time"]:
        runs = {
            label: own
            for label in variants
            if (own := [row for row in rows if row["variant"] == label and "diverged" not in row])
        }
        text["costs"] = markdown_table(
            ["", "trainable parameters", "step time / LoRA", "peak memory (MB)", "file (kB)"],
            [
                [
                    label,
                    f"{r[0]['trainable_parameters']:,}",
                    f"{comparison['step_time'][label]:.2f}",
                    f"{statistics.median(x['peak_memory_mb'] for x in r):,.0f}",
                    f"{r[0]['file_bytes'] / 1e3:,.0f}",
                ]
                for label, r in runs.items()
            ],
        )
    return text


def sweep_table(comparisons, column):
    """Markdown of mean paired differences: a row per pair of methods, a column per value of each
    sweep. Bold: every seed has that sign; in brackets: no difference seen."""
    pairs = {}
    for c in comparisons:
        for label, own in c["variants"].items():
            for other in references(c, label):
                value, ours, theirs = (
                    own["value"] or c["variants"][other]["value"],
                    by_seed(c, label, column),
                    by_seed(c, other, column),
                )
                if value and len(seeds := set(ours) & set(theirs)) > 1:
                    mean, low, high, agree = paired_difference(ours, theirs)
                    text = f"{mean:+.{DIFFERENCES[column][1]}f}"
                    text = (
                        f"({text})"
                        if low <= 0 <= high
                        else f"**{text}**"
                        if agree == len(seeds)
                        else text
                    )
                    pairs.setdefault(f"{own['spec']} - {c['variants'][other]['spec']}", {})[
                        f"{sweep_title(c)} {value.partition('=')[2]}"
                    ] = text
    headings = list(dict.fromkeys(heading for cells in pairs.values() for heading in cells))
    return markdown_table(
        ["", *headings],
        [
            [pair, *(cells.get(heading, "") for heading in headings)]
            for pair, cells in pairs.items()
        ],
    )


def diverged_text(rows, label):
    own = [row for row in rows if row["variant"] == label]
    diverged = sum("diverged" in row for row in own)
    return f" ({diverged} of {len(own)} seeds diverged)" if diverged else ""


def rate_text(variant):
    """The learning rate of a variant, marked where it was the lowest or highest of its grid, so
    that the best one may lie beyond."""
    rates = [lr for lr, _ in variant["tuning"]]
    edge = (
        " (lowest)"
        if variant["lr"] == min(rates)
        else " (highest)"
        if variant["lr"] == max(rates)
        else ""
    )
    return f"{variant['lr']:g}" + edge * (len(rates) > 1)


def measured(comparison, columns):
    """Those of the columns that some run has."""
    return {
        k: v
        for k, v in columns.items()
        if any(row.get(k) is not None for row in comparison["rows"])
    }


def tuning_text(comparison):
    rates = sorted(
        {
            lr
            for v in comparison["variants"].values()
            if len(v["tuning"]) > 1
            for lr, _ in v["tuning"]
        }
    )
    if not rates:
        return "learning rates given, not tuned"
    seeds = comparison["tuning_seeds"]
    return (
        f"learning rate of lowest validation loss among {', '.join(f'{lr:g}' for lr in rates)} "
        f"with seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    )


def markdown(comparison):
    captions = {
        "differences": "Paired differences, mean over seeds [95 % bootstrap interval]:\n\n",
        "costs": "Step time: median of few pairs of steps. Peak memory: of the whole run with its "
        "evaluation. For either alone there is --bench.\n\n",
    }
    return (
        "\n\n".join(captions.get(name, "") + table for name, table in tables(comparison).items())
        + "\n"
    )


def with_tables(text, results):
    """The text with everything between <!-- TABLE of NAME --> and <!-- end --> made anew from
    results/NAME/comparison.json or bench.json; <!-- COLUMN of NAME NAME ... --> makes a
    `sweep_table`."""

    def block(found):
        measured = results / found[3].split()[0] / "bench.json"
        if found[2] in DIFFERENCES:
            made = {
                found[2]: sweep_table(
                    [read_json(results / name / "comparison.json") for name in found[3].split()],
                    found[2],
                )
            }
        else:
            made = (
                bench_tables(read_json(measured))
                if measured.exists()
                else tables(read_json(measured.with_name("comparison.json")))
            )
        if found[2] not in made:
            raise ValueError(f"{found[1]}: there is no such table; choose among {', '.join(made)}.")
        return f"{found[1]}\n{made[found[2]]}\n<!-- end -->"

    return re.sub(r"(<!-- (\w+) of ([\w -]+) -->)\n.*?<!-- end -->", block, text, flags=re.S)


def report(results, readme):
    """Draws the figures of the comparisons in `results` and makes the README's tables anew, all
    from what was measured."""
    comparisons = {
        path.parent.name: read_json(path) for path in sorted(results.glob("*/comparison.json"))
    }
    if not comparisons:
        raise ValueError(
            f"{results} holds no comparison: make one with evidence.compare."
        )
    for name, comparison in comparisons.items():
        needed = {"variants", "rows", "base", "seeds", "tuning_seeds", "sweep", "step_time"}
        if not needed | {"configuration", "machine"} <= set(comparison):
            raise ValueError(
                f"{results / name / 'comparison.json'} is no comparison of this program: make it "
                "again with evidence.compare."
            )
    for name, comparison in comparisons.items():
        write_files(results / name, {"comparison.md": markdown(comparison)})
        figures.draw_comparison(comparison, results / name, anew=True)
    whole = {
        c["base"]["path"]: c
        for c in comparisons.values()
        if {"full", "nalora"} <= set(c["variants"]) and not c["sweep"]
    }  # the last of each base
    figures.draw_homogeneity(
        sorted(whole.values(), key=lambda c: len(c["base"]["layers"]["k_hat"])),
        results / "homogeneity.png",
    )  # small ones first
    over_keep = [c for c in comparisons.values() if c["sweep"] == "keep"]
    figures.draw_sweeps(over_keep, results / "keep.png")
    toys = [c for c in over_keep if c["base"]["path"] == "data/base"]
    figures.draw_sweeps(toys, results / "masks.png", ["val_loss"], figures.README_MASKS)
    text = with_tables(readme.read_text(encoding="utf-8"), results)
    write_files(readme.parent, {readme.name: text})
    print(f"{readme} and the figures in {results} are made anew from {', '.join(comparisons)}.")


def csv_text(rows):
    """One line per variant and seed; what is per layer stays in the JSON."""
    names = list(
        dict.fromkeys(k for row in rows for k in row if k not in ("layers", "history", "reference"))
    )
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
    return (
        (float(f"{value:.6g}") if math.isfinite(value) else None)
        if isinstance(value, float)
        else value
    )


def bench_tables(b):
    """{"steps", "sizes", "profile": Markdown} from bench.json alone."""
    c = b["configuration"]
    m = b["machine"]
    spread = lambda q, digits: f"{q[1]:.{digits}f} ({q[0]:.{digits}f} to {q[2]:.{digits}f})"
    peft = next((r["peak_memory_mb"][1] for r in b["rows"] if r["name"] == "PEFT LoRA"), None)
    steps = markdown_table(
        ["", "ms a step", "time / LoRA's", "time / PEFT LoRA's", "tokens/s", "peak memory (MB)",
         "memory / PEFT LoRA's", "share of matmul peak", "first loss"],
        [
            [
                r["name"],
                spread(r["step_ms"], 1),
                spread(r["ratio"], 2),
                spread(r["ratio_to_peft"], 2) if r["ratio_to_peft"] else "-",
                f"{r['tokens_per_second']:,.0f}",
                spread(r["peak_memory_mb"], 0),
                f"{r['peak_memory_mb'][1] / peft:.2f}" if peft else "-",
                f"{r['share_of_matmul_peak']:.0%}",
                f"{r['first_loss']:.4f}",
            ]
            for r in b["rows"]
        ],
    )
    generation = "."
    if b["generation_seconds"]:
        generation = f"; {b['problems']} problems are answered in {b['generation_seconds']:.1f} s."
    about = (
        f"Base {c['base']}, {c['batch_size']} problems a step, rank {c['rank']}, {c['dtype']}, "
        f"{c['threads']} threads, {b['rounds']} rounds; medians (and quartiles; of memory, of a "
        f"whole process, the range of three). A matrix product reaches "
        f"{b['matmul_peak'] / 1e9:,.0f} GFLOP/s; shares of it count the products of a step, "
        f"without attention's. {m['cores']} cores of {m['processor']}, Python {m['python']}, "
        f"PyTorch {m['torch']}. Starting Python, importing nalora and loading the base takes "
        f"{spread(b['start_seconds'], 1)} s{generation}"
    )
    sizes = markdown_table(
        ["layers", "tokens a step", "LoRA (ms)", "NA-LoRA (ms)", "ratio"],
        [
            [s["layers"], 64 * s["windows"], f"{s['lora']:.1f}", f"{s['nalora']:.1f}",
             f"{s['nalora'] / s['lora']:.2f}"]
            for s in b["sizes"]
        ],
    )
    profile = markdown_table(
        ["LoRA", "", "NA-LoRA", ""],
        [
            [f"`{x}`", f"{p:.1%}", f"`{y}`", f"{q:.1%}"]
            for (x, p), (y, q) in zip(*(b["profile"][k].items() for k in ("lora", "nalora")))
        ],
    )
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
