"""NALoRA's state: what a run goes on from, in files of torch and of its distributed checkpoint."""
import warnings

import pytest
import torch

from nalora import NALoRAConfig
from nalora_hf import NALoRA, lora_parameters
from nalora_hf.tests.helpers import (batch, equal, lora_llama, other_model, other_step, sgd,
                                     snapshot, start, state_of, take_step)

def step(model, opt, tool, seed):
    """With two microbatches and their token masks."""
    for i in range(2):
        tool.token_mask = torch.rand(4, 15, generator=torch.manual_seed(seed + i)) < 0.8
        model(*batch(10 * seed + i))[1].backward()
    opt.step()
    opt.zero_grad()

@pytest.mark.parametrize("config", [NALoRAConfig(stride=3), NALoRAConfig(stride=3, mask="none"),
                                    NALoRAConfig(stride=3, scale="none")])
@pytest.mark.parametrize("nalora_first", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_a_run_goes_on_to_the_same_bits(tmp_path, config, nalora_first, within):
    """Whatever passes came since the last step when it was saved, and in the new run."""
    model, opt, tool = start(config)
    for i in range(3):
        step(model, opt, tool, i)
    if within:
        model(*batch(99))
    parts = {"model": model, "optimizer": opt, "nalora": tool}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "run.pt")
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, new, other = start(config, lora_llama(seed=5))
        if within:
            other.token_mask = torch.ones(4, 15)
            again(*batch(98))
            take_step(again, new, 97)
            again(*batch(96))
        saved = torch.load(tmp_path / "run.pt", weights_only=True)
        theirs = {"model": again, "optimizer": new, "nalora": other}
        for name in sorted(theirs, reverse=nalora_first):
            theirs[name].load_state_dict(saved[name])
        assert other.steps == 3
        if within:  # what was not yet stepped is not saved
            tool.load_state_dict(tool.state_dict())
        for i in range(3, 6):
            step(model, opt, tool, i)
            step(again, new, other, i)
    assert equal(snapshot(model), snapshot(again)) and equal(state_of(tool), state_of(other))
    assert other.steps == 6

@pytest.mark.parametrize("layout", ["apart", "gate last"])
def test_torch_distributed_checkpoint_takes_it_as_one_more_stateful_object(tmp_path, layout):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.stateful import Stateful

    def made():
        model = other_model(layout)
        opt = torch.optim.AdamW(lora_parameters(model), lr=0.05)
        return model, opt, NALoRA(model, opt, NALoRAConfig(stride=3, keep=0.25))

    model, opt, tool = made()
    assert isinstance(tool, Stateful)
    for i in range(3):
        other_step(model, i, opt)
    weights, moments = get_state_dict(model, opt)
    checkpoint.save({"model": weights, "optimizer": moments, "nalora": tool},
                    checkpoint_id=tmp_path / "run", no_dist=True)
    again, new, other = made()
    weights, moments = get_state_dict(again, new)
    checkpoint.load({"model": weights, "optimizer": moments, "nalora": other},
                    checkpoint_id=tmp_path / "run", no_dist=True)
    set_state_dict(again, new, model_state_dict=weights, optim_state_dict=moments)
    assert other.steps == 3 and equal(state_of(tool), state_of(other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(3, 6):
            other_step(model, i, opt)
            other_step(again, i, new)
    assert equal(snapshot(model), snapshot(again)) and equal(state_of(tool), state_of(other))

def test_what_a_state_dict_holds_is_a_copy_of_plain_things():
    model, opt, tool = start(NALoRAConfig(keep=0.25))
    first = tool.state_dict()
    take_step(model, opt, 0)
    later = tool.state_dict()
    assert later["steps"] == 1 and later["config"]["keep"] == 0.25
    assert [*later["ffns"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    kept = {key: t.clone() for key, t in state_of(tool).items()}
    held = state_of(tool)
    tool.load_state_dict(first)
    assert equal(held, kept) and not equal(state_of(tool), kept) and tool.steps == 0
    take_step(model, opt, 1)
    assert equal(held, kept) and first["steps"] == 0

@pytest.mark.parametrize("change, message", [
    ({"keep": 0.25}, r"^The saved NALoRA has keep 0.5, this one 0.25\.$"),
    ({"ema": 0.5}, r"^The saved NALoRA has ema 0.9, this one 0.5\.$"),
    ({"stride": 2}, r"^The saved NALoRA has stride 17, this one 2\.$"),
    ({"mask": "none"}, r"^The saved NALoRA has mask 'derivative', this one 'none'\.$"),
    ({"scale": "none"}, r"^The saved NALoRA has scale 'homogeneity', this one 'none'\.$"),
    ("fewer layers", "of other FFNs: see .'model.layers.1.mlp'"),
    ("another width", r"of other FFNs: see .'model.layers.0.mlp', .*\(40,\)")])
def test_the_state_of_another_run_is_refused_by_what_differs(change, message):
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    saved = tool.state_dict()
    sizes = {"fewer layers": {"num_hidden_layers": 1}, "another width": {"intermediate_size": 40}}
    config = NALoRAConfig() if isinstance(change, str) else NALoRAConfig(**change)
    model, opt, other = start(config, lora_llama(**sizes.get(str(change), {})))
    take_step(model, opt, 5)
    before = state_of(other)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert equal(before, state_of(other)) and other.steps == 1  # nothing was taken over

@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("goes_on", [False, True])
def test_an_optimizer_that_goes_on_without_nalora_is_warned_of_once(kind, goes_on):
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    model, opt, _ = start(None, optimizer=kind, **settings)
    for i in range(2 * goes_on):
        take_step(model, opt, i)
    _, new, _ = start(None, model, kind, **settings)
    new.load_state_dict(opt.state_dict())
    NALoRA(model, new)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for i in range(3):
            take_step(model, new, i)
    said = [str(w.message) for w in said]
    assert len(said) == goes_on
    assert all(text.startswith("The optimizer goes on with a run, but NALoRA begins anew")
               for text in said)

def test_a_nalora_that_is_made_anew_in_the_midst_of_a_run_says_so_once():
    """As in a notebook's cell."""
    model, opt, tool = start(NALoRAConfig())
    take_step(model, opt, 0)
    state = tool.state_dict()
    NALoRA(model, opt)
    with pytest.warns(UserWarning, match="NALoRA begins anew"):
        take_step(model, opt, 1)
    tool = NALoRA(model, opt)
    tool.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(model, opt, 2)
    assert tool.steps == 2

def test_what_is_no_state_is_refused():
    model = other_model()
    opt = sgd(model)
    tool = NALoRA(model, opt)
    for wrong in ({}, {"config": {}, "steps": 1}, opt.state_dict(), model.state_dict(), [], None):
        with pytest.raises(ValueError, match="not what NALoRA's state_dict"):
            tool.load_state_dict(wrong)
