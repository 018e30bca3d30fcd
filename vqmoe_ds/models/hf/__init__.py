"""The Hugging Face model. Importing this package registers it with the Auto classes of ``transformers``.

``configuration_vqmoe.py`` and ``modeling_vqmoe.py`` are the very files that exported folders carry, so there is one
implementation, with and without this package.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from vqmoe_ds.models.hf.configuration_vqmoe import VQMoEConfig
from vqmoe_ds.models.hf.modeling_vqmoe import VQMoEForCausalLM

__all__ = ["VQMoEConfig", "VQMoEForCausalLM"]

AutoConfig.register(VQMoEConfig.model_type, VQMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(VQMoEConfig, VQMoEForCausalLM, exist_ok=True)
# So that save_pretrained copies the two files, as in folders that were exported.
VQMoEConfig.register_for_auto_class()
VQMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
