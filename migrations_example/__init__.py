"""A complete Alembic project to copy: see README.md."""
