"""The engine on one machine: transformers' continuous batching, or plain batches."""
