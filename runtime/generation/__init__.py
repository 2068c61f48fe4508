"""Text from decoder language models: scheduling, sampling, tokens to text. Imported when a model first generates."""
