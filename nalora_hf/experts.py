"""Experts of mixtures. transformers holds those of a layer in one module, whose activation receives
one row for each pair of a token and an expert; PEFT holds their LoRA in one A and one B."""
import torch

from nalora_hf.families import FFN, lora_pairs, row_layouts
from nalora_hf.modules import match_names
from nalora_hf.watch import ExpertGroup, Hook, Rows, Tap

class Experts(FFN):
    """The E experts of one layer: an FFN whose State leads with (E,)."""
    group_class = ExpertGroup

    def __init__(self, name, module, gate, layers):
        super().__init__(name, module, gate, getattr(module, "act_fn", None), True)
        self.layers = layers  # PEFT's, around the module
        self.pairs = [pair for layer in layers for pair in lora_pairs(layer)]
        self.parameters = [p for pair in self.pairs for p in pair]
        self.count = module.num_experts  # E
        self.width = len(self.B_gate) // (2 if module.has_gate else 1)  # F
        self.shape = self.count, self.width
        self.check_rows = False
        self.received = []  # by the activation, in this pass
        self.routing = None  # of its pairs: expert, place among those rows, whether it counts
        self.x = None  # what the experts received
        self.compared = False
        self.rows = self.find_gate()

    def find_gate(self):
        """Which rows of gate_up make z: the output bends with them, and is linear in the others.
        And where z is seen: at act_fn, or in front of an _apply_gate of the family's own."""
        give = self.module._apply_gate if self.module.has_gate else self.act
        size = len(self.B_gate)
        x = torch.linspace(-0.1, 0.1, 8 * size, device=self.B_gate.device).view(8, size)
        for rows in row_layouts(size, self.width, x.device):
            of_gate = x.new_zeros(size).index_fill(0, rows, 1)
            bend, rest = ((give(x + d / 2) - 2 * give(x) + give(x - d / 2)).abs().max()
                          for d in (of_gate, 1 - of_gate))
            if rest < 1e-3 < bend:
                break
        else:
            raise ValueError(f"In {self.name} no rows of the gate make a gate.")

        def phi(z):  # what a feature is multiplied by
            both = z.new_zeros(*z.shape[:-1], size).index_copy(-1, rows, z)
            return give(both + (1 - of_gate).to(z)) - give(both)

        if self.module.has_gate and not give.__module__.startswith("transformers.integrations"):
            self.phi = phi
            self.act = vars(self.module).setdefault("_apply_gate", Tap(self.module))
        return rows

    def attach(self, nalora):
        act = self.act.register_forward_pre_hook(Rows(nalora, self), with_kwargs=True)
        return act, self.module.register_forward_hook(Routing(nalora, self), with_kwargs=True)

    def stride(self, config):
        return 1

    def is_again(self):
        """Whether backward computes a pass again that was counted: it may stop within."""
        return self.counted and torch._C._current_graph_task_id() != -1

    def fitting(self, mask, z):
        return super().fitting(mask, self.routing[0])

    def sample(self, z, mask, every):
        """(z (R, F), weight (R,), expert (R,)) of the pairs of the tokens that `every` names."""
        expert, place, weight = self.routing[:, every]  # (T, k) each
        if mask is not None:
            weight = weight * mask.flatten()[every].ne(0)[:, None]
        return self.gates(z[place.flatten()]), weight.flatten(), expert.flatten()

    def gates(self, z):
        return z if z.size(-1) == self.width else z[:, self.rows]

    def compare(self, x, received):
        """ValueError if z, in eight pairs of the first pass, is not what the gate gives."""
        expert, place, _ = self.routing.flatten(1)
        pair = torch.linspace(0, len(place) - 1, 8, device=x.device).long()
        W = getattr(self.module, self.gate.parameter_name).detach()[expert[pair]].float()
        W = W.mT if self.module.is_transposed else W  # (8, rows, in), LoRA's part in it
        z = (W @ x[pair // self.routing.size(-1), :, None].float())[..., 0]
        if self.module.has_bias:
            z += getattr(self.module, f"{self.gate.parameter_name}_bias").detach()[expert[pair]]
        if (self.gates(received[place[pair]]) - z[:, self.rows]).norm() > 0.05 * z.norm():
            raise ValueError(f"In {self.name} the activation does not receive what the gate gives, "
                             "in the order of pairs that is known.")
        self.compared = True

    def factor(self, p, rows, scale):
        """What the step of p is multiplied by; rows (E, F, 1), scale (E,). Expert e owns the rows
        e r to e r + r - 1 of A (E r, in), and the columns e, e + E, ... of B (out, r E)."""
        if any(p is A for A, _ in self.pairs):
            return scale.repeat_interleave(len(p) // self.count)[:, None]
        rank = p.size(1) // self.count
        factor = scale.repeat(len(p), rank)
        if any(p is B for B in self.B_gates):
            factor.index_copy_(0, self.rows, rows.squeeze(-1).t().repeat(1, rank))
        return factor

class Routing(Hook):
    """Says after a pass which row was which pair, and lets NALoRA see them."""
    def __call__(self, module, args, kwargs, output):
        x, experts, scores = [*args, *kwargs.values()][:3]  # (T, in), (T, k), (T, k)
        if not module.training or self.ffn.is_again():
            return
        kernel = module.config._experts_implementation
        place = torch.arange(experts.numel(), device=x.device)
        if kernel == "grouped_mm":
            place = place.index_copy(0, experts.flatten().sort()[1], place)
        elif kernel == "eager":
            order = experts.t().flatten().sort(stable=True)[1]
            place = place.index_copy(0, order, place).view(-1, len(x)).t()
        elif kernel != "batched_mm":
            raise ValueError(f"{self.ffn.name} {why_not(module)}")
        if not torch.compiler.is_compiling():
            self.ffn.x = x.detach()
        routing = torch.stack([experts, place.reshape_as(experts), scores != 0])
        self.tell(routing, output.requires_grad)

    def receive(self, routing, trains):
        ffn = self.ffn
        ffn.routing = routing
        if sum(map(len, ffn.received)) < routing[0].numel():
            raise ValueError(f"In {ffn.name} the activation does not see each token's experts.")
        received = torch.cat(ffn.received)[-routing[0].numel():]  # before: of a pass broken off
        if trains and ffn.x is not None and not ffn.compared:
            ffn.compare(ffn.x, received)
        self.nalora.see(ffn, received, trains)
        ffn.received = []
        ffn.x = None

def why_not(module):
    """Why its experts cannot be steered, or ""."""
    kernel = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if not hasattr(module, "is_concatenated"):
        return f"is a {type(module).__name__}, which computes its experts in a form of its own."
    if module._is_expert_parallel or kernel not in ("eager", "grouped_mm", "batched_mm"):
        return (f"computes its experts by {kernel} kernels or on several devices, where what the "
                "activation receives is not seen: model.set_experts_implementation('grouped_mm').")
    return ""

def find_experts(modules, gates):
    """([Experts] whose gate carries PEFT's LoRA, why others with LoRA are not steered)."""
    around = {}  # {experts' module: {name: PEFT's layer}}
    for name, m in modules.items():
        if hasattr(m, "parameter_name") and lora_pairs(m):
            around.setdefault(m.get_base_layer(), {})[name] = m
    found = []
    why = ""
    for module, layers in around.items():
        name = min(layers, key=len)
        gate = [m for m in layers.values() if match_names([f"{name}.{m.parameter_name}"], gates)]
        if gate and why_not(module):
            why = f"{name} {why_not(module)}"
        elif gate:
            found.append(Experts(name, module, gate[0], [*layers.values()]))
    return found, why
