"""NALoRA around the step() of other optimizers: several, nested, wrapped, scaled, with closures."""
import math
import warnings

import pytest
import torch

from nalora import NALoRAConfig
from nalora_hf import NALoRA, lora_parameters
from nalora_hf.tests.helpers import (batch, ends_alike, equal, lora_llama, other_model, other_step,
                                     snapshot, start, state_of, take_step)

@pytest.fixture(autouse=True)
def no_word_of_ours():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*NALoRA")
        yield

def moved_rows(model, before, tool):
    """Asserts that the gates' rows of the masks have moved, and no others."""
    now = snapshot(model)
    for name, s in tool.statistics().items():
        B = f"{name}.gate_proj.lora_B"
        moved = (now[B] != before[B]).any(1)
        assert torch.equal(moved, s["mask"]) and 0 < moved.sum() < len(moved)

@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop,
                                  torch.optim.NAdam, torch.optim.Adafactor, "fused", "foreach"])
def test_rows_of_the_mask_move_and_no_others(kind):
    settings = {kind: True} if isinstance(kind, str) else {}
    model, opt, tool = start(NALoRAConfig(keep=0.25), weight_decay=0.1, **settings, optimizer=(
        torch.optim.AdamW if settings else kind))
    for i in range(3):
        before = snapshot(model)
        take_step(model, opt, i)
        moved_rows(model, before, tool)

# ---- several -------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_several_optimizers_step_as_one(order):
    def run(several):
        model = other_model()
        groups = [lora_parameters(model)[i::3] for i in range(3)]
        opts = [torch.optim.AdamW(group, lr=0.01)
                for group in (groups if several else [sum(groups, [])])]
        tool = NALoRA(model, opts if several else opts[0], NALoRAConfig(stride=1, keep=0.25))
        for i in range(3):
            other_step(model, i, *([opts[j] for j in order] if several else opts))
        assert tool.steps == 3
        return model, opts, tool

    ends_alike(run)
    assert equal(*(snapshot(run(several)[0]) for several in (False, True)))

def test_optimizers_that_step_during_backward_are_steered():
    """One for each parameter, in its hook, as in memory-saving loops."""
    def run(within):
        model, opt, _ = start(None, optimizer=torch.optim.SGD)
        config = NALoRAConfig(stride=1, keep=0.25)
        if not within:
            tool = NALoRA(model, opt, config)
        else:
            optimizers = {p: torch.optim.SGD([p], lr=1e-2) for p in lora_parameters(model)}
            tool = NALoRA(model, list(optimizers.values()), config)

            def step(p):
                optimizers[p].step()
                optimizers[p].zero_grad()

            for p in optimizers:
                p.register_post_accumulate_grad_hook(step)
        for i in range(3):
            before = snapshot(model)
            model(*batch(i))[1].backward()
            if not within:
                opt.step(), opt.zero_grad()
            moved_rows(model, before, tool)
        assert tool.steps == 3
        return model, opt, tool

    ends_alike(run)

# ---- wrapped -------------------------------------------------------------------------------------
class Wrapper(torch.optim.Optimizer):
    """Steps as the optimizer within, which may be called `optimizer`."""
    def __init__(self, inner, name="optimizer", proper=True):
        if proper:
            super().__init__(inner.param_groups, inner.defaults)
        setattr(self, name, inner)
        self.name = name
        self.param_groups = inner.param_groups
        self.defaults = inner.defaults
        self.state = inner.state

    def step(self, closure=None):
        return getattr(self, self.name).step(closure)

@pytest.mark.parametrize("name", ["optimizer", "base_optimizer"])
@pytest.mark.parametrize("given", ["wrapper", "inner"])
def test_an_optimizer_wrapped_around_another_is_steered(name, given):
    def run(wrapped):
        model, opt, _ = start()
        stepped = Wrapper(opt, name) if wrapped else opt
        tool = NALoRA(model, stepped if given == "wrapper" else opt, NALoRAConfig(keep=0.25))
        for i in range(3):
            before = snapshot(model)
            take_step(model, stepped, i)
            moved_rows(model, before, tool)
        return model, opt, tool

    ends_alike(run)

def test_a_step_that_perturbs_and_puts_back_is_steered():
    """As sharpness-aware minimization does: its second pass counts, too."""
    class SAM(Wrapper):
        @torch.no_grad()
        def step(self, closure):
            with torch.enable_grad():
                closure()
            kept = [(p, p.clone()) for group in self.param_groups for p in group["params"]]
            for p, _ in kept:
                p.add_(p.grad, alpha=0.1)
            with torch.enable_grad():
                loss = closure()
            for p, old in kept:
                p.copy_(old)
            self.optimizer.step()
            return loss

    model, opt, _ = start()
    sam = SAM(opt)
    tool = NALoRA(model, sam, NALoRAConfig(stride=1, keep=0.25))
    passes = []

    def closure():
        sam.zero_grad()
        loss = model(*batch(len(passes)))[1]
        loss.backward()
        tool.add_up()
        passes.append(tool.groups[0].sums.tokens.tolist())
        return loss

    for i in range(3):
        before = snapshot(model)
        sam.step(closure)
        moved_rows(model, before, tool)
    assert passes == [[60, 60], [120, 120]] * 3 and tool.steps == 3

def test_what_a_closure_computes_adds_up():
    model, opt, tool = start(NALoRAConfig(stride=1), optimizer=torch.optim.LBFGS, lr=1e-3,
                             max_iter=3)
    tokens = []

    def closure():
        opt.zero_grad()
        loss = model(*batch(0))[1]
        loss.backward()
        tool.add_up()
        tokens.append(tool.groups[0].sums.tokens.tolist())
        return loss

    for _ in range(2):
        opt.step(closure)
    half = len(tokens) // 2
    assert tokens == [[60 * (i + 1)] * 2 for i in range(half)] * 2 and half > 1 and tool.steps == 2

# ---- nested --------------------------------------------------------------------------------------
@torch.no_grad()
def shrink(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.mul_(0.999)

def nested(depth, fails=()):
    """An AdamW whose step() shrinks the parameters and calls its parent's, which does so, too."""
    kind = torch.optim.AdamW
    for level in range(depth):
        class Child(kind):
            def step(self, closure=None, kind=kind, level=level):
                shrink(self)
                loss = kind.step(self, closure)
                if level in fails:
                    fails.remove(level)
                    raise ArithmeticError(level)
                return loss

        kind = Child
    return kind

class Shrinks(Wrapper):
    """Does the same in one step()."""
    def step(self, closure=None):
        for _ in range(self.depth):
            shrink(self)
        return self.optimizer.step(closure)

@pytest.mark.parametrize("hooked", [(), (0,), (0, 1), (0, 1, 2), (2, 0)])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_step_within_a_step_of_the_same_counts_once(depth, hooked):
    """torch's hooks stand around step() of each class of which an optimizer was made."""
    def run(deep):
        kind = nested(depth) if deep else torch.optim.AdamW
        parents = [k for k in kind.__mro__ if issubclass(k, torch.optim.AdamW)][::-1]
        for i in hooked if deep else ():
            parents[min(i, depth - 1)]([torch.nn.Parameter(torch.zeros(1))])
        model, opt, _ = start(None, optimizer=kind)
        if not deep:
            opt = Shrinks(opt)
            opt.depth = depth
        tool = NALoRA(model, opt, NALoRAConfig(stride=1, keep=0.25))
        for i in range(3):
            before = snapshot(model)
            take_step(model, opt, i)
            moved_rows(model, before, tool)
        assert tool.steps == 3
        return model, opt, tool

    ends_alike(run)
    assert equal(*(snapshot(run(deep)[0]) for deep in (False, True)))

@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_error_within_a_nested_step_does_not_last(level):
    kind = nested(3, [level])
    for parent in kind.__mro__[:4]:
        parent([torch.nn.Parameter(torch.zeros(1))])
    model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25), optimizer=kind)
    with pytest.raises(ArithmeticError):
        take_step(model, opt, 0)
    opt.zero_grad()
    with pytest.warns(UserWarning, match="Something else moved"):  # before the error
        take_step(model, opt, 1)
    for i in range(2, 6):
        before = snapshot(model)
        take_step(model, opt, i)
        moved_rows(model, before, tool)
    assert tool.steps == 5

# ---- refused -------------------------------------------------------------------------------------
def test_optimizers_that_cannot_be_hooked_or_average_are_refused():
    class ScheduleFree(torch.optim.SGD):
        def eval(self):
            pass

    class Bare:
        """As DeepSpeed's and apex' are."""
        def __init__(self, inner):
            self.optimizer = inner
            self.param_groups = inner.param_groups

    class Adopts(torch.optim.Optimizer):
        """Takes over all that another has, its dictionaries of hooks, too."""
        def __init__(self, inner):
            self.__dict__.update(inner.__dict__)

        def step(self, closure=None):
            pass

    model, opt, _ = start()
    for wrong in (Bare(opt), Wrapper(opt, proper=False), Adopts(opt), [opt, Bare(opt)]):
        kind = type(wrong[1] if isinstance(wrong, list) else wrong).__name__
        with pytest.raises(ValueError, match=f"which {kind} is not, or it skips"):
            NALoRA(model, wrong)
    with pytest.raises(ValueError, match="ScheduleFree evaluates at averages of its own"):
        NALoRA(model, ScheduleFree(lora_parameters(model), lr=0.1))
    assert not opt._optimizer_step_pre_hooks
    assert not any(m._forward_pre_hooks for m in model.modules())

def test_interop_accelerates_optimizer_is_the_one_within():
    accelerate = pytest.importorskip("accelerate")
    model, opt, _ = start()
    wrapped = accelerate.Accelerator(cpu=True).prepare(opt)
    tool = NALoRA(model, wrapped)
    take_step(model, wrapped, 0)
    assert tool.optimizers == [opt] and tool.steps == 1

# ---- scaled --------------------------------------------------------------------------------------
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_a_step_skipped_by_grad_scaler_is_none_and_its_passes_count_in_the_next(fused, several):
    def run(scaled):
        model, opt, _ = start(None, fused=fused)
        opts = [opt]
        if several:
            opts = [torch.optim.AdamW(lora_parameters(model)[i::2], lr=1e-2, fused=fused)
                    for i in (0, 1)]
        tool = NALoRA(model, opts, NALoRAConfig(stride=1, keep=0.25))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        for i, overflow in enumerate((False, True, False)):
            before = {**snapshot(model), **state_of(tool)}
            loss = model(*batch(i))[1]
            if scaled or not overflow:
                scaler.scale(loss * (math.inf if overflow else 1)).backward()
                for o in opts:
                    scaler.step(o)
                scaler.update()
            for o in opts:
                o.zero_grad()
            assert equal(before, {**snapshot(model), **state_of(tool)}) == overflow
        assert tool.steps == 2
        return model, opts, tool

    ends_alike(run, exactly=False)

def test_groups_without_a_rate_and_frozen_pairs_are_no_reason_to_warn():
    model = lora_llama()
    for A in lora_parameters(model)[::2]:
        A.requires_grad_(False)
    opt = torch.optim.AdamW(lora_parameters(model)[1::2], lr=0.0)
    tool = NALoRA(model, opt)
    assert len(tool.steered[opt]) == 6 and tool.steered[opt][0][0] is tool.ffns[0].B_gate
    opt.step()  # such as the first of a warm-up, to fill the moments
    assert tool.steps == 0
    opt.param_groups[0]["lr"] = 0.1
    before = snapshot(model)
    take_step(model, opt, 0)
    moved_rows(model, before, tool)
