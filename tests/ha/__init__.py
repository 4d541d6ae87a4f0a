"""What needs more servers than one: `make test-ha`, which `make test` leaves out."""
