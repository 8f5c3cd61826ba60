"""``--follow``: a channel is polled, and what it names is tried before the switch to it."""
