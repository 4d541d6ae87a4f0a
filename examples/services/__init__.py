"""Two services in one transaction, and no session passed between them."""
