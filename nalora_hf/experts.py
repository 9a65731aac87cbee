"""Experts of mixtures. transformers holds those of a layer in one module, whose activation receives
one row for each pair of a token and an expert; PEFT holds their LoRA in one A and one B.

Few tokens reach an expert: 7.5 pairs a step of 2,048 tokens, 128 experts, top 8 and stride 17. On
a small Qwen3-MoE (python -m nalora_hf.strides, 3 seeds) strides 17, 5 and 1 gave: mask as by a
large sample in 95.5, 96.4, 96.5 % of its rows; 1.4, 1.1, 0.8 % of them change a step; 15, 10, 7 %
of the experts see no pair in a step. So experts keep the stride of other FFNs.
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
        for A, B in (pair for layer in layers for pair in lora_pairs(layer)):
            self.kinds[A] = True, False, len(A) // self.count
            self.kinds[B] = False, any(B is other for other in self.B_gates), len(A) // self.count
        self.width = len(self.B_gate) // (2 if module.has_gate else 1)  # F
        self.shape = self.count, self.width
        self.received = []  # by the activation, in this pass
        self.expert = self.pair = self.scores = None  # see `order`; the router's (T, k)
        self.compared = False
        self.columns = slice(None)  # which of what is received are z
        self.rows = self.find_gate()

    def find_gate(self):
        """Which rows of gate_up make z: the output bends with them, and is linear in the others.
        And where z is seen: at act_fn, or in front of an _apply_gate of the family's own."""
        its = type(self.module)._apply_gate if self.module.has_gate else None
        give = its.__get__(self.module) if its else self.act
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

        if its and not its.__module__.startswith("transformers.integrations"):
            self.phi = phi
            self.columns = rows
            self.act = vars(self.module).setdefault("_apply_gate", Tap(self.module))
        return rows

    def attach(self, nalora):
        act = self.act.register_forward_pre_hook(Rows(nalora, self), with_kwargs=True)
        return act, self.module.register_forward_hook(Routing(nalora, self), with_kwargs=True)

    def is_again(self):
        """Whether backward computes a pass again that was counted: it may stop within."""
        return self.counted and torch._C._current_graph_task_id() != -1

    def order(self, experts):
        """(expert, pair) of all R pairs, expert by expert; pair t k + j is token t's j-th."""
        kernel = self.module.config._experts_implementation
        if kernel not in KERNELS:
            raise ValueError(f"{self.name} {why_not(self.module)}")
        if kernel != "eager":
            return experts.flatten().sort()  # as grouped_mm sorts them
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
        W = self.gate.get_param().detach()  # LoRA's part is in it while PEFT computes
        W = W if self.module.is_transposed else W.mT  # (E, in, rows)
        tokens = x[self.pair[place] // self.scores.size(1)].to(W.dtype)
        z = torch.stack([x @ W[e] for x, e in zip(tokens, expert.tolist())])
        if self.module.has_bias:
            z += getattr(self.module, f"{self.gate.parameter_name}_bias").detach()[expert]
        if (received[place][:, self.columns] - z[:, self.rows]).norm() > 0.05 * z.norm():
            raise ValueError(f"In {self.name} the activation does not receive what the gate gives, "
                             "in the order of pairs that is known.")
        self.compared = True

    def factor(self, p, rows, scales, made):
        """What the step of p is multiplied by; rows (N, E, F, 1), scales (N, E) of all layers.
        Expert e owns the rows e r to e r + r - 1 of A (E r, in), and of B (out, r E) the columns e,
        e + E, e + 2 E, ..."""
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
