"""Runs of Trainer that are resumed, are interrupted or go on: to the same bits, or one sentence."""
import copy
import shutil
import warnings

import pytest
import torch

from nalora import NALoRAConfig

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from nalora_hf import NALoRACallback
from nalora_hf.tests.helpers import equal, peft_llama, snapshot, state_of
from nalora_hf.tests.trainers import Interrupt, trainer_of

CONFIG = NALoRAConfig(stride=1, keep=0.25)
SAVES = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}

def train(folder, steps, resume=None, callback=None, **changes):
    """(the trainer, its callback) after training."""
    callback = callback or NALoRACallback(CONFIG)
    trainer = trainer_of(folder, callback, max_steps=steps, **{**SAVES, **changes})
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback

def assert_same(a, b):
    """Two (trainer, callback): weights, optimizer and NALoRA, bit for bit."""
    assert equal(snapshot(a[0].model), snapshot(b[0].model))
    assert equal(state_of(a[1].nalora), state_of(b[1].nalora))
    assert a[1].nalora.steps == b[1].nalora.steps
    one, other = (t[0].optimizer.state_dict()["state"] for t in (a, b))
    assert all(torch.equal(one[i][key], other[i][key]) for i in one for key in one[i])

def nalora_warnings(found):
    return [str(w.message) for w in found if "NALoRA" in str(w.message)]

@pytest.mark.parametrize("where", ["the folder", "a path", "elsewhere"])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, where, recwarn):
    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "cut", 3)
    folder = tmp_path / "cut"
    resume = True
    if where == "a path":
        resume = str(folder / "checkpoint-3")
    elif where == "elsewhere":
        shutil.move(folder / "checkpoint-3", tmp_path / "moved" / "any name")
        folder = tmp_path / "another"
        resume = str(tmp_path / "moved" / "any name")
    resumed = train(folder, 6, resume)
    assert_same(whole, resumed)
    masks = [state["mask"] for state in resumed[1].nalora.statistics().values()]
    assert all(mask.sum() == 12 for mask in masks) and resumed[1].nalora.steps == 6
    assert not nalora_warnings(recwarn)
    plain = trainer_of(tmp_path / "plain", max_steps=6, **SAVES)
    plain.train()
    assert not equal(snapshot(plain.model), snapshot(whole[0].model))

def test_the_masks_of_a_resumed_run_are_not_begun_anew(tmp_path):
    """What the test above could not see if a step gave the masks anew."""
    train(tmp_path, 3)
    state = torch.load(tmp_path / "checkpoint-3" / "nalora.pt", weights_only=True)
    for ffn in state["ffns"].values():
        ffn["importance"] = torch.arange(48.0)  # as no pass would have it
    torch.save(state, tmp_path / "checkpoint-3" / "nalora.pt")
    _, callback = train(tmp_path, 4, True)
    for ffn in callback.nalora.ffns:
        assert ffn.state.mask.nonzero().flatten().tolist() == list(range(36, 48))

def test_a_checkpoint_of_another_method_is_told_once(tmp_path):
    plain = trainer_of(tmp_path, max_steps=3, **SAVES)
    plain.train()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _, callback = train(tmp_path, 6, True)
    assert nalora_warnings(found) == [
        f"{tmp_path / 'checkpoint-3'} holds no nalora.pt, so it was not written by NA-LoRA: NALoRA "
        "begins anew."]
    assert callback.nalora.steps == 3

@pytest.mark.parametrize("changes, field", [
    ({"keep": 0.5}, "has keep 0.25, this one 0.5"), ({"stride": 3}, "has stride 1, this one 3"),
    ({"ema": 0.5}, "has ema 0.9, this one 0.5"),
    ({"mask": "none"}, "has mask 'derivative', this one 'none'"),
    ({"scale": "none"}, "has scale 'homogeneity', this one 'none'")])
def test_another_configuration_names_its_field(tmp_path, changes, field):
    train(tmp_path, 3)
    other = NALoRAConfig(**{"stride": 1, "keep": 0.25, **changes})
    trainer = trainer_of(tmp_path, NALoRACallback(other), max_steps=6, **SAVES)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=field) as raised:
        trainer.train(resume_from_checkpoint=True)
    assert str(raised.value).startswith(str(tmp_path / "checkpoint-3" / "nalora.pt"))
    assert "\n" not in str(raised.value) and before.keys() == trainer.model.state_dict().keys()

@pytest.mark.parametrize("spoil", ["cut", "text", "of other FFNs"])
def test_a_state_that_cannot_be_is_refused(tmp_path, spoil):
    train(tmp_path, 3)
    path = tmp_path / "checkpoint-3" / "nalora.pt"
    if spoil == "of other FFNs":
        state = torch.load(path, weights_only=True)
        state["ffns"].popitem()
        torch.save(state, path)
    else:
        path.write_bytes(path.read_bytes()[:100] if spoil == "cut" else b"hello")
    wanted = "of other FFNs: see" if spoil == "of other FFNs" else "cannot be read"
    with pytest.raises(ValueError, match=wanted):
        train(tmp_path, 6, True)

@pytest.mark.parametrize("how", ["begins anew", "resumes"])
def test_an_interrupted_run_may_be_trained_again(tmp_path, how):
    whole = train(tmp_path / "whole", 6)
    callback = NALoRACallback(CONFIG)
    trainer = trainer_of(tmp_path / how, callback, Interrupt(4), max_steps=6, **SAVES)
    weights = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    if how == "begins anew":
        trainer.model.load_state_dict(weights)
        trainer.optimizer = None
    trainer.train(resume_from_checkpoint=how == "resumes")
    assert_same(whole, (trainer, callback))

@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_train_called_again_goes_on(tmp_path, interrupted, compiled, recwarn):
    """As Adam does: the trainer keeps its optimizer."""
    callback = NALoRACallback(CONFIG)
    changes = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
    trainer = trainer_of(tmp_path, callback, *[Interrupt(3)] * interrupted, max_steps=4, **changes)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(Interrupt)
    else:
        trainer.train()
    first = callback.nalora
    before = state_of(first)
    trainer.train()
    assert callback.nalora is not first
    assert callback.nalora.steps == first.steps + 4 == (7 if interrupted else 8)
    adam = trainer.optimizer.optimizer.state_dict()["state"].values()
    assert {int(state["step"]) for state in adam} == {callback.nalora.steps}
    assert equal(state_of(first), before)  # it sees and steers nothing more
    assert not equal(state_of(callback.nalora), before)
    assert not nalora_warnings(recwarn)
    model = trainer.model
    hooks = [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]
    assert not hooks and not trainer.optimizer.optimizer._optimizer_step_post_hooks

def test_an_optimizer_that_goes_on_without_its_nalora_is_told(tmp_path):
    model = peft_llama()
    trainer = trainer_of(tmp_path, NALoRACallback(CONFIG), model=model)
    trainer.train()
    trainer.pop_callback(NALoRACallback)
    trainer.add_callback(NALoRACallback(CONFIG))
    with pytest.warns(UserWarning, match="goes on with a run, but NALoRA begins anew"):
        trainer.train()
