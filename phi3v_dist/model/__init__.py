"""Phi-3-V for transformers: `configuration`, `modeling` and its parts, `hub` (checkpoints), `row` (packed
rows).

Importing this package registers model_type `phi3_v` with AutoConfig, AutoModelForCausalLM and AutoProcessor.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.modeling import Phi3VForCausalLM
from phi3v_dist.model.row import PackedRow
from phi3v_dist.processor.processing import Phi3VProcessor

AutoConfig.register(Phi3VConfig.model_type, Phi3VConfig, exist_ok=True)
AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)

__all__ = ["PackedRow", "Phi3VConfig", "Phi3VForCausalLM"]
