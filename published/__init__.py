"""A policy as it is handed on: the folder of export_policy.py, its card, and the hub where such folders lie."""

WEIGHTS, FACTS, CARD = "model.safetensors", "config.json", "README.md"  # the files of a folder
