"""NALoRA on any model: hooks that watch the gates of its FFNs and correct the optimizer's step."""
import warnings
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from nalora import NALoRAConfig, blend, decide, observe
from nalora_hf.families import GATES, lora_pairs, refuse, stack_ffns
from nalora_hf.modules import shapes, unwrapped_modules

# -- the class ------------------------------------------------------------------------------------
class NALoRA:
    """Turns a LoRA training loop into NA-LoRA: make one after the optimizer, change nothing else.
    It steers every FFN whose gate carries LoRA, ours or PEFT's, and says in one line how many.
    optimizer: one, or a list of those that step together. gate: name or names of the linear layer
    in front of an activation ("fc1", "mlp.c_fc"); one that holds gate and up at once will do. act:
    the activation of FFNs that have none as attribute. Make it before the first compiled call.
    With padded batches set `token_mask` (batch, seq), nonzero for real tokens (of an encoder-
    decoder: the encoder's), before each pass. An earlier NALoRA on these gates is removed.
    ValueError if no gate carries LoRA, or an optimizer lacks it, averages or has another NALoRA."""
    def __init__(self, model, optimizer, config=None, gate=GATES, act=None):
        self.config = config or NALoRAConfig()
        self.token_mask = None
        self._stacks, self._said = stack_ffns(model, gate, act)
        self._steered = steered_by(optimizer, self._stacks)  # {optimizer: [(parameter, ...)]}
        self._closure = None  # of an optimizer whose passes come within its step, such as LBFGS
        self._steps = 0
        self._handles = []
        if this_rank() == 0:
            print(self)
        if self.config.mask == self.config.scale == "none":
            return  # plain LoRA
        self._watch = Watch(self, model)
        self._observers = [Observer(self, stack, i) for stack in self._stacks
                           for i in range(len(stack.gates))]
        for o in self._steered:
            self._handles += [o.register_step_pre_hook(self._before_step),
                              o.register_step_post_hook(self._after_step)]
            o.nalora = self
        keep_in_checkpoints(self, o)  # one is enough

    def __repr__(self):
        return self._said

    def _see(self, stack, token_mask, z):
        """Samples what FFNs of a stack give their activation, z (..., F): (T, F), weight (T,)."""
        every = slice(self._steps % self.config.stride, None, self.config.stride)
        sample = z.detach().flatten(0, -2)[every].to(stack.state.importance, copy=True)  # (T, F)
        if token_mask is None:
            return sample, sample.new_ones(len(sample))
        return sample, token_mask.flatten()[every].ne(0).to(sample)

    def _count(self, stack, i, sample, *grad):
        """Backward has reached a pass of FFN i, so that it counts."""
        if i in stack.samples:  # of another microbatch
            self._add_up()
        if sample:
            stack.samples[i] = sample

    def _add_up(self):
        """Adds the sums over the samples of one pass to those of the step, a stack at a time."""
        for stack in self._stacks:
            if stack.samples:
                z, weight = stack.take_samples()  # (N, T, F), (N, T)
                # hidden from gradient checkpointing, which may be recomputing right now
                with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach):
                    stack.sums = stack.sums + self._observe(stack, z, weight)

    def _before_step(self, optimizer, args, kwargs):
        for observer in self._observers:
            observer.refuse_gate(observer.early and observer.pending)  # phi ran before its gate
        self._closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._before = [local(p).clone() for p, *_ in self._steered[optimizer]]

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs):
        """Optimizer hook: decides by what was seen, then corrects the step of every parameter."""
        skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer under GradScaler
        decided = len(self._steered) > 1 and not any(stack.seen for stack in self._stacks)
        if not decided and (skipped is None or not skipped.item()):
            self._add_up()
            warn_of_nothing(self._stacks, self.token_mask)
            sum_over_ranks(self._stacks)
            self._decide()
            self._steps += 1
        self._forget()
        factors = {stack: stack.factors(*self._factors(stack.state)) for stack in self._stacks}
        for (p, stack, i, is_gate_B), before in zip(self._steered[optimizer], self._before):
            rows, scales = factors[stack]  # (rows of B, 1) of each FFN, 0-dim
            factor = own_rows(rows[i], p) if is_gate_B else scales[i]
            after = local(p)
            after.copy_(blend(before, after, factor))
        self._before = None
        self._watch.note_rows()

    def _forget(self):  # at the end of a step, or when its gradients were thrown away
        for part in (self._watch, *self._observers, *self._stacks):
            part.forget()

    # What a variant overrides: what is summed, what is decided, what a step is multiplied by.

    def _observe(self, stack, z, weight):
        with torch.autocast(z.device.type, enabled=False):
            return observe(stack.act, z, weight)

    def _decide(self):
        for stack in self._stacks:
            stack.state = decide(stack.state, stack.sums, self.config)

    def _factors(self, state):
        """(N, F, 1) for the rows of B_gate, (N,) for every other A and B."""
        return (state.scale[:, None] * state.mask)[..., None], state.scale

    # Skip on first reading: looking in, keeping the state, taking it off.

    def statistics(self):
        """{FFN name: {"importance" (F,), "mask" (F,) bool, "k_hat", "occupancy", "scale": floats}}
        of the last step. Before the first: importance 0, k_hat and occupancy NaN, scale 1."""
        return {name: {key: t if t.dim() else t.item() for key, t in state.items()}
                for name, state in self.state_dict()["ffns"].items()}

    def state_dict(self):
        """{"config", "steps", "ffns": as `statistics`}. It is in optimizer.state_dict(), too."""
        ffns = {name: {key: t[i].clone() for key, t in stack.state._asdict().items()}
                for stack in self._stacks for i, name in enumerate(stack.names)}
        return {"config": asdict(self.config), "steps": self._steps, "ffns": ffns}

    def load_state_dict(self, state):
        """Goes on from a `state_dict`. ValueError if it is of another configuration or model."""
        check_state(state, self.state_dict())
        self._steps = state["steps"]
        for stack in self._stacks:
            for i, name in enumerate(stack.names):
                for key, t in state["ffns"][name].items():
                    getattr(stack.state, key)[i] = t

    def remove(self):
        """Takes every hook off. What follows is plain LoRA training."""
        while self._handles:
            self._handles.pop().remove()
        for optimizer in self._steered:
            if getattr(optimizer, "nalora", None) is self:
                del optimizer.nalora

# -- which optimizer steers what -------------------------------------------------------------------
def steered_by(optimizers, stacks):
    """{optimizer: [(p, stack, i, whether it is B_gate)]} of what trains. An earlier NALoRA on these
    gates is taken off."""
    optimizers = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
    optimizers = [getattr(o, "optimizer", o) for o in optimizers]  # in Accelerate's wrapper
    for o in optimizers:
        refuse(not hasattr(o, "register_step_post_hook"), "NALoRA hooks the step of a "
               f"torch.optim.Optimizer, not a {type(o).__name__}.")
        # such as schedule-free ones
        refuse(hasattr(o, "eval"), f"{type(o).__name__} evaluates at averages of its own, which "
               "would move resting rows: use another optimizer.")
        refuse(getattr(o, "nalora", None),
               "This optimizer is steered by another NALoRA: call optimizer.nalora.remove() first.")
    steered = [(p, stack, i, layer is stack.gates[i] and p is pair[1])
               for stack in stacks for i, ffn in enumerate(stack.ffns)
               for name, layer in unwrapped_modules(ffn).items() if "." not in name
               for pair in lora_pairs(layer) for p in pair]
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]
             if p.requires_grad}
    for p, _, _, is_gate_B in steered:
        within_rows = any(s.is_shard(1) for s in getattr(p, "placements", ()))
        refuse(within_rows or p.dim() != 2 or not p.numel(), "The LoRA parameters are flattened or "
               "sharded within rows (FSDP1, ZeRO-3): use FSDP2's fully_shard.")
        refuse(id(p) not in owner and (p.requires_grad or is_gate_B), "The optimizer does not hold "
               "the FFNs' LoRA parameters, or they are frozen: make it after LoRA is in place (of "
               "PEFT with is_trainable=True), or give a list of all that step together.")
    for hook in [h for s in stacks for gate in s.gates for h in gate._forward_hooks.values()]:
        if isinstance(hook, Hook) and hook.call:  # such as when a notebook's cell runs again
            hook.call.__self__.tool.remove()
    return {o: [entry for entry in steered if owner.get(id(entry[0])) is o] for o in optimizers}

# -- several ranks, and checkpoints ----------------------------------------------------------------
def local(p):
    """The part of a parameter that this rank holds: of FSDP2's DTensors some rows, else all."""
    return p.detach().to_local() if hasattr(p, "placements") else p.detach()

def own_rows(factor, p):
    """Of a factor (rows, 1) of all rows of p, those of this rank."""
    if hasattr(p, "placements"):
        whole = type(p).from_local(factor, p.device_mesh)  # the same on every rank
        return whole.redistribute(placements=p.placements).to_local()
    return factor

def check_state(saved, here):
    known = [(d["config"], {name: shapes(ffn) for name, ffn in d["ffns"].items()})
             for d in (saved, here)]
    refuse(known[0] != known[1], f"This NALoRA state was made with {saved['config']}, not with "
           f"{here['config']}, or on another model.")

def distributed():
    return torch.distributed.is_available() and torch.distributed.is_initialized()

def this_rank():
    return torch.distributed.get_rank() if distributed() else 0

def warn_of_nothing(stacks, token_mask):
    if not any(stack.seen for stack in stacks):
        warnings.warn("NALoRA saw no gate before this step: is the model in train() mode, not "
                      "compiled before, and not as a whole under gradient checkpointing?")
    elif not any(stack.trained for stack in stacks):
        warnings.warn("NALoRA saw no backward pass reach a gate before this step: it cannot steer "
                      "an optimizer that steps during backward.")
    elif token_mask is not None and not any(stack.masked for stack in stacks):
        warnings.warn("token_mask fits no FFN's tokens: set it before each pass, or to None.")

def sum_over_ranks(stacks):
    """Adds the sums of all ranks of torch.distributed, so that they decide alike."""
    if distributed():
        for stack in stacks:
            for t in stack.sums:
                torch.distributed.all_reduce(t)

def keep_in_checkpoints(tool, optimizer):
    """Puts the state of NALoRA into optimizer.state_dict(), and takes what was loaded from one."""
    def save(optimizer, state):
        state["param_groups"][0]["nalora"] = tool.state_dict()

    def load(optimizer):
        group = optimizer.param_groups[0]
        if "nalora" in group:
            tool.load_state_dict(group.pop("nalora"))

    tool._handles += [optimizer.register_state_dict_post_hook(save),
                      optimizer.register_load_state_dict_post_hook(load)]
    load(optimizer)

# -- hooks: which passes count, and what goes past NALoRA ------------------------------------------
class Observer:
    """The hooks of one FFN: they sample each pass that trains, z as the activation receives it, or
    else, where that cannot be seen, as the gate gives it."""
    def __init__(self, tool, stack, i):
        self.tool = tool
        self.stack = stack
        self.i = i
        self.looked = False  # whether find_rows has
        self.forget()
        tool._handles.append(stack.gates[i].register_forward_hook(Hook(self.after_gate)))
        if stack.acts[i]:
            hook = Hook(self.before_act)
            tool._handles.append(stack.acts[i].register_forward_pre_hook(hook))

    def forget(self):
        self.pending = None  # until the activation comes: (gate's output, its sample, how to see z)
        self.early = False  # whether the activation came without one

    def after_gate(self, gate, z):
        """Forward hook of the gate. Evaluation, passes of the base model and passes under no_grad
        leave no trace, unless no_grad is gradient checkpointing's, within a pass with gradients."""
        self.pending = None
        tool = self.tool
        waiting = next(reversed(tool._watch.waiting.values()), None)  # of the innermost pass
        idle = not gate.training or getattr(gate, "disable_adapters", False)
        if idle or (waiting is None and not z.requires_grad):
            return
        sample = []
        see = None
        if torch._C._current_graph_task_id() == -1:  # else a checkpoint computes again in backward
            if not tool._closure and tool._watch.gradients_dropped(gate):
                tool._forget()
            mask = self.fitting(tool.token_mask, z)
            see = partial(tool._see, self.stack, mask)
            self.stack.seen[self.i] += 1
            if not self.stack.fused:
                sample += see(z)
            when_reached = z.register_hook if z.requires_grad else waiting.append
            when_reached(partial(tool._count, self.stack, self.i, sample))
        if self.stack.acts[self.i]:
            self.pending = (z, sample, see)

    def before_act(self, act, inputs):
        """Forward pre-hook of the activation: is its input the gate's output as it is?"""
        if self.pending is None:
            self.early |= act.training and inputs[0].requires_grad
            return
        output, sample, see = self.pending
        self.pending = None
        if inputs[0] is not output:  # a part of it, or changed on the way
            sample.clear()  # before find_rows, whose backward would count it
            self.find_rows(inputs[0], output)
            if see:
                sample += see(inputs[0])

    def fitting(self, mask, z):
        """The token mask if it is of gates z. Of several towers it may be another's; of an
        encoder-decoder it is the encoder's."""
        if mask is None or self.stack.decodes[self.i]:
            return None
        if mask.shape == z.shape[:-1] or z.dim() == 2 and mask.numel() == len(z):
            self.stack.masked = True
            return mask  # some models flatten (batch, seq)
        refuse(not self.stack.several_towers, f"token_mask is {tuple(mask.shape)} but the gates "
               f"see tokens {tuple(z.shape[:-1])}: set it before each pass, or to None.")

    def find_rows(self, z, output):
        """Asks autograd, once, which rows of B make the activation's input z."""
        if self.looked or not z.numel() or not z.requires_grad:
            return
        self.looked = True
        self.refuse_gate(not output.requires_grad)
        grad, = torch.autograd.grad(z.sum(), output, retain_graph=True, allow_unused=True)
        width = self.stack.state.mask.size(-1)
        self.refuse_gate(grad is None or z.size(-1) != width)
        if self.stack.fused:
            rows = grad.flatten(0, -2).ne(0).any(0).nonzero().flatten()
            self.refuse_gate(len(rows) != width)
            self.stack.rows = rows

    def refuse_gate(self, wrong):
        refuse(wrong, f"In {self.stack.names[self.i]} the activation does not see the output of "
               "the layer that `gate` names: name the one before it.")

class Hook:
    """A hook in the model. Copies and pickles of it call nothing; a copied gate's says so."""
    def __init__(self, call=None):
        self.call = call

    @torch.compiler.disable
    def __call__(self, module, *seen):  # the inputs, and after a forward pass the output
        if self.call is not None:
            return self.call(module, seen[-1])
        live = any(getattr(hook, "call", None) for hook in module._forward_hooks.values())
        if getattr(seen[-1], "requires_grad", False) and module.training and not live:
            warnings.warn("NALoRA steers the model that this is a copy of, but the copy trains as "
                          "plain LoRA: make a NALoRA for it.")

    def __reduce__(self):
        return Hook, ()

def note_version(versions, parameter):
    versions[:] = [parameter.grad._version]

def call_all(waiting, grad):
    while waiting:
        waiting.pop()()

class Watch:
    """Knows which pass is under way, and notices what goes past NALoRA: other optimizers' steps,
    other adapters, gradients thrown away."""
    def __init__(self, tool, model):
        self.gate = tool._stacks[-1].gates[-1]  # backward comes to it first
        self.parameter = lora_pairs(self.gate)[0][1]  # B
        self.after_backward = []  # version of its gradient then (the hook holds it, not self)
        self.rows = None  # some of its rows, to compare at the next pass
        self.passes = 0
        self.adapters = self.active()
        # {whole module in a pass: calls for when backward reaches its output, None under no_grad}
        self.waiting = {}
        tool._handles.append(self.parameter.register_post_accumulate_grad_hook(
            partial(note_version, self.after_backward)))
        gates = {gate for stack in tool._stacks for gate in stack.gates}
        # the model, and each wrapper such as PEFT's, all of which hold every gate
        self.whole = [m for m in model.modules() if gates.issubset(m.modules())]
        for m in self.whole:
            tool._handles += [m.register_forward_pre_hook(Hook(self.begin_pass)),
                              m.register_forward_hook(Hook(self.end_pass), always_call=True)]

    def begin_pass(self, module, inputs):
        self.waiting[module] = [] if torch.is_grad_enabled() else None

    def end_pass(self, module, output):
        waiting = self.waiting.pop(module, None)
        if waiting:
            for t in torch.utils._pytree.tree_leaves(output):
                if getattr(t, "grad_fn", None):
                    t.register_hook(partial(call_all, waiting))

    def active(self):
        return list(getattr(self.gate, "active_adapters", []))

    def gradients_dropped(self, gate):
        """At a pass that trains: warns of other adapters and of steps by others. True if the
        gradients since the last step were thrown away."""
        if gate is self.gate:
            self.compare()
        if not self.after_backward:
            return False
        grad = self.parameter.grad
        return grad is None or (self.after_backward != [grad._version] and not grad.any())

    def compare(self):
        if self.adapters != self.active():
            self.adapters = self.active()
            warnings.warn("Other adapters are active than when this NALoRA was made, and train as "
                          "plain LoRA: remove() it and make a new one.")
        self.passes += 1
        if self.passes.bit_count() == 1:  # the device is waited for at passes 1, 2, 4, 8, ... alone
            before = self.rows
            self.note_rows()
            if before is not None and not torch.equal(before, self.rows):
                warnings.warn("Something else moved the LoRA parameters after NALoRA's step: give "
                              "NALoRA the optimizer whose step() moves them, once it is wrapped.")

    def note_rows(self):
        """Called after each step, too."""
        self.rows = local(self.parameter)[:8].nan_to_num()

    def forget(self):
        self.after_backward.clear()
