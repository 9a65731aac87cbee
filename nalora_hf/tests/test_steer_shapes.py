"""NALoRA on odd sizes, settings, activations and number formats."""
import math
import random

import pytest
import torch

from nalora import NALoRAConfig
from nalora_hf import NALoRA, adapters, inject_lora, lora_parameters, merge_lora
from nalora_hf.families import ACTIVATIONS
from nalora_hf.tests.helpers import (FFN, batch, equal, lora_llama, small_llama, snapshot, start,
                                     take_step, with_activation)

def first(tool):
    """Statistics of the first FFN."""
    return next(iter(tool.statistics().values()))

@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_trains(act):
    model = with_activation(lora_llama(), ACTIVATIONS[act])
    model, opt, tool = start(NALoRAConfig(stride=1), model)
    losses = [take_step(model, opt, 0) for _ in range(5)]
    assert losses[-1] < losses[0]
    for s in tool.statistics().values():
        assert (s["scale"] == 1) == (act == "relu") and s["mask"].sum() == 24

@pytest.mark.parametrize("spoil", ["padding", "overflow", "overflow in float16"])
def test_useless_statistics_change_nothing(spoil):
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    before = tool.state_dict()["ffns"]
    if spoil == "padding":
        tool.token_mask = torch.zeros(4, 15)
    else:
        weight = model.model.layers[1].mlp.gate_proj.base_layer.weight
        weight.data[0] *= math.inf if spoil == "overflow" else 1e6
    with torch.autocast("cpu", torch.float16, enabled="float16" in spoil):
        model(*batch(1))[1].backward()
    opt.zero_grad()
    opt.step()
    for name, s in tool.state_dict()["ffns"].items():
        assert equal(before[name], s) or spoil != "padding" and "layers.0" in name

@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_other_optimizers_and_low_precision_adapters(optimizer):
    model, opt, tool = start(NALoRAConfig(scale="none"), lora_llama().bfloat16(), optimizer)
    before = snapshot(model)
    take_step(model, opt, 0)
    for name, s in tool.statistics().items():
        B = f"{name}.gate_proj.lora_B"
        same = (snapshot(model)[B] == before[B]).all(1)
        assert same[~s["mask"]].all() and not same[s["mask"]].all()

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
    s = first(tool)
    assert (s["k_hat"], s["occupancy"], s["scale"]) == (1, 0, 1)
    assert s["importance"].tolist() == pytest.approx([0.05] * 48)  # (1 - ema) phi'(0)
    assert math.isfinite(take_step(model, opt, 1))

def test_a_float64_model_trains():
    model, opt, tool = start(NALoRAConfig(), lora_llama().double())
    take_step(model, opt, 0)
    take_step(model, opt, 1)
    assert all(s["importance"].dtype == torch.float64 for s in tool.statistics().values())
    base = small_llama().double()  # and so it does with its adapters in float32
    inject_lora(base, FFN, 4, 8)
    opt = torch.optim.AdamW(lora_parameters(base))
    tool = NALoRA(base, opt)
    take_step(base, opt, 0)
    for s in tool.statistics().values():
        assert s["importance"].dtype == torch.float32 and s["mask"].sum() == 24

@pytest.mark.parametrize("seed", range(40))
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
    random_run(rng, model, model.config.vocab_size, settings, NALoRA)

def random_run(rng, model, vocabulary, settings, steer):
    """Four random steps under steer(model, optimizer, settings): what must hold always."""
    optimizer = rng.choice([torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
    model, opt, _ = start(None, model, optimizer)
    tool = steer(model, opt, settings)
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

class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every operation that would wait for a GPU."""
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default")
        indexed = "aten.index." in name or "index_put" in name
        by_bool = indexed and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_bool or any(word in name for word in waits):
            self.found.append(name)
        return function(*args, **(kwargs or {}))

def test_a_step_waits_for_nothing():
    model, opt, tool = start(NALoRAConfig(stride=1))
    tokens, _ = batch(0)
    tool.token_mask = torch.ones_like(tokens)
    for i in range(4):
        take_step(model, opt, i)  # at passes 1, 2, 4, 8, ... it looks for steps by others
    with Waits() as waits:
        model(tokens)[0].sum().backward()
        model(tokens)[0].sum().backward()
        tool._before_step(opt, (), {})  # alone: AdamW itself reads its count of steps on the CPU
        tool._after_step(opt, (), {})
    assert waits.found == []
    with Waits() as waits:
        first(tool)
    assert waits.found  # it can fail
