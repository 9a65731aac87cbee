"""When NALoRA's hooks count, forget, ask and warn: cases that mutants once survived."""
import copy
import functools
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import nalora
import nalora_hf
from nalora import LoRALinear, NALoRAConfig, effective_homogeneity
from nalora_hf import NALoRA, families, lora_parameters
from nalora_hf.tests.helpers import (batch, checkpointed, ends_alike, equal, in_blocks, lora_llama,
                                     other_model, other_step, sgd, skip_activations, start,
                                     state_of, take_step)

def test_a_pass_that_ended_before_its_activation_leaves_no_trace():
    model = other_model()
    tool = NALoRA(model, sgd(model))
    ffn = model.layers[0]
    ffn.gate_proj(torch.randn(2, 5, 8))  # and then, say, no memory for up_proj
    other_pass = model.eval().forward(torch.randn(2, 5, 8))
    assert other_pass.shape == (2, 5, 8) and not tool._stacks[0].samples

def test_whoever_looks_at_a_gate_by_hand_sees_its_homogeneity_and_changes_nothing():
    def run(looks):
        model = other_model()
        for ffn in model.layers:
            ffn.act_fn = nn.SiLU()
        opt = sgd(model)
        tool = NALoRA(model, opt, NALoRAConfig(stride=1))
        if looks:
            ffn = model.layers[0]
            z = ffn.gate_proj(torch.randn(2, 5, 8))  # in train mode, with gradients
            k_hat = effective_homogeneity(ffn.act_fn, z)
            assert k_hat == effective_homogeneity(F.silu, z)
        other_step(model, 1, opt)
        return model, opt, tool

    ends_alike(run)

def test_recomputation_of_the_shorter_of_two_passes_finds_its_own():
    def run(again):
        model = checkpointed(lora_llama(), True) if again else lora_llama()
        model, opt, tool = start(NALoRAConfig(stride=3), model)
        losses = []
        for i, shape in enumerate(((4, 9), (4, 14))):
            tool.token_mask = torch.arange(shape[1]) < 5 + i + torch.arange(4)[:, None]
            losses.append(model(*batch(i, shape))[1])
        for loss in losses:  # the first one first
            loss.backward()
        opt.step()
        return model, opt, tool

    ends_alike(run, exactly=False)

def test_it_warns_when_another_optimizer_joins_later():
    model, opt, tool = start(NALoRAConfig())
    for i in range(6):
        take_step(model, opt, i)
    other = torch.optim.SGD(lora_parameters(model), lr=0.1)
    opt.register_step_post_hook(lambda *_: other.step())
    take_step(model, opt, 6)
    with pytest.warns(UserWarning, match="Something else moved the LoRA parameters"):
        take_step(model, opt, 7)

def test_an_ffn_that_a_step_leaves_out_is_no_reason_to_warn():
    model = nn.Module()
    model.text, model.vision = other_model().layers, other_model(act=nn.GELU()).layers
    opt = sgd(model)
    NALoRA(model.train(), opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for evaluated in (False, True):
            if evaluated:
                model.vision[0](torch.randn(2, 5, 8))
            model.text[0](torch.randn(2, 5, 8)).sum().backward()
            opt.step()

@pytest.mark.parametrize("fails", [False, True])
def test_a_part_called_by_itself_counts_after_a_pass_under_no_grad(fails):
    model, opt, tool = start(NALoRAConfig())
    with torch.no_grad():
        if fails:
            with pytest.raises(IndexError):
                model(batch(0)[0] + 61)  # no such token
        else:
            model(*batch(0))
    model.model.layers[0].mlp(torch.randn(2, 5, 32)).sum().backward()
    assert tool._stacks[0].seen[0] == 1 and 0 in tool._stacks[0].samples

def test_a_copy_that_does_not_train_says_nothing():
    model, opt, tool = start(NALoRAConfig())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model).train()(*batch(0))

def test_an_activation_left_out_is_forgotten_at_the_step():
    model = other_model()
    skip_activations(model)
    opt = sgd(model)
    tool = NALoRA(model, opt)
    other_step(model, 0, opt)
    model.layers[0].act_fn(torch.randn(2, 5, 12))
    assert not tool._stacks[0].seen and not tool._stacks[0].samples

def test_an_activation_without_gradients_is_no_sign_of_a_wrong_gate():
    model = other_model()
    skip_activations(model)
    opt = sgd(model)
    NALoRA(model, opt)
    model.layers[0].act_fn(torch.randn(2, 5, 12))
    other_step(model, 0, opt)

def test_a_fused_layer_may_leave_its_activation_out_in_a_pass():
    model = other_model("gate first", count=1)
    opt = sgd(model)
    tool = NALoRA(model, opt, NALoRAConfig(stride=1))
    other_step(model, 0, opt)
    model.layers[0].gate_up_proj(torch.randn(2, 5, 8)).sum().backward()
    model.forward(torch.randn(2, 5, 8)).sum().backward()
    opt.step()
    assert tool.state_dict()["steps"] == 2

def test_a_changed_gate_counts_once_in_its_first_pass():
    """Though NALoRA goes backward once itself, to see what the activation's input is made of."""
    model = other_model(change=lambda z: 2 * z)
    tool = NALoRA(model, sgd(model), NALoRAConfig(stride=1))
    for _ in range(2):
        model.forward(torch.randn(2, 5, 8)).sum().backward()
    tool._add_up()
    assert tool._stacks[0].sums.tokens.tolist() == [20, 20]

@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layout", ["apart", "gate last"])
def test_checkpointing_of_other_ffns_changes_nothing(layout, reentrant):
    """Of gates that are changed, and of fused ones, whose rows are found in backward then."""
    def run(again):
        model = other_model(layout, change=lambda z: 2 * z)
        for layer in model.layers if again else ():
            layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward,
                                              use_reentrant=reentrant)
        opt = sgd(model)
        tool = NALoRA(model, opt, NALoRAConfig(stride=3))
        torch.manual_seed(1)
        losses = [model(torch.randn(2, n, 8, requires_grad=True)).sum() for n in (5, 4, 5)]
        losses[2].backward()
        losses[0].backward()  # the one between them is never trained on
        opt.step()
        assert layout == "apart" or tool._stacks[0].rows[0] == 12
        return model, opt, tool

    ends_alike(run)

def test_a_mask_is_of_one_of_two_towers():
    model = nn.Module()
    model.text, model.vision = in_blocks(other_model().layers), in_blocks(other_model().layers)
    tool = NALoRA(model.train(), sgd(model), NALoRAConfig(stride=1))
    tool.token_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    model.text[0].mlp(torch.randn(2, 5, 8)).sum().backward()
    model.vision[0].mlp(torch.randn(2, 9, 8)).sum().backward()
    tool._add_up()
    assert tool._stacks[0].sums.tokens.tolist() == [5, 0, 18, 0]

def test_the_token_mask_of_a_decoder_without_encoder_is_its_own():
    """Such as OPT's, whose layers are called model.decoder.layers."""
    model = nn.Module()
    model.decoder = nn.Module()
    model.decoder.layers = in_blocks(other_model(count=1).layers)
    tool = NALoRA(model.train(), sgd(model), NALoRAConfig(stride=1))
    tool.token_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    model.decoder.layers[0].mlp(torch.randn(2, 5, 8)).sum().backward()
    tool._add_up()
    assert tool._stacks[0].sums.tokens.tolist() == [5]

@pytest.mark.parametrize("kind", ["one column", "first token"])
def test_where_the_gate_stands_is_seen_in_any_pass(kind):
    """Though its first token, or one of its channels at some tokens, takes no part."""
    model = other_model("gate last", count=1)
    (layer,) = model.layers
    tool = NALoRA(model, sgd(model), NALoRAConfig(stride=1))

    def forward(x):
        u, z = layer.gate_up_proj(x).chunk(2, dim=-1)
        keep = torch.ones_like(z)
        if kind == "first token":
            keep[0, 0] = 0
        else:
            keep[0, 1, 3] = 0
        return layer.down_proj(layer.act_fn(z * keep) * u)

    forward(torch.randn(2, 5, 8)).sum().backward()
    assert torch.equal(tool._stacks[0].rows, torch.arange(12, 24))

def test_which_rows_make_the_gate_is_asked_once(monkeypatch):
    model = other_model("gate first", count=1)
    opt = sgd(model)
    NALoRA(model, opt)
    other_step(model, 0, opt)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with monkeypatch.context() as m:
        m.setattr(nalora, "value_and_slope", lambda act, z: (act(z), torch.ones_like(z)))
        other_step(model, 1, opt)

def test_the_callback_hands_on_what_it_was_given():
    pytest.importorskip("transformers")
    model = other_model()
    for layer in model.layers:
        layer.fc1, layer.act_fn = layer.gate_proj, None
        del layer.gate_proj
        layer.forward = lambda x, self=layer: (
            x + self.down_proj(F.silu(self.fc1(x)) * self.up_proj(x)))
    config = NALoRAConfig(keep=0.25)
    callback = nalora_hf.NALoRACallback(config, gate="fc1", act=F.silu)
    for opt in (sgd(model), sgd(model)):  # the first training was interrupted
        callback.on_train_begin(None, None, None, model=model, optimizer=opt)
    assert callback.nalora.config is config and len(model._forward_pre_hooks) == 2
    assert len(model.layers[0].fc1._forward_hooks) == 1

def test_a_mask_that_fits_no_ffn_of_the_one_tower_is_refused():
    """Though its FFNs are called layers.0 and layers.1."""
    model = other_model()
    tool = NALoRA(model, sgd(model))
    tool.token_mask = torch.ones(2, 6)
    with pytest.raises(ValueError, match=r"token_mask is \(2, 6\)"):
        model.forward(torch.randn(2, 5, 8))

def test_a_new_callback_goes_on_where_another_was_interrupted():
    pytest.importorskip("transformers")
    model = lora_llama()
    opt = sgd(model)
    one, two = nalora_hf.NALoRACallback(), nalora_hf.NALoRACallback()
    one.on_train_begin(None, None, None, model=model, optimizer=opt)
    take_step(model, opt, 0)
    two.on_train_begin(None, None, None, model=model, optimizer=opt)
    assert opt.nalora is two.nalora and two.nalora.state_dict()["steps"] == 1
    assert equal(state_of(one.nalora), state_of(two.nalora))

def test_layers_that_are_the_whole_model_are_one_tower():
    """And are called 0 and 1."""
    model = other_model()
    tool = NALoRA(model.layers, sgd(model))
    assert list(tool.statistics()) == ["0", "1"]
    tool.token_mask = torch.ones(2, 6)
    with pytest.raises(ValueError, match=r"token_mask is \(2, 6\)"):
        model.forward(torch.randn(2, 5, 8))

def test_a_backward_pass_is_waited_for_at_each_step():
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    model(*batch(1))
    with pytest.warns(UserWarning, match="saw no backward pass reach a gate"):
        opt.step()

def test_the_rows_of_a_fused_layer_cannot_be_seen_from_an_activation_that_is_told():
    model = other_model("gate first", count=1)
    del model.layers[0].act_fn
    with pytest.raises(ValueError, match="its activation is no module of its own"):
        NALoRA(model, sgd(model), act=nn.SiLU())

def test_gates_whose_squares_alone_are_infinite_change_nothing():
    z = torch.tensor([[1.0, 1e20], [1.0, 2.0]])[:, None]
    sums = nalora.observe(F.silu, z, torch.ones(2, 1))
    before = nalora.State(torch.zeros(2, 2), torch.zeros(2, 2) > 0, *torch.zeros(3, 2))
    after = nalora.decide(before, sums, NALoRAConfig())
    assert all((t[0] == 0).all() and (t[1] != 0).any() for t in after)

def test_an_odd_number_of_rows_is_no_gate_and_features():
    ffn = other_model("gate first").layers[0]
    ffn.gate_up_proj = LoRALinear(nn.Linear(8, 25), 4, 8)  # down_proj takes 12
    assert families.channels(ffn, ffn.gate_up_proj) == 25

def test_an_optimizer_of_the_gates_alone_is_refused_while_more_trains():
    model = lora_llama()
    gates = [layer.mlp.gate_proj for layer in model.model.layers]
    opt = torch.optim.SGD([p for gate in gates for p in (gate.lora_A, gate.lora_B)], lr=0.1)
    with pytest.raises(ValueError, match="The optimizer does not hold"):
        NALoRA(model, opt)
    for name, p in model.named_parameters():
        p.requires_grad_("gate_proj.lora_" in name)
    assert len(NALoRA(model, opt)._steered[opt]) == 4

def test_an_activation_is_refused_whose_gate_has_no_gradients():
    model = other_model(count=1)
    (layer,) = model.layers

    def forward(x):
        with torch.no_grad():
            z = layer.gate_proj(x)
        return layer.down_proj(layer.act_fn(layer.up_proj(x)) * z)

    model.forward = forward
    NALoRA(model, sgd(model))
    with pytest.raises(ValueError, match="does not see the output of the layer"):
        model(torch.randn(2, 5, 8))

def test_a_part_without_gradients_leaves_no_trace_after_a_pass_that_failed():
    model, opt, tool = start(NALoRAConfig())
    with pytest.raises(IndexError):
        model(batch(0)[0] + 61)  # no such token
    with torch.no_grad():
        model.model.layers[0].mlp(torch.randn(2, 5, 32))
    assert not tool._stacks[0].seen

def test_outputs_without_gradients_are_passed_over_under_checkpointing():
    model, opt, tool = start(NALoRAConfig(stride=1), checkpointed(lora_llama(), True))
    logits, loss = model(batch(0)[0])
    assert loss is None
    logits.sum().backward()
    tool._add_up()
    assert tool._stacks[0].sums.tokens.tolist() == [60, 60]
