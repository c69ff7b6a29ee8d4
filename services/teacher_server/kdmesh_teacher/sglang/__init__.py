"""SGLang as a teacher uses it: the engine in the server, and what changes in SGLang's own processes."""
