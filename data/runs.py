"""What train_tiny.py needs besides, and a student may skip: the folder of a run, its checkpoints,
what is printed and drawn. Every file is written whole or not at all, and what was trained after the
last checkpoint is trained again alike: a run may be killed at any time, and --resume ends
bit-identical."""
import copy
import hashlib
import io
import json
import math
import platform
import statistics
import sys
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path

import torch

from data import problems
from data.problems import BASE, DATA
from nalora import Llama, load_adapter, write_files

# ---- the folder and its settings -----------------------------------------------------------------

def dashed(name):
    return "--" + name.replace("_", "-")

def check_ranges(c):
    """ValueError names the setting of a Config that is out of its range."""
    for names, low, high, words in (
            ("threads", 1, 1025, "from 1 to 1024"),
            ("steps batch_size eval_every train_size", 1, 2**31, "of at least 1"),
            ("seed weight_decay test_size", 0, 2**62, "of at least 0, and not that large"),
            ("grad_clip lr alpha", math.ulp(0), math.inf, "above 0"),
            ("warmup beta1 beta2 momentum", 0, 1, "in [0, 1)")):
        for name in names.split():
            value = getattr(c, name)
            if value is not None and not low <= value < high:
                raise ValueError(f"{dashed(name)} is {value}: give a number {words}.")

def check_base(folder):
    """ValueError if the folder of --base holds no model that train_tiny.py takes."""
    config = folder / "config.json"
    llama = config.is_file() and read_json(config).get("model_type", "llama") == "llama"
    if not llama or not (folder / "model.safetensors").is_file():
        raise ValueError(f"--base {folder} is no folder with config.json and model.safetensors of "
                         "a Llama: for models of the hub, GGUF, .bin or sharded weights and other "
                         "architectures use nalora_hf, see nalora_hf/README.md.")

def best_device(name=None):
    """The device of that name, or the best there is. ValueError if it is not there."""
    devices = {"cuda": torch.cuda, "mps": torch.backends.mps}
    there = [device for device in devices if devices[device].is_available()] + ["cpu"]
    if name and name not in there:
        raise ValueError(f"The device {name} is not available here: choose {' or '.join(there)}.")
    return name or there[0]

def read_json(path):
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None

def to_json(value):
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()

def as_saved(c):
    """The settings of a Config as they come back from config.json."""
    return json.loads(json.dumps(asdict(c)))

def write_json(path, value):
    write_files(path.parent, {path.name: to_json(value)})

def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()

def digest(c, files):
    """{file: SHA-256} of the data that a run read, and of its base."""
    if c.method != "pretrain":
        files = [*files, Path(c.base or BASE) / "model.safetensors"]
    return {path.name: sha256(path) for path in files}

def begun(out):
    """Whether the folder holds a run: an empty config.json is that of a run killed in claim()."""
    path = out / "config.json"
    return path.is_file() and path.stat().st_size > 0

def refuse_taken(out):
    raise ValueError(f"{out} already holds a run: add --resume to go on with it or see it again, "
                     f"or --out {out}-2 to train anew.")

def claim(out, settings, resume):
    """Makes the folder this run's own and writes config.json. ValueError if it is another's."""
    if resume and begun(out):
        check_same(out, settings)
        return
    out.mkdir(parents=True, exist_ok=True)
    try:
        open(out / "config.json", "x").close()          # of two at once, one fails here
    except FileExistsError:
        if begun(out) or not resume:
            refuse_taken(out)
    write_json(out / "config.json", settings)

def check_same(out, settings):
    """ValueError if config.json contradicts one of the settings. Returns all that it holds."""
    saved = read_json(out / "config.json")
    for name, value in settings.items():
        if name not in saved or saved[name] != value:
            raise ValueError(f"{dashed(name)} {value} contradicts the run in {out}, "
                             f"which has {saved.get(name)}: leave it out, or choose another --out.")
    return saved

def read_run(out, config_class):
    """What config.json of a run holds. ValueError if there is none, or of another version."""
    if not begun(out):
        raise ValueError(f"{out} holds no run: train one, or name its folder with --out.")
    saved = read_json(out / "config.json")
    names = {f.name for f in fields(config_class)}
    known = set(saved) <= names if saved.get("method") == "all" else set(saved) == names
    if not known:
        raise ValueError(f"{out} holds a run of another version of this program.")
    return saved

# ---- records and checkpoints ---------------------------------------------------------------------

def states(run):
    """{FFN: its State} of NA-LoRA."""
    return {ffn.name: ffn.state for ffn in run.nalora.ffns} if run.nalora else {}

def layer_records(now, before):
    """What metrics.jsonl keeps of states(run). density: share of B_gate's rows that move; turnover:
    share of the mask that changed since the last record, None at the first."""
    records = {}
    for name, state in now.items():
        numbers = {key: float(getattr(state, key)) for key in ("k_hat", "occupancy", "scale")}
        record = {key: x if math.isfinite(x) else None for key, x in numbers.items()}
        record["density"] = state.mask.float().mean().item()
        changed = before and (state.mask != before[name].mask)
        record["turnover"] = before and changed.float().mean().item()
        records[name] = record
    return records

def progress(record, steps):
    """A line such as "step 50/400  loss 0.68  val_loss 0.12  k_hat 0.98 to 1.06 ..."."""
    line = f"step {record['step']:4d}/{steps}"
    for key in ("loss", "val_loss"):
        line += f"  {key} {record[key]:.4f}" if key in record else ""
    if "layers" in record:
        layers = record["layers"].values()
        for key in ("k_hat", "scale"):
            values = [layer[key] for layer in layers if layer[key] is not None] or [math.nan]
            line += f"  {key} {min(values):.2f} to {max(values):.2f}"
        line += f"  rows {statistics.mean(layer['density'] for layer in layers):.0%}"
    return line

def save_checkpoint(run, out, records):
    """metrics.jsonl, and checkpoint.pt with all that the next step depends on."""
    state = {"config": run.settings, "digest": run.digest, "records": records,
             "model": {name: p.detach() for name, p in run.trainable.items()},
             "optimizer": run.optimizer.state_dict(),
             "nalora": run.nalora and run.nalora.state_dict()}
    file = io.BytesIO()
    torch.save(state, file)
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    content = file.getvalue() + hashlib.sha256(file.getvalue()).digest()
    write_files(out, {"metrics.jsonl": lines.encode(), "checkpoint.pt": content})

def read_records(out):
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]

def load_checkpoint(run, out):
    """Puts the run into the state of its last checkpoint. Returns its records; [] without one."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            raise ValueError("its content is not what was written")
        state = torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
        if state["config"] != run.settings:
            raise ValueError("it was made with other settings")
        for name, now in run.digest.items():
            if state["digest"].get(name) != now:
                raise ValueError(f"{name} has changed since")
        if set(state["model"]) != set(run.trainable):
            raise ValueError("its parameters have other names")
        run.model.load_state_dict(state["model"], strict=False)     # what is frozen is not in it
        run.optimizer.load_state_dict(state["optimizer"])
        if run.nalora:
            run.nalora.load_state_dict(state["nalora"])
        return state["records"]
    except Exception as e:                              # torch raises many kinds
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} is no checkpoint of this run: {why}") from None

def save_model(model, directory, dtype=None):
    """Writes a whole Llama as a Hugging Face checkpoint, in `dtype` if given."""
    if dtype:
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(directory)

# ---- what is asked and shown of finished runs ----------------------------------------------------

COLUMNS = {"exact match": "test_exact_match", "val loss": "val_loss",
           "equations": "arithmetic_accuracy", "trainable": "trainable_parameters",
           "ms/step": "step_ms", "train s": "train_seconds"}

def count_parameters(run):
    return {"trainable_parameters": sum(p.numel() for p in run.trainable.values()),
            "total_parameters": sum(p.numel() for p in run.model.parameters())}

def describe(run):
    """The first lines of a run."""
    c = run.config
    trainable, total = count_parameters(run).values()
    base = c.base or ("data/pretrain.txt" if c.method == "pretrain" else "data/base")
    steered = f", {len(run.nalora.ffns)} FFNs are steered" if run.nalora else ""
    return (f"{c.method} on {base}: {trainable:,} of {total:,} parameters train "
            f"({trainable / total:.1%}){steered}\n{c.steps} steps of {c.batch_size}, {c.optimizer} "
            f"at {c.lr:g}, seed {c.seed}, {c.device}, {c.threads} threads")

def machine():
    return {"threads": torch.get_num_threads(), "machine": platform.machine(),
            "python": platform.python_version(), "torch": torch.__version__}

def print_table(runs):
    """{method: summary} as a table."""
    print(f"\n{'method':10}" + "".join(f"{title:>13}" for title in COLUMNS))
    for method, summary in runs.items():
        print(f"{method:10}" + "".join(cell(summary[key]) for key in COLUMNS.values()))

def cell(value):
    text = f"{value:,}" if isinstance(value, int) else "-" if value is None else f"{value:.3g}"
    return f"{text:>13}"

def sample(out, config, prompt):
    """Prints what the trained model in `out` answers to the prompt, or to three test problems."""
    if config["method"] == "all":
        raise ValueError(f"{out} holds several runs: name one of them, such as --out {out}/nalora.")
    if not (out / "summary.json").exists():
        raise ValueError(f"{out} holds no finished run: go on with it (--resume --out {out}), or "
                         "name another with --out.")
    if config["method"] in ("pretrain", "full"):
        model = Llama.from_pretrained(out / "model")
    else:
        path = Path(config["base"] or BASE) / "model.safetensors"
        if sha256(path) != read_json(out / "summary.json")["digest"][path.name]:
            raise ValueError(f"{path} has changed since {out} was trained on it.")
        model = Llama.from_pretrained(path.parent)
        load_adapter(model, out / "adapter")
    prompts = [prompt.rstrip() + " "]                   # as every prompt in data/ ends
    if not prompt:
        prompts = [p["prompt"] for p in problems.read_problems(DATA / "test.jsonl")[:3]]
    answers = problems.solve(model.eval(), problems.load_tokenizer(), prompts)
    for text, answer in zip(prompts, answers):
        print(f"{text.strip()}\n{answer}\n")

# ---- figures -------------------------------------------------------------------------------------

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]

def new_figure(columns, width=9.0, height=3.2, rows=1):
    """(figure, its axes): one row as a list, several as an array."""
    import matplotlib.figure                            # without pyplot, which looks for a display
    matplotlib.rcParams.update({"axes.prop_cycle": matplotlib.cycler(color=COLOURS),
                                "axes.spines.top": False, "axes.spines.right": False,
                                "font.size": max(9, width), "axes.titlesize": "medium"})
    figure = matplotlib.figure.Figure((width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes[0] if rows == 1 else axes

def save_figure(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    write_files(path.parent, {path.name: picture.getvalue()})

def draw_loss(runs, path):
    """Training and validation loss of {label: records}, from step 0 on."""
    figure, (ax,) = new_figure(1, width=6.5, height=3.6)
    for colour, (label, records) in zip(COLOURS, runs.items()):
        steps = [r["step"] for r in records]
        ax.plot(steps, [r["val_loss"] for r in records], color=colour, label=f"{label}, validation")
        middles = [(a + b) / 2 for a, b in pairwise(steps)]     # the loss is a mean between records
        ax.plot(middles, [r["loss"] for r in records[1:]], ":", color=colour,
                label=f"{label}, training")
    ax.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    ax.legend(frameon=False)
    save_figure(figure, path)

def draw_layers(records, path):
    """k_hat, step scale, share of positive gates and change of the mask of each FFN over steps."""
    records = [r for r in records if "layers" in r]
    steps = [r["step"] for r in records]
    names = list(records[0]["layers"])
    titles = {"k_hat": r"effective homogeneity $\hat{k}$", "scale": "step scale",
              "occupancy": "share of gates z > 0",
              "turnover": "share of the mask changed since the last point"}
    figure, axes = new_figure(2, width=9, height=6, rows=2)
    for ax, (key, title) in zip(axes.flat, titles.items()):
        for i, name in enumerate(names):
            colour = COLOURS[i % len(COLOURS)] if len(names) <= 8 else f"{i / len(names):.2f}"
            values = [r["layers"][name][key] for r in records]
            ax.plot(steps, values, ".-", color=colour, label=f"layer {i}")
        ax.set(xlabel="step", title=title)
        if key in ("k_hat", "scale"):
            ax.axhline(1, color="0.7", lw=0.8, zorder=0)
        else:
            ax.set_ylim(0, 1.03)
    axes.flat[0].legend(frameon=False, fontsize="small", ncols=1 + len(names) // 8)
    save_figure(figure, path)

def draw(function, what, path):
    """Draws a figure that is not there yet. One that fails costs a line, not the run."""
    try:
        if not path.exists():
            function(what, path)
    except Exception as e:                              # matplotlib raises many kinds
        print(f"{path} was not drawn: {' '.join(str(e).split())}", file=sys.stderr)

def draw_figures(label, records, out):
    draw(draw_loss, {label: records}, out / "loss.png")
    if "layers" in records[-1]:
        draw(draw_layers, records, out / "nalora.png")
