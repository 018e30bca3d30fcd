"""Archives, safetensors files and shards, read and written in streams."""
