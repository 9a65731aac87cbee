"""NALoRACallback without a trainer: what it hands on, sees and leaves."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import nalora_hf
from nalora import NALoRAConfig
from nalora_hf.tests.helpers import batch, lora_llama, other_model, sgd

pytest.importorskip("transformers")

def begin(callback, model, opt):
    callback.on_train_begin(None, None, None, model=model, optimizer=opt)
    return callback.nalora

def test_it_hands_on_what_it_was_given():
    model = other_model()
    for layer in model.layers:
        layer.fc1, layer.act_fn = layer.gate_proj, None
        del layer.gate_proj
        layer.forward = lambda x, self=layer: (
            x + self.down_proj(F.silu(self.fc1(x)) * self.up_proj(x)))
    config = NALoRAConfig(keep=0.25)
    callback = nalora_hf.NALoRACallback(config, gate="fc1", act=F.silu)
    assert callback.nalora is None  # before training
    for opt in (sgd(model), sgd(model)):  # the first training was interrupted
        tool = begin(callback, model, opt)
    assert tool.config is config and tool.optimizers == [opt] and tool.ffns[0].phi is F.silu
    assert len(model.layers[0].fc1._forward_hooks) == 1

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
def test_it_sees_masks_of_tokens_alone_and_leaves_nothing(kind):
    model = kind()
    opt = sgd(model)
    callback = nalora_hf.NALoRACallback()
    tool = begin(callback, model, opt)
    tokens = batch(0)[0]
    mask = (torch.arange(15) < 9).expand(4, 15)
    wide = torch.ones(4, 1, 15, 15)
    outermost = getattr(model, "base_model", model)  # of those that name the mask
    for asked in (model, outermost):
        for args, kwargs, seen in [((tokens, mask), {}, True), ((tokens,), {}, False),
                                   ((tokens,), {"attention_mask": mask}, True),
                                   ((tokens,), {"attention_mask": wide}, False)]:
            asked(*args, **kwargs)
            assert torch.equal(tool.token_mask, mask) if seen else tool.token_mask is None
    callback.on_train_end(None, SimpleNamespace(is_world_process_zero=False), None)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks
