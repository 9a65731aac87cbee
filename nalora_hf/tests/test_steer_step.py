"""What NALoRA sums, decides and does to a step, on our Llama."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from nalora import (GateSums, NALoRAConfig, State, blend, decide, effective_homogeneity,
                    importance_mask, observe, step_scale, value_and_slope)
from nalora_hf import NALoRA, inject_lora, lora_parameters
from nalora_hf.tests.helpers import (FFN, batch, equal, lora_llama, small_llama, snapshot, start,
                                     take_step)

def test_the_pure_core_takes_any_leading_dimensions_and_sums_add_up():
    z = torch.randn(2, 3, 8, 20)
    weight = (torch.rand(2, 3, 8) < 0.7).float()
    weight[0, 0] = 0  # an FFN that saw nothing keeps its state
    whole = observe(F.silu, z, weight)
    halves = [observe(F.silu, z[..., part, :], weight[..., part])
              for part in (slice(4), slice(4, None))]
    for found, right in zip(halves[0] + halves[1], whole):
        torch.testing.assert_close(found, right)
    state = State(torch.rand(2, 3, 20), torch.rand(2, 3, 20) < 0.5, *torch.rand(3, 2, 3))
    config = NALoRAConfig(keep=0.3, ema=0.4)
    new = decide(state, whole, config)
    assert all(torch.equal(now[0, 0], before[0, 0]) for now, before in zip(new, state))
    for i, j in [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        sums = GateSums(*(t[i, j] for t in whole))
        alone = decide(State(*(t[i, j] for t in state)), sums, config)
        assert all(map(torch.equal, alone, (t[i, j] for t in new)))
        seen = z[i, j][weight[i, j] > 0]
        score = value_and_slope(F.silu, seen)[1].abs().mean(0)
        torch.testing.assert_close(alone.importance, 0.6 * score + 0.4 * state.importance[i, j])
        assert torch.equal(alone.mask, importance_mask(alone.importance, 0.3))
        torch.testing.assert_close(alone.k_hat, effective_homogeneity(F.silu, seen))
        assert alone.occupancy.item() == pytest.approx((seen > 0).float().mean().item())
        assert alone.scale.item() == pytest.approx(1 / min(max(alone.k_hat.item(), 0.5), 2))

def test_no_sum_is_taken_in_half_precision():
    """Neither under autocast nor of gates that are half themselves."""
    torch.manual_seed(0)
    z = torch.randn(2, 300, 48)
    ones = torch.ones(2, 300)
    with torch.autocast("cpu", torch.bfloat16):
        sums = observe(F.silu, z, ones)
    assert all(map(torch.equal, sums, observe(F.silu, z, ones)))
    half = z.bfloat16()
    assert all(map(torch.equal, observe(F.silu, half, ones), observe(F.silu, half.float(), ones)))

def test_padding_may_hold_anything():
    z = torch.randn(9, 48)
    expected = observe(F.silu, z[:5], torch.ones(5))
    z[5:] = math.nan
    for found, right in zip(observe(F.silu, z, torch.tensor([1] * 5 + [0] * 4)), expected):
        torch.testing.assert_close(found, right)

def test_an_infinite_sum_changes_nothing():
    z = torch.randn(3, 9, 48)
    z[1, 4, 7] = math.inf
    sums = observe(F.silu, z, torch.ones(3, 9))
    before = State(torch.zeros(3, 48), torch.zeros(3, 48) > 0, *torch.zeros(3, 3))
    after = decide(before, sums, NALoRAConfig())
    assert all((t[1] == 0).all() and (t[0] != 0).any() for t in after)

def test_correct_is_exact_at_both_ends_and_goes_beyond():
    before, after = torch.randn(2, 6, 3)
    factor = torch.tensor([0, 1, 0.3, 0.7, 2, -1])[:, None]
    found = blend(before, after, factor)
    assert torch.equal(found[0], before[0]) and torch.equal(found[1], after[1])
    torch.testing.assert_close(found, before + factor * (after - before))

def first(tool):
    """Statistics of the first FFN."""
    return next(iter(tool.statistics().values()))

def test_float32_adapters_on_a_bfloat16_base():
    model = small_llama().bfloat16()
    inject_lora(model, FFN, 4, 8)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    model, opt, tool = start(NALoRAConfig(), model)
    assert model(*batch(0))[0].dtype == torch.bfloat16
    take_step(model, opt, 0)
    assert all(s["importance"].dtype == torch.float32 for s in tool.statistics().values())

def test_rows_are_put_back_bit_for_bit_or_take_exactly_loras_step():
    model, opt, tool = start(NALoRAConfig(scale="none", keep=0.3), weight_decay=0.1)
    plain, plain_opt, _ = start(weight_decay=0.1)
    for i in range(4):
        before = snapshot(model)
        plain.load_state_dict(model.state_dict())  # both optimizers saw the same gradients
        take_step(plain, plain_opt, i)
        take_step(model, opt, i)
        stepped = snapshot(plain)
        now = snapshot(model)
        for name, s in tool.statistics().items():
            B = f"{name}.gate_proj.lora_B"
            rows = s["mask"]
            assert rows.sum() == math.ceil(0.3 * 48)
            assert torch.equal(now[B][~rows], before[B][~rows])
            assert torch.equal(now[B][rows], stepped[B][rows])
            assert not torch.equal(now[B], stepped[B])
        others = [n for n in now if not n.endswith("gate_proj.lora_B")]
        assert others and all(torch.equal(now[n], stepped[n]) for n in others)

@pytest.mark.parametrize(
    "config", [NALoRAConfig(keep=1, scale="none"), NALoRAConfig(mask="none", scale="none")])
def test_switched_off_it_is_lora_bit_for_bit(config):
    plain, plain_opt, _ = start(weight_decay=0.1)
    model, opt, _ = start(config, weight_decay=0.1)
    for i in range(20):
        assert take_step(plain, plain_opt, i) == take_step(model, opt, i)
    assert equal(snapshot(plain), snapshot(model))

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

@pytest.mark.parametrize("mask", ["none", "derivative"])
def test_the_step_of_every_ffn_pair_is_scaled(mask):
    plain, plain_opt, _ = start()
    model, opt, tool = start(NALoRAConfig(mask=mask))
    before = snapshot(plain)
    take_step(plain, plain_opt, 0)
    take_step(model, opt, 0)
    stepped = snapshot(plain)
    statistics = tool.statistics()
    for name, now in snapshot(model).items():
        s = statistics[name.rsplit(".", 2)[0]]
        rows = s["mask"][:, None] if name.endswith("gate_proj.lora_B") else 1
        torch.testing.assert_close(
            now, before[name] + s["scale"] * rows * (stepped[name] - before[name]))
    scales = [s["scale"] for s in statistics.values()]
    assert scales[0] != scales[1] != 1

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
    for a, b in zip(whole.statistics().values(), parts.statistics().values()):
        torch.testing.assert_close(a["importance"], b["importance"])
        assert torch.equal(a["mask"], b["mask"])
        assert a["k_hat"] == pytest.approx(b["k_hat"]) and a["scale"] == pytest.approx(b["scale"])
    for name, p in snapshot(model).items():
        torch.testing.assert_close(p, snapshot(model_m)[name], atol=1e-5, rtol=1e-3)

def test_token_mask_leaves_padding_out():
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
    fault = r"token_mask is \(4, 21\) but the gates see tokens \(4, 15\)"
    with pytest.raises(ValueError, match=fault):
        model(tokens, targets)

def test_stride_observes_every_nth_token():
    seen = []
    repeated = torch.randint(61, (1, 8)).repeat(7, 1).T.reshape(1, 56)  # each token 7 times
    targets = torch.randint(61, (1, 56))
    for stride in (1, 7):
        model, opt, tool = start(NALoRAConfig(stride=stride))
        attention = model.model.layers[0].self_attn
        attention.o_proj.weight.data.zero_()  # layer 0 then sees the token alone, not its place
        model(repeated, targets)[1].backward()
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

def test_evaluation_leaves_no_trace():
    model, opt, _ = start(NALoRAConfig())
    model_e, opt_e, _ = start(NALoRAConfig())
    for i in range(3):
        with torch.no_grad():
            model_e(*batch(100 + i))  # no gradient
        model_e.eval()
        model_e(*batch(200 + i))  # evaluation mode
        model_e.generate(batch(0)[0], 3, stop=-1)
        model_e.train()
        assert take_step(model, opt, i) == take_step(model_e, opt_e, i)
    assert equal(snapshot(model), snapshot(model_e))

@pytest.mark.parametrize("config",
                         [NALoRAConfig(), NALoRAConfig(mask="none"), NALoRAConfig(scale="none")])
def test_state_dict_round_trip(config):
    model, opt, tool = start(config)
    take_step(model, opt, 0)
    state = tool.state_dict()
    again, new, other = start(config, lora_llama(seed=0))
    again.load_state_dict(model.state_dict())
    new.load_state_dict(copy.deepcopy(opt.state_dict()))
    other.load_state_dict(state)
    for i in range(1, 4):
        take_step(model, opt, i)
        take_step(again, new, i)
    assert equal(snapshot(model), snapshot(again))
    assert other.state_dict()["steps"] == 4
    for name, s in tool.state_dict()["ffns"].items():
        assert equal(s, other.state_dict()["ffns"][name])
    with pytest.raises(ValueError, match="was made with"):
        start(NALoRAConfig(keep=0.123))[2].load_state_dict(state)
    with pytest.raises(ValueError, match="another model"):
        start(config, lora_llama(num_hidden_layers=1))[2].load_state_dict(state)

def test_remove_gives_lora_back():
    plain, plain_opt, _ = start()
    model, opt, tool = start(NALoRAConfig())
    tool.remove()
    for i in range(3):
        take_step(plain, plain_opt, i)
        take_step(model, opt, i)
    assert equal(snapshot(plain), snapshot(model))

def test_a_step_skipped_by_a_fused_optimizer_advances_nothing():
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    before = tool.state_dict()["ffns"]
    parameters = snapshot(model)
    opt.found_inf = torch.tensor(1.0)  # what GradScaler sets; a fused kernel then changes nothing
    model(*batch(1))[1].backward()
    opt.zero_grad()
    opt.step()
    del opt.found_inf
    assert all(equal(before[name], s) for name, s in tool.state_dict()["ffns"].items())
    assert equal(parameters, snapshot(model))

def test_nalora_refuses():
    model = lora_llama(["q_proj", "up_proj"])
    with pytest.raises(ValueError, match="No gated FFN here has LoRA"):
        NALoRA(model, torch.optim.AdamW(lora_parameters(model)))
    with pytest.raises(ValueError, match="No gated FFN here has LoRA"):
        NALoRA(small_llama(), torch.optim.AdamW(model.parameters()))
    model = lora_llama()
    with pytest.raises(ValueError, match="optimizer does not hold"):
        NALoRA(model, torch.optim.AdamW(lora_parameters(model)[:3]))
    for wrong in (None, object()):
        with pytest.raises(ValueError, match="hooks the step of a torch.optim.Optimizer"):
            NALoRA(model, wrong)
    opt = torch.optim.AdamW(lora_parameters(model))
    lora_parameters(model)[1].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        NALoRA(model, opt)
    lora_parameters(model)[1].requires_grad_(True)
    one = NALoRA(model, opt)
    with pytest.raises(ValueError, match="steered by another NALoRA"):
        NALoRA(model, opt)
    one.remove()
    NALoRA(model, opt).remove()
    sigmoid = lora_llama()
    del sigmoid.model.layers[1].mlp.act_fn
    sigmoid.model.layers[1].mlp.act_fn = torch.sigmoid
    with pytest.raises(ValueError, match="not self-gated"):
        NALoRA(sigmoid, torch.optim.AdamW(lora_parameters(sigmoid)))
    assert not any(m._forward_hooks for m in model.modules())

def test_it_warns_when_it_saw_no_gate():
    model, opt, tool = start(NALoRAConfig())
    model.eval()
    with pytest.warns(UserWarning, match="saw no gate"):
        take_step(model, opt, 0)

def test_what_is_off_hooks_nothing():
    model, opt, tool = start(NALoRAConfig(mask="none", scale="none"))
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    assert not tool._handles and not any(getattr(m, h) for m in model.modules() for h in hooks)
    assert not opt._optimizer_step_post_hooks
