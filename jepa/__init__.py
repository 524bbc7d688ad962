"""Temporal JEPA: tokenizer, Mamba encoder with its EMA target, temporal predictor."""
