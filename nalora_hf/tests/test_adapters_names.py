"""An adapter has the model's own names, whatever stands around the model, and the layers of a
module that was reloaded are still known."""
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from nalora_hf import (inject_lora, load_adapter, lora_layers, lora_parameters, merge_lora,
                       save_adapter)
from nalora_hf.modules import unwrapped_modules
from nalora_hf.tests.helpers import batch, equal, small_llama, trained_lora

ROOT = Path(__file__).resolve().parents[2]
FILES = ("adapter_model.safetensors", "adapter_config.json", "nalora.json")
TOKENS = batch(0)[0]

def contents(folder):
    return [(folder / file).read_bytes() for file in FILES]

class Wrapper(nn.Module):
    """As wrappers of other libraries hold a model. name: that of the attribute."""
    def __init__(self, model, name="module"):
        super().__init__()
        self.name = name
        setattr(self, name, model)

    def forward(self, *args):
        return getattr(self, self.name)(*args)

class DeepSpeedEngine(Wrapper):
    """By this name DeepSpeed's is known. It passes on what it has not."""
    def __init__(self, model):
        super().__init__(model)
        self.loss_scaler = nn.Identity()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

class GradSampleModule(Wrapper):
    """By this name Opacus's is known."""
    def __init__(self, model):
        super().__init__(model, "_module")

class FabricModule(Wrapper):
    """As Lightning Fabric's: the model stands at two places."""
    def __init__(self, model, inner=None):
        super().__init__(model if inner is None else inner, "_forward_module")
        self._original_module = model

def compiled(model):
    return torch.compile(model, backend="eager")

def checkpointed(model):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    checkpoint_wrapper.apply_activation_checkpointing(
        model, check_fn=lambda m: type(m).__name__ in ("Block", "LoRALinear"))
    return model

def parts_wrapped(model):
    for layer in model.model.layers:
        layer.mlp = AveragedModel(layer.mlp)
        layer.self_attn = nn.DataParallel(layer.self_attn)
    return model

AROUND = {
    "average": AveragedModel, "average of an average": lambda m: AveragedModel(AveragedModel(m)),
    "average of DataParallel": lambda m: AveragedModel(nn.DataParallel(m)),
    "Fabric": FabricModule, "Fabric, compiled": lambda m: FabricModule(m, compiled(m)),
    "compiled Fabric": lambda m: compiled(FabricModule(m)),
    "DeepSpeed": DeepSpeedEngine, "Opacus": GradSampleModule,
    "DeepSpeed in Fabric": lambda m: FabricModule(m, DeepSpeedEngine(m)),
    "another's module": Wrapper, "another's _module": lambda m: Wrapper(m, "_module"),
    "another's, of DataParallel": lambda m: Wrapper(nn.DataParallel(m)),
    "parts": parts_wrapped, "checkpoints in an average": lambda m: AveragedModel(checkpointed(m))}

@pytest.mark.parametrize("around", AROUND)
def test_files_are_those_of_the_model_alone(tmp_path, around):
    wrap, plain = AROUND[around], trained_lora()
    save_adapter(plain, tmp_path / "plain")
    wrapped = wrap(trained_lora())
    save_adapter(wrapped, tmp_path / "wrapped")
    assert contents(tmp_path / "wrapped") == contents(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / FILES[1]).read_text())["task_type"] == "CAUSAL_LM"
    assert list(lora_layers(wrapped)) == list(lora_layers(plain))
    fresh, wanted = wrap(small_llama()), plain(TOKENS)[0]
    assert load_adapter(fresh, tmp_path / "plain") == list(lora_layers(plain))
    torch.testing.assert_close(fresh(TOKENS)[0], wanted)
    merge_lora(fresh)
    torch.testing.assert_close(fresh(TOKENS)[0], wanted)

def test_an_average_under_ddp_and_ddp_of_an_average(tmp_path):
    save_adapter(trained_lora(), tmp_path / "plain")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0,
                                         world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(trained_lora())
        for i, model in enumerate((ddp, AveragedModel(ddp), DeepSpeedEngine(ddp), Wrapper(ddp))):
            save_adapter(model, tmp_path / str(i))
            assert contents(tmp_path / str(i)) == contents(tmp_path / "plain")
    finally:
        torch.distributed.destroy_process_group()

@pytest.mark.parametrize("cls", [
    "DataParallel", "DistributedDataParallel", "AveragedModel", "DeepSpeedEngine",
    "AbstractGradSampleModule", "GradSampleModule", "ModelEmaV2", "ModelEmaV3", "Float16Module",
    "ShardedDataParallel"])
def test_wrappers_that_are_known_by_name_hold_any_model(cls):
    known = type("Ours", (type(cls, (Wrapper,), {}),), {})  # a subclass, too
    for name in ("module", "_module"):
        assert list(unwrapped_modules(known(nn.Sequential(nn.Linear(8, 8)), name))) == ["", "0"]

def own_module(name):
    """Models with a layer of that name, which belongs to it."""
    torch.manual_seed(0)
    block = nn.Module()
    setattr(block, name, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    return nn.ModuleDict({"deep": block, name: nn.Linear(8, 8)})

@pytest.mark.parametrize("name", ["module", "_module"])
def test_a_models_own_module_of_that_name_keeps_it(tmp_path, name):
    names = [f"deep.{name}.0", f"deep.{name}.1", name]
    model = own_module(name)
    assert inject_lora(model, ["0", "1", name], 2, 4) == names
    for p in lora_parameters(model):
        nn.init.normal_(p)
    for i, whole in enumerate((model, nn.DataParallel(model), AveragedModel(model))):
        save_adapter(whole, tmp_path / str(i))
        keys = load_file(tmp_path / str(i) / FILES[0])
        assert {key.split(".lora_")[0] for key in keys} == {f"base_model.model.{n}" for n in names}
    fresh = own_module(name)
    assert load_adapter(fresh, tmp_path / "2") == names
    assert equal(fresh.state_dict(), model.state_dict())

@pytest.mark.parametrize("model", [
    Wrapper(nn.Linear(8, 8)),  # one layer, of a class that nobody knows
    Wrapper(nn.Sequential(nn.Linear(8, 8)), "_module"), Wrapper(compiled(nn.Linear(8, 8)))],
    ids=["linear", "sequential", "compiled"])
def test_a_part_that_is_no_whole_model_is_not_taken_for_one(model):
    (name,) = [n for n, m in unwrapped_modules(model).items() if isinstance(m, nn.Linear)]
    assert name.startswith(model.name)

def test_a_whole_model_with_a_module_and_a_head_is_no_wrapper():
    model = Wrapper(small_llama())
    assert "model.layers.0.mlp" in unwrapped_modules(model)
    model.head = nn.Linear(61, 2)
    assert "module.model.layers.0.mlp" in unwrapped_modules(model)
    model = Wrapper(small_llama())
    model.config = {"a config": "of its own"}
    assert "module.model.layers.0.mlp" in unwrapped_modules(model)

def test_interop_peft_finds_the_adapter_of_an_average(tmp_path):
    peft, transformers = (pytest.importorskip(name) for name in ("peft", "transformers"))
    from nalora_hf.tests.helpers import FFN, family
    base = family("Llama").eval()
    model = copy.deepcopy(base)
    inject_lora(model, FFN, 4, 8)
    average = AveragedModel(model)
    for p in lora_parameters(average):
        nn.init.normal_(p, std=0.2)
    save_adapter(average, tmp_path)
    assert isinstance(average.module, transformers.PreTrainedModel)
    wanted, was = (m.eval()(input_ids=TOKENS).logits for m in (average.module, base))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(theirs, wanted)
    assert (theirs - was).abs().max() > 0.1

@pytest.mark.parametrize("library", ["lightning_fabric", "opacus"])
def test_interop_wrappers_of_other_libraries(tmp_path, library):
    pytest.importorskip(library)
    if library == "opacus":
        from opacus.grad_sample import GradSampleModule
        wrapped = GradSampleModule(trained_lora(), strict=False)
    else:
        from lightning_fabric import Fabric
        wrapped = Fabric(accelerator="cpu", devices=1).setup(trained_lora())
    save_adapter(wrapped, tmp_path / "wrapped")
    save_adapter(trained_lora(), tmp_path / "plain")
    assert contents(tmp_path / "wrapped") == contents(tmp_path / "plain")

# ---- after importlib.reload, as a notebook's %autoreload does it ----
RELOADED = """
import importlib, json, sys
sys.modules["peft"] = None  # it is not needed here, and slow to import
import pytest, torch
import nalora, nalora_hf
from nalora_hf.tests.helpers import FFN, batch, small_llama, trained_lora

def check(folder, *modules):
    tokens = batch(0)[0]
    old = [trained_lora(), small_llama()]
    nalora.inject_lora(old[1], FFN, 4, 8)  # layers of nalora's own
    wanted = [model(tokens)[0] for model in old]
    for name in modules:
        importlib.reload(sys.modules[name])
    for i, model in enumerate(old):
        with pytest.raises(ValueError, match="carries LoRA already"):
            nalora_hf.inject_lora(model, FFN, 4, 8)
        with pytest.raises(ValueError, match="carries LoRA"):
            nalora_hf.Llama.save_pretrained(model, folder)
        assert len(nalora_hf.lora_layers(model)) == 6
        nalora_hf.save_adapter(model, f"{folder}/{i}")
        config = json.load(open(f"{folder}/{i}/adapter_config.json"))
        assert config["task_type"] == "CAUSAL_LM", config
        fresh = small_llama()
        assert len(nalora_hf.load_adapter(fresh, f"{folder}/{i}")) == 6
        assert torch.equal(fresh(tokens)[0], wanted[i])
        nalora_hf.load_adapter(model, f"{folder}/{i}")
        assert len(nalora_hf.merge_lora(model)) == 6
        torch.testing.assert_close(model(tokens)[0], wanted[i])
        assert not any("lora" in name for name in model.state_dict())
        assert len(nalora_hf.inject_lora(model, FFN, 4, 8)) == 6

every = ["modules", "files", "lora", "adapters"]
for modules in (["nalora"], ["nalora_hf.lora"], ["nalora_hf.adapters"],
                ["nalora", *(f"nalora_hf.{name}" for name in every), "nalora_hf"]):
    check(sys.argv[1], *modules)
    print("known after", *modules)
"""

def test_layers_of_a_reloaded_module_are_known(tmp_path):
    done = subprocess.run([sys.executable, "-c", RELOADED, str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("known after") == 4, done.stderr[-2000:]
