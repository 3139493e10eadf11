"""The changes to be noticed: of budget, scores, selection, merging, packing, attention, prompts, loss and training."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """
    what: the change in words, one line.
    file: below the root.
    old, new: text of the file, which it holds once, and what stands there instead.
    tests: arguments of pytest, the tests that should fail.
    equivalent: why nothing can fail; empty where something must.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""


def reference(words: str) -> str:
    return f"tests/test_reference.py -k '{words}'"


PRUNING, ATTENTION, PROMPT = "pruning_stts_molmo.py", "attention_stts_molmo.py", "prompt_stts_molmo.py"
MODELING, GENERATION, CONFIGURATION = (
    "modeling_stts_molmo.py",
    "generation_stts_molmo.py",
    "configuration_stts_molmo.py",
)
TRAINING, CONVERSION, VISUALIZATION = "tools/training.py", "tools/conversion.py", "tools/visualization.py"

PAPER = reference("paper and dense and sdpa")
PAPER_PADDED = reference("paper and padded and sdpa")
PAPER_EAGER = reference("paper and dense and eager")
PATCHES = reference("compared and dense and sdpa")
RESCALED = reference("rescaled and dense and sdpa")
COSINE = reference("cosine and dense and sdpa")
SCORING, TOME, PACKING = "tests/test_scoring.py", "tests/test_tome.py", "tests/test_packing.py"
MODEL, OPTIONS, FAKE_CUDA = "tests/test_model.py", "tests/test_options.py", "tests/test_fake_cuda.py"
GENERATE, PACKED_ROWS = "tests/test_generation.py", "tests/test_packed_rows.py"
LLM_ATTENTION, TRAINER = "tests/test_llm_attention.py", "tests/test_training.py"
BY_HAND = f"{MODEL} -k 'by_hand and not generation'"

MUTATIONS = [
    # ------------------------------------------------------------------------------------------------------------------
    # Budget, blocks and frames
    # ------------------------------------------------------------------------------------------------------------------
    Mutation(
        "the first frame's tokens may be dropped too",
        PRUNING,
        "return num_tokens - min(num_dropped, num_tokens - tokens_per_frame)",
        "return num_tokens - num_dropped",
        f"{SCORING} -k 'test_budget and not exact'",
    ),
    Mutation(
        "the budget in binary floats",
        PRUNING,
        "int(exact_ratio(prune_ratio) * num_tokens)",
        "int(prune_ratio * num_tokens)",
        f"{SCORING} -k 'test_budget and not exact'",
    ),
    Mutation(
        "the budget rounded up",
        PRUNING,
        "int(exact_ratio(prune_ratio) * num_tokens)",
        "math.ceil(exact_ratio(prune_ratio) * num_tokens)",
        f"{SCORING} -k 'test_budget and not exact'",
    ),
    Mutation(
        "short videos get more tokens than they have",
        PRUNING,
        "return min(num_tokens, max_vision_tokens)",
        "return max_vision_tokens",
        f"{OPTIONS} -k 'is_what_is_kept'",
    ),
    Mutation(
        "slots outside the frame hold a patch",
        PRUNING,
        "return gathered if layout.is_dense else gathered.masked_fill((blocks < 0)[None, :, :, None], 0)",
        "return gathered",
        PAPER_PADDED,
    ),
    Mutation(
        "the frame before a video is another video's",
        PRUNING,
        "torch.cat([torch.zeros_like(v[:1]), v[:-1]]) for v in features.split(list(num_frames))",
        "torch.cat([torch.zeros_like(v[:1]), v[:-1]]) for v in [features]",
        PAPER,
    ),
    Mutation(
        "the next frame for the previous one",
        PRUNING,
        "torch.cat([torch.zeros_like(v[:1]), v[:-1]])",
        "torch.cat([v[1:], torch.zeros_like(v[:1])])",
        PAPER,
    ),
    Mutation(
        "only the first video's first frame is spared",
        PRUNING,
        "torch.cat([torch.zeros_like(v[:1]), v[1:]]) for v in values.split(list(num_frames))",
        "torch.cat([torch.zeros_like(v[:1]), v[1:]]) for v in [values]",
        PAPER,
    ),
    Mutation(
        "similarity for dissimilarity",
        PRUNING,
        "1 - F.cosine_similarity(",
        "F.cosine_similarity(",
        COSINE,
    ),
    Mutation(
        "similarity in half precision",
        PRUNING,
        "F.cosine_similarity(before.float(), after.float(), dim=-1)",
        "F.cosine_similarity(before, after, dim=-1).float()",
        f"{SCORING} -k dissimilarity",
    ),
    Mutation(
        "similarity with the frame before the previous one",
        PRUNING,
        "zip(video[:-1].split(32), video[1:].split(32), strict=True)",
        "zip(video[:1].expand_as(video[1:]).split(32), video[1:].split(32), strict=True)",
        COSINE,
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Scores, bias and loss
    # ------------------------------------------------------------------------------------------------------------------
    Mutation(
        "random scores depend on the place in the batch",
        PRUNING,
        "torch.Generator().manual_seed(seed)",
        "torch.Generator().manual_seed(seed + len(scores))",
        f"{SCORING} -k seeded",
    ),
    Mutation(
        "no new random draw in training",
        MODELING,
        "None if self.training else self.stts_config.seed",
        "self.stts_config.seed",
        f"{SCORING} -k drawn",
    ),
    Mutation(
        "random scores forget the config's seed",
        MODELING,
        "None if self.training else self.stts_config.seed",
        "None if self.training else 0",
        f"{SCORING} -k drawn",
    ),
    Mutation(
        "[current, previous] for [previous, current]",
        MODELING,
        "torch.cat([previous_frame(pooled, layout.num_frames), pooled], dim=-1)",
        "torch.cat([pooled, previous_frame(pooled, layout.num_frames)], dim=-1)",
        PAPER,
    ),
    Mutation(
        "no SiLU after the first layer",
        MODELING,
        "self.activation_fn(self.fc1(hidden_states))",
        "self.fc1(hidden_states)",
        PAPER,
    ),
    Mutation(
        "no SiLU after the second layer",
        MODELING,
        "self.activation_fn(self.fc2(hidden_states))",
        "self.fc2(hidden_states)",
        PAPER,
    ),
    Mutation(
        "GELU for SiLU",
        CONFIGURATION,
        'scorer_hidden_act: str = "silu"',
        'scorer_hidden_act: str = "gelu"',
        PAPER,
    ),
    Mutation(
        "a block's first patch asks in place of its mean",
        MODELING,
        "query = patches.mean(1, keepdim=True)",
        "query = patches[:, :1]",
        PAPER,
    ),
    Mutation(
        "the mean of a block counts slots outside the frame",
        MODELING,
        "query = patches.sum(1, keepdim=True) / mask.sum(1)[:, None, None]",
        "query = patches.mean(1, keepdim=True)",
        PAPER_PADDED,
    ),
    Mutation(
        "slots outside the frame are keys",
        MODELING,
        "attention_mask.masked_fill(~mask, torch.finfo(patches.dtype).min)[:, None, None]",
        "attention_mask[:, None, None]",
        PAPER_PADDED,
    ),
    Mutation(
        "the sigmoid before float32",
        MODELING,
        "return self.fc3(hidden_states).squeeze(-1).float(), pooled",
        "return self.fc3(hidden_states).squeeze(-1), pooled",
        f"{SCORING} -k half_precision",
    ),
    Mutation(
        "scores rounded to half precision",
        MODELING,
        "token_scores = score_logits.sigmoid()",
        "token_scores = score_logits.bfloat16().sigmoid().float()",
        f"{SCORING} -k half_precision",
    ),
    Mutation(
        "initial weights of spread 0.02",
        MODELING,
        "std=module.in_features**-0.5",
        "std=0.02",
        f"{SCORING} -k new_scorer",
    ),
    Mutation(
        "a loaded scorer starts like the ViT",
        MODELING,
        'if module in getattr(self, "token_scorer", nn.Module()).modules():',
        "if False:",
        f"{SCORING} -k new_scorer",
    ),
    Mutation(
        "cosine of the first patch of a block only",
        MODELING,
        "return temporal_dissimilarity(blocks.flatten(2), layout.num_frames), None, None",
        "return temporal_dissimilarity(blocks[:, :, 0], layout.num_frames), None, None",
        COSINE,
    ),
    Mutation(
        "the two auxiliary targets swapped",
        MODELING,
        'compared = pooled if self.stts_config.aux_target == "pooled" else blocks.flatten(2)',
        'compared = pooled if self.stts_config.aux_target != "pooled" else blocks.flatten(2)',
        PAPER,
    ),
    Mutation(
        "the authors' target is one patch",
        MODELING,
        'compared = pooled if self.stts_config.aux_target == "pooled" else blocks.flatten(2)',
        'compared = pooled if self.stts_config.aux_target == "pooled" else blocks[:, :, 0]',
        PATCHES,
    ),
    Mutation(
        "the target of the auxiliary loss is not detached",
        PRUNING,
        "(token_scores - target.detach()) ** 2",
        "(token_scores - target) ** 2",
        f"{SCORING} -k auxiliary_loss",
    ),
    Mutation(
        "the auxiliary loss counts first frames",
        PRUNING,
        "zero_first_frames((token_scores - target.detach()) ** 2, num_frames).mean()",
        "((token_scores - target.detach()) ** 2).mean()",
        PAPER,
    ),
    Mutation(
        "the auxiliary loss is absolute, not squared",
        PRUNING,
        "(token_scores - target.detach()) ** 2",
        "(token_scores - target.detach()).abs()",
        PAPER,
    ),
    Mutation(
        "the authors' rescaling over frames in place of rows",
        PRUNING,
        "score_logits.sigmoid().unflatten(1, layout.grid)",
        "score_logits.sigmoid().unflatten(1, (1, -1))",
        RESCALED,
    ),
    Mutation(
        "the authors' lowest score is exp(-3)",
        PRUNING,
        "RESCALED_MIN_SCORE = math.exp(-2)",
        "RESCALED_MIN_SCORE = math.exp(-3)",
        RESCALED,
    ),
    Mutation(
        "the bias is the score, not its logarithm",
        PRUNING,
        "bias = F.logsigmoid(score_logits)",
        "bias = score_logits.sigmoid()",
        PAPER,
    ),
    Mutation(
        "tiny scores are clamped and learn no more",
        PRUNING,
        "bias = F.logsigmoid(score_logits)",
        "bias = score_logits.sigmoid().clamp_min(1e-6).log()",
        f"{SCORING} -k tiny_score",
    ),
    Mutation(
        "first frames are biased",
        PRUNING,
        "bias = zero_first_frames(bias, layout.num_frames)",
        "bias = bias",
        PAPER,
    ),
    Mutation(
        "a video that loses nothing is biased",
        PRUNING,
        "torch.zeros_like(video) if kept == video.numel() else video",
        "video",
        reference("nothing and dense and sdpa"),
    ),
    Mutation(
        "each patch gets another block's bias",
        PRUNING,
        "patch_slots(layout) // layout.blocks.shape[1]",
        "patch_slots(layout) % layout.blocks.shape[0]",
        PAPER,
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Selection and merging
    # ------------------------------------------------------------------------------------------------------------------
    Mutation(
        "the highest scores go",
        PRUNING,
        "first_frame_first.argsort(descending=True, stable=True)",
        "first_frame_first.argsort(descending=False, stable=True)",
        PAPER,
    ),
    Mutation(
        "ties go to the higher index",
        PRUNING,
        "order = first_frame_first.argsort(descending=True, stable=True)",
        "order = first_frame_first.flip(0).argsort(descending=True, stable=True).sub(len(first_frame_first) - 1).neg()",
        f"{SCORING} -k sorted_list",
    ),
    Mutation(
        "the first frame competes with the others",
        PRUNING,
        "torch.full_like(scores[:1], torch.inf)",
        "scores[:1]",
        PAPER,
    ),
    Mutation(
        "NaN beats the first frame",
        PRUNING,
        "others = scores[1:].nan_to_num(nan=-torch.inf)",
        "others = scores[1:]",
        f"{OPTIONS} -k nan",
    ),
    Mutation(
        "a sort that is not asked to be stable",
        PRUNING,
        "mask.flatten().to(torch.int8).argsort(descending=True, stable=True)",
        "mask.flatten().to(torch.int8).argsort(descending=True)",
        f"{SCORING} -k mask_to_indices",
        "torch sorts stably on a CPU, asked or not; on a GPU the order of the survivors would be another",
    ),
    Mutation(
        "spare merges go to one frame fewer",
        PRUNING,
        "share + (frame <= spare)",
        "share + (frame < spare)",
        f"{TOME} -k shares",
    ),
    Mutation(
        "the sets of matching swapped",
        PRUNING,
        "in_a, in_b = alive & (rank % 2 == 1), alive & (rank % 2 == 0)",
        "in_a, in_b = alive & (rank % 2 == 0), alive & (rank % 2 == 1)",
        f"{TOME} -k 'lowest_index'",
    ),
    Mutation(
        "the least alike blocks merge",
        PRUNING,
        "place = best.argsort(dim=1, descending=True, stable=True)",
        "place = best.argsort(dim=1, descending=False, stable=True)",
        f"{TOME} -k 'blocks_alike or lowest_index'",
    ),
    Mutation(
        "likeness of one patch in place of the block's",
        PRUNING,
        "match_blocks(blocks.sum(2, dtype=torch.float32), num_left, num_rounds)",
        "match_blocks(blocks[:, :, 0].float(), num_left, num_rounds)",
        f"{TOME} -k 'equals_loops and 9'",
    ),
    Mutation(
        "a merged block is a sum, not a mean",
        PRUNING,
        "merged = merged / sizes.clamp_min(1)[..., None].to(blocks.dtype)",
        "merged = merged * 1",
        f"{TOME} -k blocks_alike",
    ),
    Mutation(
        "no proportional attention",
        PRUNING,
        "torch.where(sizes > 0, sizes.log(), MERGED_AWAY_BIAS)",
        "torch.where(sizes > 0, 0.0, MERGED_AWAY_BIAS)",
        f"{TOME} -k blocks_alike",
    ),
    Mutation(
        "what was merged away is still a key",
        PRUNING,
        "torch.where(sizes > 0, sizes.log(), MERGED_AWAY_BIAS)",
        "torch.where(sizes > 0, sizes.log(), 0.0)",
        f"{TOME} -k blocks_alike",
    ),
    Mutation(
        "autocast rounds likenesses",
        PRUNING,
        "with torch.autocast(blocks.device.type, enabled=False):",
        "with torch.autocast(blocks.device.type, enabled=torch.is_autocast_enabled(blocks.device.type)):",
        f"{TOME} -k autocast",
    ),
    Mutation(
        "a frame that loses all its blocks keeps one",
        PRUNING,
        "members.diagonal(dim1=1, dim2=2) & (shares < layout.tokens_per_frame)[:, None]",
        "members.diagonal(dim1=1, dim2=2)",
        f"{TOME} -k 'equals_loops and 0.99-6'",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # The tower
    # ------------------------------------------------------------------------------------------------------------------
    Mutation(
        "tokens are scored one layer too early",
        MODELING,
        "for layer in self.layers[: self.stts_config.prune_layer + 1]:",
        "for layer in self.layers[: self.stts_config.prune_layer]:",
        PAPER,
    ),
    Mutation(
        "the bias goes to one layer later",
        MODELING,
        "layer = self.layers[self.stts_config.prune_layer + 1]",
        "layer = self.layers[self.stts_config.prune_layer + 2]",
        PAPER,
    ),
    Mutation(
        "no bias under eager attention",
        MODELING,
        "None if key_bias is None else key_bias[:, None, None]",
        "None",
        PAPER_EAGER,
    ),
    Mutation(
        "no bias under sdpa",
        MODELING,
        "return layer(hidden_states, None, key_bias, packing)",
        "return layer(hidden_states, None, None, packing)",
        PAPER,
    ),
    Mutation(
        "dropped patches are no keys of the layer that takes the bias",
        MODELING,
        "queries[None], normed, key_bias=key_bias,",
        "queries[None], normed * 0, key_bias=key_bias,",
        PAPER,
    ),
    Mutation(
        "features of the adapter's layers in another order",
        MODELING,
        "return [outputs[index] for index in self.feature_layers]",
        "return [outputs[index] for index in sorted(self.feature_layers)]",
        PAPER,
    ),
    Mutation(
        "layers run that the adapter does not read",
        MODELING,
        "range(self.stts_config.prune_layer + 2, max(self.feature_layers) + 1)",
        "range(self.stts_config.prune_layer + 2, len(self.layers))",
        PAPER,
        "their outputs are read by nobody: the same result, more slowly",
    ),
    Mutation(
        "the adapter asks with a block's first patch",
        MODELING,
        "self.image_pooling_2d(blocks.mean(1, keepdim=True), blocks,",
        "self.image_pooling_2d(blocks[:, :1], blocks,",
        PAPER,
    ),
    Mutation(
        "training without a loss for the scorer where nothing is dropped",
        MODELING,
        "(sum(num_kept) == num_tokens and not self.training)",
        "sum(num_kept) == num_tokens",
        f"{MODEL} -k every_parameter",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Packing
    # ------------------------------------------------------------------------------------------------------------------
    Mutation(
        "frames are counted without what was refilled",
        ATTENTION,
        "counts = ((layout.blocks >= 0).sum(1) * context_mask).sum(1)",
        "counts = ((layout.blocks >= 0).sum(1) * keep_mask).sum(1)",
        f"{PACKING} -k context_only",
    ),
    Mutation(
        "refilled blocks are passed for survivors",
        ATTENTION,
        "slots.index_select(0, mask_to_indices(keep_mask.flatten()[tokens], num_kept))",
        "slots[:num_kept]",
        f"{PACKING} -k context_only",
    ),
    Mutation(
        "a frame's patches are looked for in the first frame",
        ATTENTION,
        "(blocks + (frame * layout.num_patches)[:, None]).flatten()",
        "(blocks + (frame * 0)[:, None]).flatten()",
        PAPER,
    ),
    Mutation(
        "first fit of rising counts",
        ATTENTION,
        "key=lambda frame: -counts[frame]",
        "key=lambda frame: counts[frame]",
        f"{PACKING} -k brute_force",
    ),
    Mutation(
        "first fit without order",
        ATTENTION,
        "sorted(range(len(counts)), key=lambda frame: -counts[frame])",
        "range(len(counts))",
        f"{PACKING} -k brute_force",
    ),
    Mutation(
        "a bin takes a token too many",
        ATTENTION,
        "if used + counts[frame] <= capacity)",
        "if used + counts[frame] <= capacity + 1)",
        f"{PACKING} -k brute_force",
    ),
    Mutation(
        "frames without a survivor are refilled",
        ATTENTION,
        "count > 0 and used.count(b) == 1 for b, count",
        "used.count(b) == 1 for b, count",
        f"{PACKING} -k refill_gives",
    ),
    Mutation(
        "videos share bins",
        ATTENTION,
        "for num_frames in layout.num_frames:\n        counts, rest",
        "for num_frames in [sum(layout.num_frames)]:\n        counts, rest",
        f"{MODEL} -k refilled",
    ),
    Mutation(
        "frames of a bin see each other",
        ATTENTION,
        "masked_fill(~same_frame, torch.finfo(packed.dtype).min)",
        "masked_fill(~same_frame, 0)",
        PAPER_EAGER,
    ),
    Mutation(
        "a frame sees the empty slots of its bin",
        ATTENTION,
        "frame_ids = torch.full((bins.num_bins * capacity,), -1, device=packed.device)",
        "frame_ids = torch.full((bins.num_bins * capacity,), 1, device=packed.device)",
        PAPER_EAGER,
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Attention
    # ------------------------------------------------------------------------------------------------------------------
    Mutation(
        "the folded bias has three digits in half precision",
        ATTENTION,
        "torch.cat([key, high, low], dim=-1)",
        "torch.cat([key, high, torch.zeros_like(low)], dim=-1)",
        f"{PACKING} -k keeps_its_digits",
    ),
    Mutation(
        "queries are scaled by the grown width",
        ATTENTION,
        "query * (grown / head_dim) ** 0.5",
        "query * 1",
        PAPER,
    ),
    Mutation(
        "the bias is scaled by the old width",
        ATTENTION,
        "bias = (key_bias * grown**0.5)",
        "bias = (key_bias * head_dim**0.5)",
        PAPER,
    ),
    Mutation(
        "a varlen window of 1",
        ATTENTION,
        "window = (max_seqlen, max_seqlen)",
        "window = (1, 1)",
        f"{PACKING} -k torchs_kernel",
    ),
    Mutation(
        "a causal varlen window",
        ATTENTION,
        "window = (max_seqlen, max_seqlen)",
        "window = (max_seqlen, 0)",
        f"{PACKING} -k torchs_kernel",
    ),
    Mutation(
        "the kernel is given the queries' offsets for the keys",
        ATTENTION,
        "lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen, max_seqlen)",
        "lengths = (cu_seqlens_q, cu_seqlens_q, max_seqlen, max_seqlen)",
        f"{PACKING} -k torchs_kernel",
    ),
    Mutation(
        "a kernel without dropout takes dropout",
        ATTENTION,
        "if has_varlen_kernel(query) and not dropout:",
        "if has_varlen_kernel(query):",
        f"{PACKING} -k dropout",
    ),
    Mutation(
        "no dropout in the loop over frames",
        ATTENTION,
        "F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)",
        "F.scaled_dot_product_attention(q, k, v)",
        f"{PACKING} -k dropout",
    ),
    Mutation(
        "dropout in evaluation",
        MODELING,
        "dropout = self.attention_dropout if self.training else 0.0",
        "dropout = self.attention_dropout",
        f"{PACKING} -k training_alone",
    ),
    Mutation(
        "flash kernels are expected before Ampere",
        ATTENTION,
        "torch.cuda.get_device_capability(device_index) >= (8, 0)",
        "torch.cuda.get_device_capability(device_index) >= (7, 0)",
        f"{FAKE_CUDA} -k 'half_precision and Turing'",
    ),
    Mutation(
        "pooling on CUDA without its scale",
        ATTENTION,
        "(query[:, None] * key).sum(-1, keepdim=True, dtype=torch.float32) * scaling",
        "(query[:, None] * key).sum(-1, keepdim=True, dtype=torch.float32)",
        reference("as_on_cuda"),
    ),
    Mutation(
        "a vision token sees itself twice",
        ATTENTION,
        "queries, keys, state_behind = vision[1:], vision[:-1], ()",
        "queries, keys, state_behind = vision[1:], vision[1:], ()",
        f"{LLM_ATTENTION} -k 'those_of_the_dense_mask and middle and float32'",
    ),
    Mutation(
        "the two passes are weighed the wrong way round",
        ATTENTION,
        "share = (logsumexp_behind - logsumexp_before).sigmoid()",
        "share = (logsumexp_before - logsumexp_behind).sigmoid()",
        f"{LLM_ATTENTION} -k 'those_of_the_dense_mask and middle and float32'",
    ),
    Mutation(
        "the backward is given one pass's log-sum-exp",
        ATTENTION,
        "torch.logaddexp(logsumexp_before, logsumexp_behind)",
        "logsumexp_before",
        f"{LLM_ATTENTION} -k 'those_of_the_dense_mask and middle and float32'",
    ),
    Mutation(
        "vision tokens in their order where the reverse is wanted",
        ATTENTION,
        "Sample(row, begin, stop, vision.flip(0) - begin)",
        "Sample(row, begin, stop, vision - begin)",
        f"{LLM_ATTENTION} -k 'those_of_the_dense_mask and middle and float32'",
    ),
    Mutation(
        "positions of vision tokens count padding",
        ATTENTION,
        "Sample(row, begin, stop, vision.flip(0) - begin)",
        "Sample(row, begin, stop, vision.flip(0))",
        f"{LLM_ATTENTION} -k 'those_of_the_dense_mask and left and float32'",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # The prompt
    # ------------------------------------------------------------------------------------------------------------------
    Mutation(
        "each placeholder is taken for the next token",
        PROMPT,
        "token = placeholders.flatten().cumsum(0).view_as(placeholders) - 1",
        "token = placeholders.flatten().cumsum(0).view_as(placeholders)",
        f"{MODEL} -k compact_and_masked",
    ),
    Mutation(
        "padding comes back as text",
        PROMPT,
        "return align_rows(attended & ~dropped, lengths, padding_side)",
        "return align_rows(~dropped, lengths, padding_side)",
        f"{MODEL} -k 'a_batch_equals_one_by_one and cosine and sdpa'",
    ),
    Mutation(
        "rows are always padded on the right",
        PROMPT,
        'padding_side = "left" if not all(first) and all(last) else "right"',
        'padding_side = "right"',
        f"{MODEL} -k padded_again",
    ),
    Mutation(
        "rows that were packed get a mask",
        PROMPT,
        "(compaction.is_padded and position_ids is None)",
        "compaction.is_padded",
        f"{PACKED_ROWS} -k 'rows_of_a_batch and dense'",
    ),
    Mutation(
        "positions keep their gaps",
        PROMPT,
        "return position_ids - (shift - shift_before_sample)",
        "return position_ids",
        f"{MODEL} -k close_gaps",
    ),
    Mutation(
        "a sample's positions lose what samples before it dropped",
        PROMPT,
        "return position_ids - (shift - shift_before_sample)",
        "return position_ids - shift",
        f"{MODEL} -k close_gaps",
    ),
    Mutation(
        "padding is written over states",
        PROMPT,
        "hidden_states.masked_fill(~mask, 0))",
        "hidden_states)",
        f"{MODEL} -k 'aligned_on_both_sides or exactly_the_budget'",
    ),
    Mutation(
        "decoding by hand keeps the full prompt's positions",
        PROMPT,
        "torch.where(goes_on, position_ids, position_ids - (num_before - num_kept))",
        "position_ids",
        BY_HAND,
    ),
    Mutation(
        "a cache that was reset remembers its video",
        PROMPT,
        "if cache is not None and prompt is not None and not cache.get_seq_length():",
        "if False:",
        f"{GENERATE} -k 'was_reset'",
    ),
    Mutation(
        "rows restored in the order of beams",
        PROMPT,
        "self.input_ids.repeat_interleave(len(sequences) // len(self.input_ids), dim=0)",
        "self.input_ids.repeat(len(sequences) // len(self.input_ids), 1)",
        f"{GENERATE} -k 'each_row_generates_alone and return and cosine'",
    ),
    Mutation(
        "logits processors see the short prompt",
        PROMPT,
        "logits_processor and LogitsProcessorList(map(on_full_ids, logits_processor))",
        "logits_processor",
        f"{GENERATE} -k processors_see",
    ),
    Mutation(
        "stopping criteria see the short prompt",
        PROMPT,
        "stopping_criteria and StoppingCriteriaList(map(on_full_ids, stopping_criteria))",
        "stopping_criteria",
        f"{GENERATE} -k criteria_see",
    ),
    Mutation(
        "the streamer gets the short prompt",
        PROMPT,
        "streamer and FullPromptStreamer(streamer, self.input_ids)",
        "streamer",
        f"{GENERATE} -k streamer",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Generation
    # ------------------------------------------------------------------------------------------------------------------
    Mutation(
        "min_length is not translated",
        GENERATION,
        'for name in ("max_length", "min_length"):',
        'for name in ("max_length",):',
        f"{GENERATE} -k min_length_counts",
    ),
    Mutation(
        "max_length is not translated",
        GENERATION,
        'for name in ("max_length", "min_length"):',
        'for name in ("min_length",):',
        f"{GENERATE} -k max_length_of",
    ),
    Mutation(
        "the model's own config beats the one passed",
        GENERATION,
        "configs = (generation_config, self.generation_config)",
        "configs = (self.generation_config, generation_config)",
        f"{OPTIONS} -k asks_its_arguments",
    ),
    Mutation(
        "a caller's features are repeated in place",
        GENERATION,
        "pooler_output=tuple(video.pooler_output)",
        "pooler_output=video.pooler_output",
        f"{GENERATE} -k encoded_before",
        "of a tuple, which the features hold, Transformers makes a new one",
    ),
    Mutation(
        "the padding side is guessed in generate too",
        GENERATION,
        ', padding_side="left")',
        ")",
        f"{GENERATE} -k without_padding",
    ),
    Mutation(
        "what ends an answer hides the prompt",
        GENERATION,
        "if pad is None or is_eos or not",
        "if pad is None or not",
        f"{GENERATE} -k also_ends",
    ),
    Mutation(
        "padding is not inferred",
        GENERATION,
        'kwargs["attention_mask"] = self._infer_attention_mask(input_ids, generation_config, kwargs)',
        "pass",
        f"{GENERATE} -k missing_mask",
    ),
    Mutation(
        "the cache remembers one row a prompt",
        GENERATION,
        "remember_prompt(cache, prompt.repeat(len(sequences)))",
        "remember_prompt(cache, prompt)",
        f"{GENERATE} -k several_answers",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Loss and training
    # ------------------------------------------------------------------------------------------------------------------
    Mutation(
        "labels are predicted from dropped positions",
        MODELING,
        "positions.masked_fill(~input_keep_mask.to(targets.device), -1).cummax(1).values",
        "positions.clone()",
        f"{MODEL} -k last_survivor",
    ),
    Mutation(
        "a label is predicted from nothing",
        MODELING,
        "is_read = (targets != -100) & (positions >= 0)",
        "is_read = targets != -100",
        f"{MODEL} -k no_survivor",
    ),
    Mutation(
        "the auxiliary loss is unweighted",
        MODELING,
        "add_auxiliary_loss(loss, weight * outputs.aux_loss,",
        "add_auxiliary_loss(loss, outputs.aux_loss,",
        f"{OPTIONS} -k training_loss_only",
    ),
    Mutation(
        "the auxiliary loss is part of an evaluation",
        MODELING,
        "if self.training and outputs.aux_loss is not None:",
        "if outputs.aux_loss is not None:",
        f"{OPTIONS} -k training_loss_only",
    ),
    Mutation(
        "the auxiliary loss grows with micro-batches",
        MODELING,
        "share = 1.0 if num_items_in_batch is None else num_labels / num_items_in_batch",
        "share = 1.0",
        f"{TRAINER} -k 'accumulation and ring-10 or accumulation and 10.0'",
    ),
    Mutation(
        "the auxiliary loss is not reduced over processes",
        TRAINING,
        'self.trainer.accelerator.reduce(window, "sum").tolist()',
        "window.tolist()",
        f"{TRAINER} -k over_processes",
    ),
    Mutation(
        "the auxiliary loss of evaluations is logged too",
        TRAINING,
        "if model.training and outputs.aux_loss is not None:",
        "if outputs.aux_loss is not None:",
        f"{TRAINER} -k aux_loss_is_logged",
    ),
    Mutation(
        "logs add up",
        TRAINING,
        "total / count\n        self.sum, self.count = 0.0, 0",
        "total / count",
        f"{TRAINER} -k aux_loss_is_logged",
    ),
    Mutation(
        "a second run counts twice",
        TRAINING,
        "self.hook.remove()",
        "pass",
        f"{TRAINER} -k aux_loss_is_logged",
    ),
    Mutation(
        "questions are labels too",
        TRAINING,
        'batch["input_ids"].masked_fill(~is_answer, -100)',
        'batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)',
        f"{TRAINER} -k labels_are_the_answers",
    ),
    Mutation(
        "answers do not end",
        TRAINING,
        '"content": answer + tokenizer.eos_token}',
        '"content": answer}',
        f"{TRAINER} -k labels_are_the_answers",
    ),
    Mutation(
        "the scorer learns like the ViT",
        TRAINING,
        'if "token_scorer." in name:',
        "if False:",
        f"{TRAINER} -k groups_are_those",
    ),
    Mutation(
        "biases and norms decay",
        TRAINING,
        "weight_decay if parameter.ndim > 1 else 0.0",
        "weight_decay",
        f"{TRAINER} -k groups_are_those",
    ),
    # ------------------------------------------------------------------------------------------------------------------
    # Files
    # ------------------------------------------------------------------------------------------------------------------
    Mutation(
        "a checkpoint's scratch folder on another file system",
        CONVERSION,
        'tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.")',
        "tempfile.TemporaryDirectory()",
        "tests/test_conversion.py -k 'beside_its_place and native'",
    ),
    Mutation(
        "a picture's scratch folder on another file system",
        VISUALIZATION,
        'tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")',
        "tempfile.TemporaryDirectory()",
        "tests/test_visualization.py -k beside_its_place",
    ),
]
