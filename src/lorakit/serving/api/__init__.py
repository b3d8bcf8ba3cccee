"""OpenAI's API over HTTP, with vLLM's paths for adapters and its names of metrics."""
