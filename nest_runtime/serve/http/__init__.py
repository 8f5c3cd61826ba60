"""The HTTP side of the server: routes, schemas, errors, connections, and what stands around a request."""
