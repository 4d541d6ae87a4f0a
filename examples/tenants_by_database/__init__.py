"""Many tenants' databases behind the application's own router."""
