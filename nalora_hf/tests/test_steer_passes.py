"""Which passes count: those computed in train mode, with gradients, once each."""
import math
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from nalora import NALoRAConfig
from nalora_hf import NALoRA, lora_parameters
from nalora_hf.tests.helpers import (FFN, batch, ends_alike, equal, family, in_blocks, other_model,
                                     sgd, snapshot, start, state_of, take_step)

def tokens_of(tool):
    """How many tokens of each FFN were observed since the last step."""
    tool.add_up()
    return [n for group in tool.groups for n in group.sums.tokens.tolist()]

# ---- what counts ---------------------------------------------------------------------------------
class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("out of memory")

@pytest.mark.parametrize("kind", ["zero_grad", "zeros in place", "no backward", "times 0",
                                  "GradScaler", "an error in backward", "an error in the step"])
def test_a_pass_counts_when_it_is_computed(kind):
    """Whatever becomes of its gradients: the next step is decided as if it was a microbatch."""
    def run(thrown):
        model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25))
        take_step(model, opt, 7)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=kind == "GradScaler")
        handle = (model.model.norm.register_forward_hook(lambda m, i, x: Fails.apply(x))
                  if kind == "an error in backward" and thrown else None)
        loss = model(*batch(5))[1]
        if handle is not None:
            handle.remove()
            with pytest.raises(RuntimeError, match="out of memory"):
                loss.backward()
        elif thrown and kind == "GradScaler":
            scaler.scale(loss * math.inf).backward()
            scaler.step(opt), scaler.update()  # skips
        elif thrown and kind == "an error in the step":
            loss.backward()
            handle = opt.register_step_pre_hook(lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                opt.step()
            handle.remove()
        elif kind != "no backward":
            (loss * (0 if kind == "times 0" else 1)).backward()
        opt.zero_grad(set_to_none=kind != "zeros in place")
        assert tokens_of(tool) == [60, 60] and tool.steps == 1
        take_step(model, opt, 0)
        assert tokens_of(tool) == [0, 0] and tool.steps == 2
        return model, opt, tool

    ends_alike(run)

@pytest.mark.parametrize("kind", ["no gradients", "inference mode", "evaluation", "generation",
                                  "a pass that failed before", "frozen"])
def test_other_passes_leave_no_trace(kind):
    def run(between):
        model, opt, tool = start(NALoRAConfig(stride=3))
        for i in range(3):
            if between and kind == "evaluation":
                model.eval()(*batch(9))
            elif between and kind == "generation":
                model.generate(batch(9)[0], 3, stop=-1)
            elif between and kind == "a pass that failed before":
                model.model.layers[1].mlp.gate_proj(torch.randn(2, 5, 32))
            elif between and kind == "frozen":
                parameters = lora_parameters(model)
                model.requires_grad_(False)
                model(*batch(9))
                for p in parameters:
                    p.requires_grad_()
            elif between:
                with torch.no_grad() if kind == "no gradients" else torch.inference_mode():
                    model(*batch(9, (2, 6)))
            model.train()
            loss = model(*batch(i))[1]
            if between and kind == "no gradients":  # also between a pass and its backward
                with torch.no_grad():
                    model(*batch(9))
            loss.backward()
            opt.step(), opt.zero_grad()
        return model, opt, tool

    ends_alike(run)

def test_a_part_called_by_itself_counts():
    model, opt, tool = start(NALoRAConfig(stride=1))
    with torch.no_grad(), pytest.raises(IndexError):
        model(batch(0)[0] + 61)  # no such token
    model.model.layers[0].mlp(torch.randn(2, 5, 32))
    assert tokens_of(tool) == [10, 0]

@pytest.mark.parametrize("evaluates", [False, True])
def test_steps_without_a_pass_change_nothing_and_say_so_once(evaluates):
    model, opt, tool = start(NALoRAConfig(keep=0.25))
    take_step(model, opt, 0)
    before = state_of(tool)
    model.train(not evaluates)
    with pytest.warns(UserWarning) as said:
        for i in range(3):
            take_step(model, opt, 1) if evaluates else opt.step()
    assert [str(w.message)[:41] for w in said] == ["NALoRA saw no pass before this step: is t"]
    assert equal(before, state_of(tool)) and tool.steps == 1

@pytest.mark.parametrize("spoil", ["padding", "overflow", "overflow in float16"])
def test_useless_statistics_change_nothing(spoil):
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    before = tool.state_dict()["ffns"]
    if spoil == "padding":
        tool.token_mask = torch.zeros(4, 15)
    else:
        weight = model.model.layers[1].mlp.gate_proj.base_layer.weight
        weight.data[0] *= math.inf if spoil == "overflow" else 1e6
    with torch.autocast("cpu", torch.float16, enabled="float16" in spoil):
        model(*batch(1))[1].backward()
    opt.zero_grad()
    opt.step()
    assert tool.steps == 2
    for name, s in tool.state_dict()["ffns"].items():
        assert equal(before[name], s) == (spoil == "padding" or "layers.1" in name)

# ---- by other ways -------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["functional_call", "func.grad", "vmap", "vmap of func.grad"])
def test_passes_under_torch_func_work_and_do_not_count(kind):
    """functional_call alone is an ordinary pass."""
    def run(steers):
        model, opt, tool = start(NALoRAConfig(stride=1) if steers else None)
        trains = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def loss(parameters, tokens):
            logits, _ = functional_call(model, parameters, (tokens[None],))
            return F.cross_entropy(logits[0, :-1], tokens[1:])

        def mean(parameters):
            return sum(loss(parameters, row) for row in batch(0)[0]) / 4

        detached = {n: p.detach() for n, p in trains.items()}
        with sdpa_kernel(SDPBackend.MATH):
            if kind == "functional_call":
                mean(trains).backward()
            elif kind == "vmap":
                vmap(loss, (None, 0))(trains, batch(0)[0]).mean().backward()
            else:
                of_each = (grad(mean)(detached) if kind == "func.grad" else
                           {n: g.mean(0) for n, g in
                            vmap(grad(loss), (None, 0))(detached, batch(0)[0]).items()})
                for name, p in trains.items():
                    p.grad = of_each[name]
        if steers:
            counted = kind == "functional_call"
            assert tokens_of(tool) == ([60, 60] if counted else [0, 0])
        return {n: p.grad for n, p in trains.items()}

    with_it, without = run(True), run(False)
    assert equal(with_it, without)

def test_what_torch_func_computes_is_named_where_no_other_pass_was():
    model, opt, tool = start(NALoRAConfig())
    for p in lora_parameters(model):
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match="Passes under torch.func are not counted"):
        opt.step()

def test_gradients_may_be_kept_elsewhere():
    """As of microbatches that are added up in buffers of one's own."""
    def run(elsewhere):
        model, opt, tool = start(NALoRAConfig(stride=1))
        kept = {p: torch.zeros_like(p) for p in lora_parameters(model)}

        def take(p):
            kept[p] += p.grad
            p.grad = None

        handles = [p.register_post_accumulate_grad_hook(take) for p in kept if elsewhere]
        for row, targets in zip(*batch(0)):
            (model(row[None], targets[None])[1] / 4).backward()
        for p in kept if elsewhere else ():
            p.grad = kept[p]
        opt.step()
        assert len(handles) == len(kept) * elsewhere
        return model, opt, tool

    ends_alike(run)

def test_an_ffn_that_a_step_leaves_out_keeps_its_state_and_is_no_reason_to_warn():
    model = nn.Module()
    model.text, model.vision = other_model().layers, other_model(act=nn.GELU()).layers
    opt = sgd(model)
    tool = NALoRA(model.train(), opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for evaluated in (False, True):
            if evaluated:
                model.vision[0](torch.randn(2, 5, 8))
            model.text[0](torch.randn(2, 5, 8)).sum().backward()
            opt.step()
    seen = {name: math.isfinite(s["k_hat"]) for name, s in tool.statistics().items()}
    assert seen == {"text.0": True, "text.1": False, "vision.0": True, "vision.1": False}

@pytest.mark.parametrize("names, seen", [("text vision", [5, 0, 18, 0]), ("decoder", [5, 0]),
                                         ("", [5, 0])])
def test_a_token_mask_is_of_one_tower(names, seen):
    """Such as OPT's, whose layers are called decoder.layers; or layers that are the whole model."""
    model = nn.Module()
    for name in names.split():
        model.add_module(name, in_blocks(other_model().layers))
    model = model.train() if names else in_blocks(other_model().layers)
    tool = NALoRA(model, sgd(model), NALoRAConfig(stride=1))
    tool.token_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    towers = list(model.children()) if names else [model]
    towers[0][0].mlp(torch.randn(2, 5, 8))
    if len(towers) > 1:
        towers[1][0].mlp(torch.randn(2, 9, 8))
    else:
        with pytest.raises(ValueError, match=r"token_mask is \(2, 5\)"):
            towers[0][0].mlp(torch.randn(2, 9, 8))
    assert tokens_of(tool) == seen

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

def test_interop_two_adapters_of_peft_are_steered_in_turn():
    """Each by its own NALoRA, which sees the passes of its adapter alone."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=FFN)
    model = peft.get_peft_model(family("Llama"), settings, adapter_name="A")
    model.add_adapter("B", settings)
    model.get_input_embeddings().requires_grad_()  # so that a pass without adapters trains, too
    tools = {}
    for name in "AB":
        model.set_adapter(name)
        own = [p for n, p in model.named_parameters() if f".{name}." in n]
        opt = torch.optim.AdamW(own, lr=1e-2)
        tools[name] = opt, NALoRA(model.train(), opt, NALoRAConfig(stride=1, keep=0.25))
    for i, name in enumerate("ABBABA"):
        model.set_adapter(name)
        opt, tool = tools[name]
        before = snapshot(model)
        with model.disable_adapter():  # as for a reference model
            model(input_ids=batch(9)[0])
        assert tokens_of(tool) == [0, 0]
        model(input_ids=batch(i)[0], labels=batch(i)[0]).loss.backward()
        assert tokens_of(tool) == [60, 60]
        assert all(tokens_of(other) == [0, 0] for _, other in tools.values() if other is not tool)
        opt.step(), opt.zero_grad()
        for ffn in tool.ffns:
            (old,) = [before[n] for n, p in model.named_parameters() if p is ffn.B_gate]
            moved = (ffn.B_gate != old).any(1)
            assert torch.equal(moved, ffn.state.mask) and moved.sum() == 12
    assert [tool.steps for _, tool in tools.values()] == [3, 3]
