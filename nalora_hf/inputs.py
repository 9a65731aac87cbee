"""What finetune.py is given, checked: a data file with its rows, a model with its tokenizer. Each
mistake is a ValueError of one sentence that says what was found and what is needed."""
import csv
import hashlib
import io
import json
import os
import random
import re
import socket
from importlib.util import find_spec
from pathlib import Path

import torch

from nalora_hf.steer import find_steered

# ---- the data: rows of text ----------------------------------------------------------------------
FORMATS = [("prompt", "completion"), ("instruction", "output"), ("messages",), ("text",)]
NEEDED = "prompt and completion, or instruction and output (and input), or messages, or text"
KINDS = {type(None): "null", int: "a number", float: "a number", bool: "true or false",
         str: "text", list: "a list", dict: "an object"}  # as JSON calls them

def read_rows(path):
    """(the columns of its format, rows with their text). ValueError that says what is wrong."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise ValueError(f"The data file {path} cannot be read: {e.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8, which JSON lines, a JSON list or a CSV "
                         "have to be.") from None
    rows = parse(text, path.suffix.lower() == ".csv", path)
    for i, row in enumerate(rows, 1):
        if type(row) is not dict:
            raise ValueError(f"Row {i} of {path} is {KINDS[type(row)]}, but an object with "
                             f"{NEEDED} is needed.")
    if not rows:
        raise ValueError(f"{path} holds no rows, but each is needed with {NEEDED}.")
    columns = next((c for c in FORMATS if rows[0].keys() >= set(c)), None)
    if columns is None:
        raise ValueError(f"{path} has the columns {', '.join(map(str, rows[0])) or '(none)'}, but "
                         f"{NEEDED} are needed.")
    return columns, [check_row(columns, row, f"row {i} of {path}") for i, row in enumerate(rows, 1)]

def parse(text, is_csv, where):
    """The rows as the file has them."""
    if is_csv:
        csv.field_size_limit(2**31 - 1)  # an answer may be long
        return list(csv.DictReader(io.StringIO(text, newline="")))
    whole = text.lstrip().startswith("[")
    values = []
    for i, part in enumerate([text] if whole else text.split("\n"), 1):
        try:
            values += [json.loads(part)] if part.strip() else []
        except (ValueError, RecursionError) as e:
            line = getattr(e, "lineno", 1) if whole else i
            raise ValueError(f"Line {line} of {where} is not valid JSON: one object on each line, "
                             "or one list in the whole file, is needed.") from None
    return values[0] if whole else values

def check_row(columns, row, where):
    """The row's text, under the names of its format."""
    if columns == ("messages",):
        return {"messages": check_messages(row.get("messages"), where)}
    texts = {c: check_text(row.get(c), f"{c} in {where}", c == "prompt") for c in columns}
    if "instruction" in columns:
        texts["input"] = check_text(row.get("input") or "", f"input in {where}", True)
    return texts

def check_messages(messages, where):
    if type(messages) is str:  # a cell of a CSV
        messages = parse(messages, False, f"messages in {where}")
    if type(messages) is not list or not all(type(m) is dict for m in messages):
        raise ValueError(f"messages in {where} is {KINDS[type(messages)]}, but a list of objects "
                         "with role and content is needed.")
    messages = [{key: check_text(m.get(key), f"{key} of message {i} in {where}")
                 for key in ("role", "content")} for i, m in enumerate(messages, 1)]
    if "assistant" not in [m["role"] for m in messages]:
        raise ValueError(f"messages in {where} has no message of the role assistant, so there is "
                         "no answer to learn.")
    return messages

def check_text(value, what, may_be_empty=False):
    if type(value) is not str:
        raise ValueError(f"{what} is {KINDS[type(value)]}, but text is needed.")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{what} is empty, but text is needed.")
    if value.encode(errors="ignore").decode() != value:
        raise ValueError(f"{what} holds half a character (a lone surrogate).")
    return value

def as_trl(row, tokenizer):
    """The row as TRL takes it: an instruction as messages, if the tokenizer has a chat template."""
    if "instruction" not in row:
        return row
    question = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
    if tokenizer.chat_template:
        return {"prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": row["output"]}]}
    return {"prompt": f"### Instruction:\n{question}\n\n### Response:\n",
            "completion": row["output"]}

def read_data(s):
    """(columns, rows to train on, rows held out, what tells whether the files have changed)."""
    columns, rows = read_rows(s["data"])
    digests = [hashlib.sha256(Path(s[name]).read_bytes()).hexdigest()
               for name in ("data", "eval_data") if s[name]]
    if s["eval_data"]:
        others, held_out = read_rows(s["eval_data"])
        if others != columns:
            raise ValueError(f"{s['data']} has {' and '.join(columns)}, but {s['eval_data']} has "
                             f"{' and '.join(others)}: both need the same columns.")
        return columns, rows, held_out, digests
    count = max(1, round(s["eval_share"] * len(rows)))
    if count >= len(rows):
        raise ValueError(f"{s['data']} holds {len(rows)} rows, of which --eval-share "
                         f"{s['eval_share']} leaves none to train on: more rows are needed.")
    chosen = set(random.Random(s["seed"]).sample(range(len(rows)), count))
    return (columns, [row for i, row in enumerate(rows) if i not in chosen],
            [row for i, row in enumerate(rows) if i in chosen], digests)

# ---- the model -----------------------------------------------------------------------------------
def check_model(s):
    """ValueError if the model cannot be loaded, or not safely. Chooses the dtype if none is."""
    path = Path(s["model"])
    if path.is_dir():
        check_folder(path)
    elif path.is_file() and open(path, "rb").read(4) != b"GGUF":
        raise ValueError(f"{path} is a file, but no GGUF file: --model takes a folder, a GGUF file "
                         "or a name on the hub.")
    elif path.is_file() and find_spec("gguf") is None:
        raise ValueError(f"{path} needs the package gguf: pip install gguf.")
    if path.exists() or not online():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's client waits in vain
    if s["load_in_4bit"] and find_spec("bitsandbytes") is None:
        raise ValueError("--load-in-4bit needs bitsandbytes: pip install bitsandbytes.")
    if s["load_in_4bit"] and (path.is_file() or s["merge"]):
        raise ValueError("--load-in-4bit goes neither with a GGUF file, which is expanded when it "
                         "is loaded, nor with --merge, which needs the whole weights.")
    gpu = torch.cuda.is_available()
    if s["dtype"] == "float16" and not gpu:
        raise ValueError("--dtype float16 needs a GPU: choose float32 or bfloat16.")
    modern = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    s["dtype"] = s["dtype"] or ("bfloat16" if modern else "float32")

def check_folder(path):
    files = [p.name for p in path.iterdir()]
    if "adapter_config.json" in files:
        raise ValueError(f"{path} holds an adapter, but --model takes a whole model: --merge "
                         "writes one.")
    if "config.json" not in files:
        raise ValueError(f"{path} holds no model: there is no config.json in it.")
    if not any(f.endswith(".safetensors") for f in files):
        other = [f for f in files if f.endswith((".bin", ".pt", ".pth", ".pkl", ".h5"))]
        raise ValueError(f"{path} holds {', '.join(other) or 'no weights'}, but weights as "
                         ".safetensors are needed, which run no code when they are loaded.")
    if not any(re.match(r"tokenizer\.|vocab|spiece|.*\.tiktoken$", f) for f in files):
        raise ValueError(f"{path} holds no tokenizer: put its tokenizer.json beside the model.")

def online():
    if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return True  # who knows
    try:
        socket.create_connection(("huggingface.co", 443), timeout=5).close()
    except OSError:
        return False
    return True

def load(s):
    """(model, tokenizer, what LoraConfig says of the targets). ValueError if they cannot be loaded,
    or not be trained with targets."""
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    path = Path(s["model"])
    where = {"pretrained_model_name_or_path": s["model"]}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    dtype = getattr(torch, s["dtype"])
    options = {}
    if s["load_in_4bit"]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        options["device_map"] = {"": PartialState().device}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            **where, **options, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, RuntimeError) as e:
        if not path.exists():
            raise ValueError(f"{path} is no file or folder here, and no model of that name with "
                             "weights as .safetensors could be fetched from the hub: check the "
                             "spelling and the network.") from None
        raise ValueError(f"{path} cannot be loaded: {str(e).strip()}") from None
    if path.is_file():  # a GGUF file's weights are expanded by now, but still called quantized
        model.is_quantized = False
        model.hf_quantizer = None
        del model.config.quantization_config
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {path} has no end-of-text token (eos_token), with "
                         "which each answer ends.")
    names = [name for name, m in model.named_modules() if type(m).__name__.startswith("Linear")
             or type(m).__name__ == "Conv1D"]
    stacks = [name for name, p in model.named_parameters() if p.dim() == 3]  # of experts
    targets = {"target_modules": [], "target_parameters": []}
    for target in s["targets"]:
        if target == "all-linear" or any(f".{n}".endswith(f".{target}") for n in names):
            targets["target_modules"].append(target)
        elif any(f".{n}".endswith(f".{target}") for n in stacks):
            targets["target_parameters"].append(target)
        else:
            raise ValueError(f"--targets {target} matches no linear layer; there are "
                             f"{', '.join(sorted({name.split('.')[-1] for name in names}))}.")
    if "all-linear" in targets["target_modules"]:
        targets["target_modules"] = "all-linear"
    return model, tokenizer, targets

def knows_roles(columns, tokenizer):
    """Whether data is messages and the chat template tells which tokens are the assistant's."""
    from trl import get_training_chat_template
    if columns != ("messages",):
        return False
    if not tokenizer.chat_template:
        raise ValueError("The model has no chat template, which messages need: take a chat model, "
                         "or data with prompt and completion.")
    try:
        get_training_chat_template(tokenizer)  # TRL knows, or can make, one that does
    except ValueError:
        return False
    return True

def check_trainer(s, trainer):
    """ValueError if what TRL has made cannot be trained."""
    parts = [trainer.train_dataset, trainer.eval_dataset]
    if not all(map(len, parts)):
        raise ValueError(f"No row to {'hold out' if len(parts[0]) else 'train on'} has an answer "
                         f"within {trainer.args.max_length} tokens: choose a larger --max-length.")
    token = max(max(ids) for part in parts for ids in part["input_ids"])
    if token >= trainer.model.get_input_embeddings().num_embeddings:
        raise ValueError(f"The tokenizer gives token {token}, which the model does not have: they "
                         "do not belong together.")
    if s["method"] != "lora":
        try:
            find_steered(trainer.model, s["gate"], None)
        except ValueError as e:
            text = str(e).replace("gate=...", "--gate")
            text = re.sub(r"target_parameters=\['(.*)', '(.*)'\] in its LoraConfig",
                          r"--targets all-linear \1 \2", text)
            raise ValueError(f"NA-LoRA cannot steer this model. {text}") from None
