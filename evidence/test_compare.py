"""The protocol: variants, rates, seeds, and how runs go on."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest may be started anywhere

import train_tiny
from evidence import compare, measures, paired, peers, report
from evidence.controls import Config
from evidence.test_interruptions import long
from test_nalora import (
    HERE,
    base,  # noqa: F401
    one_thread,  # noqa: F401
    tiny_pretraining,  # noqa: F401
)

README = (HERE / "evidence" / "README.md").read_text(encoding="utf-8")


def test_bootstrap_interval():
    assert paired.bootstrap_interval([3, 3, 3]) == (3, 3)
    assert paired.bootstrap_interval([0, 1]) == (
        0,
        1,
    )  # both picks alike has probability 1/4 each: beyond 2.5 %
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = paired.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert abs(low - (values.mean() - half)) < 0.03 and abs(high - (values.mean() + half)) < 0.03
    draws = np.random.default_rng(2).normal(0, 1, (300, 20))
    covered = sum(low <= 0 <= high for low, high in map(paired.bootstrap_interval, draws))
    assert 0.86 < covered / 300 < 0.98  # 95 % less what the percentile bootstrap loses at 20 values
    for seeds, missed in (
        (3, 1 / 4),
        (5, 1 / 6),
    ):  # how often README says that a true null is called a difference
        draws = np.random.default_rng(seeds).normal(0, 1, (1500, seeds))
        assert sum(
            not low <= 0 <= high for low, high in map(paired.bootstrap_interval, draws)
        ) / 1500 == pytest.approx(missed, abs=0.03)


def test_differences_are_paired_by_seed():
    theirs = {0: 10.0, 1: 500.0, 2: -30.0, 9: 1e6}
    ours = {2: -30.5, 0: 9.5, 1: 499.5, 7: 0.0}
    assert paired.paired_difference(ours, theirs) == (-0.5, -0.5, -0.5, 3)
    assert report.describe(ours, theirs, 1) == "-0.5 [-0.5, -0.5] lower in 3 of 3"
    zero = dict.fromkeys(range(5), 0.0)
    mixed = {0: 2.0, 1: 2.0, 2: 2.0, 3: 2.0, 4: -0.1}
    assert report.describe(mixed, zero, 1).startswith("+1.6 [") and report.describe(
        mixed, zero, 1
    ).endswith("] higher in 4 of 5")
    assert report.describe({0: 2.0, 1: -1.0, 2: 0.0}, zero, 1).endswith("no difference seen")
    with pytest.raises(ValueError, match="two seeds in common"):
        paired.paired_difference({0: 1.0}, theirs)


def comparison_arguments(base, out, *more):
    return [
        "--base",
        str(base),
        "--out",
        str(out),
        "--test-size",
        "4",
        "--steps",
        "6",
        "--eval-every",
        "2",
        "--batch-size",
        "4",
        "--jobs",
        "1",
        "--seeds",
        "0",
        "1",
        "--lrs",
        "1e-3",
        "1e-2",
        "--methods",
        "full",
        "lora",
        "nalora",
        "random-mask",
        *more,
    ]


def without_timing(comparison):
    rows = [
        {k: v for k, v in row.items() if k not in ("step_ms", "train_seconds", "peak_memory_mb")}
        for row in comparison["rows"]
    ]
    return {**comparison, "rows": rows, "step_time": sorted(comparison["step_time"])}


@pytest.fixture(scope="session")
def comparison(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "out"
    assert compare.main(comparison_arguments(base, out)) == 0
    return out


def test_compare_writes_tables_and_figures_and_repeats_nothing(
    base, comparison, capsys, monkeypatch
):
    result = json.loads((comparison / "comparison.json").read_text())
    assert (
        list(result["variants"]) == ["full", "lora", "nalora", "random-mask"]
        and len(result["rows"]) == 2 * 7
    )
    lora = [row for row in result["rows"] if row["variant"] == "lora"]
    moved = {row["variant"]: row.get("rows_moved") for row in result["rows"]}
    assert (
        moved["full"] is None
        and moved["lora"] == 1
        and moved["random-mask"] == 0.5 <= moved["nalora"] <= 1
    )
    assert [row["seed"] for row in lora] == [0, 1] and lora[0]["val_loss"] != lora[1]["val_loss"]
    for column in (c for columns in paired.COLUMNS.values() for c in columns):
        assert all(math.isfinite(row[column]) for row in lora), column
    assert all(row["misalignment"] == 0 for row in result["rows"] if row["variant"] == "full")
    assert (comparison / "comparison.csv").read_text().count("\n") == 15
    floor = [row for row in result["rows"] if row["variant"] == "full, another seed"]
    assert len(floor) == 2 and all(row["misalignment"] > 0 for row in floor)
    text = (comparison / "comparison.md").read_text()
    assert (
        "nalora - random-mask" in text
        and "nalora - lora" in text
        and re.search(r"\| lora \| 0\.01 \(highest\) \| \d\.\d{4} ± ", text)
    )
    for figure in ("differences", "alignment", "at_work", "training", "homogeneity"):
        assert (comparison / f"{figure}.png").exists()
    monkeypatch.setattr(train_tiny, "execute", None)  # a run that is repeated would fail
    assert (
        compare.main(comparison_arguments(base, comparison)) == 0
        and "8 runs, 8 of them finished already" in capsys.readouterr().out
    )
    assert without_timing(
        json.loads((comparison / "comparison.json").read_text())
    ) == without_timing(result)
    assert (
        compare.main(comparison_arguments(base, comparison, "--batch-size", "5")) == 2
        and "other settings" in capsys.readouterr().err
    )


def test_neighbours_are_compared_as_they_were_trained(base, tmp_path):
    """What a comparison reloads of a neighbour is what was trained: its loss, its selection."""
    methods = [*peers.PEERS, "nalora-dora"]
    flags = [
        flag for flag in comparison_arguments(base, tmp_path, "--test-size", "0") if flag != "1e-2"
    ]
    assert (
        compare.main(
            [
                *flags[: flags.index("--methods")],
                "--test-size",
                "0",
                "--methods",
                "full",
                "lora",
                "nalora",
                *methods,
            ]
        )
        == 0
    )
    result = json.loads((tmp_path / "comparison.json").read_text())
    for method in methods:
        out = next((tmp_path / re.sub(r"[^\w.-]", "-", method)).glob("*seed0"))
        run = compare.controls.set_up(Config(**json.loads((out / "config.json").read_text())))
        row = next(row for row in result["rows"] if row["variant"] == method and row["seed"] == 0)
        assert train_tiny.mean_loss(measures.trained_model(out), run.validation) == pytest.approx(
            row["val_loss"], rel=1e-5
        )
        assert 0 < row["misalignment"] < 3 and math.isfinite(row["shift_cosine"])
        assert math.isfinite(row["weight_cosine"]) or method == "nora"
    table = report.tables(result)["differences"]
    assert (
        "| nora - nalora |" in table
        and "| nalora-dora - dora |" in table
        and "| pissa - lora |" in table
    )


@long
def test_a_killed_comparison_goes_on_to_the_same_result(base, comparison, tmp_path):
    command = [
        sys.executable,
        "-m",
        "evidence.compare",
        *comparison_arguments(base, tmp_path / "out", "--jobs", "2"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=HERE)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("summary.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out" / "comparison.json").exists()
    time.sleep(2)  # the workers notice within half a second
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}
    assert finished
    assert compare.main(comparison_arguments(base, tmp_path / "out")) == 0
    assert all(path.stat().st_mtime_ns == t for path, t in finished.items())
    ours, theirs = (
        without_timing(json.loads((folder / "comparison.json").read_text()))
        for folder in (tmp_path / "out", comparison)
    )
    assert ours == theirs


def test_tuning_takes_the_lowest_loss_and_passes_over_what_diverges(base, tmp_path, capsys):
    common = comparison_arguments(base, tmp_path / "out", "--methods", "lora", "--test-size", "0")
    assert compare.main([*common, "--lrs", "1e-2", "1e-5", "1e25"]) == 0
    variant = json.loads((tmp_path / "out" / "comparison.json").read_text())["variants"]["lora"]
    losses = dict(map(tuple, variant["tuning"]))
    assert variant["lr"] == 0.01 and losses[0.01] < losses[1e-5] and losses[1e25] is None
    assert (
        compare.main([*common, "--lrs", "1e25", "1e26"]) == 2
        and "diverged at every learning rate" in capsys.readouterr().err
    )


def test_a_judged_run_that_diverges_is_told_and_left_out(base, tmp_path, monkeypatch):
    """Of LoRA one seed of three, of full fine-tuning another: the rest of the comparison stands."""
    execute = train_tiny.execute

    def diverging(config, out, *more):
        if (config.method, config.seed) in (("lora", 1), ("full", 2)):
            raise train_tiny.Diverged("not finite")
        return execute(config, out, *more)

    monkeypatch.setattr(train_tiny, "execute", diverging)
    assert (
        compare.main(
            comparison_arguments(
                base, tmp_path, "--seeds", "0", "1", "2", "--lrs", "1e-3", "--test-size", "0"
            )
        )
        == 0
    )
    result = json.loads((tmp_path / "comparison.json").read_text())
    text = report.markdown(result)
    assert (
        "| lora (1 of 3 seeds diverged) |" in text
        and "| full (1 of 3 seeds diverged) |" in text
        and (tmp_path / "differences.png").exists()
    )
    assert sorted(paired.by_seed(result, "lora", "val_loss")) == [0, 2] and sorted(
        paired.by_seed(result, "nalora", "misalignment")
    ) == [0, 1]
    assert re.search(r"\| nalora - lora \| [+-]", text) and re.search(
        r"\| full - lora \| - \|", text
    )


def test_variants_of_a_sweep(base):
    args = compare.command_line().parse_args(
        comparison_arguments(
            base, "out", "--sweep", "keep", "--methods", "lora", "nalora-mask:score=rho_prime"
        )
    )
    compare.check(args)
    variants = compare.variants_of(args)
    assert (
        list(variants)
        == ["lora", *(f"nalora-mask:score=rho_prime,keep={k}" for k in (0.05, 0.1, 0.25, 0.5))]
        and variants["lora"]["value"] is None
    )
    for sweep, given, values in (
        ("keep", ["0.2"], ["keep=0.2"]),
        ("rank", ["3", "4"], ["rank=3,alpha=6", "rank=4,alpha=8"]),
    ):
        args.sweep, args.values = sweep, given
        assert [
            v["value"] for v in compare.variants_of(args).values() if v["method"] == "nalora-mask"
        ] == values
    config = compare.configure(
        args, "nalora-mask:score=rho_prime,keep=0.1,targets=gate_proj+up_proj", lr=0.5, seed=3
    )
    assert (config.score, config.keep, config.targets, config.lr, config.seed) == (
        "rho_prime",
        0.1,
        ["gate_proj", "up_proj"],
        0.5,
        3,
    )


def test_what_a_variant_is_compared_with():
    variants = {
        label: {
            "method": label.partition(":")[0],
            "changes": label.partition(":")[2],
            "value": None,
        }
        for label in (
            "full",
            "lora",
            "lora:rank=4",
            "nalora-mask:rank=4,keep=0.1",
            "random-mask:keep=0.5",
            "random-mask:rank=4,keep=0.1",
            "inverted-mask",
        )
    }
    find = lambda label: report.references({"variants": variants}, label)
    assert find("nalora-mask:rank=4,keep=0.1") == [
        "lora",
        "lora:rank=4",
        "random-mask:rank=4,keep=0.1",
        "inverted-mask",
    ]
    assert (
        find("lora") == []
        and find("lora:rank=4") == ["lora"]
        and find("full") == ["lora", "lora:rank=4"]
    )
    swept = {
        f"{method}:keep={k}": {"method": method, "changes": f"keep={k}", "value": f"keep={k}"}
        for method in ("nalora-mask", "random-mask")
        for k in (0.1, 0.5)
    }
    assert report.references({"variants": swept}, "nalora-mask:keep=0.5") == [
        "random-mask:keep=0.5"
    ]
    swept["nalora-mask:score=rho_prime,keep=0.5"] = {
        "method": "nalora-mask",
        "changes": "score=rho_prime,keep=0.5",
        "value": "keep=0.5",
    }
    assert report.references({"variants": swept}, "nalora-mask:score=rho_prime,keep=0.5") == [
        "nalora-mask:keep=0.5",
        "random-mask:keep=0.5",
    ]
    for method in (
        "shuffled-mask",
        "inverted-mask",
    ):  # these follow a score, so only their own is matched
        swept[f"{method}:keep=0.5"] = {"method": method, "changes": "keep=0.5", "value": "keep=0.5"}
    matched = {"nalora-mask:keep=0.5", "random-mask:keep=0.5"}
    assert (
        set(report.references({"variants": swept}, "nalora-mask:score=rho_prime,keep=0.5"))
        == matched
    )
    swept["shuffled-mask:score=rho_prime,keep=0.5"] = {
        "method": "shuffled-mask",
        "changes": "score=rho_prime,keep=0.5",
        "value": "keep=0.5",
    }
    assert set(
        report.references({"variants": swept}, "nalora-mask:score=rho_prime,keep=0.5")
    ) == matched | {"shuffled-mask:score=rho_prime,keep=0.5"}
    assert (
        report.references({"variants": swept}, "nalora-mask:keep=0.5")[0]
        == "shuffled-mask:keep=0.5"
    )


def test_the_table_of_sweeps():
    def sweep(base, optimizer, **runs):
        variants = {
            "lora": {"method": "lora", "spec": "lora", "changes": "", "value": None},
            **{
                f"{method}:keep={k}": {
                    "method": method,
                    "spec": method,
                    "changes": f"keep={k}",
                    "value": f"keep={k}",
                }
                for method in ("nalora-mask", "random-mask")
                for k in (0.1, 0.5)
            },
        }
        return {
            "variants": variants,
            "base": {"path": base},
            "configuration": {"optimizer": optimizer},
            "rows": [
                {
                    "variant": label.replace("_", "-").replace("--", ":keep=0."),
                    "seed": seed,
                    "val_loss": loss,
                }
                for label, losses in runs.items()
                for seed, loss in enumerate(losses)
            ],
        }

    toy = sweep(
        "/somewhere/data/base",
        "adamw",
        lora=[1, 1, 1],
        nalora_mask__1=[2, 3, 4],
        nalora_mask__5=[0.5, 2, 1],
        random_mask__1=[1, 4, 3.5],
    )
    real = sweep("smollm2", "sgd", lora=[1, 1, 1], nalora_mask__5=[1.5, 1.5, 1])
    assert report.sweep_table([toy, real], "val_loss") == "\n".join(
        [
            "|  | toy, AdamW 0.1 | toy, AdamW 0.5 | smollm2, SGD 0.5 |",
            "| --- | --- | --- | --- |",
            "| nalora-mask - lora | **+2.0000** | (+0.1667) | (+0.3333) |",
            "| nalora-mask - random-mask | (+0.1667) |  |  |",
            "| random-mask - lora | (+1.8333) |  |  |",
        ]
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--methods ia3", "'ia3' names no method"),
        ("--methods pretrain", "names no method"),
        ("--methods lora lora", "twice"),
        ("--seeds 100", "must differ"),
        ("--jobs 0", "--jobs is 0"),
        ("--methods nalora:keep=2", "keep is 2"),
        ("--methods lora:rank=0", "rank is 0"),
        ("--methods lora:rank", "is no value of rank"),
        ("--methods lora:keep=0.1", "is the same run as 'lora'"),
        ("--methods lora:seed=3", "'seed' is not among"),
        ("--methods lora:help", "'help' is not among"),
        ("--methods lora:data=../x", "'data' is not among"),
        ("--sweep rank --values x", "ranks are whole numbers"),
        ("--sweep keep --values x", "is no value of keep"),
        ("--methods nalora:stride=99999999999", "stride is 99999999999"),
        ("--lrs -1 -2", "--lr is -1"),
        ("--values 0.1", "name it with --sweep"),
    ],
)
def test_bad_comparison_flags(base, tmp_path, capsys, flags, message):
    assert compare.main(comparison_arguments(base, tmp_path / "out", *flags.split())) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
