"""Mapping database failures to HTTP responses, for a route and for a whole application."""
