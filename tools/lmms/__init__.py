"""A plugin of lmms-eval: the model `stts_molmo`, a task that lmms-eval lacks, and the paper's thirteen benchmarks."""


def manifest():
    """What lmms-eval finds by the entry point in setup.py. Imported late: it is in the midst of its own import then."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="stts_molmo", chat_class_path="stts_molmo.tools.lmms.model.STTSMolmo")
