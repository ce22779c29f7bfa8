"""The bundle format: what is on disk, checked before anything is used."""
