"""What NALoRA sees: hooks in the model, one operation in a compiled graph, samples of the gates."""
import itertools
import warnings
import weakref

import torch
import torch.nn as nn

import nalora
from nalora import GateSums, State, widen
from nalora_hf.modules import is_ours

class Group:
    """FFNs that one call observes: nalora.SteeredFFN's fields, whose tensors lead with (N,)."""
    def __init__(self, ffns):
        self.ffns = ffns
        self.act = ffns[0].phi
        for i, ffn in enumerate(ffns):
            ffn.group = self
            ffn.index = i
        B = ffns[0].B_gate
        zero = widen(torch.zeros(len(ffns), *ffns[0].shape, dtype=B.dtype, device=B.device))
        one = zero.new_ones(zero.shape[:-1])
        self.state = State(zero, zero == 0, one * torch.nan, one * torch.nan, one)
        self.forget()

    def forget(self):
        """Begins a step: nothing is observed yet."""
        for ffn in self.ffns:
            ffn.forget()
        self.samples = [[] for _ in self.ffns]  # [(z (T, F), weight (T,))] of each FFN's passes
        zero = torch.zeros_like(self.state.importance)  # (N, F)
        self.sums = GateSums(zero, *zero.new_zeros(4, *zero.shape[:-1]))

    def add_up(self, observe):
        """Adds what was sampled to the sums of the step."""
        while any(self.samples):
            which, z, weight = self.take_samples()
            self.add(which, observe(self, z, weight))

    def factors(self, rows):
        """What FFN.factor chooses from; rows (N, F, 1)."""
        return rows.unbind(), self.state.scale.unbind()

    def take_samples(self):
        """A pass of each FFN that has one of T tokens: (which, z (n, T, F), weight (n, T))."""
        tokens = next(len(z) for passes in self.samples for z, _ in passes[:1])
        which = [i for i, passes in enumerate(self.samples)
                 if passes and len(passes[0][0]) == tokens]
        z, weight = zip(*(self.samples[i].pop(0) for i in which))
        return which, torch.stack(z), torch.stack(weight)

    def add(self, which, sums):
        """Adds the sums (n, ...) of those FFNs to the step's."""
        if len(which) == len(self.ffns):
            self.sums = self.sums + sums
        else:
            index = torch.tensor(which, device="cpu").to(self.sums.tokens.device, non_blocking=True)
            self.sums = GateSums(*(t.index_add(0, index, more)
                                   for t, more in zip(self.sums, sums)))

class ExpertGroup(Group):
    """Layers of experts that one call observes: tensors lead with (N, E)."""
    def add_up(self, observe):
        parts = [(z, weight, i * ffn.count + expert) for i, ffn in enumerate(self.ffns)
                 for z, weight, expert in self.samples[i]]
        if parts:
            z, weight, place = map(torch.cat, zip(*parts))
            of_pairs = observe(self, z[:, None], weight[:, None])
            self.sums = GateSums(*(t.flatten(0, 1).index_add(0, place, found).view_as(t)
                                   for t, found in zip(self.sums, of_pairs)))
            self.samples = [[] for _ in self.ffns]

    def factors(self, rows):
        return rows, self.state.scale, {}

class Hook(nalora.Hook):
    """Shows NALoRA what an activation receives, or what a gate gives; under torch.compile as one
    operation that the graph holds. A copy of a model has idle ones, which say so."""
    keys = itertools.count()
    living = weakref.WeakValueDictionary()  # {key: hook}

    def __init__(self, nalora=None, ffn=None, show="see"):
        super().__init__(nalora, ffn)
        self.show = show
        self.key = torch.tensor(next(self.keys), device="cpu")  # reading it waits for no device
        self.living[int(self.key)] = self

    def __reduce__(self):
        return Hook, ()

    def __call__(self, module, args, kwargs, *output):
        z = [*output, *args, *kwargs.values()][0]
        if self.nalora is not None:
            self.tell(z, module.training and z.requires_grad)
        elif module.training and z.requires_grad and not torch.compiler.is_compiling():
            warnings.warn("NALoRA steers the model that this is a copy of, but the copy trains as "
                          "plain LoRA: make a NALoRA for it.")

    def tell(self, t, trains):
        if not torch.compiler.is_compiling():
            getattr(self.nalora, self.show)(self.ffn, t, trains)
        elif trains:
            torch.ops.nalora_hf.see(self.nalora.order, self.key, t.detach())

class Rows(Hook):
    """Keeps what the activation of experts receives, in one call or in several. Nothing of experts
    is compiled: PEFT's LoRA breaks the graph at each of them."""
    @torch.compiler.disable
    def __call__(self, module, args, kwargs):
        z = [*args, *kwargs.values()][0]
        if self.ffn.module.training and not self.ffn.is_again():
            self.ffn.received.append(z.detach())

class Routing(Hook):
    """Says after a pass which pair of token and expert each row was, and lets NALoRA see z."""
    @torch.compiler.disable
    def __call__(self, module, args, kwargs, output):
        ffn = self.ffn
        x, experts, scores = [*args, *kwargs.values()][:3]  # (T, in), (T, k), (T, k)
        if not module.training or not experts.numel() or ffn.is_again():
            return
        ffn.expert, ffn.pair = ffn.order(experts)
        ffn.scores = scores.detach()
        count = len(ffn.pair)
        if sum(map(len, ffn.received)) < count:
            raise ValueError(f"In {ffn.name} the activation does not see each token's experts.")
        received = ffn.received[0] if len(ffn.received) == 1 else torch.cat(ffn.received)
        received = received[-count:]  # what comes before is of a pass that was broken off
        if module.config._experts_implementation == "batched_mm":
            received = received[ffn.pair]  # expert by expert, as others
        ffn.received = []
        if output.requires_grad and not ffn.compared:
            ffn.compare(x.detach(), received)
        self.nalora.see(ffn, received, output.requires_grad)

class Tap(nn.Module):
    """Stands in the place of an experts module's own _apply_gate, for hooks."""
    def __init__(self, experts):
        super().__init__()
        vars(self).update(experts=experts, give=type(experts)._apply_gate)  # not as parts

    @property
    def training(self):
        return self.experts.training

    @training.setter
    def training(self, mode):
        """It is in its experts' mode."""

    def forward(self, gate_up):
        return self.give(self.experts, gate_up)

UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # a replayed graph would call no hook

@torch.library.custom_op("nalora_hf::see", mutates_args=("order",),
                         **({} if UNSAFE is None else {"tags": (UNSAFE,)}))
def see(order: torch.Tensor, key: torch.Tensor, z: torch.Tensor) -> None:
    """A hook's call within a compiled graph; `order` keeps such calls in theirs."""
    hook = Hook.living.get(int(key))
    if hook is not None and hook.nalora is not None:
        here = torch._C._dispatch_tls_local_include_set()
        with torch._C._ForceDispatchKeyGuard(here, here - here):  # phi' takes autograd, too
            getattr(hook.nalora, hook.show)(hook.ffn, z, True)

see.register_fake(lambda order, key, z: None)

def drop_idle_hooks(module):
    """Those that a copy of a steered model has."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if is_ours(hook, "Hook") and hook.nalora is None:
                del hooks[key]
