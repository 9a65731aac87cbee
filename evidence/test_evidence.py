"""The evidence: controls, measures, protocol, tables and figures."""
import copy
import importlib.util
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
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest may be started anywhere

import train_tiny
from evidence import bench, board, compare, figures, measures, paired, peers, report
from evidence.controls import MASKS, Config, Control, row_draw
from nalora import Llama, LlamaConfig, importance_mask, inject_lora, lora_parameters, value_and_slope
from test_nalora import (FFN, HERE, SIGMOID, agrees_with_the_oracle, batch, equal, long, lora_llama, random_run, small_llama,
                         snapshot, start, take_step)
from test_nalora import base, one_thread, tiny_pretraining  # noqa: F401

RESULTS = HERE / "evidence" / "results"
README = (HERE / "evidence" / "README.md").read_text(encoding="utf-8")


def start_control(model=None, **choices):
    """(model, optimizer, Control)"""
    model, opt, _ = start(None, model)
    return model, opt, Control(model, opt, Config(**choices))


# ---- controls ----


@pytest.mark.parametrize("choices", [{"budget": "neutral"}, {"mask": "random"}, {"mask": "redrawn"}, {"mask": "shuffled"}, {"mask": "none"}])
def test_switched_off_a_control_is_lora_bit_for_bit(choices):
    plain, tool = start(), start_control(keep=1.0, scale="none", **choices)
    for i in range(5):
        assert take_step(*plain[:2], i) == take_step(*tool[:2], i)
    assert equal(snapshot(plain[0]), snapshot(tool[0]))


def test_the_uniform_scale_is_the_mean_of_the_scales():
    (model, opt, own), (model_u, opt_u, uniform) = start_control(), start_control(scale="uniform")
    for i in range(2):
        take_step(model, opt, i), take_step(model_u, opt_u, i)
        if i == 0:
            scales = [s["scale"] for s in own.statistics().values()]
            assert scales[0] != scales[1] != 1
            assert [s["scale"] for s in uniform.statistics().values()] == pytest.approx([sum(scales) / 2] * 2)


def test_neutral_budget_keeps_the_mean_step():
    runs = {budget: start_control(keep=0.25, budget=budget) for budget in ("raw", "neutral")}
    for model, opt, _ in runs.values():
        take_step(model, opt, 0)
    scales = {budget: torch.tensor([s["scale"] for s in tool.statistics().values()]) for budget, (_, _, tool) in runs.items()}
    torch.testing.assert_close(scales["neutral"], scales["raw"] / scales["raw"].log().mean().exp())
    tool = runs["neutral"][2]
    rows, scale = tool._factors(tool._stacks[0].state)  # (2, F, 1), (2,)
    rows = rows[..., 0] / scale[:, None]
    torch.testing.assert_close(rows.mean(1), torch.ones(2))
    torch.testing.assert_close(rows.amax(1), torch.full((2,), 4.0))


def test_random_and_inverted_controls():
    model, opt, tool = start_control(mask="random", keep=0.25, seed=3)
    masks = [s["mask"] for s in tool.statistics().values()]
    take_step(model, opt, 0)
    assert all(m.sum() == 12 for m in masks) and not torch.equal(*masks)
    assert all(torch.equal(m, s["mask"]) for m, s in zip(masks, tool.statistics().values()))
    other = start_control(mask="random", keep=0.25, seed=4)[2].statistics()
    assert not torch.equal(masks[0], next(iter(other.values()))["mask"])
    (model, opt, tool), (model_i, opt_i, inverted) = start_control(), start_control(mask="inverted")
    take_step(model, opt, 0), take_step(model_i, opt_i, 0)
    for s, t in zip(tool.statistics().values(), inverted.statistics().values()):
        assert torch.equal(s["importance"], t["importance"]) and torch.equal(s["mask"], ~t["mask"])


def test_shuffled_control():
    """At every step the derivative mask of what was seen, dealt to other rows by one permutation per FFN, which the seed decides."""
    model, opt, tool = start_control(mask="shuffled", keep=0.25, ema=0.0, seed=3)
    pairs = []
    for step in range(12):
        take_step(model, opt, step)
        pairs.append([(importance_mask(s["importance"], 0.25), s["mask"]) for s in tool.statistics().values()])
    orders_of = lambda tool: tool.draws(tool._stacks[0]).argsort(-1)
    orders = orders_of(tool)
    assert all(torch.equal(shown[order], mask) for step in pairs for (shown, mask), order in zip(step, orders))
    assert len({tuple(step[0][1].tolist()) for step in pairs}) == len({tuple(step[0][0].tolist()) for step in pairs}) > 1  # it changes as often
    assert any(not torch.equal(shown, mask) for shown, mask in pairs[0]) and not torch.equal(*orders)
    assert all(torch.equal(order.sort().values, torch.arange(48)) for order in orders)
    same, other = (orders_of(start_control(mask="shuffled", seed=seed)[2]) for seed in (3, 4))
    assert torch.equal(same, orders) and not torch.equal(other, orders)


@pytest.mark.parametrize("scale", ["none", "homogeneity"])
def test_redrawn_control(scale):
    """At each step as many rows, others every time, every row as often as the next in the long run."""
    model, opt, tool = start_control(mask="redrawn", keep=0.25, scale=scale, seed=3)
    masks = []
    for step in range(200):
        before = snapshot(model)
        take_step(model, opt, step % 4)
        masks.append([s["mask"] for s in tool.statistics().values()])
        for (name, B), mask in zip([(n, p) for n, p in snapshot(model).items() if n.endswith("gate_proj.lora_B")], masks[-1]):
            assert torch.equal(B[~mask], before[name][~mask]) and (B[mask] != before[name][mask]).any(dim=1).all()
    for ffn in zip(*masks):
        shares = torch.stack(ffn).float().mean(0)  # (F,), mean 1/4, deviation 0.03
        assert all(mask.sum() == 12 for mask in ffn) and len({tuple(mask.tolist()) for mask in ffn}) == 200 and 0.1 < shares.min() <= shares.max() < 0.4
    assert not torch.equal(*masks[0])
    for seed, same in ((3, True), (4, False)):
        model, opt, tool = start_control(mask="redrawn", keep=0.25, scale=scale, seed=seed)
        take_step(model, opt, 0)
        assert torch.equal(next(iter(tool.statistics().values()))["mask"], masks[0][0]) == same


def test_row_draws_do_not_depend_on_the_default_dtype():
    expected = row_draw(3, 1, 48, step=5)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(row_draw(3, 1, 48, step=5), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_score_rho_prime():
    model, opt, tool = start_control(stride=1, ema=0.0, score="rho_prime")
    gate, seen = model.model.layers[1].mlp.gate_proj, []
    gate.register_forward_hook(lambda _, __, z: seen.append(z.detach().flatten(0, 1)))
    take_step(model, opt, 0)
    expected = (SIGMOID(seen[0]) * (1 - SIGMOID(seen[0]))).mean(0)
    torch.testing.assert_close(tool.statistics()["model.layers.1.mlp"]["importance"], expected, atol=1e-4, rtol=1e-3)


def test_score_downstream():
    model, opt, tool = start_control(stride=1, ema=0.0, score="downstream")
    ffn, x = model.model.layers[1].mlp, []
    ffn.register_forward_pre_hook(lambda _, inputs: x.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(*batch(0))
        z, u, norms = ffn.gate_proj(x[0]), ffn.up_proj(x[0]), ffn.down_proj.base_layer.weight.norm(dim=0)
    take_step(model, opt, 0)
    expected = (value_and_slope(F.silu, z)[1].abs() * u.abs()).mean(0) * norms
    torch.testing.assert_close(tool.statistics()["model.layers.1.mlp"]["importance"], expected)
    plain = torch.nn.Sequential()
    plain.add_module("fc1", torch.nn.Linear(8, 16))
    plain.add_module("act", torch.nn.GELU())
    inject_lora(plain, ["fc1"], rank=2)
    optimizer = torch.optim.AdamW(lora_parameters(plain))
    with pytest.raises(ValueError, match="No gated FFN|reads up_proj"):
        Control(plain, optimizer, Config(score="downstream"))


@pytest.mark.parametrize("stride, score", [(1, "downstream"), (7, "downstream"), (7, "rho_prime")])
def test_microbatches_equal_one_batch_with_other_scores(stride, score):
    (model, opt, whole), (model_m, opt_m, parts) = (start_control(stride=stride, score=score) for _ in range(2))
    for i in range(3):
        take_step(model, opt, i)
        tokens, targets = batch(i)
        for j in range(4):
            (model_m(tokens[j:j + 1], targets[j:j + 1])[1] / 4).backward()
        opt_m.step(), opt_m.zero_grad()
    for a, b in zip(whole.statistics().values(), parts.statistics().values()):
        torch.testing.assert_close(a["importance"], b["importance"])
        assert torch.equal(a["mask"], b["mask"])


@pytest.mark.parametrize("choices", [{"mask": mask} for mask in MASKS] + [{"scale": "uniform", "mask": "none"}, {"budget": "neutral"}], ids=str)
def test_a_control_goes_on_from_its_state(choices):
    model, opt, tool = start_control(**choices, seed=5)
    take_step(model, opt, 0)
    model_n, opt_n, tool_n = start_control(lora_llama(seed=0), **choices, seed=5)
    model_n.load_state_dict(model.state_dict()), opt_n.load_state_dict(copy.deepcopy(opt.state_dict())), tool_n.load_state_dict(tool.state_dict())
    for i in range(1, 4):
        take_step(model, opt, i), take_step(model_n, opt_n, i)
    assert equal(snapshot(model), snapshot(model_n))
    assert all(equal(s, tool_n.state_dict()["ffns"][name]) for name, s in tool.state_dict()["ffns"].items())


@pytest.mark.parametrize("seed", range(24))
def test_controls_of_random_shapes(seed):
    import random
    rng = random.Random(seed)
    model = small_llama(seed, intermediate_size=rng.randrange(1, 40), hidden_act=rng.choice(["silu", "gelu", "relu"]))
    inject_lora(model, FFN, 1, 4)
    scale = rng.choice(["homogeneity", "uniform", "none"])
    settings = Config(mask=rng.choice(list(MASKS)), keep=rng.uniform(0.01, 1), scale=scale, budget="raw" if scale == "uniform" else rng.choice(["raw", "neutral"]),
                      score=rng.choice(["phi_prime", "rho_prime", "downstream"]), ema=rng.choice([0.0, 0.9]), stride=rng.choice([1, 2, 17]), seed=seed)
    random_run(rng, model, 61, settings, Control)


@pytest.mark.parametrize("changes, bias", [({"scale": "uniform"}, 0), ({"budget": "neutral"}, 0), ({"mask": "inverted"}, 0), ({"score": "rho_prime"}, 0),
                                           ({"scale": "uniform"}, -1.3), ({"budget": "neutral"}, -1.3)])
def test_controls_agree_with_the_oracle(changes, bias):
    agrees_with_the_oracle(lambda model, optimizer: Control(model, optimizer, Config(stride=1, **changes)), changes, bias, [])


@pytest.mark.parametrize("setting, message", [({"budget": "free"}, "budget"), ({"score": "phi"}, "score"), ({"mask": "top"}, "mask is 'top'"),
                                              ({"scale": "uniform", "budget": "neutral"}, "exactly 1")])
def test_config_of_a_control_refuses(setting, message):
    with pytest.raises(ValueError, match=message):
        Config(**setting)


def test_presets_are_what_they_are_called():
    args = compare.command_line().parse_args([])
    compare.check(args)
    get = lambda method: (lambda c: (c.mask, c.scale, c.budget))(compare.configure(args, method))
    assert {m: get(m) for m in compare.controls.PRESETS} == {
        "nalora": ("derivative", "homogeneity", "raw"), "nalora-mask": ("derivative", "none", "raw"), "nalora-scale": ("none", "homogeneity", "raw"),
        "random-mask": ("random", "none", "raw"), "inverted-mask": ("inverted", "none", "raw"), "uniform-scale": ("none", "uniform", "raw"),
        "random-uniform": ("random", "uniform", "raw"), "nalora-neutral": ("derivative", "homogeneity", "neutral"),
        "nalora-shuffled": ("shuffled", "homogeneity", "raw"), "shuffled-mask": ("shuffled", "none", "raw"), "redrawn-mask": ("redrawn", "none", "raw")}


@pytest.mark.parametrize("flag", ["warmup=0.5", "weight-decay=0.5", "beta1=0.5", "beta2=0.5", "grad-clip=0.1", "ema=0", "score=downstream", "optimizer=sgd",
                                  "optimizer=sgd,momentum=0.5", "scale=none", "scale=uniform", "mask=random", "mask=inverted", "budget=neutral", "score=rho_prime", "stride=3"])
def test_every_flag_of_a_variant_changes_the_adapter(base, flag):
    args = compare.command_line().parse_args(comparison_arguments(base, "unused"))
    compare.check(args)

    def trained(spec):
        run = compare.controls.set_up(compare.configure(args, spec))
        list(train_tiny.training_loop(run))
        return {name: p.detach() for name, p in run.trainable.items()}

    assert not equal(trained("nalora"), trained(f"nalora:{flag}"))


# ---- measures ----


def test_selection_misalignment():
    logit = lambda rho: torch.logit(torch.tensor(rho, dtype=torch.float64))  # SiLU: rho = sigmoid(z), so z is chosen by its rho
    base, full = logit([[0.2, 0.5], [0.7, 0.4]]), logit([[0.5, 0.5], [0.7, 0.8]])  # full fine-tuning moves rho by (0.3, 0.4): norm 0.5
    M = measures.selection_misalignment
    assert M(F.silu, full, full, base) == 0
    assert M(F.silu, base, full, base).item() == pytest.approx(1)
    assert M(F.silu, logit([[0.2, 0.5], [0.7, 0.8]]), full, base).item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match="moved no selection"):
        M(F.silu, full, base, base)
    half = torch.randn(300, 48).bfloat16()
    for measure in (measures.selection_entropy, lambda act, z: M(act, z, 2 * z, z / 2)):
        assert measure(F.silu, half) == measure(F.silu, half.float())


def test_selection_entropy():
    entropy = measures.selection_entropy
    assert entropy(F.silu, torch.ones(3, 8)).item() == pytest.approx(1)
    one_open = torch.full((3, 8), -1000.0)
    one_open[:, 2] = 3
    assert entropy(F.silu, one_open).item() == pytest.approx(0, abs=1e-6)
    two_open = one_open.clone()
    two_open[:, 5] = 3
    assert entropy(F.silu, two_open).item() == pytest.approx(math.log(2) / math.log(8))


# ---- the comparison ----

# ---- the comparison ------------------------------------------------------------------------------


def test_bootstrap_interval():
    assert paired.bootstrap_interval([3, 3, 3]) == (3, 3)
    assert paired.bootstrap_interval([0, 1]) == (0, 1)          # both picks alike has probability 1/4 each: beyond 2.5 %
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = paired.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert abs(low - (values.mean() - half)) < 0.03 and abs(high - (values.mean() + half)) < 0.03
    draws = np.random.default_rng(2).normal(0, 1, (300, 20))
    covered = sum(low <= 0 <= high for low, high in map(paired.bootstrap_interval, draws))
    assert 0.86 < covered / 300 < 0.98                              # 95 % less what the percentile bootstrap loses at 20 values
    for seeds, missed in ((3, 1 / 4), (5, 1 / 6)):                  # how often README says that a true null is called a difference
        draws = np.random.default_rng(seeds).normal(0, 1, (1500, seeds))
        assert sum(not low <= 0 <= high for low, high in map(paired.bootstrap_interval, draws)) / 1500 == pytest.approx(missed, abs=0.03)


def test_differences_are_paired_by_seed():
    theirs = {0: 10.0, 1: 500.0, 2: -30.0, 9: 1e6}
    ours = {2: -30.5, 0: 9.5, 1: 499.5, 7: 0.0}
    assert paired.paired_difference(ours, theirs) == (-0.5, -0.5, -0.5, 3)
    assert report.describe(ours, theirs, 1) == "-0.5 [-0.5, -0.5] lower in 3 of 3"
    zero = dict.fromkeys(range(5), 0.0)
    mixed = {0: 2.0, 1: 2.0, 2: 2.0, 3: 2.0, 4: -0.1}
    assert report.describe(mixed, zero, 1).startswith("+1.6 [") and report.describe(mixed, zero, 1).endswith("] higher in 4 of 5")
    assert report.describe({0: 2.0, 1: -1.0, 2: 0.0}, zero, 1).endswith("no difference seen")
    with pytest.raises(ValueError, match="two seeds in common"):
        paired.paired_difference({0: 1.0}, theirs)


def test_selection_measures_on_hand_made_gates():
    act = lambda z: z * z                                           # its selection weight is rho(z) = z
    z_base, w_base = torch.rand(50, 6) + 1, torch.randn(6, 4)
    shift, other = torch.randn(50, 6), torch.randn(50, 6)
    other -= (other * shift).sum() / (shift * shift).sum() * shift  # orthogonal to full fine-tuning's shift
    other *= shift.norm() / other.norm()
    delta = torch.eye(6, 4)
    full, base = {"ffn": (z_base + shift, w_base + delta, act)}, {"ffn": (z_base, w_base, act)}
    for z, w, misaligned, shift_cosine, weight_cosine in ((z_base + shift, w_base + 2 * delta, 0, 1, 1), (z_base + shift / 2, w_base - delta, 0.5, 1, -1),
                                                          (z_base + other, w_base + delta.roll(2, 0), 2**0.5, 0, 0)):
        found = measures.selection_measures({"ffn": (z, w, act)}, base, full)
        assert found["misalignment"][0] == pytest.approx(measures.selection_misalignment(act, z, z_base + shift, z_base).item(), abs=1e-5)
        for column, expected in (("misalignment", misaligned), ("shift_cosine", shift_cosine), ("weight_cosine", weight_cosine), ("k_hat", 2)):
            assert abs(found[column][0] - expected) < 1e-4, column
    assert abs(measures.selection_measures(base, base, full)["misalignment"][0] - 1) < 1e-5
    assert set(measures.selection_measures(base, base, None)) == {"entropy", "k_hat"}


def test_gates_are_those_of_the_answer_tokens():
    model, (tokens, targets) = small_llama().eval(), batch(0)
    targets = targets.clone()
    targets[:, :9] = -100
    name = "model.layers.1.mlp"
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach()))
    found = measures.answer_gates(model, [(tokens, targets, None), (tokens[:1], targets[:1], None)])
    handle.remove()
    expected = [model.get_submodule(name).gate_proj(x[row, t]) for x in inputs for row in range(len(x)) for t in range(9, 15)]
    torch.testing.assert_close(found[name], torch.stack(expected))
    assert len(measures.answer_gates(model, [(tokens, targets, None)], limit=10)[name]) == 8          # every third of 24
    assert not any(m._forward_hooks for m in model.modules())


def test_best_low_rank_change():
    base, full = small_llama(0), small_llama(1)
    gate = "model.layers.0.mlp.gate_proj"
    delta = full.get_submodule(gate).weight - base.get_submodule(gate).weight
    singular = torch.linalg.svdvals(delta)
    model = measures.truncated(full, base, ["gate_proj"], 3)
    change = model.get_submodule(gate).weight - base.get_submodule(gate).weight
    torch.testing.assert_close((change - delta).norm(), singular[3:].norm())                # Eckart and Young: no rank-3 matrix is nearer
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3
    assert torch.equal(model.get_parameter("model.layers.0.mlp.up_proj.weight"), base.get_parameter("model.layers.0.mlp.up_proj.weight"))
    torch.testing.assert_close(measures.truncated(full, base, ["gate_proj"], None).get_submodule(gate).weight, full.get_submodule(gate).weight)


def comparison_arguments(base, out, *more):
    return ["--base", str(base), "--out", str(out), "--test-size", "4", "--steps", "6", "--eval-every", "2", "--batch-size", "4", "--jobs", "1",
            "--seeds", "0", "1", "--lrs", "1e-3", "1e-2", "--methods", "full", "lora", "nalora", "random-mask", *more]


def without_timing(comparison):
    rows = [{k: v for k, v in row.items() if k not in ("step_ms", "train_seconds", "peak_memory_mb")} for row in comparison["rows"]]
    return {**comparison, "rows": rows, "step_time": sorted(comparison["step_time"])}


@pytest.fixture(scope="session")
def comparison(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "out"
    assert compare.main(comparison_arguments(base, out)) == 0
    return out


def test_compare_writes_tables_and_figures_and_repeats_nothing(base, comparison, capsys, monkeypatch):
    result = json.loads((comparison / "comparison.json").read_text())
    assert list(result["variants"]) == ["full", "lora", "nalora", "random-mask"] and len(result["rows"]) == 2 * 7
    lora = [row for row in result["rows"] if row["variant"] == "lora"]
    moved = {row["variant"]: row.get("rows_moved") for row in result["rows"]}
    assert moved["full"] is None and moved["lora"] == 1 and moved["random-mask"] == 0.5 <= moved["nalora"] <= 1
    assert [row["seed"] for row in lora] == [0, 1] and lora[0]["val_loss"] != lora[1]["val_loss"]
    for column in (c for columns in paired.COLUMNS.values() for c in columns):
        assert all(math.isfinite(row[column]) for row in lora), column
    assert all(row["misalignment"] == 0 for row in result["rows"] if row["variant"] == "full")
    assert (comparison / "comparison.csv").read_text().count("\n") == 15
    floor = [row for row in result["rows"] if row["variant"] == "full, another seed"]
    assert len(floor) == 2 and all(row["misalignment"] > 0 for row in floor)
    text = (comparison / "comparison.md").read_text()
    assert "nalora - random-mask" in text and "nalora - lora" in text and re.search(r"\| lora \| 0\.01 \(highest\) \| \d\.\d{4} ± ", text)
    for figure in ("differences", "alignment", "at_work", "training", "homogeneity"):
        assert (comparison / f"{figure}.png").exists()
    monkeypatch.setattr(train_tiny, "execute", None)  # a run that is repeated would fail
    assert compare.main(comparison_arguments(base, comparison)) == 0 and "8 runs, 8 of them finished already" in capsys.readouterr().out
    assert without_timing(json.loads((comparison / "comparison.json").read_text())) == without_timing(result)
    assert compare.main(comparison_arguments(base, comparison, "--batch-size", "5")) == 2 and "other settings" in capsys.readouterr().err


def test_neighbours_are_compared_as_they_were_trained(base, tmp_path):
    """What a comparison reloads of a neighbour is the model that was trained: its validation loss, its selection."""
    methods = [*peers.PEERS, "nalora-dora"]
    flags = [flag for flag in comparison_arguments(base, tmp_path, "--test-size", "0") if flag != "1e-2"]
    assert compare.main([*flags[:flags.index("--methods")], "--test-size", "0", "--methods", "full", "lora", "nalora", *methods]) == 0
    result = json.loads((tmp_path / "comparison.json").read_text())
    for method in methods:
        out = next((tmp_path / re.sub(r"[^\w.-]", "-", method)).glob("*seed0"))
        run = compare.controls.set_up(Config(**json.loads((out / "config.json").read_text())))
        row = next(row for row in result["rows"] if row["variant"] == method and row["seed"] == 0)
        assert train_tiny.mean_loss(measures.trained_model(out), run.validation) == pytest.approx(row["val_loss"], rel=1e-5)
        assert 0 < row["misalignment"] < 3 and math.isfinite(row["shift_cosine"]) 
        assert math.isfinite(row["weight_cosine"]) or method == "nora"
    table = report.tables(result)["differences"]
    assert "| nora - nalora |" in table and "| nalora-dora - dora |" in table and "| pissa - lora |" in table


@long
def test_a_killed_comparison_goes_on_to_the_same_result(base, comparison, tmp_path):
    command = [sys.executable, "-m", "evidence.compare", *comparison_arguments(base, tmp_path / "out", "--jobs", "2")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=HERE)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("summary.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out" / "comparison.json").exists()
    time.sleep(2)                                                   # the workers notice within half a second
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}
    assert finished
    assert compare.main(comparison_arguments(base, tmp_path / "out")) == 0
    assert all(path.stat().st_mtime_ns == t for path, t in finished.items())
    ours, theirs = (without_timing(json.loads((folder / "comparison.json").read_text())) for folder in (tmp_path / "out", comparison))
    assert ours == theirs


def test_tuning_takes_the_lowest_loss_and_passes_over_what_diverges(base, tmp_path, capsys):
    common = comparison_arguments(base, tmp_path / "out", "--methods", "lora", "--test-size", "0")
    assert compare.main([*common, "--lrs", "1e-2", "1e-5", "1e25"]) == 0
    variant = json.loads((tmp_path / "out" / "comparison.json").read_text())["variants"]["lora"]
    losses = dict(map(tuple, variant["tuning"]))
    assert variant["lr"] == 0.01 and losses[0.01] < losses[1e-5] and losses[1e25] is None
    assert compare.main([*common, "--lrs", "1e25", "1e26"]) == 2 and "diverged at every learning rate" in capsys.readouterr().err


def test_a_judged_run_that_diverges_is_told_and_left_out(base, tmp_path, monkeypatch):
    """Of LoRA one seed of three, of full fine-tuning another: the rest of the comparison stands."""
    execute = train_tiny.execute

    def diverging(config, out, *more):
        if (config.method, config.seed) in (("lora", 1), ("full", 2)):
            raise train_tiny.Diverged("not finite")
        return execute(config, out, *more)

    monkeypatch.setattr(train_tiny, "execute", diverging)
    assert compare.main(comparison_arguments(base, tmp_path, "--seeds", "0", "1", "2", "--lrs", "1e-3", "--test-size", "0")) == 0
    result = json.loads((tmp_path / "comparison.json").read_text())
    text = report.markdown(result)
    assert "| lora (1 of 3 seeds diverged) |" in text and "| full (1 of 3 seeds diverged) |" in text and (tmp_path / "differences.png").exists()
    assert sorted(paired.by_seed(result, "lora", "val_loss")) == [0, 2] and sorted(paired.by_seed(result, "nalora", "misalignment")) == [0, 1]
    assert re.search(r"\| nalora - lora \| [+-]", text) and re.search(r"\| full - lora \| - \|", text)


def test_variants_of_a_sweep(base):
    args = compare.command_line().parse_args(comparison_arguments(base, "out", "--sweep", "keep", "--methods", "lora", "nalora-mask:score=rho_prime"))
    compare.check(args)
    variants = compare.variants_of(args)
    assert list(variants) == ["lora", *(f"nalora-mask:score=rho_prime,keep={k}" for k in (0.05, 0.1, 0.25, 0.5))] and variants["lora"]["value"] is None
    for sweep, given, values in (("keep", ["0.2"], ["keep=0.2"]), ("rank", ["3", "4"], ["rank=3,alpha=6", "rank=4,alpha=8"])):
        args.sweep, args.values = sweep, given
        assert [v["value"] for v in compare.variants_of(args).values() if v["method"] == "nalora-mask"] == values
    config = compare.configure(args, "nalora-mask:score=rho_prime,keep=0.1,targets=gate_proj+up_proj", lr=0.5, seed=3)
    assert (config.score, config.keep, config.targets, config.lr, config.seed) == ("rho_prime", 0.1, ["gate_proj", "up_proj"], 0.5, 3)


def test_what_a_variant_is_compared_with():
    variants = {label: {"method": label.partition(":")[0], "changes": label.partition(":")[2], "value": None}
                for label in ("full", "lora", "lora:rank=4", "nalora-mask:rank=4,keep=0.1", "random-mask:keep=0.5", "random-mask:rank=4,keep=0.1", "inverted-mask")}
    find = lambda label: report.references({"variants": variants}, label)
    assert find("nalora-mask:rank=4,keep=0.1") == ["lora", "lora:rank=4", "random-mask:rank=4,keep=0.1", "inverted-mask"]
    assert find("lora") == [] and find("lora:rank=4") == ["lora"] and find("full") == ["lora", "lora:rank=4"]
    swept = {f"{method}:keep={k}": {"method": method, "changes": f"keep={k}", "value": f"keep={k}"} for method in ("nalora-mask", "random-mask") for k in (0.1, 0.5)}
    assert report.references({"variants": swept}, "nalora-mask:keep=0.5") == ["random-mask:keep=0.5"]
    swept["nalora-mask:score=rho_prime,keep=0.5"] = {"method": "nalora-mask", "changes": "score=rho_prime,keep=0.5", "value": "keep=0.5"}
    assert report.references({"variants": swept}, "nalora-mask:score=rho_prime,keep=0.5") == ["nalora-mask:keep=0.5", "random-mask:keep=0.5"]
    for method in ("shuffled-mask", "inverted-mask"):               # these follow a score, so only their own is matched
        swept[f"{method}:keep=0.5"] = {"method": method, "changes": "keep=0.5", "value": "keep=0.5"}
    matched = {"nalora-mask:keep=0.5", "random-mask:keep=0.5"}
    assert set(report.references({"variants": swept}, "nalora-mask:score=rho_prime,keep=0.5")) == matched
    swept["shuffled-mask:score=rho_prime,keep=0.5"] = {"method": "shuffled-mask", "changes": "score=rho_prime,keep=0.5", "value": "keep=0.5"}
    assert set(report.references({"variants": swept}, "nalora-mask:score=rho_prime,keep=0.5")) == matched | {"shuffled-mask:score=rho_prime,keep=0.5"}
    assert report.references({"variants": swept}, "nalora-mask:keep=0.5")[0] == "shuffled-mask:keep=0.5"


def test_the_table_of_sweeps():
    def sweep(base, optimizer, **runs):
        variants = {"lora": {"method": "lora", "spec": "lora", "changes": "", "value": None},
                    **{f"{method}:keep={k}": {"method": method, "spec": method, "changes": f"keep={k}", "value": f"keep={k}"}
                       for method in ("nalora-mask", "random-mask") for k in (0.1, 0.5)}}
        return {"variants": variants, "base": {"path": base}, "configuration": {"optimizer": optimizer}, "rows": [
            {"variant": label.replace("_", "-").replace("--", ":keep=0."), "seed": seed, "val_loss": loss} for label, losses in runs.items() for seed, loss in enumerate(losses)]}
    toy = sweep("/somewhere/data/base", "adamw", lora=[1, 1, 1], nalora_mask__1=[2, 3, 4], nalora_mask__5=[0.5, 2, 1], random_mask__1=[1, 4, 3.5])
    real = sweep("smollm2", "sgd", lora=[1, 1, 1], nalora_mask__5=[1.5, 1.5, 1])
    assert report.sweep_table([toy, real], "val_loss") == "\n".join([
        "|  | toy, AdamW 0.1 | toy, AdamW 0.5 | smollm2, SGD 0.5 |", "| --- | --- | --- | --- |",
        "| nalora-mask - lora | **+2.0000** | (+0.1667) | (+0.3333) |", "| nalora-mask - random-mask | (+0.1667) |  |  |", "| random-mask - lora | (+1.8333) |  |  |"])


@pytest.mark.parametrize("flags, message", [
    ("--methods ia3", "'ia3' names no method"), ("--methods pretrain", "names no method"), ("--methods lora lora", "twice"), ("--seeds 100", "must differ"),
    ("--jobs 0", "--jobs is 0"), ("--methods nalora:keep=2", "keep is 2"),
    ("--methods lora:rank=0", "rank is 0"), ("--methods lora:rank", "is no value of rank"), ("--methods lora:keep=0.1", "is the same run as 'lora'"),
    ("--methods lora:seed=3", "'seed' is not among"), ("--methods lora:help", "'help' is not among"), ("--methods lora:data=../x", "'data' is not among"),
    ("--sweep rank --values x", "ranks are whole numbers"), ("--sweep keep --values x", "is no value of keep"), ("--methods nalora:stride=99999999999", "stride is 99999999999"), ("--lrs -1 -2", "--lr is -1"), ("--values 0.1", "name it with --sweep")])
def test_bad_comparison_flags(base, tmp_path, capsys, flags, message):
    assert compare.main(comparison_arguments(base, tmp_path / "out", *flags.split())) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()

# ---- figures: what they hold, not their bytes ----


def figure_of(monkeypatch, draw, *args):
    """The figure that draw(*args, path) would save."""
    found = []
    for module in (board, figures):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: found.append(figure))
    draw(*args, Path("unused.png"))
    return found[0]


def committed(name):
    return json.loads((RESULTS / name / "comparison.json").read_text())


def test_the_figure_of_activations(monkeypatch):
    *_, kappa = axes = figure_of(monkeypatch, board.draw_activations).axes
    z = np.linspace(-5, 5, 1001)
    sigmoid = 1 / (1 + np.exp(-z))
    for ax, y in zip(axes, (z * sigmoid, sigmoid, sigmoid * (1 + z * (1 - sigmoid)), 1 + z * (1 - sigmoid))):
        silu = next(line for line in ax.get_lines() if line.get_label() == "SiLU")
        np.testing.assert_allclose(silu.get_ydata(), y, atol=1e-4)
    texts = {text.get_text().split(":")[0]: text.get_position() for text in kappa.texts}
    assert texts["κ > 1"][0] > 0 and texts["κ > 1"][1] > 1 and texts["κ < 1"][0] < 0 and texts["κ < 1"][1] < 1


def test_the_board_figure_shows_rows_that_move_and_rows_that_do_not(monkeypatch):
    ax, = figure_of(monkeypatch, board.draw_board).axes
    rows = [patch for patch in ax.patches if patch.get_height() < 0.3]
    colours = [patch.get_facecolor() for patch in rows]
    assert len(rows) == 24 and len(set(colours[:8])) == 2 and len(set(colours[8:])) == 1 and colours[8] in colours[:8]
    said = " ".join(text.get_text() for text in ax.texts)
    assert all(word in said for word in ("W_{gate}", "W_{up}", "W_{down}", "φ'(z)", "1/k̂", "optimizer.step()"))


def test_the_figure_of_differences(monkeypatch):
    toy = committed("toy")
    figure = figure_of(monkeypatch, figures.draw_differences, toy)
    labels = [label for label in toy["variants"] if label != "lora"][::-1]
    colours = set()
    for ax, column in zip(figure.axes, paired.DIFFERENCES):
        lora = paired.by_seed(toy, "lora", column)
        means = {line.get_ydata()[0]: line for line in ax.get_lines() if len(line.get_xdata()) == 1 and line.get_marker() == "o"}
        for y, label in enumerate(labels):
            if y in means:
                mean, low, high, _ = paired.paired_difference(paired.by_seed(toy, label, column), lora)
                assert means[y].get_xdata()[0] == pytest.approx(mean)
                better = (mean > 0) == (column in paired.HIGHER_IS_BETTER)
                colour = "#999999" if low <= 0 <= high else "#0072B2" if better else "#D55E00"
                assert means[y].get_color() == colour
                colours.add(colour)
        better = "better →" if column in paired.HIGHER_IS_BETTER else "← better"
        assert ax.get_xlabel().endswith(better)
        assert means and ax.get_title() == paired.DIFFERENCES[column][0]
    assert len(colours) == 3 and [t.get_text() for t in figure.axes[0].get_yticklabels()] == [figures.in_words(label) for label in labels]


def test_figures_speak_in_words():
    assert figures.in_words("nalora-mask:score=rho_prime") == "mask alone, by |ρ'|"
    assert figures.in_words("nalora-dora") == "NA-LoRA on DoRA" and figures.in_words("lora:rank=2,alpha=4") == "LoRA, rank 2, alpha 4"
    assert all(figures.in_words(method) != method for method in compare.METHODS)


def test_the_figure_of_a_sweep(monkeypatch):
    sweep = committed("keep-adamw")
    figure = figure_of(monkeypatch, lambda path: figures.draw_sweeps([sweep], path))
    ax = figure.axes[0]
    line = next(line for line in ax.get_lines() if line.get_label() == "mask alone, by |φ'|")
    expected = [np.mean(list(paired.by_seed(sweep, f"nalora-mask:keep={k}", "val_loss").values())) for k in (0.05, 0.1, 0.25, 0.5)]
    np.testing.assert_allclose(line.get_ydata(), expected)
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 4]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) > 5


def test_the_figures_of_training_alignment_and_homogeneity(monkeypatch):
    toy = committed("toy")
    histories = [row["history"] for row in toy["rows"] if row["variant"] == "nalora"]
    k_hat, scale = figure_of(monkeypatch, figures.draw_training, toy).axes
    for ax, column in ((k_hat, 1), (scale, 2)):
        for i in range(4):
            expected = np.mean([[record[column][i] for record in h] for h in histories], axis=0)
            np.testing.assert_allclose(ax.get_lines()[i].get_ydata(), expected)
    left, right = figure_of(monkeypatch, figures.draw_alignment, toy).axes
    lines = {line.get_label(): line for line in right.get_lines()}
    np.testing.assert_allclose(lines["NA-LoRA"].get_ydata(), figures.layer_means(toy, "nalora", "misalignment"))
    lines = {line.get_label(): line for line in left.get_lines()}
    np.testing.assert_allclose(lines["LoRA"].get_xdata(), figures.layer_means(toy, "lora", "weight_cosine"))
    ax, = figure_of(monkeypatch, lambda path: figures.draw_homogeneity([toy], path)).axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(lines["base"].get_ydata(), toy["base"]["layers"]["k_hat"])
    np.testing.assert_allclose(lines["full fine-tuning"].get_ydata(), figures.layer_means(toy, "full", "k_hat"))


# ---- the report and the benchmark ----


def test_the_benchmark_measures_the_same_work(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "in_new_process", lambda function, *args: function(*args))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)          # PEFT's turn is in the interoperability tests
    flags = ["--base", str(base), "--threads", "1", "--test-size", "2", "--batch-size", "4", "--results", str(tmp_path)]
    assert bench.main([*flags, "--rounds", "1"]) == 2 and "at least two" in capsys.readouterr().err
    assert bench.main([*flags, "--rounds", "3"]) == 0
    b = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["name"]: row for row in b["rows"]}
    assert list(rows) == ["full", "lora", "nalora"] and rows["lora"]["ratio"] == [1, 1, 1]
    assert len({f"{row['first_loss']:.4f}" for row in rows.values()}) == 1                   # B = 0: the base model's loss on the same batch
    assert all(0 < row["share_of_matmul_peak"] < 1 and row["step_ms"][0] <= row["step_ms"][2] and row["peak_memory_mb"][0] > 50 for row in rows.values())
    assert all(s["lora"] > 0 and s["nalora"] > 0 for s in b["sizes"]) and b["generation_seconds"] > 0
    profile = b["profile"]["nalora"]  # shares of a step, the largest first; which is largest depends on the load
    assert list(profile.values()) == sorted(profile.values(), reverse=True) and 0.1 < sum(profile.values()) <= 1
    assert {"aten::mm", "Optimizer.step#AdamW.step"} <= set(profile)
    for table in report.bench_tables(b).values():
        assert table in (tmp_path / "bench.md").read_text()
    (tmp_path / "results").mkdir()
    tmp_path.joinpath("bench.json").rename(tmp_path / "results" / "bench.json")
    text = "<!-- sizes of results -->\nold\n<!-- end -->"
    assert report.bench_tables(b)["sizes"] in report.with_tables(text, tmp_path)

def test_the_tables_of_the_readme_are_those_of_the_results():
    assert report.with_tables(README, RESULTS) == README
    tables = [RESULTS / name / "comparison.md" for names in re.findall(r"<!-- \w+ of ([\w -]+) -->", README) for name in names.split() if not name.startswith("bench")]
    assert tables
    for path in tables:
        assert path.read_text(encoding="utf-8") == report.markdown(json.loads(path.with_suffix(".json").read_text())), path
    everything = {path.parent.name: path.read_text(encoding="utf-8") for path in (RESULTS).glob("*/comparison.md")}
    for section in re.split(r"\n##+ ", README):                     # an interval stands in a table of a comparison that its section names, if it names one
        named = [text for name, text in everything.items() if re.search(rf"results/{name}(?![\w-])", section)] or everything.values()
        for interval in re.findall(r"[+-]\d\.\d+ \[[^]]*\d\]", section):
            assert any(interval in text for text in named), f"{interval} is in no table of results/ that {section.splitlines()[0]!r} names"


def test_what_is_no_comparison_is_refused(tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "comparison.json").write_text("{}")
    assert report.main(["--results", str(tmp_path), "--readme", str(tmp_path / "README.md")]) == 2
    assert "no comparison of this program" in capsys.readouterr().err


def test_the_readme_of_the_evidence_names_what_exists():
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (HERE / "evidence" / path).exists(), path
    parser = compare.command_line()
    import shlex
    for command in re.findall(r"python -m evidence.compare ([^#`\n]*)", README):
        parser.parse_args(shlex.split(command.replace("...", "")))


if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):

    def test_interop_the_benchmark_gives_peft_the_same_work(base):
        args = compare.command_line().parse_args(comparison_arguments(base, "unused"))
        compare.check(args)
        config = compare.configure(args, "lora")
        (ours, _), (theirs, _) = bench.our_loop(config), bench.peft_loop(config)
        (loss, count), (their_loss, their_count) = next(ours), next(theirs)
        assert loss == pytest.approx(their_loss, rel=1e-5) and count == their_count


    def test_interop_a_comparison_of_a_checkpoint_with_its_own_tokenizer(tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        from test_nalora import SPLITS
        texts = [p["prompt"] + p["completion"] for split in SPLITS.values() for p in split]
        words = ["[UNK]", "<s>", "</s>", *sorted({c for text in texts for c in text})]
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")
        fast.save_pretrained(tmp_path / "base")
        Llama(LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                          max_position_embeddings=512)).save_pretrained(tmp_path / "base")
        out = tmp_path / "compared"
        assert compare.main([*comparison_arguments(tmp_path / "base", out), "--train-size", "20", "--methods", "full", "lora", "--lrs", "1e-2"]) == 0
        text_loss = json.loads((out / "comparison.json").read_text())["base"]["text_loss"]
        assert text_loss < math.log(128) + 0.1  # of text that the base wrote
