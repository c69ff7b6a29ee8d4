"""Servers with OpenAI's chat completions: what is sent, who is asked, and when it is asked again."""
