"""NALoRA on FFNs of other kinds: fused, changed on the way, under other names, of other widths."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import nalora
import nalora_hf
from nalora import LoRALinear, NALoRAConfig
from nalora_hf import NALoRA, adapters, families, inject_lora, lora_parameters, merge_lora
from nalora_hf.tests.helpers import (FFN, OtherFFN, equal, lora_llama, other_model, other_step,
                                     skip_activations, small_llama, snapshot, start, take_step)

@pytest.mark.parametrize("change", [None, lambda z: 2 * z])
@pytest.mark.parametrize("layout", ["gate first", "gate last", "in turns"])
def test_a_fused_layer_is_steered_as_its_unfused_twin(layout, change):
    fused, twin = other_model(layout, change=change), other_model(change=change)
    with torch.no_grad():
        for ffn, apart in zip(fused.layers, twin.layers):
            for rows, layer in zip(ffn.parts(), (apart.gate_proj, apart.up_proj)):
                layer.base_layer.weight.copy_(ffn.gate_up_proj.base_layer.weight[rows])
                layer.lora_A.copy_(ffn.gate_up_proj.lora_A)
                layer.lora_B.copy_(ffn.gate_up_proj.lora_B[rows])
            apart.down_proj.load_state_dict(ffn.down_proj.state_dict())
    tools = []
    for model in (fused, twin):
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.lora_A.requires_grad_(False)  # LoRA-FA: the twin's two A would part ways
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        tools.append((model, opt, NALoRA(model, opt, NALoRAConfig(stride=1, keep=0.25))))
    for i in range(4):
        for model, opt, _ in tools:
            other_step(model, i, opt)
    for a, b in zip(*(tool.statistics().values() for *_, tool in tools)):
        assert (torch.equal(a["mask"], b["mask"]) and a["mask"].sum() == 3
                and a["scale"] == pytest.approx(b["scale"], rel=1e-5) and a["scale"] != 1)
    for ffn, apart in zip(fused.layers, twin.layers):
        for rows, layer in zip(ffn.parts(), (apart.gate_proj, apart.up_proj)):
            torch.testing.assert_close(ffn.gate_up_proj.lora_B[rows], layer.lora_B, atol=1e-6,
                                       rtol=1e-5)

@pytest.mark.parametrize(
    "change", [lambda z: z * 3, lambda z: z.reshape(10, 12).view(2, 5, 12), lambda z: z - 1])
def test_what_the_activation_receives_is_observed(change):
    model = other_model(change=change)
    opt = torch.optim.SGD(lora_parameters(model), lr=0.1)
    tool = NALoRA(model, opt, NALoRAConfig(stride=1))
    seen = []
    model.layers[1].act_fn.register_forward_pre_hook(
        lambda act, inputs: seen.append(inputs[0].detach()))
    other_step(model, 0, opt)
    importance = nalora.value_and_slope(F.silu, seen[0].flatten(0, 1))[1].abs().mean(0) * 0.1
    torch.testing.assert_close(tool.statistics()["layers.1"]["importance"], importance)
    skips = other_model(act=nn.SiLU())
    skip_activations(skips)
    opt = torch.optim.SGD(lora_parameters(skips), lr=0.1)
    tool = NALoRA(skips, opt, NALoRAConfig(stride=1))
    gates = []
    skips.layers[1].gate_proj.register_forward_hook(lambda gate, x, z: gates.append(z.detach()))
    other_step(skips, 0, opt), other_step(skips, 1, opt)
    a, b = (nalora.value_and_slope(F.silu, z.flatten(0, 1))[1].abs().mean(0) for z in gates)
    torch.testing.assert_close(tool.statistics()["layers.1"]["importance"], 0.1 * (0.9 * a + b))

def test_a_layer_that_the_activation_does_not_see_is_refused():
    model = other_model()
    for layer in model.layers:
        layer.up, layer.gate = layer._modules.pop("up_proj"), layer._modules.pop("gate_proj")
        layer.forward = lambda x, self=layer: (
            x + self.down_proj(self.act_fn(self.gate(x)) * self.up(x)))
    opt = torch.optim.SGD(lora_parameters(model), lr=0.1)
    with pytest.raises(
        ValueError, match="It is on down_proj, gate, up: name the one in front of the activation"):
        NALoRA(model, opt)
    tool = NALoRA(model, opt, gate="up")
    with pytest.raises(ValueError, match="does not see the output of the layer"):
        other_step(model, 0, opt)
    tool.remove()
    for layer in model.layers:
        layer.forward = lambda x, self=layer: (
            x + self.down_proj(self.up(x) * self.act_fn(self.gate(x))))
    tool = NALoRA(model, opt, gate="up")
    with pytest.raises(ValueError, match="does not see the output of the layer"):
        other_step(model, 0, opt)
    tool.remove()
    tool = NALoRA(model, opt, NALoRAConfig(stride=1), gate="gate")
    other_step(model, 0, opt)
    assert math.isfinite(tool.statistics()["layers.1"]["k_hat"])
    with pytest.raises(ValueError, match="The gate of model.layers.0.mlp is gate_proj"):
        NALoRA(lora_llama(), opt, gate="up_proj")
    with pytest.raises(ValueError, match="its activation is no module of its own"):
        NALoRA(other_model("gate first", act=F.silu), opt)
    with pytest.raises(ValueError, match="its activation is no module of its own"):
        NALoRA(other_model("gate first", act=SHARED), opt)
    no_lora = small_llama()
    with pytest.raises(ValueError, match="inject it first"):
        NALoRA(no_lora, opt)

SHARED = nn.SiLU()

def test_the_activation_may_be_told_or_stand_in_the_config():
    model = lora_llama()
    model.config.hidden_act = "silu"
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.forward = lambda x, self=layer.mlp: self.down_proj(F.silu(self.gate_proj(x))
                                                                     * self.up_proj(x))
    runs = [start(NALoRAConfig(stride=1), model=m, optimizer=torch.optim.SGD)
            for m in (lora_llama(), model)]
    for model, opt, tool in runs:
        take_step(model, opt, 0)
    assert equal(snapshot(runs[0][0]), snapshot(model))
    tool.remove()
    model.config = None
    with pytest.raises(ValueError, match="model.layers.0.mlp has no activation"):
        NALoRA(model, opt)
    assert [ffn.phi for ffn in NALoRA(model, opt, act=F.gelu).ffns] == [F.gelu] * 2
    assert [ffn.phi for ffn in NALoRA(model, opt, act="gelu").ffns] == [F.gelu] * 2
    with pytest.raises(ValueError, match="act='gleu' is no activation: give a function, a module"):
        NALoRA(model, opt, act="gleu")

def test_it_says_what_is_steered(capsys):
    model = lora_llama(["q_proj", *FFN])
    model.model.layers[1].mlp.gate_proj = model.model.layers[1].mlp.gate_proj.base_layer
    tool = NALoRA(model, torch.optim.SGD(lora_parameters(model), lr=0.1))
    assert (capsys.readouterr().out == f"{tool}\n"
            == "NALoRA steers 1 of 2 FFNs; plain LoRA on 2 q_proj, 1 up_proj, 1 down_proj.\n")

def tokens_seen(tool):
    """{FFN: how many tokens were observed since the last step}."""
    tool.add_up()
    return {ffn.name: ffn.group.sums.tokens[ffn.index].item() for ffn in tool.ffns}

def test_the_token_mask_of_a_text_leaves_another_tower_alone():
    model = nn.Module()
    model.text, model.vision = other_model().layers, other_model(count=1).layers
    opt = torch.optim.SGD(lora_parameters(model), lr=0.1)
    tool = NALoRA(model.train(), opt, NALoRAConfig(stride=1))
    tool.token_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    text, image = torch.randn(2, 5, 8), torch.randn(9, 8)
    with_padding = text.clone()
    with_padding[tool.token_mask == 0] = 100
    for tower, x in ((model.text, with_padding), (model.vision, image)):
        for layer in tower:
            x = layer(x)
        x.square().mean().backward()
    assert tokens_seen(tool) == {"text.0": 5, "text.1": 5, "vision.0": 9}

def test_ffns_of_different_width_and_activation_are_steered_side_by_side():
    """Each as if it were alone, though those alike are a group; also where a pass skips it."""
    class FFN(nn.Module):
        def __init__(self, width, act):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (
                nn.Linear(8, width), nn.Linear(8, width), nn.Linear(width, 8))
            self.act_fn = act

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    class Swish(nn.Module):
        def __init__(self, beta):
            super().__init__()
            self.beta = beta  # a number, or a tensor, whose repr is rounded

        def forward(self, z):
            return z * torch.sigmoid(self.beta * z)

    def run(chosen):
        torch.manual_seed(0)
        ffns = [FFN(12, F.silu), FFN(20, F.silu), FFN(12, F.gelu), FFN(12, F.silu),
                FFN(12, Swish(0.7)), FFN(12, Swish(2.0)), FFN(12, Swish(0.7)),
                FFN(12, Swish(torch.tensor(0.5))), FFN(12, Swish(torch.tensor(0.50001)))]
        model = nn.ModuleList(ffns)
        inject_lora(model, ["gate_proj", "up_proj", "down_proj"], rank=2)
        start(None, model)
        model = nn.ModuleDict({str(i): ffns[i] for i in chosen})
        opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
        tool = NALoRA(model, opt, NALoRAConfig(stride=1))
        for step in range(3):
            for i in chosen:
                x = torch.randn(5 + i, 8, generator=torch.Generator().manual_seed(10 * step + i))
                if (step, i) != (1, 3):
                    model[str(i)](x).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return len(tool.groups), tool.statistics()

    groups, together = run(range(9))
    assert groups == 7
    for i in range(9):
        for key, value in run([i])[1][str(i)].items():
            torch.testing.assert_close(torch.as_tensor(together[str(i)][key]),
                                       torch.as_tensor(value), msg=f"{key} of {i}")

def test_flattened_parameters_are_refused():
    model = lora_llama()
    opt = torch.optim.AdamW(lora_parameters(model))
    for p in lora_parameters(model):
        p.data = p.data.flatten()[:0]  # as ZeRO-3 and FSDP1 leave them on other ranks
    with pytest.raises(ValueError, match="use FSDP2's fully_shard"):
        NALoRA(model, opt)

def test_lora_without_data_is_refused():
    model = lora_llama()
    opt = torch.optim.AdamW(lora_parameters(model))
    model.model.layers[1].mlp.up_proj.to("meta")  # as an offloaded layer stands there
    with pytest.raises(ValueError, match="The LoRA of model.layers.1.mlp stands on the meta"):
        NALoRA(model, opt)
    assert not any(m._forward_pre_hooks for m in model.modules())

class Averaging:
    """An optimizer that is none of torch's."""
    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self):
        self.optimizer.step()

def test_what_is_no_optimizer_of_torch_is_refused():
    model = lora_llama()
    opt = torch.optim.AdamW(lora_parameters(model))
    with pytest.raises(ValueError, match=r"NALoRA hooks the step\(\) of a torch.optim.Optimizer, "
                                         "which Averaging is not"):
        NALoRA(model, Averaging(opt))
    assert not any(m._forward_pre_hooks for m in model.modules())

def test_a_fused_layer_may_see_no_token_at_first():
    model = other_model("gate last")
    opt = torch.optim.SGD(lora_parameters(model), lr=0.1)
    tool = NALoRA(model, opt, NALoRAConfig(stride=1))
    model.forward(torch.randn(0, 5, 8)).square().sum().backward()
    other_step(model, 0, opt)
    assert all(torch.equal(ffn.rows, torch.arange(12, 24)) for ffn in tool.ffns)

def test_the_token_mask_of_an_encoder_decoder_is_the_encoders():
    model = nn.Module()
    model.config = SimpleNamespace(is_encoder_decoder=True)
    model.encoder, model.decoder = nn.Module(), nn.Module()
    model.encoder.block, model.decoder.block = other_model().layers, other_model(count=1).layers
    opt = torch.optim.SGD(lora_parameters(model), lr=0.1)
    tool = NALoRA(model.train(), opt, NALoRAConfig(stride=1))
    tool.token_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    for blocks in (model.encoder.block, model.decoder.block):
        x = torch.randn(2, 5, 8)
        for block in blocks:
            x = block(x)
        x.square().mean().backward()
    assert tokens_seen(tool) == {
        "encoder.block.0": 5, "encoder.block.1": 5, "decoder.block.0": 10}

def test_lora_put_into_a_model_that_evaluates_evaluates():
    model = small_llama().eval()
    inject_lora(model, FFN, 4, 8)
    assert not any(m.training for m in model.modules())

def test_a_layer_at_two_places_is_refused():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    with pytest.raises(ValueError, match="several places"):
        inject_lora(model, ["a.0"], 2, 4)
    assert not adapters.has_lora(model) and shared.weight.requires_grad
    model["b"][0] = nn.Linear(8, 8)
    inject_lora(model, ["a.0"], 2, 4)
    model["b"][0] = model["a"][0]
    nn.init.normal_(model["a"][0].lora_B)
    before = shared.weight.clone()
    with pytest.raises(ValueError, match="several places"):
        merge_lora(model)
    assert torch.equal(shared.weight, before)

def test_code_that_asks_for_weight_and_bias_finds_lora_in_them():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32)
    for model, targets, call in ((encoder, ["linear1", "linear2"], lambda: encoder(x)),
                                 (attention, ["out_proj"], lambda: attention(x, x, x)[0])):
        plain = call().detach()
        inject_lora(model, targets, 4, 8)
        for p in lora_parameters(model):
            nn.init.normal_(p, std=0.2)
        slow = call()  # with gradients: no fast path
        slow.sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in lora_parameters(model))
        with torch.no_grad():
            fast = model.eval() and call()
        assert not torch.allclose(fast, plain, atol=1e-3)
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
        layer = next(iter(nalora_hf.lora_layers(model).values()))
        assert (layer.in_features, layer.out_features) == layer.base_layer.weight.shape[::-1]
        assert layer.bias is layer.base_layer.bias

def test_a_merged_weight_is_rounded_once():
    torch.manual_seed(0)
    layer = adapters.LoRALinear(nn.Linear(32, 48).bfloat16(), 4, 8)
    nn.init.normal_(layer.lora_B, std=0.2)
    whole = layer.base_layer.weight.float() + 2 * (layer.lora_B @ layer.lora_A)
    assert torch.equal(layer.weight, whole.bfloat16())

def test_the_config_of_an_ffn_goes_before_the_models():
    ffn = OtherFFN()
    del ffn.act_fn
    ffn.config = SimpleNamespace(hidden_act="gelu")
    act = families.activation(ffn, SimpleNamespace(hidden_act="silu"))
    assert torch.equal(act(torch.ones(3)), F.gelu(torch.ones(3)))

def test_a_module_at_two_depths_has_the_name_that_torch_gives_it():
    model = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(2, 2))})
    model["near"] = model["deep"][0]
    assert list(families.unwrapped_modules(model)) == [name for name, _ in model.named_modules()]
