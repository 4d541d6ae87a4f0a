"""Two databases without a distributed transaction: an outbox, and a worker that delivers it."""
