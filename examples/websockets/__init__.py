"""A session for each message of a socket, not for the whole socket."""
