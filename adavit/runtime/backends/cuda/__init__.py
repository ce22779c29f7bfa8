"""What backends on a GPU share."""
