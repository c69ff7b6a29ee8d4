"""What every server that runs SGLang needs of it: configuration, arguments, start, scheduler processes."""
