"""The backends: one file or one package each."""
