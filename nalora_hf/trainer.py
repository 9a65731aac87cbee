"""NALoRA in transformers' Trainer and in TRL's."""
import inspect
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from nalora import NALoRAConfig
from nalora_hf.adapters import method_record
from nalora_hf.families import GATES
from nalora_hf.files import write_files
from nalora_hf.steer import NALoRA, check_config
from nalora_hf.watch import Hook

class NALoRACallback(TrainerCallback):
    """A callback for transformers' Trainer and TRL's: `callbacks=[NALoRACallback()]`, or the class
    as it is, makes NALoRA with the model and the optimizer that they have built, once training
    begins. It shows NALoRA the attention mask of each batch, and adds to every log line
    nalora_k_hat_min, nalora_k_hat (the mean over the FFNs) and nalora_k_hat_max, nalora_scale (the
    mean), nalora_rows (the share of rows that move) and nalora_turnover (the share of the masks
    that changed since the line before). It writes NALoRA's state into each checkpoint (nalora.pt)
    and goes on from it; nalora.json, there and in the output folder, says what it is. config, gate,
    act: NALoRA's. nalora: the NALoRA, None before training."""
    def __init__(self, config: NALoRAConfig | None = None, gate: str | Sequence[str] = GATES,
                 act: Callable | str | None = None):
        check_config(config)
        self.config = config
        self.gate = gate
        self.act = act
        self.nalora: NALoRA | None = None
        self.forget_line()

    def forget_line(self):
        self.line_step = 0  # steps at the last log line,
        self.line_masks = None  # the masks then,
        self.line = {}  # and what it said

    def __getstate__(self):
        without = {"nalora": None, "line_step": 0, "line_masks": None, "line": {}}
        return self.__dict__ | without

    def on_init_end(self, args, state, control, **kwargs):
        self.come_before_reports()

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.come_before_reports()
        self.forget_line()
        before = self.nalora
        self.nalora = NALoRA(model, optimizer, self.config, self.gate, self.act)
        for i, (module, place) in enumerate(modules_with_mask(model, self.nalora)):
            hook = MaskHook(self.nalora, place, outermost=i == 0)
            self.nalora.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        folder = callers_local("resume_from_checkpoint")
        if folder and state.global_step:
            self.resume(Path(folder) / "nalora.pt")
        elif before is not None and before.optimizers == self.nalora.optimizers:
            self.nalora.load_state_dict(before.state_dict())  # train() was called again

    def resume(self, path):
        if not path.exists():
            warnings.warn(f"{path.parent} holds no nalora.pt, so it was not written by NA-LoRA: "
                          "NALoRA begins anew.")
            self.nalora.begins = False  # which would warn once more
            return
        try:
            self.nalora.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        except ValueError as e:
            raise ValueError(f"{path} is of another run: {e}") from None
        except Exception as e:  # torch.load raises many kinds
            raise ValueError(f"{path} cannot be read: {e}") from None

    def on_save(self, args, state, control, **kwargs):
        trainer = callers_local("self", "_get_output_dir")  # of a search, a folder for each trial
        run = trainer._get_output_dir(callers_local("trial")) if trainer else args.output_dir
        folder = Path(run) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():  # it may be one too many already
            content = io.BytesIO()
            torch.save(self.nalora.state_dict(), content)
            write_files(folder, {"nalora.pt": content.getvalue(),
                                 "nalora.json": method_record(self.nalora)})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.nalora is None or not self.nalora.steps or logs is None:
            return
        if self.nalora.steps != self.line_step:  # else an evaluation, or the last line
            self.line_step = self.nalora.steps
            self.line = self.describe()
        logs.update(self.line)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(self.line)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for name in self.line:  # the line was the metrics, whose sum a search may minimise
            (metrics or {}).pop(name, None)

    def describe(self):
        """What a log line says."""
        states = [group.state for group in self.nalora.groups]
        k_hat = torch.cat([s.k_hat.flatten().cpu() for s in states])
        k_hat = k_hat[k_hat.isfinite()]
        masks = torch.cat([s.mask.flatten().cpu() for s in states])
        values = {"scale": torch.cat([s.scale.flatten().cpu() for s in states]).mean(),
                  "rows": masks.float().mean()}
        if len(k_hat):
            values |= {"k_hat_min": k_hat.min(), "k_hat": k_hat.mean(), "k_hat_max": k_hat.max()}
        if self.line_masks is not None:
            values["turnover"] = (masks != self.line_masks).float().mean()
        self.line_masks = masks
        return {f"nalora_{name}": round(t.item(), 4) for name, t in values.items()}

    def on_train_end(self, args, state, control, **kwargs):
        if self.nalora is not None:
            self.nalora.remove()
            if state.is_world_process_zero and Path(args.output_dir).is_dir():
                write_files(args.output_dir, {"nalora.json": method_record(self.nalora)})

    def come_before_reports(self):
        """To the front of the trainer's callbacks: it calls those that report before a user's, and
        what is added to a log line later reaches none of them."""
        callbacks = getattr(callers_local("self", "callbacks"), "callbacks", [])
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)

class MaskHook(Hook):
    """Shows NALoRA the attention mask of a pass, of (batch, seq) alone."""
    def __init__(self, nalora=None, place=0, outermost=False):
        super().__init__(nalora, None, "set_token_mask")
        self.place = place  # of attention_mask among the arguments
        self.outermost = outermost  # of those that name it: a pass without a mask here has none

    def __call__(self, module, args, kwargs):
        if self.nalora is None:
            return
        mask = kwargs.get("attention_mask", args[self.place] if len(args) > self.place else None)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.tell(mask, True)
        elif self.outermost:
            self.tell(torch.empty(0), True)

    def __reduce__(self):
        return MaskHook, ()

def modules_with_mask(model, nalora):
    """[(module that names an attention_mask and holds all gates, its place among the arguments)],
    the outermost first."""
    gates = {ffn.gate for ffn in nalora.ffns}
    found = []
    for module in model.modules():
        try:
            names = list(inspect.signature(module.forward).parameters)
        except ValueError:  # of a builtin function
            continue
        if "attention_mask" in names and gates <= set(module.modules()):
            found.append((module, names.index("attention_mask")))
    return found

def callers_local(name, attribute=None):
    """A local variable of the nearest caller that has one of that name (and attribute), or None:
    transformers tells a callback neither its trainer nor the checkpoint that it resumes."""
    frame = sys._getframe(2)
    while frame is not None:
        value = frame.f_locals.get(name)
        if name in frame.f_locals and (attribute is None or hasattr(value, attribute)):
            return value
        frame = frame.f_back
