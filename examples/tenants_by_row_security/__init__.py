"""Tenants in one database, separated by PostgreSQL's row-level security."""
