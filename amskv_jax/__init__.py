"""Next-scale visual autoregressive image models in JAX, with a cache that keeps only what matters."""
