"""NALoRA on any model, with any optimizers, on several ranks: the method of nalora.NALoRA, whose
FFNs are observed, decided and blended together, and a guard."""
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
import torch.nn as nn
from torch.optim import Optimizer

import nalora
from nalora import GateSums, NALoRAConfig, State, widen
from nalora_hf.experts import find_experts
from nalora_hf.families import GATES, find_ffns
from nalora_hf.guard import (Guard, Kept, find_process_groups, has_stepped, is_nested, kinds_of,
                             parameters_by_optimizer, this_rank, usable_optimizers)
from nalora_hf.modules import is_ours, unwrapped_modules
from nalora_hf.watch import drop_idle_hooks

SAMPLES = 32 * 2**20  # bytes of gates that are held at most; stacked to be observed, twice that

class NALoRA(nalora.NALoRA):
    """Turns a LoRA training loop into NA-LoRA: make one after the optimizer, change nothing else.
    It steers every FFN whose gate carries LoRA, ours or PEFT's, and says in one line how many.
    optimizer: one, or a list of those that step together. gate: name or names of the linear layer
    in front of an activation ("fc1", "mlp.c_fc"); one that holds gate and up at once will do. act:
    the activation, or its name, of FFNs that have none as attribute. With padded batches set
    `token_mask` (batch, seq), nonzero for real tokens (of an encoder-decoder: the encoder's),
    before each pass. Make it once the model is wrapped (DDP, FSDP2) and before the first compiled
    call. ValueError if no gate carries LoRA, or an optimizer lacks it or averages."""
    def __init__(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer],
                 config: NALoRAConfig | None = None, gate: str | Sequence[str] = GATES,
                 act: Callable | str | None = None) -> None:
        check_arguments(model, optimizer, config)
        self.config = config or NALoRAConfig()
        self.token_mask = None
        self.steps = 0
        self.ffns, self.said = find_steered(model, gate, act)
        self.optimizers = usable_optimizers(optimizer)
        self.steered = parameters_by_optimizer(self.optimizers, self.ffns)
        self.process_groups, self.ddp = find_process_groups(model, optimizer, self.ffns)
        kinds = {}
        for ffn in self.ffns:
            kinds.setdefault(ffn.kind(), []).append(ffn)
        self.groups = [ffns[0].group_class(ffns) for ffns in kinds.values()]
        self.order = torch.zeros(1, device="cpu")  # see the operation
        self.held = 0  # bytes of samples
        self.seen = False  # whether a pass was since the last step
        self.passes = 0  # of the first FFN, since then
        self.dry = 0  # steps in a row before which none was
        self.fitted = True  # whether the token mask was of use since then
        with torch.no_grad():
            self.kept = {o: Kept([self.value(p) for p, _ in self.steered[o]])
                         for o in self.optimizers}  # their parameters around the last step
        self.stepping = False
        self.begins = True  # no step was taken yet
        self.guard = Guard(self.ffns[0].B_gate.device)
        self.handles = []
        for o in self.optimizers:
            self.handles += [o.register_step_pre_hook(self.before_step),
                             o.register_step_post_hook(self.after_step)]
        for ffn in self.ffns:
            self.attach(ffn)
        if this_rank() == 0:
            print(self)

    def __repr__(self):
        return self.said

    def attach(self, ffn):
        for module in (ffn.act, ffn.gate, ffn.module):
            for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
                old = hook.nalora if is_ours(hook, "Hook") else None
                if old is not None and any(ffn.B_gate is other.B_gate for other in old.ffns):
                    old.remove()  # such as when a notebook's cell runs again
            drop_idle_hooks(module)
        self.handles += ffn.attach(self)

    # -- passes --------------------------------------------------------------------------------
    def see(self, ffn, z, trains):
        """A pass of gates z (..., F). It counts if it is computed in train mode, with gradients. A
        checkpoint computes it again in backward: then it counts there if it did not in forward."""
        in_torch_func = torch._C._functorch.is_functorch_wrapped_tensor(z)
        if in_torch_func or not (ffn.act.training and ffn.is_active()):
            return
        mask = self.token_mask
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward:
            if not trains:
                ffn.note_mask(mask)
            ffn.counted |= trains
        elif trains and not ffn.counted:
            mask = ffn.mask_of_recomputed(mask, z)
        if not trains or in_backward and ffn.counted:
            return
        self.seen = True
        self.passes += ffn is self.ffns[0]
        if ffn is self.ffns[0] and self.passes.bit_count() == 1 and not self.stepping:
            self.compare([o for o in self.optimizers if self.passes > 1 or not self.kept[o].noted])
        if ffn.check_rows and ffn.act is not ffn.gate:
            ffn.find_rows(z)
        fitting = ffn.fitting(mask, z)
        self.fitted |= fitting is mask
        every = slice(self.steps % self.config.stride, None, self.config.stride)
        sample = ffn.sample(z, fitting, every)
        here = ffn.group.state.importance
        most = max(1, SAMPLES // (here.element_size() * ffn.width))  # tokens
        parts = [sample] if len(sample[0]) <= most else zip(*(t.split(most) for t in sample))
        for z, weight, *experts in parts:
            z = z.to(here, copy=True)  # its own memory, not that of all tokens
            if self.held + z.nbytes > SAMPLES:
                self.add_up()
            self.held += z.nbytes
            experts = [expert.to(z.device) for expert in experts]  # of others, none
            ffn.group.samples[ffn.index].append((z, weight.to(z), *experts))

    def set_token_mask(self, ffn, mask, trains):  # from a hook of the model
        self.token_mask = mask.clone() if mask.numel() else None

    def note_output(self, ffn, output, trains):
        """What the gate gives: the first pass asks which rows of it the activation receives."""
        if ffn.check_rows and trains:
            ffn.output = output.detach()

    def add_up(self):
        """Adds what was sampled to the sums of the step, a group at a time."""
        for group in self.groups:
            group.add_up(self.observe)
        self.held = 0

    # -- steps ---------------------------------------------------------------------------------
    @torch.no_grad()
    def compare(self, optimizers):
        """Are their parameters as they were after their last step, or at the first pass?"""
        for optimizer in optimizers:
            values = [self.value(p) for p, _ in self.steered[optimizer]]
            if self.kept[optimizer].kinds != kinds_of(values):
                self.kept[optimizer] = Kept(values)  # the model was cast, or moved
            kept = self.kept[optimizer]
            kept.found.take(values)
            if kept.noted:
                self.guard.compare(kept)
            else:
                kept.left.take(values)
                kept.noted = True

    @torch.compiler.disable
    @torch.no_grad()
    def before_step(self, optimizer, args, kwargs):
        if is_nested(optimizer):
            return
        self.compare([optimizer])
        self.stepping = True
        if self.begins and has_stepped(optimizer, [p for p, _ in self.steered[optimizer]]):
            warnings.warn("The optimizer goes on with a run, but NALoRA begins anew: give "
                          "load_state_dict what state_dict gave then.")
        self.begins = False

    @torch.compiler.disable
    @torch.no_grad()
    def after_step(self, optimizer, args, kwargs):
        if is_nested(optimizer):
            return
        self.stepping = False
        if self.seen and self.step_ends(optimizer):
            self.end_step()
        elif not self.seen and any(group.get("lr", 1) for group in optimizer.param_groups):
            self.dry += 1
            if self.dry == len(self.optimizers):
                warnings.warn("NALoRA saw no pass before this step: is the model in train() mode, "
                              "its adapter active, and was it not compiled before NALoRA was made? "
                              "(Passes under torch.func are not counted.)")
        self.factors = {group: group.factors(self.row_factor(group)) for group in self.groups}
        values = [self.value(p) for p, _ in self.steered[optimizer]]
        kept = self.kept[optimizer]
        before = kept.found.tensors
        factors = [self.factor(ffn, p).to(t)
                   for (p, ffn), t in zip(self.steered[optimizer], before)]
        self.factors = None  # an expert's are as large as its B
        torch._foreach_lerp_(before, [widen(value) for value in values], factors)  # nalora.blend
        torch._foreach_copy_(values, before)
        if kept.rounded:
            kept.found.take(values)
        kept.left, kept.found = kept.found, kept.left

    def end_step(self):
        """Decides by what was seen."""
        self.add_up()
        for group in self.groups:
            self.sum_over_ranks(group)
            self.decide(group)
            group.forget()
        if self.token_mask is not None and not self.fitted:
            warnings.warn("token_mask fits no FFN's tokens: set it before each pass, or to None.")
        self.steps += 1
        self.seen = False
        self.passes = 0
        self.dry = 0
        self.fitted = False

    def sum_over_ranks(self, group):
        if self.process_groups:
            if self.ddp is not None and self.ddp._join_config.enable:
                raise ValueError("NALoRA adds up over ranks at each step, so that they need the "
                                 "same number of batches: train without DDP's join().")
            flat = torch.cat([t.flatten() for t in group.sums])
            for process_group in self.process_groups:
                torch.distributed.all_reduce(flat, group=process_group)
            parts = flat.split([t.numel() for t in group.sums])
            group.sums = GateSums(*(part.view_as(t) for part, t in zip(parts, group.sums)))

    def value(self, p):
        """The part of p that this rank holds: of FSDP2's DTensors some rows, else all."""
        return p.to_local() if hasattr(p, "placements") else p

    def factor(self, ffn, p):
        """What the step of p, or of the part of it that this rank holds, is multiplied by."""
        factor = ffn.factor(p, *self.factors[ffn.group])
        if factor.dim() and hasattr(p, "placements"):  # of a DTensor, this rank's rows
            whole = type(p).from_local(factor, p.device_mesh)  # the same on every rank
            factor = whole.redistribute(placements=p.placements).to_local()
        return factor

    # -- what it knows -------------------------------------------------------------------------
    def load_state_dict(self, saved: dict) -> None:
        """Goes on from a `state_dict`. ValueError if it is of another configuration or model."""
        if not isinstance(saved, dict) or not {"config", "steps", "ffns"} <= saved.keys():
            raise ValueError("This is not what NALoRA's state_dict() gives.")
        here = asdict(self.config)
        for name, value in saved["config"].items():
            if value != here.get(name):
                raise ValueError(f"The saved NALoRA has {name} {value!r}, this one "
                                 f"{here.get(name)!r}.")
        other = ({(name, shapes(state)) for name, state in saved["ffns"].items()}
                 ^ {(ffn.name, shapes(ffn.state._asdict())) for ffn in self.ffns})
        if other:
            raise ValueError(f"The saved NALoRA is of other FFNs: see {sorted(other)[0]}.")
        self.steps = saved["steps"]
        for group in self.groups:
            found = [saved["ffns"][ffn.name] for ffn in group.ffns]
            group.state = State(*(torch.stack([state[key] for state in found]).to(t)
                                  for key, t in group.state._asdict().items()))
            group.forget()
        for kept in self.kept.values():
            kept.noted = False
        self.held = 0
        self.seen = False
        self.passes = 0
        self.begins = False

    def summary(self) -> None:
        """Prints a table of the FFNs after the last step."""
        width = max(len(ffn.name) for ffn in self.ffns)
        print(f"{'':{width}}  channels  moving  k_hat  z > 0  scale   after {self.steps} steps")
        for ffn in self.ffns:  # of experts the means
            s = ffn.state
            print(f"{ffn.name:{width}}  {s.mask.numel():8}  {s.mask.float().mean():6.1%}  "
                  f"{s.k_hat.nanmean():5.2f}  {s.occupancy.nanmean():5.1%}  {s.scale.mean():5.2f}")

def find_steered(model, gate, act):
    """([FFN] that a NALoRA would steer, a sentence on them). ValueError if there are none."""
    gates = [gate] if isinstance(gate, str) else list(gate)
    modules = unwrapped_modules(model)
    return find_ffns(modules, gates, act, *find_experts(modules, gates))

def shapes(tensors):
    return tuple((name, tuple(t.shape)) for name, t in tensors.items())

def check_arguments(model, optimizer, config):
    if isinstance(optimizer, nn.Module):
        raise ValueError("NALoRA(model, optimizer): the two were given the other way round.")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, but has to be a torch.nn.Module.")
    check_config(config)

def check_config(config):
    if config is not None and type(config).__name__ != "NALoRAConfig":
        raise ValueError(f"config is a {type(config).__name__}, but has to be a NALoRAConfig, such "
                         "as NALoRAConfig(keep=0.25).")
