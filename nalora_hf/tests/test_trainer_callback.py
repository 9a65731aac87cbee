"""NALoRACallback is a callback like any other: passed as a class or made, subclassed, found, taken
out, copied. What it says in log lines, and what it writes into folders."""
import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch

import nalora_hf
from nalora import NALoRAConfig

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import HPSearchBackend, default_compute_objective

from nalora_hf import NALoRACallback
from nalora_hf.tests.helpers import TINY, equal, peft_llama, snapshot
from nalora_hf.tests.trainers import Lines, trainer_of

CONFIG = NALoRAConfig(stride=1, keep=0.25)

class Quarter(NALoRACallback):
    """As users write their own."""
    def __init__(self):
        super().__init__(CONFIG)
        self.begun = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun += 1
        return super().on_train_begin(args, state, control, **kwargs)

def moved_as_masked(nalora):
    found = [torch.equal((ffn.B_gate != 0).any(1), ffn.state.mask) for ffn in nalora.ffns]
    return len(found) == 2 and all(found)

# ---- the class -----------------------------------------------------------------------------------
@pytest.mark.parametrize("given", [NALoRACallback, NALoRACallback(), NALoRACallback(CONFIG),
                                   Quarter, Quarter()], ids=str)
def test_it_may_be_passed_as_a_class_or_made_and_subclassed(tmp_path, given):
    trainer = trainer_of(tmp_path, given, max_steps=1)
    found, = (c for c in trainer.callback_handler.callbacks if isinstance(c, NALoRACallback))
    assert isinstance(found, TrainerCallback) and found.nalora is None
    trainer.train()
    assert found.nalora.steps == 1 and moved_as_masked(found.nalora)
    keep = 0.25 if isinstance(found, Quarter) or found.config else 0.5
    assert all(ffn.state.mask.float().mean() == keep for ffn in found.nalora.ffns)
    assert getattr(found, "begun", 1) == 1

@pytest.mark.parametrize("how", ["pop", "remove", "pop the object"])
def test_it_may_be_taken_out_and_put_back(tmp_path, how):
    trainer_of(tmp_path, model=(plain := peft_llama())).train()
    callback = NALoRACallback(CONFIG)
    trainer = trainer_of(tmp_path, callback)
    if how == "remove":
        trainer.remove_callback(NALoRACallback)
    else:
        popped = trainer.pop_callback(NALoRACallback if how == "pop" else callback)
        assert popped is callback
    trainer.train()
    assert callback.nalora is None and equal(snapshot(trainer.model), snapshot(plain))
    again = trainer_of(tmp_path)
    again.add_callback(callback)
    again.train()
    assert callback.nalora.steps == 4 and not equal(snapshot(again.model), snapshot(plain))

@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy,
                                    lambda callback: pickle.loads(pickle.dumps(callback))],
                         ids=["copy", "deepcopy", "pickle"])
def test_a_copy_begins_anew_and_does_the_same(tmp_path, copied):
    ends = []
    callback = NALoRACallback(CONFIG)
    for current in (callback, copied(callback)):
        trainer = trainer_of(tmp_path, current, logging_strategy="steps", logging_steps=1)
        trainer.train()
        ends.append((snapshot(trainer.model), current.nalora.steps, trainer.state.log_history[0]))
        callback = copied(current)
        assert callback.nalora is None and callback.config == CONFIG
        assert current.nalora is not None
    (a, steps, line), (b, other_steps, other_line) = ends
    assert equal(a, b) and steps == other_steps == 4
    assert {k: v for k, v in line.items() if "nalora" in k}.items() <= other_line.items()

def test_two_trainers_may_share_one(tmp_path):
    """One after the other, and models of other sizes."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM
    callback = NALoRACallback(CONFIG)
    small = trainer_of(tmp_path / "a", callback, logging_strategy="steps", logging_steps=1)
    other = Qwen2ForCausalLM(Qwen2Config(**{**TINY, "num_hidden_layers": 3}))
    other = get_peft_model(other, LoraConfig(r=4, target_modules="all-linear"))
    large = trainer_of(tmp_path / "b", callback, model=other, logging_strategy="steps",
                       logging_steps=1)
    small.train()
    first = callback.nalora
    large.train()
    assert len(first.ffns) == 2 and len(callback.nalora.ffns) == 3 and callback.nalora.steps == 4
    assert "nalora_turnover" not in large.state.log_history[0]
    assert "nalora_turnover" in large.state.log_history[1]

class Copies(TrainerCallback):
    """Keeps a copy of the model, as those who average weights do."""
    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.copy = copy.deepcopy(model)

def test_a_copy_of_the_model_runs_and_tells_the_callback_nothing(tmp_path):
    callback = NALoRACallback(CONFIG)
    copies = Copies()
    trainer_of(tmp_path, callback, copies).train()
    before = callback.nalora.state_dict()
    x = torch.randn(2, 5, 32, requires_grad=True)  # without input_ids, and without a mask
    with pytest.warns(UserWarning, match="NALoRA steers the model that this is a copy of"):
        copies.copy.train()(inputs_embeds=x).logits.sum().backward()
    for name, state in callback.nalora.state_dict()["ffns"].items():
        assert equal(before["ffns"][name], state)
    assert not callback.nalora.seen and callback.nalora.steps == 4

def test_a_wrong_configuration_is_refused_at_once():
    with pytest.raises(ValueError, match="config is a dict, but has to be a NALoRAConfig, such as"):
        NALoRACallback({"keep": 0.25})

def test_what_no_ffn_answers_to_stops_train_with_a_sentence(tmp_path):
    trainer = trainer_of(tmp_path, NALoRACallback(gate="gate_prj"))
    with pytest.raises(ValueError, match="No gated FFN here has LoRA on its gate_prj. It is on "
                                         "down_proj, gate_proj, up_proj: name the one"):
        trainer.train()

# ---- log lines -----------------------------------------------------------------------------------
def test_each_log_line_says_what_the_method_does(tmp_path):
    callback = NALoRACallback(CONFIG)
    lines = Lines(callback)
    trainer = trainer_of(tmp_path, lines, callback, max_steps=6, logging_strategy="steps",
                         logging_steps=2, eval_strategy="steps", eval_steps=3,
                         save_strategy="steps", save_steps=6)
    trainer.train()
    kinds = ["loss", "eval_loss", "loss", "loss", "eval_loss", "train_runtime"]
    assert [next(k for k in kinds if k in line) for line in lines.lines] == kinds
    changed = [masks.ne(before).float().mean().item()
               for before, masks in zip(lines.masks, lines.masks[1:])]
    assert max(changed) > 0
    for i, line in enumerate(lines.lines):
        assert 0.5 <= line["nalora_k_hat_min"] <= line["nalora_k_hat"] <= line["nalora_k_hat_max"]
        assert 0.5 <= line["nalora_scale"] <= 2 and line["nalora_rows"] == 0.25
        if i in (1, 2, 3):  # steps were taken since the line before
            assert line["nalora_turnover"] == pytest.approx(changed[i - 1], abs=1e-4)
    last = callback.nalora.statistics().values()
    k_hats = [s["k_hat"] for s in last]
    for name, value in (("nalora_k_hat_min", min(k_hats)), ("nalora_k_hat", sum(k_hats) / 2),
                        ("nalora_k_hat_max", max(k_hats)),
                        ("nalora_scale", sum(s["scale"] for s in last) / 2)):
        assert lines.lines[-1][name] == pytest.approx(value, abs=1e-4)
    for later in lines.lines[4:]:  # of the same step
        assert {k: v for k, v in later.items() if "nalora" in k}.items() <= lines.lines[3].items()
    for line, kept in zip(lines.lines, trainer.state.log_history, strict=True):
        assert line.items() <= kept.items()
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["log_history"] == trainer.state.log_history[:-1]

class Evaluated(TrainerCallback):
    """Keeps the metrics of evaluations, of which a search makes its objective."""
    def __init__(self):
        self.metrics = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.metrics.append(dict(metrics))

def test_metrics_are_those_of_the_model(tmp_path):
    evaluated = Evaluated()
    trainer = trainer_of(tmp_path, NALoRACallback(CONFIG), evaluated, eval_strategy="steps",
                         eval_steps=2)
    trainer.train()
    metrics = trainer.evaluate()
    assert len(evaluated.metrics) == 3
    for found, line in zip((*evaluated.metrics, metrics), trainer.state.log_history):
        assert not any("nalora" in name for name in found) and found["eval_loss"] < 10
        assert default_compute_objective(dict(found)) == found["eval_loss"]
        assert "nalora_k_hat" in line

def test_nothing_is_said_before_a_step(tmp_path):
    callback = NALoRACallback()
    lines = Lines()
    trainer = trainer_of(tmp_path, callback, lines, eval_strategy="steps", eval_steps=10,
                         eval_on_start=True)
    trainer.evaluate()
    trainer.log({"mine": 1.0})
    trainer.train()
    assert not any("nalora" in key for line in lines.lines[:3] for key in line)
    assert "nalora_k_hat" in lines.lines[3]

def test_tensorboard_and_other_reports_get_the_same_lines(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = NALoRACallback(CONFIG)
    first = Lines()
    late = Lines()
    trainer = trainer_of(tmp_path, first, callback, report_to=["tensorboard"],
                         logging_strategy="steps", logging_steps=1)
    trainer.add_callback(late)
    order = trainer.callback_handler.callbacks
    assert order[0] is callback and any(isinstance(c, TensorBoardCallback) for c in order)
    trainer.train()
    assert len(first.lines) == len(late.lines) == 5
    for a, b in zip(first.lines, late.lines):
        assert ({k: v for k, v in a.items() if "nalora" in k}
                == {k: v for k, v in b.items() if "nalora" in k} != {})
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ("k_hat_min", "k_hat", "k_hat_max", "scale", "rows", "turnover"):
        found = {e.step: e.value for e in events.Scalars(f"train/nalora_{name}")}
        wanted = {step: line[f"nalora_{name}"] for step, line in enumerate(first.lines[:4], 1)
                  if f"nalora_{name}" in line}
        assert found == pytest.approx(wanted) and len(found) >= 3

# ---- folders -------------------------------------------------------------------------------------
def test_each_checkpoint_says_what_it_is(tmp_path):
    callback = NALoRACallback(CONFIG)
    trainer = trainer_of(tmp_path, callback, save_strategy="steps", save_steps=2)
    trainer.train()
    record = {"method": "nalora", "version": nalora_hf.__version__,
              "config": {"keep": 0.25, "ema": 0.9, "stride": 1, "mask": "derivative",
                         "scale": "homogeneity"}}
    for folder in ("checkpoint-2", "checkpoint-4", "."):
        assert json.loads((tmp_path / folder / "nalora.json").read_text()) == record
    states = [torch.load(tmp_path / f"checkpoint-{step}" / "nalora.pt", weights_only=True)
              for step in (2, 4)]
    assert [state["steps"] for state in states] == [2, 4]
    for name, state in callback.nalora.state_dict()["ffns"].items():
        assert equal(states[1]["ffns"][name], state)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "nalora.pt").exists()

@pytest.mark.parametrize("changes", [{"save_only_model": True}, {"save_total_limit": 1}, {
    "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1,
    "save_total_limit": 1}], ids=["save_only_model", "save_total_limit", "load_best_model_at_end"])
def test_whatever_checkpoints_are_kept_have_their_state(tmp_path, changes, recwarn):
    callback = NALoRACallback(CONFIG)
    trainer = trainer_of(tmp_path, callback, save_strategy="steps", save_steps=1, **changes)
    trainer.train()
    kept = sorted(tmp_path.glob("checkpoint-*"))
    assert len(kept) == (4 if "save_only_model" in changes else 1)
    for folder in kept:
        state = torch.load(folder / "nalora.pt", weights_only=True)
        assert folder.name == f"checkpoint-{state['steps']}" and (folder / "nalora.json").exists()
    assert not [w for w in recwarn if "NALoRA" in str(w.message)]
    if "save_only_model" in changes:  # a new optimizer takes its last masks over
        goes_on = trainer_of(tmp_path, other := NALoRACallback(CONFIG), max_steps=5, **changes)
        goes_on.train(resume_from_checkpoint=str(kept[-1]))
        assert other.nalora.steps == 5

def test_no_checkpoint_is_made_where_the_trainer_made_none(tmp_path):
    callback = NALoRACallback(CONFIG)
    trainer = trainer_of(tmp_path, callback, save_strategy="steps", save_steps=2)
    trainer._save_checkpoint = lambda *args: None  # as of a subclass that saves elsewhere
    trainer.train()
    assert callback.nalora.steps == 4 and not list(tmp_path.glob("checkpoint-*"))

def test_each_trial_of_a_search_has_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    callback = NALoRACallback(CONFIG)
    trainer = trainer_of(tmp_path, callback, save_strategy="steps", save_steps=2)
    trainer.model_init = peft_llama
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: trial.params
    states = []
    for number in (0, 1):
        params = {"learning_rate": 10.0 ** -(2 + number)}
        trainer.train(trial=SimpleNamespace(number=number, params=params))
        folder = tmp_path / f"run-{number}" / "checkpoint-4"
        states.append(torch.load(folder / "nalora.pt", weights_only=True))
        assert states[-1]["steps"] == 4 and (folder / "nalora.json").exists()
        assert folder.with_name("checkpoint-2").joinpath("nalora.pt").exists()
    assert states[0]["config"] == states[1]["config"]
    assert not any(equal(a, b) for a, b in zip(states[0]["ffns"].values(),
                                               states[1]["ffns"].values()))
