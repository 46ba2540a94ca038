"""What this package changes in JAX, and every use that it makes of JAX's private modules."""
