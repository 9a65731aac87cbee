"""Small promises of NALoRA's wiring, each of which a mutant once broke with no test failing."""
import copy
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import nalora_hf
from nalora import LoRALinear, NALoRAConfig
from nalora_hf import (NALoRA, adapters, families, inject_lora, load_adapter, lora_parameters,
                       save_adapter, steer)
from nalora_hf.tests.helpers import (FFN, OtherFFN, batch, ends_alike, equal, lora_llama,
                                     other_model, other_step, sgd, small_llama, start, state_of,
                                     take_step, trained_lora)

# ---- what is seen and summed ----
def test_a_token_mask_says_yes_or_no():
    def run(three):
        model, opt, tool = start(NALoRAConfig(stride=1))
        tool.token_mask = (3 if three else 1) * (torch.arange(15).expand(4, 15) < 9)
        take_step(model, opt, 0)
        return model, opt, tool

    ends_alike(run)

def test_a_token_mask_of_another_order_is_refused():
    model, opt, tool = start(NALoRAConfig())
    tool.token_mask = torch.ones(15, 4)
    with pytest.raises(ValueError, match=r"token_mask is \(15, 4\)"):
        model(*batch(0))

def test_whether_a_token_mask_fits_is_asked_at_each_step():
    model = nn.Module()
    model.text, model.vision = other_model().layers, other_model(count=1, act=nn.GELU()).layers
    opt = sgd(model)
    tool = NALoRA(model.train(), opt)
    tool.token_mask = torch.ones(2, 5)

    def step(*shape):
        model.text[1](model.text[0](torch.randn(shape))).sum().backward()
        model.vision[0](torch.randn(9, 8)).sum().backward()
        opt.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(2, 5, 8)
    with pytest.warns(UserWarning, match="token_mask fits no FFN"):
        step(2, 4, 8)

def test_samples_do_not_keep_the_memory_of_all_tokens():
    model, opt, tool = start(NALoRAConfig())
    model(*batch(0))[1].backward()
    for z, _ in tool._stacks[0].samples.values():
        assert z.untyped_storage().nbytes() == z.numel() * 4

def test_what_others_do_with_saved_tensors_is_not_disturbed():
    packed = []

    def pack(t):
        packed[-1].append(t.shape)
        return t

    for config in (None, NALoRAConfig()):
        model, opt, tool = start(config)
        packed.append([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            for i in range(2):
                model(*batch(i))[1].backward()
    assert packed[0] == packed[1]

def test_hooks_of_the_activation_run_once():
    model = other_model()
    opt = sgd(model)
    NALoRA(model, opt)
    calls = []
    model.layers[0].act_fn.register_forward_hook(lambda *args: calls.append(1))
    other_step(model, 0, opt)
    assert len(calls) == 1

def test_an_activation_may_be_used_twice_or_left_out_in_training():
    def twice(x, self):
        return x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.act_fn(self.up_proj(x)))

    def fused(x, self):  # as a kernel for training alone
        act = F.silu if self.training else self.act_fn
        return x + self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))

    for forward in (twice, fused):
        model = other_model()
        for layer in model.layers:
            layer.forward = lambda x, self=layer, forward=forward: forward(x, self)
        opt = sgd(model)
        tool = NALoRA(model, opt)
        for i in range(2):
            other_step(model, i, opt)
            model.eval().forward(torch.randn(2, 5, 8))
            model.train()
        assert math.isfinite(tool.statistics()["layers.1"]["k_hat"])

def test_a_pass_of_the_base_model_is_not_observed():
    model, opt, tool = start(NALoRAConfig())
    model.model.layers[0].mlp.gate_proj.disable_adapters = True
    model(*batch(0))
    assert not tool._stacks[0].seen[0] and tool._stacks[0].seen[1] == 1

def test_what_a_closure_computes_adds_up(monkeypatch):
    model, opt, tool = start(NALoRAConfig(stride=1), optimizer=torch.optim.LBFGS, lr=1e-3,
                             max_iter=3)
    passes = []
    tokens = []
    monkeypatch.setattr(
        steer, "sum_over_ranks", lambda stacks: tokens.append(stacks[0].sums.tokens.tolist()))

    def closure():
        passes.append(1)
        opt.zero_grad()
        loss = model(*batch(0))[1]
        loss.backward()
        return loss

    opt.step(closure)
    assert len(passes) > 1 and tokens == [[60.0 * len(passes)] * 2]

# ---- which FFNs, activations and parameters ----
class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, z):
        return F.silu(self.scale * z)

@pytest.mark.parametrize(
    "acts, stacks", [((Scaled(1.0), Scaled(2.0)), 2), ((nn.LeakyReLU(0.1), nn.LeakyReLU(0.1)), 1)])
def test_activations_stand_stacked_if_they_are_alike(acts, stacks):
    model = other_model()
    model.layers[0].act_fn, model.layers[1].act_fn = acts
    for _ in range(2):  # the second time they carry the hooks of the first
        assert len(NALoRA(model, sgd(model))._stacks) == stacks

def test_ffns_of_other_width_or_dtype_are_kept_apart():
    torch.manual_seed(0)
    model = nn.Module()
    model.fused, model.plain = OtherFFN("gate first"), OtherFFN()
    model.plain.gate_proj, model.plain.up_proj = nn.Linear(8, 24), nn.Linear(8, 24)
    model.plain.down_proj = nn.Linear(24, 8)
    inject_lora(model, ["gate_proj", "gate_up_proj"], 4, 8)
    assert [len(s["mask"]) for s in NALoRA(model, sgd(model)).statistics().values()] == [12, 24]
    model = lora_llama()
    nalora_hf.lora_layers(model)["model.layers.1.mlp.gate_proj"].double()
    dtypes = [s["importance"].dtype for s in NALoRA(model, sgd(model)).statistics().values()]
    assert dtypes == [torch.float32, torch.float64]

def test_how_wide_a_gate_is():
    model = lora_llama(intermediate_size=64)  # twice the hidden size: no fused layer
    assert all(len(s["mask"]) == 64 for s in NALoRA(model, sgd(model)).statistics().values())
    ffn = OtherFFN("gate first")
    ffn.gate_up_proj, ffn.down_proj = LoRALinear(nn.Linear(24, 24), 4, 8), nn.Linear(12, 24)
    assert families.channels(ffn, ffn.gate_up_proj) == 12

def test_a_layer_inside_another_is_not_the_ffns():
    model = other_model()
    model.layers[0].inner = nn.Sequential(LoRALinear(nn.Linear(12, 8), 2, 4))
    opt = sgd(model)
    tool = NALoRA(model, opt)
    assert len(tool._steered[opt]) == 12 and "plain LoRA on 1 0" in str(tool)

def test_which_activation_is_an_ffns():
    model = lora_llama()
    act = NALoRA(model, sgd(model), act=F.gelu)._stacks[0].act
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

def test_adapters_that_only_other_layers_have():
    A, B = torch.zeros(2, 4), torch.zeros(4, 2)
    names = ["a", "of other layers"]
    layer = SimpleNamespace(lora_A={"a": A}, lora_B={"a": B}, active_adapters=names)
    assert len(families.lora_pairs(layer)) == 1

@pytest.mark.parametrize("change",
                         [lambda z: torch.cat((z, z), -1)[..., :10], lambda z: z[..., :10]])
def test_an_activation_of_another_width_than_the_gate_is_refused(change):
    model = other_model()
    for layer in model.layers:
        layer.forward = lambda x, self=layer: (
            x + self.down_proj(F.pad(self.act_fn(change(self.gate_proj(x))), (0, 2))))
    NALoRA(model, sgd(model))
    with pytest.raises(ValueError, match="does not see the output of the layer"):
        other_step(model, 0)

def test_a_fused_layer_whose_parts_are_mixed_is_refused():
    model = other_model("gate first")
    for layer in model.layers:
        layer.forward = lambda x, self=layer: (
            x + self.down_proj(self.act_fn(sum(self.gate_up_proj(x).chunk(2, -1)))))
    NALoRA(model, sgd(model))
    with pytest.raises(ValueError, match="does not see the output of the layer"):
        other_step(model, 0)

def test_parameters_without_rows_or_sharded_within_rows_are_refused():
    from torch.distributed.tensor import Shard, distribute_tensor
    model = lora_llama()
    opt = sgd(model)
    for p in lora_parameters(model):
        p.data = p.data[:0]
    with pytest.raises(ValueError, match="use FSDP2's fully_shard"):
        NALoRA(model, opt)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = lora_llama()
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in nalora_hf.lora_layers(model).values():
            layer.lora_A = nn.Parameter(distribute_tensor(layer.lora_A.data, mesh, [Shard(1)]))
        with pytest.raises(ValueError, match="sharded within rows"):
            NALoRA(model, sgd(model))
    finally:
        torch.distributed.destroy_process_group()

# ---- state, taking off, and what is said ----
def test_a_state_dict_is_a_copy():
    model, opt, tool = start(NALoRAConfig())
    first = tool.state_dict()
    take_step(model, opt, 0)
    later = state_of(tool)
    kept = {key: t.clone() for key, t in later.items()}
    tool.load_state_dict(first)
    assert equal(later, kept)
    with pytest.raises(ValueError, match="another model"):
        start(NALoRAConfig(), lora_llama(intermediate_size=40))[2].load_state_dict(first)

def test_an_old_nalora_takes_nothing_from_the_new_one():
    model, opt, tool = start(NALoRAConfig())
    tool.remove()
    other = NALoRA(model, opt)
    tool.remove()
    assert opt.nalora is other
    with pytest.raises(ValueError, match="steered by another"):
        NALoRA(model, opt)

class Asked(nn.Module):
    """A model called as transformers' are."""
    def __init__(self):
        super().__init__()
        self.inner = lora_llama()

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids)

class Wrapped(nn.Module):
    """A model in a wrapper, as PEFT's."""
    def __init__(self):
        super().__init__()
        self.base_model = Asked()

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

@pytest.mark.parametrize("kind", [Asked, Wrapped])
def test_the_callback_sees_masks_of_tokens_alone_and_leaves_nothing(kind):
    pytest.importorskip("transformers")
    model = kind()
    opt = sgd(model)
    callback = nalora_hf.NALoRACallback()
    callback.on_train_begin(None, None, None, model=model, optimizer=opt)
    tokens = batch(0)[0]
    mask = torch.ones_like(tokens)
    wide = torch.ones(4, 1, 15, 15)
    for asked in (model, getattr(model, "base_model", model)):  # also past the wrapper
        for args, kwargs, seen in [((tokens, mask), {}, mask), ((tokens,), {}, None),
                                   ((tokens,), {"attention_mask": wide}, None),
                                   ((tokens,), {"attention_mask": mask}, mask)]:
            asked(*args, **kwargs)
            assert callback.nalora.token_mask is seen
    callback.on_train_end(None, None, None)
    assert not any(m._forward_pre_hooks for m in model.modules()) and not hasattr(opt, "nalora")
    plain = nalora_hf.NALoRACallback(NALoRAConfig(mask="none", scale="none"))
    plain.on_train_begin(None, None, None, model=model, optimizer=opt)
    model(tokens, mask)

def test_what_is_said_once_or_by_one(monkeypatch, capsys):
    model, opt, tool = start(NALoRAConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model).eval()(*batch(0))
    model.model.layers[1].mlp.gate_proj.active_adapters = ["another"]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model(*batch(0))
        model(*batch(1))
    assert len([w for w in found if "Other adapters" in str(w.message)]) == 1
    capsys.readouterr()
    monkeypatch.setattr(steer, "this_rank", lambda: 1)
    start(NALoRAConfig())
    assert capsys.readouterr().out == ""

# ---- adapters ----
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
