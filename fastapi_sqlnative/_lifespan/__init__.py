"""An application's databases: installed, started, checked, shut down."""
