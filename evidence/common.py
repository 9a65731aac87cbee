"""Paths from here, and text and JSON files as results/ holds them: written whole or not at all."""
import json
import os
from pathlib import Path

from nalora import write_files

def relative(path):
    """The path from here, so that results name it alike on every machine. On another drive of
    Windows there is none: the path as it is."""
    try:
        return Path(os.path.relpath(path))
    except ValueError:
        return Path(path)

def write_text(path, text):
    write_files(path.parent, {path.name: text.encode()})

def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")
