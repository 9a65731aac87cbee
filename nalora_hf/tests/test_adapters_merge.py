"""merge_lora: the merged model does what the model with LoRA did, or nothing is changed and a
sentence says why."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from nalora_hf import inject_lora, load_adapter, lora, lora_parameters, merge_lora, save_adapter
from nalora_hf.tests.helpers import batch, equal, small_llama

TOKENS = batch(5)[0]

def output(model):
    with torch.no_grad():
        return model(TOKENS)[0]

def gates(model):
    """The linear layer of each gate, with LoRA or without."""
    found = [layer.mlp.gate_proj for layer in model.model.layers]
    return [getattr(m, "base_layer", m) for m in found]

def awake(model, targets=("gate_proj",)):
    """The model with LoRA on it, which is far from doing nothing."""
    inject_lora(model, targets, 4, 8)
    torch.manual_seed(1)
    for p in lora_parameters(model):
        nn.init.normal_(p, std=0.3)
    return model.eval()

def everything(model):
    """All parameters, buffers and weights that are computed, as numbers."""
    stored = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return stored | {f"{i}": m.weight.detach().clone() for i, m in enumerate(gates(model))}

def refused(model, message):
    """merge_lora refuses, with the LoRA still in place and every number as it was."""
    before, numbers = output(model), everything(model)
    names = list(dict(model.named_modules()))
    with pytest.raises(ValueError, match=message) as told:
        merge_lora(model)
    assert "\n" not in str(told.value)
    assert names == list(dict(model.named_modules())) and equal(numbers, everything(model))
    torch.testing.assert_close(output(model), before, rtol=0, atol=0)

def merged_rightly(model, tolerance=1e-5):
    before = output(model)
    names = merge_lora(model)
    assert not any(hasattr(model.get_submodule(name), "lora_A") for name in names)
    assert all(model.get_submodule(name).weight.requires_grad is False for name in names)
    torch.testing.assert_close(output(model), before, rtol=tolerance, atol=tolerance)

# ---- weights that are computed before each pass ----
class Doubled(nn.Linear):
    """Its weight is a property."""
    @property
    def weight(self):
        return 2 * self.halved

class Symmetric(nn.Module):
    """A parametrization of one's own."""
    def forward(self, W):
        return W - W.mean()

def doubled(mlp):
    mlp.gate_proj.halved = nn.Parameter(mlp.gate_proj._parameters.pop("weight").detach() / 2)
    mlp.gate_proj.__class__ = Doubled

COMPUTED = {
    "prune": lambda mlp: prune.l1_unstructured(mlp.gate_proj, "weight", amount=0.5),
    "prune to rows": lambda mlp: prune.ln_structured(mlp.gate_proj, "weight", 0.3, n=2, dim=0),
    "weight_norm": lambda mlp: parametrizations.weight_norm(mlp.gate_proj),
    "weight_norm by a hook": lambda mlp: nn.utils.weight_norm(mlp.gate_proj),
    "spectral_norm": lambda mlp: parametrizations.spectral_norm(mlp.gate_proj),
    "spectral_norm by a hook": lambda mlp: nn.utils.spectral_norm(mlp.gate_proj),
    "a parametrization": lambda mlp: parametrize.register_parametrization(
        mlp.gate_proj, "weight", Symmetric()),
    "a property": doubled}

PERMANENT = {
    "prune": lambda m: prune.remove(m, "weight"),
    "weight_norm": lambda m: parametrize.remove_parametrizations(m, "weight"),
    "a parametrization": lambda m: parametrize.remove_parametrizations(m, "weight")}

def computed_llama(kind):
    model = small_llama().eval()
    for layer in model.model.layers:
        COMPUTED[kind](layer.mlp)
    output(model)
    return awake(model)

@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_is_refused_with_the_lora_in_place(kind):
    refused(computed_llama(kind), "gate_proj is computed before each pass: make it permanent")

@pytest.mark.parametrize("kind", PERMANENT)
def test_what_the_refusal_advises_works(kind):
    model = computed_llama(kind)
    before = output(model)
    for linear in gates(model):
        PERMANENT[kind](linear)
    torch.testing.assert_close(output(model), before)
    merged_rightly(model)

def test_saving_a_layer_with_a_spectral_norm_moves_nothing_in_it(tmp_path):
    model = computed_llama("spectral_norm").train()  # in train mode each look at W moves it
    before = {name: t.clone() for name, t in model.state_dict().items()}
    save_adapter(model, tmp_path)
    assert equal(before, model.state_dict())

@pytest.mark.parametrize("change", [
    lambda layer: prune.l1_unstructured(layer, "lora_B", amount=0.5),
    lambda layer: parametrize.register_parametrization(layer, "lora_A", Symmetric())])
def test_lora_that_is_computed_itself_is_neither_merged_nor_saved(tmp_path, change):
    model = awake(small_llama())
    change(model.model.layers[1].mlp.gate_proj)
    output(model)
    message = "lora_A or lora_B of model.layers.1.mlp.gate_proj is computed"
    refused(model, message)
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        lora_parameters(model)
    assert not (tmp_path / "a").exists()

def test_a_parametrized_parent_is_no_obstacle():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    parametrizations.weight_norm(attention, "in_proj_weight")
    inject_lora(attention, ["out_proj"], 4, 8)
    x = torch.randn(2, 5, 32)
    for p in lora_parameters(attention):
        nn.init.normal_(p, std=0.3)
    before = attention(x, x, x)[0]
    assert merge_lora(attention) == ["out_proj"] and attention.out_proj.weight.shape == (32, 32)
    torch.testing.assert_close(attention(x, x, x)[0], before)

# ---- layers with a forward or hooks of their own ----
def rewrites(module, inputs):
    """As hooks do that compute a weight anew before each pass."""
    module.weight.data.copy_(module.kept)

def with_rewriting_hook(linear):
    linear.kept = linear.weight.detach().clone()
    linear.register_forward_pre_hook(rewrites)

def with_gain(linear):
    linear.forward = lambda x: 2 * F.linear(x, linear.weight)

def with_doubled_output(linear):
    linear.register_forward_hook(lambda module, inputs, y: 2 * y)

def with_failing_hook(linear):
    linear.calls = []

    def fails(module, inputs):
        module.calls.append(1)
        if inputs[0].size(1) == 3:  # not in a pass of the model
            raise KeyError("position")

    linear.register_forward_pre_hook(fails)

@pytest.mark.parametrize("change, message", [
    (with_rewriting_hook, "hook of its own"), (with_gain, "forward or a hook of its own"),
    (with_doubled_output, "hook of its own"), (with_failing_hook, "Nothing is merged: 'position'")])
def test_a_layer_that_does_not_compute_with_its_weight_alone_is_refused(change, message):
    model = awake(small_llama())
    change(gates(model)[1])
    refused(model, message)

class Observed(nn.Linear):
    """As in quantization-aware training: the range of the weight is kept in a buffer."""
    def forward(self, x):
        self.widest.copy_(torch.maximum(self.widest, self.weight.abs().max()))
        return F.linear(x, self.weight.clamp(-self.widest, self.widest), self.bias)

def test_hooks_and_forwards_that_change_nothing_are_merged_under():
    model = awake(small_llama())
    seen = []
    gates(model)[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape))
    gates(model)[0].register_forward_hook(lambda m, inputs, y: seen.append(y.shape))
    observed = gates(model)[1]
    observed.__class__ = Observed
    observed.register_buffer("widest", observed.weight.abs().max())
    before = observed.widest.clone()
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    lora.follows_its_weight(observed)
    assert torch.equal(observed.widest, before)  # the try leaves no trace
    assert torch.equal(random_state, torch.get_rng_state())
    merged_rightly(model)
    assert len(seen) > 2

# ---- weights that are tied, quantized, of few bytes ----
def tied_by_parameter(model):
    model.other = nn.Linear(32, 48, bias=False)
    model.other.weight = gates(model)[1].weight

def tied_by_memory(model):
    model.other = nn.Linear(32, 48, bias=False)
    model.other.weight = nn.Parameter(gates(model)[1].weight.data, requires_grad=False)

def tied_by_a_buffer(model):
    model.register_buffer("copy", gates(model)[1].weight.data[:7])

def tied_to_another_with_lora(model):
    gates(model)[0].weight = gates(model)[1].weight

@pytest.mark.parametrize("tie", [tied_by_parameter, tied_by_memory, tied_by_a_buffer,
                                 tied_to_another_with_lora])
def test_a_tied_weight_is_refused_however_it_is_tied(tie):
    model = awake(small_llama())
    tie(model)
    refused(model, "gate_proj is tied to a layer that would change with it")

class Stored(torch.Tensor):
    """Only a linear layer can use it, as it is with quantized weights."""
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
        if function is F.linear:
            return function(*plain, **(kwargs or {}))
        if function.__name__ in ("add", "norm", "float", "new_empty", "zeros_like"):
            raise NotImplementedError(f"{function.__name__} of Stored")
        return super().__torch_function__(function, types, args, kwargs or {})

def replace_weights(model, change):
    for linear in gates(model):
        linear.weight = nn.Parameter(change(linear.weight.detach()), requires_grad=False)

def test_a_tensor_that_cannot_be_added_to_carries_lora_is_saved_and_not_merged(tmp_path):
    model = small_llama()
    replace_weights(model, lambda w: w.as_subclass(Stored))
    awake(model)
    assert type(lora_parameters(model)[0]) is nn.Parameter  # not of the base's class
    plain = awake(small_llama())
    assert torch.equal(output(model), output(plain))  # and as it would be on a plain base
    refused(model, "quantized")
    save_adapter(model, tmp_path)

@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_of_one_byte_are_refused(dtype):
    model = awake(small_llama())
    for linear in gates(model):
        linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        linear.forward = lambda x, linear=linear: F.linear(x, linear.weight.float())
    refused(model, "quantized")

def quanto(model):
    from optimum import quanto
    quanto.quantize(model, weights=quanto.qint8, include="*.gate_proj")
    quanto.freeze(model)

def torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    quantize_(model, Int8WeightOnlyConfig(),
              lambda m, name: isinstance(m, nn.Linear) and name.endswith("gate_proj"))

def bitsandbytes(model):
    import bitsandbytes as bnb
    for layer in model.model.layers:
        old = layer.mlp.gate_proj
        layer.mlp.gate_proj = bnb.nn.Linear4bit(32, 48, bias=False, quant_type="nf4")
        layer.mlp.gate_proj.load_state_dict(old.state_dict())
        layer.mlp.gate_proj.to("cpu")

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", [quanto, torchao, bitsandbytes], ids=lambda f: f.__name__)
def test_interop_quantized_bases_carry_lora_are_saved_and_not_merged(tmp_path, quantize):
    pytest.importorskip({quanto: "optimum.quanto"}.get(quantize, quantize.__name__))
    model = small_llama().eval()
    quantize(model)
    before = output(model)
    awake(model)
    adapted = output(model)
    assert (adapted - before).abs().max() > 0.1
    with pytest.raises(ValueError, match="quantized"):
        merge_lora(model)
    assert torch.equal(output(model), adapted)
    save_adapter(model, tmp_path)
    whole = small_llama().eval()  # the adapter of a quantized base fits the base itself
    load_adapter(whole, tmp_path)
    assert equal(*({n: p for n, p in m.named_parameters() if "lora" in n} for m in (whole, model)))
