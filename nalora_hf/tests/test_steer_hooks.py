"""NALoRA's hooks beside those of others, on copies, and where models or adapters change."""
import copy
import gc
import io
import math
import warnings
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from nalora import NALoRAConfig, effective_homogeneity
from nalora_hf import NALoRA, lora_parameters
from nalora_hf.tests.helpers import (batch, ends_alike, equal, lora_llama, other_model, other_step,
                                     sgd, snapshot, start, state_of, take_step)

# ---- hooks of others -----------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["gate_proj", "act_fn", ""])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_hooks_of_others_run_as_often_and_see_the_same(kind, where, checkpoints):
    """Though of a module with full backward hooks torch hands on other tensors than it made."""
    def run(steers):
        model = other_model(change=lambda z: 2 * z)
        seen = []

        def note(module, *found):
            found = [part for parts in found for part in (parts if isinstance(parts, tuple)
                                                          else [parts])]
            seen.append([None if t is None else t.detach().clone() for t in found])

        for layer in model.layers:
            part = layer.get_submodule(where)
            getattr(part, f"register_{kind}_hook")(note)
        opt = sgd(model)
        tool = NALoRA(model, opt, NALoRAConfig(stride=1)) if steers else None
        forward = model.forward
        if checkpoints:
            model.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x,
                                                                        use_reentrant=False)
        other_step(model, 0, opt)
        seen.append(None)  # then the parameters differ
        other_step(model, 1, opt)
        if steers:
            assert tool.steps == 2 and math.isfinite(tool.statistics()["layers.1"]["k_hat"])
        return seen

    with_it, without = run(True), run(False)
    assert len(with_it) == len(without) >= 5
    for one, other in zip(with_it[:with_it.index(None)], without):
        assert len(one) == len(other)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(one, other))

def test_what_others_do_with_saved_tensors_is_not_disturbed():
    packed = []

    def pack(t):
        packed[-1].append(t.shape)
        return t

    for config in (None, NALoRAConfig(stride=1)):
        model, opt, tool = start(config)
        packed.append([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            for i in range(2):
                model(*batch(i))[1].backward()
                if tool is not None:
                    tool.add_up()
    assert packed[0] == packed[1] != []

def test_activations_that_work_in_place_are_observed():
    def run(inplace):
        model = lora_llama()
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.SiLU(inplace=inplace)
        model, opt, tool = start(NALoRAConfig(stride=1), model)
        for i in range(2):
            take_step(model, opt, i)
        return model, opt, tool

    ends_alike(run)

def test_whoever_looks_at_a_gate_by_hand_sees_its_homogeneity_and_changes_nothing():
    def run(looks):
        model = other_model()
        opt = sgd(model)
        tool = NALoRA(model, opt, NALoRAConfig(stride=1))
        if looks:
            ffn = model.layers[0]
            z = ffn.gate_proj(torch.randn(2, 5, 8))  # in train mode, with gradients
            assert effective_homogeneity(ffn.act_fn, z) == effective_homogeneity(F.silu, z)
        other_step(model, 1, opt)
        return model, opt, tool

    ends_alike(run)

def test_a_model_that_is_called_by_keyword_is_seen():
    def run(by_keyword):
        model = other_model()
        for layer in model.layers:
            if by_keyword:  # nn.SiLU calls its argument input
                layer.forward = lambda x, self=layer: x + self.down_proj(
                    self.act_fn(input=self.gate_proj(x)) * self.up_proj(x))
        opt = sgd(model)
        tool = NALoRA(model, opt, NALoRAConfig(stride=1))
        other_step(model, 0, opt)
        assert tool.steps == 1
        return model, opt, tool

    ends_alike(run)

# ---- copies --------------------------------------------------------------------------------------
def test_a_copy_of_a_steered_model_disturbs_nothing_and_says_that_it_is_not_steered():
    ends = []
    for copied in (False, True):
        model, opt, tool = start(NALoRAConfig(stride=1))
        take_step(model, opt, 0)
        if copied:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
                other_opt = torch.optim.AdamW(lora_parameters(other), lr=0.1)
                with warnings.catch_warnings():  # where it does not train
                    warnings.simplefilter("error")
                    other.eval()(*batch(0))
                    with torch.no_grad():
                        other.train()(*batch(0))
                with pytest.warns(UserWarning, match="the copy trains as plain LoRA"):
                    take_step(other, other_opt, 5)
                NALoRA(other, other_opt, NALoRAConfig(stride=1)).load_state_dict(tool.state_dict())
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    take_step(other, other_opt, 6)
        take_step(model, opt, 1)
        ends.append({**snapshot(model), **state_of(tool)})
    assert equal(*ends)

def test_a_copy_of_all_three_trains_as_lora_and_says_so():
    model, opt, tool = start(NALoRAConfig(stride=1))
    take_step(model, opt, 0)
    before = state_of(tool)
    other, other_opt, inert = copy.deepcopy((model, opt, tool))
    plain, plain_opt, _ = start()
    plain.load_state_dict(model.state_dict())
    plain_opt.load_state_dict(opt.state_dict())
    with pytest.warns(UserWarning, match="the copy trains as plain LoRA"):
        take_step(other, other_opt, 7)
    take_step(plain, plain_opt, 7)
    assert equal(snapshot(other), snapshot(plain)) and equal(before, state_of(tool))
    assert tool.steps == 1

# ---- what changes afterwards ---------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_after_nalora_was_made_is_followed(dtype):
    model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25))
    take_step(model, opt, 0)
    model.to(dtype)
    opt.state.clear()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(model, opt, 0)
    for name, s in tool.statistics().items():
        B = f"{name}.gate_proj.lora_B"
        moved = (snapshot(model)[B] != before[B]).any(1)
        assert torch.equal(moved, s["mask"]) and moved.sum() == 12

def test_a_new_nalora_takes_the_place_of_an_old_one():
    """As when a notebook's cell is run again."""
    def run(twice):
        model, opt, tool = start(NALoRAConfig(stride=1))
        if twice:
            take_step(model, opt, 5)
            old = tool
            model.load_state_dict(start()[0].state_dict())
            opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
            tool = NALoRA(model, opt, NALoRAConfig(stride=1))
        for i in range(9):
            take_step(model, opt, i)
        if twice:
            assert old.steps == 1
            old.remove()  # takes nothing from the new one
        take_step(model, opt, 9)
        return model, opt, tool

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends_alike(run)

def test_a_forgotten_nalora_is_freed():
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    held = [weakref.ref(x) for x in (tool, tool.groups[0], opt, lora_parameters(model)[0])]
    del model, opt, tool
    gc.collect()
    assert [x() for x in held] == [None] * 4

@pytest.mark.parametrize("kept", ["model", "optimizer"])
def test_what_was_taken_off_holds_no_nalora(kept):
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    tool.remove()
    rest = model if kept == "model" else opt
    gone = weakref.ref(tool)
    del model, opt, tool
    gc.collect()
    assert rest is not None and gone() is None

def test_who_speaks_on_which_rank(monkeypatch, capsys):
    from nalora_hf import steer
    start(NALoRAConfig())
    assert capsys.readouterr().out == "NALoRA steers 2 of 2 FFNs; plain LoRA on nothing else.\n"
    monkeypatch.setattr(steer, "this_rank", lambda: 1)
    start(NALoRAConfig())
    assert capsys.readouterr().out == ""
