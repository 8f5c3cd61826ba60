"""A request on its way through the engine: its jobs, the choice of tokens, and the text they become."""
