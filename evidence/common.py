"""Text and JSON files as results/ holds them: written whole or not at all."""
import json

from nalora import write_files

def write_text(path, text):
    write_files(path.parent, {path.name: text.encode()})

def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")
