"""Dense and stock MoE models turned into VQMoE models."""
