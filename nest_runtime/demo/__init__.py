"""The demo: what a patch does and where it acts, in a browser. ``nest-runtime demo``; needs Gradio (extra ``demo``).

A backend answers: a model in this process (local.py) or a running server (remote.py). A conversation has two
sides, the base's and the patch's (talk.py). The tabs are in tabs/, put together in app.py; html/ makes their HTML and
SVG; server.py listens. Nothing here is loaded from elsewhere: no fonts, no scripts, no telemetry.
"""
