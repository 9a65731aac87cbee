"""What the pages of the course say: every number has a source, minutes add up, files are there."""
import json
import math
import re
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nalora

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "evidence" / "results"

import solutions
import step6
import vectors

LAB = (HERE / "README.md").read_text(encoding="utf-8")
LECTURER = (HERE / "lecturer.md").read_text(encoding="utf-8")
VARIANTS = {"all: LoRA": "lora", "the most responsive": "nalora-mask:keep=0.1",
            "these, shuffled": "shuffled-mask:keep=0.1", "random, fixed": "random-mask:keep=0.1",
            "random, redrawn": "redrawn-mask:keep=0.1",
            "the least responsive": "inverted-mask:keep=0.1"}

def results(name):
    return json.loads((RESULTS / name / "comparison.json").read_text(encoding="utf-8"))

def by_rows(key, name="keep-adamw"):
    """{row of step 6's table: [value of each seed]}."""
    rows = results(name)["rows"]
    return {row: [r[key] for r in rows if r["variant"] == variant]
            for row, variant in VARIANTS.items()}

def in_words(variant):
    """As the reports call it: nalora-mask:keep=0.1 is "derivative mask, keep 0.1"."""
    name, _, setting = variant.partition(":")
    names = {"lora": "LoRA", "nalora": "NA-LoRA", "nalora-mask": "derivative mask"}
    words = names.get(name, name.replace("-", " "))
    return f"{words}, {setting.replace('=', ' ')}" if setting else words

def difference(name, first, second):
    """("-0.0266 [-0.0429, -0.0102]", "lower in 5 of 5") of the loss, as its report has it."""
    text = (RESULTS / name / "comparison.md").read_text(encoding="utf-8")
    pair = f"| {in_words(first)} − {in_words(second)} |"
    line = next(line for line in text.splitlines() if line.startswith(pair))
    number, _, words = line.split("|")[2].strip().partition("] ")
    return f"{number}]", words

def root_of_kappa():
    z = torch.tensor(1.0, dtype=torch.float64)
    for _ in range(100):
        z = 1 / torch.sigmoid(z)
    return z.item()

def ratio(name):
    """NA-LoRA's step over LoRA's."""
    text = (RESULTS / name / "bench.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("| nalora |"))
    return line.split("|")[3].split()[0]

# ---- every number has a source ---------------------------------------------------
def computed():
    """{number as a page writes it, without sign: what it is}: to so many digits they agree."""
    one = torch.ones(1, dtype=torch.float64)
    gates = torch.tensor(np.random.default_rng(0).normal(-0.5, 2, (40, 7)))  # those of the check
    k_hat = results("real")["base"]["layers"]["k_hat"]
    return {"0.927671": nalora.value_and_slope(F.silu, one)[1].item(), "1.27846": root_of_kappa(),
            "1.111": nalora.effective_homogeneity(F.silu, gates).item(),
            "1.050": nalora.effective_homogeneity(F.gelu, gates).item(),
            "9.07": solutions.drift(1000, 100), "9.46": solutions.drift(100, 100),
            "9.64": solutions.drift(10, 100), "9.0": 0.9 / (1 - 0.9), "0.59": min(k_hat),
            "1.18": max(k_hat), "1.04": float(ratio("bench")), "1.02": float(ratio("bench-real")),
            "0.9": 0.9, "0.07": 0.07}

INTERVALS = {("keep-adamw", "nalora-mask:keep=0.1", "random-mask:keep=0.1"): "lower in 5 of 5",
             ("keep-adamw", "nalora-mask:keep=0.1", "shuffled-mask:keep=0.1"): "no difference seen",
             ("keep-adamw", "redrawn-mask:keep=0.1", "lora"): "higher in 3 of 5",
             ("keep-sgd", "nalora-mask:keep=0.1", "random-mask:keep=0.1"): "no difference seen",
             ("keep-sgd", "nalora-mask:keep=0.1", "shuffled-mask:keep=0.1"): "lower in 5 of 5"}

def table():
    """The table of step 6, as the data has it."""
    losses = by_rows("val_loss")
    moved = by_rows("rows_moved")
    return [f"| {row} | {mean(losses[row]):.4f} ± {stdev(losses[row]):.4f} | "
            f"{100 * mean(moved[row]):.0f} % |" for row in VARIANTS]

def test_the_table_of_step_6_is_that_of_the_data():
    lines = [line for line in LAB.splitlines() if " ± " in line and line.startswith("| ")]
    assert lines[1:] == table()
    assert list(VARIANTS) == list(step6.ROWS) and set(map(len, by_rows("val_loss").values())) == {5}

def test_the_numbers_are_what_they_say():
    for text, value in computed().items():
        digits = len(text.partition(".")[2])
        assert f"{value:.{digits}f}" == text

def test_the_intervals_are_those_of_the_reports():
    for (name, first, second), words in INTERVALS.items():
        number, found = difference(name, first, second)
        assert number in LAB and found == words

def test_no_number_stands_without_a_source():
    """A new decimal or percentage on a page needs a line above; an old line a page."""
    sourced = " ".join([*computed(), *table(), *(difference(*key)[0] for key in INTERVALS)])
    decimals = set(re.findall(r"\d+\.\d+", sourced))
    assert set(re.findall(r"\d+\.\d+", LAB + LECTURER)) == decimals
    moved = set(re.findall(r"(\d+) %", " ".join(table())))
    assert set(re.findall(r"(\d+) %", LAB + LECTURER)) == moved | {"1", "5"}  # kappa; chance

# ---- what is said in words -------------------------------------------------------
def test_kappa_of_silu_is_as_told():
    z = root_of_kappa()
    place = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    kappa = nalora.homogeneity(F.silu, torch.tensor([z, -z], dtype=torch.float64))
    assert kappa[0] == pytest.approx(z) and kappa[1] == pytest.approx(0, abs=1e-12)
    assert nalora.homogeneity(F.silu, place).max() <= kappa[0]

def test_the_conclusions_hold_in_the_data():
    losses = by_rows("val_loss")
    best = {row: sum(a < b for a, b in zip(losses["the most responsive"], losses[row]))
            for row in losses}
    told = "better than fixed random ones in {}, than shuffled ones in {}, than redrawn ones in {}."
    assert told.format(best["random, fixed"], best["these, shuffled"], best["random, redrawn"]) \
        in LECTURER
    means = {row: mean(values) for row, values in losses.items()}
    ordered = sorted(means, key=means.get)
    assert ordered[:2] == ["all: LoRA", "random, redrawn"] and ordered[-1] == "the least responsive"
    assert best["the least responsive"] == 5 and "above the most responsive in 5 of 5" in LAB
    sgd = {row: mean(values) for row, values in by_rows("val_loss", "keep-sgd").items()}
    assert max(sgd, key=sgd.get) == "the least responsive"
    k_hat = results("real")["base"]["layers"]["k_hat"]
    layers = f"0.59 in layer {np.argmin(k_hat)} to 1.18 in layer {np.argmax(k_hat)}"
    assert layers in LAB
    told = (RESULTS / "toy" / "comparison.md").read_text(encoding="utf-8")
    line = next(line for line in told.splitlines() if line.startswith("| NA-LoRA − LoRA |"))
    assert "no difference seen" in line.split("|")[2]

def test_the_rates_of_step_6_are_those_that_tuning_chose():
    for optimizer, (lora, others) in step6.RATES.items():
        variants = results(f"keep-{optimizer}")["variants"]
        for name in VARIANTS.values():
            assert variants[name]["lr"] == (lora if name == "lora" else others)
    grid = [rate for rate, _ in results("keep-sgd")["variants"]["lora"]["tuning"]]
    assert step6.RATES["sgd"][1] == max(grid) and "both took the highest rate" in LAB

def test_so_many_hands_come_by_chance_in_less_than_5_percent():
    lines = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", LECTURER, re.M)
    assert [int(runs) for runs, _, _ in lines] == [10, 20, 30, 40]
    for runs, most, least in (map(int, line) for line in lines):
        def chance(hands):
            return 2 * sum(math.comb(runs, k) for k in range(hands, runs + 1)) / 2**runs
        assert most == runs - least and chance(least) < 0.05 <= chance(least - 1)

def test_the_tour_says_what_its_stored_outputs_show():
    cells = json.loads((HERE / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    printed = "".join("".join(o.get("text", [])) for c in cells for o in c.get("outputs", []))
    told = " ".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    shift = {name: float(value) for name, value in re.findall(
        r"^(.+): mean \|change of rho\|.*; over all ([\d.]+)$", printed, re.M)}
    assert shift["NA-LoRA"] < shift["LoRA"] and "shifts a little less than in LoRA" in told
    assert abs(shift["random rows"] - shift["NA-LoRA"]) < 0.2 * (shift["LoRA"] - shift["NA-LoRA"])
    assert "with random rows it does so by about as much" in told
    assert "More than half of the rows moved at some time" in told
    moved = re.search(r"^NA-LoRA: rows that moved at some time, by layer: (.*)$", printed, re.M)[1]
    assert all(int(share.rstrip("%")) > 50 for share in moved.split(", "))
    assert float(re.search(r"share of z > 0: ([\d.]+)", printed)[1]) < 0.5
    assert "Most gates are below 0" in told
    first, last = re.search(r"changes in a step: ([\d.]+) at first, ([\d.]+) at", printed).groups()
    assert float(last) < float(first) and "changes its choice less and less" in told

# ---- minutes, commands, files ----------------------------------------------------
def test_the_minutes_agree_and_make_ninety():
    lab = re.findall(r"^## (Start|Step \d).*\((\d+) minutes\)$", LAB, re.M)
    lecturer = re.findall(r"^\| (\d+) \| (Start|Step \d) \|", LECTURER, re.M)
    assert [(name, minutes) for minutes, name in lecturer] == lab
    assert len(lab) == 7 and sum(int(minutes) for _, minutes in lab) == 90

def test_what_the_lab_counts_is_there():
    cases = [case for case, _ in vectors.load().values() if case["kind"] == "gates"]
    assert len(cases) == 15 and "runs fifteen [test vectors]" in LAB
    explore = (HERE / "explore.html").read_text(encoding="utf-8")
    assert explore.count("<details>") == 5 and "its five questions" in LAB
    tour = json.loads((HERE / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    titles = re.findall(r"^## (\d)\.", "\n".join("".join(c["source"]) for c in tour
                                               if c["cell_type"] == "markdown"), re.M)
    assert titles == list("12345678") and "sections 4 to 8 of the [tour]" in LAB

def test_links_and_commands_lead_somewhere():
    for page in (LAB, LECTURER):
        links = re.findall(r"\]\(([^)#]+)\)", page)
        assert links and all((HERE / link).exists() for link in links)
        for file in re.findall(r"python ([\w/]+\.py)", page):
            assert (HERE.parent / file).exists()
    assert LAB.count("<details>") == LAB.count("</details>") == LAB.count("<details><summary>") == 8
