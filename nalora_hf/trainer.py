"""NALoRA in transformers' Trainer and in TRL's."""
import inspect
import io
import sys
import warnings
from pathlib import Path

import torch
from transformers import TrainerCallback

from nalora_hf.adapters import method_record
from nalora_hf.families import GATES
from nalora_hf.files import write_files
from nalora_hf.steer import NALoRA
from nalora_hf.watch import Hook

class NALoRACallback(TrainerCallback):
    """A callback for transformers' Trainer and TRL's: `callbacks=[NALoRACallback()]`, or the class
    as it is, makes NALoRA with the model and the optimizer that they have built, once training
    begins. It shows NALoRA the attention mask of each batch, and adds k_hat, scale, the share of
    rows that move and the mask's turnover since the last line to every log line. It writes
    NALoRA's state into each checkpoint (nalora.pt; nalora.json says what it is) and goes on from
    it. config, gate, act: NALoRA's. nalora: the NALoRA, None before training."""
    def __init__(self, config=None, gate=GATES, act=None):
        self.config = config
        self.gate = gate
        self.act = act
        self.nalora = None
        self.logged = None  # masks at the last log line

    def __getstate__(self):
        return self.__dict__ | {"nalora": None, "logged": None}

    def on_init_end(self, args, state, control, **kwargs):
        self.come_before_reports()

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.come_before_reports()
        before = self.nalora
        self.nalora = NALoRA(model, optimizer, self.config, self.gate, self.act)
        for module in model.modules():
            if "attention_mask" in inspect.signature(module.forward).parameters and all(
                    gate in set(module.modules()) for gate in self.gates()):
                hook = MaskHook(self.nalora, module, module is model)
                self.nalora.handles.append(
                    module.register_forward_pre_hook(hook, with_kwargs=True))
        folder = callers_local("resume_from_checkpoint")
        if folder and state.global_step:
            self.resume(Path(folder) / "nalora.pt")
        elif before is not None and before.optimizers == self.nalora.optimizers:
            self.nalora.load_state_dict(before.state_dict())  # train() was called again

    def gates(self):
        return [ffn.gate for ffn in self.nalora.ffns]

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
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            content = io.BytesIO()
            torch.save(self.nalora.state_dict(), content)
            write_files(folder, {"nalora.pt": content.getvalue(),
                                 "nalora.json": method_record(self.nalora)})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.nalora is None or not self.nalora.steps or logs is None:
            return
        states = [group.state for group in self.nalora.groups]
        k_hat = torch.cat([s.k_hat.cpu() for s in states])
        k_hat = k_hat[k_hat.isfinite()]
        masks = torch.cat([s.mask.flatten().cpu() for s in states])
        values = {"scale": torch.cat([s.scale.cpu() for s in states]).mean(),
                  "rows": masks.float().mean()}
        if len(k_hat):
            values |= {"k_hat_min": k_hat.min(), "k_hat": k_hat.mean(), "k_hat_max": k_hat.max()}
        if self.logged is not None:
            values["turnover"] = (masks != self.logged).float().mean()
        self.logged = masks
        values = {f"nalora_{name}": round(t.item(), 4) for name, t in values.items()}
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_train_end(self, args, state, control, **kwargs):
        if self.nalora is not None:
            self.nalora.remove()

    def come_before_reports(self):
        """To the front of the trainer's callbacks: it calls those that report before a user's, and
        what is added to a log line later reaches none of them."""
        callbacks = getattr(callers_local("self", "callbacks"), "callbacks", [])
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)

class MaskHook(Hook):
    """Shows NALoRA the attention mask of a pass, of (batch, seq) alone."""
    def __init__(self, nalora=None, module=None, outermost=False):
        super().__init__(nalora, None, "set_token_mask")
        self.outermost = outermost
        names = [] if module is None else list(inspect.signature(module.forward).parameters)
        self.place = names.index("attention_mask") if names else 0

    def __call__(self, module, args, kwargs):
        if self.nalora is None:
            return
        mask = kwargs.get("attention_mask", args[self.place] if len(args) > self.place else None)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            self.tell(mask, True)
        elif self.outermost:
            self.tell(torch.empty(0), True)

def callers_local(name, attribute=None):
    """A local variable of the nearest caller that has one of that name (and attribute), or None:
    transformers tells a callback neither its list of callbacks nor the checkpoint it resumes."""
    frame = sys._getframe(2)
    while frame is not None:
        value = frame.f_locals.get(name)
        if name in frame.f_locals and (attribute is None or hasattr(value, attribute)):
            return value
        frame = frame.f_back
