"""Files as they should not be: broken, foreign, hostile. Each is refused in a sentence or read."""
import json
import math
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import nalora_hf
from nalora import LoRALinear, NALoRAConfig
from nalora_hf import NALoRA, adapters, inject_lora, load_adapter, save_adapter
from nalora_hf.modules import VERSION
from nalora_hf.tests.helpers import FFN, batch, small_llama, spoiled, trained_lora

def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file.json"
    nalora_hf.write_files(tmp_path, {"file.json": {"a": 1}})
    with pytest.raises(ValueError, match="file.json cannot hold that"):
        nalora_hf.write_files(tmp_path, {"other.json": {"b": 2}, "file.json": {"a": object()}})
    assert json.loads(target.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["file.json"]

def test_two_files_are_both_old_or_both_serialised(tmp_path):
    nalora_hf.write_files(tmp_path, {"a.json": 1, "b.json": 2})
    with pytest.raises(ValueError, match="b.json cannot hold"):
        nalora_hf.write_files(tmp_path, {"a.json": 3, "b.json": {1, 2}})
    assert [(tmp_path / n).read_text() for n in ("a.json", "b.json")] == ["1\n", "2\n"]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b.json"]

@pytest.fixture(scope="session")
def intact(tmp_path_factory):
    """An adapter that can be spoiled."""
    folder = tmp_path_factory.mktemp("intact")
    save_adapter(trained_lora(), folder)
    return folder

@pytest.mark.parametrize("file",
                         ["adapter_model.safetensors", "adapter_config.json", "nalora.json"])
def test_a_spoiled_adapter_is_refused_with_a_sentence_or_read_whole(intact, tmp_path, file):
    folder = tmp_path / "copy"
    shutil.copytree(intact, folder)
    path = folder / file
    whole = path.read_bytes()
    read = lambda: load_adapter(small_llama(), folder)
    read()
    names = sorted(os.listdir(folder))
    refused = 0
    for kind, content in spoiled(whole, tmp_path / "executed"):
        path.write_bytes(content)
        try:
            read()
            assert kind not in ("cut", "pickle"), len(content)
        except ValueError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 20 and not (tmp_path / "executed").exists()
    path.unlink()
    for spoil in (path.mkdir, lambda: (path.rmdir(), path.symlink_to("/dev/null")),
                  lambda: (path.unlink(), path.symlink_to(path))):
        spoil()
        if path.is_symlink() and not path.exists() and file == "nalora.json":
            continue  # it need not be there, and a circle of links is none
        with pytest.raises(ValueError, match="cannot be read|no plain LoRA"):
            read()
    path.unlink()
    path.write_bytes(whole)
    read()
    assert sorted(os.listdir(folder)) == names  # reading writes nothing

@pytest.mark.parametrize(
    "spoil, message",
    [(lambda t, k: {**t, k: t[k].int()}, "int32"),
     (lambda t, k: {**t, k: t[k] * math.nan}, "finite"),
     (lambda t, k: {**t, k: t[k] / 0}, "finite"), (lambda t, k: {**t, k: t[k].bool()}, "bool"),
     (lambda t, k: {**t, k: t[k].to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
     (lambda t, k: {**t, k.replace("layers.0", "layers.0/../.."): t[k].clone()}, "layers|not fit"),
     (lambda t, k: {**t, "/etc/passwd": t[k].clone()}, "passwd|not fit"),
     (lambda t, k: {**t, k: t[k][:1]}, "not fit"), (lambda t, k: {}, "not fit"),
     (lambda t, k: {**t, k: t[k][None]}, "not fit")])
def test_weights_that_are_not_weights_are_refused(intact, tmp_path, spoil, message):
    shutil.copytree(intact, tmp_path / "copy")
    path, model = tmp_path / "copy" / "adapter_model.safetensors", small_llama()
    tensors = load_file(path)
    save_file(spoil(tensors, next(k for k in tensors if "layers.0.mlp.gate_proj" in k)), path)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, path.parent)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())

@pytest.mark.parametrize(
    "change, named",
    [({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"use_rslora": True}, "use_rslora"),
     ({"init_lora_weights": "olora"}, "init_lora_weights"), ({"bias": "all"}, "bias"),
     ({"of_tomorrow": 3}, "of_tomorrow"), ({"lora_bias": True}, "lora_bias"),
     ({"target_parameters": ["x"]}, "target_parameters"), ({"peft_type": None}, "peft_type"),
     ({"init_lora_weights": "eva"}, ""), ({"init_lora_weights": False}, ""),
     ({"of_tomorrow": None, "of_the_day_after": [], "use_dora": False, "alpha_pattern": {}}, ""),
     ({"runtime_config": {"ephemeral_gpu_offload": False}, "lora_dropout": 0.1}, ""),
     ({"target_modules": FFN + ["q_proj"]}, "not complete"),
     ({"target_modules": ["gate_proj"]}, "not complete"),
     ({"target_modules": None}, "not complete"),
     ({"target_modules": r".*\.mlp\.(gate|up|down)_proj"}, ""),
     ({"target_modules": r".*\.(q|gate|up|down)_proj"}, "not complete"),
     ({"target_modules": "("}, "not complete"), ({"target_modules": 5}, "not complete"),
     ({"target_modules": FFN + ["q_proj"], "exclude_modules": ["q_proj"]}, "")], ids=str)
def test_an_adapter_is_what_it_says_or_refused(tmp_path, change, named):
    save_adapter(trained_lora(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    model = small_llama()
    if not named:
        assert len(load_adapter(model, tmp_path)) == 6
        return
    with pytest.raises(ValueError, match=named):
        load_adapter(model, tmp_path)
    assert not adapters.has_lora(model)

def test_keys_without_prefix_are_read_and_none_is_thrown_away(tmp_path):
    model, (tokens, _) = trained_lora(), batch(1)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    bare = {k.removeprefix("base_model.model."): t for k, t in tensors.items()}
    save_file(bare, path)
    fresh = small_llama()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(tokens)[0], model(tokens)[0])
    save_file({**tensors, **{k: t + 1 for k, t in bare.items()}}, path)  # which one holds?
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(small_llama(), tmp_path)

def test_what_an_adapter_would_not_hold_is_refused(tmp_path):
    model = trained_lora()
    model.model.norm.weight.requires_grad_(True)
    model.gain = nn.ParameterDict({"lora_A": torch.ones(1)})  # no pair of ours
    with pytest.raises(ValueError, match="model.norm.weight, gain.lora_A would not be in the"):
        save_adapter(model, tmp_path / "a")

    class More(LoRALinear):
        pass

    model = trained_lora()
    model.model.layers[0].mlp.gate_proj.__class__ = More
    with pytest.raises(ValueError, match="more than LoRA"):
        save_adapter(model, tmp_path / "a")
    model = trained_lora()
    model.model.layers[0].mlp.gate_proj.scaling *= 2
    with pytest.raises(ValueError, match="scaled otherwise"):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="cannot hold"):
        save_adapter(trained_lora(), tmp_path / "a", settings={"x": object()})
    assert not list(tmp_path.rglob("*.*"))
    save_adapter(trained_lora(), tmp_path / "a", base_model=Path("some/base"))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["task_type"] == "CAUSAL_LM"
    classifier = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    inject_lora(classifier, ["0"], 2, 4)
    save_adapter(classifier, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["task_type"] is config["base_model_name_or_path"] is None

def test_a_regular_expression_names_no_layer_whose_name_merely_ends_alike(tmp_path):
    def made():
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(8, 8),
                              "encoder": nn.ModuleDict({"fc": nn.Linear(8, 8)})})

    alone = nn.ModuleDict({"fc": made()["fc"]})
    inject_lora(alone, ["fc"], 2, 4)
    save_adapter(alone, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": "fc"}))
    assert load_adapter(made(), tmp_path) == ["fc"]

# ---- nalora.json ----
def record(folder):
    return json.loads((folder / "nalora.json").read_text())

def test_the_record_tells_lora_from_nalora(tmp_path):
    model = trained_lora()
    config = NALoRAConfig(keep=0.25, scale="none")
    nalora = NALoRA(model, torch.optim.AdamW(nalora_hf.lora_parameters(model)), config)
    save_adapter(model, tmp_path / "lora", settings={"seed": 3})
    save_adapter(model, tmp_path / "nalora", settings={"seed": 3}, nalora=nalora)
    plain, steered = record(tmp_path / "lora"), record(tmp_path / "nalora")
    assert (plain["method"], plain["config"], plain["version"]) == ("lora", None, VERSION)
    assert steered["method"] == "nalora" and steered["version"] == VERSION
    assert steered["config"] == {"keep": 0.25, "ema": 0.9, "stride": 17, "mask": "derivative",
                                 "scale": "none"}
    assert plain["settings"] == steered["settings"] == {"seed": 3}
    assert plain["base"] == steered["base"] and len(plain["base"]) == 6
    for name in ("lora", "nalora"):
        assert len(load_adapter(small_llama(), tmp_path / name)) == 6

@pytest.mark.parametrize("wrong", [NALoRAConfig(), {"keep": 0.5}, True, small_llama()],
                         ids=lambda wrong: type(wrong).__name__)
def test_what_is_no_nalora_is_refused(tmp_path, wrong):  # a model has a config, too
    message = f"nalora is the NALoRA that steered the model, and no {type(wrong).__name__}"
    with pytest.raises(ValueError, match=message) as told:
        save_adapter(trained_lora(), tmp_path / "a", nalora=wrong)
    assert "\n" not in str(told.value) and not (tmp_path / "a").exists()

def test_an_adapter_of_version_1_is_read(tmp_path):
    model = trained_lora()
    save_adapter(model, tmp_path, settings=[1])
    now = record(tmp_path)
    assert now.keys() == {"method", "config", "version", "settings", "base"}
    old = {"settings": now["settings"], "base": now["base"]}  # all that version 1 wrote
    (tmp_path / "nalora.json").write_text(json.dumps(old))
    fresh = small_llama()
    assert len(load_adapter(fresh, tmp_path)) == 6
    assert torch.equal(fresh(batch(1)[0])[0], model(batch(1)[0])[0])
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(small_llama(seed=3), tmp_path)

def test_the_version_is_the_packages():
    text = (Path(nalora_hf.__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{VERSION}"' in text

# ---- writes that are interrupted, or go on at once ----
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_files(monkeypatch, tmp_path, error):
    save_adapter(trained_lora(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    own = Path.write_bytes

    def interrupted(path, content):
        if path.name.startswith("nalora.json"):  # the last one
            own(path, content[:10])
            raise error
        return own(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(error):
            save_adapter(trained_lora(seed=1), tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ranks_that_write_at_once_do_not_disturb_each_other(tmp_path):
    def write():
        for _ in range(300):
            nalora_hf.write_files(tmp_path, {"a.json": [0] * 500, "b.json": [1] * 500})

    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=write) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b.json"]
    assert json.loads((tmp_path / "b.json").read_text()) == [1] * 500

def test_tensors_that_share_memory_are_refused_in_a_sentence(tmp_path):
    model = trained_lora()
    layers = model.model.layers
    layers[0].mlp.gate_proj.lora_A = layers[1].mlp.gate_proj.lora_A
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot hold that"):
        save_adapter(model, tmp_path / "a")
