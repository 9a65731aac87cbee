"""LoRA goes into a model, into files, out of them and into the weights."""
import json
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

import nalora
from nalora import NALoRAConfig
from nalora_hf import (NALoRA, adapters, inject_lora, load_adapter, lora_layers, merge_lora,
                       save_adapter)
from nalora_hf.tests.helpers import (FFN, batch, equal, lora_llama, small_llama, snapshot, start,
                                     take_step, trained_lora)

def test_lora_starts_as_an_exact_no_op_and_adds_its_update():
    model = small_llama()
    tokens, _ = batch(0)
    before = model(tokens)[0]
    names = inject_lora(model, ["q_proj", *FFN], rank=3, alpha=12)
    assert torch.equal(before, model(tokens)[0])
    layer = model.get_submodule(names[0])
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 32)
    weight = layer.base_layer.weight + 12 / 3 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), F.linear(x, weight))
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(32)
    assert layer.lora_A.std() > 0.5 / math.sqrt(32)

def test_exactly_the_adapters_train_and_the_base_keeps_its_bits():
    model, opt, _ = start(NALoRAConfig(), lora_llama(["q_proj", "mlp.gate_proj"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = [f"model.layers.{i}" for i in (0, 1)]
    assert trainable == {f"{layer}.{m}.lora_{x}" for layer in layers for x in "AB"
                         for m in ("self_attn.q_proj", "mlp.gate_proj")}
    base = {name: p.clone() for name, p in model.named_parameters() if name not in trainable}
    for i in range(3):
        take_step(model, opt, i)
    assert equal(base, {name: p for name, p in model.named_parameters() if name not in trainable})

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merge(dtype, tolerance):
    model, opt, _ = start(None, lora_llama(["q_proj", *FFN]))
    take_step(model, opt, 0)
    model.to(dtype)
    tokens, _ = batch(1)
    expected = {name: m.base_layer.weight + m.scaling * m.lora_B @ m.lora_A
                for name, m in lora_layers(model).items()}
    before = model(tokens)[0]
    assert merge_lora(model) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert (model(tokens)[0] - before).abs().max() < tolerance
    assert set(model.state_dict()) == set(small_llama().state_dict())
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(model)

@pytest.mark.parametrize("spoil, message",
                         [(lambda w: w.to("meta"), "meta device"),
                          (lambda w: w.to(torch.int8), "quantized")])
def test_merge_refuses_weights_that_are_not_there_or_quantized(spoil, message):
    model = lora_llama()
    layer = model.model.layers[1].mlp.down_proj.base_layer
    layer.weight = nn.Parameter(spoil(layer.weight.detach()), requires_grad=False)
    before = model.model.layers[0].mlp.gate_proj.base_layer.weight.clone()
    with pytest.raises(ValueError, match=message):
        merge_lora(model)
    assert torch.equal(model.model.layers[0].mlp.gate_proj.base_layer.weight, before)

def test_merge_refuses_a_tied_weight():
    model = small_llama(tie_word_embeddings=True)
    inject_lora(model, ["lm_head", "q_proj"], 4, 8)
    with pytest.raises(ValueError, match="lm_head is tied"):
        merge_lora(model)
    assert len(lora_layers(model)) == 3

@pytest.mark.parametrize(
    "targets, rank, alpha, message",
    [(["q_prj"], 4, 8, "'q_prj' matches no linear layer; there are down_proj, gate_proj"),
     ([], 4, 8, "No targets"), (["roj"], 4, 8, "matches no"), (["q_proj"], 0, 8, "rank is 0"),
     (["q_proj"], 33, 8, "a whole number, 1 to 32"), (["q_proj"], 2.0, 8, "rank is 2.0"),
     (["q_proj"], True, 8, "rank is True"), (["q_proj"], 4, 0, "alpha is 0"),
     (["q_proj"], 4, "8", "alpha is '8'"), (["q_proj"], 4, math.nan, "alpha is nan")])
def test_inject_refuses(targets, rank, alpha, message):
    model = small_llama()
    with pytest.raises(ValueError, match=message):
        inject_lora(model, targets, rank, alpha)
    assert all(p.requires_grad for p in model.parameters()) and not adapters.has_lora(model)

def test_inject_twice_is_refused():
    with pytest.raises(ValueError, match="carries LoRA already"):
        inject_lora(lora_llama(), FFN, 4, 8)

def read(path):
    return json.loads(path.read_text())

def test_adapter_round_trip(tmp_path):
    model = trained_lora()
    tokens, _ = batch(1)
    save_adapter(model, tmp_path, base_model="base", settings={"keep": 0.5})
    config = read(tmp_path / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["target_modules"] == sorted(FFN)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 12
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    assert tensors[name].shape == (4, 32)
    fresh = small_llama()
    assert load_adapter(fresh, tmp_path) == list(lora_layers(model))
    assert torch.equal(fresh(tokens)[0], model(tokens)[0])
    injected = lora_llama()
    load_adapter(injected, tmp_path)
    assert torch.equal(injected(tokens)[0], model(tokens)[0])
    load_adapter(small_llama().bfloat16(), tmp_path)  # another dtype is the same base

def test_partial_targets_are_written_by_their_full_names(tmp_path):
    name = "model.layers.1.mlp.gate_proj"
    save_adapter(trained_lora(["layers.1.mlp.gate_proj"]), tmp_path)
    assert read(tmp_path / "adapter_config.json")["target_modules"] == [name]
    assert load_adapter(small_llama(), tmp_path) == [name]

@pytest.mark.parametrize(
    "spoil, message",
    [(lambda d, c: (d / "adapter_config.json").unlink(), "cannot be read"),
     (lambda d, c: (d / "adapter_model.safetensors").write_bytes(b"not a tensor"),
      "cannot be read"),
     (lambda d, c: {**c, "use_dora": True}, "use_dora"),
     (lambda d, c: {**c, "peft_type": "IA3"}, "no plain LoRA"),
     (lambda d, c: {**c, "r": 8}, "rank 8"),
     (lambda d, c: {**c, "lora_alpha": 10**400}, "no plain LoRA"),
     (lambda d, c: {**c, "lora_alpha": math.nan}, "no plain LoRA"),
     (lambda d, c: save_adapter(trained_lora(hidden_size=48, head_dim=12), d), "names or shapes"),
     (lambda d, c: save_adapter(trained_lora(num_hidden_layers=3), d), "other module names"),
     (lambda d, c: save_adapter(trained_lora(seed=7), d), "trained on another base model"),
     (lambda d, c: (d / "nalora.json").write_text('{"base": null}'), "norms"),
     (lambda d, c: (d / "nalora.json").write_text('{"base": {"x": "1"}}'), "norms")])
def test_foreign_adapters_are_refused(tmp_path, spoil, message):
    save_adapter(trained_lora(), tmp_path)
    config = spoil(tmp_path, read(tmp_path / "adapter_config.json"))
    if isinstance(config, dict):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = small_llama()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not adapters.has_lora(model)

def test_an_adapter_unlike_the_lora_in_the_model_is_refused(tmp_path):
    save_adapter(trained_lora(), tmp_path)
    for targets, rank, alpha in ((FFN, 2, 8), (FFN, 4, 16), (FFN[:2], 4, 8)):
        model = small_llama()
        inject_lora(model, targets, rank, alpha)
        before = snapshot(model)
        with pytest.raises(ValueError, match="differs from the LoRA already in the model"):
            load_adapter(model, tmp_path)
        assert equal(before, snapshot(model))

def test_lora_that_nalora_injected_is_ours_too(tmp_path):
    models = [small_llama(), small_llama()]
    assert nalora.inject_lora(models[0], FFN, 4, 8) == inject_lora(models[1], FFN, 4, 8)
    assert lora_layers(models[0]).keys() == lora_layers(models[1]).keys()
    models[0].load_state_dict(models[1].state_dict())
    for model in models:
        opt = start(None, model)[1]
        NALoRA(model, opt, NALoRAConfig(stride=1))
        take_step(model, opt, 0)
    assert equal(snapshot(models[0]), snapshot(models[1]))
    again = small_llama()
    nalora.inject_lora(again, FFN, 4, 8)
    save_adapter(models[0], tmp_path)
    for model in (again, small_llama()):
        load_adapter(model, tmp_path)
        assert equal(snapshot(model), snapshot(models[0]))
    nalora.load_adapter(small_llama(), tmp_path)  # and the other way round
    merged = [merge_lora(model) and model.state_dict() for model in models]
    assert equal(*merged) and len(merged[0]) == len(small_llama().state_dict())
