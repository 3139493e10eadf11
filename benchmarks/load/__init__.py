"""An engine under load, seen by its clients."""
