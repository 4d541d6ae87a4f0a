"""A database for each tenant, chosen by name."""
