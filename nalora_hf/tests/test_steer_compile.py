"""NALoRA under torch.compile: the graph stays whole, compiles once, and chooses the same masks."""
import functools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from nalora import NALoRAConfig
from nalora_hf import NALoRA, lora_parameters, steer
from nalora_hf.tests.helpers import (FFN, batch, family, hf_step, lora_llama, other_model,
                                     other_step, pairs_of, sgd, start, wake)

CONFIG = NALoRAConfig(stride=3, keep=0.25)

@pytest.fixture(autouse=True)
def compiles_anew():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    assert not torch._dynamo.utils.counters["recompile_limit"]
    torch._dynamo.reset()

def masks_of(tool):
    return torch.stack([s["mask"] for s in tool.statistics().values()])

def llama_run(monkeypatch, how, config=CONFIG, layers=12, checkpoints=False, steps=5):
    """([masks of each step], [how many graphs there were after it])."""
    model, opt, tool = start(config, lora_llama(num_hidden_layers=layers))
    compiler = CompileCounterWithBackend("aot_eager")
    blocks = model.model.layers
    for block in blocks if checkpoints else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    called = torch.compile(model, backend=compiler, fullgraph=True) if how == "whole" else model
    for i, block in enumerate(blocks):
        if how == "each block":
            blocks[i] = torch.compile(block, backend=compiler, fullgraph=True)
    masks = []
    graphs = []
    for step in range(steps):
        if step == 3:  # from here on no pass fits into what may be held
            monkeypatch.setattr(steer, "SAMPLES", 3000)
        for i in range(2):
            if tool is not None:
                tool.token_mask = torch.rand(4, 15, generator=torch.manual_seed(i)) < 0.8
            called(*batch(10 * step + i))[1].backward()
            assert tool is None or tool.held <= steer.SAMPLES
        opt.step()
        opt.zero_grad()
        masks.append(None if tool is None else masks_of(tool))
        graphs.append(compiler.frame_count)
    monkeypatch.undo()
    return masks, graphs

@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_whole_model_is_one_graph_that_is_compiled_once(monkeypatch, checkpoints):
    masks, graphs = llama_run(monkeypatch, "whole", layers=4 if checkpoints else 12,
                              checkpoints=checkpoints)
    wanted, _ = llama_run(monkeypatch, None, layers=4 if checkpoints else 12)
    assert graphs == [1] * 5
    assert all(map(torch.equal, masks, wanted)) and not torch.equal(masks[0], masks[-1])

def test_blocks_that_are_compiled_by_themselves_share_their_code(monkeypatch):
    """One for the first, whose input has no gradients, and one for all others, as under LoRA."""
    masks, graphs = llama_run(monkeypatch, "each block")
    wanted, _ = llama_run(monkeypatch, None)
    torch._dynamo.reset()
    _, without = llama_run(monkeypatch, "each block", None, steps=1)
    assert graphs == [2] * 5 and without == [2]
    assert all(map(torch.equal, masks, wanted))

def test_interop_pefts_llama_is_one_graph_too():
    peft = pytest.importorskip("peft")
    found = []
    for compiled in (False, True):
        model = peft.get_peft_model(family("Llama"), peft.LoraConfig(r=4, target_modules=FFN))
        opt = torch.optim.AdamW(wake(pairs_of(model)), lr=1e-2)
        tool = NALoRA(model.train(), opt, CONFIG)
        compiler = CompileCounterWithBackend("aot_eager")
        called = torch.compile(model, backend=compiler, fullgraph=True) if compiled else model
        masks = []
        for step in range(3):
            hf_step(called, opt, step)
            masks.append(masks_of(tool))
        found.append(masks)
    assert all(map(torch.equal, *found)) and compiler.frame_count == 1

def other_run(layout, backend, lengths=(5, 5, 5, 5), **settings):
    """(masks, rows, [graphs after each step]) of FFNs of another kind, over some lengths."""
    model = other_model(layout, **settings)
    opt = sgd(model)
    tool = NALoRA(model, opt, NALoRAConfig(stride=1, keep=0.25))
    compiler = CompileCounterWithBackend(backend or "eager")
    called = torch.compile(model.forward, backend=compiler, fullgraph=True) if backend else model
    graphs = []
    masks = []
    for step, length in enumerate(lengths):
        x = torch.randn(2, length, 8, generator=torch.manual_seed(step))
        called(x).square().mean().mul(1e-3).backward()
        opt.step()
        opt.zero_grad()
        graphs.append(compiler.frame_count)
        masks.append(masks_of(tool))
    return masks, [ffn.rows.tolist() for ffn in tool.ffns], graphs

@pytest.mark.parametrize("layout, act", [("gate last", None), ("in turns", None),
                                         ("apart", F.gelu)])
def test_other_layouts_are_seen_in_a_compiled_pass(layout, act):
    """The first one, too, which tells the rows. A function is seen at the gate."""
    masks, rows, graphs = other_run(layout, "aot_eager", act=act)
    wanted, theirs, _ = other_run(layout, None, act=act)
    assert graphs == [1] * 4 and rows == theirs and all(map(torch.equal, masks, wanted))

def test_lengths_that_change_compile_as_often_as_under_lora():
    lengths = (5, 4, 7, 9, 3)
    masks, _, graphs = other_run("gate last", "aot_eager", lengths)
    wanted, _, _ = other_run("gate last", None, lengths)
    assert graphs == [1, 2, 2, 2, 2] and all(map(torch.equal, masks, wanted))

@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_the_operation():
    masks, _, graphs = other_run("apart", "inductor")
    wanted, _, _ = other_run("apart", None)
    assert graphs == [1] * 4 and all(map(torch.equal, masks, wanted))

def test_evaluation_of_a_compiled_model_leaves_no_trace():
    model = other_model()
    tool = NALoRA(model, sgd(model), CONFIG)
    called = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        called(torch.randn(2, 5, 8))
    model.eval()
    called(torch.randn(2, 5, 8))
    assert not tool.seen
    model.train()
    called(torch.randn(2, 5, 8))
    assert tool.seen

def test_a_nalora_that_comes_after_the_first_compiled_pass_says_so():
    model = other_model()
    opt = sgd(model)
    called = torch.compile(model.forward, backend="eager")
    called(torch.randn(2, 5, 8)).mean().backward()
    tool = NALoRA(model, opt)
    called(torch.randn(2, 5, 8)).mean().backward()
    with pytest.warns(UserWarning, match="was it not compiled before NALoRA was made"):
        opt.step()
    assert tool.steps == 0

def test_an_optimizer_whose_step_is_compiled_is_steered():
    model = other_model()
    opt = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    tool = NALoRA(model, opt, CONFIG)
    step = torch.compile(opt.step, backend="eager")
    for i in range(3):
        before = [ffn.B_gate.detach().clone() for ffn in tool.ffns]
        other_step(model, i)
        step()
        for ffn, old in zip(tool.ffns, before):
            assert torch.equal((ffn.B_gate != old).any(1), ffn.state.mask)
    assert tool.steps == 3
