"""Checkpoints of models with native ``deepspeed.moe.layer.MoE`` layers."""
