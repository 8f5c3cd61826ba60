"""GGUF files as base models: header, identity, weights, tokenizer."""
