"""Which FFNs are steered under which names, where z is seen, and which rows of B make it."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from nalora import LoRALinear, NALoRAConfig
from nalora_hf import NALoRA, families, inject_lora, lora_layers, lora_parameters
from nalora_hf.tests.helpers import (OtherFFN, batch, equal, lora_llama, other_model, other_step,
                                     sgd, skip_activations, small_llama, snapshot, start, state_of,
                                     take_step)

def tokens_of(tool):
    tool.add_up()
    return [n for group in tool.groups for n in group.sums.tokens.tolist()]

# ---- where z is seen -----------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["apart", "gate last"])
def test_a_gate_that_is_changed_on_its_way_counts_once_in_its_first_pass(layout):
    model = other_model(layout, change=lambda z: 2 * z)
    tool = NALoRA(model, sgd(model), NALoRAConfig(stride=1))
    for _ in range(2):
        model.forward(torch.randn(2, 5, 8)).sum().backward()
    assert tokens_of(tool) == [20, 20]

@pytest.mark.parametrize("kind", ["a forward of its own", "in training alone", "a shared module"])
def test_where_the_activation_is_not_called_or_shared_z_is_the_gates_output(kind):
    """As fused kernels leave it out."""
    model = other_model()
    if kind == "a forward of its own":
        skip_activations(model)
    elif kind == "a shared module":
        model.layers[1].act_fn = model.layers[0].act_fn
    else:
        for layer in model.layers:
            layer.forward = lambda x, self=layer: x + self.down_proj(
                fused(self)(self.gate_proj(x)) * self.up_proj(x))

    def fused(layer):
        return F.silu if layer.training else layer.act_fn

    opt = sgd(model)
    tool = NALoRA(model, opt, NALoRAConfig(stride=1))
    assert [ffn.act is ffn.gate for ffn in tool.ffns] == [True, True]
    model.layers[0].act_fn(torch.randn(2, 5, 12))  # by itself it tells nothing
    assert not tool.seen
    for i in range(2):
        other_step(model, i, opt)
        model.eval().forward(torch.randn(2, 5, 8))
        model.train()
    assert tool.steps == 2 and math.isfinite(tool.statistics()["layers.1"]["k_hat"])

def test_which_activation_is_an_ffns():
    model = lora_llama()
    act = NALoRA(model, sgd(model), act=F.gelu).ffns[0].phi
    assert torch.equal(act(torch.ones(3)), F.silu(torch.ones(3)))  # its own
    ffn = OtherFFN()
    del ffn.act_fn
    ffn.act_fn, ffn.act = "silu", F.gelu
    assert families.activation(ffn) is F.gelu
    model = lora_llama(["q_proj"])
    with pytest.raises(ValueError, match="self_attn has no activation"):
        NALoRA(model, sgd(model), gate="q_proj")
    bare = small_llama()
    for layer in bare.model.layers:
        del layer.mlp.act_fn
    bare.config = None
    with pytest.raises(ValueError, match="inject it first"):
        NALoRA(bare, torch.optim.SGD(bare.parameters()))

@pytest.mark.parametrize("change", [lambda z: torch.cat((z, z), -1)[..., :10],
                                    lambda z: z[..., :10]])
def test_an_activation_of_another_width_than_the_gate_is_refused(change):
    model = other_model()
    for layer in model.layers:
        layer.forward = lambda x, self=layer: (
            x + self.down_proj(F.pad(self.act_fn(change(self.gate_proj(x))), (0, 2))))
    NALoRA(model, sgd(model))
    with pytest.raises(ValueError, match="activation receives 10 channels, and the gate gives 12"):
        other_step(model, 0)

# ---- fused layers --------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["gate first", "gate last", "in turns"])
@pytest.mark.parametrize("kind", ["whole", "one column", "first token", "doubled", "rounded"])
def test_the_rows_that_make_the_gate_are_seen_in_any_pass(layout, kind):
    """Though its first token, or one of its channels at some tokens, takes no part."""
    def change(z):
        keep = torch.ones_like(z)
        keep[0, 0] = 0 if kind == "first token" else 1
        keep[0, 1, 3] = 0 if kind == "one column" else 1
        return (z * keep).bfloat16().float() if kind == "rounded" else (
            2 * z if kind == "doubled" else z * keep)

    model = other_model(layout, count=1, change=change)
    tool = NALoRA(model, sgd(model), NALoRAConfig(stride=1))
    model.forward(torch.randn(2, 5, 8)).sum().backward()
    assert torch.equal(tool.ffns[0].rows, model.layers[0].parts()[0])

def test_which_rows_make_the_gate_is_asked_once(monkeypatch):
    model = other_model("gate first", count=1)
    opt = sgd(model)
    tool = NALoRA(model, opt)
    other_step(model, 0, opt)
    assert tool.ffns[0].output is None  # it is not kept
    monkeypatch.setattr(families.FFN, "find_rows", None)
    other_step(model, 1, opt)
    assert tool.ffns[0].output is None and tool.steps == 2

def test_a_fused_layer_may_leave_its_activation_out_in_a_pass():
    model = other_model("gate first", count=1)
    opt = sgd(model)
    tool = NALoRA(model, opt, NALoRAConfig(stride=1))
    model.layers[0].gate_up_proj(torch.randn(1, 3, 8))  # and then, say, no memory
    other_step(model, 0, opt)
    model.layers[0].gate_up_proj(torch.randn(2, 5, 8)).sum().backward()
    model.forward(torch.randn(2, 5, 8)).sum().backward()
    assert tokens_of(tool) == [10]
    opt.step()
    assert tool.steps == 2 and torch.equal(tool.ffns[0].rows, torch.arange(12))

def test_a_fused_layer_whose_parts_are_mixed_is_refused():
    model = other_model("gate first")
    for layer in model.layers:
        layer.forward = lambda x, self=layer: (
            x + self.down_proj(self.act_fn(sum(self.gate_up_proj(x).chunk(2, -1)))))
    NALoRA(model, sgd(model))
    with pytest.raises(ValueError, match="does not see the output of the layer"):
        other_step(model, 0)

def test_the_rows_of_a_fused_layer_cannot_be_seen_from_an_activation_that_is_told():
    model = other_model("gate first", count=1)
    del model.layers[0].act_fn
    with pytest.raises(ValueError, match="its activation is no module of its own"):
        NALoRA(model, sgd(model), act=nn.SiLU())

def test_how_wide_a_gate_is():
    model = lora_llama(intermediate_size=64)  # twice the hidden size: no fused layer
    assert all(len(s["mask"]) == 64 for s in NALoRA(model, sgd(model)).statistics().values())
    ffn = OtherFFN("gate first")
    ffn.gate_up_proj = LoRALinear(nn.Linear(24, 24), 4, 8)
    ffn.down_proj = nn.Linear(12, 24)
    assert families.gate_width(ffn, ffn.gate_up_proj) == 12
    ffn.gate_up_proj = LoRALinear(nn.Linear(8, 25), 4, 8)  # an odd number is no gate and features
    assert families.gate_width(ffn, ffn.gate_up_proj) == 25

# ---- which parameters and FFNs, under which names ------------------------------------------------
class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, z):
        return F.silu(self.scale * z)

@pytest.mark.parametrize("acts, groups", [((Scaled(1.0), Scaled(2.0)), 2),
                                          ((nn.LeakyReLU(0.1), nn.LeakyReLU(0.1)), 1),
                                          ((nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)), 2)])
def test_activations_stand_in_one_group_if_they_are_alike(acts, groups):
    model = other_model()
    model.layers[0].act_fn, model.layers[1].act_fn = acts
    for _ in range(2):  # the second time they carry the hooks of the first
        tool = NALoRA(model, sgd(model))
        assert len(tool.groups) == groups
        assert [ffn.group.ffns[ffn.index] for ffn in tool.ffns] == tool.ffns

def test_ffns_of_other_width_or_dtype_are_kept_apart():
    torch.manual_seed(0)
    model = nn.Module()
    model.fused, model.plain = OtherFFN("gate first"), OtherFFN()
    model.plain.gate_proj, model.plain.up_proj = nn.Linear(8, 24), nn.Linear(8, 24)
    model.plain.down_proj = nn.Linear(24, 8)
    inject_lora(model, ["gate_proj", "gate_up_proj"], 4, 8)
    assert [len(s["mask"]) for s in NALoRA(model, sgd(model)).statistics().values()] == [12, 24]
    model = lora_llama()
    lora_layers(model)["model.layers.1.mlp.gate_proj"].double()
    dtypes = [s["importance"].dtype for s in NALoRA(model, sgd(model)).statistics().values()]
    assert dtypes == [torch.float32, torch.float64]

def test_a_layer_inside_another_is_not_the_ffns():
    model = other_model()
    model.layers[0].inner = nn.Sequential(LoRALinear(nn.Linear(12, 8), 2, 4))
    opt = sgd(model)
    tool = NALoRA(model, opt)
    assert len(tool.steered[opt]) == 12 and "plain LoRA on 1 0" in str(tool)

def test_pairs_are_those_of_adapters_that_the_layer_has():
    A, B = torch.zeros(2, 4), torch.zeros(4, 2)
    names = ["a", "of other layers"]
    layer = SimpleNamespace(lora_A={"a": A}, lora_B={"a": B}, active_adapters=names)
    assert len(families.lora_pairs(layer)) == 1 and families.active_adapters(layer) == ["a"]

def compiled_ffns(model):
    for layer in model.model.layers:
        layer.mlp = torch.compile(layer.mlp, backend="eager")
    return model

def checkpoints(model):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    checkpoint_wrapper.apply_activation_checkpointing(
        model, check_fn=lambda m: type(m).__name__ in ("Block", "LoRALinear"))
    return model

def parallel_ffn(model):
    model.model.layers[1].mlp = nn.DataParallel(model.model.layers[1].mlp)
    return model

def compiled_parallel(model):
    return torch.compile(nn.DataParallel(model), backend="eager")

@pytest.mark.parametrize("wrap", [compiled_ffns, checkpoints, parallel_ffn, nn.DataParallel,
                                  compiled_parallel])
def test_a_run_goes_on_under_the_same_names_in_any_wrapper(wrap):
    model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25))
    take_step(model, opt, 0)
    again, new, _ = start(None)
    again.load_state_dict(model.state_dict())
    new.load_state_dict(copy.deepcopy(opt.state_dict()))
    wrapped = wrap(again)
    other = NALoRA(wrapped, new, NALoRAConfig(stride=1, keep=0.25))
    other.load_state_dict(tool.state_dict())
    take_step(model, opt, 1)
    take_step(wrapped, new, 1)
    assert other.steps == 2 and equal(state_of(tool), state_of(other))
    for p, q in zip(snapshot(model).values(), snapshot(wrapped).values(), strict=True):
        assert torch.equal(p, q)
    assert len(lora_parameters(wrapped)) == 12
    torch.testing.assert_close(wrapped(*batch(2))[1], model(*batch(2))[1])
