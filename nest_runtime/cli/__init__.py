"""The command ``nest-runtime``: ``main.py`` puts it together of commands/; what they share is beside it."""
