"""Images in folders, and the labels that the names of folders give them."""
