"""Break what is below a running application, and compare its answers with what is stored."""
