"""NALoRA in transformers' Trainer and in TRL's."""
import torch
from torch import Tensor

from nalora_hf.families import GATES
from nalora_hf.steer import NALoRA

def NALoRACallback(config=None, gate=GATES, act=None):
    """A callback for transformers' Trainer and TRL's: `callbacks=[NALoRACallback()]` makes NALoRA
    with the model and the optimizer that they have built, once training begins, and shows it the
    attention mask of each batch. Its state is in the trainer's checkpoints, in optimizer.pt."""
    from inspect import signature
    from transformers import TrainerCallback
    class Callback(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            before = getattr(getattr(optimizer, "optimizer", optimizer), "nalora", None)
            if before:  # a training with this optimizer was interrupted
                before.remove()
                optimizer.param_groups[0]["nalora"] = before.state_dict()
            self.nalora = NALoRA(model, optimizer, config, gate, act)
            if self.nalora._handles:  # else it is plain LoRA
                self.nalora._handles += [
                    m.register_forward_pre_hook(self.before_pass, with_kwargs=True)
                    for m in self.nalora._watch.whole]

        @torch.compiler.disable
        def before_pass(self, module, args, kwargs):
            given = signature(module.forward).bind_partial(*args).arguments | kwargs
            mask = given.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2:
                self.nalora.token_mask = mask
            elif len(self.nalora._watch.waiting) == 1:  # the outermost module
                self.nalora.token_mask = None

        def on_train_end(self, *args, **kwargs):
            self.nalora.remove()

    return Callback()
