"""A trained model behind HTTP: OpenAI's chat completions, reconstructions, and a page that shows both."""
