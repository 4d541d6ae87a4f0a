"""Many tenants' databases behind a router of the application's own."""
