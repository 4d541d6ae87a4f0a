"""A repository injected by FastAPI, and an id that does not exist."""
