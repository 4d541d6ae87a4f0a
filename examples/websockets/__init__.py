"""A session for each message of a socket, not one for the socket."""
