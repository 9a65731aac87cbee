"""Fine-tunes your model on your data with LoRA or NA-LoRA, by TRL's SFTTrainer and PEFT.

    python -m nalora_hf.finetune --model FOLDER --data rows.jsonl --method both --out runs/mine
    python -m nalora_hf.finetune --resume runs/mine         goes on after an interruption
    accelerate launch -m nalora_hf.finetune --model ...     on several GPUs; torchrun does, too

A row of --data has prompt and completion, or instruction, output and perhaps input, or messages, or
text. The folder --out gets run.json (settings, losses), adapter/ (PEFT's) and the checkpoints; with
--method both, in lora/ and nalora/."""
import argparse
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from nalora_hf import NALoRACallback, NALoRAConfig, read_json, write_files
from nalora_hf.adapters import method_record
from nalora_hf.inputs import as_trl, check_model, check_trainer, knows_roles, load, read_data

RANK = int(os.environ.get("RANK", 0))  # of torchrun and accelerate launch: rank 0 prints and writes

def say(*lines):
    if RANK == 0:
        print(*lines, sep="\n", flush=True)

# ---- TRL's trainer -------------------------------------------------------------------------------
def build(s, method, columns, sets, note_base):
    """(TRL's trainer, the callback) of one method. note_base is called with the base's metrics."""
    import jinja2  # and the rest, not before HF_HUB_OFFLINE is set and the data has been read
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import TrainerCallback, logging
    from trl import SFTConfig, SFTTrainer
    disable_progress_bars()
    if RANK != 0:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    args = SFTConfig(
        output_dir=tempfile.gettempdir(),  # until the run may write
        num_train_epochs=s["epochs"], max_steps=s["steps"] or -1, learning_rate=s["lr"],
        lr_scheduler_type="cosine", per_device_train_batch_size=s["batch_size"],
        per_device_eval_batch_size=s["batch_size"], gradient_accumulation_steps=s["accumulate"],
        bf16=s["dtype"] == "bfloat16", fp16=s["dtype"] == "float16", seed=s["seed"],
        data_seed=s["seed"], save_steps=0.1, save_total_limit=2, report_to="none",
        ddp_find_unused_parameters=False, use_cpu=not torch.accelerator.is_available())
    model, tokenizer, targets = load(s)
    args.max_length = min(s["max_length"], getattr(model.config, "max_position_embeddings", 2**31))
    args.assistant_only_loss = knows_roles(columns, tokenizer)
    answers = len(columns) == 2 or args.assistant_only_loss
    lora = LoraConfig(r=s["rank"], lora_alpha=s["alpha"], task_type="CAUSAL_LM", **targets)
    callback = NALoRACallback(NALoRAConfig(keep=s["keep"]), s["gate"])
    first = TrainerCallback()
    first.on_evaluate = lambda _, state, *__, **seen: state.global_step or note_base(**seen)
    train, held_out = (Dataset.from_list([as_trl(row, tokenizer) for row in rows]) for rows in sets)
    try:
        trainer = SFTTrainer(model, args, train_dataset=train, eval_dataset=held_out,
                             processing_class=tokenizer, peft_config=lora,
                             callbacks=[first] + [callback] * (method == "nalora"))
    except jinja2.TemplateError as e:
        raise ValueError(f"The model's chat template refuses the messages: {e}") from None
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.data = p.data.float()  # TRL rounds them to bfloat16 over a base in 4 bit
    check_trainer(s, trainer)
    used = len(trainer.train_dataset), len(trainer.eval_dataset)
    say(f"{method}: {used[0]} rows to train on, {used[1]} held out, "
        f"{len(train) + len(held_out) - sum(used)} left out, as no answer is within --max-length; "
        f"loss on {'the answers' if answers else 'all tokens'}")
    return trainer, callback

# ---- a run ---------------------------------------------------------------------------------------
def execute(out, record):
    """Trains what `record`, the content of run.json, does not have yet."""
    s, losses = record["settings"], record["eval_loss"]
    columns, *sets, digests = read_data(s)
    if record.setdefault("sha256", digests) != digests:
        raise ValueError(f"The data has changed since the run in {out} began: take another --out.")
    check_model(s)

    def note_base(metrics, **kwargs):
        losses.setdefault("base", finite(metrics["eval_loss"]))
        say(f"eval loss of the base: {shown(losses['base'])}")
        save(out, record)

    methods = ["lora", "nalora"] if s["method"] == "both" else [s["method"]]
    for method in (m for m in methods if m not in losses):
        trainer, callback = build(s, method, columns, sets, note_base)
        trainer.accelerator.wait_for_everyone()  # all ranks have seen that --out is free
        folder = out / method if len(methods) > 1 else out
        trainer.args.output_dir = str(folder)
        save(out, record)
        whole = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
        last = max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)
        trainer.args.eval_on_start = last is None  # an evaluate() before train() would lose DDP
        trainer.train(resume_from_checkpoint=last and str(last))
        losses[method] = finite(trainer.evaluate()["eval_loss"])
        if method == "nalora":
            k_hat = [ffn.state.k_hat.nanmean().item() for ffn in callback.nalora.ffns]
            record["nalora"] = {"steps": callback.nalora.steps, "k_hat": k_hat}  # of experts: mean
        if RANK == 0:
            write_model(s, trainer, callback.nalora, folder)
        save(out, record)
    say(*summary(losses, s["lr"]), f"All is in {out}.")

def write_model(s, trainer, nalora, folder):
    """adapter/ and, with --merge, merged/, each with the tokenizer and nalora.json."""
    model = trainer.model
    model.peft_config["default"].base_model_name_or_path = s["model"]
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    if s["merge"]:
        model.merge_and_unload().save_pretrained(folder / "merged")
    for name in ["adapter"] + ["merged"] * s["merge"]:
        trainer.processing_class.save_pretrained(folder / name)
        write_files(folder / name, {"nalora.json": method_record(nalora)})

def finite(loss):
    return loss if math.isfinite(loss) else None

def shown(loss):
    return "no number" if loss is None else f"{loss:.4f}"

def summary(losses, lr):
    """The lines that a run ends with."""
    base = losses["base"]
    yield f"{'':8}{'eval loss':>10}{'minus base':>12}\n{'base':8}{shown(base):>10}"
    for method, loss in list(losses.items())[1:]:
        change = "" if None in (loss, base) else f"{loss - base:+.4f}"
        yield f"{method:8}{shown(loss):>10}{change:>12}"
        if loss is None or base is not None and loss > base:
            yield (f"The eval loss of {method} ended above the base's: try a smaller --lr, such as "
                   f"{lr / 4:g}.")

def save(out, record):
    if RANK == 0:
        write_files(out, {"run.json": record})

# ---- the command line ----------------------------------------------------------------------------
def number(kind, least, most):
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            what = {int: "whole number", float: "number"}[kind]
            raise argparse.ArgumentTypeError(f"{text} is no {what} from {least:g} to {most:g}")
        return value
    return read

COUNT = {"type": number(int, 1, 10**9)}
FLAGS = {  # name: (default, help, how argparse reads it)
    "model": (None, "a folder, a GGUF file or a name on the hub", {}),
    "data": (None, "JSON lines, a JSON list or a CSV", {}),
    "eval_data": (None, "rows held out, a file like --data (default: a share of --data)", {}),
    "eval_share": (0.1, "share of --data held out", {"type": number(float, 1e-6, 0.99)}),
    "method": ("nalora", "both: one after the other", {"choices": ["lora", "nalora", "both"]}),
    "epochs": (3.0, "passes over the data", {"type": number(float, 1e-6, 1e6)}),
    "steps": (None, "optimizer steps, instead of --epochs", COUNT),
    "batch_size": (4, "rows of a batch, on each device", COUNT),
    "accumulate": (1, "batches of a step", COUNT),
    "max_length": (1024, "tokens of a row; what is longer is cut", COUNT),
    "lr": (2e-4, "peak learning rate", {"type": number(float, 1e-12, 100)}),
    "rank": (8, "of LoRA", COUNT),
    "alpha": (16.0, "the update is scaled by alpha / rank", {"type": number(float, 1e-6, 1e6)}),
    "targets": (["all-linear"], "layers, or experts' weights, with LoRA, by name", {"nargs": "+"}),
    "gate": (["gate_proj", "gate_up_proj"], "layers in front of an activation", {"nargs": "+"}),
    "keep": (0.5, "share of the gates that NA-LoRA moves", {"type": number(float, 1e-6, 1)}),
    "seed": (0, "of the held-out rows, their order and LoRA", {"type": number(int, 0, 2**32 - 1)}),
    "dtype": (None, "of the base (default: bfloat16 on GPUs that have it, else float32)",
              {"choices": ["float32", "bfloat16", "float16"]}),
    "load_in_4bit": (False, "the base in 4 bit, by bitsandbytes", {"action": "store_true"}),
    "merge": (False, "also write merged/, the whole model", {"action": "store_true"})}

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}.")

def dashed(name):
    return "--" + name.replace("_", "-")

def command_line():
    parser = Parser(prog="python -m nalora_hf.finetune", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    for name, (default, help, how) in FLAGS.items():
        help += f" (default: {default})" * bool(default)
        parser.add_argument(dashed(name), help=help, **how)
    parser.add_argument("--out", help="folder of results (default: runs/METHOD)")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder")
    return parser

def begin(given):
    """(folder, what its run.json holds, or will)."""
    if "resume" in given:
        out = Path(given.pop("resume"))
        if given:
            raise ValueError(f"With --resume {out} goes on as it began: leave out "
                             f"{dashed(next(iter(given)))}.")
        if not (out / "run.json").is_file():
            raise ValueError(f"{out} holds no run: there is no run.json in it.")
        record = read_json(out / "run.json")
        if record.get("settings", {}).keys() != FLAGS.keys():
            raise ValueError(f"{out} holds a run of another version of this program.")
        return out, record
    for name in ("model", "data"):
        if name not in given:
            raise ValueError(f"{dashed(name)} is missing: {FLAGS[name][1]}.")
    if "steps" in given and "epochs" in given:
        raise ValueError("--steps and --epochs exclude each other: leave one out.")
    if given.get("method") == "lora" and "keep" in given:
        raise ValueError("--keep has no effect with --method lora: leave it out.")
    out = given.pop("out", None)
    s = {name: default for name, (default, *_) in FLAGS.items()} | given
    out = Path(out or f"runs/{s['method']}")
    if (out / "run.json").exists():
        raise ValueError(f"{out} already holds a run: go on with --resume {out}, or begin anew "
                         "in another --out.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and is no empty folder: choose another --out.")
    for name in ("model", "data", "eval_data"):
        if s[name] and Path(s[name]).exists():
            s[name] = str(Path(s[name]).resolve())  # so that --resume finds it from anywhere
    return out, {"settings": s, "eval_loss": {}}

def main(argv=None):
    """The exit code: 0, or 2 with one sentence for input that cannot be used; 130 at Ctrl-C."""
    try:
        out, record = begin(vars(command_line().parse_args(argv)))
        execute(out, record)
        return 0
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as e:
        text = " ".join(str(e).split())
        if isinstance(e, (MemoryError, RuntimeError)):
            text = "The memory does not suffice: try a smaller --batch-size or --max-length."
        if RANK == 0:
            print(f"nalora_hf.finetune: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"\nInterrupted: --resume {out} goes on from the last checkpoint.")
        return 130

if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' talk to each other
    sys.exit(main())
