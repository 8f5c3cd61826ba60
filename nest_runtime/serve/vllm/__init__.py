"""Serving on vLLM: its own server and engine, with our patches, admin API and headers.

``nest-runtime serve --engine vllm`` starts vLLM's server in this process (server.py). The same parts come into a vLLM
that is started the ordinary way through its plugin entry points (plugin.py), where ``VLLM_PLUGINS`` names
``nest_runtime``. In the workers: worker.py, rows.py. In the API server: front.py and everything else.
Importing this package loads neither torch nor vLLM.
"""
