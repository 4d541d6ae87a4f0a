"""Tenants in one database, kept apart by PostgreSQL's row-level security."""
