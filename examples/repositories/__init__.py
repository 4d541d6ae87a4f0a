"""A repository injected by FastAPI, and a 404 for an unknown ID."""
