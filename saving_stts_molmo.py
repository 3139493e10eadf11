"""`save_pretrained` that writes whole weights and our own code, also of a model that is sharded."""

import os


class OwnCodeMixin:
    """Goes before a class with `PreTrainedModel.save_pretrained`."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, state_dict: dict | None = None, **kwargs
    ):
        """
        As `PreTrainedModel.save_pretrained`. After `torch.distributed.fsdp.fully_shard` every process must call it, and
        all but one with `is_main_process=False`.
        """
        # `fully_shard` puts a class of torch's in place of ours, whose sources would be saved and never load again.
        sharded = type(self)
        own = next(base for base in sharded.__mro__ if not base.__module__.startswith("torch."))
        if own is not sharded and state_dict is None:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            state_dict = get_model_state_dict(self, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        self.__class__ = own
        try:
            return super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        finally:
            self.__class__ = sharded
