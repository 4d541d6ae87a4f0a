"""A large result and an event stream, which hold a connection only while they need it."""
