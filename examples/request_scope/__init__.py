"""Tenant, user and trace of a request, as dependencies that reach the session."""
