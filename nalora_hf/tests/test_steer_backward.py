"""Passes that run within a backward: a checkpoint's, which count once, and gradient caching's."""
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nalora import NALoRAConfig
from nalora_hf import NALoRA
from nalora_hf.tests.helpers import (batch, checkpointed, ends_alike, lora_llama, other_model, sgd,
                                     start, take_step)

def masks(*lengths, width=15):
    return [(torch.arange(width) < n).expand(4, width) for n in lengths]

@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward", ["one", "one each", "the first alone"])
def test_a_checkpoint_counts_a_pass_once_with_its_mask(reentrant, backward):
    """Though the next mask was set before its backward. Of a reentrant one backward counts."""
    def run(again):
        model = checkpointed(lora_llama(), reentrant) if again else lora_llama()
        model, opt, tool = start(NALoRAConfig(stride=3, keep=0.25), model)
        for step in range(2):
            real = masks(7, 11)
            if backward != "one each" and reentrant:
                real[1] = real[0]  # else it warns: see below
            total = 0
            for i in range(1 if reentrant and backward == "the first alone" and not again else 2):
                tool.token_mask = real[i]
                loss = model(*batch(10 * step + i))[1]
                tool.token_mask = real[0] if reentrant else None
                if backward == "one each":
                    loss.backward()
                elif i == 0 or backward == "one":
                    total = total + loss
            if backward != "one each":
                total.backward()
            opt.step(), opt.zero_grad()
        return model, opt, tool

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends_alike(run, exactly=False)

def test_reentrant_checkpoints_that_tell_masks_not_apart_say_so():
    model, opt, tool = start(NALoRAConfig(stride=1), checkpointed(lora_llama(), True))
    losses = []
    for i in range(2):
        tool.token_mask, = masks(5 + i)
        losses.append(model(*batch(i))[1])
    with pytest.warns(UserWarning, match="use_reentrant=False does"):
        sum(losses).backward()

@pytest.mark.parametrize("kind", ["evaluation", "without gradients"])
def test_a_pass_between_another_and_its_backward_leaves_its_mask_alone(kind):
    """Of a reentrant checkpoint: an evaluation, or one in train mode that has another length."""
    def run(between):
        model, opt, tool = start(NALoRAConfig(stride=3), checkpointed(lora_llama(), True))
        for i in range(2):
            tool.token_mask, = masks(7 + i)
            loss = model(*batch(i))[1]
            if between:
                width = 15 if kind == "evaluation" else 6
                tool.token_mask, = masks(4, width=width)
                with torch.no_grad():
                    model.train(kind != "evaluation")(*batch(9, (4, width)))
                model.train()
            loss.backward()
            opt.step(), opt.zero_grad()
        return model, opt, tool

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Several passes")
        ends_alike(run)

@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_masks_of_other_lengths_are_told_apart(order):
    def run(again):
        model = checkpointed(lora_llama(), True) if again else lora_llama()
        model, opt, tool = start(NALoRAConfig(stride=3), model)
        losses = []
        for i, width in enumerate((9, 14)):
            tool.token_mask, = masks(5 + i, width=width)
            losses.append(model(*batch(i, (4, width)))[1])
        for i in order:
            losses[i].backward()
        opt.step()
        return model, opt, tool

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends_alike(run, exactly=False)

@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layout", ["apart", "gate last"])
def test_checkpoints_around_other_ffns_count_once(layout, reentrant):
    """Of gates that are changed, and of fused ones, whose rows are found in backward then."""
    def run(again):
        model = other_model(layout, change=lambda z: 2 * z)
        for layer in model.layers if again else ():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=reentrant)
        opt = sgd(model)
        tool = NALoRA(model, opt, NALoRAConfig(stride=3))
        torch.manual_seed(1)
        inputs = [torch.randn(2, n, 8, requires_grad=True) for n in (5, 4, 5)]
        losses = [model(x).sum() for i, x in enumerate(inputs)
                  if again or not reentrant or i != 1]  # it is never trained on
        losses[-1].backward()
        losses[0].backward()
        opt.step()
        assert layout == "apart" or tool.ffns[0].rows[0] == 12
        return model, opt, tool

    ends_alike(run, exactly=False)

@pytest.mark.parametrize("depth", [1, 2, 3])
def test_checkpoints_may_be_nested(depth):
    def run(again):
        model = lora_llama()
        for _ in range(depth * again):
            model = checkpointed(model, True)
        model, opt, tool = start(NALoRAConfig(stride=3), model)
        take_step(model, opt, 0)
        return model, opt, tool

    ends_alike(run, exactly=False)

@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_may_be_switched_on_later(reentrant):
    def run(again):
        model, opt, tool = start(NALoRAConfig(stride=3))
        take_step(model, opt, 0)
        if again:
            checkpointed(model, reentrant)
        for i in (1, 2):
            take_step(model, opt, i)
        assert tool.steps == 3
        return model, opt, tool

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends_alike(run, exactly=False)

@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_passes_inside_another_backward_count(masked, reentrant):
    """As with gradient caching: embeddings without gradients, a loss of them, and each part again
    within that loss's backward, also under checkpointing."""
    def run(cached):
        model = lora_llama()
        if cached and reentrant is not None:
            model = checkpointed(model, reentrant)
        model, opt, tool = start(NALoRAConfig(stride=1), model)
        parts = batch(0)[0].split(2)
        real = [mask[:2] for mask in masks(9, 13)] if masked else [None, None]

        def embedding(i):
            tool.token_mask = real[i]
            return model(parts[i])[0].mean(1)

        def loss_of(embeddings):
            both = torch.cat(embeddings)
            return F.cross_entropy(both @ both.T, torch.arange(4))

        for _ in range(2):
            if cached:
                with torch.no_grad():
                    found = [embedding(0), embedding(1)]
                found = [e.requires_grad_() for e in found]
                loss = loss_of(found)
                loss.backward()
                loss = loss.detach().requires_grad_()

                def again(grad):
                    with torch.enable_grad():
                        for i, e in enumerate(found):
                            ((embedding(i) * e.grad).sum() * grad).backward()

                loss.register_hook(again)
            else:
                loss = loss_of([embedding(0), embedding(1)])
            loss.backward()
            opt.step(), opt.zero_grad()
        return model, opt, tool

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Several passes")
        ends_alike(run, exactly=False)
