"""A large result and an event stream, each holding a connection only while it must."""
