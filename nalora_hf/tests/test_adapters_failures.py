"""merge_lora and inject_lora that fail halfway leave the model as it was; merges of other
precisions and of parts that stand elsewhere."""
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn

from nalora_hf import inject_lora, load_adapter, lora, merge_lora, save_adapter
from nalora_hf.tests.helpers import FFN, equal, small_llama
from nalora_hf.tests.test_adapters_merge import (awake, merged_rightly, output, refused,
                                                 replace_weights)

# ---- merges that fail halfway ----
def on_call(monkeypatch, owner, name, count, error):
    """The `count`th call of owner.name raises."""
    own = getattr(owner, name)
    calls = []

    def counted(*args):
        calls.append(args)
        if len(calls) == count:
            raise error
        return own(*args)

    monkeypatch.setattr(owner, name, counted)

@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError("out of memory"),
                                   NotImplementedError("out of memory")], ids=repr)
@pytest.mark.parametrize("owner, name, count", [(lora, "merged", 5), (torch.Tensor, "clone", 4),
                                                (torch.Tensor, "copy_", 6)])
def test_a_merge_that_fails_in_the_middle_changes_nothing(monkeypatch, owner, name, count, error):
    model = awake(small_llama(), FFN)
    before, numbers = output(model), {n: t.clone() for n, t in model.state_dict().items()}
    with monkeypatch.context() as patch:
        on_call(patch, owner, name, count, error)
        with pytest.raises(ValueError, match="Nothing is merged: out of memory"):
            merge_lora(model)
    assert equal(numbers, model.state_dict()) and torch.equal(output(model), before)
    merged_rightly(model)  # and it can be tried again

def test_an_interruption_while_layers_are_replaced_changes_nothing(monkeypatch):
    model = awake(small_llama(), FFN)
    before, numbers = output(model), {n: t.clone() for n, t in model.state_dict().items()}
    with monkeypatch.context() as patch:
        on_call(patch, nn.Module, "__setattr__", 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge_lora(model)
    assert equal(numbers, model.state_dict()) and torch.equal(output(model), before)
    merged_rightly(model)

def test_all_is_computed_before_the_first_weight_changes(monkeypatch):
    model = awake(small_llama(), FFN)
    first = lora.lora_layers(model)["model.layers.0.mlp.gate_proj"].base_layer.weight
    was = first.clone()
    own, unchanged = lora.merged, []
    monkeypatch.setattr(lora, "merged",
                        lambda layer: unchanged.append(torch.equal(first, was)) or own(layer))
    merge_lora(model)
    assert unchanged == [True] * 6 and not torch.equal(first, was)

def test_weights_that_cannot_be_written_stay():
    for change in (lambda w: w[:1].expand(48, 32), None):
        model = small_llama().eval()
        if change is None:
            with torch.inference_mode():
                replace_weights(model, torch.Tensor.clone)
        else:
            replace_weights(model, change)
        refused(awake(model), "Nothing is merged")

def test_a_layer_that_is_the_model_itself_is_refused():
    layer = nn.Linear(8, 6)
    with pytest.raises(ValueError, match="the model itself"):
        inject_lora(layer, [""], 2, 4)
    assert layer.weight.requires_grad
    layer = lora.LoRALinear(layer, 2, 4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 8)
    before = layer(x)
    with pytest.raises(ValueError, match="the model itself"):
        merge_lora(layer)
    assert torch.equal(layer(x), before)  # not merged and added once more

def test_a_layer_that_is_compiled_by_itself_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), torch.compile(nn.Linear(8, 8), backend="eager"))
    with pytest.raises(ValueError, match="compiled by itself"):
        inject_lora(model, ["1"], 2, 4)
    assert model[1].weight.requires_grad and not lora.has_lora(model)
    inject_lora(model, ["0"], 2, 4)
    model[0] = torch.compile(model[0], backend="eager")
    with pytest.raises(ValueError, match="compiled by itself"):
        merge_lora(model)

# ---- other precisions, other places ----
def test_lora_in_bfloat16_is_added_in_float32_and_rounded_once():
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(32, 48).bfloat16(), 4, 8).bfloat16()
    nn.init.normal_(layer.lora_B, std=0.2)
    B, A = layer.lora_B.double(), layer.lora_A.double()
    exact = layer.base_layer.weight.double() + 2 * B @ A
    assert (layer.weight != exact.bfloat16()).float().mean() < 0.002  # float32 at half of a bit
    model, wanted = nn.Sequential(layer), layer.weight
    merge_lora(model)
    assert wanted.dtype == torch.bfloat16 and torch.equal(model[0].weight, wanted)

def test_merge_under_wrappers_of_the_base_layer():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    model = awake(small_llama(), FFN)
    for layer in model.model.layers:
        layer.mlp.gate_proj.base_layer = checkpoint_wrapper(layer.mlp.gate_proj.base_layer)
    merged_rightly(model)

def test_shards_of_fsdp2_are_merged_saved_and_not_injected_into(tmp_path):
    from torch.distributed.fsdp import fully_shard
    plain = awake(small_llama(), FFN)
    wanted = output(plain)
    sharded = awake(small_llama(), FFN)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0,
                                         world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        save_adapter(sharded, tmp_path / "a")
        with pytest.raises(ValueError, match="sharded: load the adapter first"):
            load_adapter(sharded, tmp_path / "a")
        base = sharded.model.layers[0].mlp.gate_proj.base_layer
        base.register_forward_hook(record := Mock(return_value=None))  # of a shard it is let pass
        merge_lora(sharded)
        assert not record.called
        torch.testing.assert_close(output(sharded), wanted)
        with pytest.raises(ValueError, match="sharded already"):
            inject_lora(sharded, FFN, 4, 8)
    finally:
        torch.distributed.destroy_process_group()
    fresh = small_llama().eval()
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(output(fresh), wanted)
