"""A running nest-runtime server as a garak generator: `--target_type nest --target_name NAME`.

NAME is what the server calls its model: NAME itself is answered under the active patch, `NAME@v2` or `NAME@base` under
another one where the server shows them. The server is at http://127.0.0.1:8000/v1/ unless the config says another
`uri`; the key of a server that asks for one is read from NEST_API_KEY.
"""

import os

from garak.generators.openai import OpenAICompatible

DEFAULT_CLASS = "ServerGenerator"


class ServerGenerator(OpenAICompatible):
    """Answers of a nest-runtime server, greedy and without stop words unless the config says otherwise."""

    ENV_VAR = "NEST_API_KEY"
    generator_family_name = "nest-runtime"
    # garak's own defaults sample, and end answers at the first `#` or `;`.
    DEFAULT_PARAMS = OpenAICompatible.DEFAULT_PARAMS | {
        "uri": "http://127.0.0.1:8000/v1/",
        "temperature": 0.0,
        "stop": None,
    }

    def _validate_env_var(self) -> None:
        if not getattr(self, "api_key", None):
            self.api_key = os.environ.get(self.key_env_var) or "none"
