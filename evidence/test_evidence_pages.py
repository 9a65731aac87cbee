"""What the pages say is what was measured: tables, numbers in sentences, verdicts, links."""
import json
import re
import shlex
import statistics

import pytest

from evidence import compare, paired, report
from evidence.conftest import HERE, README

RESULTS = HERE / "results"
COMPARISONS = {path.parent.name: json.loads(path.read_text(encoding="utf-8"))
               for path in RESULTS.glob("*/comparison.json")}
BENCHES = {name: json.loads((RESULTS / name / "bench.json").read_text()) for name in
           ("bench", "bench-real")}
PAGES = [path for folder in (".", "course", "data", "data/vectors", "evidence", "nalora_hf")
         for pattern in ("*.md", "*.ipynb") for path in (HERE.parent / folder).glob(pattern)]

def prose(text):
    """A page without what is generated, commands and code."""
    for pattern in (report.TABLES, r"```.*?```", r"`[^`\n]*`", r"\]\([^)]*\)",
                    r"\d{4}\.\d{5}|Apache-2.0"):       # arXiv's numbers
        text = re.sub(pattern, " ", text, flags=0 if pattern is report.TABLES else re.S)
    return text

def test_tables_are_those_of_the_results():
    assert report.with_tables(README, RESULTS) == README
    assert len(report.TABLES.findall(README)) > 8
    for name, comparison in COMPARISONS.items():
        text = (RESULTS / name / "comparison.md").read_text(encoding="utf-8")
        assert text == report.markdown(comparison), name

def test_the_page_is_short_and_names_what_exists():
    assert len(re.findall(r"\S*\w\S*", prose(README))) <= 3000
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (HERE / path).exists(), path
    commands = re.findall(r"python -m evidence.compare ([^#`\n]*)", README)
    named = {shlex.split(command)[-1].rpartition("/")[2] for command in commands if command}
    assert named == set(COMPARISONS)        # each result has its command
    for command in commands:
        compare.command_line().parse_args(shlex.split(command))

def test_intervals_stand_in_tables_not_in_sentences():
    assert not re.findall(r"\[[+-]\d", prose(README)) and " ± " not in re.sub(
        "mean ± standard", "", prose(README))

@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(HERE.parent)))
def test_measured_numbers_of_any_page_stand_in_the_results(page):
    """Differences with intervals, and means with deviations of four digits."""
    known = "".join(path.read_text(encoding="utf-8") for path in RESULTS.glob("*/comparison.md"))
    known += "".join(found[0] for found in report.TABLES.finditer(README))
    text = page.read_text(encoding="utf-8").replace("−", "-")
    for pattern in (r"[+-]\d\.\d{3,4} \[[+-][\d.]+, [+-][\d.]+\]", r"\d\.\d{4} ± \d\.\d{4}"):
        for number in re.findall(pattern, text):
            assert number in known, (page, number)

# ---- numbers in the sentences of this folder's page ----------------------------------------------

def mean(name, label, column):
    return statistics.mean(paired.by_seed(COMPARISONS[name], label, column).values())

def percent(name, label, column):
    return f"{100 * mean(name, label, column):.0f} %"

def overhead(name):
    ratio = next(row for row in BENCHES[name]["rows"] if row["name"] == "nalora")["ratio"][1]
    return f"{100 * (ratio - 1):.0f} %"

def trained(label):
    return next(row["trainable_parameters"] for row in COMPARISONS["neighbours"]["rows"]
                if row["variant"] == label)

def version_1():
    return json.loads((RESULTS / "toy" / "version-1.json").read_text(encoding="utf-8"))

def nalora_by_version():
    by_seed = paired.by_seed(COMPARISONS["toy"], "nalora", "val_loss")
    return [by_seed[seed] for seed in range(5)], version_1()["nalora"]["val_loss"]

def sentences():
    """What the page says with numbers, with those of the results put in."""
    base = next(row["trainable_parameters"] for row in COMPARISONS["toy"]["rows"]
                if row["variant"] == "full")
    yield f"the Llama of {base / 1e6:.2f} M parameters"
    yield "({:.2f} against {:.2f} and {:.2f} nats)".format(
        *(mean("toy", label, "text_loss_increase") for label in ("full", "lora", "nalora")))
    moved = [percent("keep-adamw", f"{method}:keep=0.05", "rows_moved")
             for method in ("nalora-mask", "shuffled-mask", "random-mask")]
    yield ("{} of the derivative mask's rows move at some time, {} of the shuffled mask's and {} "
           "of the random one's").format(*moved)
    moved = percent("keep-adamw", "nalora-mask:score=rho_prime,keep=0.05", "rows_moved")
    yield f"Under AdamW {moved} of its rows move at some time even at 0.05"
    rate = COMPARISONS["equal-cost"]["variants"]["lora:rank=2,alpha=4"]["lr"]
    yield f"LoRA of rank 2 the rate {rate}; we added the row at 0.04"
    yield "another seed has M = {:.2f}, not far below LoRA's {:.2f}".format(
        *(mean("toy", label, "misalignment") for label in ("full, another seed", "lora")))
    yield f"rank-8 change has less ({mean('toy', 'full, best rank 8', 'misalignment'):.2f})"
    below = mean("neighbours", "lora", "val_loss") - mean("neighbours", "nalora", "val_loss")
    yield f"It is {below:.4f} below LoRA itself there"
    times = COMPARISONS["neighbours"]["step_time"]
    parted, = ((new, old) for new, old in zip(*nalora_by_version()) if new != old)
    yield "({:.4f} in the place of {:.4f})".format(*parted)
    yield f"with {trained('nora')} parameters it solves almost no problem"
    yield f"a step takes {times['nora++']:.1f} times as long"
    yield f"apart, at {times['dora']:.2f} times the step"
    yield (f"NA-LoRA adds about {overhead('bench')} to a step of the toy, and about "
           f"{overhead('bench-real')} on SmolLM2")

SETTINGS = {"0.05", "0.1", "0.25", "0.5", "0.9", "95 %", "0.08", "0.04"}

def test_numbers_in_sentences_are_those_of_the_results():
    text = prose(README)
    left = text
    for sentence in sentences():
        assert sentence in text, sentence
        left = left.replace(sentence, " ")
    unproven = set(re.findall(r"\d+\.\d+|\d+ %", left)) - SETTINGS
    assert not unproven, unproven

# (what the page says, the comparison that carries it, the pair, the outcome, the verdict)
KEEPS = ("keep=0.05", "keep=0.1", "keep=0.25", "keep=0.5")
NONE = "no difference seen"
VERDICTS = [
    ("none of the other four is seen to differ from LoRA", "toy", pair, "val_loss", NONE)
    for pair in ("full - lora", "nalora - lora", "nalora-shuffled - lora", "random-mask - lora")
] + [
    ("Neither NA-LoRA nor one of its halves is seen to differ", "toy", pair, "val_loss", NONE)
    for pair in ("nalora - lora", "nalora-mask - lora", "nalora-scale - lora")
] + [
    ("worse than one scale for all", "toy", "nalora-scale - uniform-scale", "val_loss", "higher"),
    ("NA-LoRA forgets a little more than LoRA", "toy", "nalora - lora", "text_loss_increase",
     "higher in 4"),
    ("NA-LoRA is below the random mask in loss", "toy", "nalora - random-mask", "val_loss",
     "lower"),
    ("against the random mask with the uniform scale no difference is seen", "score",
     "nalora - random-uniform", "val_loss", NONE),
    ("Full fine-tuning is better than LoRA", "real", "full - lora", "val_loss", "lower in 3"),
    ("NA-LoRA is not seen to differ from LoRA", "real", "nalora - lora", "val_loss", NONE),
    ("or from its shuffled mask", "real", "nalora - nalora-shuffled", "val_loss", NONE),
    ("do a little better than LoRA", "real", "random-mask - lora", "val_loss", "lower in 3"),
    ("than LoRA and NA-LoRA", "real", "nalora - random-mask", "val_loss", "higher in 3"),
    ("so do its two controls", "real", "nalora-shuffled - lora", "text_loss_increase", "higher"),
    ("so do its two controls", "real", "random-mask - lora", "text_loss_increase", "higher"),
    ("two of 100 problems above LoRA's in each seed", "real", "nalora - lora", "test_exact_match",
     "+0.020 [+0.020, +0.020] higher in 3"),
    ("not seen to differ from the controls'", "real", "nalora - nalora-shuffled",
     "test_exact_match", NONE),
    ("not seen to differ from the controls'", "real", "nalora - random-mask", "test_exact_match",
     NONE),
    ("a hair below the random mask", "real-gate", "nalora-mask:keep=0.1 - random-mask:keep=0.1",
     "val_loss", "lower in 3"),
    ("not seen to differ from the shuffled mask", "real-gate",
     "nalora-mask:keep=0.1 - shuffled-mask:keep=0.1", "val_loss", NONE),
    ("and above the redrawn mask", "real-gate", "nalora-mask:keep=0.1 - redrawn-mask:keep=0.1",
     "val_loss", "higher in 3"),
    ("not seen to differ from the random mask's on the toy", "toy", "nalora-mask - random-mask",
     "misalignment", NONE),
    ("above the shuffled mask's, in all seeds", "toy", "nalora-mask - shuffled-mask",
     "misalignment", "higher in 5"),
    ("below it at 0.5 only", "keep-adamw", "nalora-mask:keep=0.5 - random-mask:keep=0.5",
     "misalignment", "lower in 5"),
    ("there the shuffled mask is better still", "train-size", "nalora - nalora-shuffled",
     "val_loss", "higher in 3"),
    ("and with all examples", "train-size", "nalora - lora", "val_loss", "lower in 3"),
    ("are in favour, at rank 16", "rank", "nalora:rank=16,alpha=32 - lora:rank=16,alpha=32",
     "val_loss", "lower in 3"),
    ("rsLoRA and LoRA+", "neighbours", "rslora - lora", "val_loss", "lower in 5"),
    ("rsLoRA and LoRA+", "neighbours", "lora+ - lora", "val_loss", "lower in 4"),
    ("in four of five seeds, at one rate", "neighbours", "nalora - lora", "val_loss",
     "lower in 4"),
    ("is not seen to differ from either", "neighbours", "nalora - random-uniform", "val_loss",
     NONE),
    ("is not seen to differ from either", "neighbours", "random-uniform - lora", "val_loss", NONE),
    ("no difference in loss is seen, it forgets less", "neighbours", "nora++ - lora", "val_loss",
     NONE),
    ("it forgets less", "neighbours", "nora++ - lora", "text_loss_increase", "lower in 5"),
    ("Its M is higher", "neighbours", "nora++ - nalora", "misalignment", "higher in 5"),
    ("the random mask with the uniform scale lowers M as well", "neighbours",
     "random-uniform - lora", "misalignment", "lower in 5"),
    ("Neutral is below LoRA in the small setting", "small", "nalora-neutral - lora", "val_loss",
     "lower in 4"),
    ("and not seen to differ on the toy", "toy", "nalora-neutral - lora", "val_loss", NONE),
    ("alone is above LoRA", "small", "nalora-mask - lora", "val_loss", "higher in 4"),
    ("above the random mask in the small setting", "small", "nalora-mask - random-mask",
     "val_loss", "higher in 4"),
    ("with the scale, the default, it is not", "small", "nalora - lora", "val_loss", NONE),
    ("with the scale, the default, it is not", "small", "nalora - random-mask", "val_loss", NONE),
] + [
    ("no score is seen to differ from it in loss", name, f"{ours} - {theirs}", "val_loss", NONE)
    for name, ours, theirs in (
        ("score", "nalora:score=rho_prime", "nalora"),
        ("score", "nalora-mask:score=rho_prime", "nalora-mask"),
        ("small", "nalora-mask:score=rho_prime", "nalora-mask"),
        ("small", "nalora-mask:score=downstream", "nalora-mask"))
] + [
    ("NA-LoRA's M is above that of all controls, in all three", "real", f"nalora - {other}",
     "misalignment", "higher in 3") for other in ("lora", "nalora-shuffled", "random-mask")
] + [
    ("on top of four of them changes no loss", "neighbours", f"nalora-{peer} - {peer}", "val_loss",
     NONE) for peer in ("rslora", "lora+", "dora", "pissa")
] + [
    ("lowers M and forgetting on each of the four", "neighbours", f"nalora-{peer} - {peer}",
     outcome, "lower") for peer in ("rslora", "lora+", "dora", "pissa")
    for outcome in ("misalignment", "text_loss_increase")
] + [
    ("and exact match on rsLoRA and LoRA+", "neighbours", f"nalora-{peer} - {peer}",
     "test_exact_match", "lower") for peer in ("rslora", "lora+")
] + [
    ("the redrawn mask beats it at every share" if name == "keep-sgd" else
     "beats the derivative mask by far", name, f"nalora-mask:{k} - redrawn-mask:{k}", "val_loss",
     "higher") for name in ("keep-adamw", "keep-sgd") for k in KEEPS
] + [
    ("at 0.05 the derivative mask beats the random mask there", "keep-sgd",
     "nalora-mask:keep=0.05 - random-mask:keep=0.05", "val_loss", "lower in 5"),
    ("Against fixed rows the derivative mask wins", "keep-adamw",
     "nalora-mask:keep=0.05 - random-mask:keep=0.05", "val_loss", "lower in 5"),
    ("worse than the derivative mask at 0.05 only", "keep-adamw",
     "nalora-mask:keep=0.05 - shuffled-mask:keep=0.05", "val_loss", "lower in 5"),
    ("worse than the derivative mask at 0.05 only", "keep-adamw",
     "nalora-mask:keep=0.1 - shuffled-mask:keep=0.1", "val_loss", NONE),
    ("and better at 0.25 and 0.5", "keep-adamw",
     "nalora-mask:keep=0.25 - shuffled-mask:keep=0.25", "val_loss", "higher in 5"),
    ("and better at 0.25 and 0.5", "keep-adamw",
     "nalora-mask:keep=0.5 - shuffled-mask:keep=0.5", "val_loss", "higher in 4")
] + [
    ("from 0.1 on neither the turns nor the credit mask is seen to differ", "turns",
     f"{mask}:{k} - {other}", "val_loss", NONE) for k in KEEPS[1:]
    for mask, other in (("turns-mask", "lora"), ("credit-mask", "lora"),
                        ("credit-mask", f"turns-mask:{k}"))
] + [
    ("both are above LoRA", "turns", "turns-mask:keep=0.05 - lora", "val_loss", "higher in 5"),
    ("both are above LoRA", "turns", "credit-mask:keep=0.05 - lora", "val_loss", "higher in 4"),
    ("the credit mask is below the turns mask, in four of five seeds", "turns",
     "credit-mask:keep=0.05 - turns-mask:keep=0.05", "val_loss", "lower in 4")
] + [
    ("better at every share under AdamW", "keep-adamw",
     f"nalora-mask:score=rho_prime,{k} - nalora-mask:{k}", "val_loss", "lower") for k in KEEPS
] + [
    ("and worse at every share under SGD", "keep-sgd",
     f"nalora-mask:score=rho_prime,{k} - nalora-mask:{k}", "val_loss", "higher") for k in KEEPS
] + [
    ("it is better, too, and still not", "keep-adamw",
     f"nalora-mask:score=downstream,{k} - nalora-mask:{k}", "val_loss", "lower") for k in KEEPS
] + [
    ("not as good as the redrawn mask at any share", "keep-adamw",
     f"nalora-mask:score={score},{k} - redrawn-mask:{k}", "val_loss", "higher") for k in KEEPS
    for score in ("downstream", "rho_prime")
] + [
    ("No score reaches LoRA", "keep-adamw", f"nalora-mask:score={score},{k} - lora", "val_loss",
     "higher") for k in KEEPS for score in ("downstream", "rho_prime")
] + [
    ("at keep 0.05 to 0.25, it is above the random mask's", "keep-adamw",
     f"nalora-mask:{k} - random-mask:{k}", "misalignment", "higher in 5") for k in KEEPS[:3]
] + [
    ("LoRA of rank 4 is better than every mask of rank 4", "equal-cost",
     f"{mask}:rank=4,alpha=8,keep=0.5{score} - lora:rank=4,alpha=8", "val_loss", "higher")
    for mask, score in (("nalora-mask", ""), ("nalora-mask", ",score=rho_prime"),
                        ("nalora-mask", ",score=downstream"), ("random-mask", ""),
                        ("redrawn-mask", ""))]

@pytest.mark.parametrize("said, name, pair, outcome, verdict", VERDICTS)
def test_verdicts_of_the_page_are_those_of_the_results(said, name, pair, outcome, verdict):
    assert said.lower() in prose(README).lower()
    ours, theirs = (paired.by_seed(COMPARISONS[name], label, outcome)
                    for label in pair.split(" - "))
    assert verdict in report.describe(ours, theirs, paired.DIFFERENCES[outcome][1])

def test_orders_and_ratios_that_the_page_speaks_of():
    approximated = mean("toy", "full, linear layers", "val_loss")
    assert mean("toy", "full, best rank 8", "val_loss") > 2 * approximated
    losses = {label: mean("toy", label, "val_loss") for label in COMPARISONS["toy"]["variants"]}
    assert max(losses, key=losses.get) == "inverted-mask"
    for mask in ("rank=4,alpha=8,keep=0.5", "rank=8,alpha=16,keep=0.25"):   # at equal cost
        redrawn = mean("equal-cost", f"redrawn-mask:{mask}", "val_loss")
        for score in ("", ",score=rho_prime", ",score=downstream"):
            assert redrawn < mean("equal-cost", f"nalora-mask:{mask}{score}", "val_loss")
    masks = ("inverted-mask", "random-mask", "shuffled-mask", "nalora-mask")
    for name, keeps in (("keep-sgd", KEEPS), ("real-gate", ["keep=0.1"])):
        for keep in keeps:                  # the redrawn mask comes next to LoRA
            redrawn = mean(name, f"redrawn-mask:{keep}", "val_loss")
            assert mean(name, "lora", "val_loss") < redrawn
            assert all(redrawn < mean(name, f"{mask}:{keep}", "val_loss") for mask in masks)

def rate(name, label):
    return COMPARISONS[name]["variants"][label]["lr"]

def test_rates_that_the_page_speaks_of():
    assert rate("keep-adamw", "nalora-mask:keep=0.05") == 4 * rate("keep-adamw",
                                                                   "shuffled-mask:keep=0.05")
    assert 2 * rate("keep-adamw", "nalora-mask:keep=0.5") == rate("keep-adamw",
                                                                  "random-mask:keep=0.5")
    assert rate("turns", "turns-mask:keep=0.05") == 2 * rate("turns", "credit-mask:keep=0.05")
    grid = COMPARISONS["turns"]["variants"]["turns-mask:keep=0.05"]["tuning"]
    assert rate("turns", "turns-mask:keep=0.05") == max(lr for lr, _ in grid)
    assert rate("rank", "nalora-shuffled:rank=16,alpha=32") == 2 * rate("rank",
                                                                        "nalora:rank=16,alpha=32")
    assert rate("train-size", "nalora") == 2 * rate("train-size", "lora")
    assert rate("neighbours", "nalora") == rate("neighbours", "lora")
    assert rate("toy", "inverted-mask") == max(c["lr"] for c in COMPARISONS["toy"]["variants"]
                                               .values())

def test_version_2_ends_at_the_losses_of_version_1():
    toy = COMPARISONS["toy"]
    old = version_1()
    assert old.keys() == toy["variants"].keys() and len(toy["seeds"]) == 5
    judged = {(label, seed): loss == then for label in old for (seed, loss), then in zip(
        sorted(paired.by_seed(toy, label, "val_loss").items()), old[label]["val_loss"])}
    tuned = {(label, i): losses == then for label in old for i, (losses, then) in enumerate(
        zip(toy["variants"][label]["tuning"], old[label]["tuning"]))}
    assert f"the toy's {len(judged)} runs that judge, {sum(judged.values())} end" in README
    assert f"do {sum(tuned.values())} of the {len(tuned)} means that tune" in README
    parted = {label for (label, _), same in [*judged.items(), *tuned.items()] if not same}
    assert parted == {"nalora", "nalora-neutral", "nalora-mask"}  # those with a mask by |phi'|
    for label in ("full:lr=1.5e-3", "lora"):  # of the turns mask's, what it shares with version 1's
        new, old = (paired.by_seed(COMPARISONS[name], label, "val_loss")
                    for name in ("turns", "keep-adamw"))
        assert new == old and len(new) == 5
        assert (COMPARISONS["turns"]["variants"][label]["tuning"]
                == COMPARISONS["keep-adamw"]["variants"][label]["tuning"])

def test_k_hat_of_smollm2_by_layer():
    k_hat = COMPARISONS["real"]["base"]["layers"]["k_hat"]
    assert [i for i, k in enumerate(k_hat) if k < 1] == list(range(1, 14))      # 1 to 13
    assert len(k_hat) == 30

def test_the_widest_interval_against_lora_is_half_of_its_loss():
    toy = COMPARISONS["toy"]
    lora = paired.by_seed(toy, "lora", "val_loss")
    bounds = [paired.paired_difference(paired.by_seed(toy, label, "val_loss"), lora)[1:3]
              for label in toy["variants"] if label != "lora"]
    widest = max(high for low, high in bounds if low <= 0 <= high)
    assert widest / statistics.mean(lora.values()) == pytest.approx(0.5, abs=0.05)
