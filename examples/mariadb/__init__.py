"""MariaDB or MySQL with asyncmy and PyMySQL, without relying on RETURNING."""
