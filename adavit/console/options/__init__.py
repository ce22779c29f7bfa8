"""What the commands are asked, under the headings of their --help."""
