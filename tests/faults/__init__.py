"""Faults below a running application, and a comparison of its answers with what is stored."""
