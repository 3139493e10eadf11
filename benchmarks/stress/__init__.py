"""Small videos in many containers, and damage to them, for tests of what takes input."""
