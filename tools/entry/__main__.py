"""`python -m stts_molmo`. In a folder of its own: at the root it would be taken for a Hub repository's file."""

from stts_molmo.tools.cli import run

run()
