"""Which passes and steps count: thrown away, computed twice, of copies, of other optimizers."""
import copy
import gc
import io
import math
import warnings
import weakref

import pytest
import torch
import torch.nn as nn

from nalora import NALoRAConfig
from nalora_hf import NALoRA, lora_parameters
from nalora_hf.tests.helpers import (batch, checkpointed, ends_alike, equal, lora_llama, snapshot,
                                     start, state_of, take_step)

@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_it_warns_when_the_optimizer_it_was_given_is_not_the_one_that_steps(other, fused):
    model, opt, tool = start(NALoRAConfig())
    other = other(lora_parameters(model), lr=0.1, fused=fused)
    take_step(model, other, 0)
    with pytest.warns(UserWarning, match="Something else moved the LoRA parameters"):
        take_step(model, other, 1)
    model, opt, tool = start(NALoRAConfig())
    for i in range(6):
        take_step(model, opt, i)
    other = type(other)(lora_parameters(model), lr=0.1, fused=fused)
    with pytest.warns(UserWarning, match="Something else moved the LoRA parameters"):
        for i in range(6, 16):
            take_step(model, other, i)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(16, 40):
            take_step(model, opt, i)
        tool.remove()
        take_step(model, other, 40)

def test_a_forgotten_nalora_is_freed():
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    held = [weakref.ref(x) for x in (tool, tool._watch, opt, lora_parameters(model)[0])]
    del model, opt, tool
    gc.collect()
    assert [x() for x in held] == [None] * 4

def test_an_optimizer_that_evaluates_a_closure_is_no_reason_to_warn(recwarn):
    model, opt, tool = start(NALoRAConfig(), optimizer=torch.optim.LBFGS, max_iter=3)

    def closure():
        opt.zero_grad()
        loss = model(*batch(0))[1]
        loss.backward()
        return loss

    opt.step(closure), opt.step(closure)
    assert tool.state_dict()["steps"] == 2
    assert not [w for w in recwarn if "NALoRA" in str(w.message)]

@pytest.mark.parametrize("kind", ["zero_grad", "zeros in place", "GradScaler", "no backward"])
def test_a_pass_whose_gradients_are_thrown_away_leaves_nothing(kind):
    states = []
    for thrown in (False, True):
        model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=kind == "GradScaler")
        take_step(model, opt, 7)
        if thrown:
            loss = model(*batch(5))[1] * (math.inf if kind == "GradScaler" else 1)
            if kind != "no backward":
                scaler.scale(loss).backward()
            if kind == "GradScaler":
                scaler.step(opt)
                scaler.update()
            opt.zero_grad(set_to_none=kind != "zeros in place")
        for microbatch in (0, 1):  # two that count
            scaler.scale(model(*batch(microbatch))[1]).backward()
        scaler.step(opt)
        states.append(state_of(tool))
    assert equal(*states)

@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_sees_the_mask_and_the_tokens_of_its_own_pass(reentrant):
    states = []
    for again in (False, True):
        model = checkpointed(lora_llama(), reentrant) if again else lora_llama()
        model, opt, tool = start(NALoRAConfig(stride=3, keep=0.25), model)
        for step in range(2):
            total = 0
            for i, shape in enumerate(((4, 14), (4, 14))):  # two passes, one backward
                tokens, targets = batch(10 * step + i, shape)
                tool.token_mask = torch.arange(shape[1]) < 6 + i + torch.arange(4)[:, None]
                total = total + model(tokens, targets)[1]
            total.backward()
            opt.step()
            opt.zero_grad()
        states.append(state_of(tool))
    assert all(torch.allclose(states[0][k].float(), states[1][k].float(), rtol=1e-5)
               for k in states[0])
    assert not torch.isnan(states[0]["model.layers.0.mlp/k_hat"])

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
                with pytest.warns(UserWarning, match="the copy trains as plain LoRA"):
                    take_step(other, other_opt, 5)
                NALoRA(other, other_opt, NALoRAConfig(stride=1)).load_state_dict(tool.state_dict())
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    take_step(other, other_opt, 6)
            other, other_opt, inert = copy.deepcopy((model, opt, tool))
            with pytest.warns(UserWarning, match="the copy trains as plain LoRA"):
                take_step(other, other_opt, 7)
        take_step(model, opt, 1)
        ends.append({**snapshot(model), **state_of(tool)})
    assert equal(*ends)

def test_a_cast_after_nalora_was_made_is_followed():
    model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25))
    model.double()
    before = snapshot(model)
    take_step(model, opt, 0)
    for name, s in tool.statistics().items():
        moved = snapshot(model)[f"{name}.gate_proj.lora_B"] != before[f"{name}.gate_proj.lora_B"]
        assert torch.equal(moved.any(1), s["mask"])

@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("shape", [(4, 15), (2, 6)])
def test_a_pass_without_gradients_in_train_mode_leaves_no_trace(reentrant, shape):
    """Such as a reference model's, with another mask and between a pass and its backward."""
    states = []
    for between in (False, True):
        model = lora_llama()
        if reentrant is not None:
            model = checkpointed(model, reentrant)
        model, opt, tool = start(NALoRAConfig(stride=3, keep=0.25), model)
        for step in range(2):
            for microbatch in range(2):
                tokens, targets = batch(10 * step + microbatch)
                tool.token_mask = torch.arange(15) < 6 + torch.arange(4)[:, None]
                loss = model(tokens, targets)[1]
                if between:
                    with torch.no_grad():
                        if shape == tokens.shape:
                            tool.token_mask = torch.ones_like(tokens)
                        model(*batch(99, shape))
                loss.backward()
            opt.step()
            opt.zero_grad()
        states.append({**state_of(tool), **snapshot(model)})
    assert equal(*states)

def test_an_optimizer_that_steps_during_backward_is_noticed():
    model = lora_llama()
    parameters = lora_parameters(model)
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in parameters]
    NALoRA(model, optimizers)
    for p, optimizer in zip(parameters, optimizers):
        p.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())
    model(*batch(0))[1].backward()
    with pytest.warns(UserWarning, match="no backward pass reach a gate before this step"):
        model(*batch(1))[1].backward()

def test_activations_that_work_in_place_are_observed():
    states = []
    for inplace in (False, True):
        model = lora_llama()
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.SiLU(inplace=inplace)
        model, opt, tool = start(NALoRAConfig(stride=1), model)
        for i in range(2):
            take_step(model, opt, i)
        states.append({**state_of(tool), **snapshot(model)})
    assert equal(*states)

def test_passes_that_are_never_trained_on_do_not_count_in_the_next_step():
    def run(extra):
        model, opt, tool = start(NALoRAConfig(stride=7), checkpointed(lora_llama(), True))
        model(*batch(0))[1].backward()
        if extra:
            model(*batch(9))
        opt.step()
        opt.zero_grad()
        take_step(model, opt, 1)
        return model, opt, tool

    ends_alike(run)

def test_tokens_are_numbered_on_after_recomputation():
    def run(again):
        model = checkpointed(lora_llama(), True) if again else lora_llama()
        model, opt, tool = start(NALoRAConfig(stride=7), model)
        (model(*batch(0))[1] + model(*batch(1))[1]).backward()
        take_step(model, opt, 2)
        return model, opt, tool

    ends_alike(run, exactly=False)

@pytest.mark.parametrize("depth", [1, 2])
def test_checkpoints_may_be_nested(depth):
    def run(again):
        model = lora_llama()
        for _ in range(depth * again):
            model = checkpointed(model, True)
        model, opt, tool = start(NALoRAConfig(stride=3), model)
        take_step(model, opt, 0)
        return model, opt, tool

    ends_alike(run, exactly=False)

def test_a_microbatch_whose_gradients_were_clipped_counts():
    def run(clipped):
        model, opt, tool = start(NALoRAConfig(stride=1))
        model(*batch(0))[1].backward()
        if clipped:
            nn.utils.clip_grad_norm_(lora_parameters(model), 1e-3)
        take_step(model, opt, 1)
        return model, opt, tool

    ends_alike(run)

def test_a_microbatch_whose_gradients_are_all_zero_counts():
    def run(weight):
        model, opt, tool = start(NALoRAConfig(stride=1))
        (model(*batch(0))[1] * weight).backward()
        take_step(model, opt, 1)
        return model, opt, tool

    ends_alike(run)

def test_passes_through_an_inner_module_without_gradients_leave_no_trace():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = lora_llama()

        def forward(self, *args):
            return self.base_model(*args)

    def run(generates):
        model, opt, tool = start(NALoRAConfig(stride=3), Wrapper())
        for i in range(3):
            if generates:
                with torch.no_grad():
                    model.base_model(*batch(9, (2, 6)))
            take_step(model, opt, i)
        return model, opt, tool

    ends_alike(run)

@pytest.mark.parametrize("trained", ["both", "the first"])
def test_recomputed_passes_are_recognised_whatever_their_order(trained):
    def run(again):
        model = checkpointed(lora_llama(), True) if again else lora_llama()
        model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25), model)
        losses = []
        for i in range(2):
            tool.token_mask = torch.arange(15).expand(4, 15) < 5 + 6 * i
            losses.append(model(*batch(i))[1])
        for loss in losses[: 2 if trained == "both" else 1]:
            loss.backward()
        opt.step()
        return model, opt, tool

    ends_alike(run, exactly=False)

@pytest.mark.parametrize("where", ["backward", "step"])
def test_an_error_that_is_caught_leaves_nothing(where):
    """As in a loop that goes on after memory did not suffice."""
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("out of memory")

    def run(fails):
        model, opt, tool = start(NALoRAConfig(stride=1))
        take_step(model, opt, 0)
        if fails:
            norm = model.model.layers[1].input_layernorm
            handles = [norm.register_forward_hook(lambda m, i, x: Fails.apply(x))]
            if where == "step":
                handles.pop().remove()
                handles = [opt.register_step_pre_hook(lambda *args: 1 / 0)]
            with pytest.raises((RuntimeError, ZeroDivisionError)):
                take_step(model, opt, 5)
            handles.pop().remove()
            opt.zero_grad()
        take_step(model, opt, 1)
        return model, opt, tool

    ends_alike(run)

def test_a_new_nalora_takes_the_place_of_an_old_one():
    """As when a notebook's cell is run again."""
    def run(twice):
        model, opt, tool = start(NALoRAConfig(stride=1))
        if twice:
            take_step(model, opt, 5)
            model.load_state_dict(start()[0].state_dict())
            opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
            tool = NALoRA(model, opt, NALoRAConfig(stride=1))
        for i in range(9):
            take_step(model, opt, i)
        return model, opt, tool

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends_alike(run)

def test_parameters_that_are_not_a_number_are_not_those_of_another_optimizer():
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    for p in lora_parameters(model):
        p.data.fill_(math.nan)
    tool._watch.note_rows()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(*batch(1))
