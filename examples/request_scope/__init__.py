"""A request's tenant, user and trace, as dependencies that reach the session."""
