"""A checkpoint behind OpenAI's chat completions: requests that arrive together are answered together."""
