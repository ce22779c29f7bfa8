"""Training: a dense backbone, then its policies jointly with it (`adavit-train`)."""
