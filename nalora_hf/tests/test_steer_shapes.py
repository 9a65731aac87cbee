"""NALoRA on odd sizes, settings, activations and number formats."""
import math
import random

import pytest
import torch

from nalora import NALoRAConfig
from nalora_hf import NALoRA, adapters, inject_lora, lora_parameters, merge_lora
from nalora_hf.families import ACTIVATIONS
from nalora_hf.tests.helpers import (FFN, batch, lora_llama, small_llama, snapshot, start,
                                     take_step, with_activation)

@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_trains(act):
    model = with_activation(lora_llama(), ACTIVATIONS[act])
    model, opt, tool = start(NALoRAConfig(stride=1), model)
    losses = [take_step(model, opt, 0) for _ in range(5)]
    assert losses[-1] < losses[0]
    for s in tool.statistics().values():
        assert (s["scale"] == 1) == (act == "relu") and s["mask"].sum() == 24

@pytest.mark.parametrize("optimizer, dtype", [
    (torch.optim.SGD, torch.bfloat16), (torch.optim.Adam, torch.bfloat16),
    (torch.optim.SGD, torch.float16), (torch.optim.Adam, torch.float64)])
def test_adapters_of_other_precisions(optimizer, dtype):
    """Also on a base of another one: what is summed and blended is float32 or wider."""
    for base in (dtype, torch.float32):
        model = lora_llama().to(base)
        for p in lora_parameters(model):
            p.data = p.data.to(dtype)
        model, opt, tool = start(NALoRAConfig(scale="none"), model, optimizer)
        for i in range(2):
            before = snapshot(model)
            take_step(model, opt, i)
            for name, s in tool.statistics().items():
                B = f"{name}.gate_proj.lora_B"
                same = (snapshot(model)[B] == before[B]).all(1)
                assert same[~s["mask"]].all() and not same[s["mask"]].all()
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                assert s["importance"].dtype == wide and s["mask"].sum() == 24
                assert snapshot(model)[B].dtype == dtype

@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_autocast(dtype, tolerance):
    ends = []
    for enabled in (False, True):
        model, opt, tool = start(NALoRAConfig(stride=1))
        for i in range(8):
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = model(*batch(i))[1]
            loss.backward()
            opt.step()
            opt.zero_grad()
        ends.append((loss.item(), tool.statistics()))
    (loss, statistics), (low_loss, low_statistics) = ends
    assert loss == pytest.approx(low_loss, rel=tolerance)
    for a, b in zip(statistics.values(), low_statistics.values()):
        assert b["importance"].dtype == torch.float32
        assert a["k_hat"] == pytest.approx(b["k_hat"], rel=tolerance)
        torch.testing.assert_close(a["importance"], b["importance"], atol=tolerance, rtol=tolerance)

def test_gates_that_are_all_zero():
    model = lora_llama()
    model.model.layers[0].mlp.gate_proj.base_layer.weight.data.zero_()
    opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    tool = NALoRA(model, opt, NALoRAConfig(stride=1))
    take_step(model, opt, 0)  # lora_B = 0, so the gates of layer 0 are 0
    s = tool.statistics()["model.layers.0.mlp"]
    assert (s["k_hat"], s["occupancy"], s["scale"]) == (1, 0, 1)
    assert s["importance"].tolist() == pytest.approx([0.05] * 48)  # (1 - ema) phi'(0)
    assert math.isfinite(take_step(model, opt, 1))

@pytest.mark.parametrize("seed", range(30))
def test_random_shapes(seed):
    """Odd sizes, rank 1 to full, one token or none, padding only, frozen parts, any setting."""
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3])
    model = small_llama(seed, hidden_size=heads * rng.choice([2, 4, 10]),
                        intermediate_size=rng.randrange(1, 40),
                        num_hidden_layers=rng.randrange(1, 4), num_attention_heads=heads,
                        num_key_value_heads=1, head_dim=rng.choice([2, 6]),
                        vocab_size=rng.randrange(2, 30), tie_word_embeddings=rng.random() < 0.5)
    if rng.random() < 0.8:  # else a module, nn.SiLU
        with_activation(model, rng.choice(list(ACTIVATIONS.values())))
    others = rng.sample(["q_proj", "v_proj", "o_proj"], rng.randrange(3))
    targets = [*FFN[: rng.randrange(1, 4)], *others]
    smallest = min(min(m.weight.shape) for name, m in adapters.base_linears(model).items()
                   if name.split(".")[-1] in targets)
    inject_lora(model, targets, rng.randrange(1, smallest + 1), rng.choice([1, 7.5, 16]))
    settings = NALoRAConfig(
        keep=rng.uniform(0.01, 1), ema=rng.choice([0, 0.9]), stride=rng.choice([1, 2, 17, 1000]),
        mask=rng.choice(["derivative", "none"]), scale=rng.choice(["homogeneity", "none"]))
    random_run(rng, model, model.config.vocab_size, settings)

def random_run(rng, model, vocabulary, settings):
    """Four random steps: what must hold always."""
    optimizer = rng.choice([torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
    model, opt, _ = start(None, model, optimizer)
    tool = NALoRA(model, opt, settings)
    frozen = [(p, p.detach().clone()) for p in lora_parameters(model)[2:] if rng.random() < 0.3]
    for p, _ in frozen:
        p.requires_grad_(False)
    for step in range(4):
        shape = (rng.choice([1, 1, 3]), rng.choice([1, 2, 9]))
        tokens, targets = batch(step, shape, vocabulary)
        tool.token_mask = rng.choice([None, torch.ones_like(tokens), torch.zeros_like(tokens),
                                      torch.rand(tokens.shape) < 0.5])
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        (model(tokens, targets)[1] * rng.choice([1, 1, 0])).backward()  # 0: no gradient at all
        if rng.random() < 0.2:
            tool.token_mask = None
            model(tokens[:0])[0].sum().backward()  # a microbatch of nothing
        opt.step()
        opt.zero_grad()
        for name, s in tool.statistics().items():
            B = f"{name}.gate_proj.lora_B"
            moved = (model.get_parameter(B) != before[B]).any(1)
            assert not (moved & ~s["mask"]).any()
            assert s["importance"].isfinite().all() and 1e-6 < s["scale"] < 1e6
            width = len(s["mask"])
            kept = math.ceil(settings.keep * width - 1e-9)
            allowed = {width} if settings.mask == "none" else {kept, width}  # all at first
            assert s["mask"].sum().item() in allowed
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(torch.equal(p, kept) for p, kept in frozen)
    with torch.no_grad():
        adapted = model(tokens)[0]
        merge_lora(model)
        torch.testing.assert_close(model(tokens)[0], adapted, atol=1e-4, rtol=1e-3)
