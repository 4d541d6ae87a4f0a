"""An application with the test suite that its developers would write."""
