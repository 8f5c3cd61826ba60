"""The local store of patches: content by digest, names, what is active, and the history."""
