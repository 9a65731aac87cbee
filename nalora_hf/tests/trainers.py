"""What the tests of the callback share: padded rows, trainers of a tiny model, what they saw."""
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from nalora import value_and_slope
from nalora_hf.tests.helpers import peft_llama

def padded_rows(count=24, length=12):
    """Rows of random tokens whose last ones are padding, of another share in each."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        tokens = torch.randint(3, 60, (length,), generator=generator)
        mask = (torch.arange(length) < 3 + (5 * i) % 9).long()
        rows.append({"input_ids": tokens, "labels": tokens, "attention_mask": mask})
    return rows

class Seen(Trainer):
    """A Trainer that keeps the batches it has trained on."""
    def training_step(self, model, inputs, *args, **kwargs):
        self.batches = [*getattr(self, "batches", []), {k: t.clone() for k, t in inputs.items()}]
        return super().training_step(model, inputs, *args, **kwargs)

def trainer_of(folder, *callbacks, model=None, rows=None, kind=Seen, **changes):
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
                 "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "seed": 0,
                 "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
                 "dataloader_pin_memory": False}
    rows = padded_rows() if rows is None else rows
    return kind(peft_llama() if model is None else model,
                TrainingArguments(str(folder), **{**arguments, **changes}),
                train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks))

class Lines(TrainerCallback):
    """Keeps the log lines as a callback that reports sees them, and the masks then."""
    def __init__(self, nalora_callback=None):
        self.lines = []
        self.masks = []
        self.nalora_callback = nalora_callback

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))
        nalora = self.nalora_callback and self.nalora_callback.nalora
        if nalora:
            self.masks.append(torch.cat([ffn.state.mask for ffn in nalora.ffns]))

class Interrupt(TrainerCallback):
    """Ctrl-C after that step."""
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt

def importance_of(model, steps, ema=0.9):
    """What NALoRA's importance should be if no weight has changed: {FFN: (F,)}. steps: [[batch]].
    The model stands beside the one that trained; each real token counts, and no other."""
    seen = {}
    importance = {}

    def note(name):
        return lambda act, inputs: seen.setdefault(name, []).append(inputs[0].flatten(0, 1))

    for name, module in model.named_modules():
        if hasattr(module, "act_fn"):
            module.act_fn.register_forward_pre_hook(note(name))
    for batches in steps:
        seen.clear()
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        real = torch.cat([batch["attention_mask"].flatten() for batch in batches]).bool()
        for name, z in seen.items():
            slope = value_and_slope(torch.nn.SiLU(), torch.cat(z)[real])[1].abs().mean(0)
            importance[name] = ema * importance.get(name, 0) + (1 - ema) * slope
    return importance
