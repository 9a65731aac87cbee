"""Whatever else moves the LoRA parameters is noticed at any period; ordinary training is not."""
import math
import warnings

import pytest
import torch

from nalora import NALoRAConfig
from nalora_hf import NALoRA, lora_parameters
from nalora_hf.tests.helpers import batch, lora_llama, snapshot, start, take_step

FOREIGN = "Something else moved the LoRA parameters"

class Lookahead(torch.optim.Optimizer):
    """Every `period` steps of the optimizer within, the average of where it stands and stood."""
    def __init__(self, inner, period, by):
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups
        self.state = inner.state
        self.inner = inner
        self.period = period
        self.by = by
        self.count = 0
        self.slow = [p.detach().clone() for group in inner.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step(closure)
        self.count += 1
        if self.count % self.period == 0:
            parameters = [p for group in self.param_groups for p in group["params"]]
            for p, slow in zip(parameters, self.slow):
                slow.lerp_(p, 0.5)
                if self.by == "data":
                    p.data = slow.clone()
                else:
                    p.copy_(slow)

@pytest.mark.parametrize("by, microbatches", [("data", 1), ("in place", 3)])
@pytest.mark.parametrize("period", [2, 3, 4, 6])
def test_an_optimizer_wrapped_around_afterwards_is_noticed_at_once(by, microbatches, period):
    model, opt, tool = start(NALoRAConfig(stride=1))
    wrapper = Lookahead(opt, period, by)
    told = []
    for i in range(1, 2 * period + 2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for j in range(microbatches):
                model(*batch(10 * i + j))[1].backward()
            wrapper.step()
            wrapper.zero_grad()
        told += [i for w in said if str(w.message).startswith(FOREIGN)]
    assert [*dict.fromkeys(told)] == [period + 1, 2 * period + 1]  # the next step after each move

@pytest.mark.parametrize("by", ["data", "in place"])
@pytest.mark.parametrize("period", [2, 3])
def test_the_same_wrapper_given_to_nalora_is_steered(by, period):
    model, opt, _ = start(weight_decay=0.1)
    wrapper = Lookahead(opt, period, by)
    tool = NALoRA(model, wrapper, NALoRAConfig(stride=1, keep=0.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(3 * period):
            before = snapshot(model)
            take_step(model, wrapper, i)
            for name, s in tool.statistics().items():
                B = f"{name}.gate_proj.lora_B"
                rests = ~s["mask"]
                assert rests.sum() == 36
                assert torch.equal(snapshot(model)[B][rests], before[B][rests])
                assert not torch.equal(snapshot(model)[B], before[B])
    assert tool.steps == 3 * period

@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_another_optimizer_in_its_place_is_noticed(other, fused):
    """From the second pass on, though NALoRA's own steps not at all, or no more."""
    for own_steps in (0, 6):
        model, opt, tool = start(NALoRAConfig())
        for i in range(own_steps):
            take_step(model, opt, i)
        foreign = other(lora_parameters(model), lr=0.1, fused=fused)
        take_step(model, foreign, 6)
        for _ in range(2):
            with pytest.warns(UserWarning, match=FOREIGN):
                for i in range(7, 11):
                    take_step(model, foreign, i)
        with pytest.warns(UserWarning, match=FOREIGN):
            take_step(model, opt, 11)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for i in range(12, 18):
                take_step(model, opt, i)
            tool.remove()
            take_step(model, foreign, 18)
            take_step(model, foreign, 19)

def test_a_step_that_joins_in_a_hook_is_noticed():
    model, opt, tool = start(NALoRAConfig())
    other = torch.optim.SGD(lora_parameters(model), lr=0.1)
    opt.register_step_post_hook(lambda *_: other.step())
    take_step(model, opt, 6)
    with pytest.warns(UserWarning, match=FOREIGN):
        take_step(model, opt, 7)

# ---- no reason to warn ---------------------------------------------------------------------------
def accumulation(model, opt, step):
    for i in range(8):
        (model(*batch(10 * step + i))[1] / 8).backward()
    opt.step()

def grad_scaler(model, opt, step):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = model(*batch(step))[1] * (math.inf if step % 3 == 1 else 1)
    scaler.scale(loss).backward()
    scaler.step(opt), scaler.update()

def closure(model, opt, step):
    def loss_of():
        opt.zero_grad()
        loss = model(*batch(step))[1]
        loss.backward()
        return loss

    opt.step(loss_of)

def averages(model, opt, step):
    """Evaluates at other weights, which are put back."""
    take_step(model, opt, step)
    kept = snapshot(model)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.mul_(0.9)
        model.eval()(*batch(0))
        for name, p in model.train().named_parameters():
            if name in kept:
                p.copy_(kept[name])

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, optimizer, settings", [
    (accumulation, torch.optim.AdamW, {}), (accumulation, torch.optim.SGD, {"fused": True}),
    (grad_scaler, torch.optim.AdamW, {}), (grad_scaler, torch.optim.AdamW, {"fused": True}),
    (closure, torch.optim.LBFGS, {"max_iter": 3, "lr": 1e-2}), (averages, torch.optim.AdamW, {})])
def test_ordinary_training_is_no_reason_to_warn(kind, optimizer, settings, dtype):
    model = lora_llama().to(dtype)
    model, opt, tool = start(NALoRAConfig(), model, optimizer, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*(NALoRA|moved)")
        for step in range(6):
            kind(model, opt, step)
            opt.zero_grad()
    assert tool.steps == (4 if kind is grad_scaler else 6)

@pytest.mark.parametrize("nalora_first", [False, True])
def test_a_checkpoint_that_is_loaded_is_no_reason_to_warn(nalora_first):
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    kept = [part.state_dict() for part in (model, opt, tool)]
    kept[0] = {name: t.clone() for name, t in kept[0].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(3):  # back to it again and again
            take_step(model, opt, 1)
            take_step(model, opt, 2)
            order = (2, 1, 0) if nalora_first else (0, 1, 2)
            for j in order:
                (model, opt, tool)[j].load_state_dict(kept[j])
            assert tool.steps == 1
    take_step(model, opt, 1)
    model.load_state_dict(kept[0])  # alone, it is one
    with pytest.warns(UserWarning, match=FOREIGN):
        take_step(model, opt, 2)

def test_parameters_that_are_not_a_number_are_not_those_of_another():
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    for p in lora_parameters(model):
        p.grad = torch.full_like(p, math.nan)
    model(*batch(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        for i in range(4):
            model(*batch(1))
        opt.step()
    assert lora_parameters(model)[0].isnan().all()
