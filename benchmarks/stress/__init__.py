"""Attacks on what takes input: damaged files, hostile names and links, bombs, kills, threads; `make stress`."""
