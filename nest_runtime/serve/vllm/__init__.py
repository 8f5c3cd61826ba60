"""Serving on vLLM: its own server and engine, with our patches, admin API and headers.

``nest-runtime serve --engine vllm`` starts vLLM's server in this process (server.py). The same parts come into a vLLM
started by its own command through its plugin entry points (plugin.py), if ``VLLM_PLUGINS`` names ``nest_runtime``. In
the workers: worker.py, rows.py. In the API server: front.py and everything else. Importing this package loads neither
torch nor vLLM.
"""
