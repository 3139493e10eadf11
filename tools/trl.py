"""TRL's `SFTTrainer` with the model's own loss, for who trains with TRL already; the extra `trl` installs it."""

from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from .training import VideoQACollator, log_aux_loss


class VideoSFTTrainer(SFTTrainer):
    """
    Modifications: the labels are those of [`VideoQACollator`], and the loss is the model's, auxiliary part included.
    (TRL's collator labels the placeholders of a video too, and its loss leaves the auxiliary one out.)

    Takes what `SFTTrainer` takes; rows of the datasets are chats, `{"messages": [...]}`.

    Raises:
        ValueError: settings with a loss of TRL's own; see [`log_aux_loss`].
    """

    def __init__(self, model, args: SFTConfig, data_collator=None, *, processing_class, **kwargs):
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        args.remove_unused_columns = False  # the collator reads the chats
        if args.loss_type not in ("nll", "chunked_nll"):
            raise ValueError(f"loss_type={args.loss_type!r} is TRL's own; the model knows 'nll' alone.")
        super().__init__(
            model,
            args,
            data_collator or VideoQACollator(processing_class),
            processing_class=processing_class,
            **kwargs,
        )
        log_aux_loss(self)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
