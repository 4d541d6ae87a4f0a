"""PostgreSQL with psycopg or asyncpg, and timeouts that the server enforces."""
