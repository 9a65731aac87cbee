"""What a user finds before any training: names, hints, help, versions, sentences for wrong
arguments, a table of FFNs, and an installation that leaves nothing behind."""
import inspect
import pydoc
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nalora
import nalora_hf
from nalora import NALoRAConfig
from nalora_hf import NALoRA
from nalora_hf.tests.helpers import lora_llama, sgd, start, take_step

ROOT = Path(nalora_hf.__file__).parents[1]

def pyproject():
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")

def test_names_and_versions():
    assert nalora_hf.__version__ == re.search(r'^version = "(.*)"$', pyproject(), re.M)[1]
    assert nalora_hf.NALoRAConfig is nalora.NALoRAConfig
    names = {}
    exec("from nalora_hf import *", names)
    assert {*nalora_hf.__all__} <= {*names} and "Llama" not in names and "inspect" not in names
    assert {"NALoRACallback", *nalora_hf.__all__} <= {*dir(nalora_hf)}
    assert (ROOT / "nalora_hf" / "py.typed").exists()
    with pytest.raises(AttributeError, match="'nalora_hf' has no attribute 'NALoRACalback'"):
        nalora_hf.NALoRACalback

def test_without_transformers_only_the_callback_is_missing():
    code = ("import sys; sys.modules['transformers'] = None; sys.path.insert(0, sys.argv[1])\n"
            "import nalora_hf\n"
            "try: nalora_hf.NALoRACallback\n"
            "except ImportError as e: print(e)")
    said = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert "transformers" in said.stdout and not said.stderr

def test_help_shows_the_fields_of_a_configuration():
    text = pydoc.plain(pydoc.render_doc(NALoRAConfig))
    for field in ("keep: float = 0.5  # share of the gate channels", "ema: float = 0.9  # ",
                  "stride: int = 17  # ", 'mask: str = "derivative"  # ', "scale: str = "):
        assert field in text

def test_what_one_calls_has_hints():
    pytest.importorskip("transformers")
    functions = [getattr(nalora_hf, name) for name in nalora_hf.__all__]
    functions = [function for function in functions if inspect.isfunction(function)]
    assert len(functions) >= 9
    for function in (*functions, NALoRA.__init__, NALoRA.load_state_dict, NALoRA.summary,
                     nalora_hf.NALoRACallback.__init__):
        missing = {*inspect.signature(function).parameters} - {*inspect.get_annotations(function)}
        assert missing <= {"self"}, function

@pytest.mark.parametrize("make, sentence", [
    (lambda model, optimizer: NALoRA(optimizer, model),
     r"NALoRA\(model, optimizer\): the two were given the other way round\."),
    (lambda model, optimizer: NALoRA(model, model),
     r"NALoRA\(model, optimizer\): the two were given the other way round\."),
    (lambda model, optimizer: NALoRA(model.parameters(), optimizer),
     r"model is a generator, but has to be a torch\.nn\.Module\."),
    (lambda model, optimizer: NALoRA(model, optimizer, {"keep": 0.25}),
     r"config is a dict, but has to be a NALoRAConfig, such as NALoRAConfig\(keep=0\.25\)\."),
    (lambda model, optimizer: NALoRA(model, optimizer, 0.25),
     r"config is a float, but has to be a NALoRAConfig"),
    (lambda model, optimizer: NALoRA(model, optimizer, NALoRAConfig(keep=50)),
     r"NALoRAConfig\(keep=50, .*\): keep is in \(0, 1\], ema in \[0, 1\), stride 1 or more"),
    (lambda model, optimizer: NALoRA(model, optimizer, gate="gate_prj"),
     r"No gated FFN here has LoRA on its gate_prj\. It is on down_proj, gate_proj, up_proj: name "
     r"the one in front of the activation with gate=\.\.\., or put LoRA on the gate\."),
    (lambda model, optimizer: NALoRA(model, model.parameters()),
     r"NALoRA hooks the step\(\) of a torch\.optim\.Optimizer, which generator is not"),
    (lambda model, optimizer: NALoRA(model, optimizer, act="sillu"),
     r"act='sillu' is no activation: give a function, a module or one of silu"),
])
def test_a_wrong_argument_gets_one_sentence_and_leaves_nothing(make, sentence):
    model = lora_llama()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=f"^{sentence}") as raised:
        make(model, optimizer)
    assert "\n" not in str(raised.value)
    assert not optimizer._optimizer_step_post_hooks
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())

def test_summary_prints_a_table_of_ffns(capsys):
    model, optimizer, tool = start(NALoRAConfig(keep=0.25, stride=1))
    capsys.readouterr()
    tool.summary()
    before = capsys.readouterr().out.splitlines()
    assert before[0].endswith("after 0 steps") and before[1].split()[1:] == [
        "48", "100.0%", "nan", "nan%", "1.00"]
    for i in range(3):
        take_step(model, optimizer, i)
    tool.summary()
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == "channels moving k_hat z > 0 scale after 3 steps".split()
    for row, (name, s) in zip(rows, tool.statistics().items(), strict=True):
        assert row.split() == [name, "48", "25.0%", f"{s['k_hat']:.2f}",
                               f"{s['occupancy']:.1%}", f"{s['scale']:.2f}"]

def test_an_installation_leaves_nothing_in_the_checkout(tmp_path):
    """Nothing but pip's usual client is used; what is committed is installed."""
    def run(*command, **kwargs):
        return subprocess.run(command, capture_output=True, text=True, **kwargs)

    clone = tmp_path / "clone"
    if not (ROOT / ".git").exists() or run("git", "clone", "-q", ROOT, clone).returncode:
        pytest.skip("this is no git checkout")
    made = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ".", cwd=clone)
    if made.returncode and "hatchling" in made.stderr:
        pytest.skip("pip finds no hatchling here")
    assert made.returncode == 0, made.stderr
    assert run("git", "status", "--short", "--ignored", cwd=clone).stdout == ""
    wheel, = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"nalora.py", "nalora_hf/py.typed", "nalora_hf/steer.py", "nalora_hf/MODELS.json"} <= {
        *names}
    assert not any("tests" in name or name.startswith("evidence") for name in names)
