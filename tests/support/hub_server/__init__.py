"""A Hub-compatible HTTP server for tests: what huggingface_hub 2.4 asks of the Hub, in memory, with faults on demand.

state.py holds repositories, routes.py answers, xet.py finds Xet hashes, faults.py breaks things, server.py runs it
all in a thread. No git behind it, no pages, no discussions, model repositories only.
"""

from tests.support.hub_server.faults import Fault
from tests.support.hub_server.server import HubServer
from tests.support.hub_server.state import Blob, Repo

__all__ = ["Blob", "Fault", "HubServer", "Repo"]
