"""Experts of mixtures. transformers holds those of a layer in one module, whose activation receives
one row for each pair of a token and an expert; PEFT holds their LoRA in one A and one B."""
import torch
import torch.nn as nn

from nalora import GateSums
from nalora_hf.families import FFN, kind_of, lora_pairs, row_layouts
from nalora_hf.modules import match_names, unwrapped_modules
from nalora_hf.watch import Group, Hook

KERNELS = ("eager", "grouped_mm", "batched_mm")  # those whose order of pairs is known
REMEDY = "call model.set_experts_implementation('grouped_mm')."

class ExpertGroup(Group):
    """Layers of experts that one call observes: tensors lead with (N, E)."""
    def add_up(self, observe):
        parts = [(z, weight, i * len(self.state.scale[i]) + experts)
                 for i, passes in enumerate(self.samples) for z, weight, experts in passes]
        if not parts:
            return
        z, weight, place = map(torch.cat, zip(*parts))
        of_pairs = observe(self, z[:, None], weight[:, None])  # each pair is a row of its own
        self.sums = GateSums(*(t.flatten(0, 1).index_add(0, place, found).view_as(t)
                               for t, found in zip(self.sums, of_pairs)))
        self.samples = [[] for _ in self.ffns]

class Experts(FFN):
    """The E experts of one layer: an FFN whose State leads with (E,)."""
    group_class = ExpertGroup

    def __init__(self, name, module, gate, layers):
        super().__init__(name, module, gate, getattr(module, "act_fn", None), True)
        self.layers = layers  # PEFT's, around the module
        self.count = module.num_experts  # E
        self.width = len(self.B_gate) // (2 if module.has_gate else 1)  # F
        self.shape = self.count, self.width
        pairs = [pair for layer in layers for pair in lora_pairs(layer)]
        self.parameters = [p for pair in pairs for p in pair]
        self.As = [A for A, _ in pairs]
        self.check_rows = False
        self.checked = False  # whether z was seen to be what the gate gives
        self.received = []  # by the activation in this pass
        self.routing = None  # of its pairs (T, k): expert, place in `received`, whether it counts
        self.rows = self.find_gate()

    def find_gate(self):
        """Which rows of gate_up make z: the output bends with them, and is linear in the others.
        And where z is seen: at act_fn or, if that receives something else, in front of the
        module's own _apply_gate."""
        give = self.module._apply_gate if self.module.has_gate else self.act
        size = len(self.B_gate)
        x = torch.linspace(-0.1, 0.1, 8 * size, device=self.B_gate.device).view(8, size)
        for rows in row_layouts(size, self.width, x.device):
            of_gate = x.new_zeros(size).index_fill(0, rows, 1)
            bends = [(give(x + d / 2) - 2 * give(x) + give(x - d / 2)).abs().max().item() > 1e-3
                     for d in (of_gate, 1 - of_gate)]
            if bends == [True, False]:
                break
        else:
            return None

        def phi(z):  # what a feature is multiplied by
            both = z.new_zeros(*z.shape[:-1], size).index_copy(-1, rows, z)
            return give(both + (1 - of_gate).to(z)) - give(both)

        received = []
        if isinstance(self.act, nn.Module):
            handle = self.act.register_forward_pre_hook(lambda act, args: received.append(args[0]))
            give(x)
            handle.remove()
        if len(received) != 1 or not torch.equal(received[0], x[:, rows]):
            self.phi = phi
            self.act = vars(self.module).get("_apply_gate") or Tap(self.module)
        return rows

    def kind(self):
        own = [(k, v) for k, v in vars(self.module).items() if isinstance(v, (int, float, str))]
        act = None if isinstance(self.act, Tap) else kind_of(self.phi)
        return type(self.module), *own, act, self.shape, self.B_gate.dtype, self.B_gate.device

    def is_active(self):
        return self.module.training and super().is_active()

    def attach(self, nalora):
        if isinstance(self.act, Tap):
            vars(self.module)["_apply_gate"] = self.act
        before = {self.module: Begin(nalora, self), self.act: Rows(nalora, self)}
        return [*(module.register_forward_pre_hook(hook, with_kwargs=True)
                  for module, hook in before.items()),
                self.module.register_forward_hook(Routing(nalora, self), with_kwargs=True)]

    def stride(self, config):
        return 1

    def is_again(self):
        """Whether backward computes a pass again that was counted: it may stop within."""
        return self.counted and torch._C._current_graph_task_id() != -1

    def rows_received(self):
        """What the activation received in this pass."""
        if sum(map(len, self.received)) != self.routing[0].numel():
            raise ValueError(f"{self.name} computes its experts in a form in which the activation "
                             "does not see each pair of a token and an expert: " + REMEDY)
        return self.received[0] if len(self.received) == 1 else torch.cat(self.received)

    def fitting(self, mask, z):
        return super().fitting(mask, self.routing[0])

    def sample(self, z, mask, every):
        """(z (R, F), weight (R,), expert (R,)) of the pairs of the tokens that `every` names."""
        experts, places, counts = self.routing[:, every]  # (T, k) each
        if mask is not None:
            counts = counts * mask.flatten()[every].ne(0)[:, None]
        z = z[places.flatten()]
        return self.gates(z), counts.flatten(), experts.flatten()

    def gates(self, received):
        return received[:, self.rows] if received.size(-1) > self.width else received

    def compare(self, x):
        """ValueError if, in 16 pairs, z is not what the gate gives for the token."""
        W = getattr(self.module, self.gate.parameter_name).detach()  # with LoRA, while it computes
        bias = getattr(self.module, f"{self.gate.parameter_name}_bias", None)
        experts, places, _ = self.routing.flatten(1)
        pairs = torch.linspace(0, len(places) - 1, 16, device=x.device).long()
        z = []
        for token, expert in zip(pairs // self.routing.size(-1), experts[pairs].tolist()):
            w = W[expert] if self.module.is_transposed else W[expert].t()  # (in, rows)
            z.append(x[token].detach().float() @ w.float())
            if bias is not None:
                z[-1] += bias[expert].detach()
        z = torch.stack(z)[:, self.rows]
        if (self.gates(self.rows_received()[places[pairs]]) - z).norm() > 0.05 * z.norm():
            raise ValueError(f"In {self.name} the activation does not receive what the gate gives: "
                             "it is not known which of its rows is which token's. " + REMEDY)
        self.checked = True

    def factor(self, p, rows, scale):
        """What the step of p is multiplied by; rows (E, F, 1), scale (E,). Expert e owns the rows
        e r to e r + r - 1 of A (E r, in), and the columns e, e + E, ... of B (out, r E)."""
        if any(p is A for A in self.As):
            return scale.repeat_interleave(len(p) // self.count)[:, None]
        rank = p.size(1) // self.count
        factor = scale.repeat(len(p), rank)
        if any(p is B for B in self.B_gates):
            factor.index_copy_(0, self.rows, rows.squeeze(-1).t().repeat(1, rank))
        return factor

class Begin(Hook):
    def __call__(self, module, args, kwargs):
        if not torch.compiler.is_compiling():
            self.ffn.received = []  # a pass that was broken off may have left some

class Rows(Hook):
    def receive(self, z, trains):
        if self.ffn.module.training and not self.ffn.is_again():
            self.ffn.received.append(z.detach())

class Routing(Hook):
    """After a pass: which row was which pair."""
    def __call__(self, module, args, kwargs, output):
        x, experts, scores = [*args, *kwargs.values()][:3]  # (T, in), (T, k), (T, k)
        ffn = self.ffn
        if not module.training or ffn.is_again():
            return
        kernel = module.config._experts_implementation
        if kernel not in KERNELS:
            raise ValueError(why_not(module))
        places = torch.arange(experts.numel(), device=x.device)
        if kernel == "grouped_mm":
            places = places.index_copy(0, experts.flatten().sort()[1], places)
        if kernel == "eager":
            order = experts.t().flatten().sort(stable=True)[1]
            places = places.index_copy(0, order, places).view(-1, len(x)).t()
        routing = torch.stack([experts, places.reshape_as(experts), scores != 0])
        if not (ffn.checked or torch.compiler.is_compiling()) and output.requires_grad:
            ffn.routing = routing
            ffn.compare(x)
        self.tell(routing, output.requires_grad)

    def receive(self, routing, trains):
        self.ffn.routing = routing
        self.nalora.see(self.ffn, self.ffn.rows_received(), trains)
        self.ffn.received = []

class Tap(nn.Module):
    """Stands in the place of an experts module's own _apply_gate, for hooks."""
    def __init__(self, experts):
        super().__init__()
        vars(self)["experts"] = experts  # not as a part

    def forward(self, gate_up):
        return type(self.experts)._apply_gate(self.experts, gate_up)

def why_not(module):
    """Why its experts cannot be seen, or ""."""
    kernel = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if not hasattr(module, "is_concatenated"):
        return f"{type(module).__name__} computes them in a form of its own."
    if module._is_expert_parallel:
        return "expert parallelism spreads them over devices."
    if kernel not in KERNELS:
        return f"their activation is not called under experts_implementation={kernel!r}: {REMEDY}"
    return ""

def find_experts(model, gates):
    """([Experts] whose gate carries PEFT's LoRA, why others are left alone)."""
    around = {}
    for name, m in unwrapped_modules(model).items():
        if hasattr(m, "parameter_name") and lora_pairs(m):
            around.setdefault(m.get_base_layer(), {})[name] = m
    found = []
    why = ""
    for module, layers in around.items():
        name = min(layers, key=len)
        for gate in layers.values():
            if match_names([f"{name}.{gate.parameter_name}"], gates):
                reason = why_not(module)
                if not reason:
                    found.append(Experts(name, module, gate, list(layers.values())))
                    if found[-1].rows is None:
                        found.pop()
                        reason = "nothing in them bends as a gate does."
                why = reason and f"The experts of {name} are not steered: {reason}"
    return found, why
