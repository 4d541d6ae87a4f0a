"""An application with the test-suite that its users would write."""
