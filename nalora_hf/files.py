"""Files that are written whole or not at all, and read strictly."""
import json
import os
from contextlib import suppress
from pathlib import Path

import safetensors.torch

def write_files(directory: str | Path, files: dict) -> None:
    """Writes {name: tensors, JSON value, text or bytes}: all of them beside their places first,
    then into these, so that a file is the old one or the new, whatever happens and however many
    processes write it. ValueError if one cannot hold its value, OSError if it cannot be written."""
    folder = Path(directory)
    new = {name: folder / f"{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, value in files.items():
            if name.endswith(".safetensors"):
                value = safetensors.torch.save(value, {"format": "pt"})
            if name.endswith(".json"):
                value = json.dumps(value, indent=2) + "\n"
            folder.mkdir(parents=True, exist_ok=True)
            new[name].unlink(missing_ok=True)  # it may be a link to something else
            new[name].write_bytes(value.encode() if type(value) is str else value)
        for name in files:
            new[name].replace(folder / name)
    except (TypeError, RuntimeError) as e:
        raise ValueError(f"{name} cannot hold that: {e}") from None
    except OSError as e:
        raise OSError(f"{folder / name} cannot be written and is as it was before: {e}") from None
    finally:
        for path in new.values():
            with suppress(OSError):
                path.unlink()

def read(path, parse):
    """parse(path), with a ValueError that names the file where it is missing or broken."""
    try:
        return parse(path)
    except (OSError, ValueError, TypeError, RecursionError, safetensors.SafetensorError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None

def read_json(path: Path) -> dict:
    """The object that a JSON file holds. ValueError if it holds none."""
    return read(path, lambda p: dict(json.loads(p.read_text(encoding="utf-8"))))

def read_tensors(path: Path) -> dict:
    """{name: tensor} of a safetensors file. ValueError if one is not of finite floats."""
    tensors = read(path, safetensors.torch.load_file)
    for name, t in tensors.items():
        floats = t.is_floating_point() and t.element_size() > 1
        if not floats or not t.isfinite().all():
            raise ValueError(f"{path} cannot be used: {name} ({t.dtype}) does not hold finite "
                             "floats.")
    return tensors
