"""Prompts: reading files of them, rendering them for a model, and greedy answers to them."""
