"""All changes to be noticed: those of scores, selection and attention, of prompts and training, of asking."""

from .asking import OF_ASKING
from .mutation import Mutation
from .prompt import OF_PROMPT_AND_TRAINING
from .tower import OF_THE_TOWER

MUTATIONS: list[Mutation] = [*OF_THE_TOWER, *OF_PROMPT_AND_TRAINING, *OF_ASKING]
