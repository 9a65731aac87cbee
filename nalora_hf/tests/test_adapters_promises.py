"""Small promises of adapter files, each of which a mutant once broke with no test failing."""
import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

import nalora_hf
from nalora import LoRALinear
from nalora_hf import adapters, load_adapter, save_adapter
from nalora_hf.tests.helpers import FFN, lora_llama, small_llama, trained_lora

def test_an_adapter_of_nothing_is_refused_with_nothing_changed(tmp_path):
    save_adapter(trained_lora(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": []}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    model = small_llama()
    with pytest.raises(ValueError, match="not complete"):
        load_adapter(model, tmp_path)
    assert all(p.requires_grad for p in model.parameters())

def test_the_base_is_known_by_the_norms_of_first_rows(tmp_path):
    model = trained_lora()
    save_adapter(model, tmp_path)
    record = json.loads((tmp_path / "nalora.json").read_text())
    name = "model.layers.1.mlp.up_proj"
    row = nalora_hf.lora_layers(model)[name].base_layer.weight[0]
    assert len(record["base"]) == 6
    assert record["base"][name] == pytest.approx(row.square().sum().sqrt().item())
    record["base"]["a layer that is not in the adapter"] = 1.0  # says nothing
    (tmp_path / "nalora.json").write_text(json.dumps(record))
    assert len(load_adapter(small_llama(), tmp_path)) == 6

def test_adapters_of_two_sizes_and_of_an_encoder_decoder(tmp_path):
    model = small_llama()
    for layer, rank in zip(model.model.layers, (2, 4)):
        layer.mlp.gate_proj = LoRALinear(layer.mlp.gate_proj, rank, 8)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="differ in rank or alpha"):
        save_adapter(model, tmp_path)
    model = lora_llama()
    model.prepare_inputs_for_generation = None
    model.config = SimpleNamespace(is_encoder_decoder=True)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"

@pytest.mark.parametrize("factor", [1, 1.005, 1.05])
def test_how_far_a_base_may_differ(tmp_path, factor):
    save_adapter(trained_lora(), tmp_path)
    model = small_llama()
    model.model.layers[1].mlp.up_proj.weight.data *= factor
    if factor < 1.01:
        load_adapter(model, tmp_path)
        return
    with pytest.raises(ValueError, match="another base"):
        load_adapter(model, tmp_path)
    (tmp_path / "nalora.json").write_text('{"base": {}}')  # nothing is known of it
    load_adapter(model, tmp_path)

@pytest.mark.parametrize("targets",
                         [r".*\.mlp\.(gate|up|down)", ["ate_proj", "up_proj", "down_proj"]])
def test_targets_name_whole_modules(tmp_path, targets):
    save_adapter(trained_lora(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    with pytest.raises(ValueError, match="not complete"):
        load_adapter(small_llama(), tmp_path)

def test_interop_what_peft_refuses_is_not_written(monkeypatch, tmp_path):
    theirs = pytest.importorskip("peft.utils.transformers_weight_conversion")

    def refuse(*args):
        raise ValueError("of another kind")

    monkeypatch.setattr(theirs, "convert_peft_config_for_transformers", refuse)
    assert not adapters.peft_reads(small_llama(), FFN)
    with pytest.raises(ValueError, match="PEFT reads these names"):
        save_adapter(lora_llama(), tmp_path)

def test_an_adapter_without_one_of_its_tensors_is_refused(tmp_path):
    save_adapter(lora_llama(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    save_file(tensors, path)
    model = small_llama()
    with pytest.raises(ValueError, match="does not fit this model"):
        load_adapter(model, tmp_path)
    assert not adapters.has_lora(model)
