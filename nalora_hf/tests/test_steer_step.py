"""What a step does to the parameters, and what it is decided by, on our Llama."""
import math

import pytest
import torch
import torch.nn.functional as F

from nalora import (NALoRAConfig, effective_homogeneity, importance_mask, step_scale,
                    value_and_slope)
from nalora_hf import NALoRA, lora_parameters
from nalora_hf.tests.helpers import (batch, ends_alike, equal, lora_llama, small_llama, snapshot,
                                     start, take_step)

def first(tool):
    """Statistics of the first FFN."""
    return next(iter(tool.statistics().values()))

# ---- what moves ----------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", ["none", "derivative"])
@pytest.mark.parametrize("scale", ["none", "homogeneity"])
def test_each_step_is_loras_times_scale_and_mask(mask, scale):
    """Resting rows keep their bits under momentum and decay; factor 1 is LoRA's step exactly."""
    model, opt, tool = start(NALoRAConfig(mask=mask, scale=scale, keep=0.3), weight_decay=0.1)
    plain, plain_opt, _ = start(weight_decay=0.1)
    for i in range(4):
        before = snapshot(model)
        plain.load_state_dict(model.state_dict())  # both optimizers saw the same gradients
        take_step(plain, plain_opt, i)
        take_step(model, opt, i)
        stepped = snapshot(plain)
        for name, now in snapshot(model).items():
            s = tool.statistics()[name.rsplit(".", 2)[0]]
            factor = torch.full((len(now), 1), s["scale"])
            if name.endswith("gate_proj.lora_B"):
                factor *= s["mask"][:, None]
                assert s["mask"].sum() == (15 if mask == "derivative" else 48)
            wanted = before[name] + factor * (stepped[name] - before[name])
            torch.testing.assert_close(now, wanted)
            assert not torch.equal(now, before[name])
            for exact, other in ((factor == 0, before), (factor == 1, stepped)):
                assert torch.equal(now[exact[:, 0]], other[name][exact[:, 0]])
    scales = [s["scale"] for s in tool.statistics().values()]
    assert (len({1, *scales}) == 3) == (scale == "homogeneity")

@pytest.mark.parametrize(
    "config", [NALoRAConfig(keep=1, scale="none"), NALoRAConfig(mask="none", scale="none"), None])
def test_switched_off_or_taken_off_it_is_lora_bit_for_bit(config):
    plain, plain_opt, _ = start(weight_decay=0.1)
    model, opt, tool = start(config or NALoRAConfig(), weight_decay=0.1)
    if config is None:
        tool.remove()
    for i in range(20):
        assert take_step(plain, plain_opt, i) == take_step(model, opt, i)
    assert equal(snapshot(plain), snapshot(model))
    assert tool.steps == (0 if config is None else 20)

# ---- what it is decided by -----------------------------------------------------------------------
def test_statistics_are_those_of_the_step():
    model, opt, tool = start(NALoRAConfig(stride=1, ema=0.8))
    gates = {}
    for name, ffn in model.named_modules():
        if name.endswith("mlp"):
            ffn.gate_proj.register_forward_hook(
                lambda m, i, z, name=name: gates.update({name: z.detach().flatten(0, 1)}))
    importance = dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp"), 0)
    for s in tool.statistics().values():
        assert math.isnan(s["k_hat"]) and s["scale"] == 1 and s["mask"].all()
    for i in range(3):
        take_step(model, opt, i)
        assert tool.statistics().keys() == gates.keys() == importance.keys()
        for name, s in tool.statistics().items():
            z = gates[name]
            score = value_and_slope(F.silu, z)[1].abs().mean(0)
            importance[name] = 0.8 * importance[name] + 0.2 * score
            torch.testing.assert_close(s["importance"], importance[name])
            assert torch.equal(s["mask"], importance_mask(s["importance"], 0.5))
            k_hat = effective_homogeneity(F.silu, z)
            occupancy = (z > 0).float().mean()
            assert s["k_hat"] == pytest.approx(k_hat.item())
            assert s["occupancy"] == pytest.approx(occupancy.item())
            assert s["scale"] == pytest.approx(step_scale(k_hat, occupancy).item())
    for ffn in tool.ffns:
        assert torch.equal(ffn.state.mask, tool.statistics()[ffn.name]["mask"])

def test_microbatches_equal_one_batch():
    model, opt, whole = start(NALoRAConfig(stride=1))
    model_m, opt_m, parts = start(NALoRAConfig(stride=1))
    for i in range(3):
        take_step(model, opt, i)
        tokens, targets = batch(i)
        for j in range(4):
            (model_m(tokens[j : j + 1], targets[j : j + 1])[1] / 4).backward()
        opt_m.step()
        opt_m.zero_grad()
    assert parts.steps == 3
    for a, b in zip(whole.statistics().values(), parts.statistics().values()):
        torch.testing.assert_close(a["importance"], b["importance"])
        assert torch.equal(a["mask"], b["mask"])
        assert a["k_hat"] == pytest.approx(b["k_hat"]) and a["scale"] == pytest.approx(b["scale"])
    for name, p in snapshot(model).items():
        torch.testing.assert_close(p, snapshot(model_m)[name], atol=1e-5, rtol=1e-3)

def test_a_token_mask_leaves_padding_out():
    model, opt, short = start(NALoRAConfig(stride=1))
    take_step(model, opt, 0)
    model, opt, padded = start(NALoRAConfig(stride=1))
    tokens, targets = batch(0)
    padding = torch.zeros(4, 6, dtype=torch.long)
    padded.token_mask = torch.cat([torch.ones_like(tokens), padding], 1)
    model(torch.cat([tokens, padding], 1), torch.cat([targets, padding - 100], 1))[1].backward()
    opt.step()
    for a, b in zip(short.statistics().values(), padded.statistics().values()):
        torch.testing.assert_close(a["importance"], b["importance"])
        assert a["k_hat"] == pytest.approx(b["k_hat"], rel=1e-5)
        assert a["occupancy"] == pytest.approx(b["occupancy"])
    for wrong, message in ((padded.token_mask, r"token_mask is \(4, 21\), but the gates see tokens "
                            r"\(4, 15\)"), (torch.ones(15, 4), r"token_mask is \(15, 4\)")):
        padded.token_mask = wrong
        with pytest.raises(ValueError, match=message):
            model(tokens, targets)

def test_a_token_mask_says_yes_or_no():
    def run(three):
        model, opt, tool = start(NALoRAConfig(stride=1))
        tool.token_mask = (3 if three else 1) * (torch.arange(15).expand(4, 15) < 9)
        take_step(model, opt, 0)
        return model, opt, tool

    ends_alike(run)

def test_stride_observes_every_nth_token():
    seen = []
    repeated = torch.randint(61, (1, 8)).repeat(7, 1).T.reshape(1, 56)  # each token 7 times
    targets = torch.randint(61, (1, 56))
    for stride in (1, 7):
        model, opt, tool = start(NALoRAConfig(stride=stride))
        attention = model.model.layers[0].self_attn
        attention.o_proj.weight.data.zero_()  # layer 0 then sees the token alone, not its place
        model(repeated, targets)[1].backward()
        tool.add_up()
        assert tool.groups[0].sums.tokens.tolist() == [56 / stride] * 2
        opt.step()
        seen.append(first(tool))
    torch.testing.assert_close(*(s["importance"] for s in seen))  # one of each is enough
    assert seen[0]["k_hat"] == pytest.approx(seen[1]["k_hat"], rel=1e-5)

def test_no_place_of_a_sequence_is_always_missed():
    model, opt, tool = start(NALoRAConfig(stride=7, ema=0))
    tokens, targets = batch(0, (4, 14))  # every 7th of these stands at the same two places
    tool.token_mask = torch.arange(14).expand(4, 14) % 7 == 3
    observed = []
    for i in range(7):
        before = first(tool)["importance"]
        model(tokens, targets)[1].backward()
        opt.step()
        opt.zero_grad()
        observed.append(not torch.equal(before, first(tool)["importance"]))
    assert observed == [i == 3 for i in range(7)]  # at step 3, real tokens have their turn

def test_tokens_are_numbered_within_each_pass():
    """Of 15 tokens 3, 10 are observed at step 3, whatever passes came before."""
    model, opt, tool = start(NALoRAConfig(stride=7))
    for i in range(3):
        take_step(model, opt, i)
    for i, real in enumerate(((3, 10), (3,), (0, 4, 9, 11))):
        tool.token_mask = torch.zeros(1, 15).index_fill(1, torch.tensor(real), 1)
        model(*batch(i, (1, 15)))
    tool.add_up()
    assert tool.groups[0].sums.tokens.tolist() == [3, 3]

# ---- what it says --------------------------------------------------------------------------------
def test_the_summary_is_a_table_of_the_ffns(capsys):
    model, opt, tool = start(NALoRAConfig(keep=0.25))
    take_step(model, opt, 0)
    capsys.readouterr()
    tool.summary()
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith("after 1 steps") and len(rows) == 2
    for row, (name, s) in zip(rows, tool.statistics().items()):
        assert row.split() == [name, "48", "25.0%", f"{s['k_hat']:.2f}", f"{s['occupancy']:.1%}",
                               f"{s['scale']:.2f}"]

def test_what_it_cannot_steer_it_refuses_and_leaves_no_hook():
    """Made rightly afterwards, it is as if it was never refused."""
    def hooks(*given):
        names = ("_forward_hooks", "_forward_pre_hooks", "_optimizer_step_pre_hooks",
                 "_optimizer_step_post_hooks")
        parts = [part for one in given
                 for part in (one.modules() if isinstance(one, torch.nn.Module) else [one])]
        return sum(len(getattr(part, name, ())) for part in parts for name in names)

    def refused(message, *given):
        with pytest.raises(ValueError, match=message):
            NALoRA(*given)
        assert hooks(*given) == 0

    model = lora_llama(["q_proj", "up_proj"])
    refused("No gated FFN here has LoRA", model, torch.optim.AdamW(lora_parameters(model)))
    refused("No gated FFN here has LoRA", small_llama(), torch.optim.AdamW(model.parameters()))
    model, opt, _ = start()
    refused("the other way round", opt, model)
    refused("config is a dict", model, opt, {"keep": 0.5})
    refused("model is a list", [model], opt)
    refused("optimizer does not hold", model, torch.optim.AdamW(lora_parameters(model)[:3]))
    refused("optimizer does not hold", model, [])
    gates = [p for n, p in model.named_parameters() if "gate_proj.lora_" in n]
    refused("optimizer does not hold", model, torch.optim.SGD(gates, lr=0.1))
    for wrong in (None, object(), "adamw"):
        refused("hooks the step", model, wrong)
    lora_parameters(model)[1].requires_grad_(False)
    refused("frozen", model, opt)
    lora_parameters(model)[1].requires_grad_(True)
    sigmoid = lora_llama()
    del sigmoid.model.layers[1].mlp.act_fn
    sigmoid.model.layers[1].mlp.act_fn = torch.sigmoid
    refused("not self-gated", sigmoid, torch.optim.AdamW(lora_parameters(sigmoid)))
    tool = NALoRA(model, opt, NALoRAConfig())
    again, new, other = start(NALoRAConfig())
    for i in range(2):
        take_step(model, opt, i), take_step(again, new, i)
    assert equal(snapshot(model), snapshot(again)) and tool.steps == other.steps == 2
    tool.remove()
    assert hooks(model, opt) == 0
