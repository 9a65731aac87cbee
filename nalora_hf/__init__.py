"""NALoRA for models, trainers and adapter files of the Hugging Face libraries. The method, its pure
functions and the small Llama are those of nalora.py; this package finds the gates of other models,
steers them, and reads and writes PEFT's adapters."""
from nalora import LlamaConfig as LlamaConfig
from nalora import NALoRAConfig
from nalora_hf.adapters import Llama as Llama
from nalora_hf.adapters import (inject_lora, load_adapter, lora_layers, lora_parameters, merge_lora,
                                read_json, read_tensors, save_adapter, write_files)
from nalora_hf.modules import VERSION as __version__
from nalora_hf.steer import NALoRA

# Llama and LlamaConfig can be imported by name; `import *` must not hide those of transformers.
__all__ = ["NALoRA", "NALoRAConfig", "__version__", "inject_lora", "load_adapter", "lora_layers",
           "lora_parameters", "merge_lora", "read_json", "read_tensors", "save_adapter",
           "write_files"]

def __getattr__(name):
    if name == "NALoRACallback":  # it alone needs transformers
        from nalora_hf.trainer import NALoRACallback
        return NALoRACallback
    raise AttributeError(f"nalora_hf has no {name}.")
