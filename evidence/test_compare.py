"""The protocol: variants, rates, seeds, and how runs go on."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import train_tiny
from data import problems
from evidence import compare, measures, paired, peers, report
from evidence.conftest import HERE
from evidence.controls import Config

long = pytest.mark.skipif("NALORA_LONG" not in os.environ, reason="long: set NALORA_LONG=1")

def test_bootstrap_interval():
    assert paired.bootstrap_interval([3, 3, 3]) == (3, 3)
    # both picks alike has probability 1/4 each: beyond 2.5 %
    assert paired.bootstrap_interval([0, 1]) == (0, 1)
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = paired.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert abs(low - (values.mean() - half)) < 0.03 and abs(high - (values.mean() + half)) < 0.03

def share_missed(seeds, count):
    """How often the interval of `count` null differences of so many seeds leaves 0 out."""
    draws = np.random.default_rng(seeds).normal(0, 1, (count, seeds))
    return sum(not low <= 0 <= high for low, high in map(paired.bootstrap_interval, draws)) / count

def test_how_often_a_true_null_is_called_a_difference():
    assert 0.02 < share_missed(20, 300) < 0.14      # 5 % and what the bootstrap loses at 20 values
    assert share_missed(3, 1500) == pytest.approx(1 / 4, abs=0.03)      # as README says
    assert share_missed(5, 1500) == pytest.approx(1 / 6, abs=0.03)

def test_differences_are_paired_by_seed():
    theirs = {0: 10.0, 1: 500.0, 2: -30.0, 9: 1e6}
    ours = {2: -30.5, 0: 9.5, 1: 499.5, 7: 0.0}
    assert paired.paired_difference(ours, theirs) == (-0.5, -0.5, -0.5, 3)
    assert report.describe(ours, theirs, 1) == "-0.5 [-0.5, -0.5] lower in 3 of 3"
    zero = dict.fromkeys(range(5), 0.0)
    mixed = report.describe({0: 2.0, 1: 2.0, 2: 2.0, 3: 2.0, 4: -0.1}, zero, 1)
    assert mixed.startswith("+1.6 [") and mixed.endswith("] higher in 4 of 5")
    assert report.describe({0: 2.0, 1: -1.0, 2: 0.0}, zero, 1).endswith("no difference seen")
    with pytest.raises(ValueError, match="two seeds in common"):
        paired.paired_difference({0: 1.0}, theirs)

# ---- comparisons that run ------------------------------------------------------------------------

def comparison_arguments(base, out, *more):
    settings = ("--test-size 4 --steps 6 --eval-every 2 --batch-size 4 --jobs 1 --seeds 0 1 --lrs "
                "1e-3 1e-2 --methods full lora nalora random-mask")
    return ["--base", str(base), "--out", str(out), *settings.split(), *more]

def result_of(out):
    return json.loads((out / "comparison.json").read_text())

def without_timing(comparison):
    timing = ("step_ms", "train_seconds", "peak_memory_mb")
    rows = [{k: v for k, v in row.items() if k not in timing} for row in comparison["rows"]]
    return {**comparison, "rows": rows, "step_time": sorted(comparison["step_time"])}

@pytest.fixture(scope="session")
def comparison(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "out"
    assert compare.main(comparison_arguments(base, out)) == 0
    return out

def test_compare_writes_tables_and_figures(comparison):
    result = result_of(comparison)
    assert list(result["variants"]) == ["full", "lora", "nalora", "random-mask"]
    assert len(result["rows"]) == 2 * 7
    lora = [row for row in result["rows"] if row["variant"] == "lora"]
    assert [row["seed"] for row in lora] == [0, 1] and lora[0]["val_loss"] != lora[1]["val_loss"]
    for column in (c for columns in paired.COLUMNS.values() for c in columns):
        assert all(math.isfinite(row[column]) for row in lora), column
    moved = {row["variant"]: row.get("rows_moved") for row in result["rows"]}
    assert moved["full"] is None and moved["lora"] == 1
    assert moved["random-mask"] == 0.5 <= moved["nalora"] <= 1
    assert all(row["misalignment"] == 0 for row in result["rows"] if row["variant"] == "full")
    floor = [row for row in result["rows"] if row["variant"] == "full, another seed"]
    assert len(floor) == 2 and all(row["misalignment"] > 0 for row in floor)
    assert (comparison / "comparison.csv").read_text().count("\n") == 15
    text = (comparison / "comparison.md").read_text()
    assert "NA-LoRA − random mask" in text and "NA-LoRA − LoRA" in text
    assert re.search(r"\| LoRA \| 0\.01 \(highest\) \| \d\.\d{4} ± ", text)
    for figure in ("differences", "alignment", "at_work", "training", "homogeneity"):
        assert (comparison / f"{figure}.png").exists()

def test_a_comparison_repeats_nothing(base, comparison, capsys, monkeypatch):
    before = result_of(comparison)
    monkeypatch.setattr(compare, "finish", None)    # a run that is repeated would fail
    assert compare.main(comparison_arguments(base, comparison)) == 0
    assert "8 runs, 8 of them finished already" in capsys.readouterr().out
    assert without_timing(result_of(comparison)) == without_timing(before)
    assert compare.main(comparison_arguments(base, comparison, "--batch-size", "5")) == 2
    assert "other settings" in capsys.readouterr().err

def test_a_run_of_a_comparison_is_the_run_of_train_tiny(base, comparison, tmp_path):
    """The same losses, the same answers."""
    lr = result_of(comparison)["variants"]["nalora"]["lr"]
    c = train_tiny.Config(method="nalora", base=str(base), test_size=4, steps=6, eval_every=2,
                          batch_size=4, lr=lr)
    summary = train_tiny.execute(c, tmp_path / "alone")
    ours = json.loads((comparison / "nalora" / f"lr{lr:g}-seed0" / "summary.json").read_text())
    for key in ("val_loss", "test_exact_match", "arithmetic_accuracy", "trainable_parameters"):
        assert summary[key] == ours[key], key

def test_neighbours_are_compared_as_they_were_trained(base, tmp_path):
    """What a comparison reloads of a neighbour is what was trained: its loss, its selection."""
    methods = [*peers.PEERS, "nalora-dora"]
    flags = comparison_arguments(base, tmp_path, "--test-size", "0", "--lrs", "1e-3", "--methods",
                                 "full", "lora", "nalora", *methods)
    assert compare.main(flags) == 0
    result = result_of(tmp_path)
    for method in methods:
        out = next((tmp_path / re.sub(r"[^\w.-]", "-", method)).glob("*seed0"))
        run = compare.controls.set_up(Config(**json.loads((out / "config.json").read_text())))
        row = next(row for row in result["rows"] if row["variant"] == method and row["seed"] == 0)
        loss = problems.mean_loss(measures.trained_model(out), run.validation)
        assert loss == pytest.approx(row["val_loss"], rel=1e-5)
        assert 0 < row["misalignment"] < 3 and math.isfinite(row["shift_cosine"])
        assert math.isfinite(row["weight_cosine"]) or method == "nora"
    table = report.tables(result)["differences"]
    for pair in ("NoRA − NA-LoRA", "NA-LoRA on DoRA − DoRA", "PiSSA − LoRA"):
        assert f"| {pair} |" in table

def test_a_data_file_of_ones_own(base, tmp_path):
    """Answers are judged by the mark that the completions show, here "####"."""
    lines = [{"prompt": f"{i}+1? ", "completion": f"#### {i + 1}", "answer": i + 1}
             for i in range(40)]
    data = tmp_path / "own.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    flags = comparison_arguments(base, out, "--data", str(data), "--methods", "lora", "nalora")
    assert compare.main([*flags, "--lrs", "1e-2"]) == 0
    assert str(data) in (out / "comparison.md").read_text()
    config = json.loads((out / "lora" / "lr0.01-seed0" / "config.json").read_text())
    run = compare.controls.set_up(Config(**config))
    assert len(run.problems) == 4 and "#### " in run.problems[0]["completion"]
    data.write_text(data.read_text() + "\n" + json.dumps(lines[0]))
    assert compare.main([*flags, "--lrs", "1e-2"]) == 2     # other data than it was made with

@long
def test_a_killed_comparison_goes_on_to_the_same_result(base, comparison, tmp_path):
    out = tmp_path / "out"
    flags = comparison_arguments(base, out, "--jobs", "2")
    process = subprocess.Popen([sys.executable, "-m", "evidence.compare", *flags], cwd=HERE.parent,
                               stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.rglob("summary.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "comparison.json").exists()
    time.sleep(2)                           # the workers notice within half a second
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    assert finished
    assert compare.main(comparison_arguments(base, out)) == 0
    assert all(path.stat().st_mtime_ns == t for path, t in finished.items())
    assert without_timing(result_of(out)) == without_timing(result_of(comparison))

def test_tuning_takes_the_lowest_loss_and_passes_over_what_diverges(base, tmp_path, capsys):
    common = comparison_arguments(base, tmp_path / "out", "--methods", "lora", "--test-size", "0")
    assert compare.main([*common, "--lrs", "1e-2", "1e-5", "1e25"]) == 0
    variant = result_of(tmp_path / "out")["variants"]["lora"]
    losses = dict(map(tuple, variant["tuning"]))
    assert variant["lr"] == 0.01 and losses[0.01] < losses[1e-5] and losses[1e25] is None
    assert compare.main([*common, "--lrs", "1e25", "1e26"]) == 2
    assert "diverged at every learning rate" in capsys.readouterr().err

def test_a_judged_run_that_diverges_is_told_and_left_out(base, tmp_path, monkeypatch):
    """Of LoRA one seed of three, of full fine-tuning another: the rest of the comparison stands."""
    finish = compare.finish

    def diverging(config, out):
        if (config.method, config.seed) in (("lora", 1), ("full", 2)):
            raise train_tiny.Diverged("not finite")
        return finish(config, out)

    monkeypatch.setattr(compare, "finish", diverging)
    flags = ("--seeds", "0", "1", "2", "--lrs", "1e-3", "--test-size", "0")
    assert compare.main(comparison_arguments(base, tmp_path, *flags)) == 0
    result = result_of(tmp_path)
    text = report.markdown(result)
    assert "| LoRA (1 of 3 seeds diverged) |" in text
    assert "| full fine-tuning (1 of 3 seeds diverged) |" in text
    assert (tmp_path / "differences.png").exists()
    assert sorted(paired.by_seed(result, "lora", "val_loss")) == [0, 2]
    assert sorted(paired.by_seed(result, "nalora", "misalignment")) == [0, 1]
    assert re.search(r"\| NA-LoRA − LoRA \| [+-]", text)
    assert re.search(r"\| full fine-tuning − LoRA \| - \|", text)

# ---- variants and tables -------------------------------------------------------------------------

def parsed(base, *more):
    args = compare.command_line().parse_args(comparison_arguments(base, "out", *more))
    compare.check(args)
    return args

@pytest.mark.parametrize("sweep, given, values", [
    ("keep", None, ["keep=0.05", "keep=0.1", "keep=0.25", "keep=0.5"]),
    ("keep", ["0.2"], ["keep=0.2"]),
    ("rank", ["3", "4"], ["rank=3,alpha=6", "rank=4,alpha=8"])])
def test_variants_of_a_sweep(base, sweep, given, values):
    flags = ["--values", *given] if given else []
    spec = "nalora-mask:score=rho_prime"
    flags += ["--methods", "lora", spec, "--sweep", sweep]
    variants = compare.variants_of(parsed(base, *flags))
    swept = {f"{spec},{value}": value for value in values}
    assert {k: v["value"] for k, v in variants.items() if v["method"] != "lora"} == swept
    if sweep == "keep":                     # does not touch LoRA
        assert variants["lora"]["value"] is None

def test_the_flags_of_a_variant(base):
    spec = "nalora-mask:score=rho_prime,keep=0.1,targets=gate_proj+up_proj"
    config = compare.configure(parsed(base), spec, lr=0.5, seed=3)
    assert config.score == "rho_prime" and config.keep == 0.1
    assert config.targets == ["gate_proj", "up_proj"]
    assert config.lr == 0.5 and config.seed == 3

def variant(label, value=None):
    method, _, changes = label.partition(":")
    return {"method": method, "spec": method, "changes": changes, "value": value}

def test_what_a_variant_is_compared_with():
    masks = ["nalora-mask:rank=4,keep=0.1", "random-mask:keep=0.5", "random-mask:rank=4,keep=0.1",
             "inverted-mask"]
    variants = {label: variant(label) for label in ("full", "lora", "lora:rank=4", *masks)}
    find = report.references
    assert find({"variants": variants}, masks[0]) == ["lora", "lora:rank=4", *masks[2:]]
    assert find({"variants": variants}, "lora") == []
    assert find({"variants": variants}, "lora:rank=4") == ["lora"]
    assert find({"variants": variants}, "full") == ["lora", "lora:rank=4"]

def test_what_a_variant_of_a_sweep_is_compared_with():
    labels = [f"{method}:keep={k}" for method in ("nalora-mask", "random-mask") for k in (0.1, 0.5)]
    variants = {label: variant(label, label.partition(":")[2]) for label in labels}

    def found(label):
        return report.references({"variants": variants}, label)

    def add(label):
        variants[label] = variant(label, "keep=0.5")

    assert found("nalora-mask:keep=0.5") == ["random-mask:keep=0.5"]
    scored = "nalora-mask:score=rho_prime,keep=0.5"
    add(scored)
    matched = ["nalora-mask:keep=0.5", "random-mask:keep=0.5"]
    assert found(scored) == matched
    add("shuffled-mask:keep=0.5")           # these follow a score, so only their own is matched
    add("inverted-mask:keep=0.5")
    assert sorted(found(scored)) == matched
    add("shuffled-mask:score=rho_prime,keep=0.5")
    assert sorted(found(scored)) == [*matched, "shuffled-mask:score=rho_prime,keep=0.5"]
    assert found("nalora-mask:keep=0.5")[0] == "shuffled-mask:keep=0.5"

def sweep(base, optimizer, losses):
    """A comparison as sweep_table reads it; losses: {label: [loss of each seed]}."""
    masks = ("nalora-mask", "random-mask")
    labels = ["lora", *(f"{mask}:keep={k}" for mask in masks for k in (0.1, 0.5))]
    variants = {label: variant(label, label.partition(":")[2] or None) for label in labels}
    rows = [{"variant": label, "seed": seed, "val_loss": loss}
            for label, values in losses.items() for seed, loss in enumerate(values)]
    return {"variants": variants, "base": {"path": base}, "rows": rows,
            "configuration": {"optimizer": optimizer}, "sweep": "keep"}

TOY = sweep("/somewhere/data/base", "adamw", {
    "lora": [1, 1, 1], "nalora-mask:keep=0.1": [2, 3, 4], "nalora-mask:keep=0.5": [0.5, 2, 1],
    "random-mask:keep=0.1": [1, 4, 3.5]})
REAL = sweep("smollm2", "sgd", {"lora": [1, 1, 1], "nalora-mask:keep=0.5": [1.5, 1.5, 1]})

def test_the_table_of_sweeps():
    assert report.sweep_table([TOY, REAL], "val_loss") == "\n".join([
        "|  | toy, AdamW 0.1 | toy, AdamW 0.5 | SmolLM2, SGD 0.5 |", "| --- | --- | --- | --- |",
        "| derivative mask − LoRA | **+2.0000** | (+0.1667) | (+0.3333) |",
        "| derivative mask − random mask | (+0.1667) |  |  |",
        "| random mask − LoRA | (+1.8333) |  |  |"])

def test_the_tables_of_a_page():
    assert report.loss_table([TOY], ["lora", "random-mask"]) == "\n".join([
        "|  | keep 0.1 | keep 0.5 |", "| --- | --- | --- |",
        "| LoRA | 1.0000 ± 0.0000 | 1.0000 ± 0.0000 |", "| random mask | 2.8333 ± 1.6073 | - |"])
    assert report.pair_table([REAL], ["val_loss"], [("nalora-mask", "lora")]) == "\n".join([
        "|  | keep 0.1 | keep 0.5 |", "| --- | --- | --- |",
        "| derivative mask − LoRA | - | +0.3333 [+0.0000, +0.5000] no difference seen |"])
    heading = report.loss_table([TOY, REAL], ["lora"]).splitlines()[0]
    assert heading == ("|  | toy, AdamW, keep 0.1 | toy, AdamW, keep 0.5 | SmolLM2, SGD, keep 0.1 "
                       "| SmolLM2, SGD, keep 0.5 |")
    assert report.setting_in_words("train-size", "") == "all examples"
    assert report.markdown_table(["by |ρ'|"], [[1]]) == "| by \\|ρ'\\| |\n| --- |\n| 1 |"

def test_full_fine_tuning_has_no_misalignment_of_its_own():
    rows = [{"variant": label, "seed": seed, "misalignment": seed, "val_loss": 1}
            for label in ("full", "lora") for seed in range(3)]
    whole = {"variants": {label: variant(label) for label in ("full", "lora")}, "rows": rows,
             "sweep": None, "base": {"path": "data/base"}, "configuration": {"optimizer": "adamw"}}
    table = report.pair_table([whole], ["val_loss", "misalignment"], [("full", "lora")])
    assert table.startswith("|  | validation loss | misalignment M |\n")
    assert table.endswith("| +0.0000 [+0.0000, +0.0000] no difference seen | - |")

def test_only_comparisons_of_the_same_settings_are_joined():
    settings = {"steps": 1, "batch_size": 2, "targets": [], "optimizer": "adamw",
                "train_size": None}
    one = {**TOY, "configuration": settings}
    more = sweep("/somewhere/data/base", "adamw", {"lora": [9, 9, 9], "turns-mask": [7, 8, 9]})
    more["variants"]["turns-mask"] = variant("turns-mask")
    more["configuration"] = settings
    both = paired.joined([one, more])
    assert paired.by_seed(both, "lora", "val_loss") == {0: 1, 1: 1, 2: 1}       # the first's
    assert paired.by_seed(both, "turns-mask", "val_loss") == {0: 7, 1: 8, 2: 9}
    assert len(both["rows"]) == len(TOY["rows"]) + 3
    table = report.loss_table([one, more], ["random-mask", "turns-mask"])
    assert "| turns mask | 8.0000 ± 1.0000 | 8.0000 ± 1.0000 |" in table
    assert "| random mask | 2.8333 ± 1.6073 | - |" in table
    for key in settings:
        other = {**more, "configuration": {**settings, key: "other"}}
        with pytest.raises(ValueError, match=f"differ in {key}"):
            paired.joined([one, other])

@pytest.mark.parametrize("flags, message", [
    ("--methods ia3", "'ia3' names no method"), ("--methods pretrain", "names no method"),
    ("--methods lora lora", "twice"), ("--seeds 100", "must differ"), ("--jobs 0", "--jobs is 0"),
    ("--methods nalora:keep=2", "keep is in (0, 1]"), ("--methods lora:rank=0", "rank 0"),
    ("--methods lora:rank", "is no value of rank"),
    ("--methods lora:keep=0.1", "is the same run as 'lora'"),
    ("--methods lora:seed=3", "'seed' is not among"),
    ("--methods lora:help", "'help' is not among"),
    ("--methods lora:data=../x", "'data' is not among"),
    ("--sweep rank --values x", "ranks are whole numbers"),
    ("--sweep keep --values x", "is no value of keep"),
    ("--methods nalora:stride=0", "stride 1 or more"), ("--lrs -1 -2", "--lr is -1"),
    ("--values 0.1", "name it with --sweep")])
def test_bad_comparison_flags(base, tmp_path, capsys, flags, message):
    assert compare.main(comparison_arguments(base, tmp_path / "out", *flags.split())) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
