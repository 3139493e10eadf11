"""Videos on their way from a request to the processor. Files stay files: which frames are read, options decide."""

from contextlib import contextmanager
from typing import Any

import aiohttp
import numpy as np
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataParser
from vllm.multimodal.video import VideoLoader

METADATA = ("total_num_frames", "fps", "duration", "video_backend", "frames_indices")


class EncodedVideoLoader(VideoLoader):
    """Hands on the bytes of a file, uint8 `(length,)`, which the checkpoint's processor samples and decodes."""

    @classmethod
    def load_bytes(cls, data: bytes, **kwargs) -> tuple[np.ndarray, dict[str, Any]]:
        return np.frombuffer(data, np.uint8), {}


class VideoParser(MultiModalDataParser):
    """Modifications: `bytes` are a video file, and frames may come without metadata."""

    def _parse_video_data(self, data) -> ModalityDataItems | None:
        items = data if isinstance(data, list) else [data]
        if not any(isinstance(item, bytes) for item in items):
            return super()._parse_video_data(data)
        return super()._parse_video_data(
            [EncodedVideoLoader.load_bytes(item) if isinstance(item, bytes) else item for item in items]
        )

    def _get_video_with_metadata(self, video):
        video, metadata = super()._get_video_with_metadata(video)
        return video, metadata or {}


@contextmanager
def as_value_errors():
    """What a server answers with a 4xx."""
    try:
        yield
    except (RuntimeError, NotImplementedError, OSError, aiohttp.ClientError) as error:  # a timeout is an OSError
        raise ValueError(f"This video cannot be fetched ({type(error).__name__}: {error}).") from error


class BlamelessMediaConnector(MediaConnector):
    """
    vLLM's, for which a file that may not be read or a link that leads nowhere is a fault of the server (500); here it
    is the request's. `VLLM_MEDIA_CONNECTOR=stts_molmo` selects it.
    """

    def load_from_url(self, *args, **kwargs):
        with as_value_errors():
            return super().load_from_url(*args, **kwargs)

    async def load_from_url_async(self, *args, **kwargs):
        with as_value_errors():
            return await super().load_from_url_async(*args, **kwargs)
