"""What NALoRA adds to a step: operations, none that waits for the device, and memory."""
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nalora import NALoRAConfig
from nalora_hf import NALoRA, steer
from nalora_hf.tests.helpers import (batch, lora_llama, other_model, sgd, start, state_of,
                                     take_step)

class Operations(TorchDispatchMode):
    """Counts what torch dispatches; a `_foreach_` call is one."""
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "index" in name and any(getattr(i, "dtype", None) == torch.bool
                                   for arg in args if isinstance(arg, (list, tuple)) for i in arg):
            name += " by a mask"
        self.count[name] += 1
        return function(*args, **(kwargs or {}))

WAITS = ("_local_scalar_dense", "aten.item", "nonzero", "aten.equal", "is_nonzero", "masked_select",
         "unique", "by a mask")  # a GPU's host waits for these

def operations(config, masked=False, reads=False, **settings):
    """Counters of four steps on 12 layers."""
    model, opt, tool = start(config, lora_llama(num_hidden_layers=12), **settings)
    found = []
    for i in range(4):
        if tool is not None and masked:
            tool.token_mask = torch.arange(15).expand(4, 15) < 9
        with Operations() as operations:
            take_step(model, opt, i)
            if reads:
                tool.statistics()
        found.append(operations.count)
    return found

def step_alone(operations, others):
    operations.subtract(others)
    return +operations

@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}])
def test_a_step_has_few_operations_more_than_loras_and_waits_for_none(masked, settings):
    """The first one, too."""
    plain = operations(None, **settings)
    steered = operations(NALoRAConfig(stride=3), masked, **settings)
    for ours, theirs in zip(steered, plain):
        more = step_alone(ours, theirs)
        assert 100 < more.total() <= 150 + 12 * 12
        assert not [name for name in more if any(word in name for word in WAITS)]

def test_what_reads_numbers_does_wait():
    """So that the test above can fail."""
    plain = operations(None)
    for ours, theirs in zip(operations(NALoRAConfig(), reads=True), plain):
        assert step_alone(ours, theirs)["aten._local_scalar_dense.default"] == 12 * 3

def test_microbatches_add_few_operations_until_the_step():
    """A pass alone: per FFN a sample of gates and of the mask, nothing is summed up."""
    counts = []
    for config in (None, NALoRAConfig()):
        model, opt, tool = start(config, lora_llama(num_hidden_layers=12))
        take_step(model, opt, 0)
        model(*batch(1))
        with Operations() as operations:
            model(*batch(2))
        counts.append(operations.count)
    assert step_alone(counts[1], counts[0]).total() <= 12 * 8

def watched(tool):
    """A list that grows by the bytes of samples whenever an FFN was observed."""
    held = []

    def look(*args):
        samples = [z for group in tool.groups for passes in group.samples for z, _ in passes]
        held.append(sum(z.untyped_storage().nbytes() for z in samples))
        assert held[-1] == tool.held

    for ffn in tool.ffns:
        ffn.act.register_forward_hook(look)
    return held

@pytest.mark.parametrize("most", [4000, 12_000, 30_000])
def test_samples_beyond_what_may_be_held_are_summed_up_before(monkeypatch, most):
    """Of 11,520 bytes a pass: a part of one, one, or some passes at a time."""
    ends = []
    for limit in (steer.SAMPLES, most):
        monkeypatch.setattr(steer, "SAMPLES", limit)
        model, opt, tool = start(NALoRAConfig(stride=1, keep=0.25))
        held = watched(tool)
        for step in range(2):
            for i in range(3):
                tool.token_mask = torch.rand(4, 15, generator=torch.manual_seed(i)) < 0.8
                model(*batch(10 * step + i))[1].backward()
            opt.step()
            opt.zero_grad()
            assert tool.held == 0
        assert 0 < max(held) <= limit
        ends.append(state_of(tool))
    assert max(held) > most / 2  # it is made use of
    for name, t in ends[0].items():
        torch.testing.assert_close(t, ends[1][name])

def test_at_most_64_mb_are_held_and_stacked():
    assert 2 * steer.SAMPLES == 64 * 2**20

def test_what_is_observed_is_what_was_sampled_and_no_more(monkeypatch):
    """Of twelve FFNs the three that were sampled, not nine others in zeros."""
    monkeypatch.setattr(steer, "SAMPLES", 40_000)  # three passes of 11,520 bytes
    stacked = []
    ends = []
    for limited in (True, False):
        if not limited:
            monkeypatch.undo()
        model, opt, tool = start(NALoRAConfig(stride=1), lora_llama(num_hidden_layers=12))
        observe = tool.observe
        tool.observe = lambda group, z, weight: (stacked.append(z.nbytes),
                                                 observe(group, z, weight))[1]
        for i in range(2):
            take_step(model, opt, i)
        ends.append(state_of(tool))
        assert max(stacked) <= 40_000 if limited else max(stacked) == 12 * 11_520
    for name, t in ends[0].items():
        torch.testing.assert_close(t, ends[1][name])

def test_samples_do_not_keep_the_memory_of_all_tokens():
    model, opt, tool = start(NALoRAConfig(stride=17))
    held = watched(tool)
    model(*batch(0))
    assert held == [4 * 48 * 4, 2 * 4 * 48 * 4]  # of 60 tokens 4 are observed, in float32

def test_what_was_sampled_before_a_state_is_loaded_is_forgotten():
    model, opt, tool = start(NALoRAConfig(stride=1))
    model(*batch(0))
    tool.load_state_dict(tool.state_dict())
    assert tool.held == 0 and not any(map(any, (group.samples for group in tool.groups)))
    tool.add_up()
    assert tool.groups[0].sums.tokens.tolist() == [0, 0]
    with pytest.warns(UserWarning, match="NALoRA saw no pass before this step"):
        opt.step()
    assert tool.steps == 0

def test_ffns_of_one_width_are_observed_and_decided_in_one_call(monkeypatch):
    calls = []

    def noted(name):
        own = getattr(NALoRA, name)

        def call(self, group, *rest):
            calls.append((name, len(group.ffns)))
            return own(self, group, *rest)

        monkeypatch.setattr(NALoRA, name, call)

    noted("observe")
    noted("decide")
    model = other_model(count=5)
    opt = sgd(model)
    NALoRA(model, opt)
    model(torch.randn(2, 5, 8)).sum().backward()
    opt.step()
    assert calls == [("observe", 5), ("decide", 5)]
