"""Which sections of a job's configuration go together: each module yields, in a sentence, every rule that is broken."""
