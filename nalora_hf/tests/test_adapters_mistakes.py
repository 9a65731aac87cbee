"""What goes wrong most often is told in one sentence, before anything is changed: a base that is
not in memory, a rank of another type, a layer or a folder that is not there."""
import json
import os

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, prune

from nalora_hf import inject_lora, load_adapter, lora, lora_layers, merge_lora, save_adapter
from nalora_hf.tests.helpers import (FFN, batch, equal, peft_llama, small_llama, snapshot,
                                     trained_lora)

TOKENS = batch(0)[0]

def refused(message, call, *args, **kwargs):
    with pytest.raises(ValueError, match=message) as told:
        call(*args, **kwargs)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400

# ---- a base that is not in memory ----
def test_a_base_on_the_meta_device_takes_no_lora(tmp_path):
    save_adapter(trained_lora(), tmp_path)
    with torch.device("meta"):
        model = small_llama()
    message = r"model.layers.0.mlp.\w+ has no data.*load the whole model into memory"
    refused(message, inject_lora, model, FFN, 4, 8)
    refused(message, load_adapter, model, tmp_path)
    assert not lora.has_lora(model) and all(p.requires_grad for p in model.parameters())

def test_one_layer_on_the_meta_device_is_enough_and_others_do_not_matter():
    model = small_llama()
    model.model.layers[1].mlp.up_proj.to("meta")
    refused("model.layers.1.mlp.up_proj has no data", inject_lora, model, FFN, 4, 8)
    assert not lora.has_lora(model)
    assert len(inject_lora(model, ["gate_proj", "down_proj"], 4, 8)) == 4

@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_interop_an_offloaded_base_takes_no_lora(tmp_path, how):
    accelerate = pytest.importorskip("accelerate")
    model = small_llama()
    where = {"offload_dir": tmp_path} if how == "disk_offload" else {}
    getattr(accelerate, how)(model, execution_device="cpu", **where)
    refused("has no data, since it is on the meta device or offloaded", inject_lora, model, FFN)
    assert not lora.has_lora(model)

def test_interop_lora_that_is_offloaded_is_saved_once_it_is_back(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = trained_lora()
    wanted, numbers = model(TOKENS)[0], snapshot(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(TOKENS)[0], wanted) and lora.lora_parameters(model)[0].is_meta
    refused(r"The LoRA is offloaded.*remove_hook_from_submodules", save_adapter, model,
            tmp_path / "a")
    assert not (tmp_path / "a").exists()
    refused("offloaded", merge_lora, model)
    assert torch.equal(model(TOKENS)[0], wanted)
    save_adapter(trained_lora(), tmp_path / "b")
    refused("offloaded or sharded", load_adapter, model, tmp_path / "b")
    accelerate.hooks.remove_hook_from_submodules(model)  # as the sentence says
    save_adapter(model, tmp_path / "a")
    fresh = small_llama()
    load_adapter(fresh, tmp_path / "a")
    assert equal(snapshot(fresh), numbers)
    merge_lora(model)
    torch.testing.assert_close(model(TOKENS)[0], wanted)

def test_interop_lora_in_memory_on_an_offloaded_base_is_saved_and_not_merged(tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")
    model = trained_lora()
    wanted, numbers = model(TOKENS)[0], snapshot(model)
    for layer in lora_layers(model).values():
        hooks.attach_align_device_hook(layer.base_layer, execution_device="cpu", offload=True)
    assert torch.equal(model(TOKENS)[0], wanted)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "nalora.json").read_text())["base"] == {}
    refused("offloaded", merge_lora, model)
    assert torch.equal(model(TOKENS)[0], wanted)
    fresh = small_llama()
    load_adapter(fresh, tmp_path)
    assert equal(snapshot(fresh), numbers)

def test_interop_hooks_that_only_move_inputs_are_merged_under():
    hooks = pytest.importorskip("accelerate.hooks")
    model = trained_lora()
    wanted = model(TOKENS)[0]
    for layer in lora_layers(model).values():
        hooks.attach_align_device_hook(layer.base_layer, execution_device="cpu")
        assert "forward" in vars(layer.base_layer)
    merge_lora(model)
    torch.testing.assert_close(model(TOKENS)[0], wanted)

# ---- arguments of another type, names of another model ----
@pytest.mark.parametrize("targets, rank, alpha, message", [
    (FFN, "8", 16, "rank is '8', but Linear.* takes a whole number, 1 to 32"),
    (FFN, 8.0, 16, "rank is 8.0, but"), (FFN, None, 16, "rank is None, but"),
    (FFN, torch.tensor(8), 16, r"rank is tensor\(8\), but"), (FFN, -1, 16, "rank is -1"),
    (FFN, 8, "16", "alpha is '16'"), (FFN, 8, True, "alpha is True"),
    (FFN, 8, None, "alpha is None"), (FFN, 8, -16, "alpha is -16"),
    (["gate_proj", "up_porj"], 8, 16, "target 'up_porj' matches no linear layer; there are down"),
    ("all-linear", 8, 16, "'all-linear' matches no linear layer; there are down_proj, gate"),
    ([None], 8, 16, "None matches no"), (8, FFN, 16, r"No targets are given \(8\)"),
    (None, 8, 16, r"No targets are given \(None\)"), ("", 8, 16, "No targets")])
def test_arguments_of_another_kind(targets, rank, alpha, message):
    model = small_llama()
    refused(message, inject_lora, model, targets, rank, alpha)
    assert not lora.has_lora(model) and all(p.requires_grad for p in model.parameters())

def test_arguments_that_are_swapped(tmp_path):
    refused("A torch model is needed, and this is list", inject_lora, FFN, small_llama())
    refused("this is PosixPath|this is WindowsPath", save_adapter, tmp_path, trained_lora())
    refused("this is str", load_adapter, str(tmp_path), small_llama())

def test_interop_an_adapter_of_pefts_is_left_to_peft(tmp_path):
    pytest.importorskip("peft")
    model = peft_llama()
    before = snapshot(model)
    refused("carries an adapter of PEFT's", inject_lora, model, FFN, 4, 8)
    for call in (merge_lora, lora_layers, lambda m: save_adapter(m, tmp_path / "a")):
        refused("adapter is PEFT's: use its own save_pretrained", call, model)
    save_adapter(trained_lora(), tmp_path / "b")
    refused("carries an adapter of PEFT's", load_adapter, model, tmp_path / "b")
    assert equal(snapshot(model), before) and not (tmp_path / "a").exists()

# ---- folders ----
@pytest.mark.parametrize("make, message", [
    (lambda d: d / "nowhere", r"There is no folder .*nowhere.*a name on the hub, download it"),
    (lambda d: "somebody/an-adapter", "no folder somebody/an-adapter.*huggingface_hub"),
    (lambda d: d, "adapter_config.json cannot be read: the folder holds nothing"),
    (lambda d: (d / "run.json").write_text("{}") and d, "the folder holds run.json"),
    (lambda d: (d / "run.json").write_text("{}") and d / "run.json", "run.json is a file: give")])
def test_folders_without_an_adapter(tmp_path, make, message):
    model = small_llama()
    refused(message, load_adapter, model, make(tmp_path))
    assert not lora.has_lora(model)

def test_weights_that_are_not_safetensors_are_told_of(tmp_path):
    save_adapter(trained_lora(), tmp_path)
    os.rename(tmp_path / "adapter_model.safetensors", tmp_path / "adapter_model.bin")
    refused("adapter_model.safetensors cannot be read: the folder holds adapter_config.json, "
            "adapter_model.bin", load_adapter, small_llama(), tmp_path)

# ---- a whole model ----
@pytest.mark.parametrize("change", [
    lambda m: prune.l1_unstructured(m.model.layers[0].mlp.gate_proj, "weight", 0.5),
    lambda m: parametrizations.weight_norm(m.lm_head),
    lambda m: m.model.layers[1].to("meta"),
    lambda m: setattr(m.model.norm, "gain", nn.Parameter(torch.ones(1)))])
def test_a_model_that_nobody_could_read_again_is_not_written(tmp_path, change):
    model = small_llama()
    change(model)
    refused("offloaded, or other than its class has them", model.save_pretrained, tmp_path / "a")
    assert not (tmp_path / "a").exists()
