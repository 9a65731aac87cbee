"""A model's modules under its own names."""
import re
from contextlib import suppress

import torch.nn as nn

VERSION = "2.0.0"  # as in pyproject.toml

def unwrapped_modules(model):
    """{name: module} under the model's own names, whatever wrappers stand around its parts: of
    torch.compile, DDP, FSDP or activation checkpointing."""
    wrapped = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    modules = dict(model.named_modules())
    own = {"": ""}
    for name in list(modules)[1:]:  # parents first
        parent, _, part = name.rpartition(".")
        skip = part in wrapped or isinstance(modules[parent], parallel)
        own[name] = own[parent] if skip else f"{own[parent]}.{part}".removeprefix(".")
    return {own[name]: m for name, m in modules.items()}

def match_names(names, targets):
    """Those of `names` that `targets` name: a list as in inject_lora or, as PEFT has it, one
    regular expression."""
    if isinstance(targets, str):
        with suppress(re.error):
            return [name for name in names if re.fullmatch(targets, name)]
    if isinstance(targets, list):
        return [name for name in names if any(f".{name}".endswith(f".{t}") for t in targets)]
    return []
