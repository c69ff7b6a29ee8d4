"""SGLang as a rollout server uses it: the engine in the server, and what changes in SGLang's own processes."""
