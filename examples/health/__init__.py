"""Liveness, readiness and draining, in an application factory."""
