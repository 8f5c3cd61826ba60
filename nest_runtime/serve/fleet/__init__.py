"""Several servers switched as one, and the application for Ray Serve."""
