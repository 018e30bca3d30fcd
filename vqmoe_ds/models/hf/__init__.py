"""The Hugging Face model. Importing this package registers it with the Auto classes of ``transformers``.

The files beside this one are the very files that exported folders carry, so there is one implementation, with and
without this package.
"""

from vqmoe_ds.runtime.extras import library

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
except ModuleNotFoundError:
    library("transformers", "the Hugging Face model")  # says where it comes from
    raise

from vqmoe_ds.models.hf.configuration_vqmoe import VQMoEConfig
from vqmoe_ds.models.hf.modeling_vqmoe import VQMoEForCausalLM, VQMoEForSequenceClassification, VQMoEModel

__all__ = ["VQMoEConfig", "VQMoEForCausalLM", "VQMoEForSequenceClassification", "VQMoEModel"]

AutoConfig.register(VQMoEConfig.model_type, VQMoEConfig, exist_ok=True)
# With register_for_auto_class save_pretrained copies the files, as in folders that were exported.
VQMoEConfig.register_for_auto_class()
for auto, model in (
    (AutoModel, VQMoEModel),
    (AutoModelForCausalLM, VQMoEForCausalLM),
    (AutoModelForSequenceClassification, VQMoEForSequenceClassification),
):
    auto.register(VQMoEConfig, model, exist_ok=True)
    model.register_for_auto_class(auto.__name__)
