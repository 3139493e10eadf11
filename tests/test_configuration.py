import numpy as np
import pytest
from helpers import config_dict, make_model
from stts_molmo.configuration_stts_molmo import STTSConfig, STTSMolmoConfig, validate_prune_ratio
from stts_molmo.modeling_stts_molmo import STTSMolmoForConditionalGeneration


def test_defaults_are_the_papers_settings():
    config = STTSMolmoConfig().stts_config
    assert (config.prune_layer, config.prune_ratio, config.pooling_size, config.method) == (3, 0.5, 3, "scorer")


def test_presets():
    paper, authors = STTSConfig.paper(prune_ratio=0.3), STTSConfig.authors()
    assert (paper.score_bias, paper.aux_target, paper.aux_loss_weight, paper.prune_ratio) == ("log", "pooled", 1.0, 0.3)
    assert (authors.score_bias, authors.aux_target, authors.aux_loss_weight) == ("rescaled_log", "patches", 0.5)
    assert authors.refill_lone_frames and not paper.refill_lone_frames


def test_round_trip(tmp_path):
    config = STTSMolmoConfig(**config_dict(prune_ratio=0.25, method="cosine"))
    config.save_pretrained(tmp_path)
    loaded = STTSMolmoConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.stts_config, STTSConfig) and loaded.stts_config.prune_ratio == 0.25


def test_a_molmo2_config_becomes_ours():
    assert STTSMolmoConfig(model_type="molmo2").model_type == "stts_molmo"


@pytest.mark.parametrize(
    ("stts_config", "value", "bound"),
    [
        ({"prune_ratio": 1.0}, "1.0", "[0, 1)"),
        ({"prune_ratio": -0.1}, "-0.1", "[0, 1)"),
        ({"prune_ratio": float("nan")}, "nan", "[0, 1)"),
        ({"method": "magic"}, "magic", "'scorer', 'cosine', 'random', 'tome', 'none'"),
        ({"score_bias": "linear"}, "linear", "'log'"),
        ({"aux_target": "pixels"}, "pixels", "'patches'"),
        ({"scorer_hidden_act": "sillu"}, "sillu", "'silu'"),
        ({"prune_layer": 3}, "3", "<= 2"),
        ({"prune_layer": -1}, "-1", "0 or more"),
        ({"prune_layer": 2}, "[4, -2]", "not after prune_layer + 1 = 3"),
        ({"pooling_size": 0}, "0", "1 or more"),
        ({"aux_loss_weight": -1.0}, "-1.0", "0 or more"),
        ({"scorer_hidden_size": 0}, "0", "1 or more"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_values_are_refused_with_value_and_bound(stts_config, value, bound):
    with pytest.raises(ValueError) as error:
        STTSMolmoConfig(**config_dict(**stts_config))
    assert value in str(error.value) and bound in str(error.value)


@pytest.mark.parametrize("number", [np.float32(0.3), np.float64(0.3), 0.3])
def test_a_ratio_is_the_decimal_that_it_is_written_as(number):
    assert validate_prune_ratio(number) == 0.3


def test_overrides_at_loading_are_checked(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not after prune_layer"):
        STTSMolmoForConditionalGeneration.from_pretrained(tmp_path, stts_config={"prune_layer": 2})
