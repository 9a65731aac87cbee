"""The controls: their masks, scales and settings."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest may be started anywhere

import train_tiny
from evidence import compare
from evidence.controls import MASKS, Config, Control, row_draw
from evidence.test_compare import comparison_arguments
from nalora import (
    importance_mask,
    inject_lora,
    lora_parameters,
    value_and_slope,
)
from test_nalora import (
    FFN,
    HERE,
    SIGMOID,
    agrees_with_the_oracle,
    base,  # noqa: F401
    batch,
    equal,
    lora_llama,
    one_thread,  # noqa: F401
    random_run,
    small_llama,
    snapshot,
    start,
    take_step,
    tiny_pretraining,  # noqa: F401
)

README = (HERE / "evidence" / "README.md").read_text(encoding="utf-8")


def start_control(model=None, **choices):
    """(model, optimizer, Control)"""
    model, opt, _ = start(None, model)
    return model, opt, Control(model, opt, Config(**choices))


@pytest.mark.parametrize(
    "choices",
    [
        {"budget": "neutral"},
        {"mask": "random"},
        {"mask": "redrawn"},
        {"mask": "shuffled"},
        {"mask": "none"},
    ],
)
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
            assert [s["scale"] for s in uniform.statistics().values()] == pytest.approx(
                [sum(scales) / 2] * 2
            )


def test_neutral_budget_keeps_the_mean_step():
    runs = {budget: start_control(keep=0.25, budget=budget) for budget in ("raw", "neutral")}
    for model, opt, _ in runs.values():
        take_step(model, opt, 0)
    scales = {
        budget: torch.tensor([s["scale"] for s in tool.statistics().values()])
        for budget, (_, _, tool) in runs.items()
    }
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
    """The derivative mask, dealt to other rows by one permutation per FFN that the seed decides."""
    model, opt, tool = start_control(mask="shuffled", keep=0.25, ema=0.0, seed=3)
    pairs = []
    for step in range(12):
        take_step(model, opt, step)
        pairs.append(
            [
                (importance_mask(s["importance"], 0.25), s["mask"])
                for s in tool.statistics().values()
            ]
        )
    orders_of = lambda tool: tool.draws(tool._stacks[0]).argsort(-1)
    orders = orders_of(tool)
    assert all(
        torch.equal(shown[order], mask)
        for step in pairs
        for (shown, mask), order in zip(step, orders)
    )
    assert (
        len({tuple(step[0][1].tolist()) for step in pairs})
        == len({tuple(step[0][0].tolist()) for step in pairs})
        > 1
    )  # it changes as often
    assert any(not torch.equal(shown, mask) for shown, mask in pairs[0]) and not torch.equal(
        *orders
    )
    assert all(torch.equal(order.sort().values, torch.arange(48)) for order in orders)
    same, other = (orders_of(start_control(mask="shuffled", seed=seed)[2]) for seed in (3, 4))
    assert torch.equal(same, orders) and not torch.equal(other, orders)


@pytest.mark.parametrize("scale", ["none", "homogeneity"])
def test_redrawn_control(scale):
    """At each step as many rows, others every time, every row equally often in the long run."""
    model, opt, tool = start_control(mask="redrawn", keep=0.25, scale=scale, seed=3)
    masks = []
    for step in range(200):
        before = snapshot(model)
        take_step(model, opt, step % 4)
        masks.append([s["mask"] for s in tool.statistics().values()])
        for (name, B), mask in zip(
            [(n, p) for n, p in snapshot(model).items() if n.endswith("gate_proj.lora_B")],
            masks[-1],
        ):
            assert (
                torch.equal(B[~mask], before[name][~mask])
                and (B[mask] != before[name][mask]).any(dim=1).all()
            )
    for ffn in zip(*masks):
        shares = torch.stack(ffn).float().mean(0)  # (F,), mean 1/4, deviation 0.03
        assert (
            all(mask.sum() == 12 for mask in ffn)
            and len({tuple(mask.tolist()) for mask in ffn}) == 200
            and 0.1 < shares.min() <= shares.max() < 0.4
        )
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
    torch.testing.assert_close(
        tool.statistics()["model.layers.1.mlp"]["importance"], expected, atol=1e-4, rtol=1e-3
    )


def test_score_downstream():
    model, opt, tool = start_control(stride=1, ema=0.0, score="downstream")
    ffn, x = model.model.layers[1].mlp, []
    ffn.register_forward_pre_hook(lambda _, inputs: x.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(*batch(0))
        z, u, norms = (
            ffn.gate_proj(x[0]),
            ffn.up_proj(x[0]),
            ffn.down_proj.base_layer.weight.norm(dim=0),
        )
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
    (model, opt, whole), (model_m, opt_m, parts) = (
        start_control(stride=stride, score=score) for _ in range(2)
    )
    for i in range(3):
        take_step(model, opt, i)
        tokens, targets = batch(i)
        for j in range(4):
            (model_m(tokens[j : j + 1], targets[j : j + 1])[1] / 4).backward()
        opt_m.step(), opt_m.zero_grad()
    for a, b in zip(whole.statistics().values(), parts.statistics().values()):
        torch.testing.assert_close(a["importance"], b["importance"])
        assert torch.equal(a["mask"], b["mask"])


@pytest.mark.parametrize(
    "choices",
    [{"mask": mask} for mask in MASKS]
    + [{"scale": "uniform", "mask": "none"}, {"budget": "neutral"}],
    ids=str,
)
def test_a_control_goes_on_from_its_state(choices):
    model, opt, tool = start_control(**choices, seed=5)
    take_step(model, opt, 0)
    model_n, opt_n, tool_n = start_control(lora_llama(seed=0), **choices, seed=5)
    (
        model_n.load_state_dict(model.state_dict()),
        opt_n.load_state_dict(copy.deepcopy(opt.state_dict())),
        tool_n.load_state_dict(tool.state_dict()),
    )
    for i in range(1, 4):
        take_step(model, opt, i), take_step(model_n, opt_n, i)
    assert equal(snapshot(model), snapshot(model_n))
    assert all(
        equal(s, tool_n.state_dict()["ffns"][name]) for name, s in tool.state_dict()["ffns"].items()
    )


@pytest.mark.parametrize("seed", range(24))
def test_controls_of_random_shapes(seed):
    import random

    rng = random.Random(seed)
    model = small_llama(
        seed,
        intermediate_size=rng.randrange(1, 40),
        hidden_act=rng.choice(["silu", "gelu", "relu"]),
    )
    inject_lora(model, FFN, 1, 4)
    scale = rng.choice(["homogeneity", "uniform", "none"])
    settings = Config(
        mask=rng.choice(list(MASKS)),
        keep=rng.uniform(0.01, 1),
        scale=scale,
        budget="raw" if scale == "uniform" else rng.choice(["raw", "neutral"]),
        score=rng.choice(["phi_prime", "rho_prime", "downstream"]),
        ema=rng.choice([0.0, 0.9]),
        stride=rng.choice([1, 2, 17]),
        seed=seed,
    )
    random_run(rng, model, 61, settings, Control)


@pytest.mark.parametrize(
    "changes, bias",
    [
        ({"scale": "uniform"}, 0),
        ({"budget": "neutral"}, 0),
        ({"mask": "inverted"}, 0),
        ({"score": "rho_prime"}, 0),
        ({"scale": "uniform"}, -1.3),
        ({"budget": "neutral"}, -1.3),
    ],
)
def test_controls_agree_with_the_oracle(changes, bias):
    agrees_with_the_oracle(
        lambda model, optimizer: Control(model, optimizer, Config(stride=1, **changes)),
        changes,
        bias,
        [],
    )


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"budget": "free"}, "budget"),
        ({"score": "phi"}, "score"),
        ({"mask": "top"}, "mask is 'top'"),
        ({"scale": "uniform", "budget": "neutral"}, "exactly 1"),
    ],
)
def test_config_of_a_control_refuses(setting, message):
    with pytest.raises(ValueError, match=message):
        Config(**setting)


def test_presets_are_what_they_are_called():
    args = compare.command_line().parse_args([])
    compare.check(args)
    get = lambda method: (lambda c: (c.mask, c.scale, c.budget))(compare.configure(args, method))
    assert {m: get(m) for m in compare.controls.PRESETS} == {
        "nalora": ("derivative", "homogeneity", "raw"),
        "nalora-mask": ("derivative", "none", "raw"),
        "nalora-scale": ("none", "homogeneity", "raw"),
        "random-mask": ("random", "none", "raw"),
        "inverted-mask": ("inverted", "none", "raw"),
        "uniform-scale": ("none", "uniform", "raw"),
        "random-uniform": ("random", "uniform", "raw"),
        "nalora-neutral": ("derivative", "homogeneity", "neutral"),
        "nalora-shuffled": ("shuffled", "homogeneity", "raw"),
        "shuffled-mask": ("shuffled", "none", "raw"),
        "redrawn-mask": ("redrawn", "none", "raw"),
    }


@pytest.mark.parametrize(
    "flag",
    [
        "warmup=0.5",
        "weight-decay=0.5",
        "beta1=0.5",
        "beta2=0.5",
        "grad-clip=0.1",
        "ema=0",
        "score=downstream",
        "optimizer=sgd",
        "optimizer=sgd,momentum=0.5",
        "scale=none",
        "scale=uniform",
        "mask=random",
        "mask=inverted",
        "budget=neutral",
        "score=rho_prime",
        "stride=3",
    ],
)
def test_every_flag_of_a_variant_changes_the_adapter(base, flag):
    args = compare.command_line().parse_args(comparison_arguments(base, "unused"))
    compare.check(args)

    def trained(spec):
        run = compare.controls.set_up(compare.configure(args, spec))
        list(train_tiny.training_loop(run))
        return {name: p.detach() for name, p in run.trainable.items()}

    assert not equal(trained("nalora"), trained(f"nalora:{flag}"))
