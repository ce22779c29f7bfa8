"""One file per backend."""
