"""Small promises of adapter files, each of which a mutant once broke with no test failing."""
import json

import pytest
from safetensors.torch import save_file

import nalora_hf
from nalora_hf import load_adapter, save_adapter
from nalora_hf.tests.helpers import small_llama, trained_lora

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
