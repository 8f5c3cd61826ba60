"""The patches of a server: loaded, switched, written down, and taken off again."""
