"""Changes of what asks: many questions about a video, many videos, and the shapes in which videos come."""

from .mutation import Mutation

ANSWER, CORPUS, TABLES = "tools/answer.py", "tools/corpus.py", "tools/tables.py"
VIDEO, PROCESSING = "video_stts_molmo.py", "processing_stts_molmo.py"
ASKING, INPUTS = "tests/test_asking.py", "tests/test_inputs.py"

OF_ASKING = [
    Mutation(
        "the ratio of a budget is rounded down",
        ANSWER,
        "ceil(Fraction(scale * (before - after), before))",
        "int(Fraction(scale * (before - after), before))",
        f"{ASKING} -k ratio_of",
    ),
    Mutation(
        "a cache forgets too little of the last question",
        ANSWER,
        "cache.crop(min(length - num_dropped - cache.get_seq_length(), 0))",
        "cache.crop(min(length - cache.get_seq_length(), 0))",
        f"{ASKING} -k many_questions",
    ),
    Mutation(
        "a cache that forgot its question still counts it",
        ANSWER,
        "if prompt is not None and length < prompt.length:",
        "if False:",
        f"{ASKING} -k many_questions",
    ),
    Mutation(
        "a question asked twice leaves nothing to be read",
        ANSWER,
        "common_prefix(self._read, input_ids[:-1])",
        "common_prefix(self._read, input_ids)",
        f"{ASKING} -k many_questions",
    ),
    Mutation(
        "a prompt that begins otherwise goes without the video",
        ANSWER,
        "if is_vision[num_common:].any():",
        "if False:",
        f"{ASKING} -k begins_otherwise",
    ),
    Mutation(
        "every turn of a conversation brings the video again",
        "tools/conversation.py",
        'message["content"] = message["content"][1:]',
        "pass",
        f"{ASKING} -k conversation_is",
    ),
    Mutation(
        "half a line stays in the journal",
        TABLES,
        "os.truncate(path, whole)",
        "pass",
        "tests/test_corpus.py -k being_written",
    ),
    Mutation(
        "what is answered is asked again",
        CORPUS,
        "if (name, question) not in rows]",
        "]",
        "tests/test_corpus.py -k grows",
    ),
    Mutation(
        "answers of other options are mixed in",
        CORPUS,
        'for other in {row["options"] for row in rows.values()} - {settings}:',
        "for other in ():",
        "tests/test_corpus.py -k other_options",
    ),
    Mutation(
        "a budget takes as many frames as it has whole frames' tokens",
        PROCESSING,
        "Fraction(max_vision_tokens, math.prod(self.grid))",
        "max_vision_tokens // math.prod(self.grid)",
        "tests/test_processing.py -k sampling_arguments",
    ),
    Mutation(
        "times of a decoder's frames are taken as even",
        VIDEO,
        "metadata.frame_times[indices] = (np.asarray",
        "_ = (np.asarray",
        f"{INPUTS} -k times_of_a_decoder",
    ),
    Mutation(
        "a column's decoder is asked for frames, and not its file",
        VIDEO,
        "        videos = source\n",
        "        pass\n",
        f"{INPUTS} -k column",
    ),
    Mutation(
        "a rate of the call goes before the number that a chat asks for",
        PROCESSING,
        '"max_fps": MAX_SAMPLES, "fps": None,',
        '"max_fps": MAX_SAMPLES,',
        f"{INPUTS} -k each_video_of_a_batch",
    ),
]
