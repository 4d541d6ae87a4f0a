"""PostgreSQL with psycopg or asyncpg, and limits that the server itself keeps."""
