"""What the commands are asked and what they print."""
