"""What pip adds to a Hub repository's files: the command line and the functions behind it."""
