"""A model's modules under its own names, and what stands in their places."""
import re
from collections.abc import Iterable
from contextlib import suppress

import torch.nn as nn

VERSION = "2.0.0"  # as in pyproject.toml

# Names under which wrappers hold a model and nobody else holds a layer: of torch.compile,
# checkpoint wrappers, FSDP and Lightning Fabric.
INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
# Classes that hold it as `module` or `_module`, a name that a layer may have, too. They are known
# by their names, so that their libraries need not be here.
WRAPPERS = {"DataParallel", "DistributedDataParallel", "AveragedModel",  # torch
            "DeepSpeedEngine", "AbstractGradSampleModule", "GradSampleModule",  # and Opacus
            "ModelEmaV2", "ModelEmaV3", "Float16Module", "ShardedDataParallel"}

def is_wrapper(module: nn.Module, part: str) -> bool:
    """Whether `module` is no part of the model, but a wrapper around its child `part`."""
    if part not in ("module", "_module"):
        return part in INNER
    if {c.__name__ for c in type(module).__mro__} & WRAPPERS:
        return True
    # A library's that is not known: it holds a whole model, which has a config, and that alone.
    alone = len(module._modules) == 1 and "config" not in vars(module)
    return alone and is_whole(module._modules[part])

def is_whole(module: nn.Module) -> bool:
    """Whether it is a whole model, in wrappers or not."""
    return hasattr(module, "config") or any(
        is_wrapper(module, part) and is_whole(m) for part, m in module._modules.items())

def unwrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} under the model's own names, whatever wrappers stand around it or its parts.
    "" is the model itself. ValueError if it is no torch model."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"A torch model is needed, and this is {type(model).__name__}.")
    modules = dict(model.named_modules())
    own = {"": ""}
    for name in list(modules)[1:]:  # parents first
        parent, _, part = name.rpartition(".")
        skip = is_wrapper(modules[parent], part)
        own[name] = own[parent] if skip else f"{own[parent]}.{part}".removeprefix(".")
    return {own[name]: m for name, m in modules.items()}

def match_names(names: Iterable[str], targets) -> list[str]:
    """Those of `names` that `targets` name: a list as in inject_lora or, as PEFT has it, one
    regular expression. Targets of any other type name nothing."""
    if isinstance(targets, str):
        with suppress(re.error):
            return [name for name in names if re.fullmatch(targets, name)]
    if isinstance(targets, list):
        return [name for name in names if any(f".{name}".endswith(f".{t}") for t in targets)]
    return []

def replace_modules(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Puts new[m] in the place of each module m. ValueError, with nothing changed, if one stands
    at several places of the model or at none, or is compiled by itself."""
    places = [(parent, part, m) for parent in model.modules() for part, m in parent._modules.items()
              if m in new]
    parts = ", ".join(sorted({part for _, part, _ in places}))
    if len(places) > len(new):
        raise ValueError(f"One of {parts} stands at several places of the model: a change of one "
                         "would change all.")
    if len(places) < len(new):
        raise ValueError("The linear layer is the model itself: put it into a module, such as "
                         "nn.Sequential, so that another can take its place.")
    if any(part == "_orig_mod" for _, part, _ in places):  # it would go on with the old one
        raise ValueError("A linear layer is compiled by itself, and would stay as it was compiled: "
                         "compile it afterwards.")
    done = []
    try:
        for parent, part, m in places:
            done.append((parent, part, m))
            setattr(parent, part, new[m])
    except BaseException:  # an interruption, too
        for parent, part, m in done:
            parent._modules[part] = m
        raise

def is_ours(module: nn.Module, name: str) -> bool:
    """Whether it is of nalora's class `name` or a subclass, that of before a reload too."""
    return any((c.__module__, c.__name__) == ("nalora", name) for c in type(module).__mro__)

def shapes(tensors: dict) -> dict:
    return {name: tuple(t.shape) for name, t in tensors.items()}
