"""NALoRA on models of transformers, PEFT and Accelerate, which are extras."""
import functools
import json
import math
import re
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from nalora import NALoRAConfig
from nalora_hf import NALoRA, families, inject_lora, save_adapter
from nalora_hf.tests.helpers import (FAMILIES, FFN, batch, equal, family, hf_step, pairs_of,
                                     peft_llama, snapshot, wake)

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

@pytest.mark.parametrize("name", FAMILIES)
def test_interop_nalora_is_the_same_under_our_lora_and_pefts(name):
    from peft import LoraConfig, get_peft_model
    ours, theirs = family(name), family(name)
    inject_lora(ours, ["q_proj", *FFN], rank=4, alpha=8)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", *FFN]))
    tools = []
    for model in (ours, theirs):
        model.train()
        opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2, weight_decay=0.1)
        tool = NALoRA(model, opt, NALoRAConfig(stride=1, keep=0.25))
        losses = [hf_step(model, opt, i) for i in range(4)]
        assert losses[0] != losses[-1] and len(tool.statistics()) == 2
        tools.append(tool)
    a, b = (list(tool.statistics().values()) for tool in tools)
    for x, y in zip(a, b):
        assert (torch.equal(x["mask"], y["mask"]) and x["mask"].sum() == 12
                and x["k_hat"] == pytest.approx(y["k_hat"], rel=1e-4) and 0.5 <= x["scale"] <= 2)
    for p, q in zip(pairs_of(ours), pairs_of(theirs)):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)

def test_interop_several_peft_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(family("Llama"), LoraConfig(r=4, target_modules=FFN))
    model.add_adapter("second", LoraConfig(r=2, target_modules=FFN))
    model.set_adapter("second")
    first = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tool = NALoRA(model.train(), opt, NALoRAConfig(keep=0.25, stride=1))
    for i in range(3):
        hf_step(model, opt, i)
    assert first and all(torch.equal(p, model.get_parameter(n)) for n, p in first.items())
    B = model.get_parameter("base_model.model.model.layers.0.mlp.gate_proj.lora_B.second.weight")
    assert 12 <= (B != 0).any(1).sum() < 30 and B.shape == (48, 2)
    assert tool.statistics()["base_model.model.model.layers.0.mlp"]["mask"].sum() == 12
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="saw no pass before this step: .* its adapter active"):
        hf_step(model, opt, 3)

def test_interop_ffns_without_a_gate_and_fused_ones():
    import transformers
    from peft import LoraConfig, get_peft_model
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2,
                                                                n_head=4, n_positions=64))
    gpt2 = get_peft_model(
        gpt2, LoraConfig(r=4, target_modules=["mlp.c_fc", "mlp.c_proj"], fan_in_fan_out=True))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    inject_lora(vision, ["fc1", "fc2"], rank=4, alpha=8)
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes))
    fc1 = any(name.endswith("fc1") for name, _ in vit.named_modules())
    inject_lora(vit, ["fc1", "fc2"] if fc1 else ["intermediate.dense"], rank=4, alpha=8)
    for model, gate, inputs in ((gpt2, "c_fc", {"input_ids": batch(0)[0]}),
                                (vision, "fc1", {"pixel_values": torch.randn(2, 3, 16, 16)}),
                                (vit, "fc1" if fc1 else "intermediate.dense",
                                 {"pixel_values": torch.randn(2, 3, 16, 16)})):
        opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2)
        with pytest.raises(ValueError, match="name the one in front of the activation with gate="):
            NALoRA(model, opt)
        tool = NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25), gate=gate)
        gates = {
            name: families.lora_pairs(model.get_submodule(f"{name}.{gate.split('.')[-1]}"))[0][1]
            for name in tool.statistics()}
        before = {name: B.detach().clone() for name, B in gates.items()}
        model(**inputs)[0].square().mean().backward()
        opt.step()
        assert len(gates) == 2
        for name, s in tool.statistics().items():
            assert (torch.equal((gates[name] != before[name]).any(1), s["mask"])
                    and s["mask"].float().mean() == 0.25 and math.isfinite(s["k_hat"]))

def fused_forward(self, x):
    """As Liger's kernel: the activation is no module."""
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class FusedMLP(torch.nn.Module):
    """As Liger puts it in the place of LlamaMLP before a model is made."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = torch.nn.Linear(*sizes, bias=False)
        self.up_proj = torch.nn.Linear(*sizes, bias=False)
        self.down_proj = torch.nn.Linear(*sizes[::-1], bias=False)

    forward = fused_forward

@pytest.mark.parametrize("kind", ["a method", "a class", "around the old one"])
def test_interop_a_fused_ffn_is_steered_as_the_one_it_replaces(kind, monkeypatch):
    def run(model):
        optimizer = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2)
        tool = NALoRA(model.train(), optimizer, NALoRAConfig(stride=1, keep=0.25))
        for i in range(3):
            hf_step(model, optimizer, i)
        return snapshot(model), tool

    usual, tool = run(peft_llama())
    assert all(ffn.act is not ffn.gate for ffn in tool.ffns)
    if kind == "a class":
        monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP", FusedMLP)
    model = peft_llama()
    for layer in model.base_model.model.model.layers:
        mlp = layer.mlp
        assert isinstance(mlp, FusedMLP) == (kind == "a class")
        if kind == "a method":
            mlp.forward = types.MethodType(fused_forward, mlp)
        elif kind == "around the old one":
            mlp.forward = functools.wraps(mlp.forward)(functools.partial(mlp.forward))
    fused, other = run(model)
    assert all((ffn.act is ffn.gate) == (kind != "around the old one") for ffn in other.ffns)
    for (name, s), t in zip(tool.statistics().items(), other.statistics().values(), strict=True):
        assert torch.equal(s["mask"], t["mask"]) and s["k_hat"] == pytest.approx(t["k_hat"])
    for name, p in usual.items():
        torch.testing.assert_close(p, fused[name], atol=1e-6, rtol=1e-4)

@pytest.mark.parametrize("reentrant", [True, False])
def test_interop_gradient_checkpointing_changes_nothing(reentrant):
    results = []
    for checkpointing in (False, True):
        model = family("Llama")
        inject_lora(model, ["q_proj", *FFN], rank=4, alpha=8)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2)
        tool = NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25))
        losses = [hf_step(model, opt, i) for i in range(3)]
        results.append((losses, list(tool.statistics().values())))
    (a, s), (b, t) = results
    assert a == pytest.approx(b, rel=1e-5)
    for x, y in zip(s, t):
        assert (torch.equal(x["mask"], y["mask"])
                and x["k_hat"] == pytest.approx(y["k_hat"], rel=1e-5)
                and x["occupancy"] == pytest.approx(y["occupancy"]))

def test_interop_accelerate():
    from accelerate import Accelerator
    results = []
    for accelerated in (False, True):
        model = peft_llama()
        opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2)
        backward = torch.Tensor.backward
        if accelerated:
            accelerator = Accelerator(cpu=True)
            model, opt = accelerator.prepare(model, opt)
            backward = accelerator.backward
        NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25))
        for i in range(3):
            tokens, targets = batch(i)
            backward(F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1),
                                     targets.flatten()))
            opt.step(), opt.zero_grad()
        results.append(snapshot(model))
    assert equal(*results)

def test_interop_an_adapter_of_a_transformers_model_is_what_peft_and_vllm_read(tmp_path):
    from peft import PeftModel
    model, (tokens, _) = family("Qwen2").eval(), batch(1)
    inject_lora(model, ["q_proj", *FFN], rank=4, alpha=8)
    wake(pairs_of(model))
    save_adapter(model, tmp_path)
    keys, config = (load_file(tmp_path / "adapter_model.safetensors"),
                    json.loads((tmp_path / "adapter_config.json").read_text()))
    assert all(re.fullmatch(r"base_model\.model\.model\.layers\.\d\."
                            r"(self_attn\.q_proj|mlp\.(gate|up|down)_proj)\.lora_[AB]\.weight", key)
               for key in keys)
    assert (len(keys) == 16 and config["r"] == 4 and config["lora_alpha"] == 8
            and config["task_type"] == "CAUSAL_LM"
            and {t.shape[0] if "lora_A" in k else t.shape[1] for k, t in keys.items()} == {4})
    theirs = PeftModel.from_pretrained(family("Qwen2"), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
