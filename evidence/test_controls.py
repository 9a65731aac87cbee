"""The controls: their masks, scales and settings."""
import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import train_tiny
from evidence import compare
from evidence.conftest import (FFN, batch, equal, lora_llama, small_llama, snapshot, start,
                               take_step)
from evidence.controls import MASKS, PRESETS, Config, Control, row_draw
from evidence.test_compare import comparison_arguments
from nalora import (GatedFFN, LlamaConfig, importance_mask, inject_lora, lora_parameters,
                    merge_lora)

close = torch.testing.assert_close

def start_control(model=None, **choices):
    """(model, optimizer, Control)"""
    model, opt = start(model)
    return model, opt, Control(model, opt, Config(**choices))

def all_of(control, key):
    """What the control knows of each FFN."""
    return [getattr(ffn.state, key) for ffn in control.ffns]

@pytest.mark.parametrize("choices", [{"budget": "neutral"}, {"mask": "random"},
                                     {"mask": "redrawn"}, {"mask": "shuffled"}, {"mask": "none"},
                                     {"mask": "turns"}, {"mask": "credit"}])
def test_switched_off_a_control_is_lora_bit_for_bit(choices):
    plain, plain_opt = start()
    model, opt, _ = start_control(keep=1.0, scale="none", **choices)
    for i in range(5):
        assert take_step(plain, plain_opt, i) == take_step(model, opt, i)
    assert equal(snapshot(plain), snapshot(model))

def test_the_uniform_scale_is_the_mean_of_the_scales():
    model, opt, own = start_control()
    model_u, opt_u, uniform = start_control(scale="uniform")
    take_step(model, opt, 0)
    take_step(model_u, opt_u, 0)
    a, b = all_of(own, "scale")
    assert a != b != 1
    for scale in all_of(uniform, "scale"):
        close(scale, (a + b) / 2)

def test_an_ffn_without_tokens_keeps_its_share_of_the_uniform_scale():
    model, opt, uniform = start_control(scale="uniform")
    take_step(model, opt, 0)
    first, second = all_of(uniform, "k_hat")
    uniform.ffns[1].act.eval()              # it sees no pass any more
    take_step(model, opt, 1)
    new, same = all_of(uniform, "k_hat")
    assert new != first and same == second
    mean = (1 / new.clamp(0.5, 2) + 1 / same.clamp(0.5, 2)) / 2
    for scale in all_of(uniform, "scale"):
        close(scale, mean)

def test_neutral_budget_keeps_the_mean_step():
    scales = {}
    for budget in ("raw", "neutral"):
        model, opt, control = start_control(keep=0.25, budget=budget)
        take_step(model, opt, 0)
        scales[budget] = torch.stack(all_of(control, "scale"))
    close(scales["neutral"], scales["raw"] / scales["raw"].log().mean().exp())
    for ffn in control.ffns:
        rows = control.row_factor(ffn)[:, 0] / ffn.state.scale  # (F,)
        assert rows.mean().item() == pytest.approx(1) and rows.max().item() == pytest.approx(4)

def test_random_control():
    model, opt, control = start_control(mask="random", keep=0.25, seed=3)
    masks = all_of(control, "mask")
    assert all(mask.sum() == 12 for mask in masks) and not torch.equal(*masks)
    take_step(model, opt, 0)
    assert all(map(torch.equal, masks, all_of(control, "mask")))
    other = start_control(mask="random", keep=0.25, seed=4)[2]
    assert not torch.equal(masks[0], other.ffns[0].state.mask)

def test_inverted_control():
    model, opt, control = start_control()
    model_i, opt_i, inverted = start_control(mask="inverted")
    take_step(model, opt, 0)
    take_step(model_i, opt_i, 0)
    for a, b in zip(control.ffns, inverted.ffns):
        assert torch.equal(a.state.importance, b.state.importance)
        assert torch.equal(a.state.mask, ~b.state.mask)

def test_shuffled_control():
    """The derivative mask, dealt to other rows by one permutation per FFN that the seed decides."""
    model, opt, control = start_control(mask="shuffled", keep=0.25, ema=0.0, seed=3)
    orders = [control.draw(ffn).argsort() for ffn in control.ffns]
    shown = set()
    dealt = set()
    for step in range(12):
        take_step(model, opt, step)
        for ffn, order in zip(control.ffns, orders):
            mask = importance_mask(ffn.state.importance, 0.25)
            assert torch.equal(mask[order], ffn.state.mask)
            assert not torch.equal(mask, ffn.state.mask)
        shown.add(tuple(mask.tolist()))
        dealt.add(tuple(ffn.state.mask.tolist()))
    assert len(dealt) == len(shown) > 1     # it changes as often
    assert all(torch.equal(order.sort().values, torch.arange(48)) for order in orders)
    assert not torch.equal(*orders)
    for seed, alike in ((3, True), (4, False)):
        other = start_control(mask="shuffled", seed=seed)[2]
        assert torch.equal(other.draw(other.ffns[0]).argsort(), orders[0]) == alike

@pytest.mark.parametrize("scale", ["none", "homogeneity"])
def test_redrawn_control(scale):
    """At each step as many rows, others every time, every row equally often in the long run."""
    model, opt, control = start_control(mask="redrawn", keep=0.25, scale=scale, seed=3)
    masks = []
    for step in range(200):
        before = [ffn.B_gate.detach().clone() for ffn in control.ffns]
        take_step(model, opt, step % 4)
        masks.append(all_of(control, "mask"))
        for ffn, B, mask in zip(control.ffns, before, masks[-1]):
            assert torch.equal((ffn.B_gate != B).any(dim=1), mask)
    for drawn in zip(*masks):
        assert all(mask.sum() == 12 for mask in drawn)
        assert len({tuple(mask.tolist()) for mask in drawn}) == 200
        shares = torch.stack(drawn).float().mean(0)  # (F,), mean 1/4, deviation 0.03
        assert 0.1 < shares.min() <= shares.max() < 0.4
    assert not torch.equal(*masks[0])
    for seed, alike in ((3, True), (4, False)):
        model, opt, control = start_control(mask="redrawn", keep=0.25, scale=scale, seed=seed)
        take_step(model, opt, 0)
        assert torch.equal(control.ffns[0].state.mask, masks[0][0]) == alike

def test_row_draws_do_not_depend_on_the_default_dtype():
    expected = row_draw(3, 1, 48, step=5)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(row_draw(3, 1, 48, step=5), expected)
    finally:
        torch.set_default_dtype(torch.float32)

# ---- passes --------------------------------------------------------------------------------------

SCORES = [(1, "downstream"), (5, "downstream"), (5, "rho_prime")]

@pytest.mark.parametrize("stride, score", SCORES)
def test_microbatches_equal_one_batch_with_other_scores(stride, score):
    """Rows of 15 tokens, so that every 5th of a row is every 5th of the batch."""
    model, opt, whole = start_control(stride=stride, score=score)
    model_m, opt_m, parts = start_control(stride=stride, score=score)
    for i in range(3):
        take_step(model, opt, i)
        tokens, targets = batch(i)
        for j in range(4):
            (model_m(tokens[j:j + 1], targets[j:j + 1])[1] / 4).backward()
        opt_m.step()
        opt_m.zero_grad()
    for a, b in zip(whole.ffns, parts.ffns):
        close(a.state.importance, b.state.importance)
        assert torch.equal(a.state.mask, b.state.mask)

@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stride, score", SCORES)
def test_gradient_checkpointing_gives_the_same_scores(stride, score, reentrant):
    model, opt, plain = start_control(stride=stride, score=score)
    model_c, opt_c, recomputed = start_control(stride=stride, score=score)
    for block in model_c.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
    model_c.model.embed_tokens.weight.requires_grad_()      # a reentrant checkpoint asks for it
    for i in range(3):
        take_step(model, opt, i)
        take_step(model_c, opt_c, i)
    for a, b in zip(plain.ffns, recomputed.ffns):
        close(a.state.importance, b.state.importance)
        assert torch.equal(a.state.mask, b.state.mask)

def test_padding_may_hold_anything():
    model, opt, control = start_control(score="downstream", stride=1)
    z = torch.randn(6, 48)
    x = torch.randn(6, 32)
    weight = torch.tensor([1.0, 1, 1, 1, 0, 0])
    ffn = control.ffns[0]
    module = model.get_submodule(ffn.name)
    control.inputs[ffn] = module, x
    expected = control.observe(ffn, z, weight).score
    z[4:] = x[4:] = math.nan
    control.inputs[ffn] = module, x
    close(control.observe(ffn, z, weight).score, expected)

@pytest.mark.parametrize("choices", [*({"mask": mask} for mask in MASKS), {"budget": "neutral"},
                                     {"scale": "uniform", "mask": "none"}], ids=str)
def test_a_control_goes_on_from_its_state(choices):
    model, opt, control = start_control(**choices, seed=5)
    take_step(model, opt, 0)
    again, new, other = start_control(lora_llama(seed=0), **choices, seed=5)
    again.load_state_dict(model.state_dict())
    new.load_state_dict(copy.deepcopy(opt.state_dict()))
    other.load_state_dict(control.state_dict())
    for i in range(1, 4):
        take_step(model, opt, i)
        take_step(again, new, i)
    assert equal(snapshot(model), snapshot(again))
    for a, b in zip(control.ffns, other.ffns):
        assert all(map(torch.equal, a.state, b.state))

@pytest.mark.parametrize("seed", range(24))
def test_controls_of_random_shapes(seed):
    """One token or none, padding only, frozen parts, any setting: what must hold always."""
    rng = random.Random(seed)
    model = small_llama(seed, intermediate_size=rng.randrange(1, 40))
    act = rng.choice([nn.SiLU, nn.GELU, nn.ReLU])
    for layer in model.model.layers:
        layer.mlp.act_fn = act()
    inject_lora(model, FFN, 1, 4)
    scale = rng.choice(["homogeneity", "uniform", "none"])
    c = Config(mask=rng.choice(list(MASKS)), keep=rng.uniform(0.01, 1), scale=scale,
               budget="raw" if scale == "uniform" else rng.choice(["raw", "neutral"]),
               score=rng.choice(["phi_prime", "rho_prime", "downstream"]),
               ema=rng.choice([0.0, 0.9]), stride=rng.choice([1, 2, 17]), seed=seed)
    model, opt = start(model, rng.choice([torch.optim.AdamW, torch.optim.SGD]))
    control = Control(model, opt, c)
    frozen = [p for p in lora_parameters(model)[2:] if rng.random() < 0.3]
    kept = [p.detach().clone() for p in frozen]
    for p in frozen:
        p.requires_grad_(False)
    for step in range(4):
        tokens, targets = batch(step, (rng.choice([1, 1, 3]), rng.choice([1, 2, 9])))
        control.token_mask = rng.choice([None, torch.ones_like(tokens), torch.zeros_like(tokens),
                                         torch.rand(tokens.shape) < 0.5])
        before = [ffn.B_gate.detach().clone() for ffn in control.ffns]
        (model(tokens, targets)[1] * rng.choice([1, 1, 0])).backward()  # 0: no gradient at all
        if rng.random() < 0.2:
            control.token_mask = None
            model(tokens[:0])[0].sum().backward()  # a microbatch of nothing
        opt.step()
        opt.zero_grad()
        for ffn, B in zip(control.ffns, before):
            rows = ffn.state.mask
            assert not ((ffn.B_gate != B).any(1) & ~rows).any()
            assert ffn.state.importance.isfinite().all() and 1e-6 < ffn.state.scale < 1e6
            chosen = math.ceil(c.keep * len(rows) - 1e-9)
            assert rows.sum().item() in ({len(rows)} if c.mask == "none" else {chosen, len(rows)})
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(map(torch.equal, frozen, kept))
    with torch.no_grad():
        adapted = model(tokens)[0]
        merge_lora(model)
        close(model(tokens)[0], adapted, atol=1e-4, rtol=1e-3)

# ---- an independent oracle in NumPy float64: what a control decides from the gates of a step -----

TOKENS, WIDTH, CHANNELS = 12, 4, 7
DEFAULTS = {"mask": "derivative", "keep": 0.5, "scale": "homogeneity", "budget": "raw",
            "score": "phi_prime", "ema": 0.9}

def silu(z):
    """rho, rho', phi, phi' at z."""
    rho = 1 / (1 + np.exp(-z))
    return rho, rho * (1 - rho), z * rho, rho + z * rho * (1 - rho)

def oracle_score(c, z, u, norm):
    """Of one token and channel."""
    if c["score"] == "rho_prime":
        return silu(max(abs(z), 1e-3))[1]
    return abs(silu(z)[3]) * (abs(u) * norm if c["score"] == "downstream" else 1)

def oracle_decide(c, s, z, u, norms):
    """Brings `s` up to date with gates z and features u (TOKENS, CHANNELS) of this step."""
    I = s["importance"]
    for ch in range(CHANNELS):
        scores = [oracle_score(c, z[t, ch], u[t, ch], norms[ch]) for t in range(TOKENS)]
        I[ch] = c["ema"] * I[ch] + (1 - c["ema"]) * sum(scores) / TOKENS
    order = sorted(range(CHANNELS), key=I.__getitem__, reverse=c["mask"] == "derivative")
    s["mask"] = np.isin(range(CHANNELS), order[:int(np.ceil(c["keep"] * CHANNELS))])
    squares = sum(silu(v)[2] ** 2 for v in z.flat)
    s["k_hat"] = sum(v * silu(v)[3] * silu(v)[2] for v in z.flat) / squares
    s["occupancy"] = p = sum(v > 0 for v in z.flat) / z.size
    s["scale"] = 1.0 if min(p, 1 - p) < 0.05 else 1 / min(max(s["k_hat"], 0.5), 2)

def oracle_scales(c, a, b):
    if c["scale"] == "uniform":
        return (a + b) / 2, (a + b) / 2
    if c["budget"] == "neutral":
        return a / np.sqrt(a * b), b / np.sqrt(a * b)
    return a, b

def oracle_rows(c, mask):
    rows = mask.astype(float)
    return (rows / rows.mean() if c["budget"] == "neutral" else rows)[:, None]

def two_ffns(bias):
    """Two FFNs with LoRA in float64; bias shifts the gates of the first where x[:, 0] is 1."""
    torch.manual_seed(0)
    shape = LlamaConfig(0, WIDTH, CHANNELS, 2, 1)
    model = nn.ModuleList(GatedFFN(shape) for _ in range(2))
    inject_lora(model, FFN, 2, 5)
    for name, p in model.double().named_parameters():
        nn.init.normal_(p, std=0.1 if "lora_B" in name else 0.5)
    model[0].gate_proj.base_layer.weight[:, 0] += bias
    return model, torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.1)

def step_of_two(model, optimizer, x, target):
    """One step of x + FFN(x), twice. [(z, u)] of both."""
    seen = []
    for ffn in model:
        z = ffn.gate_proj(x)
        u = ffn.up_proj(x)
        seen.append((z.detach().numpy(), u.detach().numpy()))
        x = x + ffn(x)
    optimizer.zero_grad()
    F.mse_loss(x, target).backward()
    optimizer.step()
    return seen

@pytest.mark.parametrize("changes, bias", [
    ({"scale": "uniform"}, 0), ({"budget": "neutral"}, 0), ({"mask": "inverted"}, 0),
    ({"score": "rho_prime"}, 0), ({"score": "downstream"}, 0), ({"scale": "uniform"}, -1.3),
    ({"budget": "neutral", "score": "downstream"}, -1.3)])
def test_controls_agree_with_the_oracle(changes, bias):
    """A control's step is LoRA's step from the same place, times what the oracle says."""
    c = DEFAULTS | changes
    plain, plain_optimizer = two_ffns(bias)
    model, optimizer = two_ffns(bias)
    control = Control(model, optimizer, Config(stride=1, **changes))
    norms = [np.linalg.norm(ffn.down_proj.base_layer.weight.numpy(), axis=0) for ffn in model]
    stats = [{"importance": np.zeros(CHANNELS)} for _ in model]
    for t in range(10):
        x, target = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
        x[:, 0] = 1
        plain.load_state_dict(model.state_dict())
        before = snapshot(model)
        step_of_two(plain, plain_optimizer, x, target)
        seen = step_of_two(model, optimizer, x, target)
        for s, (z, u), norm in zip(stats, seen, norms):
            oracle_decide(c, s, z, u, norm)
        a, b = oracle_scales(c, *(s["scale"] for s in stats))
        for i, scale in enumerate((a, b)):
            state = control.ffns[i].state
            for key, expected in {**stats[i], "scale": scale}.items():
                np.testing.assert_allclose(getattr(state, key), expected, rtol=0, atol=1e-10)
            for name, after in plain[i].named_parameters():
                if after.requires_grad:
                    rows = oracle_rows(c, stats[i]["mask"]) if name == "gate_proj.lora_B" else 1
                    step = (after.detach() - before[f"{i}.{name}"]).numpy() * rows * scale
                    moved = model[i].get_parameter(name).detach() - before[f"{i}.{name}"]
                    np.testing.assert_allclose(moved, step, rtol=0, atol=1e-10)

# ---- settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize("setting, message", [
    ({"budget": "free"}, "budget"), ({"score": "phi"}, "score"), ({"mask": "top"}, "mask is 'top'"),
    ({"scale": "uniform", "budget": "neutral"}, "exactly 1")])
def test_config_of_a_control_refuses(setting, message):
    with pytest.raises(ValueError, match=message):
        Config(**setting)

def parsed(*arguments):
    args = compare.command_line().parse_args(arguments)
    compare.check(args)
    return args

def test_presets_are_what_they_are_called():
    expected = {"nalora": ("derivative", "homogeneity", "raw"),
                "nalora-mask": ("derivative", "none", "raw"),
                "nalora-scale": ("none", "homogeneity", "raw"),
                "nalora-neutral": ("derivative", "homogeneity", "neutral"),
                "nalora-shuffled": ("shuffled", "homogeneity", "raw"),
                "shuffled-mask": ("shuffled", "none", "raw"),
                "random-mask": ("random", "none", "raw"),
                "redrawn-mask": ("redrawn", "none", "raw"),
                "turns-mask": ("turns", "none", "raw"),
                "credit-mask": ("credit", "none", "raw"),
                "inverted-mask": ("inverted", "none", "raw"),
                "uniform-scale": ("none", "uniform", "raw"),
                "random-uniform": ("random", "uniform", "raw")}
    configs = {method: compare.configure(parsed(), method) for method in PRESETS}
    assert {m: (c.mask, c.scale, c.budget) for m, c in configs.items()} == expected

@pytest.mark.parametrize("flag", [
    "warmup=0.5", "weight-decay=0.5", "beta1=0.5", "beta2=0.5", "grad-clip=0.1", "ema=0",
    "score=downstream", "score=rho_prime", "optimizer=sgd", "optimizer=sgd,momentum=0.5",
    "scale=none", "scale=uniform", "mask=random", "mask=inverted", "budget=neutral", "stride=3"])
def test_every_flag_of_a_variant_changes_the_adapter(base, flag):
    args = parsed(*comparison_arguments(base, "unused"))

    def trained(spec):
        run = compare.controls.set_up(compare.configure(args, spec))
        list(train_tiny.training_loop(run))
        return {name: p.detach() for name, p in run.trainable.items()}

    assert not equal(trained("nalora"), trained(f"nalora:{flag}"))
