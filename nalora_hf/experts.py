"""Experts of mixtures. transformers holds the E experts of a layer in one module, whose activation
receives one row for each pair of a token and an expert that the router chose. Which row is whose
follows from the router's choice and the order in which the module computes: see `order`.

PEFT holds the LoRA of all experts in one A (E r, in), an expert's rows after the other's, and one
B (out, r E), whose columns take turns: expert e owns e, E + e, 2 E + e, ...
"""
import torch

from nalora_hf.families import FFN, row_layouts
from nalora_hf.lora import lora_pairs
from nalora_hf.modules import match_names
from nalora_hf.watch import ExpertGroup, Routing, Rows, Tap

KERNELS = ("eager", "grouped_mm", "batched_mm")  # whose order of pairs is known

class Experts(FFN):
    """The E experts of one layer: an FFN whose State leads with (E,)."""
    group_class = ExpertGroup

    def __init__(self, name, module, gate, layers):
        super().__init__(name, module, gate, getattr(module, "act_fn", None), True, layers)
        self.count = module.num_experts  # E
        self.kinds = {}  # {parameter: (whether an A, whether a B of the gate, an expert's rank)}
        for A, B in zip(self.parameters[::2], self.parameters[1::2]):
            self.kinds[A] = True, False, len(A) // self.count
            self.kinds[B] = False, any(B is other for other in self.B_gates), len(A) // self.count
        self.width = len(self.B_gate) // (2 if module.has_gate else 1)  # F
        self.shape = self.count, self.width
        self.received = []  # by the activation, in this pass
        self.expert = self.pair = self.scores = None  # see `order`; the router's (T, k)
        self.compared = False
        self.rows = self.find_gate()  # of gate_up, that make z
        self.columns = slice(None)  # of what is received, that are z: all
        if module.has_gate and "integrations" not in type(module)._apply_gate.__module__:
            self.columns = self.rows  # as in gpt-oss: gate and up are received together
            self.phi = self.own_phi
            self.act = vars(module).setdefault("_apply_gate", Tap(module))

    def give(self, gate_up):
        """What the experts make of it in front of their down projection."""
        if self.module.has_gate:
            return type(self.module)._apply_gate(self.module, gate_up)
        return self.act(gate_up)

    def own_phi(self, z):
        """What a feature is multiplied by: how much one more of each adds."""
        gate = z.new_zeros(*z.shape[:-1], len(self.B_gate)).index_copy(-1, self.rows, z)
        one = gate.new_ones(gate.size(-1)).index_fill(0, self.rows, 0)
        return self.give(gate + one) - self.give(gate)

    def find_gate(self):
        """Which rows of gate_up make z: the output bends with them, and is linear in the others."""
        size = len(self.B_gate)
        x = torch.linspace(-0.1, 0.1, 8 * size, device=self.B_gate.device).view(8, size)
        for rows in row_layouts(size, self.width, x.device):
            of_gate = x.new_zeros(size).index_fill(0, rows, 1)
            bend, rest = (
                (self.give(x + d / 2) - 2 * self.give(x) + self.give(x - d / 2)).abs().max()
                for d in (of_gate, 1 - of_gate))  # second differences
            if rest < 1e-3 < bend:
                return rows
        raise ValueError(f"In {self.name} no rows of the gate make a gate.")

    def attach(self, nalora):
        act = self.act.register_forward_pre_hook(Rows(nalora, self), with_kwargs=True)
        return act, self.module.register_forward_hook(Routing(nalora, self), with_kwargs=True)

    def is_again(self):
        """Whether we are in backward, which computes a counted pass again: it may stop within."""
        return self.counted and torch._C._current_graph_task_id() != -1

    def order(self, experts):
        """(expert, pair) of all R pairs, expert by expert; pair t k + j is token t's j-th."""
        kernel = self.module.config._experts_implementation
        if kernel not in KERNELS:
            raise ValueError(f"{self.name} {why_not(self.module)}")
        if kernel != "eager":
            return experts.flatten().sort()  # so does grouped_mm; watch.Routing for batched_mm
        expert, order = experts.t().flatten().sort(stable=True)  # by j, then t: a call an expert
        return expert, order % len(experts) * experts.size(1) + order // len(experts)

    def tokens(self, z):
        return self.scores.shape[:1]

    def sample(self, z, mask, every):
        """z (R, F), weight (R,), expert (R,) of the pairs, counted as they are in `order`."""
        pair = self.pair[every]
        weight = self.scores.flatten()[pair].ne(0)
        if mask is not None:
            weight &= mask.flatten().to(pair.device)[pair // self.scores.size(1)].ne(0)
        return z[every][:, self.columns], weight, self.expert[every].clone()

    def compare(self, x, received):
        """ValueError if z is not what the gate gives, in eight pairs of the first pass."""
        place = torch.linspace(0, len(received) - 1, 8, device=received.device).long()
        expert = self.expert[place]
        W = self.gate.get_param().detach()  # within a pass PEFT's LoRA is added to it
        W = W if self.module.is_transposed else W.mT  # (E, in, rows)
        tokens = x[self.pair[place] // self.scores.size(1)].to(W.dtype)
        z = torch.stack([token @ W[e] for token, e in zip(tokens, expert.tolist())])
        if self.module.has_bias:
            z += getattr(self.module, f"{self.gate.parameter_name}_bias").detach()[expert]
        if (received[place][:, self.columns] - z[:, self.rows]).norm() > 0.05 * z.norm():
            raise ValueError(f"In {self.name} the activation does not receive what the gate gives, "
                             "in the order of pairs that is known.")
        self.compared = True

    def factor(self, p, rows, scales, made):
        """What the step of p is multiplied by, as large as p or one column of it; rows
        (N, E, F, 1) and scales (N, E) are of all layers, and so is what `made` keeps."""
        is_A, is_gate, rank = kind = self.kinds[p]
        if kind not in made:
            factor = scales.repeat(1, rank)[:, None]  # (N, 1, r E)
            if is_A:
                factor = scales.repeat_interleave(rank, 1)[..., None]  # (N, E r, 1)
            if is_gate:
                of_gate = rows.squeeze(-1).mT.repeat(1, 1, rank)  # (N, F, r E)
                factor = factor.repeat(1, len(p), 1).index_copy(1, self.rows, of_gate)
            made[kind] = factor.unbind()
        return made[kind][self.index].expand(len(p), -1)

def why_not(module):
    """Why its experts cannot be steered, or ""."""
    if not hasattr(module, "is_concatenated"):
        return f"is a {type(module).__name__}, which computes its experts in a form of its own."
    if module._is_expert_parallel:
        return "spreads its experts over devices: use data parallelism alone."
    kernel = module.config._experts_implementation
    return "" if kernel in KERNELS else (
        f"computes its experts by {kernel!r}, where no activation is seen: call "
        "model.set_experts_implementation('grouped_mm').")

def find_experts(modules, gates):
    """([Experts] whose gate carries PEFT's LoRA, why others with LoRA are not steered)."""
    around = {}  # {experts' module: {name: PEFT's layer}}
    for name, m in modules.items():
        base = m.get_base_layer() if hasattr(m, "parameter_name") and lora_pairs(m) else None
        if base is not None and m.num_experts == getattr(base, "num_experts", m.num_experts):
            around.setdefault(base, {})[name] = m  # of other shapes there are biases
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
