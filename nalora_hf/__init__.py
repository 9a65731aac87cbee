"""NALoRA for models, trainers and adapter files of the Hugging Face libraries. The method, its pure
functions and the small Llama are those of nalora.py; this package finds the gates of other models,
steers them, and reads and writes PEFT's adapters."""
import inspect
import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nalora import LlamaConfig as LlamaConfig
from nalora import NALoRAConfig
from nalora_hf.adapters import Llama as Llama
from nalora_hf.adapters import (inject_lora, load_adapter, lora_layers, lora_parameters, merge_lora,
                                read_json, read_tensors, save_adapter, write_files)
from nalora_hf.modules import VERSION as __version__
from nalora_hf.steer import NALoRA

if TYPE_CHECKING:
    from nalora_hf.trainer import NALoRACallback as NALoRACallback

# Llama and LlamaConfig can be imported by name; `import *` must not hide those of transformers.
__all__ = ["NALoRA", "NALoRAConfig", "__version__", "inject_lora", "load_adapter", "lora_layers",
           "lora_parameters", "merge_lora", "read_json", "read_tensors", "save_adapter",
           "write_files"]
if find_spec("transformers"):
    __all__.append("NALoRACallback")

def __getattr__(name):
    if name == "NALoRACallback":  # it alone needs transformers
        from nalora_hf.trainer import NALoRACallback
        return NALoRACallback
    raise AttributeError(f"module 'nalora_hf' has no attribute {name!r}")

def __dir__():
    return sorted({*globals(), "NALoRACallback"})

def with_fields(kind):
    """A dataclass's docstring with its fields and their comments, which help() does not show."""
    try:
        source = inspect.getsource(kind)
    except OSError:  # only the compiled file is here
        return kind.__doc__
    return "\n".join([kind.__doc__, "", *re.findall(r"^    \w+: .*  # .*$", source, re.M)])

NALoRAConfig.__doc__ = with_fields(NALoRAConfig)
