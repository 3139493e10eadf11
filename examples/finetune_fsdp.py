"""Fine-tune an STTS checkpoint whose weights are sharded over processes (FSDP2), in a loop of its own.

On two processes of a CPU, and on eight GPUs of each of two machines:

    torchrun --nproc_per_node 2 examples/finetune_fsdp.py --model checkpoints/stts-molmo-tiny \\
        --dataset examples/finetune.jsonl --output_dir runs/fsdp --max_steps 4 --learning_rate 1e-3 --num_frames 4

    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint first-machine:29500 \\
        examples/finetune_fsdp.py --model molmo2-4b-stts --dataset my_videos.jsonl --output_dir /shared/runs/fsdp \\
        --bf16 --gradient_checkpointing --max_length 9686 --per_device_train_batch_size 8

A run goes on from the newest checkpoint in its folder. Rows with videos, with images and without either may be mixed.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from finetune import load_chats, media_of_rows
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration
from stts_molmo.processing_stts_molmo import STTSMolmoProcessor
from stts_molmo.tools.distributed import clip_gradients, encode_in_step, save_sharded, shard
from stts_molmo.tools.publishing import inherited, write_card
from stts_molmo.tools.sampling import micro_batches
from stts_molmo.tools.training import VideoQACollator, parameter_groups
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub id of an STTS checkpoint")
    parser.add_argument("--dataset", required=True, help="as for finetune.py")
    parser.add_argument("--output_dir", required=True, type=Path, help="shared by all machines")
    parser.add_argument("--max_steps", type=int, default=6250)
    parser.add_argument("--warmup_steps", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--per_device_train_batch_size", type=int, default=1)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--max_length", type=int, help="pack the samples of a micro-batch into rows of so many tokens")
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--num_frames", type=int, help="most frames of a video; else the checkpoint's")
    parser.add_argument("--save_steps", type=int, default=500)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights are kept in float32")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    return parser.parse_args(argv)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint of a run, 0 for none. Its `.metadata` is written when all of it is there."""
    return max((int(file.parent.name.rpartition("-")[2]) for file in folder.glob("checkpoint-*/.metadata")), default=0)


def main(argv: list[str] | None = None) -> list[float]:
    """Returns the loss of each step, the mean over all labels of the step."""
    args = parse_arguments(argv)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    dist.init_process_group(None if accelerator else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if accelerator:
        device = torch.device(accelerator.type, rank % torch.accelerator.device_count())
        torch.accelerator.set_device_index(device.index)

    processor = STTSMolmoProcessor.from_pretrained(args.model)
    model = STTSMolmoForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).to(device).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if args.bf16 else None
    shard(model, **({"mp_policy": policy} if policy else {}))
    media = media_of_rows(args.dataset, "train")
    encode_in_step(model, images="image" in media)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.learning_rate))
    schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, args.max_steps)

    done = newest(args.output_dir)
    if done:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "schedule": schedule.state_dict()}
        checkpoint.load(state, checkpoint_id=args.output_dir / f"checkpoint-{done}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        schedule.load_state_dict(state["schedule"])

    rows, accumulation = load_chats(args.dataset, "train"), args.gradient_accumulation_steps
    options = {"num_frames": args.num_frames} if args.num_frames else {}
    collator = VideoQACollator(processor, options, args.max_length, model.config.stts_config)
    per_step = accumulation * world_size
    every = micro_batches(media, args.per_device_train_batch_size, per_step)
    batches = iter(
        DataLoader(
            rows,
            batch_sampler=islice(every, done * per_step + rank, args.max_steps * per_step, world_size),
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
        )
    )
    losses = []
    for step in range(done + 1, args.max_steps + 1):
        step_batches = [next(batches).to(device) for _ in range(accumulation)]
        num_labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in step_batches)
        dist.all_reduce(num_labels)
        total = torch.zeros((), device=device)
        for batch in step_batches:
            loss = model(**batch, num_items_in_batch=num_labels, use_cache=False).loss
            (loss * world_size).backward()  # FSDP takes the mean of the processes' gradients, and this is a share
            total += loss.detach()
        dist.all_reduce(total)
        clip_gradients(model, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total.item())
        if rank == 0:
            print(f"step {step} loss {losses[-1]:.4f}", flush=True)
        if step % args.save_steps == 0 or step == args.max_steps:
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments, "schedule": schedule.state_dict()}
            checkpoint.save(state, checkpoint_id=args.output_dir / f"checkpoint-{step}")

    save_sharded(model, args.output_dir)
    if rank == 0:
        processor.save_pretrained(args.output_dir)
        trained_on = f"{Path(args.dataset).name}, {args.max_steps} steps"
        name = None if Path(args.model).is_dir() else args.model
        write_card(args.output_dir, **inherited(args.model, name), trained_on=trained_on)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
