"""One base and many adapters behind a server with OpenAI's API, in batches that change."""
