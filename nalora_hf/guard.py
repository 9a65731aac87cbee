"""Which optimizers are steered, which ranks train together, and what goes past NALoRA."""
import sys
import warnings

import torch
import torch.nn as nn

from nalora import widen

class Kept:
    """Two copies of an optimizer's parameters, in float32 or wider: left after its last step, and
    found before this one, which the step is blended into."""
    def __init__(self, values):
        self.kinds = kinds_of(values)
        self.rounded = any(t.dtype != widen(t).dtype for t in values)
        self.left = Copies(values)
        self.found = Copies(values)
        self.noted = False  # until the first pass, or step, parameters may be loaded

class Copies:
    def __init__(self, values):
        places = {}  # {(dtype, device): [index]}
        for i, t in enumerate(values):
            places.setdefault((widen(t[:0]).dtype, t.device), []).append(i)
        self.tensors = [None] * len(values)  # shaped like values
        self.flat = []  # one of each place
        for (dtype, device), indices in places.items():
            sizes = [values[i].numel() for i in indices]
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            for i, part in zip(indices, flat.split(sizes)):
                self.tensors[i] = part.view_as(values[i])
            self.flat.append(flat)

    def take(self, values):
        torch._foreach_copy_(self.tensors, values)

def kinds_of(values):
    return [(t.dtype, t.device) for t in values]

class Guard:
    """Notices that something else than a step moved the LoRA parameters. Nothing waits for the
    device: what it found is copied, and looked at whenever it has come."""
    def __init__(self, device):
        self.moved = torch.zeros((), device=device)
        self.told = torch.zeros((), pin_memory=device.type == "cuda")

    def compare(self, kept):
        for left, found in zip(kept.left.flat, kept.found.flat):
            moved = (left - found).nan_to_num().any().to(self.moved)
            self.moved.copy_(torch.maximum(moved, self.moved))
        self.told.copy_(self.moved, non_blocking=True)
        if self.told.tolist():
            self.moved.zero_()
            warnings.warn("Something else moved the LoRA parameters after NALoRA's step, such as "
                          "another optimizer or one wrapped around this: give NALoRA the optimizer "
                          "whose step() moves them.")

STEP = torch.optim.Optimizer.profile_hook_step(print).__code__  # what torch wraps each step() in

def is_nested(optimizer):
    """Whether this step() was called by another one of this optimizer, as subclasses do: torch's
    hooks stand around both."""
    calls = 0
    frame = sys._getframe()
    while frame is not None:
        calls += frame.f_code is STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return calls > 1

def has_stepped(optimizer, parameters):
    """Whether its state is of a run. Adagrad has one before its first step, too."""
    states = [optimizer.state.get(p) for p in parameters]
    return any(state and state.get("step", 1) != 0 for state in states)

def usable_optimizers(given):
    """[torch.optim.Optimizer], each with a step() that torch's hooks stand around."""
    optimizers = list(given) if isinstance(given, (list, tuple)) else [given]
    optimizers = [o.optimizer if type(o).__module__.startswith("accelerate.") else o
                  for o in optimizers]
    for o in optimizers:
        kind = type(o).__name__
        if not (hasattr(o, "_optimizer_step_post_hooks") and hasattr(type(o).step, "hooked")):
            raise ValueError(f"NALoRA hooks the step() of a torch.optim.Optimizer, which {kind} "
                             "is not, or it skips torch's __init__: give the optimizer within, if "
                             "all that moves the parameters is its step().")
        if hasattr(o, "eval"):  # such as schedule-free ones
            raise ValueError(f"{kind} evaluates at averages of its own, which would move resting "
                             "rows: use another optimizer.")
    return optimizers

def parameters_by_optimizer(optimizers, ffns):
    """{optimizer: [(parameter, its FFN)]} of what trains."""
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]
             if p.requires_grad}
    for ffn in ffns:
        for p in ffn.parameters:
            if id(p) not in owner and (p.requires_grad or any(p is B for B in ffn.B_gates)):
                raise ValueError(f"The optimizer does not hold the LoRA parameters of {ffn.name}, "
                                 "or they are frozen: make it after LoRA is in place (of PEFT with "
                                 "is_trainable=True), or give a list of all that step together.")
    return {o: [(p, ffn) for ffn in ffns for p in ffn.parameters if owner.get(id(p)) is o]
            for o in optimizers}

def distributed():
    return torch.distributed.is_available() and torch.distributed.is_initialized()

def this_rank():
    return torch.distributed.get_rank() if distributed() else 0

def find_process_groups(model, optimizer, ffns):
    """([the ranks that train one model together], the DDP around it or None)."""
    if not distributed() or torch.distributed.get_world_size() == 1:
        return [], None
    for m in model.modules():
        if isinstance(m, nn.parallel.DistributedDataParallel):
            return [m.process_group], m
    mesh = getattr(ffns[0].B_gate, "device_mesh", None)
    if mesh is not None:  # FSDP2's
        return [mesh.get_group(i) for i in range(mesh.ndim)], None
    first = optimizer[0] if isinstance(optimizer, (list, tuple)) else optimizer
    if getattr(getattr(first, "accelerator_state", None), "num_processes", 1) > 1:
        return [torch.distributed.group.WORLD], None
    warnings.warn("torch.distributed is on, but neither DistributedDataParallel nor fully_shard is "
                  "around the model: NALoRA decides on each rank by its own batches. If the ranks "
                  "train one model, wrap it first, or set nalora.process_groups.")
    return [], None
